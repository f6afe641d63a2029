"""How an `EnergyDistribution` draws."""

import dataclasses
from typing import Any

import jax

from numpyro_ebm import chains
from numpyro_ebm._errors import check_count
from numpyro_ebm._typing import Array, PRNGKey
from numpyro_ebm.kernels import NUTS, AbstractKernel, resolve_kernel


@dataclasses.dataclass(frozen=True)
class ChainSampler:
    """One MCMC chain per draw: draws are independent of each other, and each is approximate.

    A chain starts from the distribution's base (standard normal in unconstrained space where there is none),
    adapts its kernel, moves on with the adapted kernel, and its last position is the draw.

    Args:
        kernel: a name or a kernel.
        num_warmup: transitions with adaptation.
        num_steps: transitions after it.

    Raises:
        EnergyError: for counts that are not counts, or an unknown kernel.

    Example:
        ``EnergyDistribution(energy, sampler=ChainSampler("mala", num_warmup=500))``
    """

    kernel: Any = NUTS()
    num_warmup: int = 200
    num_steps: int = 20

    def __post_init__(self):
        # A pytree is also rebuilt around tracers and placeholders; only what a user wrote is resolved.
        if isinstance(self.kernel, str | AbstractKernel):
            object.__setattr__(self, "kernel", resolve_kernel(self.kernel))
        check_count("ChainSampler", "num_warmup", self.num_warmup, 0)
        check_count("ChainSampler", "num_steps", self.num_steps)

    def __call__(self, rng_key: PRNGKey, distribution: Any, sample_shape: tuple[int, ...]) -> Array:
        """Draws of shape ``sample_shape + batch_shape + event_shape``."""
        return _draw(rng_key, distribution, self, sample_shape)


jax.tree_util.register_dataclass(ChainSampler, data_fields=["kernel"], meta_fields=["num_warmup", "num_steps"])


@jax.jit(static_argnums=3)
def _draw(rng_key: PRNGKey, distribution: Any, sampler: ChainSampler, sample_shape: tuple[int, ...]) -> Array:
    key_start, key_chains = jax.random.split(rng_key)
    starts = distribution.reference_sample(key_start, sample_shape)
    rows = distribution.rows(starts, sample_shape + distribution.batch_shape)
    kernel = sampler.kernel.bind(distribution)
    run = chains.run(
        key_chains,
        kernel,
        distribution.target(kernel),
        jax.vmap(distribution.unconstrain)(rows.value),
        rows.local,
        num_warmup=sampler.num_warmup,
        num_samples=sampler.num_steps,
    )
    last = jax.vmap(distribution.constrain)(run.positions[:, -1])
    return last.reshape(sample_shape + distribution.batch_shape + distribution.event_shape)
