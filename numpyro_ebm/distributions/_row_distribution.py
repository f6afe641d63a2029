"""Distributions over rows, to which ``expand``, plates, ``jax.vmap`` and NumPyro's ``scan`` add more rows."""

import copy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.util import _is_under_jax_transform

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.programs import Program
from numpyro_ebm._core.pytrees import FunctionOfRow, Structure, assemble, dismantle, hoist
from numpyro_ebm._core.typing import PyTree
from numpyro_ebm.distributions.shapes import (
    all_arrays,
    as_shape,
    check_context,
    check_told,
    insert_ones,
    is_shared,
    repeat,
    rows_of_data,
    rows_of_plates,
    stack_base,
)


class RowDistribution(dist.Distribution):
    """A distribution whose rows may differ in context and base, and may be expanded to more rows that share these.

    ``expand`` and plates add rows that share context and base. ``jax.vmap`` and NumPyro's ``scan`` give all arrays new
    leading dimensions, which become part of the batch shape when the pytree is rebuilt. NumPyro's own distributions infer
    their batch shape from their parameters for that; here an empty array with the shape of the rows records it.

    Attributes:
        context: pytree of covariates, one entry per row, or None; leaves lead with the rows that differ.
        base: a NumPyro distribution of the rows, or None.
    """

    pytree_data_fields = ("context", "base", "_function_arrays", "_sampler_arrays", "_row_marker")
    pytree_aux_fields = ("_own_shape", "_is_told", "_function_structure")

    def _place(self, context: PyTree, batch_shape: tuple[int, ...] | None) -> None:
        """Set the context and the shape of the rows that differ in it: as given, or that of the enclosing plates."""
        self._is_told = batch_shape is not None or context is None
        if batch_shape is None:
            context, batch_shape = rows_of_plates(context)
        batch_shape = as_shape("batch_shape", batch_shape)
        check_context(context, batch_shape)
        self.context = context
        self._set_own(batch_shape)

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Flatten as NumPyro does; under a JAX transform, with the traced values that the function closes over as arrays."""
        new = self._hoisted() if _is_under_jax_transform() else self
        return super(RowDistribution, new).tree_flatten()

    @classmethod
    def tree_unflatten(cls, aux_data: tuple[Any, ...], params: tuple[Any, ...]) -> "RowDistribution":
        """Unflatten as NumPyro does; leading dimensions that were added to all arrays become rows."""
        new: Any = super().tree_unflatten(aux_data, params)
        new._take_up_rows()
        return new

    def expand(self, batch_shape: Sequence[int]) -> Any:
        """Expand to more rows, which share context and base; a context without ``batch_shape`` takes the plates' rows."""
        batch_shape = tuple(batch_shape)
        new = self if self._is_told or self.batch_shape else self._placed()
        if new is not self:
            batch_shape = jnp.broadcast_shapes(batch_shape, new.batch_shape)
        if batch_shape == new.batch_shape:
            return new
        if jnp.broadcast_shapes(new.batch_shape, batch_shape) != batch_shape:
            raise ValueError(f"Cannot broadcast distribution of shape {new.batch_shape} to shape {batch_shape}")
        new = copy.copy(new)
        new._batch_shape = batch_shape
        return new

    def _placed(self) -> "RowDistribution":
        """Return a copy whose context has one entry per row of the enclosing plates."""
        context, shape = rows_of_plates(self.context)
        if not shape:
            return self
        new = copy.copy(self)
        new.context = context
        new._batch_shape = jnp.broadcast_shapes(shape, self.batch_shape)
        new._set_own(new._batch_shape)
        return new

    def alone(self) -> Any:
        """Return the distribution without the rows that `expand` and plates added."""
        if self._own_shape == self.batch_shape:
            return self
        new = copy.copy(self)
        new._batch_shape = self._own_shape
        return new

    def rows_of_site(self, shape: tuple[int, ...], batch_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the rows for data of this shape at a site with ``batch_shape``.

        Raises:
            EnergyError: for a column of scalars, and for a context that may be shared or have one entry per row.
            ValueError: if the shapes do not broadcast.
        """
        rows = rows_of_data(shape, batch_shape, self.event_shape)
        if not (self._is_told or self._own_shape or is_shared(self.context)):
            check_told(self.context, rows)
        return rows

    def _spread_over(self, shape: tuple[int, ...]) -> None:
        """Broadcast to the rows of the base as well, the context included."""
        if shape != self._own_shape and not self._is_told and not is_shared(self.context):
            check_told(self.context, shape)
        num = len(self._own_shape)
        self.context = jax.tree.map(lambda leaf: repeat(leaf, num, shape), self.context)
        self._set_own(shape)

    def _set_own(self, shape: tuple[int, ...]) -> None:
        # Empty, with only the rows' dimensions: a change of dimensions that applies to all arrays shows in its shape.
        self._own_shape, self._row_marker = shape, np.zeros((*shape, 0), np.float32)

    def _take_up_rows(self) -> None:
        """Update the shapes after leading rows were added to, or removed from, all arrays."""
        marked = getattr(self._row_marker, "shape", None)
        if marked is None or marked[:-1] == self._own_shape:
            return
        num = len(marked) - 1 - len(self._own_shape)
        if num < 0 and self.batch_shape == self._own_shape:
            self._batch_shape = marked[:-1]
            self._set_own(marked[:-1])
            return
        if num <= 0 or marked[num:-1] != self._own_shape:
            raise EnergyError(
                f"{type(self).__name__}: its arrays were reshaped from rows {self._own_shape} of {self.batch_shape} to "
                f"{marked[:-1]}. Write jax.vmap and scan around the constructor, and mask or expand inside them."
            )
        missing = len(self.batch_shape) - len(self._own_shape)
        self._batch_shape = marked[:num] + self.batch_shape
        self._set_own(marked[:num] + (1,) * missing + self._own_shape)
        if all_arrays((self.context, self.base)):
            self._stack(num, missing)

    def _stack(self, num: int, missing: int) -> None:
        """Align context and base, which have ``num`` new leading rows, with the batch shape; all rows share one sampler."""
        self.context = jax.tree.map(lambda leaf: insert_ones(leaf, num, missing), self.context)
        self.base = None if self.base is None else stack_base(self.base, num, self._own_shape)
        self._sampler_arrays = jax.tree.map(lambda leaf: leaf[(0,) * num], self._sampler_arrays)
        self._function_arrays, self._function_structure = self._by_row(self._function_arrays, self._function_structure, num)

    def _hoisted(self) -> "RowDistribution":
        """Return a copy whose arrays include the traced values that its function closes over."""
        new = copy.copy(self)
        new._function_arrays, new._function_structure = self._hoist(self._function_arrays, self._function_structure)
        return new

    def _hoist(self, arrays: list[Any], structure: Structure) -> tuple[list[Any], Structure]:
        if isinstance(assemble(arrays, structure), Program):  # a Program closes over nothing
            return arrays, structure
        event = jax.ShapeDtypeStruct(self.event_shape, jnp.result_type(int if self.is_discrete else float))
        num = len(self._own_shape)
        context = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[num:], jnp.result_type(leaf)), self.context)
        return hoist(arrays, structure, event) if self.context is None else hoist(arrays, structure, event, context)

    def _by_row(self, arrays: list[Any], structure: Structure, num: int) -> tuple[list[Any], Structure]:
        """Move the function's arrays, which have ``num`` new leading rows, to the context, so that each row has its own."""
        if not arrays:
            return arrays, structure
        missing = len(self._own_shape) - num
        own = [repeat(insert_ones(a, num, missing), len(self._own_shape), self._own_shape) for a in arrays]
        function = FunctionOfRow(structure, has_context=self.context is not None)
        self.context, self._is_told = (own, self.context), True
        return dismantle(function)


@promote_batch_shape.register(RowDistribution)  # pyright: ignore[reportArgumentType, reportCallIssue]
def _promote(d: RowDistribution) -> RowDistribution:
    return d  # tree_unflatten has already added its rows
