"""Kernel Stein goodness-of-fit test."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Float

from numpyro_ebm._core import programs
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import KernelSteinDiscrepancy
from numpyro_ebm.estimators.ksd import Kernel
from numpyro_ebm.evaluation._autocorrelation import dependence, signs
from numpyro_ebm.evaluation._subjects import check_continuous, rows_under


class KSDTest(NamedTuple):
    """Result of `ksd_test`.

    Attributes:
        statistic: unbiased squared discrepancy, about 0 where the model fits; may be negative.
        standard_error: of the statistic, to first order; conservative where the model fits, infinite for two rows.
        p_value: probability of a statistic as large if the model were true.
        ess: effective number of independent rows: all of them, or fewer where consecutive rows are correlated.
    """

    statistic: Float[Array, "*batch"]
    standard_error: Float[Array, "*batch"]
    p_value: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]


def ksd_test(
    rng_key: PRNGKey,
    distribution: dist.Distribution | tuple[Callable[..., Any], PyTree],
    rows: ArrayLike,
    *,
    kernel: Kernel = "imq",
    bandwidth: ArrayLike | None = None,
    beta: float | None = None,
    num_bootstraps: int = 1000,
    site: str | None = None,
) -> KSDTest:
    r"""Test whether rows are draws of a model, by its score alone: without log Z and without draws of the model.

    With ``u`` the Stein kernel of `KernelSteinDiscrepancy`, whose mean is 0 under the model, the statistic and its null
    distribution by the wild bootstrap are

    .. math:: S = \frac{1}{n(n-1)} \sum_{i \ne j} u(x_i, x_j), \qquad
        S_b = \frac{1}{n(n-1)} \sum_{i \ne j} w_{bi} w_{bj} u(x_i, x_j)

    with random signs ``w``, independent for independent rows, and ``p = (1 + #{S_b >= S}) / (1 + B)``. The terms ``i = j``
    do not depend on the signs, so the "u" and "v" statistics have the same p-value. The test works in unconstrained space,
    takes time ``n^2 B`` and evaluates a few million pairs at once.

    Consecutive draws of a chain are correlated, and independent signs would reject a true model nearly always. The test
    estimates their integrated autocorrelation time ``tau`` (the longest of all coordinates and their squares). Where it is
    longer than chance explains, the signs are correlated from row to row (a dependent wild bootstrap), strongly enough to
    follow 0.8 of ``tau`` of a geometric autocorrelation, and the null distribution is divided by that share. ``ess`` is
    ``n / tau``; below about a hundred the test has little power.

    As in score matching, the statistic hardly depends on the weights of modes that lie far apart.

    Args:
        rng_key: random key.
        distribution: an `EnergyDistribution`, a `ScoreDistribution`, a normalised NumPyro distribution, or
            ``(model, params)`` with a model that observes the rows in ``model(rows)``.
        rows: held-out rows, ``(num_rows, *event_shape)``, or draws of chains, ``(num_chains, num, *event_shape)``.
        kernel: "imq" or "rbf", see `KernelSteinDiscrepancy`.
        bandwidth: length scale of the kernel, one number or one per dimension, in (unconstrained) data units; None for the
            median distance of the rows in units of each dimension's standard deviation, see `KernelSteinDiscrepancy`.
        beta: exponent of "imq"; None for -0.5.
        num_bootstraps: ``B``.
        site: name of the energy site, for a model with several.

    Returns:
        `KSDTest` with arrays; the test works under jit and vmap.

    Raises:
        EnergyError: (a ValueError) for rows that do not fit, for fewer than two rows, for a discrete support, for rows with
            a context or a base of their own, and for invalid kernels.
        TypeError: for anything but such a distribution or pair.

    Example:
        >>> import numpyro.distributions as dist
        >>> x = jax.random.normal(jax.random.key(0), (200,))
        >>> bool(ksd_test(jax.random.key(1), dist.Normal(0.0, 2.0), x).p_value < 0.01)
        True

    References:
        Chwialkowski, Strathmann and Gretton, A kernel test of goodness of fit (2016); Liu, Lee and Jordan, A kernelized
        Stein discrepancy for goodness-of-fit tests (2016); Chwialkowski, Sejdinovic and Gretton, A wild bootstrap for
        degenerate kernel tests (2014).
    """
    options = {"kernel": kernel, "bandwidth": bandwidth, "beta": beta, "num_bootstraps": num_bootstraps}
    return ksd_of(rng_key, rows_under("ksd_test", distribution, rows, site), **options)


def ksd_of(rng_key: PRNGKey, site: Site, *, num_bootstraps: int = 1000, **options: Any) -> KSDTest:
    """Run `ksd_test` on rows that are laid out already."""
    check_key("ksd_test", rng_key)
    check_count("ksd_test", "num_bootstraps", num_bootstraps)
    check_continuous("ksd_test", site)
    if site.rows_differ:
        raise EnergyError(
            "ksd_test needs rows that share one density, and here each row has a context or a base of its own. Test the "
            "rows of one context."
        )
    num_rows = site.num_rows if site.mask is None or not is_concrete(site.mask) else int(site.mask.sum())
    if num_rows < 2:
        raise EnergyError(f"ksd_test compares rows with each other and needs two or more; got {num_rows}.")
    estimator = KernelSteinDiscrepancy(**options)
    estimator.check(site)
    return _test(
        rng_key,
        site.distribution.closed(),
        (site.value, site.local, site.mask),
        estimator.bandwidth,
        kernel=estimator.kernel,
        beta=estimator.beta,
        num_bootstraps=num_bootstraps,
        num_chains=math.prod(site.batch_shape[:-1]),
    )


@programs.jit(static_argnames=("kernel", "beta", "num_bootstraps", "num_chains"))
def _test(rng_key, distribution, rows, bandwidth, *, kernel, beta, num_bootstraps, num_chains):
    value, local, mask = rows
    site = Site("", distribution, value.shape[:1], value, local, mask)
    keep = jnp.ones(site.num_rows, bool) if mask is None else mask
    by_chain = (num_chains, site.num_rows // num_chains)
    found = dependence(site.position.reshape(*by_chain, -1), None if mask is None else keep.reshape(by_chain))
    wild = signs(rng_key, found.persistence, *by_chain, num_bootstraps).astype(value.dtype)
    weights = jnp.concatenate([jnp.ones((site.num_rows, 1), value.dtype), wild], axis=1)
    estimator = KernelSteinDiscrepancy(kernel=kernel, bandwidth=bandwidth, beta=beta)
    with_others = jnp.where(keep, estimator.over_partners(site, lambda values, _: jnp.sum(values)), 0.0)
    with_all = dataclasses.replace(estimator, statistic="v").over_partners(site, lambda values, _: values @ weights)
    totals = jnp.sum(jnp.where(keep[:, None], weights * with_all, 0.0), axis=0)
    p_value = (1 + jnp.sum(totals[1:] / found.captured >= totals[0])) / (1 + num_bootstraps)
    num = jnp.sum(keep, dtype=value.dtype)
    statistic = jnp.sum(with_others) / (num * (num - 1))
    # A row's influence is twice its mean over partners.
    spread = found.time * jnp.var(with_others / (num - 1), where=keep) * num / (num - 1)
    # Two rows form a single pair, which has no spread.
    error = jnp.where(num > 2, 2 * jnp.sqrt(spread / num), jnp.inf)
    return KSDTest(statistic, error, p_value, num / found.time)
