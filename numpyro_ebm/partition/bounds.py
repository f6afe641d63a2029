"""Bounds on log Z from both sides, by annealing from both ends of the path."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.special import stdtrit

from numpyro_ebm._core import programs
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition import _problem
from numpyro_ebm.partition._annealing import reverse
from numpyro_ebm.partition._base import Densities, LogPartition, from_log_weights, in_shape, shaped
from numpyro_ebm.partition._checks import check_finite
from numpyro_ebm.partition._start import fits_start, start_around
from numpyro_ebm.partition.ais import AnnealedImportanceSampling
from numpyro_ebm.partition.names import METHODS

RELIABLE_GAP = 1.0
"""In nats: above it the likelihood is too uncertain to report."""
LEVEL = 0.95
"""Level of the confidence interval: the usual 95 %."""


class LogPartitionBounds(NamedTuple):
    """Log Z between a stochastic lower and a stochastic upper bound, in nats.

    Attributes:
        lower: from chains that go from the start to the target.
        upper: from chains that go from draws of the target to the start.
        betas: ``(num_levels + 1,)``, with the batch shape in front if each row has its own density.
        forward: of the shape of ``betas``: log Z of each level's density by the forward chains, from 0 at the start.
        reverse: the same by the backward chains; its last value is that of ``upper``.
    """

    lower: LogPartition
    upper: LogPartition
    betas: Float[Array, "*batch levels"]
    forward: Float[Array, "*batch levels"]
    reverse: Float[Array, "*batch levels"]

    @property
    def gap(self) -> Float[Array, "*batch"]:
        """``upper`` minus ``lower``, in nats."""
        return self.upper.value - self.lower.value

    @property
    def interval(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Confidence interval of log Z at level 0.95: the ends, moved outward by their errors (`widened`)."""
        lower, upper = ((end.value, end.standard_error, end.ess) for end in (self.lower, self.upper))
        low, high = widened(lower, upper)
        return jnp.asarray(low), jnp.asarray(high)

    @property
    def is_reliable(self) -> bool:
        """Whether the bounds are within 1 nat of each other, everywhere; if not, do not report a likelihood.

        An upper bound far below the lower one is no better: the chains of one side did not see the target.
        """
        return bool(jnp.all(jnp.abs(self.gap) <= RELIABLE_GAP))

    def __str__(self) -> str:
        """Return both ends, and a warning if the gap is too large."""
        if jnp.ndim(self.gap):
            text = f"log Z of {self.gap.size} densities, gaps from {self.gap.min():.3f} to {self.gap.max():.3f} nats"
        else:
            ends = (f"{end.value:.3f} +- {end.standard_error:.3f}" for end in (self.lower, self.upper))
            text = "log Z {} from below, {} from above, gap {:.3f} nats".format(*ends, self.gap)
            text += " ({:.0%} interval from {:.3f} to {:.3f})".format(LEVEL, *map(float, self.interval))
        return text if self.is_reliable else f"{text}: more than {RELIABLE_GAP:g} nat, do not report a likelihood"


def widened(lower: tuple[Any, Any, Any], upper: tuple[Any, Any, Any]) -> tuple[Any, Any]:
    """Move both ends outward, so that log Z is beyond either with probability 0.025 at most.

    The lower end is below log Z in the mean and the upper one above, so each end only has to allow for its own error: the
    number of standard errors that Student's t gives for the effective number of draws. If errors put the ends in the wrong
    order, the interval covers the errors of both.

    Args:
        lower: value, standard error and effective number of draws.
        upper: the same.
    """
    ends = []
    for value, error, ess in (lower, upper):
        degrees = np.maximum(np.asarray(ess, float) - 1, 1)
        reach = stdtrit(degrees, (1 + LEVEL) / 2) * np.asarray(error, float)
        ends.append((np.asarray(value, float) - reach, np.asarray(value, float) + reach))
    return np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])


def log_partition_bounds(
    rng_key: PRNGKey,
    dist_or_model: Callable | EventDistribution,
    *,
    params: PyTree | None = None,
    draws: ArrayLike | None = None,
    site: str | None = None,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LogPartitionBounds:
    r"""Bound log Z from both sides, by bidirectional Monte Carlo.

    Annealed importance sampling from the start to the target bounds log Z from below (see `AnnealedImportanceSampling`). The
    same path, followed back from draws of the target to the start, gives weights whose mean is ``1 / Z``. Then

    .. math:: E\Big[-\log \frac 1n \sum_i w_i\Big] \ge \log Z

    bounds log Z from above, provided that the draws are the target's. The two bounds share only the path: if they meet, both
    are right; if they do not, more levels bring them together. Each end has a Monte Carlo error, which may put it on the
    wrong side of log Z; ``interval`` allows for it. The gap does not show a mode that both the forward run and the draws
    have missed: the draws are the model's as far as its sampler found it.

    Args:
        rng_key: random key.
        dist_or_model: an `EnergyDistribution`, or a NumPyro model with one energy (or ``site`` names it).
        params: values of the model's parameters, or the result of `fit`.
        draws: draws of the target, ``(num, *batch_shape, *event_shape)``, one per backward chain, exact ones if possible;
            None for ``num_chains`` draws of the distribution's own ``sampler``.
        site: name of the model's energy site.
        model_args: the model's arguments.
        model_kwargs: the model's keyword arguments.
        **options: those of `AnnealedImportanceSampling`.

    Raises:
        EnergyError: (a ValueError) as `log_partition`; for draws of another shape or number.
        TypeError: for unknown options.

    Example:
        ``bounds = log_partition_bounds(rng_key, model, params=result.params, num_levels=2000); print(bounds)``

    References:
        Grosse, Ghahramani and Adams, Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015); Burda,
        Grosse and Salakhutdinov, Accurate and conservative estimates of MRF log-likelihood using reverse annealing (2015).
    """
    method: Any = METHODS.resolve(AnnealedImportanceSampling.name, **options)
    owner = "log_partition_bounds"
    check_key(owner, rng_key)
    distribution = _problem.find(owner, dist_or_model, params, site, model_args, model_kwargs)
    method.check(distribution)
    ends = None if draws is None else _problem.data_positions(owner, distribution, draws)
    data = None if method.data is None else _problem.data_positions(owner, distribution, method.data)
    key_starts, key_ends, key_rows = jax.random.split(rng_key, 3)
    if ends is None:
        ends = _problem.target_positions(key_ends, distribution, method.num_chains)
    betas, forward, backward = _both_ways(key_starts, key_rows, method, distribution.closed(method.event_dtype), ends, data)
    check_finite(owner, *(each[0] for each in (forward, backward)))
    shape = _problem.shape_of(distribution)
    lower, upper = (in_shape(each[0], shape) for each in (forward, backward))
    by_level = (leaf.reshape(*shape, -1) for leaf in (betas, forward[1], backward[1]))
    return LogPartitionBounds(shaped(lower, "lower"), shaped(upper, "upper"), *by_level)


@programs.jit
def _both_ways(key_starts, key_rows, method, distribution, ends, data):
    starts = _problem.start_positions(key_starts, distribution, method.start, method.num_starts)

    def one(key, local, starts, ends, data):
        densities = Densities(distribution, local, method.start)
        if fits_start(method, distribution):
            key, key_fit = jax.random.split(key)
            densities, starts, _ = start_around(key_fit, method, densities, starts, data)
        key_pilot, key_forward, key_back = jax.random.split(key, 3)
        levels = method.levels(key_pilot, densities, starts)
        up = method.anneal(key_forward, densities, starts[: method.num_chains], levels)
        down = method.anneal(key_back, densities, ends, reverse(levels))
        upper = from_log_weights(down.log_weights)
        # The backward path is the log of Z_beta over Z_1; its value at beta 0 is minus log Z.
        path = down.path[::-1] - down.path[-1]
        return levels.betas, (from_log_weights(up.log_weights), up.path), (upper._replace(value=-upper.value), path)

    keys = jax.random.split(key_rows, len(starts))
    return jax.vmap(one)(keys, _problem.local_of(distribution), starts, ends, data)
