"""Autologistic regression: an Ising model whose fields depend on covariates."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._units import UnitEnergy, Units, as_parameters, check_units
from numpyro_ebm.energies.graph import Graph
from numpyro_ebm.energies.ising import Ising, as_graph, neighbor_sums

Covariates = Shaped[Array | np.ndarray, "*event covariates"] | None
"""The covariates of one row; None, where a context is missing, is refused."""


@record("graph", "units", "centered", eq=False)
class Autologistic(UnitEnergy):
    r"""Autologistic regression: two-valued elements on a graph, with a logistic regression on covariates at each node.

    .. math:: E(x \mid z) = -\sum_{(a,b)} J_{ab} x_a x_b - \sum_i h_i x_i, \qquad h_i = \alpha_i + z_i^T \beta

    Given its covariates, a row is an `Ising` model, which `given` returns: with its conditionals, blocks and exact log Z. In
    an `EnergyDistribution` the covariates are the context, and `exact`, `pseudolikelihood` and `Gibbs` use the `Ising` model
    of each row. With ``units="boolean"`` the log odds of a node are :math:`h_i + \sum_j J_{ij} x_j`; for spins they are
    twice that.

    With ``centered=True`` the neighbours count by their excess over the mean :math:`\mu_j` that they would have without
    couplings (the logistic function of ``h_j``, or ``tanh(h_j)`` for spins): the log odds are
    :math:`h_i + \sum_j J_{ij} (x_j - \mu_j)`, and the coefficients keep their meaning as the effect of the covariates on the
    mean while the couplings grow.

    Args:
        graph: a `Graph`, or its edges as ``(num_edges, 2)`` numbers of nodes from 0 on.
        couplings: ``(num_edges,)`` in the order of the graph's edges, or one number ``J`` for all.
        coefficients: ``(num_covariates,)``, the :math:`\beta`.
        intercept: of the shape of the event, or one number, the :math:`\alpha_i`.
        units: "boolean" (0 and 1) or "spins" (-1 and 1).
        centered: whether neighbours count by their excess over their mean without couplings.

    Raises:
        EnergyError: for couplings that are not one per edge, coefficients that are no vector, an intercept of another shape,
            and covariates that are not ``event_shape + (num_covariates,)``.

    Example:
        >>> energy = Autologistic([(0, 1), (1, 2)], couplings=0.5, coefficients=jnp.array([1.0, -1.0]))
        >>> covariates = jnp.zeros((10, 3, 2))  # rows, nodes, covariates
        >>> EnergyDistribution(energy, context=covariates, batch_shape=(10,)).log_prob(jnp.zeros((10, 3))).shape
        (10,)

    References:
        Besag, Spatial interaction and the statistical analysis of lattice systems (1974); Caragea and Kaiser, Autologistic
        models with interpretable parameters (2009), for the centred form.
    """

    takes_context = True
    graph: Graph
    couplings: Any
    coefficients: Any
    intercept: Any = 0.0
    units: Units = "boolean"
    centered: bool = False

    def __init__(
        self,
        graph: Graph | ArrayLike,
        couplings: ArrayLike,
        coefficients: ArrayLike,
        intercept: ArrayLike = 0.0,
        units: Units = "boolean",
        *,
        centered: bool = False,
    ):
        owner = type(self).__name__
        check_units(owner, units)
        graph, coefficients = as_graph(graph), jnp.asarray(coefficients, float)
        shape = coefficients.shape
        if len(shape) != 1:
            raise EnergyError(f"{owner} needs coefficients of shape (num_covariates,); got shape {shape}.")
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "couplings", as_parameters(owner, "couplings", couplings, (graph.num_edges,)))
        object.__setattr__(self, "coefficients", as_parameters(owner, "coefficients", coefficients, shape))
        object.__setattr__(self, "intercept", as_parameters(owner, "intercept", intercept, graph.shape))
        object.__setattr__(self, "units", units)
        object.__setattr__(self, "centered", bool(centered))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """The shape of the graph."""
        return self.graph.shape

    def given(self, context: Covariates) -> Ising:
        """Return the `Ising` model of one row, given its covariates, ``event_shape + (num_covariates,)``.

        Raises:
            EnergyError: for covariates of another shape.
        """
        wanted, got = (*self.event_shape, len(self.coefficients)), None if context is None else jnp.shape(context)
        if got != wanted:
            raise EnergyError(
                f"Autologistic needs the covariates of one row as one array of shape {wanted}; got {got or context}. Write "
                f"EnergyDistribution(energy, context=covariates) in a plate of rows, or with batch_shape=(rows,), and "
                f"covariates of shape (rows, {', '.join(map(str, wanted))})."
            )
        fields = self.intercept + jnp.asarray(context, float) @ self.coefficients
        if self.centered:
            fields = fields - self._means_of_neighbors(fields.reshape(-1)).reshape(fields.shape)
        return Ising(self.graph, self.couplings, fields, self.units)

    def __call__(self, event: Shaped[Array, "*event"], context: Covariates = None) -> Scalar:
        """Return the energy of one event, given its covariates."""
        return self.given(context)(event)

    def local_fields(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Raise: fields depend on the covariates. Write ``energy.given(context).local_fields(event)``."""
        raise EnergyError("The fields of Autologistic depend on the covariates. Write energy.given(context).")

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The nodes of each colour of the graph."""
        return self.graph.blocks

    @property
    def has_bonds(self) -> bool:
        """True: the `Ising` model of a row has them."""
        return True

    @property
    def num_terms(self) -> int:
        """The terms of log Z of one row."""
        return Ising(self.graph, 0.0).num_terms

    def log_partition(self) -> Scalar:
        """Raise: log Z depends on the covariates. Write ``energy.given(context).log_partition()``."""
        raise EnergyError("The log Z of Autologistic depends on covariates. Write energy.given(context).log_partition().")

    def _means_of_neighbors(self, fields: Float[Array, " nodes"]) -> Float[Array, " nodes"]:
        means = jax.nn.sigmoid(fields) if self.units == "boolean" else jnp.tanh(fields)
        return neighbor_sums(self.graph, self.couplings, means, np.arange(len(fields)))
