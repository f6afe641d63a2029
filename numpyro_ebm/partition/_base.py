"""Base of the methods for log Z: their results, their inputs, and the densities of one row."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax.diagnostics import psis_weights
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.sharding import Placement
from numpyro_ebm._core.typing import Array, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.supports import check_same_support
from numpyro_ebm.kernels.densities import Known
from numpyro_ebm.partition._proposal import Proposal, check_rows

NOTHING = -1e30
"""Finite stand-in for log 0, so that multiplying it by 0 gives 0."""
FEWEST_FOR_TAIL = 25
"""BlackJAX fits the Pareto shape to the largest fifth of the weights, and needs 5 of them."""
EVEN = 0.8
"""If more than this share of the draws is effective, the weights are too equal for their tail to matter."""
BARELY = -1e15
"""Anything below this counts as log 0: sums of such stand-ins with small factors."""

Bound = Literal["lower", "upper"]


class LogPartition(NamedTuple):
    """Log Z of an energy, ``log of the integral of base(x) exp(-E(x))``, in nats.

    Attributes:
        value: of shape ``()`` if all rows share one density, otherwise of the batch shape: one per context.
        standard_error: standard error of ``value``, of the same shape; the rounding error if the method is exact.
        ess: effective number of draws behind ``value``, of the same shape; infinite if the method is exact.
        bound: "lower" if the mean of ``value`` over random keys is below log Z (a likelihood computed with it is then above
            the truth in the mean), "upper" if it is above, None for neither.
    """

    value: Float[Array, "*batch"]
    standard_error: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]
    bound: Bound | None


class Weighted(NamedTuple):
    """Positions whose weighted mean estimates a mean under the target.

    Attributes:
        positions: ``(num, ...)``, in unconstrained space.
        log_weights: ``(num,)``, up to a constant.
    """

    positions: Shaped[Array, " draws *position"]
    log_weights: Float[Array, " draws"]


class Estimate(NamedTuple):
    """A method's estimate of one row's log Z.

    Attributes:
        value: log Z.
        standard_error: standard error of ``value``.
        ess: effective number of draws.
        is_finished: whether the method finished.
        tail: Pareto shape of the upper tail of the weights, whose variance is infinite from 1/2 on. 0 without weights.
        covers: whether chains that came from the start stay where they ended.
        are_draws: whether the draws given for the target can be draws of it.
        draws: weighted draws of the target that the method ends with; None without any.
    """

    value: Float[Array, "*batch"]
    standard_error: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]
    is_finished: Any = True
    tail: Any = 0.0
    covers: Any = True
    are_draws: Any = True
    draws: Weighted | None = None


@dataclasses.dataclass(frozen=True)
class Densities:
    """One row's target, and the distribution that a method starts from, in unconstrained space (Jacobian included).

    Attributes:
        distribution: the energy.
        local: context and base of the row.
        start: a normalised distribution of one event, a `Proposal` of positions, or None for the distribution's reference.
    """

    distribution: EventDistribution
    local: PyTree
    start: Any = None

    def log_target(self, position: Position) -> Scalar:
        """Return the unnormalised log density; NaN counts as log 0."""
        energy: Any = self.distribution
        return _no_nan(energy.unconstrained_log_density(position, self.local))

    def log_start(self, position: Position) -> Scalar:
        """Return the normalised log density of the start."""
        if self.start is None:
            return self.distribution.unconstrained_log_reference(position, self.local)
        if isinstance(self.start, Proposal):
            return self.start.log_prob(position)
        event = self.distribution.constrain(position)
        return jnp.sum(self.start.log_prob(event)) + self.distribution.log_jacobian(position)

    def log_ratio(self, position: Position) -> Scalar:
        """Return the log of target over start, and `NOTHING` where the target is 0."""
        return jnp.maximum(_no_nan(self.log_target(position) - self.log_start(position)), NOTHING)

    def log_between(self, position: Position, beta: Scalar | float) -> Scalar:
        """Return the geometric path: ``(1 - beta)`` times the start's log density plus ``beta`` times the target's."""
        return self.log_start(position) + beta * self.log_ratio(position)

    def known_between(self, beta: Scalar | float) -> Known | None:
        """Return what is known of `log_between`, for a ready-made energy and a start of independent elements."""
        known = self.distribution.known
        if known is None or not (self.distribution.is_discrete and self.distribution.lists_values):
            return None  # other integers may start from a distribution that is not uniform
        known = known.of_row(self.local)
        if self.start is None:
            return known.tempered(beta)
        offsets = logits_of_elements(self.start, self.distribution.discrete_values)
        if offsets is None:
            return None
        return dataclasses.replace(
            known.tempered(beta), offsets=jnp.where(offsets == -jnp.inf, -jnp.inf, (1 - beta) * offsets)
        )


def logits_of_elements(
    start: dist.Distribution, values: Shaped[np.ndarray, "values ..."]
) -> Float[Array, "elements values"] | None:
    """Return the log probabilities of the values of each element of independent elements; None for other distributions."""
    inner = start.base_dist if isinstance(start, dist.Independent) else start
    if values.ndim > 1 or inner.event_shape or inner.batch_shape != start.event_shape:
        return None
    each = jnp.asarray(values).reshape(-1, *(1,) * len(inner.batch_shape))
    return jnp.moveaxis(inner.log_prob(each), 0, -1).reshape(-1, len(values))


class AbstractPartition(abc.ABC):
    """A method for log Z: settings in a frozen dataclass, registered as a pytree; one row at a time, under jit and vmap.

    Attributes:
        name: name of the method in `log_partition`.
        bound: see `LogPartition`.
        needs_key: whether it is random.
        unfinished: advice if the method did not finish.
        unreliable: advice if few effective draws are behind the result.
        fits_start: whether its start is fitted to the target if none is given.
        takes_mixed: whether events may have discrete members beside continuous ones.
    """

    name: ClassVar[str]
    bound: ClassVar[Bound | None] = None
    needs_key: ClassVar[bool] = True
    unfinished: ClassVar[str] = ""
    unreliable: ClassVar[str] = ""
    fits_start: ClassVar[bool] = False
    takes_mixed: ClassVar[bool] = False

    @abc.abstractmethod
    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Estimate log Z of one row.

        Args:
            rng_key: random key (None for exact methods).
            densities: the row's target and start.
            starts: ``(num_starts, ...)`` positions drawn from ``densities.start``; None for none.
            draws: ``(num_draws, ...)`` positions drawn from the target (or the data given); None for none.
        """

    @property
    def start_distribution(self) -> Any:
        """NumPyro distribution of the starts; None for the reference."""
        return getattr(self, "start", None)

    @property
    def num_starts(self) -> int:
        """Number of draws of the start that the method takes."""
        return 0

    @property
    def num_draws(self) -> int:
        """Number of draws of the target that the method takes if no data are given."""
        return 0

    @property
    def event_dtype(self) -> Any:
        """Floating-point numbers for a discrete kernel that takes gradients; None for the dtype of the events."""
        return float if getattr(getattr(self, "kernel", None), "relaxes", False) else None

    @property
    def placement(self) -> Placement | None:
        """Devices that share the chains or draws; None for one device."""
        return Placement.of(getattr(self, "sharding", None))

    def on_each_part(self, function: Callable, *chains: PyTree) -> PyTree:
        """Return ``function(*chains)``, whose arguments and result lead with the chains.

        With several devices each one computes the result for its own chains, and then gets those of all. All else is
        computed by every device.
        """
        if self.placement is None:
            return function(*chains)
        # Without this constraint XLA would also split what the chains come from, at a message for each operation.
        return self.placement.on_each_part(function, *self.placement.gathered(chains), gathers=True)

    @property
    def data(self) -> Any:
        """Events in place of draws of the target, ``(num, *batch_shape, *event_shape)``; None for none."""
        return None

    def check(self, distribution: EventDistribution) -> None:
        """Check that the method can handle the distribution, and raise otherwise.

        Raises:
            EnergyError: with what to write.
        """
        owner = type(self).__name__
        if distribution.members is not None and not self.takes_mixed:
            raise EnergyError(
                f"The members {distribution.members.discrete} of the event {distribution.support} are discrete, and the "
                f"method '{self.name}' does not take members with values of different kinds. Write method='ais', "
                "method='importance' with proposal=a distribution of one event, or method='enumerate' if all members are "
                "discrete."
            )
        if self.start_distribution is not None:
            check_start(owner, self.start_distribution, distribution)
        if self.fits_start and self.data is not None:
            if self.start_distribution is not None or distribution.base is not None or not distribution.is_continuous:
                raise EnergyError(
                    f"{owner} fits a start to data only if it has none; here it has start=, the energy's base or the "
                    "uniform distribution of a discrete support. Leave out data=."
                )
            check_rows(owner, self.data, distribution, 2)


def check_start(owner: str, start: object, distribution: EventDistribution) -> None:
    """Check that a start is a distribution of a single event on the energy's support, and raise otherwise.

    Raises:
        EnergyError: with its shape or support.
        TypeError: if it is not a distribution.
    """
    if not isinstance(start, dist.Distribution):
        raise TypeError(f"{owner} needs a numpyro distribution to start from; got {type(start).__name__}.")
    if start.batch_shape or start.event_shape != distribution.event_shape:
        raise EnergyError(
            f"{owner} needs the distribution of one event of shape {distribution.event_shape}; got batch shape "
            f"{start.batch_shape} and event shape {start.event_shape}. Write numpyro.distributions.Normal(0, 2)"
            f".expand({list(distribution.event_shape)}).to_event({len(distribution.event_shape)})."
        )
    check_same_support("start", start, distribution.support)


def from_log_weights(log_weights: Float[Array, " samples"]) -> Estimate:
    """Estimate log Z as the log of the mean weight: standard error by the delta method, Kish's effective sample size."""
    num = len(log_weights)
    largest = jnp.max(log_weights)
    weights = jnp.exp(log_weights - jnp.where(jnp.isfinite(largest), largest, 0.0))
    total = jnp.sum(weights)
    ess = total**2 / jnp.sum(weights**2)
    relative_variance = jnp.maximum(num / ess - 1, 0.0) / max(num - 1, 1)
    value = jnp.where(largest < BARELY, -jnp.inf, jnp.log(total / num) + largest)
    return Estimate(value, jnp.sqrt(relative_variance), ess, tail=tail_of(log_weights))


def tail_of(log_weights: Float[Array, " samples"]) -> Scalar:
    """Return the Pareto shape of the largest weights (Vehtari et al. 2024); 0 if they are too few or nearly all equal."""
    if len(log_weights) < FEWEST_FOR_TAIL:
        return jnp.zeros((), log_weights.dtype)
    weights, shape = psis_weights(log_weights)
    is_even = jnp.exp(-jax.nn.logsumexp(2 * weights)) > EVEN * len(log_weights)
    return jnp.where(is_even, 0.0, jnp.nan_to_num(shape))


def in_shape(found: Estimate, shape: tuple[int, ...]) -> Estimate:
    """Return value, standard error and effective sample size in a shape."""
    value, standard_error, ess = (jnp.asarray(leaf).reshape(shape) for leaf in found[:3])
    return Estimate(value, standard_error, ess)


def shaped(found: Estimate, bound: Bound | None) -> LogPartition:
    """Return the result for the user, with rounding added to the standard error."""
    return LogPartition(found.value, found.standard_error + rounding(found.value), found.ess, bound)


def rounding(value: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Return the rounding error of a sum of terms of this size."""
    return 16 * jnp.finfo(value.dtype).eps * jnp.maximum(jnp.abs(value), 1.0)


def _no_nan(value: Scalar) -> Scalar:
    return jnp.where(jnp.isnan(value), -jnp.inf, value)
