"""Log Z by the trapezoidal rule."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._errors import EnergyError, check_count, is_concrete
from numpyro_ebm.partition._base import AbstractPartition, Estimate

NUM_POINTS = {1: 2001, 2: 501, 3: 121}
AT_ONCE = 2**14
LARGEST_EDGE = 1e-5
LARGEST_ERROR = 1e-2


@dataclasses.dataclass(frozen=True)
class Grid(AbstractPartition):
    r"""The trapezoidal rule on a grid in unconstrained space, in one to three dimensions.

    For a smooth density that has faded at the edges its error falls faster than any power of the spacing. The
    ``standard_error`` is the difference from the grid of twice the spacing, far above the error of the finer one, and the
    rounding of the numbers in use.

    Args:
        low: lower edge in unconstrained space (the event's own where its support is the real line), one number or one per
            coordinate.
        high: upper edge.
        num_points: points per dimension, an odd number; None for 2001, 501 and 121 in 1, 2 and 3 dimensions.

    Raises:
        EnergyError: in more than 3 dimensions or on a discrete support, for edges out of order, an even number of points;
            where the density has not faded at the edges (more than 1e-5 of the integral is in the outermost cells), or the
            two grids differ by more than 0.01.

    Example:
        ``log_partition(None, EnergyDistribution(lambda x: 2.0 * x**2), method="grid", low=-5.0, high=5.0)``

    References:
        Trefethen and Weideman, The exponentially convergent trapezoidal rule (2014).
    """

    name: ClassVar[str] = "grid"
    needs_key: ClassVar[bool] = False
    unfinished: ClassVar[str] = (
        "The density has not faded at the edges of the grid, or the grid is too coarse for it. Write low=..., high=... "
        "further out, or nearer where everything lies within a few points, or num_points=... for more of them; where "
        "energies are in the thousands, take a constant out of them or compute in 64 bits."
    )
    low: Any = -10.0
    high: Any = 10.0
    num_points: int | None = None

    def __post_init__(self):
        if is_concrete(self.low, self.high) and not np.all(np.asarray(self.low) < np.asarray(self.high)):
            raise EnergyError(
                f"Grid needs low < high; got low={self.low!r}, high={self.high!r}. Write low=-10.0, high=10.0."
            )
        if self.num_points is not None:
            check_count(type(self).__name__, "num_points", self.num_points, 5)
            if self.num_points % 2 == 0:
                raise EnergyError(f"Grid compares itself with every second point. Write num_points={self.num_points + 1}.")

    def check(self, distribution):
        """Refuse what a grid cannot hold."""
        super().check(distribution)
        if distribution.is_discrete:
            raise EnergyError(f"The support {distribution.support} is discrete. Write method='enumerate'.")
        size = math.prod(distribution.unconstrained_shape)
        if size not in NUM_POINTS:
            raise EnergyError(f"A grid holds 1 to 3 dimensions; this event has {size}. Write method='ais' or 'smc'.")
        for name in ("low", "high"):
            shape = jnp.shape(getattr(self, name))
            if shape not in ((), (size,)):
                raise EnergyError(f"Grid needs {name} as one number or {size}; got shape {shape}.")

    def estimate(self, rng_key, densities, starts, draws) -> Estimate:
        """Log of the sum over the points, edges counted by halves."""
        shape = densities.distribution.unconstrained_shape
        size = math.prod(shape)
        num = self.num_points or NUM_POINTS[size]
        low, high = (jnp.broadcast_to(jnp.asarray(edge, float), (size,)) for edge in (self.low, self.high))
        step = (high - low) / (num - 1)
        places = num ** np.arange(size)

        def point(index):
            which = index // places % num
            log_p = densities.log_target((low + which.astype(low.dtype) * step).reshape(shape))
            is_edge = (which == 0) | (which == num - 1)
            log_weight = jnp.sum(jnp.log(step)) - jnp.sum(is_edge, dtype=float) * math.log(2)
            is_even = jnp.all(which % 2 == 0)
            return log_p + log_weight, is_even, jnp.any((which <= 1) | (which >= num - 2))

        def block(carry, first):
            index = first + jnp.arange(min(AT_ONCE, num**size))
            values, is_even, is_edge = jax.vmap(point)(index)
            values = jnp.where(index < num**size, values, -jnp.inf)
            parts = (values, jnp.where(is_even, values + size * math.log(2), -jnp.inf), jnp.where(is_edge, values, -jnp.inf))
            return tuple(jnp.logaddexp(c, jax.nn.logsumexp(p)) for c, p in zip(carry, parts, strict=True)), None

        nothing = (jnp.asarray(-jnp.inf, float),) * 3
        (fine, coarse, edge), _ = jax.lax.scan(block, nothing, jnp.arange(0, num**size, AT_ONCE))
        error = jnp.abs(fine - coarse)
        is_finished = (edge - fine < math.log(LARGEST_EDGE)) & (error < LARGEST_ERROR)
        return Estimate(fine, error, jnp.full((), jnp.inf), is_finished)


jax.tree_util.register_dataclass(Grid, data_fields=["low", "high"], meta_fields=["num_points"])
