"""The exponential graphical model."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Int, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._auto_model import GraphAutoModel
from numpyro_ebm.energies._units import as_parameters
from numpyro_ebm.energies.graph import Graph
from numpyro_ebm.energies.ising import as_graph


@record("graph", eq=False)
class ExponentialGraphicalModel(GraphAutoModel):
    r"""The exponential graphical model: positive elements with exponential conditionals, coupled along a graph.

    .. math:: E(x) = \sum_i \theta_i x_i + \sum_{(a,b)} J_{ab} x_a x_b, \qquad
        x_i \mid x_{-i} \sim \text{Exponential}\Big(\theta_i + \sum_j J_{ij} x_j\Big)

    A coupling is 0 or positive, and neighbours compete. log Z has no closed form.

    Args:
        graph: a `Graph`, or its edges as ``(num_edges, 2)`` numbers of nodes from 0 on; ``Graph.complete(d)`` couples all.
        couplings: ``(num_edges,)`` in the order of the graph's edges, or one number ``J`` for all; 0 or above.
        rates: of the shape of the event, or one number, the :math:`\theta_i`, above 0. The energy is NaN for trained or
            sampled rates and couplings outside these bounds; give such parameters a constraint, as
            ``numpyro.param("rates", 1.0, constraint=constraints.positive)``.

    Raises:
        EnergyError: for negative couplings, rates that are not positive, and other shapes.

    Example:
        >>> energy = ExponentialGraphicalModel([(0, 1)], couplings=0.5, rates=1.0)
        >>> energy.conditional(jnp.array([1.0, 2.0])).mean.tolist()
        [0.5, 0.6666666865348816]

    References:
        Besag, Spatial interaction and the statistical analysis of lattice systems (1974); Yang, Ravikumar, Allen and Liu,
        Graphical models via univariate exponential family distributions (2015).
    """

    linear_in = ("couplings", "rates")
    graph: Graph
    couplings: Any
    rates: Any = 1.0

    def __init__(self, graph: Graph | ArrayLike, couplings: ArrayLike, rates: ArrayLike = 1.0):
        owner = type(self).__name__
        graph = as_graph(graph)
        couplings = as_parameters(owner, "couplings", couplings, (graph.num_edges,))
        if is_concrete(couplings) and np.any(np.asarray(couplings) < 0):
            raise EnergyError(
                f"{owner} needs couplings >= 0, or its log Z is infinite; got {float(couplings.min()):.3g}. Write "
                "jnp.abs(couplings)."
            )
        check_positive(owner, "rates", rates)
        object.__setattr__(self, "graph", graph)
        object.__setattr__(self, "couplings", couplings)
        object.__setattr__(self, "rates", as_parameters(owner, "rates", rates, graph.shape))

    @property
    def support(self) -> constraints.Constraint:
        """``constraints.positive``."""
        return constraints.positive

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event; NaN where log Z is infinite."""
        x, rates = as_floats(event).reshape(-1), self.rates.reshape(-1)
        is_finite = jnp.all(self.couplings >= 0) & jnp.all(rates > 0)
        return jnp.where(is_finite, jnp.sum(rates * x) + jnp.sum(self._products(x)), jnp.nan)

    def conditional(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> dist.Exponential:
        """Return the exponential distribution of elements given all others."""
        sums, index = self._sums(event, index)
        return dist.Exponential(self.rates.reshape(-1)[index] + sums)
