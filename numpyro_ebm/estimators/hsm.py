"""Higher-order score matching: a local proper scoring rule of order four."""

import dataclasses
import math
import numbers

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm._core.derivatives import laplacian_of_curvature, over_coordinates
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, over_rows


@dataclasses.dataclass(frozen=True)
class HigherOrderScoreMatching(SecondOrderEstimator):
    r"""Score matching beside a local proper scoring rule of order four (Parry, Dawid and Lauritzen).

    With the score ``s`` of the density ``q`` (unconstrained space) and ``u = (Laplacian q) / q``, which is free of log Z:

    .. math:: w_1 \big(\tfrac12 |s|^2 + \operatorname{tr} \nabla s\big) + w_2 \big(\tfrac12 u^2 - \Delta u\big),
        \qquad u = \operatorname{tr} \nabla s + |s|^2

    The second rule is proper as score matching is: two integrations by parts turn ``E_p[Delta u]`` into ``E_p[u u_p]``, and
    what is left is ``E_p[(u - u_p)^2] / 2`` and a constant, zero only where ``Delta q / q = Delta p / p``. It weighs the
    curvature of the density, not only its slope, and asks for data tails that are light enough for these integrals.

    Fourth derivatives of the energy: ``d^2`` directional third derivatives of the score per row, at most 64 at a time, so
    that no row of ``d x d`` numbers is built; meant for a dozen dimensions, not for images. Its terms cancel: in float32 the
    loss of tens of thousands of rows carries rounding of the size of its own spread, so take float64 for exact optima.

    Args:
        weights: ``(w1, w2)``, of "sm" and of the rule of order four; not negative, not both 0.

    Raises:
        EnergyError: for weights that are not two finite numbers, are negative or both 0.

    Warns:
        UserWarning: for an energy that is linear piece by piece (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "hsm", weights=(1.0, 0.1))``

    References:
        Parry, Dawid and Lauritzen, Proper local scoring rules (2012); Hyvarinen (2005) for the first.
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
        object.__setattr__(self, "weights", (float(weights[0]), float(weights[1])))  # a list has no hash

    def surrogate(self, rng_key, site: Site, state):
        """Minus the loss, per row."""
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
