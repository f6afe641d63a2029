"""Auto-models: pairwise energies whose elements have conditionals of one exponential family, given the others."""

import abc

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.energies import AbstractEnergy, as_floats
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.energies.graph import Graph
from numpyro_ebm.energies.ising import neighbor_sums


class AutoModel(AbstractEnergy):
    """A pairwise energy whose elements have known conditionals, as NumPyro distributions, on an event of any support."""

    @abc.abstractmethod
    def conditional(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> dist.Distribution:
        """Return the distribution of elements, each given all others.

        Args:
            event: one event.
            index: numbers of elements, of any shape; None for all elements, in the order of the flat event.

        Returns:
            A distribution with batch shape ``index.shape`` and scalar events. The sum of its log probabilities at the
            elements is the log pseudolikelihood.
        """

    @property
    def _groups(self) -> tuple[np.ndarray, ...]:
        """Sets of elements that a sweep draws at once, one set after another."""
        return tuple(np.arange(int(np.prod(self.event_shape)))[:, None]) if self.blocks is None else self.blocks

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Draw all elements from their conditionals: block after block, or one after another without blocks."""
        groups, num = self._groups, int(np.prod(self.event_shape))
        padded = np.full((len(groups), max(map(len, groups))), num)
        for row, group in zip(padded, groups, strict=True):
            row[: len(group)] = group

        def update(event, inputs):
            index, key = inputs
            drawn = jnp.asarray(self.conditional(event, jnp.minimum(index, num - 1)).sample(key))
            flat = event.reshape(-1).at[index].set(drawn.astype(event.dtype), mode="drop")  # not the places of the padding
            return flat.reshape(event.shape), None

        return jax.lax.scan(update, event, (jnp.asarray(padded), jax.random.split(rng_key, len(padded))))[0]


class GraphAutoModel(AutoModel):
    """An auto-model whose elements are coupled along the edges of a graph.

    Attributes:
        graph: the graph.
        couplings: ``(num_edges,)``.
    """

    graph: Graph
    couplings: Float[Array, " edges"]

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of the graph."""
        return self.graph.shape

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The nodes of each colour of the graph."""
        return self.graph.blocks

    def _sums(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None
    ) -> tuple[Float[Array, "..."], Int[Array | np.ndarray, "..."]]:
        """Return the sum of ``coupling * x`` over the neighbours of nodes, and the numbers of the nodes."""
        index = np.arange(self.graph.num_nodes) if index is None else index
        return neighbor_sums(self.graph, self.couplings, as_floats(event).reshape(-1), index), index

    def _products(self, x: Float[Array, " nodes"]) -> Float[Array, " edges"]:
        """Return ``coupling * x_a * x_b`` of the edges."""
        left, right = self.graph.edges.T
        return self.couplings * x[left] * x[right]
