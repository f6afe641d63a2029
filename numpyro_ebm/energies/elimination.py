"""Log Z of a pairwise energy on a graph by summing out one node after another."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.discrete import MOST_STATES
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array
from numpyro_ebm.energies.graph import Graph

Factor = tuple[tuple[int, ...], Array]
"""Nodes in increasing order, and a table with one axis for each."""


def num_terms(graph: Graph, num_values: int) -> int:
    """Return the number of terms that `log_partition` sums."""
    return sum(num_values ** (len(rest) + 1) for _, rest in graph.elimination)


@functools.partial(jax.jit, static_argnums=0)  # op by op, each table would be compiled on its own
def log_partition(
    graph: Graph, nodes: Float[Array, "nodes values"], edges: Float[Array, "edges values values"]
) -> Float[Array, ""]:
    r"""Return ``log sum_x exp(sum_i nodes[i, x_i] + sum_e edges[e, x_a, x_b])``, by variable elimination.

    A node is summed out together with the neighbours that it has by then, so the largest table has ``num_values ** (1 +
    treewidth)`` entries at best: 2 for a chain, ``2 ** (1 + k)`` for a lattice of width ``k``.

    Args:
        graph: the graph.
        nodes: log factor of each value of each node.
        edges: log factor of each pair of values of each edge, the smaller node first.

    Raises:
        EnergyError: for a graph that needs a table of more than 2**30 entries.

    References:
        Koller and Friedman, Probabilistic graphical models (2009), chapter 9.
    """
    width = max(len(rest) for _, rest in graph.elimination)
    if nodes.shape[1] ** (width + 1) > MOST_STATES:
        raise EnergyError(
            f"Summing out the nodes of this graph takes tables of {nodes.shape[1]}**{width + 1} entries, beyond 2**30. "
            "Write numpyro_ebm.log_partition(rng_key, distribution, method='ais')."
        )
    rank = {node: place for place, (node, _) in enumerate(graph.elimination)}
    waiting: list[list[Factor]] = [[] for _ in rank]
    constant = jnp.zeros(())

    def put(scope, table):
        # A factor waits for the first of its nodes that is summed out.
        waiting[min(rank[node] for node in scope)].append((scope, table))

    for number, (a, b) in enumerate(graph.edges.tolist()):
        put((a, b), edges[number])
    for node in range(graph.num_nodes):
        put((node,), nodes[node])
    for place, (node, rest) in enumerate(graph.elimination):
        scope = tuple(sorted((node, *rest)))
        table = sum((_spread(factor, scope) for factor in waiting[place]), jnp.zeros(()))
        summed = jax.nn.logsumexp(table, axis=scope.index(node))
        if rest:
            put(rest, summed)
        else:
            constant += summed
    return constant


def _spread(factor: Factor, scope: tuple[int, ...]) -> Array:
    """Return a table with an axis for each node of the scope."""
    nodes, table = factor
    sizes = iter(table.shape)
    return table.reshape([next(sizes) if node in nodes else 1 for node in scope])
