"""Graphs of pairwise energies: edges, neighbours, colours and an order of elimination."""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count

IntArray = Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """An undirected graph over the elements of an event, fixed while a model is trained.

    Args:
        edges: ``(num_edges, 2)``, the numbers of the two nodes of each edge.
        shape: shape of the event whose elements are the nodes, or their number.
        colors: ``(num_nodes,)``, a colour per node, different for neighbours; None for a colouring by DSATUR, which finds
            two colours where two are enough.

    Raises:
        EnergyError: for an edge outside the nodes, from a node to itself or given twice, and for equal colours at an edge.

    Example:
        >>> Graph([(0, 1), (1, 2)], shape=3).num_edges
        2

    References:
        Brelaz, New methods to color the vertices of a graph (1979).
    """

    edges: IntArray
    shape: tuple[int, ...]
    colors: IntArray | None = None

    def __init__(self, edges: Any, shape: int | tuple[int, ...], colors: Any = None):
        shape = _checked_shape(shape)
        edges = _checked_edges(np.asarray(edges, int).reshape(-1, 2) if np.size(edges) == 0 else np.asarray(edges), shape)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "colors", None if colors is None else self._checked(colors))

    @classmethod
    def lattice(cls, *shape: int, periodic: bool = False) -> "Graph":
        """Return the graph of a lattice with this shape, whose nodes have neighbours along each axis.

        Args:
            *shape: sizes of the axes.
            periodic: whether the last node of an axis is a neighbour of the first one.

        Example:
            >>> Graph.lattice(3, 3).num_edges
            12
        """
        shape = _checked_shape(shape)
        nodes = np.arange(math.prod(shape)).reshape(shape)
        pairs = []
        for axis, size in enumerate(shape):
            pairs.append((nodes.take(range(size - 1), axis), nodes.take(range(1, size), axis)))
            if periodic and size > 2:
                pairs.append((nodes.take([-1], axis), nodes.take([0], axis)))
        return cls(np.concatenate([np.stack([a.ravel(), b.ravel()], axis=1) for a, b in pairs]), shape)

    @classmethod
    def complete(cls, num_nodes: int) -> "Graph":
        """Return the graph in which any two nodes are neighbours, with the edges in the order of ``np.triu_indices``."""
        return cls(np.stack(np.triu_indices(num_nodes, 1), axis=1), num_nodes, colors=np.arange(num_nodes))

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return math.prod(self.shape)

    @property
    def num_edges(self) -> int:
        """Number of edges."""
        return len(self.edges)

    @functools.cached_property
    def blocks(self) -> tuple[IntArray, ...]:
        """The nodes of each colour."""
        colors = _dsatur(self.edges, self.num_nodes) if self.colors is None else self.colors
        return tuple(np.flatnonzero(colors == color) for color in np.unique(colors))

    @functools.cached_property
    def neighbors(self) -> tuple[IntArray, IntArray]:
        """Neighbours of each node and the numbers of the edges to them, ``(num_nodes, largest_degree)``.

        A node with fewer neighbours is filled up with node 0 and the edge number ``num_edges``.
        """
        own = np.concatenate([self.edges, self.edges[:, ::-1]])
        numbers = np.tile(np.arange(self.num_edges), 2)
        order = np.argsort(own[:, 0], kind="stable")
        own, numbers = own[order], numbers[order]
        degrees = np.bincount(own[:, 0], minlength=self.num_nodes)
        place = np.arange(len(own)) - np.repeat(np.cumsum(degrees) - degrees, degrees)
        shape = (self.num_nodes, max(1, int(degrees.max(initial=0))))
        nodes, edges = np.zeros(shape, int), np.full(shape, self.num_edges)
        nodes[own[:, 0], place], edges[own[:, 0], place] = own[:, 1], numbers
        return nodes, edges

    @functools.cached_property
    def elimination(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """An order in which nodes can be summed out, each with the neighbours that it has by then (least degree first)."""
        around = _adjacency(self.edges, self.num_nodes)
        queue = [(len(nodes), node) for node, nodes in enumerate(around)]
        heapq.heapify(queue)
        return tuple(_eliminate(around, queue))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @functools.cached_property
    def _key(self) -> tuple[Any, ...]:
        return self.shape, self.edges.tobytes(), None if self.colors is None else self.colors.tobytes()

    def _checked(self, colors: Any) -> IntArray:
        colors = np.asarray(colors)
        if colors.size != self.num_nodes or not np.issubdtype(colors.dtype, np.integer):
            raise EnergyError(
                f"colors needs one whole number for each of the {self.num_nodes} nodes; got shape {colors.shape} of "
                f"{colors.dtype}. Leave colors out for a colouring of the graph."
            )
        colors = colors.reshape(-1)
        equal = np.flatnonzero(colors[self.edges[:, 0]] == colors[self.edges[:, 1]])
        if equal.size:
            a, b = self.edges[equal[0]].tolist()
            raise EnergyError(
                f"colors is no colouring: the neighbours {a} and {b} both have colour {colors[a]}, so they cannot be drawn "
                "at once. Leave colors out for a colouring of the graph."
            )
        return colors


def _checked_shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of an event as whole numbers of 1 or more."""
    sizes = tuple(shape) if np.ndim(shape) else (shape,)
    for size in sizes:
        check_count("Graph", "shape", size)
    if not sizes:
        raise EnergyError("A graph needs a node or more; got shape=(). Write Graph(edges, shape=10).")
    return tuple(int(size) for size in sizes)


def _checked_edges(edges: IntArray, shape: tuple[int, ...]) -> IntArray:
    """Check the edges of a graph, and return each with its smaller node first."""
    if edges.ndim == 2 and edges.shape[0] == edges.shape[1] > 2:
        raise EnergyError(
            f"edges needs pairs of nodes, (num_edges, 2); got a square array of shape {edges.shape}. If it says which nodes "
            "are neighbours, write Graph(np.argwhere(np.triu(matrix, 1)), len(matrix))."
        )
    if edges.ndim != 2 or edges.shape[1] != 2 or not np.issubdtype(edges.dtype, np.integer):
        raise EnergyError(
            f"edges needs whole numbers of shape (num_edges, 2); got shape {edges.shape} of {edges.dtype}. Write "
            "Graph([(0, 1), (1, 2)], shape=3)."
        )
    num_nodes = math.prod(shape)
    outside = np.flatnonzero(((edges < 0) | (edges >= num_nodes)).any(axis=1))
    if outside.size:
        number = int(outside[0])
        raise EnergyError(
            f"Edge {number} joins {edges[number].tolist()}, but the nodes of shape {shape} are 0 to {num_nodes - 1}. Number "
            "the nodes from 0, or write a larger shape."
        )
    loops = np.flatnonzero(edges[:, 0] == edges[:, 1])
    if loops.size:
        raise EnergyError(
            f"Edge {int(loops[0])} joins node {int(edges[loops[0], 0])} to itself. Use the fields for it, and leave the "
            "edge out: edges[edges[:, 0] != edges[:, 1]]."
        )
    edges = np.sort(edges.astype(np.int64), axis=1)
    unique, counts = np.unique(edges, axis=0, return_counts=True)
    if len(unique) < len(edges):
        raise EnergyError(
            f"The edge {unique[counts.argmax()].tolist()} is given {counts.max()} times, in one order of its nodes or the "
            "other. Give each edge once: np.unique(np.sort(edges, axis=1), axis=0)."
        )
    return edges


def _adjacency(edges: IntArray, num_nodes: int) -> list[set[int]]:
    around: list[set[int]] = [set() for _ in range(num_nodes)]
    for a, b in edges.tolist():
        around[a].add(b)
        around[b].add(a)
    return around


def _dsatur(edges: IntArray, num_nodes: int) -> IntArray:
    """Return a colouring: the node with most colours around it is next, and takes the first colour that is free."""
    around = _adjacency(edges, num_nodes)
    seen: list[set[int]] = [set() for _ in range(num_nodes)]
    colors = np.full(num_nodes, -1)
    queue = [(0, -len(nodes), node) for node, nodes in enumerate(around)]
    heapq.heapify(queue)
    while queue:
        _, _, node = heapq.heappop(queue)
        if colors[node] >= 0:
            continue
        colors[node] = next(color for color in range(num_nodes) if color not in seen[node])
        for other in around[node]:
            if colors[other] < 0 and colors[node] not in seen[other]:
                seen[other].add(int(colors[node]))
                heapq.heappush(queue, (-len(seen[other]), -len(around[other]), other))
    return colors


def _eliminate(around: list[set[int]], queue: list[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, ...]]]:
    done = [False] * len(around)
    while queue:
        degree, node = heapq.heappop(queue)
        if done[node] or degree != len(around[node]):
            continue
        done[node] = True
        rest = around[node]
        yield node, tuple(sorted(rest))
        for other in rest:
            around[other] |= rest
            around[other] -= {node, other}
            heapq.heappush(queue, (len(around[other]), other))
