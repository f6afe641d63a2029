"""Regularised score matching."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm._core.derivatives import over_coordinates
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, over_rows

Curvature = Literal["full", "diagonal"]


@dataclasses.dataclass(frozen=True)
class RegularizedScoreMatching(SecondOrderEstimator):
    r"""Score matching with a penalty on curvature (Kingma and LeCun): the loss under small noise, without the noise.

    The loss of a row with score ``s`` and its Jacobian ``J = grad s`` (unconstrained space) is

    .. math:: \tfrac12 |s|^2 + \operatorname{tr} J + \tfrac12 \sigma^2 R,
        \qquad R = |J|_F^2 \text{ ("full")} \quad\text{or}\quad \sum_i J_{ii}^2 \text{ ("diagonal")}

    The score matching loss ``L`` at ``x + sigma e`` with ``e ~ N(0, I)`` is ``L + sigma^2 / 2 Laplacian L`` on average, up
    to ``O(sigma^4)``, and ``Laplacian L = |J|_F^2 + s . Laplacian s + Laplacian tr J``. By parts, the expectation of the
    last two terms under ``p`` is that of ``(s - grad log p) . Laplacian s``, which vanishes at the optimum, so that only
    ``|J|_F^2`` remains. The loss therefore approximates "dsm" with little noise, without randomness. It is exact where
    ``Laplacian s = 0``, on a Gaussian of covariance ``S``; there the optimum of the full form is the precision
    ``(S + sigma^2 I)^{-1}``. The paper also drops the off-diagonal curvature ("diagonal"). The cost is ``d`` forward
    derivatives of the score per row, as for "sm". The loss of "sm" has no lower bound; this one is at least
    ``-d / (2 sigma^2)``.

    Args:
        sigma: noise scale in data units (in unconstrained units where the support is not the real line); required.
        curvature: second derivatives that are penalised, "full" or "diagonal".

    Raises:
        EnergyError: for sigma missing or not a positive number, and for an unknown curvature.

    Warns:
        UserWarning: for a piecewise linear energy (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "regularized_sm", sigma=0.1)``

    References:
        Kingma and LeCun, Regularized estimation of image statistics by score matching (2010).
    """

    name = "regularized_sm"
    is_deterministic = True
    sigma: Any = None
    curvature: Curvature = "full"

    def __post_init__(self):
        if self.sigma is None:
            raise EnergyError(
                "RegularizedScoreMatching needs sigma. Write estimate(model, 'regularized_sm', sigma=0.1), or, for no "
                "penalty, estimate(model, 'sm')."
            )
        check_positive("RegularizedScoreMatching", "sigma", self.sigma, scalar=True)
        if self.curvature not in get_args(Curvature):
            raise EnergyError(f"Unknown curvature '{self.curvature}'. {nearest(str(self.curvature), get_args(Curvature))}")

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        penalty = 0.5 * jnp.asarray(self.sigma, site.position.dtype) ** 2

        def read(i, column):
            own = column[i]
            return own + penalty * (own**2 if self.curvature == "diagonal" else jnp.sum(column**2))

        def row_loss(position, local):
            flat, unravel = ravel_pytree(position)
            score, push = jax.linearize(lambda v: ravel_pytree(site.score(unravel(v), local))[0], flat)
            return 0.5 * jnp.sum(score**2) + jnp.sum(over_coordinates(push, flat, read))

        return -over_rows(row_loss, site), state
