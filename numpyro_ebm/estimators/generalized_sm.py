"""Generalised score matching: for densities on intervals and half lines, and for discrete events."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.derivatives import over_coordinates
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.ends import Ends, distance, ends_of, square
from numpyro_ebm.estimators.parts.exponentials import tangent_exp
from numpyro_ebm.estimators.parts.second_order import check_bends, over_rows
from numpyro_ebm.estimators.parts.single_changes import check_finite_values, over_single_changes

Weight = Literal["square", "distance", "capped"] | Callable[[Scalar], Scalar]
NAMES = ("square", "distance", "capped")
SHARES, STEPS = np.linspace(0.02, 0.98, 25), np.geomspace(0.01, 100, 25)
"""Where a weight is checked: shares of an interval, distances from the end of a half line."""
NEGLIGIBLE = 1e-5
"""Share of a weight's largest value that counts as 0: a larger one allows a boundary term, a smaller one no rounding."""
STEEPEST = 30.0
"""Log of a reciprocal of a probability beyond which it continues as its tangent."""
NEAREST = 1e-5
"""Share of its mean distance that a row keeps from an end: less is nearer to the limit of the loss, but loses digits."""


@dataclasses.dataclass(frozen=True)
class GeneralizedScoreMatching(AbstractEstimator):
    r"""Score matching in the original coordinates of a bounded support, or with another operator than the gradient.

    **Bounded events** (Hyvarinen; Yu, Drton and Shojaie). The loss of a row, with ``s = grad log p`` in the constrained
    event and a weight ``h_i`` for each coordinate, is

    .. math:: \sum_i \tfrac12 h_i(x_i) s_i(x)^2 + h_i(x_i)\, \partial_i s_i(x) + h_i'(x_i)\, s_i(x)

    Up to a constant and a boundary term ``h_i s_i p_data``, it is half the weighted squared distance of the scores,
    ``sum_i h_i (s_i - grad_i log p_data)^2``. The boundary term vanishes where ``h_i`` does: at the finite ends of the
    support. A real coordinate has weight 1, so that on the real line this is "sm"; "square" on the half line ``x > 0`` is
    Hyvarinen's loss for non-negative data. At infinite ends the density has to fall off, as for "sm". The loss takes ``d``
    forward derivatives of the score per row.

    A row may lie on an end of the support. Its loss is then the limit at that end, evaluated at a distance of 1e-5 of the
    coordinate's mean distance to its end.

    "sm" itself trains a bounded density in unconstrained coordinates, which the logistic or the exponential function maps to
    an interval or a half line. Up to a term without parameters, that is this loss under the weight
    ``(x - a)^2 (b - x)^2 / (b - a)^2`` or ``(x - a)^2``. Hence "square" has the optimum of "sm" where all intervals have the
    same length; the other weights have other optima.

    **Discrete events** with finitely many values (Lyu). Score matching compares ``L p / p`` of model and data for an
    operator ``L``, the gradient. With the marginalisation ``(M_i p)(x) = sum_v p(x_{i -> v})`` in its place, ``M_i p / p``
    is ``1 / p(x_i | x_-i)``, log Z cancels, and the squared distance is, up to a constant, the mean over the data of

    .. math:: \sum_i \frac{1}{p(x_i \mid x_{-i})^2} - 2 \sum_v \frac{1}{p(x_i = v \mid x_{-i})}

    It determines all conditionals and with them the distribution. For two values per element this is the loss of
    "discrete_fisher" minus 3 per element. It takes ``d (k - 1)`` energies per row of ``d`` elements with ``k`` values. Rows
    weigh by inverse probabilities, so that unlikely rows, and rows that the model makes unlikely, count most:
    "pseudolikelihood" matches the same conditionals and is more efficient. If data lack a state next to a row, a model that
    is free to make it impossible lowers the loss without end. Beyond ``e^30`` the reciprocals continue as their tangents in
    the log.

    Args:
        weighting: "square", the product of the squared distances to the finite ends: ``(x - a)^2 (b - x)^2`` on an interval,
            ``(x - a)^2`` on a half line; "distance", the distance to the nearest end; "capped", the smaller of that and
            ``cap``; or a function ``h(x)`` of one bounded coordinate, not negative and 0 at each finite end. Discrete events
            have no weight, so that only the default is allowed.
        cap: the distance beyond which the weight of "capped" is constant, in data units.

    Raises:
        EnergyError: for an unknown weight, or a cap that is missing for "capped" or given for another; at the first use, for
            a support that is not a product of lines, half lines and intervals, for a function that is negative, not scalar
            or not 0 at an end, for a function where no coordinate is bounded, for a weight with discrete events, and for
            discrete events whose values cannot be listed.

    Warns:
        UserWarning: for a piecewise linear energy (ReLU), whose second derivatives are zero.

    Example:
        ``estimate(model, "generalized_sm", weighting="capped", cap=1.0)``, or ``estimate(model, "generalized_sm")`` with
        ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Lyu, Interpretation and generalization of score matching (2009); Hyvarinen, Some extensions of score matching (2007);
        Yu, Drton and Shojaie, Generalized score matching for non-negative data (2019); Liu, Kanamori and Williams,
        Estimating density models with truncation boundaries using score matching (2022).
    """

    name = "generalized_sm"
    role = "objective"
    is_deterministic = True
    takes_ends = True
    takes_discrete = True
    weighting: Weight = "square"
    cap: float | None = None

    def __post_init__(self):
        if not callable(self.weighting) and self.weighting not in NAMES:
            is_name = isinstance(self.weighting, Hashable)
            hint = nearest(str(self.weighting), NAMES) if is_name else f"Known names: {NAMES}."
            raise EnergyError(
                f"GeneralizedScoreMatching needs a name or a function for weighting; got {self.weighting!r}. {hint} A "
                "constant weight is refused on a bounded support, where it leaves a boundary term; without bounds write "
                "'sm'."
            )
        if (self.cap is not None) != (self.weighting == "capped"):
            raise EnergyError(
                f"The weight 'capped' needs a cap and the others take none; got weighting={self.weighting!r}, "
                f"cap={self.cap!r}. Write estimate(model, 'generalized_sm', weighting='capped', cap=1.0)."
            )
        check_positive("GeneralizedScoreMatching", "cap", self.cap, scalar=True)

    def check(self, site: Site) -> None:
        """Raise for a support that is not made of intervals or values, and for a function that is not a weight on them."""
        super().check(site)
        if site.distribution.is_discrete:
            self._check_values(site)
            return
        check_bends(_off_ends(site, ends := self._ends(site)), self.name)
        if callable(self.weighting) and is_concrete(ends):
            intervals = {(float(low), float(high)) for low, high in zip(*map(np.ravel, ends), strict=True)}
            intervals -= {(-np.inf, np.inf)}
            for low, high in sorted(intervals):
                check_weight(self.weighting, low, high)
            if not intervals:
                raise EnergyError(
                    f"The weight is a function of a bounded coordinate, but the support {site.distribution.support} has "
                    "none. Write estimate(model, 'sm')."
                )

    def _check_values(self, site: Site) -> None:
        check_finite_values(site, self.name)
        if self.weighting != "square":
            raise EnergyError(
                f"Discrete events have no ends at which a weight could vanish; got weighting={self.weighting!r}. "
                "Write estimate(model, 'generalized_sm')."
            )

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss, per row."""
        if site.distribution.is_discrete:
            return -over_single_changes(site, marginalized), state
        ends = self._ends(site)
        site = _off_ends(site, ends)

        def row_loss(_, local, event):
            flat, unravel = ravel_pytree(event)
            log_density = lambda v: site.distribution.log_density(unravel(v), local)  # noqa: E731
            score, push = jax.linearize(jax.grad(log_density), flat)
            # Each weight depends only on its own coordinate, so one tangent gives all slopes.
            weights, slopes = jax.jvp(lambda e: self._weights(e, ends), (event,), (jnp.ones_like(event),))
            curvature = over_coordinates(push, flat, lambda i, column: column[i])
            return jnp.sum(weights.ravel() * (0.5 * score**2 + curvature) + slopes.ravel() * score)

        return -over_rows(row_loss, site, site.value), state

    def _ends(self, site: Site) -> Ends:
        with eager(site.distribution.support):
            return ends_of(site.distribution.support, site.distribution.event_shape)

    def _weights(self, event: Float[Array, "*event"], ends: Ends) -> Float[Array, "*event"]:
        if self.weighting == "square":
            return square(event, ends)
        if not callable(self.weighting):
            nearest_end = distance(event, ends)
            lesser = nearest_end if self.cap is None else jnp.minimum(nearest_end, self.cap)
            return jnp.where(ends.is_bounded, lesser, 1.0)
        bounded, flat = jnp.ravel(ends.is_bounded), jnp.ravel(event)
        # The function may be undefined at an unbounded coordinate, so it is evaluated at a bounded one instead.
        shown = jnp.where(bounded, flat, flat[jnp.argmax(bounded)])
        weight: Any = self.weighting
        return jnp.where(bounded, jax.vmap(weight)(shown), 1.0).reshape(event.shape)


def marginalized(changes: Float[Array, " values"]) -> Scalar:
    """Return the loss of one element, given the changes of the log density to its other values."""
    exists = jnp.isfinite(changes)
    log_total = jax.nn.logsumexp(jnp.append(changes, 0.0))
    others = jnp.where(exists, tangent_exp(log_total - jnp.where(exists, changes, 0.0), STEEPEST), 0.0)
    return tangent_exp(log_total, STEEPEST) ** 2 - 2 * (tangent_exp(log_total, STEEPEST) + jnp.sum(others))


def _off_ends(site: Site, ends: Ends) -> Site:
    """Move values at an end of the support off it by 1e-5 of the coordinate's own length.

    The loss has a limit at the end even where its terms have none: for a density like ``x^(a - 1)`` the score is infinite
    at 0, but its product with a weight that vanishes there is not.
    """
    value = site.value
    lengths = jnp.minimum(ends.high - ends.low, jnp.mean(distance(value, ends), axis=0))
    size = jnp.maximum(*(jnp.where(jnp.isfinite(end), jnp.abs(end), 0.0) for end in ends))
    lengths = jnp.where((lengths > 0) & jnp.isfinite(lengths), lengths, 1.0)
    least = jnp.maximum(NEAREST * lengths, 8 * jnp.finfo(value.dtype).eps * size).astype(value.dtype)
    moved = jnp.clip(value, ends.low.astype(value.dtype) + least, ends.high.astype(value.dtype) - least)
    return dataclasses.replace(site, value=moved)


def check_weight(weight: Callable[[Scalar], Scalar], low: float, high: float) -> None:
    """Check that a function is a weight on an interval.

    Raises:
        EnergyError: where it is not scalar, is negative or not finite inside, or is not 0 at a finite end.
    """
    shape = jax.eval_shape(weight, jax.ShapeDtypeStruct((), float)).shape
    if shape != ():
        raise EnergyError(f"The weight returned shape {shape} for one coordinate; it has to return a scalar, shape ().")
    ends = [end for end in (low, high) if np.isfinite(end)]
    inside = low + (high - low) * SHARES if len(ends) == 2 else ends[0] + np.where(np.isfinite(low), STEPS, -STEPS)
    with eager():
        at_ends, values = (jax.vmap(weight)(jnp.asarray(x, float)) for x in (ends, inside))
    if not is_concrete(at_ends, values):
        return
    at_ends, values = np.asarray(at_ends), np.asarray(values)
    size = np.max(np.abs(values))
    if not (np.all(np.isfinite(values)) and size > 0 and np.min(values) >= -NEGLIGIBLE * size):
        raise EnergyError(
            f"The weight is not finite and positive inside ({low:g}, {high:g}): it lies between {np.min(values):.3g} and "
            f"{np.max(values):.3g} there. Write weighting='square', or a function that is 0 only at the ends."
        )
    for end, value in zip(ends, at_ends, strict=True):
        if not abs(value) <= NEGLIGIBLE * size:
            raise EnergyError(
                f"The weight is {value:.3g} at {end:g}, an end of the support: there it leaves a boundary term, weight "
                "times score times density, which depends on the parameters and is not in the loss. Write "
                "weighting='square', or a function that is 0 there."
            )
