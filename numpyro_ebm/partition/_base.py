"""What the ways to log Z have in common: what they return, what they are given, one row's densities."""

import abc
import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from blackjax.diagnostics import psis_weights

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, Position, PRNGKey, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.supports import check_same_support
from numpyro_ebm.partition._proposal import Proposal, check_rows

NOTHING = -1e30
"""A log density of nothing that may be multiplied by 0."""
FEWEST_FOR_TAIL = 25
EVEN = 0.8
BARELY = -1e15
"""Below it a sum of such numbers, with small factors, is one of them."""

Bound = Literal["lower", "upper"]


class LogPartition(NamedTuple):
    """Log Z of an energy, ``log of the integral of base(x) exp(-E(x))``, in nats.

    Attributes:
        value: shape ``()`` where all rows share one density, else the batch shape: one per context.
        standard_error: of ``value``, of the same shape; the size of rounding where it is exact.
        ess: effective number of draws behind it, of the same shape; infinite where it is exact.
        bound: "lower" where the mean of ``value`` over random keys is below log Z (a likelihood computed with it is then
            above the truth in the mean), "upper" where it is above, None for neither.
    """

    value: Array
    standard_error: Array
    ess: Array
    bound: Bound | None


class Estimate(NamedTuple):
    """One row's log Z as a method found it.

    Attributes:
        value: log Z.
        standard_error: of it.
        ess: effective number of draws.
        is_finished: whether the method came to its end.
        tail: Pareto shape of the weights' upper tail; from 1/2 on their variance is infinite. 0 without weights.
        covers: whether chains that came from the start stay where they came.
        are_draws: whether what counts as draws of the target can be draws of it.
    """

    value: Array
    standard_error: Array
    ess: Array
    is_finished: Any = True
    tail: Any = 0.0
    covers: Any = True
    are_draws: Any = True


@dataclasses.dataclass(frozen=True)
class Densities:
    """One row's target, and the law that a method starts from, in unconstrained space (Jacobian included).

    Attributes:
        distribution: the energy.
        local: what the row has of its own.
        start: a normalised distribution of one event, a law of positions, or None for the distribution's reference.
    """

    distribution: EventDistribution
    local: PyTree
    start: Any = None

    def log_target(self, position: Position) -> Array:
        """Unnormalised log density; NaN counts as no density at all."""
        energy: Any = self.distribution
        return _no_nan(energy.unconstrained_log_density(position, self.local))

    def log_start(self, position: Position) -> Array:
        """Normalised log density of the start."""
        if self.start is None:
            return self.distribution.unconstrained_log_reference(position, self.local)
        if isinstance(self.start, Proposal):
            return self.start.log_prob(position)
        event = self.distribution.constrain(position)
        return jnp.sum(self.start.log_prob(event)) + self.distribution.log_jacobian(position)

    def log_ratio(self, position: Position) -> Array:
        """Log of target over start; where there is no target, a number so small that its exponential is 0."""
        return jnp.maximum(_no_nan(self.log_target(position) - self.log_start(position)), NOTHING)

    def log_between(self, position: Position, beta: Array) -> Array:
        """The geometric path: ``(1 - beta)`` times the start's log density and ``beta`` times the target's."""
        return self.log_start(position) + beta * self.log_ratio(position)


class AbstractPartition(abc.ABC):
    """A way to log Z: settings in a frozen dataclass, registered as a pytree; one row at a time, under jit and vmap.

    Attributes:
        name: what `log_partition` calls it.
        bound: see `LogPartition`.
        needs_key: whether it is random.
        unfinished: what to do where it did not come to its end.
        unreliable: what to do where few effective draws are behind it.
        fits_start: whether its start is fitted to the target where it is given none.
    """

    name: ClassVar[str]
    bound: ClassVar[Bound | None] = None
    needs_key: ClassVar[bool] = True
    unfinished: ClassVar[str] = ""
    unreliable: ClassVar[str] = ""
    fits_start: ClassVar[bool] = False

    @abc.abstractmethod
    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: Any, draws: Any) -> Estimate:
        """Log Z of one row.

        Args:
            rng_key: random key (None for exact methods).
            densities: the row's.
            starts: ``(num_starts, ...)`` positions drawn from ``densities.start``; None for none.
            draws: ``(num_draws, ...)`` positions drawn from the target (or the data given); None for none.
        """

    @property
    def start_law(self) -> Any:
        """The law of the starts, a NumPyro distribution; None for the reference."""
        return getattr(self, "start", None)

    @property
    def num_starts(self) -> int:
        """How many draws of the start it takes."""
        return 0

    @property
    def num_draws(self) -> int:
        """How many draws of the target it takes, where no data are given."""
        return 0

    @property
    def data(self) -> Any:
        """Events that take the place of draws of the target, ``(num, *batch_shape, *event_shape)``; None for none."""
        return None

    def check(self, distribution: EventDistribution) -> None:
        """Refuse what this method cannot do.

        Raises:
            EnergyError: with what to write.
        """
        owner = type(self).__name__
        if self.start_law is not None:
            check_start_law(owner, self.start_law, distribution)
        if self.fits_start and self.data is not None:
            if self.start_law is not None or distribution.base is not None or distribution.is_discrete:
                raise EnergyError(
                    f"{owner} fits a start to data where it has none; here it has start=, the energy's base or the uniform "
                    "law of a discrete support. Leave out data=."
                )
            check_rows(owner, self.data, distribution, 2)


def check_start_law(owner: str, law: Any, distribution: EventDistribution) -> None:
    """Refuse a law that is not one of a single event on the energy's support.

    Raises:
        EnergyError: with its shape or support.
        TypeError: for what is no distribution.
    """
    if not isinstance(law, dist.Distribution):
        raise TypeError(f"{owner} needs a numpyro distribution to start from; got {type(law).__name__}.")
    if law.batch_shape or law.event_shape != distribution.event_shape:
        raise EnergyError(
            f"{owner} needs the distribution of one event of shape {distribution.event_shape}; got batch shape "
            f"{law.batch_shape} and event shape {law.event_shape}. Write numpyro.distributions.Normal(0, 2)"
            f".expand({list(distribution.event_shape)}).to_event({len(distribution.event_shape)})."
        )
    check_same_support("start", law, distribution.support)


def from_log_weights(log_weights: Array) -> Estimate:
    """Log of the mean weight, its standard error by the delta method, and Kish's effective sample size."""
    num = len(log_weights)
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights)
    ess = total**2 / jnp.sum(weights**2)
    relative_variance = jnp.maximum(num / ess - 1, 0.0) / max(num - 1, 1)
    value = jnp.where(largest < BARELY, -jnp.inf, jnp.log(total / num) + largest)
    return Estimate(value, jnp.sqrt(relative_variance), ess, tail=tail_of(log_weights))


def tail_of(log_weights: Array) -> Array:
    """Pareto shape of the largest weights (Vehtari et al. 2024); 0 where they are too few to tell, or nearly all equal."""
    if len(log_weights) < FEWEST_FOR_TAIL:
        return jnp.zeros((), log_weights.dtype)
    weights, shape = psis_weights(log_weights)
    is_even = jnp.exp(-jax.nn.logsumexp(2 * weights)) > EVEN * len(log_weights)
    return jnp.where(is_even, 0.0, jnp.nan_to_num(shape))


def rounding(value: Array) -> Array:
    """What is left of error in a sum of terms that were rounded."""
    return 16 * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(value), 1.0)


def _no_nan(value: Array) -> Array:
    return jnp.where(jnp.isnan(value), -jnp.inf, value)
