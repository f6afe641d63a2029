"""Sequential Monte Carlo with adaptive tempering."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import blackjax
import blackjax.smc.adaptive_tempered as adaptive_tempered
import blackjax.smc.resampling as resampling
import jax
import jax.numpy as jnp
from blackjax.smc.base import update_and_take_last
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.spreads import or_one, spread
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.adaptation import LONGEST, SHORTEST
from numpyro_ebm.partition._annealing import default_kernel, exact_kernel
from numpyro_ebm.partition._base import AbstractPartition, Bound, Densities, Estimate, Weighted, tail_of

Settings: TypeAlias = dict[str, Float[Array, "1 ..."]]
"""Settings of a kernel by name, with a leading dimension of 1: for BlackJAX, particles then share them."""


class Population(NamedTuple):
    """Particles on their way from the start to the target.

    Attributes:
        state: BlackJAX's state: particles, their weights and the inverse temperature.
        log_z: log of the product of the mean weights so far.
        variance: sum of the relative variances of these means, as if the particles were independent.
        founders: index of each particle's ancestor in the first population.
        settings: settings of the kernel, as adapted so far.
        num_stages: resampling steps so far.
        key: random key.
    """

    state: Any
    log_z: Scalar
    variance: Scalar
    founders: Int[Array, " particles"]
    settings: Settings
    num_stages: Int[Array, ""]
    key: PRNGKey


@dataclasses.dataclass(frozen=True)
class SequentialMonteCarlo(AbstractPartition):
    r"""Tempered sequential Monte Carlo (BlackJAX's): a population that is weighted, resampled and moved towards the target.

    The densities are those of `AnnealedImportanceSampling`; each next beta is the one at which the weights have the
    effective sample size ``target_ess``. Resampling keeps all particles at work, so far fewer levels are enough. The
    kernel's step size follows its acceptance from stage to stage, and its inverse mass matrix follows the spread of the
    population. The product of the mean weights is unbiased for Z except for this adaptation, whose bias is of the order of
    one over the number of particles:

    .. math:: \log \hat Z = \sum_t \log \frac 1n \sum_i w_{t, i}

    The standard error is that of Lee and Whiteley, which needs one run. With ``A`` the share of the final weights that each
    of the first particles leaves to its descendants, and ``T`` resampling steps, the relative variance is
    ``1 - (n / (n - 1))^{T + 1} (1 - sum A^2)``, and ``ess`` is ``1 / sum A^2``. After many stages this variance is noisy and
    may be negative, so it is at least the sum of the relative variances of the stages' mean weights, as if these were
    independent.

    Args:
        num_particles: number of particles.
        kernel: a name or a kernel, which has to be exact; None as in `AnnealedImportanceSampling`.
        num_steps: transitions at each stage.
        target_ess: effective sample size after each weighting, as a share of the particles.
        max_stages: largest number of stages.
        start: as in `AnnealedImportanceSampling`.
        data: events to which the start is fitted, as there.
        sharding: devices that share the particles: a ``jax.sharding.Mesh``, whose first axis splits them evenly, or a number
            of devices; None for one. After each stage every device gets all particles, to draw from them.

    Raises:
        EnergyError: for counts below 1, fewer than 2 particles, a ``target_ess`` outside (0, 1), an unknown or an unadjusted
            kernel, a start of another shape or support, and if beta does not reach 1.

    Example:
        ``log_partition(rng_key, distribution, method="smc", num_particles=2000, kernel="hmc")``

    References:
        Del Moral, Doucet and Jasra, Sequential Monte Carlo samplers (2006); Lee and Whiteley, Variance estimation in the
        particle filter (2018); Cabezas et al., BlackJAX (2024).
    """

    name: ClassVar[str] = "smc"
    fits_start: ClassVar[bool] = True
    bound: ClassVar[Bound | None] = "lower"
    unfinished: ClassVar[str] = "Beta 1 was not reached: use more max_stages, or a start that covers the target."
    unreliable: ClassVar[str] = "Few particles have descendants: use more num_particles, num_steps or a larger target_ess."
    num_particles: int = 1000
    kernel: Any = None
    num_steps: int = 10
    target_ess: Any = 0.7
    max_stages: int = 1000
    start: Any = None
    data: Any = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    sharding: Any = None

    def __post_init__(self):
        owner = type(self).__name__
        for name, least in (("num_particles", 2), ("num_steps", 1), ("max_stages", 1)):
            check_count(owner, name, getattr(self, name), least)
        if self.placement is not None:
            self.placement.check_count(owner, "num_particles", self.num_particles)
        check_positive(owner, "target_ess", self.target_ess, scalar=True)
        if isinstance(self.target_ess, int | float) and self.target_ess >= 1:
            raise EnergyError(f"{owner} needs target_ess as a share below 1; got {self.target_ess}. Write target_ess=0.7.")
        if isinstance(self.kernel, str | AbstractKernel):
            object.__setattr__(self, "kernel", exact_kernel(owner, self.kernel))

    @property
    def num_starts(self) -> int:
        """Number of particles."""
        return self.num_particles

    def check(self, distribution):
        """Check that the kernel can move on the support, and raise otherwise."""
        super().check(distribution)
        default_kernel(self.kernel, distribution)

    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the product of the mean weights."""
        kernel = default_kernel(self.kernel, densities.distribution)
        num = self.num_particles
        population = Population(
            blackjax.smc.tempered.init(kernel.lift_all(starts))._replace(tempering_param=jnp.zeros((), float)),
            jnp.zeros((), float),
            jnp.zeros((), float),
            jnp.arange(num),
            _settings(kernel, starts),
            jnp.zeros((), jnp.int32),
            rng_key,
        )

        def goes_on(population):
            return (population.state.tempering_param < 1) & (population.num_stages < self.max_stages)

        end = jax.lax.while_loop(goes_on, lambda p: self._stage(p, kernel, densities), population)
        left = jax.ops.segment_sum(end.state.weights, end.founders, num)
        concentration = jnp.sum(left**2)
        variance = 1 - (num / (num - 1)) ** (end.num_stages + 1).astype(concentration.dtype) * (1 - concentration)
        error = jnp.sqrt(jnp.maximum(variance, end.variance))
        is_finished, log_weights = end.state.tempering_param >= 1, jnp.log(end.state.weights)
        draws = Weighted(jax.vmap(kernel.lower)(end.state.particles), log_weights)
        return Estimate(end.log_z, error, 1 / concentration, is_finished, tail_of(log_weights), draws=draws)

    def _update_strategy(self, *args: Any, **kwargs: Any) -> tuple[Callable, Any]:
        """Return BlackJAX's default update, with each device moving its own particles."""
        update, num_resampled = update_and_take_last(*args, **kwargs)
        return lambda keys, particles, _: self.on_each_part(lambda *own: update(*own, {}), keys, particles), num_resampled

    def _stage(self, population: Population, kernel: AbstractKernel, densities: Densities) -> Population:
        key, key_stage, key_init = jax.random.split(population.key, 3)

        def of_one(log_density):
            """Return BlackJAX's density of a particle as that of a position; a particle may hold several replicas."""
            return lambda position: log_density(kernel.lift(position))

        def init(position, log_density):
            # BlackJAX passes no key here, and momenta that all particles share would tie them together.
            bits = jax.lax.bitcast_convert_type(jnp.sum(position).astype(jnp.float32), jnp.uint32)
            return kernel.init(jax.random.fold_in(key_init, bits), position, of_one(log_density))

        def transition(key, state, log_density, **settings):
            return (kernel.adapted(**settings) if settings else kernel).step(key, state, of_one(log_density))

        step = adaptive_tempered.build_kernel(
            lambda z: densities.log_start(kernel.lower(z)),
            lambda z: densities.log_ratio(kernel.lower(z)),
            transition,
            init,
            # The variance estimate holds for multinomial resampling.
            resampling.multinomial,
            self.target_ess,
            update_strategy=self._update_strategy,  # pyright: ignore[reportArgumentType]
        )
        state, info = step(key_stage, population.state, self.num_steps, population.settings)
        num = self.num_particles
        of_stage = jnp.maximum(num * jnp.sum(state.weights**2) - 1, 0.0) / (num - 1)
        return Population(
            state,
            population.log_z + info.log_likelihood_increment,
            population.variance + of_stage,
            population.founders[info.ancestors],
            _adapt(kernel, population.settings, jax.vmap(kernel.lower)(state.particles), info.update_info.acceptance_rate),
            population.num_stages + 1,
            key,
        )


jax.tree_util.register_dataclass(
    SequentialMonteCarlo,
    data_fields=["kernel", "target_ess", "start", "data"],
    meta_fields=["num_particles", "num_steps", "max_stages", "sharding"],
)


def _settings(kernel: AbstractKernel, starts: Shaped[Array, " particles *position"]) -> Settings:
    """Return the settings that adapt, with a leading dimension of 1: for BlackJAX, particles then share them."""
    settings = {}
    if kernel.target_acceptance is not None:
        settings["step_size"] = jnp.asarray(kernel.step_size, float)[None]
    if kernel.adapts_mass_matrix:
        settings["inverse_mass_matrix"] = _spread(starts)[None]
    return settings


def _adapt(
    kernel: AbstractKernel,
    settings: Settings,
    particles: Shaped[Array, " particles *position"],
    rates: Float[Array, "particles steps"],
) -> Settings:
    new = dict(settings)
    if "step_size" in new:
        target: Any = kernel.target_acceptance
        log_step = jnp.log(new["step_size"]) + 2 * (jnp.mean(rates) - target)
        new["step_size"] = jnp.clip(jnp.exp(log_step), SHORTEST, LONGEST)
    if "inverse_mass_matrix" in new:
        new["inverse_mass_matrix"] = _spread(particles)[None]
    return new


def _spread(particles: Shaped[Array, " particles *position"]) -> Float[Array, " d"]:
    return or_one(spread(particles.reshape(len(particles), -1))) ** 2
