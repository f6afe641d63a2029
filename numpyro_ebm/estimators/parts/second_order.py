"""Shared by the estimators with second derivatives: rows in bounded memory, probes, and a check for curvature."""

import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from numpyro_ebm._core.laplacian import is_piecewise_linear
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.figures import score_figures
from numpyro_ebm.estimators.parts.projections import Projection, directions, inner, score_and_curvatures

ELEMENTS_AT_ONCE = 2**20
"""Elements of the Hessians held at once, 4 MiB in single precision: fewer save memory, more run faster."""


class SecondOrderEstimator(AbstractEstimator):
    """An objective that contains second derivatives of the log density."""

    role = "objective"
    needs_energy = False

    def check(self, site: Site) -> None:
        """Warn of an energy without curvature."""
        super().check(site)
        check_bends(site, self.name)

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return the size of the score and of its divergence."""
        return score_figures(rng_key, site)


def over_rows(row_loss: Callable[..., Scalar], site: Site, *each: PyTree) -> RowValues:
    """Return ``row_loss(position, local, ...)`` for every row, as many rows at once as have Hessians of a million elements.

    If the rows do not all fit, the backward pass computes a row's intermediate values again instead of keeping them.

    Args:
        row_loss: loss of one row.
        site: the rows.
        *each: further arguments, with a leading dimension of rows.
    """
    rows = (site.position, site.local, *each)
    size = math.prod(site.position.shape[1:])
    at_once = max(1, ELEMENTS_AT_ONCE // max(size, 1) ** 2)
    if at_once >= site.num_rows:
        return jax.vmap(row_loss)(*rows)
    return jax.lax.map(jax.checkpoint(lambda row: row_loss(*row)), rows, batch_size=at_once)


def probed_loss(rng_key: PRNGKey, site: Site, projection: Projection, num: int) -> RowValues:
    """Return the score matching loss of each row, with the mean over random probes (Hutchinson) for the trace."""
    score, curvatures = score_and_curvatures(site, directions(rng_key, projection, num, site.position))
    return 0.5 * inner(score, score) + jnp.mean(curvatures, axis=0)


def check_bends(site: Site, estimator: str) -> None:
    """Warn of a piecewise linear energy: its second derivatives, which the loss contains, are zero almost everywhere.

    Raises:
        EnergyError: for an energy whose first derivatives are zero everywhere.

    Warns:
        UserWarning: with what to use instead.
    """
    distribution = site.distribution
    if not distribution.has_energy:
        return
    distribution.check_slope()
    position, local = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
    context = None if local is None else local[0]
    if is_piecewise_linear(lambda z: distribution.evaluate_energy(distribution.constrain(z), context), position):
        warnings.warn(
            f"At site '{site.name}': the energy is piecewise linear (ReLU, abs, max), so its second derivatives are "
            f"zero almost everywhere and '{estimator}' learns a flat energy. Use a smooth activation (softplus, silu), or "
            "estimate(model, 'dsm', sigma=0.1), which needs no second derivatives.",
            stacklevel=2,
        )
