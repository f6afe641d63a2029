"""What the estimators that sample from the model share: a kernel, its steps, and the contrast."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm import chains
from numpyro_ebm._autodiff import freeze
from numpyro_ebm._errors import EnergyError, check_count
from numpyro_ebm._typing import Array, Position, PRNGKey, PyTree
from numpyro_ebm.chains import ChainHealth
from numpyro_ebm.distributions import check_same_support
from numpyro_ebm.estimators._base import AbstractEstimator, Site
from numpyro_ebm.kernels import MALA, resolve_kernel


@dataclasses.dataclass(frozen=True)
class ChainEstimator(AbstractEstimator):
    """Settings of the negative phase; see the estimators for what they mean."""

    role = "gradient"
    num_steps: int = 1
    kernel: Any = MALA()

    def __post_init__(self):
        check_count(type(self).__name__, "num_steps", self.num_steps)
        object.__setattr__(self, "kernel", resolve_kernel(self.kernel))

    def negatives(self, rng_key: PRNGKey, site: Site, start: Position, local: PyTree) -> tuple[Position, ChainHealth]:
        """Move chains from ``start`` by the kernel, under parameters cut off from differentiation."""
        first = jax.tree.map(lambda leaf: leaf[0], (start, local))
        log_density = freeze(site.log_density, *first)
        start, local = jax.lax.stop_gradient((start, local))

        @jax.jit  # one program also where the model runs outside jit, as in svi.init
        def move(rng_key, start, local):
            return chains.advance(rng_key, self.kernel, log_density, start, local, num_steps=self.num_steps)

        moved, health = move(rng_key, start, local)
        return jax.lax.stop_gradient(moved), health

    def contrast(self, site: Site, negatives: Position) -> Array:
        """Log density of each row minus that of its own negative, unnormalised: log Z cancels in the gradient."""
        log_density = jax.vmap(site.log_density)
        return log_density(site.position, site.local) - log_density(negatives, site.local)


def start_from(distribution: Any, rng_key: PRNGKey, site: Site, num_chains: int) -> Position:
    """Unconstrained starts from a NumPyro distribution, one event each."""
    events = distribution.expand((num_chains,)).sample(rng_key)
    return jax.vmap(site.distribution.unconstrain)(jnp.asarray(events, float))


def check_start(distribution: Any, site: Site) -> None:
    """Refuse a start of another event shape or support than the energy's.

    Raises:
        EnergyError: naming both.
        TypeError: where it is not a distribution.
    """
    if distribution is None:
        return
    if not isinstance(distribution, dist.Distribution):
        raise TypeError(f"start needs a numpyro distribution; got {type(distribution).__name__}.")
    if distribution.event_shape != site.distribution.event_shape or distribution.batch_shape != ():
        raise EnergyError(
            f"start has event shape {distribution.event_shape} and batch shape {distribution.batch_shape}; the energy has "
            f"event shape {site.distribution.event_shape}. Write start={type(distribution).__name__}(...).to_event(1)."
        )
    check_same_support("start", distribution, site.distribution.support)
