"""A method at work on every row of a distribution."""

from typing import Any

import jax
from jaxtyping import Shaped

from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition import _problem
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate
from numpyro_ebm.partition._start import fits_start, start_around


def estimate_rows(
    key_starts: Any,
    key_rows: PRNGKey | None,
    method: AbstractPartition,
    distribution: EventDistribution,
    draws: Shaped[Array, "rows draws *position"] | None,
) -> Estimate:
    """Estimate log Z of each row; the leaves of the result lead with the number of rows.

    Args:
        key_starts: random key of the starts; None for a method without any.
        key_rows: random key of the method; None for exact methods.
        method: the method, which has checked the distribution.
        distribution: the energy.
        draws: draws of the target or data, as the method needs them; None for none.
    """
    starts = None
    if method.num_starts:
        starts = _problem.start_positions(key_starts, distribution, method.start_distribution, method.num_starts)

    def one(key, local, starts, draws):
        densities, is_there = Densities(distribution, local, method.start_distribution), True
        if fits_start(method, distribution):
            key, key_fit = jax.random.split(key)
            densities, starts, is_there = start_around(key_fit, method, densities, starts, draws)
        found = method.estimate(key, densities, starts, draws)
        return found._replace(covers=found.covers & is_there)

    num = _problem.num_rows(distribution)
    row_keys = None if key_rows is None else jax.random.split(key_rows, num)
    return jax.vmap(one, axis_size=num)(row_keys, _problem.local_of(distribution), starts, draws)
