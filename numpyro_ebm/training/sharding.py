"""Placement of a training on many devices: parameters are copied, or split over a second axis of the mesh."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.keys import is_key
from numpyro_ebm._core.sharding import Placement
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.estimators.state import Pool


@dataclasses.dataclass(frozen=True)
class TrainingPlacement(Placement):
    """Where the arrays of a training lie: its mesh may have a second axis, which splits parameters."""

    def of_parameter(self, shape: tuple[int, ...]) -> NamedSharding:
        """Return the sharding of a parameter: with a second axis its longest dimension is split, if that divides it."""
        if self.mesh.devices.ndim == 1 or not shape:
            return self.everywhere()
        longest = int(np.argmax(shape))
        if shape[longest] % self.mesh.devices.shape[1]:
            return self.everywhere()
        return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, self.mesh.axis_names[1]))

    def of_carry(self, carry: Any) -> Any:
        """Return the sharding of each array of a `Carry`: that of parameters also holds for their moments and averages."""
        split = lambda tree: jax.tree.map(lambda leaf: self.of_parameter(jnp.shape(leaf)), tree)  # noqa: E731
        optim_state, mutable = split(carry.svi.optim_state), self._of_state(carry.svi.mutable_state)
        svi = carry.svi._replace(optim_state=optim_state, mutable_state=mutable, rng_key=self.everywhere())
        return carry._replace(svi=svi, average=split(carry.average), rate=self._of_state(carry.rate))

    def _of_state(self, state: PyTree) -> PyTree:
        """Return the sharding of the state of estimators: persistent chains are split like rows."""

        def of(leaf: Any) -> Any:
            if isinstance(leaf, Pool):
                return jax.tree.map(lambda each: self.of_rows(each.shape), leaf)
            return self.everywhere()

        return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, Pool))

    def put(self, carry: PyTree) -> PyTree:
        """Return the same arrays on the devices.

        Raises:
            EnergyError: for persistent chains that cannot be split evenly.
        """
        for pool in jax.tree.leaves(carry, is_leaf=lambda leaf: isinstance(leaf, Pool)):
            if isinstance(pool, Pool) and len(pool.age) % self.num_parts:
                raise EnergyError(
                    f"{len(pool.age)} persistent chains cannot be split evenly over {self.num_parts} devices. Write a "
                    f"multiple of the batch size, num_chains= or buffer_size={self.next_multiple(len(pool.age))}."
                )
        where = self.of_carry(carry)
        if jax.process_count() == 1:
            return jax.device_put(carry, where)
        is_there = jax.tree.map(lambda leaf, its: leaf.sharding.is_equivalent_to(its, leaf.ndim), carry, where)
        # A compiled copy: keys cannot be put on the devices of other processes, which all hold the same values here.
        return carry if all(jax.tree.leaves(is_there)) else jax.jit(lambda tree: tree, out_shardings=where)(carry)

    def keep(self, carry: PyTree) -> PyTree:
        """Return the carry with its arrays where they were: a constraint on a compiled program."""
        constrain = lambda leaf, where: leaf if is_key(leaf) else jax.lax.with_sharding_constraint(leaf, where)  # noqa: E731
        return jax.tree.map(constrain, carry, self.of_carry(carry))

    def put_constants(self, arrays: Iterable[Array]) -> list[Array]:
        """Return the arguments of a model on the devices, split along their first axis where that divides it.

        How an array is split changes no result, so that one that holds no rows may be split as well.
        """
        return [jax.device_put(each, self.of_rows(each.shape)) for each in arrays]

    def put_rows(self, stacked: Shaped[np.ndarray, "updates rows ..."]) -> Array:
        """Return the rows of several updates on the devices, each update's rows split over them."""
        return jax.device_put(stacked, self.of_rows(stacked.shape, axis=1))

    def check_divides(self, arrays: Iterable[Array | np.ndarray], *, are_batches: bool) -> None:
        """Refuse rows that cannot be split evenly: every device would compute all of them.

        Args:
            arrays: those of a batch, or the arguments of `fit`, of which some need not hold rows.
            are_batches: which of the two.

        Raises:
            EnergyError: with what to write.
        """
        lengths = [each.shape[0] for each in arrays if each.shape]
        if any(length % self.num_parts == 0 for length in lengths):
            return
        if not are_batches:
            raise EnergyError(
                f"Arguments of the lengths {lengths} cannot be split evenly over {self.num_parts} devices. Write batches=x "
                "with a batch_size that is a multiple of their number, or leave out some rows."
            )
        raise EnergyError(
            f"Batches of {lengths[0]} rows cannot be split evenly over {self.num_parts} devices. Write "
            f"batch_size={self.next_multiple(lengths[0])}, or pad the batches and mask the rows that were added: "
            "numpyro.handlers.mask(mask=is_row)."
        )
