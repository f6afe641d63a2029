"""Higher-order score matching: a local proper scoring rule of order four."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm._core.derivatives import laplacian_of_curvature, over_coordinates
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, over_rows


@dataclasses.dataclass(frozen=True)
class HigherOrderScoreMatching(SecondOrderEstimator):
    r"""Score matching plus a local proper scoring rule of order four (Parry, Dawid and Lauritzen).

    With the score ``s`` of the density ``q`` (unconstrained space) and ``u = (Laplacian q) / q``, which does not contain
    log Z, the loss of a row is

    .. math:: w_1 \big(\tfrac12 |s|^2 + \operatorname{tr} \nabla s\big) + w_2 \big(\tfrac12 u^2 - \Delta u\big),
        \qquad u = \operatorname{tr} \nabla s + |s|^2

    The second rule is proper like score matching: two integrations by parts turn ``E_p[Delta u]`` into ``E_p[u u_p]``, which
    leaves a constant and ``E_p[(u - u_p)^2] / 2``, zero only where ``Delta q / q = Delta p / p``. It depends on the
    curvature of the density, not only on its slope, and needs data with tails light enough for these integrals.

    It takes fourth derivatives of the energy: ``d^2`` directional third derivatives of the score per row, at most 64 at a
    time, so that no ``d x d`` array per row is built. It is meant for a dozen dimensions, not for images. Its terms cancel:
    in float32, rounding in the loss of tens of thousands of rows is as large as its spread, so use float64 for exact optima.

    Args:
        weights: ``(w1, w2)``, the weights of "sm" and of the rule of order four; not negative, not both 0.

    Raises:
        EnergyError: for weights that are not two finite numbers, are negative or both 0.

    Warns:
        UserWarning: for a piecewise linear energy (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "hsm", weights=(1.0, 0.1))``

    References:
        Parry, Dawid and Lauritzen, Proper local scoring rules (2012); Hyvarinen (2005) for the first rule.
    """

    name = "hsm"
    is_deterministic = True
    weights: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self):
        weights = self.weights
        fits = isinstance(weights, tuple | list) and len(weights) == 2
        fits = fits and all(isinstance(w, numbers.Real) and math.isfinite(w) and w >= 0 for w in weights)
        if not fits or not any(weights):
            raise EnergyError(
                "HigherOrderScoreMatching needs two weights >= 0, not both 0: that of score matching and that of the rule "
                f"of order four; got weights={weights!r}. Write estimate(model, 'hsm', weights=(1.0, 1.0))."
            )
        object.__setattr__(self, "weights", (float(weights[0]), float(weights[1])))  # a list is not hashable

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss, per row."""
        first, second = self.weights

        def row_loss(position, local):
            flat, unravel = ravel_pytree(position)

            def score_at(v):
                return ravel_pytree(site.score(unravel(v), local))[0]

            score, push = jax.linearize(score_at, flat)
            trace = jnp.sum(over_coordinates(push, flat, lambda i, column: column[i]))
            slope = jnp.sum(score**2)
            loss = first * (0.5 * slope + trace)
            if second:
                loss += second * (0.5 * (trace + slope) ** 2 - laplacian_of_curvature(score_at, flat))
            return loss

        return -over_rows(row_loss, site), state
