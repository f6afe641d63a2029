"""Maximum mean discrepancy between draws and rows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.spreads import or_one, spread
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.estimators.ksd import PAIRS_AT_ONCE, median_distance
from numpyro_ebm.evaluation._autocorrelation import warn_where_dependent
from numpyro_ebm.evaluation._subjects import as_vectors, check_same_events


class MMDTest(NamedTuple):
    """Result of `mmd`.

    Attributes:
        statistic: unbiased squared discrepancy, about 0 for equal distributions; may be negative.
        standard_error: of the statistic, to first order; conservative for equal distributions.
        p_value: probability of a statistic as large if draws and rows had the same distribution.
        bandwidth: bandwidth of the kernel, or those of its mixture; in standard deviations where none was given.
    """

    statistic: Float[Array, "*batch"]
    standard_error: Float[Array, "*batch"]
    p_value: Float[Array, "*batch"]
    bandwidth: Float[Array, "..."]


def mmd(
    rng_key: PRNGKey,
    draws: ArrayLike,
    rows: ArrayLike,
    *,
    bandwidth: ArrayLike | Sequence[float] | None = None,
    num_permutations: int = 1000,
) -> MMDTest:
    r"""Test whether draws of a model and rows have the same distribution, by the means of a Gaussian kernel.

    .. math:: \widehat{\mathrm{MMD}}^2 = \frac{\sum_{i \ne j} k(x_i, x_j)}{m(m-1)}
        + \frac{\sum_{i \ne j} k(y_i, y_j)}{n(n-1)} - \frac{2 \sum_{i, j} k(x_i, y_j)}{m n},
        \qquad k(x, y) = \exp(-|x - y|^2 / (2 l^2))

    or the mean of such kernels over several ``l``. The statistic is 0 in expectation for equal distributions and positive
    otherwise. Its null distribution comes from permutations of the labels of draws and rows, which are exact for independent
    draws and rows: draws of a chain have to be thinned to independent ones first. A few million pairs are evaluated at once.

    Without a ``bandwidth`` each coordinate is measured in its standard deviation over draws and rows together, so that a
    coordinate with a large scale does not hide the others. A given bandwidth is a length in data units.

    Args:
        rng_key: random key.
        draws: draws of the model, ``(m, ...)``.
        rows: held-out rows, ``(n, ...)``, not those of training.
        bandwidth: ``l``, or a sequence of them; None for the median distance among draws and rows together (among at most
            256 of them), in standard deviations.
        num_permutations: number of permutations.

    Returns:
        `MMDTest` with arrays; the test works under jit and vmap.

    Raises:
        EnergyError: (a ValueError) for fewer than two draws or rows, for events of different shapes or that are not finite,
            and for bandwidths that are not positive.

    Warns:
        UserWarning: for draws whose order shows that they come from a chain and are worth less than half as many
            independent ones.

    Example:
        >>> x, y = jax.random.normal(jax.random.key(0), (2, 100, 3))
        >>> bool(mmd(jax.random.key(1), x, y + 1.0).p_value < 0.01)
        True

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf and Smola, A kernel two-sample test (2012).
    """
    check_key("mmd", rng_key)
    check_count("mmd", "num_permutations", num_permutations)
    bandwidth = None if bandwidth is None else jnp.asarray(bandwidth, float)
    check_positive("mmd", "bandwidth", bandwidth)
    if bandwidth is not None and (bandwidth.ndim > 1 or bandwidth.size == 0):
        raise EnergyError(f"mmd needs one bandwidth or a sequence of them; got shape {bandwidth.shape}.")
    draws, rows = as_vectors("draws", draws), as_vectors("rows", rows)
    check_same_events(draws, rows)
    warn_where_dependent("mmd", draws)
    return _test(rng_key, draws, rows, bandwidth, num_permutations=num_permutations)


@partial(jax.jit, static_argnames=("num_permutations",))
def _test(rng_key, draws, rows, bandwidth, *, num_permutations):
    m, n = len(draws), len(rows)
    pooled = jnp.concatenate([draws, rows])
    pooled = pooled - jnp.mean(pooled, axis=0)  # near the origin, squared distances lose the least precision
    if bandwidth is None:
        pooled = pooled / or_one(spread(pooled))
        length = median_distance(pooled, jnp.ones(m + n, bool))
    else:
        length = bandwidth
    is_draw = jnp.arange(m + n) < m
    permuted = jax.vmap(lambda key: jax.random.permutation(key, is_draw))(jax.random.split(rng_key, num_permutations))
    labels = jnp.concatenate([is_draw[None], permuted]).T.astype(pooled.dtype)

    def row(inputs):
        x, i = inputs
        k = jnp.where(jnp.arange(m + n) == i, 0.0, _kernel(x, pooled, jnp.atleast_1d(length)))
        return k @ labels, jnp.sum(k)

    at_once = max(1, PAIRS_AT_ONCE // (m + n))
    rows_of = (pooled, jnp.arange(m + n))
    to_draws, to_all = jax.vmap(row)(rows_of) if at_once >= m + n else jax.lax.map(row, rows_of, batch_size=at_once)
    both, draws_all, total = jnp.sum(labels * to_draws, axis=0), to_all @ labels, jnp.sum(to_all)
    values = both / (m * (m - 1)) + (total - 2 * draws_all + both) / (n * (n - 1)) - 2 * (draws_all - both) / (m * n)
    p_value = (1 + jnp.sum(values[1:] >= values[0])) / (1 + num_permutations)
    return MMDTest(values[0], _error(to_draws[:, 0], to_all, m, n), p_value, length)


def _kernel(
    x: Float[Array, " d"], others: Float[Array, "events d"], lengths: Float[Array, " lengths"]
) -> Float[Array, " events"]:
    squares = jnp.maximum(jnp.sum(x**2) + jnp.sum(others**2, axis=1) - 2 * others @ x, 0.0)
    return jnp.mean(jnp.exp(-squares / (2 * lengths[:, None] ** 2)), axis=0)


def _error(to_draws: Float[Array, " events"], to_all: Float[Array, " events"], m: int, n: int) -> Scalar:
    """Return the standard error from each event's influence, which is twice the witness function there."""
    to_rows = to_all - to_draws
    at_draws = to_draws[:m] / (m - 1) - to_rows[:m] / n
    at_rows = to_rows[m:] / (n - 1) - to_draws[m:] / m
    return 2 * jnp.sqrt(jnp.var(at_draws, ddof=1) / m + jnp.var(at_rows, ddof=1) / n)
