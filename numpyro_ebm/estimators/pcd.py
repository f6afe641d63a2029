"""Persistent contrastive divergence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._errors import check_count
from numpyro_ebm.chains import ChainHealth
from numpyro_ebm.estimators._base import Site
from numpyro_ebm.estimators._chains import ChainEstimator, check_start, start_from


@dataclasses.dataclass(frozen=True)
class PersistentContrastiveDivergence(ChainEstimator):
    r"""Persistent contrastive divergence (Tieleman): chains that go on from one update to the next.

    Each update draws as many slots as there are rows (all of them where there are fewer chains), without replacement,
    scores those chains anew, moves them by ``num_steps`` transitions and writes them back where they were drawn. The
    surrogate of a row is its log density minus the mean over the chains moved.

    State, in the mutable site ``"<site>$pcd"``: ``position`` ``(num_chains, ...)`` in unconstrained space, ``health``
    (`ChainHealth` of the last update) and ``num_updates``. SVI carries it; it pickles.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel, its step size fixed during training.
        num_chains: chains, independent of the batch size; None for as many as the first batch has rows.
        start: NumPyro distribution of one event that the chains start from; None for rows of the first batch, drawn with
            replacement.

    Raises:
        EnergyError: for counts below 1, an unknown kernel, rows with a context of their own (each context would need
            its own chains), more than one particle or an ELBO without mutable state.

    Example:
        ``estimate(model, "pcd", num_steps=20, kernel="mala", num_chains=1000)``

    References:
        Tieleman, Training restricted Boltzmann machines using approximations to the likelihood gradient (2008).
    """

    name = "pcd"
    is_persistent = True
    num_chains: int | None = None
    start: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_chains is not None:
            check_count("PersistentContrastiveDivergence", "num_chains", self.num_chains)

    def check(self, site: Site) -> None:
        """Refuse rows of different densities and a start of another event."""
        super().check(site)
        self.refuse_local(site, "a chain that persists belongs to one context.")
        check_start(self.start, site)

    def init(self, rng_key, site: Site):
        """Chains at rows of the batch or at draws of ``start``."""
        num_chains = self.num_chains or site.num_rows
        if self.start is None:
            position = site.position[jax.random.randint(rng_key, (num_chains,), 0, site.num_rows)]
        else:
            position = start_from(self.start, rng_key, site, num_chains)
        health = ChainHealth(*(jnp.zeros((), float),) * 3)
        return {"position": position, "health": health, "num_updates": jnp.zeros((), jnp.int32)}

    def surrogate(self, rng_key, site: Site, state):
        """Log density of each row minus the mean over the chains moved."""
        key_slots, key_chains = jax.random.split(rng_key)
        num_chains = state["position"].shape[0]
        num_moved = min(num_chains, site.num_rows)
        slots = jax.random.permutation(key_slots, num_chains)[:num_moved]
        moved, health = self.negatives(key_chains, site, state["position"][slots], None)
        state = {
            "position": state["position"].at[slots].set(moved, unique_indices=True),
            "health": health,
            "num_updates": state["num_updates"] + 1,
        }
        log_density = jax.vmap(site.log_density)
        return log_density(site.position) - jnp.mean(log_density(moved)), state
