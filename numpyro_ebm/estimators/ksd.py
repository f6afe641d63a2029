"""Kernel Stein discrepancy."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.figures import mean_over_rows
from numpyro_ebm.estimators.parts.moves import check_scale

Kernel = Literal["imq", "rbf"]
Statistic = Literal["u", "v"]
BETA = -0.5
"""Default exponent of "imq", the middle of the range (-1, 0); the kernel is then one reciprocal square root."""
PAIRS_AT_ONCE = 2**22
"""Kernel values held in memory at once: 16 MiB per array in float32, at the price of a loop over more rows."""
ROWS_OF_MEDIAN = 256
"""Rows in the median distance: more give a steadier bandwidth, at a cost that grows with their square."""


class Radial(NamedTuple):
    """Kernel as a function of the squared distance, with its first two derivatives."""

    value: Float[Array, " rows"]
    first: Float[Array, " rows"]
    second: Float[Array, " rows"]


@dataclasses.dataclass(frozen=True)
class KernelSteinDiscrepancy(AbstractEstimator):
    r"""Kernel Stein discrepancy between model and data, without log Z and without second derivatives.

    Under the model, ``E[s . f + div f]`` is 0 for every function ``f`` of the kernel's space (``s = grad log p``,
    unconstrained space, Jacobian included). Under the data, its largest square over the unit ball of that space is the mean
    over pairs of rows of

    .. math:: u(x, x') = s^T s' k + s^T \nabla_{x'} k + s'^T \nabla_x k + \operatorname{tr} \nabla_x \nabla_{x'} k

    The surrogate of row ``i`` is minus the mean of ``u(x_i, x_j)`` over the other rows that take part, so that the sum over
    ``n`` rows is ``-n`` times the squared discrepancy. It costs one score per row and ``n^2`` values of the kernel, computed
    by matrix products a few million at a time. It uses no randomness, so NUTS may target it (a generalised posterior, which
    needs a ``numpyro.handlers.scale`` of its own, since the discrepancy does not have the units of a log likelihood).

    The discrepancy is quadratic in the score, and a row far from all others contributes little to it, so that the estimate
    is robust where "sm" is not. With statistic "v" it is never negative and cannot diverge as "sm" can. Like "sm" it hardly
    depends on the weights of modes that lie apart. With ``r = |x_i - x_j|^2 / l^2`` and ``k = phi(r)``, the Gaussian of mean
    0 that minimises it has the precision

    .. math:: t = -\sum_{i, j} r\, \phi'(r) \Big/ \sum_{i, j} x_i^T x_j\, \phi(r)

    The efficiency of this estimate in one dimension, with "imq" and 1000 rows, is 0.50, 0.71 and 0.55 at bandwidths of 0.1,
    0.95 (the median distance) and 5 standard deviations of the data (benchmarks/efficiency.py). Narrow kernels compare only
    neighbours; wide ones suffer from the square of the rows' mean, less so with more rows. In many dimensions all pairs are
    about equally far apart, and kernels distinguish less.

    Args:
        kernel: "imq", ``(1 + |x - x'|^2 / l^2)^beta``, for which a small discrepancy implies convergence (Gorham and
            Mackey), or "rbf", ``exp(-|x - x'|^2 / (2 l^2))``, for which it need not in three or more dimensions.
        bandwidth: ``l``, in data units (in unconstrained units where the support is not the real line): one number, or one
            for each dimension of unconstrained space. In the latter case distances are those of ``x / l``, and the score is
            ``l s``. The value is that of ``x / l`` over the square of the bandwidths' geometric mean, which for one number
            is the formula above. None for the batch's standard deviation of each dimension times the median distance of its
            rows in these units (1 where that is 0; from 256 evenly spaced rows where there are more), so that the estimate
            does not depend on the units of a column.
        beta: exponent of "imq", between -1 and 0; None for -0.5.
        row_weight: a positive function ``m`` of one event in unconstrained space, for the kernel ``m(x) k(x, x') m(x')``:
            one that falls towards 0 far from the bulk of the data bounds the influence of a row, wherever it lies (Matsubara
            et al. take ``(1 + x^2)^(-1/2)``). The discrepancy is then that of the score ``s + grad log m``, times
            ``m(x) m(x')``. None for 1.
        statistic: "u", over pairs of different rows: unbiased, so that minibatches descend the discrepancy of all data; or
            "v", over all pairs, including each row with itself: never negative.

    Raises:
        EnergyError: for unknown names, a bandwidth that is not positive or does not fit the event, a beta outside (-1, 0) or
            combined with "rbf", a weight that is not positive at a row, rows with a context or a base of their own, and a
            single row under "u".

    Example:
        ``estimate(model, "ksd", bandwidth=1.0)``

    References:
        Liu, Lee and Jordan, A kernelized Stein discrepancy for goodness-of-fit tests (2016); Chwialkowski, Strathmann and
        Gretton, A kernel test of goodness of fit (2016); Gorham and Mackey, Measuring sample quality with kernels (2017);
        Barp, Briol, Duncan, Girolami and Mackey, Minimum Stein discrepancy estimators (2019); Matsubara, Knoblauch, Briol
        and Oates, Robust generalised Bayesian inference for intractable likelihoods (2022).
    """

    name = "ksd"
    role = "objective"
    is_deterministic = True
    couples_rows = True
    needs_energy = False
    kernel: Kernel = "imq"
    bandwidth: Any = None
    beta: float | None = None
    statistic: Statistic = "u"
    row_weight: Callable[[Float[Array, "*position"]], Any] | None = None

    def __post_init__(self):
        for option, known in (("kernel", Kernel), ("statistic", Statistic)):
            value = getattr(self, option)
            if value not in get_args(known):
                raise EnergyError(f"Unknown {option} {value!r}. {nearest(str(value), get_args(known))}")
        check_positive(type(self).__name__, "bandwidth", self.bandwidth)
        if self.beta is not None and (self.kernel != "imq" or not -1 < self.beta < 0):
            raise EnergyError(
                f"beta is the exponent of the kernel 'imq', between -1 and 0; got beta={self.beta!r} and "
                f"kernel={self.kernel!r}. Write kernel='imq', beta=-0.5."
            )

    def check(self, site: Site) -> None:
        """Refuse rows with densities of their own, and a single row under "u"."""
        super().check(site)
        check_scale(site, "bandwidth", self.bandwidth)
        if site.rows_differ:
            self.refuse_local(site, "its pairs would compare the scores of rows that have different densities.")
        self._check_weight(site)
        num = site.num_rows
        if is_concrete(site.mask) and site.mask is not None:
            with eager(site.mask):
                num = int(jnp.sum(site.mask))
        if self.statistic == "u" and num == 1:
            raise EnergyError(
                "The estimator 'ksd' compares rows with each other, and this batch has 1 row that takes part. Write a plate "
                "with subsample_size=2 or more, or statistic='v', which compares a row with itself as well."
            )

    def _check_weight(self, site: Site) -> None:
        if self.row_weight is None or not is_concrete(site.value):
            return
        with eager(site.value):
            weights = jnp.asarray(jax.vmap(self.row_weight)(site.position))
            if weights.shape != (site.num_rows,) or not jnp.all(jnp.isfinite(weights) & (weights > 0)):
                raise EnergyError(
                    f"row_weight of 'ksd' needs a positive number for one event; got shape {weights.shape[1:]} and values "
                    f"down to {jnp.min(weights):.3g}. Write row_weight=lambda x: (1 + jnp.sum(x**2)) ** -0.5."
                )

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return the squared discrepancy of the rows, ``squared_ksd``."""
        return {"squared_ksd": -mean_over_rows(self.surrogate(rng_key, site, None)[0], site.mask)}

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the mean of the Stein kernel between each row and its partners."""
        mean = lambda values, partners: jnp.sum(values) / jnp.maximum(jnp.sum(partners), 1)  # noqa: E731
        return -self.over_partners(site, mean), state

    def over_partners(
        self, site: Site, reduce: Callable[[Float[Array, " rows"], Bool[Array, " rows"]], Float[Array, "*result"]]
    ) -> Float[Array, " {site.num_rows} *result"]:
        """Compute ``reduce(values, partners)`` for each row, a few million pairs at a time.

        Args:
            site: the rows.
            reduce: a linear function of a row's Stein kernel with all rows, ``(num_rows,)``, which is 0 for rows that are
                not its partners; ``partners``, ``(num_rows,)``, marks the partners, without the row itself under "u".

        Returns:
            The values of ``reduce``, with the rows on the leading axis.
        """
        num = site.num_rows
        takes_part = jnp.ones(num, bool) if site.mask is None else site.mask
        x = jax.lax.stop_gradient(site.position.reshape(num, -1))
        length = self._lengths(site, x, takes_part)
        # In units of the bandwidth, and centred, where squared distances lose the fewest digits.
        x = (x - jnp.mean(x, axis=0)) / length
        s = length * jax.vmap(site.score)(site.position, site.local).reshape(num, -1)
        weights = jnp.ones(num, x.dtype)
        if self.row_weight is not None:
            log_weight = lambda position: jnp.log(jnp.asarray(self.row_weight(position), x.dtype))  # noqa: E731 # pyright: ignore
            logs, slopes = jax.vmap(jax.value_and_grad(log_weight))(site.position)
            weights, s = jnp.exp(logs), s + length * slopes.reshape(num, -1)

        def row(inputs):
            own, i = inputs
            partners = takes_part if self.statistic == "v" else takes_part & (jnp.arange(num) != i)
            stein = weights[i] * weights * self._stein_kernel(x[i], own, x, s)
            return reduce(jnp.where(partners, stein, 0.0), partners)

        at_once = max(1, PAIRS_AT_ONCE // max(num, 1))
        rows = (s, jnp.arange(num))
        values = jax.vmap(row)(rows) if at_once >= num else jax.lax.map(jax.checkpoint(row), rows, batch_size=at_once)
        return values / jnp.exp(2 * jnp.mean(jnp.log(length)))

    def _stein_kernel(
        self, x: Float[Array, " d"], s: Float[Array, " d"], xs: Float[Array, "rows d"], ss: Float[Array, "rows d"]
    ) -> Float[Array, " rows"]:
        """Compute ``u`` between one row (position ``x``, score ``s``) and all rows, in units of the bandwidth."""
        squares = jnp.maximum(jnp.sum(x**2) + jnp.sum(xs**2, axis=1) - 2 * xs @ x, 0.0)
        k = self._radial(squares)
        across = ss @ x - jnp.sum(ss * xs, axis=1) - jnp.sum(s * x) + xs @ s  # (s' - s) . (x - x')
        return (ss @ s) * k.value + 2 * across * k.first - 2 * x.size * k.first - 4 * squares * k.second

    def _radial(self, squares: Float[Array, " rows"]) -> Radial:
        if self.kernel == "rbf":
            value = jnp.exp(-squares / 2)
            return Radial(value, -value / 2, value / 4)
        beta = BETA if self.beta is None else self.beta
        value = jax.lax.rsqrt(1 + squares) if self.beta is None else (1 + squares) ** beta
        first = beta * value / (1 + squares)
        return Radial(value, first, (beta - 1) * first / (1 + squares))

    def _lengths(
        self, site: Site, x: Float[Array, "{site.num_rows} d"], takes_part: Bool[Array, " {site.num_rows}"]
    ) -> Float[Array, " d"]:
        """Return the bandwidth of each dimension."""
        if self.bandwidth is not None:
            lengths = jnp.asarray(self.bandwidth, x.dtype)
            return jnp.broadcast_to(lengths, site.position.shape[1:]).reshape(-1)
        unit = or_one(site.spread).reshape(-1).astype(x.dtype)
        return unit * median_distance(x / unit, takes_part)


def median_distance(x: Float[Array, "rows d"], takes_part: Bool[Array, " rows"]) -> Scalar:
    """Return the median distance over pairs of different rows that take part; 1 where it is 0 or there is no pair.

    Args:
        x: ``(num_rows, d)``. Where more than 256 rows take part, 256 evenly spaced ones are used.
        takes_part: ``(num_rows,)``.
    """
    num, count = len(x), jnp.sum(takes_part)
    places = np.arange(num)
    if num > ROWS_OF_MEDIAN:
        order = jnp.argsort(~takes_part, stable=True)
        steps = jnp.arange(ROWS_OF_MEDIAN)
        places = order[jnp.where(count <= ROWS_OF_MEDIAN, steps, steps * count // ROWS_OF_MEDIAN)]
    chosen, is_in = x[places], takes_part[places]
    chosen = chosen - chosen[:1]  # exactly 0 for identical rows, which the rounding of the mean would set apart
    chosen = chosen - jnp.mean(chosen, axis=0)
    squares = jnp.sum(chosen**2, axis=1)
    distances = jnp.sqrt(jnp.maximum(squares[:, None] + squares - 2 * chosen @ chosen.T, 0.0))
    is_pair = is_in[:, None] & is_in & (places[:, None] != places)
    ordered = jnp.sort(jnp.where(is_pair, distances, jnp.inf).ravel())
    last = jnp.maximum(jnp.sum(is_pair) - 1, 0)
    median = (ordered[last // 2] + ordered[(last + 1) // 2]) / 2
    return jnp.where(jnp.isfinite(median) & (median > 0), median, 1.0)
