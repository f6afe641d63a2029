"""The loss of held-out rows under one fixed key, in total and row by row."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.pytrees import Structure, assemble, dismantle
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar


class Arguments(NamedTuple):
    """Arguments of a model as jit takes them: the arrays, which are traced, and the rest, which is not."""

    arrays: list[Any]
    structure: Structure


def take_apart(args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """Split arguments into arrays on the device, so that repeated calls copy nothing, and the rest."""
    arrays, structure = dismantle((args, kwargs))
    return Arguments([jnp.asarray(array) for array in arrays], structure)


def check_taken(svi: SVI, rows: Arguments, rng_key: PRNGKey, state: SVIState) -> None:
    """Trace the loss once with concrete rows, so that rows that do not fit raise here.

    Raises:
        EnergyError: if the model or the guide does not run on these rows.
    """
    given = lambda state: svi.get_params(state) | (state.mutable_state or {})  # noqa: E731
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # svi.init gave the same warnings for the training rows
            jax.eval_shape(lambda state: loss_at(svi, rows, rng_key, given(state)), state)
    except (AssertionError, TypeError, ValueError) as error:
        raise EnergyError(
            f"The model or the guide does not take the held-out rows: {error} The number of rows has to come from the "
            "arguments, because it may differ from that in training. Write numpyro.plate('rows', len(x)), and a guide "
            "without local latents."
        ) from error


def loss_at(svi: SVI, rows: Arguments, rng_key: PRNGKey, given: dict[str, Any]) -> Scalar:
    """Return the loss of the rows, given constrained parameters and mutable state by name."""
    args, kwargs = assemble(*rows)
    loss = by_site(svi.loss).loss(rng_key, given, svi.model, svi.guide, *args, **kwargs, **svi.static_kwargs)
    return in_order(loss)


def by_site(loss: Any) -> Any:
    """Return an ELBO that does not sum over the sites, where NumPyro would do so in an order that differs by process."""
    if not getattr(loss, "sum_sites", False):
        return loss
    loss = copy.copy(loss)
    loss.sum_sites = False
    return loss


def in_order(loss: Any) -> Scalar:
    """Return the sum of a loss by site in the order of the names; any other loss as it is."""
    return sum((loss[name] for name in sorted(loss)), jnp.zeros(())) if isinstance(loss, dict) else loss


def row_differences(
    svi: SVI, rows: Arguments, rng_key: PRNGKey, before: dict[str, Any], after: dict[str, Any]
) -> list[Float[np.ndarray, "..."]]:
    """Return how much each row's loss rose between two sets of parameters under the same noise, an array per site shape."""
    first, second = (_compiled_losses(svi, rows, rng_key, params) for params in (before, after))
    return [np.asarray(second[shape] - first[shape]) for shape in first]


def _compiled_losses(svi: SVI, rows: Arguments, rng_key: PRNGKey, params: dict[str, Any]) -> dict[str, Float[Array, "..."]]:
    losses = lambda params, arrays: _row_losses(svi, rows._replace(arrays=arrays), rng_key, params)  # noqa: E731
    return compiled(losses, params, rows.arrays)


def why_nonfinite(arrays: Iterable[Any]) -> str:
    """Return advice on a non-finite loss: the first row that is not finite, or else what to try."""
    for array in arrays:
        is_float = np.ndim(array) > 0 and jnp.issubdtype(array.dtype, jnp.floating)
        bad = np.flatnonzero(~np.isfinite(array).reshape(len(array), -1).all(axis=1)) if is_float and array.size else []
        if len(bad):
            return (
                f"Row {bad[0]} of the argument of shape {array.shape} is not finite ({len(bad)} such rows). Mask missing "
                "rows: numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."
            )
    return (
        "Use a smaller learning rate, or optax.chain(optax.clip_by_global_norm(1.0), ...), "
        "or find where the energy overflows."
    )


def _row_losses(svi: SVI, rows: Arguments, rng_key: PRNGKey, params: dict[str, Any]) -> dict[str, Float[Array, "..."]]:
    args, kwargs = assemble(*rows)
    kwargs = kwargs | svi.static_kwargs
    key_model, key_guide = jax.random.split(rng_key)  # as in Trace_ELBO, so that the noise is that of the loss
    guide = handlers.trace(handlers.substitute(handlers.seed(svi.guide, key_guide), params)).get_trace(*args, **kwargs)
    model = handlers.replay(handlers.substitute(handlers.seed(svi.model, key_model), params), guide)
    losses: dict[str, Array] = {}
    for site in handlers.trace(model).get_trace(*args, **kwargs).values():
        if site["type"] == "sample" and site["is_observed"]:
            loss = -site["fn"].log_prob(site["value"]) * (1.0 if site["scale"] is None else site["scale"])
            losses[str(loss.shape)] = losses.get(str(loss.shape), 0.0) + loss
    return losses
