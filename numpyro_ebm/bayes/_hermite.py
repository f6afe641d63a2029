"""Cubic Hermite interpolation on a regular grid in one to three dimensions."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.typing import Array, Scalar

ODD_PART = 0.143
"""Largest value of ``t^2 (1 - t)^2 (2 t - 1)`` in units of its slope at 1/2: ``16 / 5^{5/2}`` of 1/8 and 1/8."""


class Axis(NamedTuple):
    """The nodes of one coordinate.

    Attributes:
        low: the lowest node.
        step: distance of neighbours.
        num: number of nodes.
    """

    low: float
    step: float
    num: int

    @property
    def high(self) -> float:
        """The highest node."""
        return self.low + (self.num - 1) * self.step

    @property
    def nodes(self) -> Float[Array, " nodes"]:
        """The nodes."""
        return self.low + self.step * jnp.arange(self.num)

    @property
    def coarser(self) -> "Axis":
        """Every second node."""
        return Axis(self.low, 2 * self.step, (self.num + 1) // 2)


def derivatives(
    axes: tuple[Axis, ...], values: Float[Array, "*nodes"], slopes: Float[Array, " num_axes *nodes"]
) -> Float[Array, "..."]:
    """Return the derivatives at the nodes from which `interpolate` builds its cubics, ``(2, ..., 2, *nodes)``.

    An index of 1 in one of the first dimensions stands for the derivative along that axis. Mixed derivatives are means of
    the finite differences of the slopes; their error, of second order in the spacing, changes an interpolated value in
    fourth order only.

    Args:
        axes: the nodes along each axis.
        values: values at the nodes.
        slopes: derivatives along each axis at the nodes.
    """
    num = len(axes)

    def of(orders):
        along = [k for k in range(num) if orders[k]]
        if not along:
            return values
        each = []
        for first in along:
            mixed = slopes[first]
            for other in along:
                mixed = mixed if other == first else _difference(mixed, other, axes[other].step)
            each.append(mixed)
        return sum(each) / len(each)

    tables = [of(orders) for orders in itertools.product((0, 1), repeat=num)]
    return jnp.stack(tables).reshape(*(2,) * num, *values.shape)


def interpolate(axes: tuple[Axis, ...], table: Float[Array, "..."], point: Float[Array, " axes"]) -> Scalar:
    """Return the value at a point inside the grid, by cubics that agree with values and slopes at the nodes.

    Args:
        axes: the nodes along each axis.
        table: `derivatives`.
        point: the coordinates.
    """
    num = len(axes)
    places = [_place(axis, point[k]) for k, axis in enumerate(axes)]
    block = jax.lax.dynamic_slice(table, (0,) * num + tuple(cell for cell, _ in places), (2,) * num + (2,) * num)
    for k, (_, share) in enumerate(places):  # axis by axis: orders are in front, nodes behind
        block = jnp.tensordot(_weights(share, axes[k].step), block, axes=((0, 1), (0, num - k)))
    return block


def leave_out_errors(
    axes: tuple[Axis, ...], values: Float[Array, "*nodes"], slopes: Float[Array, " num_axes *nodes"]
) -> Float[Array, "*nodes"]:
    """Return bounds on the error, around each node, of an interpolation from every second node along each axis.

    A node that is left out lies at the middle of a cell, where the odd part of the error vanishes. Its largest value
    follows from the error of the slope there. Each node gets the largest error among itself and its neighbours.
    """
    every = (slice(None, None, 2),) * len(axes)
    coarse = tuple(axis.coarser for axis in axes)
    table = derivatives(coarse, values[every], slopes[(slice(None), *every)])
    points = jnp.stack(jnp.meshgrid(*(axis.nodes for axis in axes), indexing="ij"), axis=-1).reshape(-1, len(axes))
    found, gradients = jax.vmap(jax.value_and_grad(lambda point: interpolate(coarse, table, point)))(points)
    steps = jnp.asarray([axis.step for axis in coarse])
    odd = ODD_PART * jnp.abs(gradients - slopes.reshape(len(axes), -1).T) @ steps
    errors = jnp.abs(found - values.reshape(-1)) + odd
    around = (3,) * len(axes)
    return jax.lax.reduce_window(errors.reshape(values.shape), -jnp.inf, jax.lax.max, around, (1,) * len(axes), "SAME")


def largest_of_cell(axes: tuple[Axis, ...], table: Float[Array, "*nodes"], point: Float[Array, " axes"]) -> Scalar:
    """Return the largest value of a table at the corners of the cell around a point."""
    cells = tuple(_place(axis, point[k])[0] for k, axis in enumerate(axes))
    return jnp.max(jax.lax.dynamic_slice(table, cells, (2,) * len(axes)))


def _place(axis: Axis, x: Scalar) -> tuple[Int[Array, ""], Scalar]:
    """Return the cell of a coordinate, and its place within the cell between 0 and 1."""
    scaled = (x - axis.low) / axis.step
    cell = jnp.clip(jnp.floor(jax.lax.stop_gradient(scaled)), 0, axis.num - 2)
    return cell.astype(int), scaled - cell


def _weights(share: Scalar, step: float) -> Float[Array, "orders=2 nodes=2"]:
    """Return the weights of values and slopes of both nodes of a cell."""
    t, back = share, 1 - share
    return jnp.stack(
        [
            jnp.stack([back**2 * (1 + 2 * t), t**2 * (3 - 2 * t)]),
            step * jnp.stack([t * back**2, -(t**2) * back]),
        ]
    )


def _difference(values: Float[Array, "*nodes"], axis: int, step: float) -> Float[Array, "*nodes"]:
    """Return differences of second order: central ones inside, one-sided ones at the ends."""
    v = jnp.moveaxis(values, axis, 0)
    inside = (v[2:] - v[:-2]) / 2
    first, last = (-3 * v[0] + 4 * v[1] - v[2]) / 2, (3 * v[-1] - 4 * v[-2] + v[-3]) / 2
    return jnp.moveaxis(jnp.concatenate([first[None], inside, last[None]]), 0, axis) / step
