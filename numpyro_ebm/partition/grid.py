"""Log Z by the trapezoidal rule."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.trapezoid import check_edge_shapes, check_edges, log_integral
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate

NUM_POINTS = {1: 2001, 2: 501, 3: 121}
"""Default points per dimension: 2001, 251001 and 1.8 million points in all."""
LARGEST_ERROR = 1e-2
"""In nats, hence 1 % of Z: a larger error means that the grid is too small or too coarse."""


@dataclasses.dataclass(frozen=True)
class Grid(AbstractPartition):
    """The trapezoidal rule on a grid in unconstrained space, in one to three dimensions.

    For a smooth density that has faded at the edges, its error falls faster than any power of the spacing. What lies beyond
    an edge is extrapolated. Let ``m`` be the marginal density at the edge of a coordinate and ``r`` the rate at which its
    logarithm falls over the last twentieth of the box. An exponential tail has the mass ``m / r``, which is added to the
    value. A power law with this rate, at half a width ``h`` from its centre, has the exponent ``r h`` and the mass
    ``m h / (r h - 1)``, which is added to the error.

    The ``standard_error`` is the sum of this mass, of the difference from the grid of twice the spacing (far above the error
    of the finer one), and of the rounding error. A mode outside the box is not seen.

    Args:
        low: lower edge in unconstrained space (the event's own space if its support is the real line), one number or one per
            coordinate.
        high: upper edge.
        num_points: points per dimension, an odd number; None for 2001, 501 and 121 in 1, 2 and 3 dimensions.

    Raises:
        EnergyError: in more than 3 dimensions or on a discrete support, for edges out of order, and for an even number of
            points; if the density does not fall towards an edge, more than 0.01 of the integral may lie beyond the edges, or
            the two grids differ by more than 0.01.

    Example:
        ``log_partition(None, EnergyDistribution(lambda x: 2.0 * x**2), method="grid", low=-5.0, high=5.0)``

    References:
        Trefethen and Weideman, The exponentially convergent trapezoidal rule (2014).
    """

    name: ClassVar[str] = "grid"
    needs_key: ClassVar[bool] = False
    unfinished: ClassVar[str] = (
        "The density has not faded at the edges of the grid, so that more than 0.01 of it may lie beyond them, or the grid "
        "is too coarse for it. Write low=..., high=... further out, or closer if the mass lies within a few points, or a "
        "larger num_points=...; if energies are in the thousands, subtract a constant or compute in 64 bits."
    )
    low: Any = -10.0
    high: Any = 10.0
    num_points: int | None = None

    def __post_init__(self):
        check_edges(type(self).__name__, self.low, self.high, self.num_points)

    def check(self, distribution):
        """Check that the event fits a grid, and raise otherwise."""
        super().check(distribution)
        if distribution.is_discrete:
            raise EnergyError(f"The support {distribution.support} is discrete. Write method='enumerate'.")
        size = math.prod(distribution.unconstrained_shape)
        if size not in NUM_POINTS:
            raise EnergyError(f"A grid holds 1 to 3 dimensions; this event has {size}. Write method='ais' or 'smc'.")
        check_edge_shapes("Grid", self.low, self.high, size)

    def estimate(self, rng_key: PRNGKey | None, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the sum over the points, where edges count by halves."""
        shape = densities.distribution.unconstrained_shape
        size = math.prod(shape)
        low, high = (jnp.broadcast_to(jnp.asarray(edge, float), (size,)) for edge in (self.low, self.high))
        num = self.num_points or NUM_POINTS[size]
        integral = log_integral(densities.log_target, shape, low, high, num)
        return Estimate(integral.log_value, integral.error, jnp.full((), jnp.inf), integral.error < LARGEST_ERROR)


jax.tree_util.register_dataclass(Grid, data_fields=["low", "high"], meta_fields=["num_points"])
