"""Nested sampling."""

import dataclasses
from typing import Any, ClassVar

import blackjax
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate

NUM_PATHS = 100
"""Simulated paths of the shrinkage: the standard error over them is known to 7 % (one over the root of 200)."""


@dataclasses.dataclass(frozen=True)
class NestedSampling(AbstractPartition):
    r"""Nested slice sampling (BlackJAX's ``nss``): log Z as an integral over shells of equal ratio of target to start.

    With ``X(l)`` the probability under the start of a log ratio above ``l``,

    .. math:: Z = \int_0^1 e^{l(X)} dX

    Live points are drawn from the start. Repeatedly, the lowest of them are removed, which shrinks ``X`` by a factor that is
    known in the mean, and slice sampling replaces them by new points above. The target may be arbitrarily peaked and have
    phase transitions on the way; the cost grows with the information ``H`` of the target about the start, and the accuracy
    falls with the dimension.

    The standard error is that of the unknown shrinkage (100 simulated paths of it). It does not include what the slices may
    have missed: raise ``num_steps`` and check that the value stays the same.

    Args:
        num_live: number of live points.
        num_steps: slice sampling steps for a new point; None for the larger of 5 and twice the dimension.
        num_delete: number of points that are replaced at once.
        tolerance: stop if the live points hold less than this share of Z; their share is counted, too.
        max_stages: largest number of replacements.
        start: distribution of the first points, as in `AnnealedImportanceSampling`.
        data: events to which the start is fitted, as there.

    Raises:
        EnergyError: for counts below 1, a ``num_delete`` above half of ``num_live``, a discrete support, a start of another
            shape or support, and if ``max_stages`` are not enough.

    Example:
        ``log_partition(rng_key, distribution, method="nested", num_live=1000)``

    References:
        Skilling, Nested sampling for general Bayesian computation (2006); Yallup, Kroupa and Handley, Nested slice sampling
        (2026).
    """

    name: ClassVar[str] = "nested"
    fits_start: ClassVar[bool] = True
    unfinished: ClassVar[str] = "Use more max_stages, or a start nearer to the target."
    unreliable: ClassVar[str] = "Use more num_live."
    num_live: int = 500
    num_steps: int | None = None
    num_delete: int = 50
    tolerance: Any = 0.01
    max_stages: int = 2000
    start: Any = None
    data: Any = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def __post_init__(self):
        owner = type(self).__name__
        for name in ("num_live", "num_delete", "max_stages"):
            check_count(owner, name, getattr(self, name))
        if self.num_steps is not None:
            check_count(owner, "num_steps", self.num_steps)
        check_positive(owner, "tolerance", self.tolerance, scalar=True)
        if 2 * self.num_delete > self.num_live:
            raise EnergyError(
                f"{owner} replaces num_delete={self.num_delete} of num_live={self.num_live} points at once, which is "
                f"more than half. Write num_delete={max(1, self.num_live // 10)}."
            )

    @property
    def num_starts(self) -> int:
        """Number of live points."""
        return self.num_live

    def check(self, distribution):
        """Check that the support is continuous, and raise otherwise."""
        super().check(distribution)
        if distribution.is_discrete:
            raise EnergyError(f"Slices need a continuous support; this one is {distribution.support}. Write method='smc'.")

    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the integral over shells."""
        key_init, key_loop, key_paths = jax.random.split(rng_key, 3)
        sampler = self._sampler(densities, starts[0].size)
        dead = jnp.zeros((self.max_stages, self.num_delete), float)

        def goes_on(carry):
            i, _, state, _ = carry
            seen = jnp.logaddexp(state.integrator.logZ, state.integrator.logZ_live)
            return (i < self.max_stages) & (state.integrator.logZ_live - seen > jnp.log(self.tolerance))

        def stage(carry):
            i, key, state, dead = carry
            key, key_step = jax.random.split(key)
            state, info = sampler.step(key_step, state)
            return i + 1, key, state, dead.at[i].set(info.particles.loglikelihood)

        first = (jnp.zeros((), jnp.int32), key_loop, sampler.init(starts, key_init), dead)
        num_stages, _, state, dead = jax.lax.while_loop(goes_on, stage, first)
        found = _integrate(key_paths, dead, num_stages, state.particles.loglikelihood)
        return found._replace(is_finished=num_stages < self.max_stages)

    def _sampler(self, densities: Densities, size: int) -> Any:
        num_steps = self.num_steps or max(5, 2 * size)
        return blackjax.nss(densities.log_start, densities.log_ratio, num_steps, num_delete=self.num_delete)


jax.tree_util.register_dataclass(
    NestedSampling,
    data_fields=["tolerance", "start", "data"],
    meta_fields=["num_live", "num_steps", "num_delete", "max_stages"],
)


def _integrate(
    rng_key: PRNGKey, dead: Float[Array, "stages deleted"], num_stages: Int[Array, ""], live: Float[Array, " live"]
) -> Estimate:
    """Return mean and spread of log Z over simulated shrinkages (BlackJAX's ``logX`` does the same, but not under jit).

    Args:
        rng_key: random key.
        dead: ``(max_stages, num_delete)``, log ratios of the points in the order of their removal.
        num_stages: number of stages.
        live: ``(num_live,)``, log ratios of the last points.
    """
    num_live, (max_stages, num_delete) = len(live), dead.shape
    is_point = jnp.concatenate([jnp.repeat(jnp.arange(max_stages) < num_stages, num_delete), jnp.ones(num_live, bool)])
    log_ratios = jnp.concatenate([jnp.where(is_point[:-num_live], dead.reshape(-1), 0.0), jnp.sort(live)])
    alive = jnp.concatenate([jnp.tile(num_live - jnp.arange(num_delete), max_stages), num_live - jnp.arange(num_live)])
    alive = _alive_on_plateaus(alive, log_ratios, is_point).astype(dead.dtype)
    shrinkage = jnp.log(jax.random.uniform(rng_key, (NUM_PATHS, len(alive)), minval=jnp.finfo(dead.dtype).tiny)) / alive
    shrinkage = jnp.where(is_point, shrinkage, 0.0)
    before = jnp.cumsum(shrinkage, axis=1) - shrinkage
    log_shells = before + jnp.where(is_point, jnp.log(-jnp.expm1(jnp.minimum(shrinkage, -1e-12))), -jnp.inf)
    log_weights = log_shells + log_ratios
    values = jax.nn.logsumexp(log_weights, axis=1)
    mean = jax.nn.logsumexp(log_weights, axis=0)
    ess = jnp.exp(2 * jax.nn.logsumexp(mean) - jax.nn.logsumexp(2 * mean))
    return Estimate(jnp.mean(values), jnp.std(values), ess)


def _alive_on_plateaus(
    alive: Int[Array, " points"], log_ratios: Float[Array, " points"], is_point: Bool[Array, " points"]
) -> Int[Array, " points"]:
    """Return the number of points alive at each removal, where points of equal ratio are removed one after the other.

    No replacement lies on the plateau: ``n, n - 1, ...`` points are alive until it is empty, and the remaining ``X`` is the
    share of the points above it. A part of the space where the energy is infinite is such a plateau.
    """
    places = jnp.cumsum(is_point) - 1
    last = jnp.full(len(places), -jnp.inf, log_ratios.dtype).at[places].max(jnp.where(is_point, log_ratios, -jnp.inf))
    is_new = is_point & ((places == 0) | (log_ratios != last[places - 1]))
    first = jax.lax.cummax(jnp.where(is_new, jnp.arange(len(places)), 0))
    return jnp.maximum(alive[first] - (places - places[first]), 1)
