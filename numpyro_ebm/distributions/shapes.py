"""Shapes of rows: of contexts in plates, of data against a batch shape, and those that ``vmap`` or ``scan`` add."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType
from jax.typing import ArrayLike
from numpyro.distributions import Distribution, ExpandedDistribution, Independent
from numpyro.distributions.batch_util import promote_batch_shape

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.numpyro_stack import plates_shape
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.distributions.blocks import Product

Shape = tuple[int, ...]
V = TypeVar("V", bound=ArrayLike)


def as_shape(name: str, shape: object) -> Shape:
    """Return a shape as a tuple of sizes.

    Raises:
        EnergyError: for anything else.
    """
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int | np.integer) and n >= 0 for n in shape):
        raise EnergyError(f"{name} needs a tuple of sizes, e.g. {name}=(3,); got {shape!r}.")
    return tuple(int(n) for n in shape)


def is_shared(context: PyTree) -> bool:
    """Return whether all leaves of a context are scalars, which all rows share."""
    return all(jnp.ndim(leaf) == 0 for leaf in jax.tree.leaves(context))


def check_context(context: PyTree, batch_shape: Shape) -> None:
    """Refuse a context whose leaves do not lead with ``batch_shape``.

    Raises:
        EnergyError: with the shape of the leaf.
    """
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[: len(batch_shape)] != batch_shape:
            raise EnergyError(
                f"Each leaf of context must lead with batch_shape={batch_shape}; got a leaf of shape {jnp.shape(leaf)}. "
                f"Write context=context, batch_shape={jnp.shape(leaf)[:1]} in the distribution."
            )


def rows_of_plates(context: PyTree) -> tuple[PyTree, Shape]:
    """Return a context with one entry per row of the enclosing plates, and the rows' shape; scalars are repeated.

    Outside plates, or if all leaves are scalars, all rows share the context and the shape is ().

    Raises:
        EnergyError: for a leaf that does not lead with the plates.
    """
    rows = plates_shape()
    if not rows or is_shared(context):
        return context, ()

    def lead(leaf):
        own = jnp.shape(leaf)
        if own and not (len(own) >= len(rows) and all(n in (1, size) for n, size in zip(own, rows, strict=False))):
            raise EnergyError(
                f"The context has a leaf of shape {own} inside plates of shape {rows}, so it is not clear which entry "
                f"belongs to which row. For one entry per row, each leaf must lead with {rows}: subsample it with "
                "numpyro.subsample(context, event_dim=...), or give the shape of its rows, e.g. "
                f"EnergyDistribution(..., context=context, batch_shape={own[:1]}). For a context that all rows share write "
                "batch_shape=()."
            )
        return jnp.broadcast_to(leaf, rows + own[len(rows) :])

    return jax.tree.map(lead, context), rows


def check_told(context: PyTree, lead: Shape) -> None:
    """Refuse a context without ``batch_shape`` that may have one entry per row of the data or be shared by all rows.

    Raises:
        EnergyError: with both ways to write it.
    """
    for leaf in jax.tree.leaves(context):
        own = jnp.shape(leaf)
        if own and lead and own[0] == lead[-1] != 1:
            raise EnergyError(
                f"The context has a leaf of shape {own}, the data have {lead[-1]} rows, and no plate says whether each row "
                f"has its own entry. Write EnergyDistribution(..., context=context, batch_shape=({own[0]},)) if it does, or "
                "batch_shape=() if all rows share the context."
            )


def rows_of_data(shape: Shape, batch_shape: Shape, event_shape: Shape) -> Shape:
    """Return the shape of a site's rows: that of its data, broadcast with its distribution's batch shape.

    Raises:
        EnergyError: if a column would be broadcast against all rows.
        ValueError: if the shapes do not broadcast.
    """
    lead = shape[: len(shape) - len(event_shape)]
    rows = jnp.broadcast_shapes(lead, batch_shape)
    if len(lead) > len(batch_shape) and lead[-1] == 1:
        is_column = not event_shape and batch_shape[-1:] != (1,)
        if is_column or rows != lead:
            wanted = lead[:-1] + event_shape
            raise EnergyError(
                f"Data of shape {shape} are a column, and the event has shape {event_shape}: broadcast to rows of shape "
                f"{batch_shape or lead[:-1]}, each value would count once per row. The data need shape {wanted}: write "
                f"x[:, 0] for x; or, for events that are vectors of one element, event_shape={(1, *event_shape)} in the "
                "distribution."
            )
    return rows


def check_mesh(value: Array) -> None:
    """Refuse data that are sharded over a mesh with explicit axes.

    Raises:
        EnergyError: with the mesh to write.
    """
    sharding: Any = jax.typeof(value).sharding
    mesh = sharding.mesh
    if AxisType.Explicit in mesh.axis_types and any(each is not None for each in sharding.spec):
        raise EnergyError(
            f"The data are sharded over a mesh with explicit axes ({sharding.spec}), which require a sharding for the "
            "result of every gather and reshape; estimators leave that to the compiler. Write jax.make_mesh("
            f"{tuple(mesh.axis_sizes)}, {tuple(mesh.axis_names)}, axis_types=(jax.sharding.AxisType.Auto,) * "
            f"{len(mesh.axis_names)})."
        )


def widen(value: V, *, booleans: bool = True) -> V | Array:
    """Return narrow integers (and booleans) as the default integer type, in which an energy does not overflow.

    Random keys and floating-point values are returned unchanged.
    """
    dtype = jnp.result_type(value)
    is_narrow = jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize < 4
    return jnp.asarray(value).astype(int) if is_narrow or (booleans and jnp.issubdtype(dtype, jnp.bool_)) else value


def insert_ones(leaf: ArrayLike, position: int, number: int) -> Array:
    """Insert ``number`` dimensions of size 1 at a position of a leaf's shape."""
    leaf = jnp.asarray(leaf)
    return jnp.reshape(leaf, leaf.shape[:position] + (1,) * number + leaf.shape[position:]) if number else leaf


def repeat(leaf: ArrayLike, own_ndim: int, batch_shape: Shape) -> Array:
    """Broadcast the rows of a leaf, its first ``own_ndim`` dimensions, to ``batch_shape``."""
    event = jnp.shape(leaf)[own_ndim:]
    return jnp.broadcast_to(insert_ones(leaf, 0, len(batch_shape) - own_ndim), batch_shape + event)


def all_arrays(tree: PyTree) -> bool:
    """Return whether every leaf holds values; JAX also rebuilds pytrees around shapes and placeholders."""
    return all(isinstance(leaf, np.ndarray | jax.Array | Tracer | float | int) for leaf in jax.tree.leaves(tree))


def stack_base(base: Distribution, num: int, shape: Shape) -> Distribution:
    """Return a base whose arrays have ``num`` leading dimensions from ``vmap`` or ``scan`` with these in its batch shape.

    Args:
        base: a NumPyro distribution, with the batch shape of one step.
        num: number of new leading dimensions, the first of ``shape``.
        shape: the batch shape to which the result broadcasts.

    Raises:
        EnergyError: for a distribution that NumPyro cannot promote.
    """
    if isinstance(base, Product):
        return Product(base.names, [stack_base(part, num, shape) for part in base.parts])
    if isinstance(base, Independent):
        taken = base.reinterpreted_batch_ndims
        return stack_base(base.base_dist, num, shape + tuple(base.event_shape[:taken])).to_event(taken)
    if not jax.tree.leaves(base):
        return base
    missing = len(shape) - num - len(base.batch_shape)
    wanted = shape[:num] + (1,) * missing + tuple(base.batch_shape)
    if isinstance(base, ExpandedDistribution):
        return stack_base(base.base_dist, num, shape).expand(wanted)
    promoted = promote_batch_shape(jax.tree.map(lambda leaf: insert_ones(leaf, num, missing), base))
    if promoted.batch_shape != wanted:
        raise EnergyError(
            f"A base {type(base).__name__} cannot be stacked by scan or vmap. Write it without parameters that change "
            "with the step, or as a parametric distribution such as numpyro.distributions.Normal(loc, scale).to_event(1)."
        )
    return promoted
