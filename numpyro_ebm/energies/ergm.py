"""Exponential-family random graph models."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._units import UnitEnergy, check_finite
from numpyro_ebm.energies.ising import take
from numpyro_ebm.energies.network_statistics import AbstractNetworkStatistic
from numpyro_ebm.energies.networks import Dyads, Network

NUMBERS_AT_ONCE = 2**24
"""Entries of adjacency matrices that the changes of many ties read at once: 64 MB in float32."""


@record("dyads", eq=False)
class ERGM(UnitEnergy):
    r"""The exponential-family random graph model: networks weighted by their statistics.

    .. math:: E(y) = -\sum_k \theta_k s_k(y), \qquad \operatorname{logit} p(y_{ij} = 1 \mid y_{-ij}) = \sum_k \theta_k \,
        \left[s_k(y^+_{ij}) - s_k(y^-_{ij})\right]

    An event is the vector of the ties, see `Dyads`; ``Dyads(n).from_adjacency(matrix)`` makes it. `Gibbs`, `BlockGibbs` and
    `Pseudolikelihood` use the changes :math:`s_k(y^+_{ij}) - s_k(y^-_{ij})` of the statistics with one tie, which cost ``n``
    operations, or ``n ** 2`` for `GWESP`, instead of the statistics themselves. Statistics and names follow the ``ergm``
    package of statnet.

    * `Edges`, `NodeMatch`, `NodeCovariate`, `EdgeCovariate` and `Mutual`: the pairs of nodes are independent, log Z is a
      closed form, and `Exact` gives the likelihood.
    * `KStars`, `Triangles` and `GWDegree`: ties without a common node are independent given the others, and `BlockGibbs`
      draws them together, in about ``n`` blocks.
    * `GWESP`: no such independence. log Z is a sum over all networks.

    With `KStars` and `Triangles`, most of the probability often lies on nearly empty and nearly full networks; the
    geometrically weighted statistics are there to avoid that.

    Args:
        dyads: the `Dyads`, or the number of nodes of a network without directions.
        statistics: a list of statistics, such as ``[Edges(), GWESP(0.5)]``.
        coefficients: ``(num_statistics,)``, the :math:`\theta`.

    Raises:
        EnergyError: without statistics, for statistics of the other kind of ties or of another number of nodes, and for
            coefficients that are not one finite number per statistic.
        TypeError: for statistics that are not a list of such objects, and for one of your own that is no pytree.

    Example:
        >>> energy = ERGM(3, [Edges(), Triangles()], [0.0, 1.0])
        >>> float(energy(Dyads(3).from_adjacency([[0, 1, 1], [1, 0, 1], [1, 1, 0]])))
        -1.0

    References:
        Frank and Strauss, Markov graphs (1986); Snijders, Pattison, Robins and Handcock, New specifications for exponential
        random graph models (2006); Hunter and Handcock, Inference in curved exponential family models for networks (2006);
        Caimo and Friel, Bayesian inference for exponential random graph models (2011), for their posteriors.
    """

    linear_in = ("coefficients",)
    units = "boolean"
    dyads: Dyads
    statistics: Any
    coefficients: Any

    def __init__(self, dyads: Dyads | int, statistics: Sequence[AbstractNetworkStatistic], coefficients: ArrayLike):
        dyads = dyads if isinstance(dyads, Dyads) else Dyads(dyads)
        statistics = _checked(dyads, statistics)
        object.__setattr__(self, "dyads", dyads)
        object.__setattr__(self, "statistics", statistics)
        object.__setattr__(self, "coefficients", _as_coefficients(statistics, coefficients))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(num_ties,)``."""
        return (self.dyads.num_ties,)

    def __call__(self, event: Shaped[Array, " ties"]) -> Scalar:
        """Return the energy of one network."""
        return -self.coefficients @ self.values(event)

    def values(self, event: Shaped[Array, " ties"]) -> Float[Array, " statistics"]:
        """Return the statistics of one network, which are sufficient for the coefficients."""
        network = Network(jnp.asarray(event), self.dyads)
        return jnp.stack([statistic.value(network) for statistic in self.statistics])

    def changes(
        self, event: Shaped[Array, " ties"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... statistics"]:
        """Return the statistics with a tie minus those without it, other ties as they are.

        Args:
            event: one network.
            index: numbers of ties, of any shape; None for all.
        """
        network = Network(jnp.asarray(event), self.dyads)
        index = np.arange(self.dyads.num_ties) if index is None else index

        def of_tie(ends):
            return jnp.stack([statistic.change(network, *ends) for statistic in self.statistics])

        i, j = (take(nodes, index) for nodes in self.dyads.ends)
        at_once = max(1, NUMBERS_AT_ONCE // self.dyads.num_nodes)
        flat = (jnp.ravel(i), jnp.ravel(j))
        each = jax.vmap(of_tie)(flat) if i.size <= at_once else jax.lax.map(of_tie, flat, batch_size=at_once)
        return each.reshape(*i.shape, len(self.statistics))

    def local_fields(
        self, event: Shaped[Array, " ties"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return the log odds of ties given all others."""
        return self.changes(event, index) @ self.coefficients

    @property
    def blocks(self) -> tuple[np.ndarray, ...] | None:
        """Ties that are independent given the others; None if any two ties may depend on each other."""
        dependences = {statistic.dependence for statistic in self.statistics}
        if "network" in dependences:
            return None
        tails, heads = self.dyads.ends
        rounds = self.dyads.rounds if "node" in dependences else np.zeros_like(tails)
        numbers = 2 * rounds + (tails > heads)  # the two ties of one pair are never drawn together
        return tuple(np.flatnonzero(numbers == number) for number in np.unique(numbers))

    @property
    def num_terms(self) -> int | None:
        """Number of states of all pairs of nodes, one by one, if the pairs are independent; None if they are not."""
        return 2 * self.dyads.num_ties if self._has_free_pairs else None

    def log_partition(self) -> Scalar:
        """Return log Z pair by pair.

        Raises:
            EnergyError: for statistics under which the pairs of nodes depend on each other.
        """
        if not self._has_free_pairs:
            return super().log_partition()
        alone = self.local_fields(jnp.zeros(self.event_shape))
        if not self.dyads.is_directed:
            return jnp.sum(jax.nn.softplus(alone))
        second = self.local_fields(jnp.ones(self.event_shape))  # beside a tie in the other direction
        tails, heads = np.triu_indices(self.dyads.num_nodes, 1)
        there, back = self.dyads.places[tails, heads], self.dyads.places[heads, tails]
        one, other = alone[there], alone[back]
        return jnp.sum(jax.nn.logsumexp(jnp.stack([jnp.zeros_like(one), one, other, one + second[back]]), axis=0))

    @property
    def _has_free_pairs(self) -> bool:
        return all(statistic.dependence == "pair" for statistic in self.statistics)


def _checked(dyads: Dyads, statistics: Any) -> tuple[AbstractNetworkStatistic, ...]:
    """Return statistics, after a check that they are some, and of these networks."""
    write = "Write ERGM(num_nodes, [Edges(), GWESP(0.5)], coefficients)."
    if not isinstance(statistics, list | tuple):
        raise TypeError(f"ERGM needs a list of statistics; got {type(statistics).__name__}. {write}")
    for each in statistics:
        if not isinstance(each, AbstractNetworkStatistic):
            what = f"the class {each.__name__}" if isinstance(each, type) else type(each).__name__
            raise TypeError(f"ERGM needs statistics as objects; got {what} among them. {write}")
        if any(leaf is each for leaf in jax.tree.leaves(each)):
            raise TypeError(
                f"ERGM needs statistics that are pytrees, and {type(each).__name__} is none. Write "
                "@jax.tree_util.register_dataclass above @dataclasses.dataclass(frozen=True) at its class."
            )
    if not statistics:
        raise EnergyError(f"ERGM needs a statistic or more; got none. {write}")
    for each in statistics:
        each.check(dyads)
    return tuple(statistics)


def _as_coefficients(
    statistics: tuple[AbstractNetworkStatistic, ...], coefficients: ArrayLike
) -> Float[Array, " statistics"]:
    """Return one coefficient for each statistic."""
    array = jnp.asarray(coefficients, float)
    if array.shape != (len(statistics),):
        names = ", ".join(type(each).__name__ for each in statistics)
        raise EnergyError(
            f"ERGM needs one coefficient for each of its statistics ({names}), shape ({len(statistics)},); got shape "
            f"{array.shape}. Write coefficients=jnp.zeros({len(statistics)})."
        )
    check_finite("ERGM", "coefficients", array)
    return array
