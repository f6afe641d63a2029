"""Chains that continue from one update to the next, kept in slots."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.slots import draw_slots
from numpyro_ebm.estimators.parts.starts import Start, check_start, draw_start, over
from numpyro_ebm.estimators.state import ChainState, Pool


@dataclasses.dataclass(frozen=True)
class PoolEstimator(ChainEstimator):
    """An estimator with a pool of chains; an update moves as many as there are rows, or all if there are fewer.

    State: `ChainState` with a ``pool``. Chains with densities of their own have step sizes of their own if the step size
    adapts.
    """

    start: Any = "data"
    paces_rows = True
    persists_chains = True

    @abc.abstractmethod
    def size(self, site: Site) -> int:
        """Return the number of chains in the pool."""

    def choose_restarts(self, rng_key: PRNGKey, num_chains: int) -> Bool[Array, " {num_chains}"] | None:
        """Return which of the chains drawn restart; None if none ever does."""
        return None

    def check(self, site: Site) -> None:
        """Check that the start fits the event, and raise otherwise."""
        super().check(site)
        check_start(self.start, site)

    def fresh(self, rng_key, site: Site, num_chains):
        """Draw from ``start``."""
        return draw_start(self.start, rng_key, site, num_chains)

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return a state with a pool of fresh chains."""
        size, site = self.size(site), self.begun(rng_key, site)
        position, local = self.fresh(rng_key, site, size)
        log_factor = jnp.zeros(size, float) if local is not None and self._adapts else None
        kernel = self.kernel.bind(site.distribution)
        lifted = kernel.lift_all(position)
        pool = Pool(lifted, jnp.zeros(size, jnp.int32), jax.lax.stop_gradient(local), log_factor)
        return super().init(rng_key, site)._replace(pool=pool)

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Take the chains of some slots, and restart some of them."""
        key_slots, key_which, key_fresh = jax.random.split(rng_key, 3)
        pool = pool_of(state)
        num = min(len(pool.age), site.num_rows)
        slots = draw_slots(key_slots, len(pool.age), num)
        kept = jax.tree.map(slots.take, pool)
        anew = self.choose_restarts(key_which, num)
        if anew is not None:
            fresh_position, fresh_local = self.fresh(key_fresh, site, num)
            zeros = jax.tree.map(jnp.zeros_like, kept)
            lifted = kernel.lift_all(fresh_position)
            fresh = zeros._replace(position=lifted, local=fresh_local)
            kept = jax.tree.map(lambda new, old: jnp.where(over(anew, old), new, old), fresh, kept)
        return Start(kept.position, kept.local, paired=False, slots=slots, age=kept.age, log_factor=kept.log_factor)

    def keep(self, state, site: Site, start: Start, ended, lost):
        """Write the chains back to the slots that they were taken from."""
        pool, age, log_factor = pool_of(state), start.age, start.log_factor
        age = None if age is None else jnp.where(lost, 0, age + self.num_steps)
        log_factor = None if log_factor is None else jnp.where(lost, 0.0, log_factor)
        local = None if pool.local is None else start.local  # without it each chain belongs to its row
        moved = Pool(ended, age, local, log_factor)  # pyright: ignore[reportArgumentType]
        slots: Any = start.slots
        return state._replace(pool=jax.tree.map(slots.put, pool, moved))


def pool_of(state: ChainState) -> Pool:
    """Return the persistent chains of a state.

    Raises:
        EnergyError: for the state of an estimator without persistent chains.
    """
    if state.pool is None:
        raise EnergyError("This state holds no persistent chains. Write init_state=None to start with new ones.")
    return state.pool
