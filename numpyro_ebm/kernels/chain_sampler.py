"""Sampler that runs one chain per draw."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._core import programs
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.kernels import chains
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels.hamiltonian import NUTS
from numpyro_ebm.kernels.layout import check_start, draw_start, rows_local, starts_of, to_draws
from numpyro_ebm.kernels.names import kernel_of, resolve_kernel
from numpyro_ebm.kernels.starts import check_starts


@dataclasses.dataclass(frozen=True)
class ChainSampler:
    """One MCMC chain per draw: the draws are independent of each other, and each is approximate.

    A chain starts from a draw of the distribution's base (without a base, from a standard normal in unconstrained space) or
    of another sampler, adapts its kernel and continues with the adapted kernel. Its last position is the draw. If the
    density or its gradient is not finite at a draw of the base, other starts are tried, at growing distances.

    Args:
        kernel: a name or a kernel; for a mixed event a kernel for each member, ``{"x": "nuts", "s": "gibbs"}``.
        num_warmup: transitions with adaptation.
        num_steps: transitions after the warm-up.
        start: a sampler, ``start(rng_key, distribution, sample_shape)``, whose draws are the starts of the chains. Chains
            seldom cross between modes: started from `AnnealedLangevin`, they keep its mode weights.

    Raises:
        EnergyError: for invalid counts or an unknown kernel. On drawing, if no start with a finite density is found;
            inside ``jax.jit`` (and NumPyro's ``Predictive``) this becomes ``jax.errors.JaxRuntimeError``, and the draws
            concerned are NaN unless they are discrete.
        TypeError: for a ``start`` that is not a sampler.

    Example:
        ``EnergyDistribution(energy, sampler=ChainSampler("mala", num_warmup=500))``
    """

    kernel: Any = NUTS()
    num_warmup: int = 200
    num_steps: int = 20
    start: Any = None

    def __post_init__(self):
        # A pytree is also rebuilt around tracers and placeholders; only user input is resolved.
        if isinstance(self.kernel, str | AbstractKernel | Mapping):
            object.__setattr__(self, "kernel", resolve_kernel(self.kernel, is_discrete=None))
        check_count("ChainSampler", "num_warmup", self.num_warmup, 0)
        check_count("ChainSampler", "num_steps", self.num_steps)
        check_start("ChainSampler", self.start)

    def __call__(self, rng_key: PRNGKey, distribution: Any, sample_shape: tuple[int, ...]) -> Array:
        """Return draws of shape ``sample_shape + batch_shape + event_shape``."""
        check_key("ChainSampler", rng_key)
        kernel_of(self.kernel, distribution).bind(distribution)
        key_start, key_chains = jax.random.split(rng_key)
        starts = draw_start(self.start, key_start, distribution, sample_shape)
        counts = {"num_warmup": self.num_warmup, "num_steps": self.num_steps}
        shape = {"sample_shape": sample_shape, **counts}
        closed = distribution.closed(float if self.kernel.relaxes else None)
        draws, finite = _draw(key_start, key_chains, closed, self.kernel, starts, **shape)
        check_starts(finite)
        return draws


jax.tree_util.register_dataclass(ChainSampler, data_fields=["kernel", "start"], meta_fields=["num_warmup", "num_steps"])


@programs.jit(static_argnames=("sample_shape", "num_warmup", "num_steps"))
def _draw(key_start, key_chains, distribution, kernel, starts, *, sample_shape, num_warmup, num_steps):
    shape = sample_shape + distribution.batch_shape
    kernel = kernel.bind(distribution)
    log_density, local = distribution.target(kernel), rows_local(distribution, shape)
    positions, finite = starts_of(key_start, distribution, log_density, starts, sample_shape, local)
    run = chains.run(key_chains, kernel, log_density, positions, local, num_warmup=num_warmup, num_samples=num_steps)
    draws = to_draws(distribution, kernel.as_draws(run.positions[:, -1]), shape)
    if not distribution.is_discrete:
        draws = jnp.where(finite.reshape(shape + (1,) * len(distribution.event_shape)), draws, jnp.nan)
    return draws, finite
