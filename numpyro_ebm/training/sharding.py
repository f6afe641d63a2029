"""Placement of a training on many devices: parameters are copied, or split over a second axis of the mesh."""

import dataclasses
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Shaped
from numpyro import handlers

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.keys import is_key
from numpyro_ebm._core.sharding import Placement
from numpyro_ebm._core.typing import Array, PyTree
from numpyro_ebm.estimators.state import Pool
from numpyro_ebm.handlers.sites import bare_model


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

    def check_batches(self, size: int, num_rows: int | None) -> None:
        """Refuse batches that cannot be split evenly: every device would compute all of their rows.

        Args:
            size: number of rows of a batch.
            num_rows: number of rows of the data set; None where it is not known.

        Raises:
            EnergyError: with what to write.
        """
        if size % self.num_parts == 0:
            return
        better = self.next_multiple(size)
        if num_rows is not None and better > num_rows:
            better = num_rows - num_rows % self.num_parts
        write = f"batch_size={better}" if better else f"sharding={num_rows} or less"
        raise EnergyError(
            f"Batches of {size} rows cannot be split evenly over {self.num_parts} devices. Write {write}, or pad the "
            "batches and mask the rows that were added: numpyro.handlers.mask(mask=is_row)."
        )

    def check_arguments(self, arrays: Iterable[Array | np.ndarray], plates: Iterable[int]) -> None:
        """Refuse arguments whose rows cannot be split evenly: every device would compute all of them.

        The rows are those of the largest plate around an observed site that is as long as an argument; without such a plate
        those of the longest argument.

        Args:
            arrays: the arguments of `fit`, of which some need not hold rows.
            plates: sizes of the plates, from `sizes_of_plates`.

        Raises:
            EnergyError: with what to write.
        """
        lengths = [each.shape[0] for each in arrays if each.shape]
        num_rows = max(set(plates) & set(lengths) or lengths, default=0)
        if num_rows and num_rows % self.num_parts == 0:
            return
        raise EnergyError(
            f"Arguments of the lengths {lengths}, with {num_rows} rows, cannot be split evenly over {self.num_parts} "
            "devices. Write batches=x with a batch_size that is a multiple of their number, or leave out some rows."
        )


def sizes_of_plates(model: Callable, args: tuple, kwargs: dict[str, Any]) -> set[int]:
    """Return the sizes of the plates around the observed sites of a model, subsampled or not."""
    found: set[int] = set()

    def run() -> None:
        trace = handlers.trace(handlers.seed(bare_model(model), 0)).get_trace(*args, **kwargs)
        observed = [site for site in trace.values() if site["type"] == "sample" and site["is_observed"]]
        names = {frame.name for site in observed for frame in site["cond_indep_stack"]}
        found.update(site["args"][0] for name, site in trace.items() if site["type"] == "plate" and name in names)

    with warnings.catch_warnings(), handlers.block():
        warnings.simplefilter("ignore")  # svi.init gives the same
        jax.eval_shape(run)
    return found
