"""The reverse of a noise process, as a stochastic differential equation."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._core import programs
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions import EnergyDistribution, ScoreDistribution
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels.layout import rows_local, to_draws
from numpyro_ebm.sampling.levels import check_level, closed_at_levels, score_of_rows
from numpyro_ebm.sampling.noise import AbstractNoiseProcess, check_process

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ReverseSDE:
    r"""Predictor-corrector sampling (Song et al.) of the reverse-time equation ``dx = (f - g^2 s) dt + g dw``.

    The sampler runs from the process's prior at ``t = 1`` to ``t_min``, on an even grid. Between two times, whose forward
    transition is ``N(a x, v)``, the predictor is the reverse diffusion

    .. math:: x \leftarrow (2 - a) x + v\, s(x, \sigma(t_{i+1})) + \sqrt{v}\, z

    and the corrector takes steps of Langevin dynamics at the new time,

    .. math:: x \leftarrow x + \epsilon s(x, \sigma(t_i)) + \sqrt{2 \epsilon}\, z, \qquad
        \epsilon = 2 a^2 r^2 \sigma(t_i)^2

    The paper uses ``|z| / |s|``, averaged over a batch, in the place of ``sigma``, which is its typical value and keeps the
    draws independent of each other. At the end the remaining noise is removed in the mean (Tweedie),
    ``(x + sigma^2 s) / alpha`` at ``t_min``; without ``denoise`` only the scale is removed, ``x / alpha``.

    The model receives the level through its context (see `MultiscaleDenoisingScoreMatching`); on a support other than the
    real line the process runs in unconstrained space.

    Args:
        process: `VE` or `VP`, as the model was trained with (or with a ladder that covers its levels, for `VE`).
        num_steps: number of steps in time.
        corrector_steps: number of Langevin steps after each step in time.
        snr: ``r``, the corrector's signal-to-noise ratio.
        denoise: whether to make the denoising step.

    Raises:
        EnergyError: for ``num_steps`` below 1 or ``corrector_steps`` below 0, a ratio that is not positive, and a model
            whose context has no noise level.
        TypeError: if ``process`` is not a noise process.

    Example:
        ``EnergyDistribution(energy, (64,), context=jnp.asarray(0.01), sampler=ReverseSDE(VE(0.01, 10.0)))``

    References:
        Song et al., Score-based generative modeling through stochastic differential equations (2021), section 4.2 and
        appendix G.
    """

    process: AbstractNoiseProcess
    num_steps: int = 1000
    corrector_steps: int = 1
    snr: Any = 0.16
    denoise: bool = True

    def __post_init__(self):
        check_process("ReverseSDE", self.process)
        check_count("ReverseSDE", "num_steps", self.num_steps)
        check_count("ReverseSDE", "corrector_steps", self.corrector_steps, 0)
        check_positive("ReverseSDE", "snr", self.snr)

    def __call__(self, rng_key: PRNGKey, distribution: EventDistribution, sample_shape: Shape) -> Array:
        """Return draws of shape ``sample_shape + batch_shape + event_shape``."""
        check_key("ReverseSDE", rng_key)
        check_level("ReverseSDE", distribution)
        return _reverse(rng_key, closed_at_levels(distribution), self, shape=sample_shape + distribution.batch_shape)


jax.tree_util.register_dataclass(
    ReverseSDE, data_fields=["process", "snr"], meta_fields=["num_steps", "corrector_steps", "denoise"]
)


@programs.jit(static_argnames=("shape",))
def _reverse(
    rng_key: PRNGKey, distribution: EnergyDistribution | ScoreDistribution, sampler: ReverseSDE, *, shape: Shape
) -> Array:
    process = sampler.process
    score = score_of_rows(distribution, rows_local(distribution, shape))

    def correct(t, a):
        sigma = process.sigma(t)
        epsilon = 2 * (a * sampler.snr * sigma) ** 2

        def step(x, key):
            noise = jax.random.normal(key, x.shape, x.dtype)
            return (x + epsilon * score(x, sigma) + jnp.sqrt(2 * epsilon) * noise).astype(x.dtype), None

        return step

    def step(x, inputs):
        key, later, t = inputs
        key_predict, key_correct = jax.random.split(key)
        a, v = process.transition(t, later)
        noise = jax.random.normal(key_predict, x.shape, x.dtype)
        x = ((2 - a) * x + v * score(x, process.sigma(later)) + jnp.sqrt(v) * noise).astype(x.dtype)
        return jax.lax.scan(correct(t, a), x, jax.random.split(key_correct, sampler.corrector_steps))[0], None

    key_start, key_steps = jax.random.split(rng_key)
    start = jnp.asarray(process.prior(distribution.unconstrained_shape).sample(key_start, (math.prod(shape),)), float)
    times = jnp.linspace(1.0, process.t_min, sampler.num_steps + 1, dtype=float)
    keys = jax.random.split(key_steps, sampler.num_steps)
    x, _ = jax.lax.scan(step, start, (keys, times[:-1], times[1:]))
    sigma = process.sigma(process.t_min)
    if sampler.denoise:
        x = x + sigma**2 * score(x, sigma)
    return to_draws(distribution, x / process.alpha(process.t_min), shape)
