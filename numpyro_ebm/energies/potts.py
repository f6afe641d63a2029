"""Potts models of categorical events: with a coupling matrix for each pair of sites, and on a graph."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.discrete import at_edges, log_sum_over_states, num_states, one_hot
from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies import elimination
from numpyro_ebm.energies._units import as_parameters, check_finite, symmetric
from numpyro_ebm.energies.graph import Graph
from numpyro_ebm.energies.ising import Bonds, as_graph, has_short_sums, sums_over_neighbors, take

ON_DIAGONAL = (
    "Potts got couplings of a site to itself: use fields for them. Write couplings * (1 - jnp.eye(L))[:, None, :, None]."
)
ON_ASYMMETRY = (
    "Potts needs couplings with J[i, a, j, b] = J[j, b, i, a]; got others. Write 0.5 * (couplings + "
    "couplings.transpose(2, 3, 0, 1))."
)


@record("is_one_hot", eq=False)
class Potts(AbstractEnergy):
    r"""The Potts model in which each pair of sites has its own matrix of couplings, as for families of proteins.

    .. math:: E(x) = -\sum_{i<j} J_{ij}(x_i, x_j) - \sum_i h_i(x_i)

    Many couplings give the same distribution. `zero_sum` returns the one in the zero-sum gauge, and `contact_scores` the
    strength of each pair in it.

    Args:
        couplings: ``(L, q, L, q)``, symmetric under exchange of the two sites with their categories, and 0 between a site
            and itself. A trained or sampled array counts with its symmetric part, without the couplings of a site to itself.
        fields: ``(L, q)``, or one number.
        is_one_hot: whether an event is one-hot, ``(L, q)``, as kernels with gradients need it, instead of whole numbers from
            0 to ``q - 1``, ``(L,)``.

    Raises:
        EnergyError: for couplings of another shape, that are not finite, not symmetric or couple a site to itself.

    Example:
        >>> energy = Potts(jnp.zeros((2, 3, 2, 3)), jnp.zeros((2, 3)))
        >>> round(float(energy.log_partition()), 4)  # log 9
        2.1972

    References:
        Ekeberg et al., Improved contact prediction in proteins: using pseudolikelihoods to infer Potts models (2013).
    """

    linear_in = ("couplings", "fields")
    couplings: Any
    fields: Any = 0.0
    is_one_hot: bool = False

    def __init__(self, couplings: ArrayLike, fields: ArrayLike = 0.0, *, is_one_hot: bool = False):
        couplings = jnp.asarray(couplings, float)
        if couplings.ndim != 4 or couplings.shape[:2] != couplings.shape[2:]:
            raise EnergyError(f"Potts needs couplings of shape (L, q, L, q); got shape {couplings.shape}.")
        if not couplings.size:
            raise EnergyError(f"Potts needs a site and a category or more; got couplings of shape {couplings.shape}.")
        check_finite("Potts", "couplings", couplings)
        matrix = couplings.reshape(couplings.shape[0] * couplings.shape[1], -1)
        matrix = symmetric(matrix, couplings.shape[1], ON_DIAGONAL, ON_ASYMMETRY)
        object.__setattr__(self, "couplings", matrix.reshape(couplings.shape))
        object.__setattr__(self, "fields", as_parameters("Potts", "fields", fields, couplings.shape[:2]))
        object.__setattr__(self, "is_one_hot", bool(is_one_hot))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(L,)``, or ``(L, q)`` for one-hot events."""
        return self.fields.shape if self.is_one_hot else self.fields.shape[:1]

    @property
    def support(self) -> constraints.Constraint:
        """``constraints.integer_interval(0, q - 1)``, or ``numpyro_ebm.one_hot``."""
        return one_hot if self.is_one_hot else constraints.integer_interval(0, self.fields.shape[1] - 1)

    @property
    def is_differentiable(self) -> bool:
        """Whether events are one-hot."""
        return self.is_one_hot

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""
        return self._energy(self._indicators(event))

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return ``sum_j J_ij(., x_j) + h_i`` of sites."""
        if index is None or jnp.ndim(index):
            logits = self._sums(self._indicators(event)) + self.fields
            return logits if index is None else logits[index]
        # The couplings of one site, picked at the category of each other one: L q numbers, not L q^2. Clipping is the mode
        # without a mask, and codes are in bounds.
        codes = jnp.argmax(event, axis=1) if self.is_one_hot else jnp.asarray(event, int)
        own = self.couplings[:, :, index]
        return jnp.sum(own.at[jnp.arange(len(codes)), codes].get(mode="clip"), axis=0) + self.fields[index]

    @property
    def num_terms(self) -> int:
        """``q ** L``."""
        return num_states(np.arange(self.fields.shape[1]), self.fields.shape[:1])

    def log_partition(self) -> Scalar:
        """Return log Z by the sum over all states."""
        sites, size = self.fields.shape
        of_codes = lambda codes: -self._energy(jax.nn.one_hot(codes, size, dtype=float))  # noqa: E731
        return log_sum_over_states(np.arange(size), (sites,), of_codes)

    def zero_sum(self) -> "Potts":
        """Return the same distribution with couplings and fields that sum to 0 over each category.

        The energy changes by a constant, so log Z does too.
        """
        sites = len(self.fields)
        mean = lambda axis: jnp.mean(self.couplings, axis=axis, keepdims=True)  # noqa: E731
        couplings = self.couplings - mean(1) - mean(3) + mean((1, 3))
        moved = jnp.sum(mean(3) - mean((1, 3)), axis=(2, 3))
        fields = self.fields - jnp.mean(self.fields, axis=1, keepdims=True) + moved
        own = jnp.eye(sites, dtype=bool)[:, None, :, None]
        return Potts(jnp.where(own, 0.0, couplings), fields, is_one_hot=self.is_one_hot)

    def contact_scores(self, *, skipped: tuple[int, ...] = ()) -> Float[Array, "L L"]:
        r"""Return the strength of each pair of sites: the corrected Frobenius norm of its couplings in the zero-sum gauge.

        .. math:: S_{ij} = F_{ij} - \frac{F_{i \cdot} F_{\cdot j}}{F_{\cdot \cdot}}

        with means over the other sites (the average product correction, APC).

        Args:
            skipped: categories left out of the norm, such as the gap of an alignment; -1 is the last one.

        Returns:
            Symmetric scores ``(L, L)``, 0 on the diagonal.

        Raises:
            EnergyError: for a category that the model does not have.

        References:
            Dunn, Wahl and Gloor, Mutual information without the influence of phylogeny or entropy (2008).
        """
        categories = np.arange(self.fields.shape[1])
        unknown = [number for number in skipped if not -len(categories) <= number < len(categories)]
        if unknown:
            raise EnergyError(
                f"contact_scores leaves out categories of a Potts model with {len(categories)}, numbered from 0; got "
                f"skipped={tuple(skipped)}. Write skipped=(-1,) for the last one."
            )
        kept = np.delete(categories, list(skipped))
        norms = jnp.sqrt(jnp.sum(self.zero_sum().couplings[:, kept][..., kept] ** 2, axis=(1, 3)))
        sites = len(norms)
        means = jnp.sum(norms, axis=1) / (sites - 1)
        total = jnp.sum(norms) / (sites * (sites - 1))
        background = jnp.where(total > 0, means[:, None] * means / jnp.where(total > 0, total, 1.0), 0.0)
        return (norms - background) * (1 - jnp.eye(sites))

    def _indicators(self, event: Shaped[Array, "*event"]) -> Float[Array, "L q"]:
        event = jnp.asarray(event)
        return event.astype(float) if self.is_one_hot else jax.nn.one_hot(event, self.fields.shape[1], dtype=float)

    def _energy(self, x: Float[Array, "L q"]) -> Scalar:
        return -jnp.sum(x * (0.5 * self._sums(x) + self.fields))

    def _sums(self, x: Float[Array, "L q"]) -> Float[Array, "L q"]:
        size = self.fields.size
        return (self.couplings.reshape(size, size) @ x.reshape(-1)).reshape(self.fields.shape)


@record("graph", "num_categories", eq=False)
class GraphPotts(AbstractEnergy):
    r"""The Potts model on a graph: neighbours attract each other if they are equal.

    .. math:: E(x) = -\sum_{(a,b)} J_{ab} [x_a = x_b] - \sum_i h_i(x_i)

    Args:
        graph: a `Graph`, or its edges as ``(num_edges, 2)`` numbers of nodes from 0 on.
        couplings: ``(num_edges,)`` in the order of the graph's edges, or one number for all.
        num_categories: number of values of a node, 0 to ``num_categories - 1``.
        fields: ``event_shape + (num_categories,)``, ``(num_categories,)`` for the same at all nodes, or one number.

    Raises:
        EnergyError: for fewer than two categories, couplings that are not one per edge, and fields of another shape.

    Example:
        >>> energy = GraphPotts(Graph.lattice(2, 2), couplings=0.0, num_categories=3)
        >>> round(float(energy.log_partition()), 4)  # 4 log 3
        4.3944

    References:
        Wu, The Potts model (1982).
    """

    linear_in = ("couplings", "fields")
    graph: Graph
    couplings: Any
    num_categories: int = 3
    fields: Any = 0.0

    def __init__(self, graph: Graph | ArrayLike, couplings: ArrayLike, num_categories: int, fields: ArrayLike = 0.0):
        check_count("GraphPotts", "num_categories", num_categories, 2)
        graph = as_graph(graph)
        shape = (*graph.shape, int(num_categories))
        fields = jnp.asarray(fields, float)
        if fields.shape == shape[-1:]:
            fields = jnp.broadcast_to(fields, shape)
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "couplings", as_parameters("GraphPotts", "couplings", couplings, (graph.num_edges,)))
        object.__setattr__(self, "num_categories", int(num_categories))
        object.__setattr__(self, "fields", as_parameters("GraphPotts", "fields", fields, shape))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of the graph."""
        return self.graph.shape

    @property
    def support(self) -> constraints.Constraint:
        """``constraints.integer_interval(0, num_categories - 1)``."""
        return constraints.integer_interval(0, self.num_categories - 1)

    @property
    def is_differentiable(self) -> bool:
        """False."""
        return False

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""
        x = jnp.asarray(event).reshape(-1)
        left, right = self.graph.edges.T
        fields = jnp.take_along_axis(self._fields, x[:, None], axis=1)
        return -jnp.sum(jnp.where(x[left] == x[right], self.couplings, 0.0)) - jnp.sum(fields)

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return, for each value of nodes, the couplings to the neighbours with this value, and the field."""
        x = jnp.asarray(event).reshape(-1)
        index = np.arange(self.graph.num_nodes) if index is None else index
        nodes, edges = (take(table, index) for table in self.graph.neighbors)
        couplings = at_edges(self.couplings, edges)
        same = x[nodes][..., None] == jnp.arange(self.num_categories)
        return jnp.sum(couplings[..., None] * same, axis=-2) + self._fields[index]

    @property
    def has_logits_of_many(self) -> bool:
        """Whether the graph's degrees are small: the sums over neighbours are written out."""
        return has_short_sums(self.graph)

    def logits_of_many(
        self, elements: Shaped[Array, "elements events"], index: Int[np.ndarray, " chosen"]
    ) -> Float[Array, "values chosen events"]:
        """Return `conditional_logits` of nodes in each of many events."""
        values = jnp.arange(self.num_categories, dtype=elements.dtype)[:, None, None]
        sums = sums_over_neighbors(
            self.graph, self.couplings, index, lambda nodes: (elements[nodes] == values).astype(float)
        )
        return sums + self._fields[index].T[..., None]

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The nodes of each colour of the graph."""
        return self.graph.blocks

    @property
    def num_terms(self) -> int:
        """Number of terms of the sums over single nodes."""
        return elimination.num_terms(self.graph, self.num_categories)

    def log_partition(self) -> Scalar:
        """Return log Z by summing out one node after another."""
        edges = self.couplings[:, None, None] * jnp.eye(self.num_categories)
        return elimination.log_partition(self.graph, self._fields, edges)

    @property
    def bonds(self) -> Bonds:
        """The couplings themselves."""
        return Bonds(self.graph, self.couplings, self._fields)

    @property
    def _fields(self) -> Float[Array, "nodes values"]:
        return self.fields.reshape(-1, self.num_categories)
