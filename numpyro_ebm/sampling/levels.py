"""The noise level that a model is conditioned on: its place in the context, and its replacement."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.distributions import EnergyDistribution, ScoreDistribution
from numpyro_ebm.distributions.events import EventDistribution

ENTRY = "sigma"
"""Entry of a dict context that holds the noise level."""


def check_level(owner: str, distribution: EventDistribution) -> None:
    """Refuse a distribution whose context has no noise level.

    Raises:
        EnergyError: with the context found and the line to write.
    """
    context = distribution.context
    level = context.get(ENTRY) if isinstance(context, Mapping) else context
    if not isinstance(level, Mapping | tuple | list) and level is not None:
        shape = distribution.alone().batch_shape  # rows added by `expand` and plates share the level
        if jnp.ndim(level) == len(shape):
            return
        came = f"of shape {jnp.shape(level)} for the batch shape {shape}"
    else:
        came = _describe(context)
    kind = type(distribution).__name__
    raise EnergyError(
        f"{owner} needs a model conditioned on the noise level: its context has to be the noise's standard deviation, one "
        f"scalar per row, or a dict with this as its entry '{ENTRY}'; the context is {came}. Write {kind}(lambda x, sigma: "
        f"..., event_shape={distribution.event_shape}, context=jnp.asarray(sigma_min)), or "
        f"context={{'{ENTRY}': ..., 'x': ...}} with covariates."
    )


def at_level(local: PyTree, sigma: ArrayLike) -> PyTree:
    """Return the local values of a row with its declared noise level replaced by ``sigma``.

    Args:
        local: ``(context, base_parameters)`` of one row or of several; the context has a level (see `check_level`).
        sigma: the level, or one per row.
    """
    context, base_parameters = local
    return ({**context, ENTRY: sigma} if isinstance(context, Mapping) else sigma), base_parameters


def closed_at_levels(distribution: EventDistribution, *, order: int = 1) -> Any:
    """Return the closed distribution (`EventDistribution.closed`), its level cast to the default float type of levels."""
    context = distribution.context
    level = jnp.asarray(context[ENTRY] if isinstance(context, Mapping) else context, float)
    leveled = copy.copy(distribution)
    leveled.context = {**context, ENTRY: level} if isinstance(context, Mapping) else level
    return leveled.closed(order=order)


def score_at_level(
    distribution: EnergyDistribution | ScoreDistribution,
) -> Callable[[Float[Array, "*position"], Any, PyTree], Float[Array, "*position"]]:
    """Return ``score(position, sigma, local)`` of one row, in unconstrained space."""
    return lambda position, sigma, local: distribution.unconstrained_score(position, at_level(local, sigma))


def score_of_rows(
    distribution: EnergyDistribution | ScoreDistribution, local: PyTree
) -> Callable[[Float[Array, " rows *position"], Any], Float[Array, " rows *position"]]:
    """Return ``score(positions, sigma)`` of all rows at one level, with rows as the leading axis."""
    score = jax.vmap(score_at_level(distribution), in_axes=(0, None, 0))
    return lambda positions, sigma: score(positions, sigma, local)


def _describe(context: PyTree) -> str:
    if context is None:
        return "None"
    if isinstance(context, Mapping):
        return f"a dict of {sorted(map(str, context))}"
    return f"a {type(context).__name__}"
