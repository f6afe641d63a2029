"""Swendsen-Wang: clusters of equal neighbours, for Ising and Potts energies on a graph."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.discrete import at_edges
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm._core.uniforms import uniforms
from numpyro_ebm.kernels._base import TransitionInfo, info
from numpyro_ebm.kernels.densities import Known, described, known_of
from numpyro_ebm.kernels.elements import BlockState, DiscreteKernel, Elements, choose, log_ratio


@record()
class SwendsenWang(DiscreteKernel):
    r"""Swendsen-Wang: bonds join equal neighbours to clusters, and each cluster takes a new value at once.

    With :math:`\log p(x) = \sum_{(a,b)} K_{ab} [x_a = x_b] + \sum_i f_i(x_i)`, a transition joins equal neighbours with
    probability ``1 - exp(-K)``, and draws the value ``v`` of a cluster ``C`` with probability proportional to
    :math:`\exp(\sum_{i \in C} f_i(v))`. Near the critical temperature of a ferromagnet it decorrelates a lattice in a few
    transitions, where `Gibbs` needs a number that grows with the square of its width.

    Only edges with ``K > 0`` make bonds. If there are edges with ``K < 0``, the new state is accepted with probability
    ``min(1, exp(change of their part of log p))``, which keeps the kernel exact for any couplings; with many such edges the
    chain moves rarely, as ``acceptance_rate`` shows, and "block_gibbs" is the better kernel. The fields of `Autologistic`
    differ between rows, and each chain has those of its row.

    Args:
        values: as in `Gibbs`.

    Raises:
        EnergyError: at the first use, for an energy that is not an Ising or Potts energy on a graph.

    Example:
        ``sample(rng_key, EnergyDistribution(energies.Ising(energies.Graph.lattice(64, 64), 0.44)), "swendsen_wang")``

    References:
        Swendsen and Wang, Nonuniversal critical dynamics in Monte Carlo simulations (1987); Edwards and Sokal,
        Generalization of the Fortuin-Kasteleyn-Swendsen-Wang representation and Monte Carlo algorithm (1988).
    """

    name: ClassVar[str] = "swendsen_wang"
    is_reversible: ClassVar[bool] = True
    needs_density: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with the values of the support, after a check that the energy has bonds.

        Raises:
            EnergyError: for an energy without bonds, and values that do not fit.
        """
        _checked(self.name, distribution.known)
        return super().bind(distribution)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Return the position as the state."""
        return BlockState(position)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Join neighbours to clusters, and draw the value of each cluster."""
        known = _checked(self.name, known_of(log_density))
        elements = Elements.of(self.values, state.position)
        codes, bonds = elements.codes(state.position), known.energy.bonds
        strengths, fields = known.factor * bonds.strengths, known.factor * bonds.fields
        fields = fields if known.offsets is None else fields + known.offsets
        key_bonds, key_values, key_accept = jax.random.split(rng_key, 3)

        clusters = label(bonds.graph, _joined(key_bonds, bonds.graph, strengths, codes))
        logits = jax.ops.segment_sum(fields, clusters, bonds.graph.num_nodes)
        drawn = choose(uniforms(key_values, (bonds.graph.num_nodes,), logits.dtype), logits)
        proposed = drawn[clusters].astype(codes.dtype)

        repulsive = jnp.minimum(strengths, 0.0)
        rise = log_ratio(*(_agreement(bonds.graph, repulsive, each) for each in (proposed, codes)))
        is_bad = ~(jnp.all(jnp.isfinite(strengths)) & jnp.all(jnp.isfinite(fields)))
        accepted = (jnp.log1p(-jax.random.uniform(key_accept)) < rise) & ~is_bad
        new = elements.position(jnp.where(accepted, proposed, codes), state.position)
        rate = jnp.where(is_bad, 0.0, jnp.exp(jnp.minimum(rise, 0.0)))
        return BlockState(new), info(rate, False, 1, is_nonfinite=is_bad)  # noqa: FBT003


def label(graph: Any, joined: Bool[Array, " edges"]) -> Int[Array, " nodes"]:
    """Return the smallest node of each node's cluster, where clusters are connected by the edges that are joined.

    Labels spread to neighbours, and then from each node to the node that its label names, which shortens long ways.
    """
    nodes, edges = (jnp.asarray(table) for table in graph.neighbors)
    is_open = at_edges(joined, edges)

    def spread(carry):
        labels, _ = carry
        around = jnp.where(is_open, labels[nodes], graph.num_nodes)
        new = jnp.minimum(labels, jnp.min(around, axis=1))
        new = jnp.minimum(new, new[new])
        return new, jnp.any(new != labels)

    start = (jnp.arange(graph.num_nodes), jnp.ones((), bool))
    return jax.lax.while_loop(lambda carry: carry[1], spread, start)[0]


def _joined(
    rng_key: PRNGKey, graph: Any, strengths: Float[Array, " edges"], codes: Int[Array, " nodes"]
) -> Bool[Array, " edges"]:
    """Draw the bonds: equal neighbours are joined with probability ``1 - exp(-strength)``, none where it is negative."""
    left, right = graph.edges.T
    drawn = uniforms(rng_key, strengths.shape, strengths.dtype)
    return (codes[left] == codes[right]) & (drawn < -jnp.expm1(-jnp.maximum(strengths, 0.0)))


def _agreement(graph: Any, strengths: Float[Array, " edges"], codes: Int[Array, " nodes"]) -> Scalar:
    """Return the sum of the strengths of the edges between equal neighbours."""
    left, right = graph.edges.T
    return jnp.sum(jnp.where(codes[left] == codes[right], strengths, 0.0))


def _checked(kernel: str, known: Known | None) -> Known:
    """Return what is known of a density with bonds, and raise for any other."""
    if known is not None and known.energy.has_bonds:
        return known
    raise EnergyError(
        f"The kernel '{kernel}' needs an Ising or Potts energy on a graph, alone in its distribution; got "
        f"{described(known)}. Write EnergyDistribution(numpyro_ebm.energies.Ising(graph, couplings)), or kernel='gibbs'."
    )
