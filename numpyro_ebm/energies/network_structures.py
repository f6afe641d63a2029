"""Statistics of the structure of networks: stars, triangles, degrees and shared partners."""

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, Scalar
from numpyro_ebm.energies._units import as_parameters
from numpyro_ebm.energies.network_statistics import AbstractNetworkStatistic
from numpyro_ebm.energies.networks import Network


@record("k", eq=False)
class KStars(AbstractNetworkStatistic):
    r"""The number of stars with ``k`` ties: :math:`\sum_i \binom{d_i}{k}` with the degrees :math:`d_i` (``kstar``).

    Args:
        k: number of ties of a star, 2 or more.

    Raises:
        EnergyError: for a ``k`` that is not a whole number of 2 or more.

    References:
        Frank and Strauss, Markov graphs (1986).
    """

    dependence = "node"
    is_directed = False
    k: int = 2

    def __post_init__(self):
        check_count(type(self).__name__, "k", self.k, 2)

    def value(self, network: Network) -> Scalar:
        """Return the number of stars."""
        return jnp.sum(_choose(_degrees(network), self.k))

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the number of stars with one tie less at both ends."""
        return jnp.sum(_choose(jnp.sum(_other_ties(network, i, j), axis=1), self.k - 1))


@record(eq=False)
class Triangles(AbstractNetworkStatistic):
    r"""The number of triangles: :math:`\sum_{i<j<k} y_{ij} y_{jk} y_{ik}` (``triangle``).

    References:
        Frank and Strauss, Markov graphs (1986).
    """

    dependence = "node"
    is_directed = False

    def value(self, network: Network) -> Scalar:
        """Return the number of triangles."""
        return jnp.sum(network[:] * _shared_partners(network)) / 6

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the number of partners that the two nodes share."""
        return jnp.prod(_other_ties(network, i, j), axis=0).sum()


class GeometricallyWeighted(AbstractNetworkStatistic):
    r"""A sum of counts, each of which weighs :math:`w(c) = e^\alpha (1 - (1 - e^{-\alpha})^c)`.

    Additional ones count less and less: by a factor of :math:`1 - e^{-\alpha}`.
    """

    is_directed = False
    decay: Any

    def __post_init__(self):
        owner = type(self).__name__
        decay = as_parameters(owner, "decay", self.decay, ())
        if is_concrete(decay) and decay < 0:
            raise EnergyError(f"{owner} needs decay >= 0; got {float(decay):.3g}. Write {owner}(decay=0.5).")
        object.__setattr__(self, "decay", decay)

    def weigh(self, counts: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of counts."""
        return jnp.exp(self.decay) * (1 - self.next_weight(counts))

    def next_weight(self, counts: Float[Array, "..."]) -> Float[Array, "..."]:
        """Return the weight of one more than the counts, minus that of the counts."""
        return (-jnp.expm1(-self.decay)) ** counts


@record(eq=False)
class GWDegree(GeometricallyWeighted):
    r"""The geometrically weighted degrees (``gwdegree`` with a fixed decay).

    .. math:: e^\alpha \sum_i \left[1 - (1 - e^{-\alpha})^{d_i}\right]

    Args:
        decay: the :math:`\alpha`, 0 or more. With 0, the statistic is the number of nodes that have ties. It may be a latent
            or trained value, which makes the model a curved one.

    Raises:
        EnergyError: for a decay that is negative or not finite.

    References:
        Snijders, Pattison, Robins and Handcock, New specifications for exponential random graph models (2006); Hunter and
        Handcock, Inference in curved exponential family models for networks (2006).
    """

    dependence = "node"
    decay: Any

    def value(self, network: Network) -> Scalar:
        """Return the sum of the weights of the degrees."""
        return jnp.sum(self.weigh(_degrees(network)))

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the weights of one tie more at both ends."""
        return jnp.sum(self.next_weight(jnp.sum(_other_ties(network, i, j), axis=1)))


@record(eq=False)
class GWESP(GeometricallyWeighted):
    r"""The geometrically weighted edgewise shared partners (``gwesp`` with a fixed decay).

    .. math:: e^\alpha \sum_{i<j} y_{ij} \left[1 - (1 - e^{-\alpha})^{p_{ij}}\right], \qquad p_{ij} = \sum_k y_{ik} y_{jk}

    Args:
        decay: the :math:`\alpha`, 0 or more. With 0, the statistic is the number of ties in triangles. It may be a latent or
            trained value, which makes the model a curved one.

    Raises:
        EnergyError: for a decay that is negative or not finite.

    References:
        Snijders, Pattison, Robins and Handcock, New specifications for exponential random graph models (2006); Hunter and
        Handcock, Inference in curved exponential family models for networks (2006).
    """

    decay: Any

    def value(self, network: Network) -> Scalar:
        """Return the sum over ties of the weights of shared partners."""
        return 0.5 * jnp.sum(network[:] * self.weigh(_shared_partners(network)))

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the weight of the tie itself, and those of one partner more for the ties to shared partners."""
        rows = _other_ties(network, i, j)
        shared = jnp.prod(rows, axis=0)
        return self.weigh(jnp.sum(shared)) + jnp.sum(shared * self.next_weight(rows @ network[:]))


def _degrees(network: Network) -> Float[Array, " nodes"]:
    return jnp.sum(network[:], axis=1)


def _shared_partners(network: Network) -> Float[Array, "nodes nodes"]:
    adjacency = network[:]
    return adjacency @ adjacency


def _other_ties(network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Float[Array, "2 nodes"]:
    """Return the ties of two nodes to all others, without the tie between the two."""
    return jnp.stack([network[i].at[j].set(0.0), network[j].at[i].set(0.0)])


def _choose(n: Float[Array, "..."], k: int) -> Float[Array, "..."]:
    """Return the number of choices of ``k`` among ``n``."""
    return jnp.prod(jnp.stack([n - i for i in range(k)]).astype(float), axis=0) / math.factorial(k)
