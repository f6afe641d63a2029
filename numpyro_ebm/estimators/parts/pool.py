"""Chains that go on from one update to the next, kept in slots."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start, check_start, draw_start, over


@dataclasses.dataclass(frozen=True)
class PoolEstimator(ChainEstimator):
    """A pool of chains, of which each update moves as many as there are rows, or all where there are fewer.

    State beside that of `ChainEstimator`: ``position`` ``(size, ...)`` in unconstrained space, ``age`` ``(size,)``, the
    transitions of each chain since it last began, ``local``, what chains have of their own, and then, where the step size
    adapts, ``log_factor`` ``(size,)``, the logs of their own step sizes' factors (`chains.Pace`).
    """

    start: Any = "data"
    paces_rows = True

    @abc.abstractmethod
    def size(self, site: Site) -> int:
        """How many chains there are."""

    def begins_anew(self, rng_key: PRNGKey, num_chains: int) -> Array | None:
        """Which of the chains drawn begin anew; None where none ever does."""
        return None

    def check(self, site: Site) -> None:
        """Refuse a start of another event."""
        super().check(site)
        check_start(self.start, site)

    def fresh(self, rng_key, site: Site, num_chains):
        """Draws of ``start``."""
        return draw_start(self.start, rng_key, site, num_chains)

    def init(self, rng_key, site: Site):
        """A pool of fresh chains."""
        size = self.size(site)
        position, local = self.fresh(rng_key, site, size)
        pool: dict[str, Any] = {
            "position": jax.vmap(self.kernel.lift)(position),
            "age": jnp.zeros(size, jnp.int32),
        }
        if local is not None:
            pool["local"] = jax.lax.stop_gradient(local)
            if self._adapts:
                pool["log_factor"] = jnp.zeros(size, float)
        return {**super().init(rng_key, site), **pool}

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Chains of a run of slots that begins anywhere, some of them anew."""
        key_slots, key_which, key_fresh = jax.random.split(rng_key, 3)
        size = len(state["age"])
        # Any slot is as likely as another, and none comes twice; a permutation of the pool would cost more than the chains.
        slots = (jax.random.randint(key_slots, (), 0, size) + jnp.arange(min(size, site.num_rows))) % size
        kept: PyTree = tuple(state.get(name) for name in ("position", "local", "age", "log_factor"))
        kept = jax.tree.map(lambda leaf: leaf[slots], kept)
        anew = self.begins_anew(key_which, len(slots))
        if anew is not None:
            fresh_position, fresh_local = self.fresh(key_fresh, site, len(slots))
            zeros: PyTree = jax.tree.map(jnp.zeros_like, kept[2:])
            fresh = (jax.vmap(kernel.lift)(fresh_position), fresh_local, *zeros)
            kept = jax.tree.map(lambda new, old: jnp.where(over(anew, old), new, old), fresh, kept)
        position, local, age, log_factor = kept
        return Start(position, local, paired=False, slots=slots, age=age, log_factor=log_factor)

    def keep(self, state, site: Site, start: Start, ended, lost):
        """Chains go back to the slots they were drawn from."""
        age: Any = start.age
        age = jnp.where(lost, 0, age + self.num_steps)

        def write(pool, new):
            return pool.at[start.slots].set(new, unique_indices=True)

        written = {"position": jax.tree.map(write, state["position"], ended), "age": write(state["age"], age)}
        if "local" in state:
            written["local"] = jax.tree.map(write, state["local"], start.local)
        if "log_factor" in state:
            log_factor: Any = start.log_factor
            written["log_factor"] = write(state["log_factor"], jnp.where(lost, 0.0, log_factor))
        return {**state, **written}
