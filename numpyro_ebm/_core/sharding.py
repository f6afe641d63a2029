"""Placement of rows and chains on the devices of a mesh."""

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.keys import as_numbers, from_numbers, is_key
from numpyro_ebm._core.typing import PyTree


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays lie: rows and chains are split over the first axis of a mesh.

    Attributes:
        mesh: the devices.
    """

    mesh: Mesh

    @classmethod
    def of(cls, sharding: Any) -> Self | None:
        """Return the placement for a user's ``sharding=``: a mesh, a number of devices, or None.

        Raises:
            EnergyError: for more devices than there are, and a mesh of more than two axes.
            TypeError: for anything else.
        """
        if sharding is None:
            return None
        if isinstance(sharding, Mesh):
            if sharding.devices.ndim > 2:
                raise EnergyError(
                    "sharding= needs a mesh of one axis (rows and chains) or two (and parameters); got "
                    f"{sharding.axis_names}."
                )
            return cls(Mesh(sharding.devices, sharding.axis_names))  # of automatic axes, whatever they were
        if isinstance(sharding, bool) or not isinstance(sharding, numbers.Integral):
            raise TypeError(f"sharding= needs a jax.sharding.Mesh or a number of devices; got {type(sharding).__name__}.")
        devices, num = jax.devices(), int(sharding)
        if not 1 <= num <= len(devices):
            raise EnergyError(
                f"sharding={num} devices, and there are {len(devices)}. On CPU start Python with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={num} NPROC={4 * num}, to try it out."
            )
        return cls(Mesh(np.array(devices[:num]), ("rows",)))

    @property
    def axis_name(self) -> str:
        """Name of the axis that splits rows and chains."""
        return self.mesh.axis_names[0]

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
        return NamedSharding(self.mesh, PartitionSpec(*[None] * axis, self.axis_name))

    def split(self, tree: PyTree) -> PyTree:
        """Return the same arrays, split along their first axis: a constraint on a compiled program."""
        return self._constrained(tree, lambda leaf: self.of_rows(leaf.shape))

    def gathered(self, tree: PyTree) -> PyTree:
        """Return arrays that each device has whole, so that every process can read them: a constraint on a program."""
        return self._constrained(tree, lambda leaf: self.everywhere())

    def on_each_part(
        self, function: Callable, *args: PyTree, whole: tuple[PyTree, ...] = (), gathers: bool = False
    ) -> PyTree:
        """Return ``function(*args, *whole)``, where each device computes the result for its own chains.

        Args:
            function: a function of parts of ``args`` and of the whole ``whole``, whose result leads with the chains.
            *args: pytrees that lead with the chains.
            whole: pytrees that each device has whole.
            gathers: whether each device gets the whole result.
        """
        split, copied = PartitionSpec(self.axis_name), PartitionSpec()
        in_specs = (*[split] * len(args), *[copied] * len(whole))
        own = (lambda *all_args: _all_gather(function(*all_args), self.axis_name)) if gathers else function
        out_specs = copied if gathers else split
        mapped = jax.shard_map(own, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*args, *whole)

    def check_count(self, owner: str, name: str, count: int, rows: int = 1) -> None:
        """Refuse a number of chains or draws for each row that cannot be split evenly.

        Raises:
            EnergyError: with the next number that can.
        """
        if count * rows % self.num_parts:
            each = "" if rows == 1 else f" for each of {rows} rows"
            raise EnergyError(
                f"{owner} cannot split {name}={count}{each} evenly over {self.num_parts} devices. Write "
                f"{name}={self.next_multiple(count, rows)}."
            )

    def next_multiple(self, number: int, rows: int = 1) -> int:
        """Return the smallest number from this on that can be split evenly, for each of so many rows."""
        step = self.num_parts // math.gcd(self.num_parts, rows)
        return -(-number // step) * step

    def _constrained(self, tree: PyTree, where: Callable) -> PyTree:
        # JAX constrains no arrays of random keys; they are small.
        constrain = lambda leaf: leaf if is_key(leaf) else jax.lax.with_sharding_constraint(leaf, where(leaf))  # noqa: E731
        return jax.tree.map(constrain, jax.tree.map(jnp.asarray, tree))


def _all_gather(tree: PyTree, axis_name: str) -> PyTree:
    """Return the arrays of all devices, joined along their first axis."""
    gather = lambda leaf: from_numbers(jax.lax.all_gather(as_numbers(leaf), axis_name, tiled=True), leaf)  # noqa: E731
    return jax.tree.map(gather, tree)


def key_of_each(rng_key: Any, num_chains: int, axis_name: str | None = None) -> Any:
    """Return a random key for each chain: inside `Placement.on_each_part`, those of the chains of this device.

    Args:
        rng_key: random key of the step.
        num_chains: number of chains of this device.
        axis_name: name of the axis that splits the chains; None if they are not split.
    """
    if axis_name is None:
        return jax.random.split(rng_key, num_chains)
    keys = jax.random.split(rng_key, num_chains * jax.lax.axis_size(axis_name))
    return jax.lax.dynamic_slice_in_dim(keys, jax.lax.axis_index(axis_name) * num_chains, num_chains)


def readable(array: Any) -> Any:
    """Return an array that this process can read whole."""
    is_here = not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated
    return array if is_here else multihost_utils.process_allgather(array, tiled=True)


def on_one_device(tree: PyTree) -> PyTree:
    """Return arrays on the default device, from where JAX moves them to any others that a program runs on."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(readable(leaf))), tree)
