"""Elliptical slice sampling."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax.mcmc.elliptical_slice import ellipsis
from blackjax.util import generate_gaussian_noise
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import block_diag, solve_triangular
from jaxtyping import Float, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_covariance, check_positive
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm._core.wrappers import strip, without_rows
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info

MAX_EVALUATIONS = 100
"""Most evaluations per transition, when the bracket is far below the rounding of an angle; a flat top needs a limit."""


class SliceState(NamedTuple):
    """The position and its log density."""

    position: Any
    logdensity: Any


class Gaussian(NamedTuple):
    """Mean ``(d,)`` and covariance root, ``(d,)`` or lower triangular ``(d, d)``, over the flattened position."""

    mean: Float[Array, " d"]
    root: Float[Array, " d"] | Float[Array, "d d"]

    def log_density(self, position: Position) -> Scalar:
        """Evaluate the log density at a position, up to a constant."""
        centred = ravel_pytree(position)[0] - self.mean
        white = centred / self.root if self.root.ndim == 1 else solve_triangular(self.root, centred, lower=True)
        return -0.5 * jnp.sum(white**2)


@record()
class EllipticalSlice(AbstractKernel):
    r"""Elliptical slice sampling, without step size, gradient or rejection, for a target close to a Gaussian.

    The log density is the sum of that of ``N(mean, covariance)`` and a remainder. A draw of the Gaussian and the position
    span an ellipse; the next position is drawn, by shrinking a bracket, from the part of it where the remainder exceeds a
    random height. The kernel is exact for any Gaussian, and fast if the Gaussian is close to the target. The algorithm is
    BlackJAX's ``elliptical_slice``, which accepts NaN and may not end on a flat top; both are fixed here.

    Args:
        mean: ``()`` or ``(d,)`` over the flattened, unconstrained position.
        covariance: ``()`` or ``(d,)`` for a diagonal, or ``(d, d)``. If neither is given, both are those of the Gaussian
            ``base`` of the sampled `EnergyDistribution`.

    Raises:
        EnergyError: for only one of the two; if both are missing and there is no Gaussian base; for shapes
            that do not fit the position.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, base=Normal(0, 1)), "elliptical_slice")``

    References:
        Murray, Adams and MacKay, Elliptical slice sampling (2010).
    """

    name: ClassVar[str] = "elliptical_slice"
    is_reversible: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    mean: Any = None
    covariance: Any = None

    def __post_init__(self):
        if (self.mean is None) != (self.covariance is None):
            raise EnergyError(
                "EllipticalSlice needs mean and covariance, or neither (for those of the energy's base). "
                "Write EllipticalSlice(mean=0.0, covariance=1.0)."
            )
        if is_concrete(self.mean) and self.mean is not None and not np.all(np.isfinite(self.mean)):
            raise EnergyError(f"EllipticalSlice needs a finite mean; got {self.mean!r}. Write mean=jnp.zeros(d).")
        check = check_positive if np.ndim(self.covariance) == 0 else check_covariance
        check("EllipticalSlice", "covariance", self.covariance)

    def bind(self, distribution):
        """Return the kernel with mean and covariance of the base, unless they were given."""
        if self.mean is not None or not hasattr(distribution, "base"):  # of the latents of a model, or members of an event
            return self
        mean, covariance = _moments(distribution.base)
        return self.adapted(mean=mean, covariance=covariance)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        self._gaussian(position)
        return SliceState(position, log_density(position))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Draw an ellipse and a height, and shrink the bracket until a drawn point is above the height."""
        key_angle, key_momentum, key_height, key_start = jax.random.split(rng_key, 4)
        gaussian = self._gaussian(state.position)
        flat, unravel = ravel_pytree(state.position)
        momentum = generate_gaussian_noise(key_momentum, state.position, gaussian.mean, gaussian.root)
        height = state.logdensity - gaussian.log_density(state.position) + jnp.log(jax.random.uniform(key_height))
        start = 2 * jnp.pi * jax.random.uniform(key_start)

        def shrink(carry):
            i, low, high, _, _, met_nonfinite = carry
            drawn = jax.random.uniform(jax.random.fold_in(key_angle, i), minval=low, maxval=high)
            angle = jnp.where(i == 0, start, drawn)
            point, _ = ellipsis(state.position, momentum, angle, unravel(gaussian.mean))
            value = log_density(point)
            is_above = value - gaussian.log_density(point) > height
            low, high = jnp.where(angle < 0, angle, low), jnp.where(angle > 0, angle, high)
            return i + 1, low, high, is_above, SliceState(point, value), met_nonfinite | ~jnp.isfinite(value)

        carry = (0, start - 2 * jnp.pi, start, False, state, ~jnp.isfinite(state.logdensity))
        evaluations, _, _, is_above, new, met_nonfinite = jax.lax.while_loop(
            lambda carry: ~carry[3] & (carry[0] < MAX_EVALUATIONS), shrink, carry
        )
        new = jax.tree.map(lambda new, old: jnp.where(is_above, new, old), new, state)
        return new, info(1.0, is_divergent=False, num_gradients=evaluations, is_nonfinite=met_nonfinite)

    def _gaussian(self, position: Position) -> Gaussian:
        """Return the Gaussian for a position of this size."""
        if self.mean is None:
            raise EnergyError(NEEDS_GAUSSIAN + "; a model has no base, nor have members of an event.")
        flat = ravel_pytree(position)[0]
        size = flat.size
        mean, covariance = jnp.asarray(self.mean, flat.dtype), jnp.asarray(self.covariance, flat.dtype)
        if mean.shape not in ((), (size,)) or covariance.shape not in ((), (size,), (size, size)):
            raise EnergyError(
                f"EllipticalSlice needs mean of shape ({size},) and covariance of shape ({size},) or ({size}, {size}) for a "
                f"position of {size} coordinates; got shapes {mean.shape} and {covariance.shape}."
            )
        root = jnp.linalg.cholesky(covariance) if covariance.ndim == 2 else jnp.sqrt(covariance)
        return Gaussian(jnp.broadcast_to(mean, (size,)), root if root.ndim == 2 else jnp.broadcast_to(root, (size,)))


NEEDS_GAUSSIAN = (
    "EllipticalSlice needs a Gaussian base or EllipticalSlice(mean=..., covariance=...) over the flattened position"
)


def _moments(base: Any) -> tuple[Shaped[Array, " d"], Shaped[Array, " d"] | Shaped[Array, "d d"]]:
    """Return mean and covariance of one event under a Gaussian base, flattened.

    Raises:
        EnergyError: if there is no base, it is not Gaussian, or each row has its own.
    """
    inner, _ = strip(base)
    if not isinstance(inner, dist.Normal | dist.MultivariateNormal):
        raise EnergyError(f"{NEEDS_GAUSSIAN}; the base is {'missing' if base is None else type(inner).__name__}.")
    one = without_rows(base)
    if any(size != 1 for size in one.batch_shape):
        raise EnergyError(f"{NEEDS_GAUSSIAN}, the same for all rows; the base has batch shape {base.batch_shape}.")
    mean = jnp.broadcast_to(inner.mean, one.shape()).reshape(-1)
    if isinstance(inner, dist.Normal):
        return mean, jnp.broadcast_to(inner.variance, one.shape()).reshape(-1)
    own: Any = inner.covariance_matrix
    covariance = jnp.broadcast_to(own, (*one.shape(), one.shape()[-1]))
    return mean, block_diag(*covariance.reshape((-1, *covariance.shape[-2:])))
