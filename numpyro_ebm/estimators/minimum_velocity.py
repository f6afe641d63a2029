"""Minimum velocity learning."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.derivatives import over_coordinates
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.figures import score_figures
from numpyro_ebm.estimators.parts.projections import Projection, check_projection, directions

SHARE = 0.01
"""Default step, in variances of the data: half a percent of bias, by the fixed point in the class docstring."""
WIDEST = 0.5
"""From this step on, in variances of the data, a Gaussian has no fixed point (formula in the class docstring)."""


@dataclasses.dataclass(frozen=True)
class MinimumVelocity(AbstractEstimator):
    r"""Minimum velocity learning (Movellan; Wang et al.): the rate at which the model's diffusion carries the data away.

    The diffusion ``dX = (D s + div D) dt + sqrt(2 D) dW``, with ``s = grad log p`` and a diagonal ``D(x)``, leaves ``p``
    invariant (unconstrained space, Jacobian included). The velocity at which it carries the data away is least for the model
    that generated them. Each update takes one Euler step under the current parameters, through which no gradient flows. It
    takes a random direction ``z``, with ``E[z z^T] = I``, in both signs:

    .. math:: y_\pm = x + h (D s_{\bar\theta} + \operatorname{div} D) \pm \sqrt{2 h D}\, z

    The surrogate of a row is ``(log p(x) - (log p(y_+) + log p(y_-)) / 2) / h``, averaged over directions. As ``h`` vanishes
    its gradient is, in expectation, minus that of the loss

    .. math:: \tfrac12 s^T D s + \operatorname{div}(D s)

    which for ``D = 1`` is "sm", and otherwise diffusion score matching; direction by direction it is that of "ssm_vr". The
    value means nothing as an objective. One step of contrastive divergence, divided by its size, has this gradient plus
    noise of the size ``1 / sqrt(h)``. Wang et al. remove the noise by the control variate ``sqrt(2 h D) z . s(x)``; here it
    cancels between the two signs of a direction, without a gradient of the score.

    No second derivative of the energy is taken, and the parameters are differentiated only through values of the energy.
    The cost is one gradient in x, through which no gradient flows, and ``1 + 2 M`` energies per row. This takes less memory
    than "sm" and "ssm_vr". Unlike "fd_ssm" it squares no slope, so that ``M`` directions give an exact ``s^T D s``.

    A step of finite size is that of unadjusted Langevin: on a Gaussian of variance ``v`` the fixed point is the precision

    .. math:: \theta = \tfrac1h \big(1 - \sqrt{1 - 2 h / v}\big) \approx \tfrac1v \big(1 + \tfrac{h}{2v}\big)

    (``D = 1``). From ``h = v / 2`` on there is no fixed point, and the energy diverges. The default, a hundredth of the
    variance, has half a percent of bias. In float32 the differences of energies ``l`` have a rounding error of
    ``6e-8 l / h``, which with one step for columns of very different scales would hide the signal of the widest. By default
    each dimension therefore diffuses at the rate of its own variance.

    Args:
        step_size: ``h``, in squared data units over those of ``D``; None for 0.01 of the batch's variance over the batch's
            mean of ``D``, in the dimension where that is least.
        diffusion: ``D``: one number, one for each dimension of unconstrained space, or a function of the event that returns
            either, not negative. None for 1 where a step_size is given, and otherwise for the batch's variance of each
            dimension over their geometric mean, so that the estimate does not depend on the units of a column. On a
            constrained support it is the diffusion in unconstrained space: on the positive line, where the position is
            ``log x``, a weight ``h(x)`` of "generalized_sm" is ``D(x) = h(x) / x^2``.
        num_projections: directions per row, each taken in both signs.
        projection: their distribution, "rademacher", "gaussian" (as in the paper; the weak Euler step needs only the second
            moment) or "sphere".

    Raises:
        EnergyError: for a step that is not positive, fewer than one direction, an unknown projection, and a diffusion that
            is negative, not finite or does not fit the event.

    Warns:
        UserWarning: for a step of half the data's variance or more in some dimension; checked where the data are concrete,
            as in ``svi.init``.

    Example:
        ``estimate(model, "minimum_velocity", diffusion=lambda x: 1 / (1 + jnp.sum(x**2)))``

    References:
        Movellan, A minimum velocity approach to learning (2008); Wang, Cheng, Li, Zhu and Zhang, A Wasserstein minimum
        velocity approach to learning unnormalized models (2020); Barp, Briol, Duncan, Girolami and Mackey, Minimum Stein
        discrepancy estimators (2019), for diffusion score matching.
    """

    name = "minimum_velocity"
    role = "gradient"
    step_size: Any = None
    diffusion: Any = None
    num_projections: int = 1
    projection: Projection = "rademacher"

    def __post_init__(self):
        owner = type(self).__name__
        check_positive(owner, "step_size", self.step_size, scalar=True)
        check_count(owner, "num_projections", self.num_projections)
        check_projection(self.projection)
        if not callable(self.diffusion):
            check_positive(owner, "diffusion", self.diffusion)

    def notes(self):
        """Note the bias of the step."""
        return ("one Euler step of finite size: the energy is biased towards too much precision, by the order of the step",)

    def check(self, site: Site) -> None:
        """Refuse a diffusion that does not fit; warn of a step that is too long."""
        super().check(site)
        self._check_shape(site)
        if not (site.num_rows and is_concrete(site.value, site.mask, self.step_size)):
            return
        with eager():
            rates = jax.vmap(lambda z: self._rate(site, z))(site.position)
        if is_concrete(rates):
            self._check_rates(site, np.asarray(rates))

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return the size of the score and of its divergence."""
        return score_figures(rng_key, site)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the decrease of each row's log density over the step, per unit of time."""
        rates, drift = jax.vmap(lambda z: self._rate_and_divergence(site, z))(site.position)
        example = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
        score = jax.vmap(freeze(site.score, *example))(site.position, site.local)
        step = self._step(site, rates)
        ahead = site.position + step * (rates * score + drift)
        moves = jnp.sqrt(2 * step * rates) * directions(rng_key, self.projection, self.num_projections, site.position)
        ends = jax.lax.stop_gradient(jnp.concatenate([ahead + moves, ahead - moves])).astype(site.position.dtype)
        values = site.over_draws(site.log_density, jnp.concatenate([site.position[None], ends]))
        return (values[0] - jnp.mean(values[1:], axis=0)) / step, state

    def _step(self, site: Site, rates: Float[Array, " {site.num_rows} *position"]) -> Scalar:
        """Return the step size, one number."""
        dtype = site.position.dtype
        if self.step_size is not None:
            return jnp.asarray(self.step_size, dtype)
        least = jnp.min(_variances(site, rates), initial=jnp.inf)
        return jax.lax.stop_gradient(SHARE * jnp.where(jnp.isfinite(least), least, 1.0)).astype(dtype)

    def _rate(self, site: Site, position: Float[Array, "*position"]) -> Float[Array, "*position"]:
        """Return ``D`` at one position, one number for each dimension."""
        given = self.diffusion(site.distribution.constrain(position)) if callable(self.diffusion) else self.diffusion
        if given is None:
            given = 1.0 if self.step_size is not None else _relative_variances(site)
        return jnp.broadcast_to(jnp.asarray(given, position.dtype), position.shape)

    def _rate_and_divergence(
        self, site: Site, position: Float[Array, "*position"]
    ) -> tuple[Float[Array, "*position"], Float[Array, "*position"]]:
        """Return ``D`` and its divergence, the derivative of each dimension's entry along that dimension."""
        if not callable(self.diffusion):
            return self._rate(site, position), jnp.zeros_like(position)
        flat, unravel = ravel_pytree(position)
        rate, push = jax.linearize(lambda v: self._rate(site, unravel(v)).ravel(), flat)
        return unravel(rate), unravel(over_coordinates(push, flat, lambda i, column: column[i]))

    def _check_shape(self, site: Site) -> None:
        shape, came = site.distribution.unconstrained_shape, self.diffusion
        if callable(came):
            came = jax.eval_shape(came, jax.ShapeDtypeStruct(site.distribution.event_shape, float))
        if came is not None and np.shape(came) not in ((), shape):
            raise EnergyError(
                f"diffusion has shape {np.shape(came)} for one event; unconstrained space has {shape}. Write one number, or "
                "one for each dimension, e.g. diffusion=lambda x: 1 / (1 + jnp.sum(x**2))."
            )

    def _check_rates(self, site: Site, rates: Float[np.ndarray, " {site.num_rows} *position"]) -> None:
        bad = np.flatnonzero(~((rates >= 0) & np.isfinite(rates)).reshape(site.num_rows, -1).all(axis=1))
        if bad.size or not rates.any():
            row = int(bad[0]) if bad.size else 0
            raise EnergyError(
                f"The diffusion at row {row} of the data is {rates[row]}: it must be finite, not negative and not 0 "
                "everywhere. Write e.g. diffusion=lambda x: jnp.exp(-x)."
            )
        if self.step_size is None or site.num_rows < 2:
            return
        with eager():
            share = float(self.step_size / jnp.min(_variances(site, jnp.asarray(rates)), initial=jnp.inf))
        if share >= WIDEST:
            warnings.warn(
                f"At site '{site.name}': step_size is {share:.3g} of the data's variance (over the diffusion) in some "
                f"dimension; from {WIDEST} on the step has no fixed point on a Gaussian, and the energy diverges. Write a "
                "smaller step_size, or none.",
                stacklevel=2,
            )


def _relative_variances(site: Site) -> Float[Array, "*position"]:
    """Return the variances of the rows that take part over their geometric mean, per dimension."""
    log_variances = 2 * jnp.log(or_one(site.spread))
    return jnp.exp(log_variances - jnp.mean(log_variances))


def _variances(site: Site, rates: Float[Array, " {site.num_rows} *position"]) -> Float[Array, "*position"]:
    """Return the variances of the rows that take part over the mean diffusion, per dimension; infinite where that is 0."""
    mask = None if site.mask is None else site.mask.reshape((-1,) + (1,) * (rates.ndim - 1))
    mean = jnp.mean(rates, axis=0, where=mask)
    return jnp.where(mean > 0, or_one(site.spread) ** 2 / jnp.where(mean > 0, mean, 1.0), jnp.inf)
