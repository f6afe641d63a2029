"""Maximum likelihood by chains that start afresh."""

import dataclasses
from typing import Any

import jax

from numpyro_ebm.estimators._base import Site
from numpyro_ebm.estimators._chains import ChainEstimator, check_start, start_from


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood(ChainEstimator):
    r"""Maximum likelihood with MCMC: one chain per row, started afresh from the base or noise at each update.

    The gradient of the surrogate of a row is ``-grad E(x) + grad E(x')``, with ``x'`` the end of a chain of ``num_steps``
    transitions, through which no gradient flows; it is that of the log likelihood as far as the chain has converged.
    With few steps (short-run MCMC) it trains a sampler rather than an energy (Nijkamp et al. 2019). The value is an energy
    gap and means nothing as an objective.

    Args:
        num_steps: transitions per chain and update (one or more gradients each).
        kernel: a name or a kernel (`MALA`, `HMC`, ...), its step size fixed during training.
        start: NumPyro distribution of one event that the chains start from; None for the energy's base, or a standard
            normal in unconstrained space where it has none.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel, or a start of another event shape or support.

    Example:
        ``estimate(model, "mle", num_steps=50, kernel=ebm.HMC(step_size=0.2))``

    References:
        Song and Kingma (2021), section 3; Nijkamp et al., Learning non-convergent non-persistent short-run MCMC (2019).
    """

    name = "mle"
    num_steps: int = 50
    start: Any = None

    def check(self, site: Site) -> None:
        """Refuse a start of another event."""
        super().check(site)
        check_start(self.start, site)

    def surrogate(self, rng_key, site: Site, state):
        """Energy gap between each row and its negative."""
        key_start, key_chains = jax.random.split(rng_key)
        if self.start is not None:
            start = start_from(self.start, key_start, site, site.num_rows)
        else:
            start = start_at_reference(key_start, site)
        negatives, _ = self.negatives(key_chains, site, start, site.local)
        return self.contrast(site, negatives), state


def start_at_reference(rng_key, site: Site):
    """One unconstrained start per row, from its own base."""
    distribution = site.distribution
    events = distribution.reference.expand(site.batch_shape).sample(rng_key)
    rows = distribution.as_events(events).reshape((-1, *distribution.event_shape))
    return jax.vmap(distribution.unconstrain)(rows)
