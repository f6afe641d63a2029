"""The Ising model on a graph or a lattice."""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import at_edges
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies import elimination
from numpyro_ebm.energies._units import UnitEnergy, Units, as_parameters, check_units, values_of_units
from numpyro_ebm.energies.graph import Graph

MOST_TERMS = 32
"""Most neighbours of a node whose sum is written out term by term."""


class Bonds(NamedTuple):
    """A pairwise energy in which equal neighbours attract each other: ``log p = sum_e strengths_e [x_a = x_b] + fields``.

    Attributes:
        graph: the graph.
        strengths: ``(num_edges,)``; below 0, neighbours repel each other, and clusters are of no use.
        fields: ``(num_nodes, num_values)``, log factor of each value of each node.
    """

    graph: Graph
    strengths: Float[Array, " edges"]
    fields: Float[Array, "nodes values"]


@record("graph", "units", eq=False)
class Ising(UnitEnergy):
    r"""The Ising model: two-valued elements, coupled along the edges of a graph.

    .. math:: E(s) = -\sum_{(a,b)} J_{ab} s_a s_b - \sum_i h_i s_i

    log Z is summed node by node (see `Graph.elimination`): at once for chains and trees, and in ``2 ** (1 + k)`` terms per
    node for a lattice of width ``k``.

    Args:
        graph: a `Graph`, or its edges as ``(num_edges, 2)`` numbers of nodes from 0 on.
        couplings: ``(num_edges,)`` in the order of the graph's edges, or one number ``J`` for all.
        fields: of the shape of the event, or one number ``h`` for all.
        units: "spins" (-1 and 1) or "boolean" (0 and 1, as in networks of symptoms).

    Raises:
        EnergyError: for couplings that are not one per edge, and fields of another shape.

    Example:
        >>> energy = Ising(Graph.lattice(3, 3), couplings=0.3, fields=0.1)
        >>> round(float(energy.log_partition()), 4)
        6.9127

    References:
        Ising, Beitrag zur Theorie des Ferromagnetismus (1925); Besag, Spatial interaction and the statistical analysis of
        lattice systems (1974).
    """

    linear_in = ("couplings", "fields")
    graph: Graph
    couplings: Any
    fields: Any = 0.0
    units: Units = "spins"

    def __init__(self, graph: Graph | ArrayLike, couplings: ArrayLike, fields: ArrayLike = 0.0, units: Units = "spins"):
        owner = type(self).__name__
        check_units(owner, units)
        graph = as_graph(graph)
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "couplings", as_parameters(owner, "couplings", couplings, (graph.num_edges,)))
        object.__setattr__(self, "fields", as_parameters(owner, "fields", fields, graph.shape))
        object.__setattr__(self, "units", units)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of the graph."""
        return self.graph.shape

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""
        x = as_floats(event).reshape(-1)
        left, right = self.graph.edges.T
        return -jnp.sum(self.couplings * x[left] * x[right]) - jnp.sum(self.fields.reshape(-1) * x)

    def local_fields(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return ``sum_j J_ij s_j + h_i`` of elements, over the neighbours of each."""
        x = as_floats(event).reshape(-1)
        index = np.arange(self.graph.num_nodes) if index is None else index
        return neighbor_sums(self.graph, self.couplings, x, index) + self.fields.reshape(-1)[index]

    @property
    def has_logits_of_many(self) -> bool:
        """Whether the graph's degrees are small: the sums over neighbours are written out."""
        return has_short_sums(self.graph)

    def logits_of_many(
        self, elements: Shaped[Array, "elements events"], index: Int[np.ndarray, " chosen"]
    ) -> Float[Array, "values chosen events"]:
        """Return ``field_i * value`` for both values of elements, in each of many events."""
        sums = sums_over_neighbors(self.graph, self.couplings, index, lambda nodes: as_floats(elements[nodes]))
        fields = sums + self.fields.reshape(-1)[index][:, None]
        return jnp.stack([float(value) * fields for value in values_of_units(self.units)])

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The nodes of each colour of the graph."""
        return self.graph.blocks

    @property
    def num_terms(self) -> int:
        """Number of terms of the sums over single nodes."""
        return elimination.num_terms(self.graph, 2)

    def log_partition(self) -> Scalar:
        """Return log Z by summing out one node after another."""
        values = jnp.asarray(values_of_units(self.units), float)
        nodes = self.fields.reshape(-1, 1) * values[None]
        edges = self.couplings[:, None, None] * jnp.outer(values, values)[None]
        return elimination.log_partition(self.graph, nodes, edges)

    @property
    def bonds(self) -> Bonds:
        """The couplings as attractions of equal neighbours: ``2 J`` for spins, ``J / 2`` for 0 and 1."""
        values = jnp.asarray(values_of_units(self.units), float)
        fields, factor = self.fields.reshape(-1), 2.0
        if self.units == "boolean":  # x_a x_b = ([x_a = x_b] + x_a + x_b - 1) / 2
            ends = jnp.repeat(self.couplings, 2)
            fields, factor = fields.at[self.graph.edges.reshape(-1)].add(0.5 * ends), 0.5
        return Bonds(self.graph, factor * self.couplings, fields[:, None] * values[None])


def as_graph(graph: Graph | ArrayLike) -> Graph:
    """Return a graph, given itself or edges whose largest node is the last one."""
    if isinstance(graph, Graph):
        return graph
    edges = np.asarray(graph)
    if not edges.size:
        raise EnergyError("The graph has no edges, so its nodes are not known. Write Graph(edges, shape=num_nodes).")
    return Graph(edges, int(edges.max()) + 1)


def take(table: np.ndarray, index: Int[Array | np.ndarray, "..."]) -> Array | np.ndarray:
    """Return rows of a table, as constants where the rows are known."""
    return table[index] if isinstance(index, np.ndarray) else jnp.asarray(table)[index]


def neighbor_sums(
    graph: Graph, couplings: Float[Array, " edges"], x: Float[Array, " nodes"], index: Int[Array | np.ndarray, "..."]
) -> Float[Array, "..."]:
    """Return ``sum_j J_ij x_j`` of nodes, over the neighbours of each."""
    nodes, edges = (take(table, index) for table in graph.neighbors)
    own = at_edges(couplings, edges)
    # As a product and a sum, XLA of jaxlib 0.10 without fusion emitters (as the tests run it) gets large batches wrong.
    return jnp.vecdot(own, x[nodes], precision="highest")


def has_short_sums(graph: Graph) -> bool:
    """Return whether `sums_over_neighbors` suits a graph: a program with a term for each neighbour is not too long."""
    return graph.neighbors[0].shape[1] <= MOST_TERMS


def sums_over_neighbors(
    graph: Graph,
    couplings: Float[Array, " edges"],
    index: Int[np.ndarray, " chosen"],
    terms: Callable[[Int[np.ndarray, " chosen"]], Float[Array, "... chosen events"]],
) -> Float[Array, "... chosen events"]:
    """Return ``sum_j J_ij terms_j`` of nodes, over the neighbours of each, where a neighbour has a term in each event."""
    nodes, edges = (table[index] for table in graph.neighbors)
    own = at_edges(couplings, edges)
    each = (own[:, k, None] * terms(nodes[:, k]) for k in range(nodes.shape[1]))
    return functools.reduce(operator.add, each)
