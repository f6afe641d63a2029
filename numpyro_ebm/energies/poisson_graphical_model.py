"""The Poisson graphical model."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.scipy.special import gammaln
from jaxtyping import Float, Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies import elimination
from numpyro_ebm.energies._auto_model import GraphAutoModel
from numpyro_ebm.energies._units import as_parameters
from numpyro_ebm.energies.graph import Graph
from numpyro_ebm.energies.ising import as_graph


@record("graph", "maximum", eq=False)
class PoissonGraphicalModel(GraphAutoModel):
    r"""The Poisson graphical model, or auto-Poisson model: counts with Poisson conditionals, coupled along a graph.

    .. math:: E(x) = \sum_i \left[\log x_i! - \theta_i x_i\right] - \sum_{(a,b)} J_{ab} x_a x_b, \qquad
        x_i \mid x_{-i} \sim \text{Poisson}\Big(\exp\big(\theta_i + \sum_j J_{ij} x_j\big)\Big)

    Without a largest count the couplings are 0 or negative: with a positive one, log Z is infinite. `LatticeWalk` draws such
    events, and `DiscreteFisherDivergence` and estimators with chains (`PersistentContrastiveDivergence`) train on them.

    With ``maximum``, the counts end there, the conditionals are Poisson distributions cut off at it, and couplings have any
    sign. Then the conditionals are those of a finite support, which `Gibbs` and `Pseudolikelihood` use, and log Z is summed
    node by node.

    Args:
        graph: a `Graph`, or its edges as ``(num_edges, 2)`` numbers of nodes from 0 on; ``Graph.complete(d)`` couples all.
        couplings: ``(num_edges,)`` in the order of the graph's edges, or one number ``J`` for all. The energy is NaN for
            trained or sampled couplings above 0 without ``maximum``; give such a parameter a constraint, as
            ``numpyro.param("couplings", -0.1, constraint=constraints.less_than(0.0))``.
        fields: of the shape of the event, or one number, the log rates of elements whose neighbours are 0.
        maximum: the largest count; None for none.

    Raises:
        EnergyError: for positive couplings without ``maximum``, couplings that are not one per edge, fields of another
            shape, and a ``maximum`` that is no whole number of 1 or more.

    Example:
        >>> energy = PoissonGraphicalModel([(0, 1)], couplings=0.0, fields=jnp.log(2.0), maximum=50)
        >>> round(float(energy.log_partition()), 4)  # 2 + 2
        4.0

    References:
        Besag, Spatial interaction and the statistical analysis of lattice systems (1974); Yang, Ravikumar, Allen and Liu,
        Graphical models via univariate exponential family distributions (2015), also for the cut-off counts.
    """

    graph: Graph
    couplings: Any
    fields: Any = 0.0
    maximum: int | None = None

    def __init__(
        self, graph: Graph | ArrayLike, couplings: ArrayLike, fields: ArrayLike = 0.0, *, maximum: int | None = None
    ):
        owner = type(self).__name__
        graph = as_graph(graph)
        couplings = as_parameters(owner, "couplings", couplings, (graph.num_edges,))
        if maximum is not None:
            check_count(owner, "maximum", maximum)
        elif is_concrete(couplings) and np.any(np.asarray(couplings) > 0):
            raise EnergyError(
                f"{owner} needs couplings <= 0, or its log Z is infinite; got {float(couplings.max()):.3g}. Write "
                f"-jnp.abs(couplings), or {owner}(..., maximum=100) for counts up to 100."
            )
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "couplings", couplings)
        object.__setattr__(self, "fields", as_parameters(owner, "fields", fields, graph.shape))
        object.__setattr__(self, "maximum", maximum if maximum is None else int(maximum))

    @property
    def support(self) -> constraints.Constraint:
        """``constraints.nonnegative_integer``, or ``constraints.integer_interval(0, maximum)``."""
        if self.maximum is None:
            return constraints.nonnegative_integer
        return constraints.integer_interval(0, self.maximum)

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event; NaN where log Z is infinite."""
        x = as_floats(event).reshape(-1)
        value = jnp.sum(gammaln(x + 1) - self.fields.reshape(-1) * x) - jnp.sum(self._products(x))
        return value if self.maximum is not None else jnp.where(jnp.all(self.couplings <= 0), value, jnp.nan)

    def conditional(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> dist.Distribution:
        """Return the Poisson distribution of elements given all others; with ``maximum`` a categorical one over 0, 1, ..."""
        fields = self._local_fields(event, index)
        return dist.Poisson(jnp.exp(fields)) if self.maximum is None else dist.CategoricalLogits(self._logits(fields))

    @property
    def has_conditionals(self) -> bool:
        """Whether there is a largest count, so that the values of an element can be listed."""
        return self.maximum is not None

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return ``field_i * value - log(value!)`` for the counts from 0 to ``maximum``."""
        if self.maximum is None:
            return super().conditional_logits(event, index)
        return self._logits(self._local_fields(event, index))

    def log_ratio(self, event: Shaped[Array, "*event"], index: Int[Array, ""], value: Shaped[Array, ""]) -> Scalar:
        """Return the log density with one element at another count minus that of the event; NaN where log Z is infinite."""
        own, new = as_floats(event).reshape(-1)[index], as_floats(value)
        ratio = self._local_fields(event, index) * (new - own) - gammaln(new + 1) + gammaln(own + 1)
        return ratio if self.maximum is not None else jnp.where(jnp.all(self.couplings <= 0), ratio, jnp.nan)

    @property
    def num_terms(self) -> int | None:
        """Number of terms of the sums over single nodes; None without a largest count."""
        return None if self.maximum is None else elimination.num_terms(self.graph, self.maximum + 1)

    def log_partition(self) -> Scalar:
        """Return log Z by summing out one node after another."""
        if self.maximum is None:
            return super().log_partition()
        edges = self.couplings[:, None, None] * self._values[:, None] * self._values
        return elimination.log_partition(self.graph, self._logits(self.fields.reshape(-1)), edges)

    def _local_fields(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None
    ) -> Float[Array, "..."]:
        sums, index = self._sums(event, index)
        return self.fields.reshape(-1)[index] + sums

    def _logits(self, fields: Float[Array, "..."]) -> Float[Array, "... values"]:
        return fields[..., None] * self._values - gammaln(self._values + 1)

    @property
    def _values(self) -> Float[Array, " values"]:
        """The counts up to the largest one."""
        return jnp.arange((self.maximum or 0) + 1.0)
