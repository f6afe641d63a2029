"""`log_likelihood`: held-out rows under an energy with an estimated log Z, in nats and bits, with standard errors."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Bool, Float, Shaped

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.inputs import as_arrays, check_outside_jit
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.distributions.score import NO_DENSITY
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.evaluation.sm import SMLoss
from numpyro_ebm.handlers.sites import data_site
from numpyro_ebm.partition import LogPartition, LogPartitionBounds
from numpyro_ebm.partition.bounds import LEVEL, RELIABLE_GAP, widened

FEW_SAMPLES = 10.0
"""Effective samples below which log Z is unreliable: its standard error, about 1 / sqrt(ESS), is 0.3 nats there."""
OTHER_SIDE: dict[Any, Any] = {"lower": "upper", "upper": "lower", None: None}
NEEDED = (
    "log_likelihood needs log Z with its error, as numpyro_ebm.log_partition or log_partition_bounds returns it. There is "
    "no default: without log Z an energy has no likelihood. Write log_likelihood(model, params, x_test, "
    "log_partition=numpyro_ebm.log_partition(rng_key, model, method='ais', params=params)); for a known log Z, "
    "log_partition=numpyro_ebm.LogPartition(value, 0.0, math.inf, None)"
)
Numbers: TypeAlias = Float[np.ndarray, "..."] | np.floating
"""An array of NumPy, or the number that arithmetic makes of one of shape ``()``."""


class ApartBounds(EnergyError):
    """Raised for bounds on log Z that are too far apart for a likelihood.

    Attributes:
        finding: the distance of the bounds in words, for notes; the message adds what to write.
    """

    def __init__(self, finding: str, advice: str):
        super().__init__(finding, advice)
        self.finding = finding

    def __str__(self) -> str:
        """Return the finding and the advice."""
        return " ".join(self.args)


class Difference(NamedTuple):
    """Mean difference between two models' figures of the same rows.

    Attributes:
        mean: mean over rows of the first model's figure minus the second's.
        standard_error: of the mean, from the spread of the differences over rows and the errors of log Z.
    """

    mean: float
    standard_error: float

    def __str__(self) -> str:
        """Return the mean with its sign, and its error."""
        return f"{self.mean:+.3g} +- {self.standard_error:.2g}"


def paired_difference(first: "LogLikelihood | SMLoss", second: "LogLikelihood | SMLoss") -> Difference:
    """Return the mean of ``first.rows - second.rows`` over the rows that both have, with its standard error.

    Errors of log Z count as independent of each other and of the rows.

    Raises:
        EnergyError: for different numbers of rows.
    """
    if np.shape(first.rows) != np.shape(second.rows):
        raise EnergyError(
            f"A paired difference needs the same rows for both; got rows of shape {np.shape(first.rows)} and "
            f"{np.shape(second.rows)}. Compute both on the same held-out rows."
        )
    rows = np.asarray(first.rows, float) - np.asarray(second.rows, float)
    rows = rows[~np.isnan(rows)]
    errors = [each.log_partition_error for each in (first, second) if isinstance(each, LogLikelihood)]
    sampling = rows.std(ddof=1) / math.sqrt(rows.size) if rows.size > 1 else math.nan
    return Difference(float(rows.mean()) if rows.size else math.nan, math.hypot(sampling, *errors))


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """Log likelihood of held-out rows.

    Attributes:
        rows: log likelihood in nats, one value per row in the rows' shape; NaN for masked rows.
        mean: nats per row, over the rows that take part.
        standard_error: of the mean, from the sampling of rows and the error of log Z. NaN for a single row.
        log_partition_error: the part of the standard error that comes from log Z.
        bits_per_dim: ``-mean / (d log 2)`` with ``d`` the number of elements of an event.
        bits_per_dim_error: standard error of ``bits_per_dim``.
        interval: confidence interval of level 0.95 for the mean of these rows, where log Z has bounds on both sides. It
            covers the gap and the Monte Carlo error of both bounds, but not the sampling of rows. None without bounds.
        bound: "upper" where the values are upper bounds in expectation (log Z from a lower bound), "lower" the other way
            round, None for neither.
        ess: effective number of samples of log Z.
        num_rows: number of rows that take part.
    """

    rows: Float[Array, "*batch"]
    mean: float
    standard_error: float
    log_partition_error: float
    bits_per_dim: float
    bits_per_dim_error: float
    interval: tuple[float, float] | None
    bound: Literal["lower", "upper"] | None
    ess: float
    num_rows: int

    @property
    def is_reliable(self) -> bool:
        """Whether log Z has at least 10 effective samples."""
        return self.ess >= FEW_SAMPLES

    def difference(self, other: "LogLikelihood") -> Difference:
        """Return this model's mean minus the other's on the same rows, in nats per row, with its standard error.

        Variation between rows that both models share cancels, so the error is often far below that of either mean.

        Args:
            other: `log_likelihood` of the same rows, in the same order, under another model.

        Returns:
            The mean and its standard error; positive where this model is better.

        Raises:
            EnergyError: for a different number of rows.

        Example:
            ``print(by_pcd.difference(by_mixture))`` prints ``+0.45 +- 0.17``.
        """
        return paired_difference(self, other)

    def __str__(self) -> str:
        """Return one line of text."""
        line = (
            f"log likelihood {self.mean:.4f} +- {self.standard_error:.2g} nats per row ({self.num_rows} rows), "
            f"{self.bits_per_dim:.4f} +- {self.bits_per_dim_error:.2g} bits per dimension"
        )
        return "; ".join([line, *self.remarks()])

    def remarks(self) -> tuple[str, ...]:
        """Return remarks on the figures."""
        said = []
        if self.interval is not None:
            ends = "between {:.4f} and {:.4f}".format(*self.interval)
            said.append(f"the mean of these rows lies {ends} at level {LEVEL:g}, by bounds on log Z from both sides")
        if self.bound is not None:
            side = {
                "upper": "at most this, since log Z is a lower bound",
                "lower": "at least this, since log Z is an upper bound",
            }
            said.append(f"in expectation the true value is {side[self.bound]}")
        if not self.is_reliable:
            said.append(f"log Z has only {self.ess:.1f} effective samples: neither its value nor its error is reliable")
        return tuple(said)


@dataclasses.dataclass(frozen=True)
class _LogZ:
    """Log Z as the rows need it: a value of shape ``()`` or of the rows' shape, and the two bounds around it, or None."""

    value: Numbers
    standard_error: Numbers
    ess: float
    bound: Literal["lower", "upper"] | None
    ends: "tuple[_LogZ, _LogZ] | None" = None


def log_likelihood(
    dist_or_model: Callable[..., Any] | dist.Distribution,
    params: PyTree | None,
    *args: Any,
    log_partition: LogPartition | LogPartitionBounds,
    site: str | None = None,
    **kwargs: Any,
) -> LogLikelihood:
    r"""Compute the log likelihood of held-out rows, :math:`\log \tilde p(x) - \log Z`, in nats and bits per dimension.

    ``log p~`` is the unnormalised log density of the event as given (``log base - E``, without a Jacobian), and log Z is
    that of the same measure, as `log_partition` estimates it. Rows that share one density share the error of log Z, and then

    .. math:: \mathrm{se}^2 = \operatorname{var}(\log \tilde p) / n + \mathrm{se}(\log Z)^2

    Where each row has its own log Z (a context), the errors count as independent of each other and are part of the variance
    between rows. With bounds on both sides, log Z is their midpoint, half the gap is a further error, and ``interval``
    contains the mean of these rows under the true log Z with probability 0.95 or more. Importance sampling and AIS give
    lower bounds on log Z in expectation, so the likelihood is an upper bound.

    A density depends on the units of the data. Scaling the rows by ``c`` changes the mean by ``-d log c``: for images with
    256 levels divided by 256, bits per dimension in units of the levels are ``bits_per_dim + 8``. Whole-number data have
    unbounded densities: for a finite value, add uniform noise of one level's width to the rows (dequantisation), in training
    and here. The mean is then a lower bound on the log probability of the levels.

    Args:
        dist_or_model: an `EnergyDistribution`, or a NumPyro model with one observed energy site (or see ``site``).
            Subsampling plates use all rows here.
        params: None for a distribution; for a model the values of its parameters and latent sites, or the result of `fit`
            or ``svi.run``.
        *args: the rows of a distribution; for a model its arguments, with held-out rows in the place of the training rows.
        log_partition: the result of `log_partition` or `log_partition_bounds`: a value, standard_error, ess and bound of
            shape ``()``, or of the rows' (or the distribution's batch) shape where each row has its own; or ``lower`` and
            ``upper``, two such results.
        site: name of the energy site, for a model with several; a joint event of factors has a joined name.
        **kwargs: keyword arguments of the model.

    Returns:
        `LogLikelihood`; ``str`` gives one line.

    Raises:
        EnergyError: (a ValueError) for bounds that are more than 1 nat apart, which allow no likelihood; for log Z that is
            not finite or has the wrong shape, or a single log Z where each row needs its own; for rows that are NaN, outside
            the support or on its boundary, and rows whose energy is NaN, with the row's number; for a `ScoreDistribution`;
            for parameters or latent sites without a value.
        TypeError: for a log Z without an error, or something that is neither a distribution nor a model.

    Example:
        >>> normal = EnergyDistribution(lambda x: x**2 / 2)
        >>> log_z = log_partition(None, normal, method="grid")
        >>> round(log_likelihood(normal, None, jnp.array([-1.0, 1.0]), log_partition=log_z).mean, 4)
        -1.4189

    References:
        Theis, van den Oord and Bethge, A note on the evaluation of generative models (2016); Grosse, Ghahramani and Adams,
        Sandwiching the marginal likelihood using bidirectional Monte Carlo (2015); Burda, Grosse and Salakhutdinov, Accurate
        and conservative estimates of MRF log-likelihood using reverse annealing (2015).
    """
    args, kwargs = as_arrays("log_likelihood", (args, kwargs))
    check_outside_jit("log_likelihood", params, args, kwargs)
    return likelihood_of(data_site("log_likelihood", dist_or_model, params, args, kwargs, site), log_partition)


def likelihood_of(site: Site, log_partition: LogPartition | LogPartitionBounds) -> LogLikelihood:
    """Compute `log_likelihood` for rows that are laid out already."""
    log_z = _read(log_partition)
    with at_site(site.name):
        if not site.distribution.has_energy:
            raise EnergyError(NO_DENSITY)
        _check_shape(log_z, site)
        values = _densities(site)
        keep = np.ones(site.num_rows, bool) if site.mask is None else np.asarray(site.mask)
        _check_densities(values, keep)
        if not keep.any():
            raise EnergyError("No row takes part: all of them are masked.")
        if not np.all(np.isfinite(_per_row(log_z.value, site)[keep])):
            raise EnergyError(f"log Z is not finite ({log_z.value}), so there is no likelihood.")
    values = np.where(keep, values - _per_row(log_z.value, site), np.nan)
    return _summary(site, values, keep, log_z)


def _densities(site: Site) -> Float[np.ndarray, " {site.num_rows}"]:
    """Return the unnormalised log density of each row."""
    return np.asarray(_log_densities(site.distribution.closed(site.value.dtype, order=0), site.value, site.local), float)


@programs.jit
def _log_densities(distribution, value, local):
    return Site("", distribution, value.shape[:1], value, local, None).over_rows(distribution.log_density)


def _summary(
    site: Site,
    values: Float[np.ndarray, " {site.num_rows}"],
    keep: Bool[np.ndarray, " {site.num_rows}"],
    log_z: _LogZ,
) -> LogLikelihood:
    kept = values[keep]
    num, mean = kept.size, float(kept.mean())
    sampling = math.inf if np.isinf(mean) else float(kept.std(ddof=1)) / math.sqrt(num) if num > 1 else math.nan
    error = _common_error(log_z, site, keep)
    interval, systematic = None, 0.0
    if log_z.ends is not None:
        half_gap = (log_z.ends[1].value - log_z.ends[0].value) / 2
        systematic = float(np.abs(_per_row(half_gap, site)[keep]).mean())
        low, high = widened(*(_mean_over_rows(end, site, keep) for end in log_z.ends))
        raw = mean + float(_per_row(log_z.value, site)[keep].mean())
        interval = (raw - float(high), raw - float(low))
    error = math.hypot(error, systematic)
    total, unit = math.hypot(sampling, error), max(math.prod(site.distribution.event_shape), 1) * math.log(2)
    return LogLikelihood(
        rows=jnp.asarray(values.reshape(site.batch_shape)),
        mean=mean,
        standard_error=total,
        log_partition_error=error,
        bits_per_dim=-mean / unit,
        bits_per_dim_error=total / unit,
        interval=interval,
        bound=OTHER_SIDE[log_z.bound],
        ess=log_z.ess,
        num_rows=num,
    )


def _common_error(log_z: _LogZ, site: Site, keep: Bool[np.ndarray, " {site.num_rows}"]) -> float:
    """Return the error of the mean that comes from log Z, beyond its part in the variance between rows."""
    if log_z.value.shape == site.batch_shape and site.batch_shape:
        return 0.0
    return _mean_over_rows(log_z, site, keep)[1]


def _mean_over_rows(log_z: _LogZ, site: Site, keep: Bool[np.ndarray, " {site.num_rows}"]) -> tuple[float, float, float]:
    """Return the mean of log Z over the rows that take part, its standard error and its effective number of draws."""
    owners = _per_row(np.arange(log_z.value.size).reshape(log_z.value.shape), site)[keep]
    shares = np.bincount(owners, minlength=log_z.value.size) / owners.size
    errors = np.broadcast_to(log_z.standard_error, log_z.value.shape).ravel()
    return float(shares @ log_z.value.ravel()), float(np.linalg.norm(shares * errors)), log_z.ess


def _read(log_partition: Any) -> _LogZ:
    """Read log Z from one estimate, or from bounds on both sides."""
    if all(hasattr(getattr(log_partition, end, None), "value") for end in ("lower", "upper")):
        return _between(_one(log_partition.lower), _one(log_partition.upper))
    return _one(log_partition)


def _one(log_partition: LogPartition) -> _LogZ:
    missing = [n for n in ("value", "standard_error", "ess", "bound") if not hasattr(log_partition, n)]
    if missing:
        raise TypeError(f"{NEEDED}; got {type(log_partition).__name__}, which has no {missing}.")
    value, error = np.asarray(log_partition.value, float), np.asarray(log_partition.standard_error, float)
    if log_partition.bound not in OTHER_SIDE:
        raise EnergyError(f"The bound of log Z must be 'lower', 'upper' or None; got {log_partition.bound!r}.")
    return _LogZ(value, error, float(np.min(np.asarray(log_partition.ess, float))), log_partition.bound)


def _between(lower: _LogZ, upper: _LogZ) -> _LogZ:
    gap = upper.value - lower.value
    worst = float(gap.ravel()[np.argmax(np.abs(gap))])
    if abs(worst) > RELIABLE_GAP:
        where = f" in row {int(np.argmax(np.abs(gap)))}" if gap.ndim else ""
        raise ApartBounds(
            f"The bounds on log Z are {worst:.2f} nats apart{where}, and above {RELIABLE_GAP:g} nat the likelihood is too "
            "uncertain to report.",
            "Write a larger num_levels, num_steps or num_chains in log_partition_bounds, or give the EnergyDistribution a "
            "base nearer to the data; or compare models by numpyro_ebm.evaluate(..., measures=('sm', 'ksd', 'mmd')), which "
            "needs no log Z.",
        )
    error = np.hypot(lower.standard_error, upper.standard_error) / 2
    return _LogZ((lower.value + upper.value) / 2, error, min(lower.ess, upper.ess), None, (lower, upper))


def _per_row(values: Shaped[np.ndarray, "..."] | np.generic, site: Site) -> Shaped[np.ndarray, " {site.num_rows}"]:
    return np.broadcast_to(values, site.batch_shape).reshape(-1)


def _check_shape(log_z: _LogZ, site: Site) -> None:
    if log_z.value.ndim == 0:
        if site.rows_differ:
            raise EnergyError(
                "Each row has a context or a base of its own, and so a log Z of its own; log_partition holds a single one. "
                f"It needs values of the rows' shape {site.batch_shape}: estimate log Z of the distribution with the "
                "contexts of these rows."
            )
    elif log_z.value.shape not in (site.batch_shape, site.distribution.batch_shape):
        raise EnergyError(
            f"log_partition holds values of shape {log_z.value.shape}, the rows have shape {site.batch_shape}. It needs one "
            "value, or one per row where each row has a context: estimate log Z with the contexts of these rows."
        )


def _check_densities(values: Float[np.ndarray, " rows"], keep: Bool[np.ndarray, " rows"]) -> None:
    for bad, what in ((np.isnan(values), "NaN"), (np.isposinf(values), "infinite")):
        rows = np.flatnonzero(bad & keep)
        if rows.size:
            raise EnergyError(
                f"The log density of row {rows[0]} is {what} ({rows.size} such rows). Look at the energy there."
            )
