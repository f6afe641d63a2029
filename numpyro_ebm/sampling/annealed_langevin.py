"""Annealed Langevin dynamics."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float
from numpyro.distributions import constraints

from numpyro_ebm._core import programs
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels.layout import check_start, draw_start, normal_rows, rows_local, to_draws, to_positions
from numpyro_ebm.sampling.levels import check_level, closed_at_levels, score_of_rows
from numpyro_ebm.sampling.noise import check_sigmas

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class AnnealedLangevin:
    r"""Annealed Langevin dynamics (Song and Ermon): unadjusted Langevin steps at one noise level after the other, downwards.

    The chain starts from ``N(0, sigma_1^2)`` in unconstrained space. At level ``i`` its step size is
    ``eps_i = step_size * sigma_i^2 / sigma_L^2``:

    .. math:: x \leftarrow x + \epsilon_i s(x, \sigma_i) + \sqrt{2 \epsilon_i}\, z

    (NCSN writes ``alpha_i = 2 eps_i``). At the end, the denoising step removes the noise of the last level in the mean,
    ``x + sigma_L^2 s(x, sigma_L)``. The steps are never rejected: for a Gaussian of variance ``v``, the stationary variance
    at a level is ``u / (1 - eps_i / (2 u))`` with ``u = v + sigma_i^2``. The weights of distant modes are settled at the
    levels that still connect them, so these need enough levels and steps: for modes at -4 and 4 (standard deviation 0.5),
    the mode of weight 0.2 has 0.211 of the draws with 24 levels of 60 steps from 16 to 0.1, and 0.205 with 48 levels.

    The model receives the level through its context (see `MultiscaleDenoisingScoreMatching`) and must be trained with a
    ladder or with `VE`. For a model trained with `VP`, whose data shrink as the noise grows, use `ReverseSDE` or
    `ProbabilityFlow`.

    Args:
        sigmas: the noise levels, in any order; see `geometric_sigmas`.
        steps_per_sigma: steps at each level.
        step_size: the step at the smallest level, a squared length well below its ``sigma_L^2``; None for
            ``sigma_L^2 / 10``, as in NCSN.
        denoise: whether to make the denoising step.
        start: a sampler that draws the initial events, instead of ``N(0, sigma_1^2)``.

    Raises:
        EnergyError: for levels or a step size that are not positive, a count below 1, and a model whose context has no noise
            level.
        TypeError: if ``start`` is not a sampler.

    Example:
        >>> import jax
        >>> from numpyro_ebm import EnergyDistribution, geometric_sigmas
        >>> sampler = AnnealedLangevin(geometric_sigmas(5.0, 0.1, 8), steps_per_sigma=20)
        >>> energy = lambda x, sigma: 0.5 * x**2 / (1 + sigma**2)
        >>> d = EnergyDistribution(energy, context=jnp.asarray(0.1), sampler=sampler)
        >>> d.sample(jax.random.key(0), (3,)).shape
        (3,)

    References:
        Song and Ermon, Generative modeling by estimating gradients of the data distribution (2019); Improved techniques for
        training score-based generative models (2020), for the denoising step.
    """

    sigmas: Any
    steps_per_sigma: int = 100
    step_size: Any = None
    denoise: bool = True
    start: Any = None

    def __post_init__(self):
        check_sigmas("AnnealedLangevin", self.sigmas)
        check_count("AnnealedLangevin", "steps_per_sigma", self.steps_per_sigma)
        check_positive("AnnealedLangevin", "step_size", self.step_size)
        check_start("AnnealedLangevin", self.start)

    def __call__(self, rng_key: PRNGKey, distribution: EventDistribution, sample_shape: Shape) -> Array:
        """Return draws of shape ``sample_shape + batch_shape + event_shape``."""
        return self._run(rng_key, distribution, sample_shape, sample_shape + distribution.batch_shape)[0]

    def trajectory(
        self, rng_key: PRNGKey, distribution: EventDistribution, sample_shape: Shape = ()
    ) -> Float[Array, "levels ..."]:
        """Return the path of the same draws: where they are at the end of each level, before the denoising step.

        Returns:
            ``(num_levels,) + sample_shape + batch_shape + event_shape``, the largest level first.
        """
        shape = sample_shape + distribution.batch_shape
        return self._run(rng_key, distribution, sample_shape, shape, keep_path=True)[1]

    def inpaint(
        self, rng_key: PRNGKey, distribution: EventDistribution, value: ArrayLike, mask: ArrayLike, sample_shape: Shape = ()
    ) -> Array:
        """Draw some elements of an event given the others, which are held at the data plus the noise of each level.

        At level ``i`` the known elements are ``value + sigma_i z``, with ``z`` drawn once per level (in unconstrained
        space), so that the unknown elements follow their conditional distribution under the smoothed density. At the end the
        known elements are ``value``.

        Args:
            rng_key: random key.
            distribution: the model.
            value: events, ``rows + event_shape``, where ``rows`` broadcasts with ``batch_shape``; unknown elements may hold
                anything.
            mask: True where an element is known; broadcast to ``value``.
            sample_shape: shape of independent draws for each event.

        Returns:
            ``sample_shape + rows + event_shape``.

        Raises:
            EnergyError: for a mask that is not boolean or does not broadcast, a known element that is not inside the
                support, and a support that couples the elements of an event (a simplex).

        Example:
            ``sampler.inpaint(key, distribution, images, jnp.arange(64) < 32)`` draws lower halves given upper ones.

        References:
            Song and Ermon (2019), algorithm 2.
        """
        value = distribution.as_events(value)
        check_level("AnnealedLangevin", distribution)
        _check_elementwise(distribution)
        cut = value.ndim - len(distribution.event_shape)
        shape = sample_shape + jnp.broadcast_shapes(value.shape[:cut], distribution.batch_shape)
        mask = _mask_of(mask, shape + distribution.event_shape).reshape((-1, *distribution.event_shape))
        known = to_positions(distribution, jnp.broadcast_to(value, shape + distribution.event_shape))
        if is_concrete(known, mask) and not bool(jnp.all(jnp.isfinite(jnp.where(mask, known, 0.0)))):
            raise EnergyError(
                f"A known element of the events to inpaint is not inside the support {distribution.support} or is not "
                "finite. Leave it out of the mask."
            )
        draws = self._run(rng_key, distribution, sample_shape, shape, (jnp.where(mask, known, 0.0), mask))[0]
        return jnp.where(mask.reshape(draws.shape), value, draws)

    def _run(self, rng_key, distribution, sample_shape, shape, held=None, *, keep_path=False) -> tuple[Any, Any]:
        check_key("AnnealedLangevin", rng_key)
        check_level("AnnealedLangevin", distribution)
        key_start, key_levels = jax.random.split(rng_key)
        if self.start is not None and shape != sample_shape + distribution.batch_shape:
            raise EnergyError(
                f"start draws one event per row of batch_shape={distribution.batch_shape}; there are {shape} events to "
                "inpaint. Write AnnealedLangevin(..., start=None), or declare the distribution with these rows."
            )
        start = draw_start(self.start, key_start, distribution, sample_shape)
        if start is None:
            positions = normal_rows(key_start, distribution, shape) * jnp.max(jnp.asarray(self.sigmas, float))
        else:
            positions = to_positions(distribution, start)
        bare = dataclasses.replace(self, start=None)  # jit does not accept functions as arguments
        return _anneal(key_levels, closed_at_levels(distribution), bare, positions, held, shape=shape, keep_path=keep_path)


jax.tree_util.register_dataclass(
    AnnealedLangevin, data_fields=["sigmas", "step_size", "start"], meta_fields=["steps_per_sigma", "denoise"]
)


@programs.jit(static_argnames=("shape", "keep_path"))
def _anneal(rng_key, distribution, sampler, positions, held, *, shape, keep_path):
    ladder = jnp.sort(jnp.asarray(sampler.sigmas, float), descending=True)
    step_size = 0.1 * ladder[-1] ** 2 if sampler.step_size is None else sampler.step_size
    score = score_of_rows(distribution, rows_local(distribution, shape))

    def level(positions, inputs):
        key, sigma = inputs
        key_held, key_steps = jax.random.split(key)
        hold = _holder(key_held, held, sigma)
        epsilon = step_size * (sigma / ladder[-1]) ** 2

        def step(x, key):
            noise = jax.random.normal(key, x.shape, x.dtype)
            moved = x + epsilon * score(x, sigma) + jnp.sqrt(2 * epsilon) * noise
            return hold(moved.astype(x.dtype)), None

        positions, _ = jax.lax.scan(step, hold(positions), jax.random.split(key_steps, sampler.steps_per_sigma))
        return positions, (to_draws(distribution, positions, shape) if keep_path else None)

    keys = jax.random.split(rng_key, ladder.size)
    positions, path = jax.lax.scan(level, positions, (keys, ladder))
    if sampler.denoise:
        positions = positions + ladder[-1] ** 2 * score(positions, ladder[-1])
    return to_draws(distribution, positions, shape), path


def _holder(
    rng_key: PRNGKey, held: tuple[Float[Array, " rows *position"], Bool[Array, " rows *position"]] | None, sigma: Scalar
) -> Callable[[Float[Array, " rows *position"]], Float[Array, " rows *position"]]:
    """Return a function that resets the known elements to their values plus the noise of one level."""
    if held is None:
        return lambda positions: positions
    known, mask = held
    noisy = known + sigma * jax.random.normal(rng_key, known.shape, known.dtype)
    return lambda positions: jnp.where(mask, noisy, positions)


def _check_elementwise(distribution: EventDistribution) -> None:
    support = distribution.support
    while isinstance(support, constraints.independent):  # pyright: ignore[reportArgumentType]
        support = support.base_constraint  # pyright: ignore[reportAttributeAccessIssue]
    if support.event_dim or distribution.unconstrained_shape != distribution.event_shape:
        raise EnergyError(
            f"The support {support} ties the elements of an event to each other, so inpaint cannot hold some of them and "
            "draw the others. Declare the event on an elementwise support, e.g. support=constraints.positive."
        )


def _mask_of(mask: ArrayLike, shape: Shape) -> Bool[Array, "..."]:
    mask = jnp.asarray(mask)
    try:
        if mask.dtype == bool:
            return jnp.broadcast_to(mask, shape)
    except ValueError:
        pass
    raise EnergyError(
        f"inpaint needs a boolean mask that broadcasts to {shape}, True where an element is known; got {mask.dtype} of "
        f"shape {mask.shape}. Write for example mask=jnp.arange(64) < 32."
    )
