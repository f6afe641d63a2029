"""The check for estimators of binary units."""

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.distributions.site import Site


def check_binary(site: Site, estimator: str) -> None:
    """Check that the support is that of binary units, and raise otherwise; the rows were compared with it before.

    Args:
        site: the rows.
        estimator: name of the estimator, for messages.

    Raises:
        EnergyError: for another support.
    """
    distribution = site.distribution
    if not (distribution.is_discrete and [_allows(distribution, v) for v in (-1, 0, 1, 2)] == [False, True, True, False]):
        raise EnergyError(
            f"The estimator '{estimator}' trains binary units, 0 or 1; the support is {distribution.support}. Write "
            "EnergyDistribution(..., support=numpyro.distributions.constraints.boolean), with spins of +-1 as 2 * x - 1 in "
            "the energy; for continuous events, write estimate(model, 'cd')."
        )


def _allows(distribution, value: int) -> bool:
    with jax.ensure_compile_time_eval():
        return bool(jnp.all(distribution.support(jnp.full(distribution.event_shape, value))))
