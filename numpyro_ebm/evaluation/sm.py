"""The exact score matching loss of rows."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import at_site
from numpyro_ebm._core.typing import ArrayLike, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import ScoreMatching
from numpyro_ebm.evaluation._subjects import check_continuous, rows_under


class SMLoss(NamedTuple):
    """Result of `sm_loss`.

    Attributes:
        rows: loss of each row, in the rows' shape; NaN for masked rows.
        mean: mean loss of the rows that take part.
        standard_error: of the mean, from the sampling of rows; NaN for a single row.
    """

    rows: Float[np.ndarray, "*batch"]
    mean: float
    standard_error: float


def sm_loss(
    distribution: dist.Distribution | tuple[Callable[..., Any], PyTree], rows: ArrayLike, *, site: str | None = None
) -> SMLoss:
    r"""Compute the exact score matching loss of each row, ``|s|^2 / 2 + tr grad s``, which needs no log Z.

    Its mean is half the Fisher divergence from the data distribution to the model, plus a constant of the data. Only
    differences between models on the same rows are meaningful; lower is better. The loss is that of `ScoreMatching` with
    ``trace="columns"``, in unconstrained space, so all compared models need the same support.

    Args:
        distribution: an `EnergyDistribution`, a `ScoreDistribution`, a normalised NumPyro distribution, or
            ``(model, params)`` with a model that observes the rows in ``model(rows)``.
        rows: held-out rows, ``(num_rows, *event_shape)``.
        site: name of the energy site, for a model with several.

    Raises:
        EnergyError: (a ValueError) for rows that do not fit and for a discrete support.
        TypeError: for anything but such a distribution or pair.

    Warns:
        UserWarning: for a piecewise linear energy, for which the loss is meaningless.

    Example:
        >>> import jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> sm_loss(dist.Normal(0.0, 1.0), jnp.array([-1.0, 1.0])).mean
        -0.5

    References:
        Hyvarinen, Estimation of non-normalized statistical models by score matching (2005).
    """
    return sm_of(rows_under("sm_loss", distribution, rows, site))


def sm_of(site: Site) -> SMLoss:
    """Compute `sm_loss` for rows that are laid out already."""
    estimator = ScoreMatching(trace="columns")
    with at_site(site.name):
        check_continuous("sm_loss", site)
        estimator.check(site)
        values = np.asarray(_losses(site.distribution.closed(order=2), (site.value, site.local), estimator=estimator))
    keep = np.ones(site.num_rows, bool) if site.mask is None else np.asarray(site.mask)
    kept = values[keep].astype(float)
    error = float(kept.std(ddof=1)) / math.sqrt(kept.size) if kept.size > 1 else math.nan
    return SMLoss(np.where(keep, values, np.nan).reshape(site.batch_shape), float(kept.mean()), error)


@programs.jit(static_argnames=("estimator",))
def _losses(distribution, rows, *, estimator):
    value, local = rows
    return -estimator.surrogate(None, Site("", distribution, value.shape[:1], value, local, None), None)[0]
