"""Maximum likelihood by chains that start afresh."""

import dataclasses
from typing import Any

import jax

from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start, check_start, draw_rows


@dataclasses.dataclass(frozen=True)
class MaximumLikelihood(ChainEstimator):
    r"""Maximum likelihood with MCMC: one chain per row, started afresh from the base or noise at each update.

    The gradient of the surrogate of a row is ``-grad E(x) + grad E(x')``, with ``x'`` the end of a chain of ``num_steps``
    transitions, through which no gradient flows; it is that of the log likelihood as far as the chain has converged.

    With few steps this is short-run MCMC: it trains a sampler, whose samples may look right, and not an energy. The energy
    it leaves is wrong, and longer chains on it drift away from the data: training is then non-convergent (Nijkamp et al.
    2019). For the energy itself use enough steps to get from the start to the model, or "pcd". The value is an energy gap
    and means nothing as an objective.

    State, in the mutable site ``"<site>$mle"``: ``health``, ``num_updates`` and ``averaging`` (see `pcd`).

    Args:
        num_steps: transitions per chain and update (one or more gradients each).
        kernel: a name or a kernel (`MALA`, `HMC`, ...), whose step size the training starts from.
        adapt_step_size: this, ``step_size_schedule``, ``temperature``, ``energy_l2``, ``on_unhealthy`` and ``scale`` are
            those of `ContrastiveDivergence`.
        start: what the chains start from: "base" (the energy's base, or a standard normal in unconstrained space), "data"
            (the rows, which makes it "cd"), or a NumPyro distribution of one event.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel or policy, a start of another event shape or support, more
            than one particle or an ELBO without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "mle", num_steps=50, kernel=ebm.HMC(step_size=0.2))``

    References:
        Song and Kingma (2021), section 3; Nijkamp et al., Learning non-convergent non-persistent short-run MCMC (2019).
    """

    name = "mle"
    num_steps: int = 50
    start: Any = "base"

    @property
    def paces_rows(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where chains do not begin in the law of the data."""
        return not (isinstance(self.start, str) and self.start == "data")

    def check(self, site: Site) -> None:
        """Refuse a start of another event."""
        super().check(site)
        check_start(self.start, site)

    def notes(self):
        """Short runs train a sampler."""
        return (
            *super().notes(),
            f"each chain had {self.num_steps} transitions from its start: where that is too short to reach the model, the "
            "samples may look right and the energy is wrong (compare with long chains: sample(...))",
        )

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """At draws of ``start``, one per row."""
        return Start(jax.vmap(kernel.lift)(draw_rows(self.start, rng_key, site)[0]), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """The same anew."""
        return draw_rows(self.start, rng_key, site)[0], site.local
