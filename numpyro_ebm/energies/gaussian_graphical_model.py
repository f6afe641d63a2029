"""The Gaussian graphical model."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import is_positive_definite
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._auto_model import AutoModel
from numpyro_ebm.energies._units import as_parameters, check_finite


@record(eq=False)
class GaussianGraphicalModel(AutoModel):
    r"""The Gaussian graphical model: real elements with Gaussian conditionals.

    .. math:: E(x) = \tfrac12 (x - \mu)^T Q (x - \mu), \qquad
        x_i \mid x_{-i} \sim N\Big(\mu_i - \sum_{j \ne i} \frac{Q_{ij}}{Q_{ii}} (x_j - \mu_j), \frac{1}{Q_{ii}}\Big), \qquad
        \log Z = \tfrac d2 \log 2\pi - \tfrac12 \log \det Q

    Two elements are independent given all others if their entry of the precision is 0. `sweep` draws one element after
    another.

    Args:
        precision: ``(d, d)``, symmetric and positive definite. A trained or sampled matrix counts with its symmetric part;
            while it is not positive definite, log Z is NaN.
        loc: ``(d,)`` or one number, the mean.

    Raises:
        EnergyError: for a precision that is not square, symmetric and positive definite, and a mean of another length.

    Example:
        >>> energy = GaussianGraphicalModel(jnp.array([[2.0, 0.5], [0.5, 1.0]]))
        >>> round(float(energy.log_partition()), 4)  # log(2 pi) - log(1.75) / 2
        1.5581

    References:
        Dempster, Covariance selection (1972); Besag, Spatial interaction and the statistical analysis of lattice systems
        (1974), for the conditionals.
    """

    linear_in = ("precision",)
    precision: Any
    loc: Any = 0.0

    def __init__(self, precision: ArrayLike, loc: ArrayLike = 0.0):
        owner = type(self).__name__
        precision = jnp.asarray(precision, float)
        if precision.ndim != 2 or precision.shape[0] != precision.shape[1] or not precision.size:
            raise EnergyError(f"{owner} needs a square precision, (d, d); got shape {precision.shape}.")
        if is_concrete(precision):
            _check(owner, np.asarray(precision, float))
        object.__setattr__(self, "precision", 0.5 * (precision + precision.T))
        object.__setattr__(self, "loc", as_parameters(owner, "loc", loc, precision.shape[:1]))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(d,)``."""
        return self.loc.shape

    def __call__(self, event: Shaped[Array, " d"]) -> Scalar:
        """Return the energy of one event."""
        x = as_floats(event) - self.loc
        return 0.5 * (x @ self.precision @ x)

    def conditional(self, event: Shaped[Array, " d"], index: Int[Array | np.ndarray, "..."] | None = None) -> dist.Normal:
        """Return the normal distribution of elements given all others."""
        index = np.arange(len(self.loc)) if index is None else index
        x, own = as_floats(event) - self.loc, self.precision[index, index]
        others = self.precision[index] @ x - own * x[index]
        return dist.Normal(self.loc[index] - others / own, 1 / jnp.sqrt(own))

    @property
    def num_terms(self) -> int:
        """1: log Z has a closed form."""
        return 1

    def log_partition(self) -> Scalar:
        """Return log Z by the Cholesky factor of the precision; NaN if the precision is not positive definite."""
        diagonal = jnp.diagonal(jnp.linalg.cholesky(self.precision))
        return 0.5 * len(self.loc) * np.log(2 * np.pi) - jnp.sum(jnp.log(diagonal))


def _check(owner: str, precision: Float[np.ndarray, "d d"]) -> None:
    check_finite(owner, "precision", precision)
    if np.abs(precision - precision.T).max() > 1e-5 * np.abs(precision).max():
        raise EnergyError(
            f"{owner} needs a symmetric precision; got a matrix that is not. Write 0.5 * (precision + precision.T)."
        )
    if not is_positive_definite(precision):
        raise EnergyError(
            f"{owner} needs a positive definite precision, or its log Z is infinite; its smallest eigenvalue is "
            f"{np.linalg.eigvalsh(precision).min():.3g}. Write factor @ factor.T + 0.1 * jnp.eye({len(precision)})."
        )
