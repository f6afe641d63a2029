"""Contrastive divergence."""

import dataclasses

import jax

from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start


@dataclasses.dataclass(frozen=True)
class ContrastiveDivergence(ChainEstimator):
    r"""Contrastive divergence (Hinton): a chain of k steps from each data row.

    The gradient of the surrogate of a row ``x`` is ``-grad E(x) + grad E(x')``, with ``x'`` the row moved by
    ``num_steps`` transitions, through which no gradient flows. Cheap and of low variance; biased, for chains as short as
    these have not left the data: modes away from them are never seen. As the step size goes to 0, one step of MALA,
    divided by the step, is score matching. The value is an energy gap and means nothing as an objective.

    State, in the mutable site ``"<site>$cd"``: ``health``, ``num_updates``, ``spread``, ``log_scale`` and ``averaging`` (see
    `pcd`).

    Args:
        num_steps: transitions per row and update.
        kernel: a name or a kernel, whose step size the training starts from.
        adapt_step_size: whether dual averaging steers the step size to the kernel's optimal acceptance (mean over chains,
            one step per update, carried in the state); None for every kernel that rejects.
        step_size_schedule: instead, the step size as a function of the number of updates (an optax schedule).
        temperature: negatives of ``p ** (1 / temperature)``: a number, or a schedule of the transition's index (annealing
            within each chain, e.g. ``optax.linear_schedule(5.0, 1.0, num_steps - 1)``); None for 1.
        energy_l2: coefficient of ``E(x)^2 + E(x')^2``, subtracted from each row's surrogate; 0 for none.
        on_unhealthy: "warn" (once per condition and training), "raise", or "reset" (as "warn"; chains that are lost begin
            anew and a collapsed step size is restored). See `NegativePhaseHealth` for the conditions.
        scale: lengths per dimension of unconstrained space in which the kernel moves (the chain runs in ``x / scale``).
            "auto": where the step size adapts and the kernel has no inverse_mass_matrix, the running standard deviation of
            the data, or the inverse of that of the score over the chains where that is less (the width of a mode), over the
            geometric mean of the dimensions, so that the step size keeps its meaning; 1 elsewhere, which leaves a fixed step
            what it is in BlackJAX. "data": the same for any kernel and without the mean taken off, so that the step size is
            in units of these scales. A number, or one for each dimension: these. None for 1.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel or policy, more than one particle or an ELBO without mutable
            state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "cd", num_steps=10, kernel=ebm.Langevin(step_size=0.01))``

    References:
        Hinton, Training products of experts by minimizing contrastive divergence (2002); Hyvarinen (2007).
    """

    name = "cd"

    def notes(self):
        """Chains that stay near the data do not see other modes."""
        blind = "chains begin at the data: modes away from them are not seen, and the weights of far modes are not learned"
        return (*super().notes(), blind)

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """At the rows."""
        return Start(jax.vmap(kernel.lift)(site.position), site.local)

    def fresh(self, rng_key, site: Site, num_chains):
        """The rows themselves."""
        return site.position, site.local
