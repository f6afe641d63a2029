"""The probability flow: a noise process as an ordinary differential equation, for draws and likelihoods."""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from numpyro_ebm._core import programs
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.derivatives import over_coordinates
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions import EnergyDistribution, ScoreDistribution
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels.layout import rows_local, to_draws
from numpyro_ebm.sampling.levels import check_level, closed_at_levels, score_at_level
from numpyro_ebm.sampling.noise import AbstractNoiseProcess, check_process

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class ProbabilityFlow:
    r"""The ordinary differential equation with the marginals of a noise process, solved by diffrax (Tsit5).

    .. math:: \frac{dx}{dt} = v(x, t) = f(x, t) - \tfrac12 g(t)^2 s(x, \sigma(t))

    To draw samples, it is solved from ``prior`` at ``t = 1`` down to ``t_min``. To evaluate the density, it is solved
    upwards, and the change in volume is added:

    .. math:: \log p(x_0) = \log p_1(x_1) + \int_{t_{min}}^1 \operatorname{tr} \frac{\partial v}{\partial x} dt

    This is the density of the distribution that the sampler draws from: the learned distribution of the data with the noise
    of ``t_min`` on them (of variance ``sigma_min^2`` for `VE`, ``(sigma / alpha)^2`` in the data's units for `VP`), to the
    extent that the score is exact and ``prior`` is the distribution at ``t = 1``. It is normalised for any score.

    The model receives the level through its context (see `MultiscaleDenoisingScoreMatching`). On a support other than the
    real line the flow runs in unconstrained space, and `log_prob` includes the Jacobian. Each row has its own step sizes.
    diffrax comes with the extra ``pip install 'numpyro-ebm[ode]'``.

    Args:
        process: `VE` or `VP`, as the model was trained with (or with a ladder that covers its levels, for `VE`).
        rtol: relative tolerance of the solver.
        atol: absolute tolerance of the solver.
        max_steps: number of steps after which the solver gives up.
        num_probes: number of random directions per row that estimate the trace in `log_prob` (Hutchinson), drawn once for
            the whole path. The estimate is unbiased and cheaper than the exact trace (None), which takes one forward
            derivative per dimension.
        prior: a normalised NumPyro distribution of one event in unconstrained space, the distribution at ``t = 1``; None for
            that of the process. For `VE`, a prior with the mean of the data, and their variance plus ``sigma_max^2``, is
            better than ``N(0, sigma_max^2)``: without it, for data of mean 2.4 and ``sigma_max = 50``, a mode of weight 0.2
            has 0.211 of the draws.

    Raises:
        EnergyError: for tolerances or counts that are not positive, a prior of another shape, a model whose context has no
            noise level, and if the solver does not reach the end (inside an outer ``jit``, equinox raises a RuntimeError).
        TypeError: if ``process`` is not a noise process or ``prior`` is not a distribution.
        ImportError: without diffrax.

    Example:
        ``ProbabilityFlow(VE(0.01, 10.0)).log_prob(distribution, x)``

    References:
        Song et al., Score-based generative modeling through stochastic differential equations (2021), section 4.3 and
        appendix D.
    """

    process: AbstractNoiseProcess
    rtol: Any = 1e-5
    atol: Any = 1e-5
    max_steps: int = 4096
    num_probes: int | None = None
    prior: Any = None

    def __post_init__(self):
        check_process("ProbabilityFlow", self.process)
        check_positive("ProbabilityFlow", "rtol", self.rtol)
        check_positive("ProbabilityFlow", "atol", self.atol)
        check_count("ProbabilityFlow", "max_steps", self.max_steps)
        if self.num_probes is not None:
            check_count("ProbabilityFlow", "num_probes", self.num_probes)
        if not (self.prior is None or isinstance(self.prior, dist.Distribution) or type(self.prior) is object):
            raise TypeError(f"ProbabilityFlow needs prior as a numpyro distribution; got {type(self.prior).__name__}.")

    def __call__(self, rng_key: PRNGKey, distribution: EventDistribution, sample_shape: Shape) -> Array:
        """Return draws of shape ``sample_shape + batch_shape + event_shape``."""
        check_key("ProbabilityFlow", rng_key)
        self._check(distribution)
        shape = sample_shape + distribution.batch_shape
        draws, reached = _flow_down(rng_key, closed_at_levels(distribution), self, shape=shape)
        return self._reached(draws, reached)

    def log_prob(
        self, distribution: EventDistribution, value: ArrayLike, rng_key: PRNGKey | None = None
    ) -> Float[Array, "*batch"]:
        """Return the log density of events, by the instantaneous change of variables.

        Args:
            distribution: the model; its context apart from the noise level is each row's own.
            value: events, ``sample_shape + batch_shape + event_shape``.
            rng_key: random key of the directions; required with ``num_probes`` and refused without.

        Returns:
            Nats, ``sample_shape + batch_shape``; minus infinity outside the support.

        Raises:
            EnergyError: as the class, and for a key without ``num_probes`` or the reverse.
        """
        if (rng_key is None) != (self.num_probes is None):
            raise EnergyError(
                f"log_prob needs a random key where num_probes is a number, and no key where the trace is exact; got "
                f"rng_key={rng_key} and num_probes={self.num_probes}. Write ProbabilityFlow(process, num_probes=4)"
                ".log_prob(distribution, value, jax.random.key(0))."
            )
        self._check(distribution)
        values, reached = _flow_up(rng_key, closed_at_levels(distribution, order=2), self, distribution.as_events(value))
        return self._reached(values, reached)

    def latent_distribution(self, event_shape: Shape) -> dist.Distribution:
        """Return the distribution at ``t = 1``."""
        return self.process.prior(event_shape) if self.prior is None else self.prior

    def _check(self, distribution: EventDistribution) -> None:
        _diffrax()
        check_level("ProbabilityFlow", distribution)
        latent = self.latent_distribution(distribution.unconstrained_shape)
        if latent.batch_shape != () or latent.event_shape != distribution.unconstrained_shape:
            raise EnergyError(
                f"The prior has batch shape {latent.batch_shape} and event shape {latent.event_shape}; it needs () and "
                f"{distribution.unconstrained_shape}. Write prior=numpyro.distributions.Normal(loc, scale).to_event(1)."
            )

    def _reached(self, result: Float[Array, "*batch"], reached: Bool[Array, " rows"]) -> Float[Array, "*batch"]:
        message = (
            f"The solver did not reach the end of the probability flow in max_steps={self.max_steps} steps, or met values "
            "that are not finite. Look at the score between the levels at which it was trained, or write "
            "ProbabilityFlow(..., rtol=1e-3, atol=1e-3)."
        )
        if not is_concrete(reached):
            import equinox

            return equinox.error_if(result, ~jnp.all(reached), message)
        if not bool(jnp.all(reached)):
            raise EnergyError(f"Row {int(jnp.argmin(reached))} ({int(jnp.sum(~reached))} of {reached.size}): {message}")
        return result


jax.tree_util.register_dataclass(
    ProbabilityFlow, data_fields=["process", "rtol", "atol", "prior"], meta_fields=["max_steps", "num_probes"]
)


@programs.jit(static_argnames=("shape",))
def _flow_down(rng_key, distribution, sampler, *, shape):
    process = sampler.process
    start = sampler.latent_distribution(distribution.unconstrained_shape).sample(rng_key, (math.prod(shape),)).astype(float)
    velocity = _velocity(process, distribution)

    def one(position, local):
        return _solve(sampler, lambda t, x, _: velocity(x, t, local), position, 1.0, process.t_min)

    positions, reached = jax.vmap(one)(start, rows_local(distribution, shape))
    return to_draws(distribution, positions / process.alpha(process.t_min), shape), reached


@programs.jit
def _flow_up(rng_key, distribution, sampler, value):
    process, cut = sampler.process, value.ndim - len(distribution.event_shape)
    shape = jnp.broadcast_shapes(value.shape[:cut], distribution.batch_shape)
    rows = distribution.rows(value, shape)
    velocity = _velocity(process, distribution)
    latent = sampler.latent_distribution(distribution.unconstrained_shape)
    alpha = process.alpha(process.t_min)

    def one(key, event, local):
        position = distribution.unconstrain(event)
        inside = jnp.all(distribution.support(event)) & jnp.all(jnp.isfinite(position))
        position = jnp.where(inside, position, 0.0)
        trace = _trace(sampler, key, position)
        rates = lambda t, state, _: trace(lambda x: velocity(x, t, local), state[0])  # noqa: E731
        (end, volume), reached = _solve(sampler, rates, (alpha * position, jnp.zeros((), float)), process.t_min, 1.0)
        log_prob = latent.log_prob(end) + volume + position.size * jnp.log(alpha) - distribution.log_jacobian(position)
        return jnp.where(inside, log_prob, -jnp.inf), reached

    keys = None if rng_key is None else jax.random.split(rng_key, rows.value.shape[0])
    values, reached = jax.vmap(one)(keys, rows.value, rows.local)
    return values.reshape(shape), reached


def _velocity(
    process: AbstractNoiseProcess, distribution: EnergyDistribution | ScoreDistribution
) -> Callable[..., Float[Array, "*position"]]:
    score = score_at_level(distribution)

    def velocity(x, t, local):
        change = process.drift(x, t) - 0.5 * process.diffusion(t) ** 2 * score(x, process.sigma(t), local)
        return change.astype(x.dtype)

    return velocity


def _trace(sampler: ProbabilityFlow, rng_key: PRNGKey | None, like: Float[Array, "*position"]) -> Any:
    """Return ``trace(field, x)``, the value and the divergence of a vector field at a point."""
    probes = None
    if rng_key is not None:
        probes = jax.random.rademacher(rng_key, (sampler.num_probes or 1, like.size), like.dtype)

    def trace(field, x):
        flat, unravel = ravel_pytree(x)
        value, push = jax.linearize(lambda v: ravel_pytree(field(unravel(v)))[0], flat)
        if probes is None:
            return unravel(value), jnp.sum(over_coordinates(push, flat, lambda i, column: column[i]))
        return unravel(value), jnp.mean(jax.vmap(lambda v: jnp.sum(v * push(v)))(probes))

    return trace


def _solve(
    sampler: ProbabilityFlow, rates: Callable[..., PyTree], start: PyTree, begin: ArrayLike, end: ArrayLike
) -> tuple[PyTree, Bool[Array, ""]]:
    """Return the state at ``end``, and whether the solver reached it."""
    diffrax = _diffrax()
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(rates),
        diffrax.Tsit5(),
        t0=jnp.asarray(begin, float),
        t1=jnp.asarray(end, float),
        dt0=None,
        y0=start,
        stepsize_controller=diffrax.PIDController(rtol=sampler.rtol, atol=sampler.atol),
        max_steps=sampler.max_steps,
        throw=False,
    )
    last = jax.tree.map(lambda leaf: leaf[0], solution.ys)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(last)]).all()
    return last, finite & (solution.result == diffrax.RESULTS.successful)


def _diffrax() -> ModuleType:
    try:
        import diffrax
    except ImportError as error:
        raise ImportError("ProbabilityFlow needs diffrax: pip install 'numpyro-ebm[ode]'.") from error
    return diffrax
