"""Contrastive divergence."""

import dataclasses

from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.positive_phase import PositivePhase
from numpyro_ebm.estimators.parts.starts import Start


@dataclasses.dataclass(frozen=True)
class ContrastiveDivergence(ChainEstimator):
    r"""Contrastive divergence (Hinton): a chain of k steps from each data row.

    The gradient of the surrogate of a row ``x`` is ``-grad E(x) + grad E(x')``, where ``x'`` is the row after
    ``num_steps`` transitions, through which no gradient flows. It is cheap and has low variance. It is biased, because such
    short chains stay near the data and never see other modes. As the step size goes to 0, one step of MALA, divided by the
    step size, is score matching. The value is an energy gap, not an objective.

    State, in the mutable site ``"<site>$cd"``: `ChainState` without a ``pool``.

    Args:
        num_steps: transitions per row and update.
        kernel: a name or a kernel; training starts from its step size; None for "mala", and for "gibbs" on a discrete
            support. For events with discrete and continuous members a kernel for each, ``{"x": "mala", "s": "gibbs"}``,
            which is the default; scales are 1 there, and the step size is that of the continuous kernel.
        adapt_step_size: whether dual averaging adapts the step size to the kernel's optimal acceptance rate (mean over
            chains, one averaging step per update, carried in the state); None for True with every kernel that rejects.
        step_size_schedule: in place of adaptation, the step size as a function of the number of updates (an optax schedule).
        temperature: the negatives follow ``p ** (1 / temperature)``: a number, or a schedule of the transition's index
            (annealing within each chain, e.g. ``optax.linear_schedule(5.0, 1.0, num_steps - 1)``); None for 1.
        energy_l2: coefficient of ``E(x)^2 + E(x')^2``, which is subtracted from each row's surrogate; 0 for none.
        on_unhealthy: "warn" (once per condition and training), "raise", or "reset" (as "warn", and lost chains restart and
            a collapsed step size is restored). See `NegativePhaseHealth` for the conditions.
        scale: length scales of unconstrained space, per dimension: the chain runs in ``x / scale``. "auto": where the step
            size adapts and the kernel has no inverse_mass_matrix, the running standard deviation of the data or, where
            smaller, the inverse of that of the score over the chains (the width of a mode), divided by the geometric mean
            over dimensions so that the step size keeps its meaning; elsewhere 1, so that a fixed step size means the same as
            in BlackJAX. "data": the same for any kernel and without the division, so that the step size is in units of these
            scales. A number, or one per dimension: these scales. None: 1.
        positive_phase: a `PositivePhase`, which draws hidden members and missing entries of the rows before the chains
            start from the completed rows; None to refuse them.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel or ``on_unhealthy``, more than one particle or an ELBO
            without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "cd", num_steps=10, kernel=ebm.Langevin(step_size=0.01))``

    References:
        Hinton, Training products of experts by minimizing contrastive divergence (2002); Hyvarinen (2007).
    """

    name = "cd"
    takes_discrete = True
    takes_mixed = True
    positive_phase: PositivePhase | None = None

    def notes(self):
        """Add that chains that start at the data miss other modes."""
        blind = "chains start at the data: modes far from it are not seen, and the weights of distant modes are not learned"
        return (*super().notes(), blind)

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Start chains at the rows."""
        return Start(kernel.lift_all(site.position), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """Return the rows themselves."""
        return site.position, site.local
