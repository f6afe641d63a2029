"""log Z of the rows of a site in one to three continuous dimensions, by the trapezoidal rule."""

import dataclasses
import math
import warnings
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.numpyro_stack import is_mcmc
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.trapezoid import Integral, check_edge_shapes, log_integral
from numpyro_ebm._core.typing import Array, PyTree, RowValues
from numpyro_ebm.distributions.site import Site

NUM_POINTS = {1: 1001, 2: 201, 3: 61}
"""Default points per dimension: 1001, 40401 and 226981 energies per update."""
LARGEST_ERROR = 1e-3
"""In nats per row: a larger error of log Z means that the box is too small or the grid too coarse."""
MARGIN = 10.0
"""Standard deviations of the batch by which the default box goes beyond its rows."""


@dataclasses.dataclass(frozen=True)
class Box:
    """A grid of points in unconstrained space.

    Attributes:
        low: lower edges, one number or one per coordinate; None for `MARGIN` standard deviations below the lowest row.
        high: upper edges; None for the same above the highest row.
        num_points: points per dimension; None for `NUM_POINTS`.
    """

    low: Any
    high: Any
    num_points: int | None

    def check(self, owner: str, site: Site) -> None:
        """Check that an event fits a grid, and raise otherwise.

        Raises:
            EnergyError: for more than three dimensions, and for edges of another shape.
        """
        size = math.prod(site.distribution.unconstrained_shape)
        if size not in NUM_POINTS:
            raise EnergyError(
                f"A grid holds 1 to 3 dimensions, and this event has {size}. Write estimate(model, 'sm'), estimate(model, "
                "'nce') or estimate(model, 'pcd')."
            )
        check_edge_shapes(owner, self.low, self.high, size)

    def log_partition(self, site: Site) -> tuple[Float[Array, "*batch"], Bool[Array, "*batch"]]:
        """Return log Z, one for all rows or one for each, and whether the grid covers the density."""
        shape = site.distribution.unconstrained_shape
        low, high = self._edges(site)
        num = self.num_points or NUM_POINTS[len(low)]

        def of_row(local: PyTree) -> Integral:
            return log_integral(lambda position: site.log_density(position, local), shape, low, high, num)

        if site.rows_differ:
            found = jax.lax.map(of_row, site.local)
        else:
            found = of_row(jax.tree.map(lambda leaf: leaf[0], site.local))
        missed = jax.lax.stop_gradient(found.log_value - found.log_grid)
        error = missed + found.error
        return found.log_grid, error < LARGEST_ERROR

    def _edges(self, site: Site) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
        rows = jax.lax.stop_gradient(site.position).reshape(site.num_rows, -1)
        size, beyond = rows.shape[1], MARGIN * or_one(site.spread).ravel()
        low = jnp.min(rows, axis=0) - beyond if self.low is None else self.low
        high = jnp.max(rows, axis=0) + beyond if self.high is None else self.high
        low, high = (jnp.broadcast_to(jnp.asarray(edge, float), (size,)) for edge in (low, high))
        return low, high


def where_covered(site: Site, values: RowValues, is_covered: Bool[Array, "*batch"]) -> RowValues:
    """Return values of rows whose density the grid covers, and complain where it does not.

    Under MCMC, NaN rejects parameters whose density the grid does not cover, with a warning; in training, it is an error.
    """
    misses = ~is_covered if site.mask is None else ~is_covered & site.mask
    complain = Told(_warn if is_mcmc() else _complain, (site.name,))
    is_any = jnp.any(misses)
    if not is_concrete(is_any):
        call_where_any(complain, is_any[None], ())
    elif is_any:
        complain(is_any, ())
    # As a factor, NaN makes the gradient NaN as well.
    return values * jnp.where(misses, jnp.nan, 1.0).astype(values.dtype)


def _words(name: str) -> str:
    return (
        f"At site '{name}': the grid of 'exact' does not cover the density: more than {LARGEST_ERROR} of it may lie beyond "
        "the edges, or the grid is too coarse for it. Write low=..., high=... (in unconstrained space) further out, a "
        "larger num_points=..., or initial values of the parameters nearer to the data."
    )


def _complain(name: str, *_: Any) -> NoReturn:
    error = EnergyError(_words(name))
    error.site = name
    raise error


def _warn(name: str, *_: Any) -> None:
    warnings.warn(f"{_words(name)} MCMC rejects such parameters.", stacklevel=2)
