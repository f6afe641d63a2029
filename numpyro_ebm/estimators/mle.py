"""Maximum likelihood by chains that restart at each update."""

import dataclasses
from typing import Any

from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.positive_phase import PositivePhase
from numpyro_ebm.estimators.parts.starts import Start, check_start, draw_rows


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood(ChainEstimator):
    r"""Maximum likelihood with MCMC: one chain per row, which restarts from the base or noise at each update.

    The gradient of the surrogate of a row is ``-grad E(x) + grad E(x')``, with ``x'`` the end of a chain of ``num_steps``
    transitions, through which no gradient flows. It is that of the log likelihood as far as the chain has converged.

    With few steps this is short-run MCMC, which trains a sampler rather than an energy: the samples may look right, but the
    energy is wrong, and longer chains on it drift away from the data (non-convergent training, Nijkamp et al. 2019). To
    train the energy itself, use enough steps to get from the start to the model, or "pcd". The value is an energy gap and
    means nothing as an objective.

    State, in the mutable site ``"<site>$mle"``: `ChainState`, without a pool.

    Args:
        num_steps: transitions per chain and update (one or more gradients each).
        kernel: a name or a kernel (`MALA`, `HMC`, ...), whose step size the training starts from; None for "mala", and
            for "gibbs" on a discrete support.
        adapt_step_size: see `ContrastiveDivergence`, as for ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy``, ``scale`` and ``positive_phase``.
        start: where the chains start: "base" (the energy's base, or a standard normal in unconstrained space), "data" (the
            rows, which makes it "cd"), or a NumPyro distribution of one event.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel or policy, a start of another event shape or support, more
            than one particle, or an ELBO without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "mle", num_steps=50, kernel=ebm.HMC(step_size=0.2))``

    References:
        Song and Kingma (2021), section 3; Nijkamp et al., Learning non-convergent non-persistent short-run MCMC (2019).
    """

    name = "mle"
    takes_discrete = True
    takes_mixed = True
    num_steps: int = 50
    start: Any = "base"
    positive_phase: PositivePhase | None = None

    @property
    def paces_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the chains start elsewhere than at the data."""
        return not (isinstance(self.start, str) and self.start == "data")

    def check(self, site: Site) -> None:
        """Refuse a start that does not fit the event."""
        super().check(site)
        check_start(self.start, site)

    def notes(self):
        """Note that short runs train a sampler."""
        return (
            *super().notes(),
            f"each chain had {self.num_steps} transitions from its start: if these are too few to reach the model, the "
            "samples may look right while the energy is wrong (compare with long chains: sample(...))",
        )

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Start the chains at draws of ``start``, one per row."""
        return Start(kernel.lift_all(draw_rows(self.start, rng_key, site)[0]), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """Return new draws of ``start``, one per row."""
        return draw_rows(self.start, rng_key, site)[0], site.local
