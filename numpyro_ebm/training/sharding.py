"""Many devices: rows and chains are split over the first axis of a mesh, parameters are copied or split over a second."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.keys import is_key
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.estimators.state import Pool


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the arrays of a training lie.

    Attributes:
        mesh: devices, whose first axis splits rows and chains, and whose second, if any, splits parameters.
    """

    mesh: Mesh

    @property
    def num_parts(self) -> int:
        """Number of parts of rows and chains."""
        return self.mesh.devices.shape[0]

    def everywhere(self) -> NamedSharding:
        """Return the sharding of what each device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def of_rows(self, shape: tuple[int, ...], axis: int = 0) -> NamedSharding:
        """Return the sharding of rows or chains along an axis; of fewer than can be split, that of whole arrays."""
        if len(shape) <= axis or shape[axis] % self.num_parts:
            return self.everywhere()
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.mesh.axis_names[0]))

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
                    f"multiple of the batch size, num_chains= or buffer_size={self._next(len(pool.age))}."
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

    def gathered(self, tree: PyTree) -> PyTree:
        """Return arrays that each device has whole, so that every process can read them: a constraint on a program."""
        return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, self.everywhere()), tree)

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
            f"batch_size={self._next(lengths[0])}, or pad the batches and mask the rows that were added: "
            "numpyro.handlers.mask(mask=is_row)."
        )

    def _next(self, number: int) -> int:
        return -(-number // self.num_parts) * self.num_parts


def readable(array: Any) -> Any:
    """Return an array that this process can read whole."""
    is_here = not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
    return array if is_here else multihost_utils.process_allgather(array, tiled=True)


def placement_of(sharding: Any) -> Placement | None:
    """Return the placement for ``sharding`` of `fit`: a mesh, a number of devices, or None.

    Raises:
        EnergyError: for more devices than there are, and a mesh of more than two axes.
        TypeError: for anything else.
    """
    if sharding is None:
        return None
    if isinstance(sharding, Mesh):
        if sharding.devices.ndim > 2:
            raise EnergyError(
                f"sharding= needs a mesh of one axis (rows and chains) or two (and parameters); got {sharding.axis_names}."
            )
        return Placement(Mesh(sharding.devices, sharding.axis_names))  # of automatic axes, whatever they were
    if isinstance(sharding, bool) or not isinstance(sharding, int):
        raise TypeError(f"sharding= needs a jax.sharding.Mesh or a number of devices; got {type(sharding).__name__}.")
    devices = jax.devices()
    if not 1 <= sharding <= len(devices):
        raise EnergyError(
            f"sharding={sharding} devices, and there are {len(devices)}. On CPU start Python with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={sharding}, to try it out."
        )
    return Placement(Mesh(np.array(devices[:sharding]), ("rows",)))
