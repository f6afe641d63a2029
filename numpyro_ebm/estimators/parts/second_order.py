"""What the estimators with second derivatives share: rows in bounded memory, probes, and energies that do not bend."""

import math
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from numpyro_ebm._core.laplacian import is_piecewise_linear
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.figures import score_figures
from numpyro_ebm.estimators.parts.projections import Projection, directions, inner, score_and_curvatures

ELEMENTS_AT_ONCE = 2**20


class SecondOrderEstimator(AbstractEstimator):
    """An objective that weighs second derivatives of the log density."""

    role = "objective"
    needs_energy = False

    def check(self, site: Site) -> None:
        """Warn of an energy without curvature."""
        super().check(site)
        check_bends(site, self.name)

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Array]:
        """Size of the score and of its divergence."""
        return score_figures(rng_key, site)


def over_rows(row_loss: Callable[..., Array], site: Site, *each: PyTree) -> Array:
    """``row_loss(position, local, ...)`` for every row, as many rows at once as have Hessians of a million elements.

    Where they do not all fit, what a row leaves for the gradient is computed again instead of kept.

    Args:
        row_loss: loss of one row.
        site: the rows.
        *each: more arguments, led by the rows.
    """
    rows = (site.position, site.local, *each)
    size = math.prod(site.position.shape[1:])
    at_once = max(1, ELEMENTS_AT_ONCE // max(size, 1) ** 2)
    if at_once >= site.num_rows:
        return jax.vmap(row_loss)(*rows)
    return jax.lax.map(jax.checkpoint(lambda row: row_loss(*row)), rows, batch_size=at_once)


def probed_loss(rng_key: PRNGKey, site: Site, law: Projection, num: int) -> Array:
    """The score matching loss of each row, the mean over random probes (Hutchinson) in the place of the trace."""
    score, curvatures = score_and_curvatures(site, directions(rng_key, law, num, site.position))
    return 0.5 * inner(score, score) + jnp.mean(curvatures, axis=0)


def check_bends(site: Site, estimator: str) -> None:
    """Warn of an energy that is linear piece by piece: its second derivatives, which the loss weighs, are all zero.

    Warns:
        UserWarning: with what to use instead.
    """
    distribution = site.distribution
    if not distribution.has_energy:
        return
    position, local = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
    context = None if local is None else local[0]
    if is_piecewise_linear(lambda z: distribution.evaluate_energy(distribution.constrain(z), context), position):
        warnings.warn(
            f"At site '{site.name}': the energy is linear piece by piece (ReLU, abs, max), so its second derivatives are "
            f"zero almost everywhere and '{estimator}' learns a flat energy. Use a smooth activation (softplus, silu), or "
            "estimate(model, 'dsm', sigma=0.1), which takes no second derivative.",
            stacklevel=2,
        )
