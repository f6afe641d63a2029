"""Which supports are those of binary units, 0 or 1, and what is refused of their data."""

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.distributions.site import Site


def check_binary(site: Site, estimator: str) -> None:
    """Refuse a support that is not that of binary units, and data other than 0 and 1.

    Args:
        site: the rows.
        estimator: who asks, by name.

    Raises:
        EnergyError: with the support or the row that came.
    """
    distribution = site.distribution
    if not (distribution.is_discrete and [_allows(distribution, v) for v in (-1, 0, 1, 2)] == [False, True, True, False]):
        raise EnergyError(
            f"The estimator '{estimator}' trains binary units, 0 or 1; the support is {distribution.support}. Write "
            "EnergyDistribution(..., support=numpyro.distributions.constraints.boolean), spins of +-1 as 2 * x - 1 in the "
            "energy; for continuous events, estimate(model, 'cd')."
        )
    if not is_concrete(site.value):
        return
    value = np.asarray(site.value)
    bad = np.flatnonzero(~((value == 0) | (value == 1)).reshape(site.num_rows, -1).all(axis=1))
    if bad.size:
        raise EnergyError(f"Row {bad[0]} of the data is not all 0 and 1: {value[bad[0]]} ({bad.size} such rows).")


def _allows(distribution, value: int) -> bool:
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(distribution.support(jnp.full(distribution.event_shape, value))))
