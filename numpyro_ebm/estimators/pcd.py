"""Persistent contrastive divergence."""

import dataclasses

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.pool import PoolEstimator, pool_of
from numpyro_ebm.estimators.parts.positive_phase import PositivePhase
from numpyro_ebm.estimators.parts.slots import Listed
from numpyro_ebm.estimators.parts.starts import Start, draw_rows, over


@dataclasses.dataclass(frozen=True)
class PersistentContrastiveDivergence(PoolEstimator):
    r"""Persistent contrastive divergence (Tieleman): chains that continue from one update to the next.

    Each update takes as many chains as there are rows (or all, if there are fewer chains) from random slots, the same number
    from each block of the pool; the number of blocks is the greatest common divisor of both numbers. It evaluates those
    chains under the current energy, moves them by ``num_steps`` transitions and writes them back to their slots. The
    surrogate of a row is its log density minus the mean over the chains moved. No chain is ever lost or restarted.

    Rows with a context or a base of their own have one chain each, which belongs to its row of the whole data set and is
    moved when the row is in the batch. Where the step size adapts, each of these chains has its own, since their densities
    may differ in width. Chains of one density share a step size: one that depended on whether its chain is in a wide or a
    narrow mode would shift the weights of the modes.

    State, in the mutable site ``"<site>$pcd"``: `ChainState`, with the chains in its `Pool`. SVI carries it, and it can be
    pickled.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel, whose step size the training starts from; None for "mala", and for "gibbs" on a
            discrete support.
        adapt_step_size: see `ContrastiveDivergence`, as for ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy``, ``scale`` and ``positive_phase``.
        start: where the chains start: "data" (rows of the first batch), "base" (the energy's base, or a standard normal in
            unconstrained space), or a NumPyro distribution of one event.
        num_chains: number of chains, independent of the batch size; None for as many as the first batch has rows, and for
            rows with a context or a base of their own.

    Raises:
        EnergyError: for counts below 1, an unknown kernel or policy, ``num_chains`` with rows that have densities of their
            own, more than one particle, or an ELBO without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "pcd", num_steps=20, kernel="mala", num_chains=1000)``

    References:
        Tieleman, Training restricted Boltzmann machines using approximations to the likelihood gradient (2008).
    """

    name = "pcd"
    takes_discrete = True
    takes_mixed = True
    num_chains: int | None = None
    positive_phase: PositivePhase | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_chains is not None:
            check_count("PersistentContrastiveDivergence", "num_chains", self.num_chains)

    def check(self, site: Site) -> None:
        """Refuse a number of chains where each row has its own chain."""
        super().check(site)
        if site.local is not None and self.num_chains is not None:
            raise EnergyError(
                f"Rows with a context or a base of their own have one persistent chain each, so "
                f"num_chains={self.num_chains} does not apply. Write estimate(model, 'pcd'), or 'replay' for chains that "
                "keep the context they started with."
            )

    def size(self, site: Site) -> int:
        """Return the number of chains: ``num_chains``, or one per row."""
        return site.num_total if site.local is not None else self.num_chains or site.num_rows

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return chains at draws of ``start``; a chain that belongs to a row starts when the row is first in a batch."""
        state = super().init(rng_key, site)
        if site.local is not None:
            pool = pool_of(state)
            state = state._replace(pool=pool._replace(local=None, age=pool.age - 1))
        return state

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Start from chains drawn from the pool, or from those of the rows."""
        if site.local is None:
            return super().begin(rng_key, site, state, kernel)
        slots = Listed(jnp.arange(site.num_rows) if site.index is None else site.index)
        kept = jax.tree.map(slots.take, pool_of(state))
        fresh = kernel.lift_all(draw_rows(self.start, rng_key, site)[0])
        position = jax.tree.map(lambda new, old: jnp.where(over(kept.age < 0, old), new, old), fresh, kept.position)
        return Start(position, site.local, slots=slots, age=jnp.maximum(kept.age, 0), log_factor=kept.log_factor)
