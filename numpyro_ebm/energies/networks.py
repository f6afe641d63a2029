"""Networks as events: the dyads of some nodes, their ties as one vector, and an adjacency matrix that is read by rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike

Node = Int[Array | np.ndarray, "..."] | int | np.integer | slice
"""A node, several nodes, or a slice of all nodes."""


@dataclasses.dataclass(frozen=True)
class Dyads:
    """The pairs of nodes of a network, whose ties are the elements of an event.

    An event is the vector of all ties, each 0 or 1. The ties of ``n`` nodes without directions are ``n (n - 1) / 2``, in the
    order of ``np.triu_indices(n, 1)``: (0, 1), (0, 2), ..., (1, 2), ... With directions they are ``n (n - 1)``, the rows of
    the adjacency matrix without its diagonal: (0, 1), (0, 2), ..., (1, 0), (1, 2), ...

    Args:
        num_nodes: number of nodes, 2 or more.
        is_directed: whether a tie from one node to another differs from the tie back.

    Raises:
        EnergyError: for a number of nodes that is not a whole number of 2 or more.

    Example:
        >>> Dyads(3).from_adjacency([[0, 1, 0], [1, 0, 1], [0, 1, 0]]).tolist()
        [1, 0, 1]
    """

    num_nodes: int
    is_directed: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self):
        check_count("Dyads", "num_nodes", self.num_nodes, 2)

    @property
    def num_ties(self) -> int:
        """Number of elements of an event."""
        return len(self.ends[0])

    @functools.cached_property
    def ends(self) -> tuple[Int[np.ndarray, " ties"], Int[np.ndarray, " ties"]]:
        """The two nodes of each tie; those that it comes from and leads to if it has a direction."""
        all_pairs = ~np.eye(self.num_nodes, dtype=bool)
        tails, heads = np.nonzero(all_pairs if self.is_directed else np.triu(all_pairs))
        return tails, heads

    @functools.cached_property
    def places(self) -> Int[np.ndarray, "nodes nodes"]:
        """The number of the tie from one node to another; `num_ties`, which there is not, on the diagonal."""
        numbers = np.full((self.num_nodes, self.num_nodes), self.num_ties)
        tails, heads = self.ends
        if not self.is_directed:
            numbers[heads, tails] = np.arange(self.num_ties)
        numbers[tails, heads] = np.arange(self.num_ties)
        return numbers

    @functools.cached_property
    def rounds(self) -> Int[np.ndarray, " ties"]:
        """The round of each pair of nodes in a tournament, in each round of which a node meets at most one other."""
        low, high = np.sort(self.ends, axis=0)
        num_rounds = self.num_nodes - 1 + self.num_nodes % 2
        # The last one of an even number of nodes meets the node that would have none in this round.
        return np.where(high == num_rounds, 2 * low, low + high) % num_rounds

    def from_adjacency(self, adjacency: Any) -> Int[Array, "*rows ties"]:
        """Return networks as events.

        Args:
            adjacency: adjacency matrices of zeros and ones, ``(..., num_nodes, num_nodes)``; a row holds the ties that
                come from its node.

        Raises:
            EnergyError: for another shape, entries other than 0 and 1, a diagonal, and a matrix that is not symmetric where
                ties have no direction.
        """
        matrices = adjacency if isinstance(adjacency, jax.Array) else np.asarray(adjacency)
        self._check_shape(matrices)
        if is_concrete(matrices):
            self._check_entries(np.asarray(matrices))
        tails, heads = self.ends
        return jnp.asarray(matrices[..., tails, heads]).astype(int)

    def to_adjacency(self, event: Shaped[ArrayLike, "*rows ties"]) -> Shaped[Array, "*rows nodes nodes"]:
        """Return events as adjacency matrices.

        Raises:
            EnergyError: for events of another length.
        """
        ties = jnp.asarray(event)
        if ties.shape[-1:] != (self.num_ties,):
            raise EnergyError(
                f"A network of {self.num_nodes} nodes{self._in_words} has {self.num_ties} ties; got events of shape "
                f"{ties.shape}. Write shape (..., {self.num_ties})."
            )
        return ties.at[..., self.places].get(mode="fill", fill_value=0)

    def _check_shape(self, matrices: Shaped[Array | np.ndarray, "..."]) -> None:
        if matrices.dtype.kind not in "biuf":
            raise EnergyError(
                f"An adjacency matrix has numbers; got values of dtype {matrices.dtype}. Write a dense array, such as "
                "matrix.toarray() of SciPy or networkx.to_numpy_array(graph)."
            )
        if matrices.shape[-2:] != (self.num_nodes, self.num_nodes):
            nodes = f" Write Dyads({matrices.shape[-1]})." if matrices.ndim > 1 and len({*matrices.shape[-2:]}) == 1 else ""
            raise EnergyError(
                f"Dyads({self.num_nodes}) takes adjacency matrices of shape (..., {self.num_nodes}, {self.num_nodes}); got "
                f"shape {matrices.shape}.{nodes}"
            )

    def _check_entries(self, matrices: Shaped[np.ndarray, "*rows nodes nodes"]) -> None:
        where = np.argwhere(~((matrices == 0) | (matrices == 1)))
        if len(where):
            place, value = where[0].tolist(), matrices[tuple(where[0])]
            fix = "np.nan_to_num(adjacency), if no record means no tie" if np.isnan(value) else "(adjacency > 0).astype(int)"
            raise EnergyError(f"An adjacency matrix has the entries 0 and 1; got {value} at {place}. Write {fix}.")
        loops = np.argwhere(np.diagonal(matrices, axis1=-2, axis2=-1))
        if len(loops):
            raise EnergyError(
                f"Node {loops[0][-1]} has a tie to itself, and a network has none. Write adjacency * (1 - "
                f"np.eye({self.num_nodes}, dtype=int))."
            )
        one_way = np.argwhere(matrices != np.swapaxes(matrices, -1, -2))
        if len(one_way) and not self.is_directed:
            i, j = one_way[0][-2:].tolist()
            raise EnergyError(
                f"The ties of nodes {i} and {j} differ between the two directions. Write Dyads({self.num_nodes}, "
                "is_directed=True), or np.maximum(adjacency, adjacency.T) for ties in either direction."
            )

    @property
    def _in_words(self) -> str:
        return " with directions" if self.is_directed else ""


@record("dyads", eq=False)
class Network:
    """One network, which reads as its adjacency matrix of floating-point numbers.

    ``network[i]`` are the ties of node ``i`` to all nodes, ``network[i, j]`` is one tie and ``network[:]`` the whole matrix.
    A row is read from the ties without making the matrix.

    Args:
        ties: ``(num_ties,)``, the event.
        dyads: the pairs of nodes.
    """

    ties: Shaped[Array, " ties"]
    dyads: Dyads

    def __getitem__(self, nodes: Node | tuple[Node, Node]) -> Float[Array, "..."]:
        """Return entries of the adjacency matrix."""
        # Read first, then converted: the other way round, one row would cost as much as the matrix.
        return as_floats(self.ties.at[self._places(nodes)].get(mode="fill", fill_value=0))

    def with_tie(self, i: Node, j: Node, value: ArrayLike) -> "Network":
        """Return the network with another value of the tie from one node to another."""
        ties = self.ties.at[self._places((i, j))].set(jnp.asarray(value, self.ties.dtype))
        return dataclasses.replace(self, ties=ties)

    def _places(self, nodes: Node | tuple[Node, Node]) -> Int[Array, "..."]:
        places: Any = jnp.asarray(self.dyads.places)
        return places[nodes]
