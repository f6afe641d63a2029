"""A NumPyro model as a target for kernels: its parameters fixed, its latents unconstrained."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer import init_to_uniform
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger

from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Position, PRNGKey, PyTree


class Target(NamedTuple):
    """What a kernel needs of a model.

    Attributes:
        position: initial unconstrained latents by site; led by the keys' batch shape.
        log_density: ``log_density(args, kwargs)`` is a function of a position.
        postprocess: ``postprocess(args, kwargs)`` takes a position to constrained latents and deterministic sites.
    """

    position: Position
    log_density: Callable[[tuple, dict], Callable[[Position], jax.Array]]
    postprocess: Callable[[tuple, dict], Callable[[Position], dict[str, jax.Array]]]


class unsubsampled(Messenger):  # noqa: N801
    """Undo the scale of subsampled plates on latent sites, and refuse observed sites under them.

    Rows that nobody observed are independent draws, whatever part of them is drawn: scaled by size / subsample_size their
    density would be raised to that power.
    """

    def __enter__(self):
        self._scales: dict[str, float] = {}
        return super().__enter__()

    def process_message(self, msg: Any) -> None:
        """Note the plates; correct the sites in them."""
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            if subsample_size is not None and 0 < subsample_size < size:
                self._scales[msg["name"]] = size / subsample_size
                if msg["value"] is None:
                    msg["value"] = jnp.arange(subsample_size)
        if msg["type"] != "sample":
            return
        plates = [frame.name for frame in msg["cond_indep_stack"] if frame.name in self._scales]
        if plates and msg["is_observed"] and not msg["infer"].get("is_auxiliary"):
            raise EnergyError(
                f"The plate '{plates[0]}' subsamples the observed site '{msg['name']}': MCMC would use one frozen subset of "
                "the data. Write the plate without subsample_size for MCMC."
            )
        for plate in plates:
            msg["scale"] = msg["scale"] / self._scales[plate]


def fixed(model: Callable, params: PyTree | None) -> Callable:
    """The model with its parameters fixed and its plates as MCMC needs them."""
    return unsubsampled(handlers.substitute(model, data=dict(params or {})))


def check_params(model: Callable, params: PyTree | None, args: tuple, kwargs: dict) -> None:
    """Refuse a model whose parameters would silently stay at their initial values.

    Raises:
        EnergyError: naming the parameters that have no value.
        TypeError: for values that are not by name.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"params are values by name; got {type(params).__name__}. Write params=result.params of what fit or svi.run "
            "returned, or params=svi.get_params(state)."
        )
    # Latents start as NumPyro's kernels start them, not drawn: an energy's sampler would run its chains for nothing.
    initialized = handlers.substitute(handlers.seed(fixed(model, params), 0), substitute_fn=init_to_uniform())
    with handlers.block(), handlers.trace() as trace:
        initialized(*args, **kwargs)
    missing = [n for n, site in trace.items() if site["type"] == "param" and (params or {}).get(n) is None]
    if missing:
        raise EnergyError(
            f"The model has parameters {missing} without values, so MCMC would use their initial ones. Pass those that "
            "were trained: params=svi_result.params."
        )


def make_target(
    rng_key: PRNGKey, model: Callable, args: tuple, kwargs: dict, init_strategy: Callable = init_to_uniform
) -> Target:
    """Initialise a model (as `fixed` returns it) for kernels.

    Args:
        rng_key: one key, or a batch of keys for a batch of initial positions.
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        init_strategy: as in NumPyro's kernels.

    Raises:
        EnergyError: for a model without continuous latents.
        RuntimeError: by NumPyro, outside jit, where no finite starting point is found.
    """
    info = initialize_model(
        rng_key, model, init_strategy=init_strategy, dynamic_args=True, model_args=args, model_kwargs=kwargs
    )
    if not info.param_info.z:
        raise EnergyError("The model has no continuous latent site, so there is nothing to sample. Call it without data.")

    def log_density(args, kwargs):
        potential = info.potential_fn(*args, **kwargs)
        return lambda z: -jnp.asarray(potential(z), float)

    return Target(info.param_info.z, log_density, lambda args, kwargs: info.postprocess_fn(*args, **kwargs))


def initial_is_finite(log_density: Callable, position: Position) -> jax.Array:
    """Whether the log density and, of a continuous position, its gradient are finite."""
    if all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(position)):
        return jnp.isfinite(log_density(position))
    value, grad = jax.value_and_grad(log_density)(position)
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((value, grad))]).all()
