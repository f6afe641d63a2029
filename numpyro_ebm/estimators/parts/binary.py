"""Checks for estimators of binary units: a support of 0 and 1, and data of 0 and 1."""

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.distributions.site import Site


def check_binary(site: Site, estimator: str) -> None:
    """Check that the support is that of binary units and that the data are 0 and 1, and raise otherwise.

    Args:
        site: the rows.
        estimator: name of the estimator, for messages.

    Raises:
        EnergyError: for another support, and for a row with other values.
    """
    distribution = site.distribution
    if not (distribution.is_discrete and [_allows(distribution, v) for v in (-1, 0, 1, 2)] == [False, True, True, False]):
        raise EnergyError(
            f"The estimator '{estimator}' trains binary units, 0 or 1; the support is {distribution.support}. Write "
            "EnergyDistribution(..., support=numpyro.distributions.constraints.boolean), with spins of +-1 as 2 * x - 1 in "
            "the energy; for continuous events, write estimate(model, 'cd')."
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
