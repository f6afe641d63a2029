"""Statistics of networks: what an exponential-family random graph model counts."""

import abc
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, Scalar
from numpyro_ebm.energies._units import check_finite
from numpyro_ebm.energies.networks import Dyads, Network

Dependence = Literal["pair", "node", "network"]
Nodes = Int[Array | np.ndarray, "..."]


class AbstractNetworkStatistic(abc.ABC):
    """A statistic of a network: a number, and how it changes with one tie.

    A statistic of one's own defines `value`; `change` is then the difference of two values. Its changes by a formula make
    sampling and pseudolikelihood faster. Statistics are pytrees of arrays (``jax.tree_util.register_dataclass``).

    Attributes:
        dependence: how far a tie depends on others, which decides whether log Z and `ERGM.blocks` are known. "pair": on no
            tie of another pair of nodes. "node": given all ties that share a node with it, on no others. "network": on any.
        is_directed: whether the statistic is one of networks with directions; None for both kinds.
    """

    dependence: ClassVar[Dependence] = "network"
    is_directed: ClassVar[bool | None] = None

    @abc.abstractmethod
    def value(self, network: Network) -> Scalar:
        """Return the statistic of a network."""

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the value with the tie from node ``i`` to node ``j`` minus the value without it, other ties as they are."""
        return self.value(network.with_tie(i, j, 1.0)) - self.value(network.with_tie(i, j, 0.0))

    def check(self, dyads: Dyads) -> None:
        """Check that the statistic is one of these networks.

        Raises:
            EnergyError: for a statistic of the other kind of ties.
        """
        if self.is_directed is None or self.is_directed == dyads.is_directed:
            return
        owner, kinds = type(self).__name__, ("without directions", "with directions")
        fix = (
            f"Dyads({dyads.num_nodes}, is_directed=True)"
            if self.is_directed
            else f"Dyads({dyads.num_nodes}) for the ties without their directions, np.maximum(adjacency, adjacency.T)"
        )
        raise EnergyError(
            f"{owner} is a statistic of networks {kinds[self.is_directed]}, and the ties here are "
            f"{kinds[dyads.is_directed]}. Write {fix}."
        )


class PairStatistic(AbstractNetworkStatistic):
    """A sum over the ties, each with a weight that depends on its two nodes alone."""

    dependence = "pair"

    @abc.abstractmethod
    def weights(self, i: Nodes, j: Nodes) -> Float[Array, "..."]:
        """Return the weights of ties from nodes ``i`` to nodes ``j``."""

    def value(self, network: Network) -> Scalar:
        """Return the sum of the weights of the ties."""
        return jnp.sum(network[network.dyads.ends] * self.weights(*network.dyads.ends))

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the weight of the tie."""
        return self.weights(i, j)


@record(eq=False)
class Edges(PairStatistic):
    r"""The number of ties: :math:`\sum_{ij} y_{ij}` (``edges`` in statnet).

    Example:
        >>> round(float(ERGM(4, [Edges()], [0.0]).log_partition()), 4)  # 6 log 2
        4.1589
    """

    def weights(self, i: Nodes, j: Nodes) -> Float[Array, "..."]:
        """Return ones."""
        return jnp.ones(jnp.shape(i))


@record(eq=False)
class NodeMatch(PairStatistic):
    r"""The number of ties between nodes with equal attributes: :math:`\sum_{ij} y_{ij} [a_i = a_j]` (``nodematch``).

    Args:
        attribute: ``(num_nodes,)``, the attribute of each node: numbers or words.

    Raises:
        EnergyError: for attributes that are not a vector, numbers that are not finite, and, in an `ERGM`, another number of
            nodes.

    Example:
        ``NodeMatch(["Turks", "Turks", "Outcasts"])``
    """

    attribute: Any

    def __post_init__(self):
        object.__setattr__(self, "attribute", _per_node(type(self).__name__, "attribute", _codes(self.attribute)))

    def check(self, dyads: Dyads) -> None:
        """Check the number of nodes."""
        _check_nodes(self, "attribute", self.attribute.shape, (dyads.num_nodes,))

    def weights(self, i: Nodes, j: Nodes) -> Float[Array, "..."]:
        """Return 1 for nodes with equal attributes, else 0."""
        return (self.attribute[i] == self.attribute[j]).astype(float)


@record(eq=False)
class NodeCovariate(PairStatistic):
    r"""The sum over the ties of a covariate at both ends: :math:`\sum_{ij} y_{ij} (x_i + x_j)` (``nodecov``).

    Args:
        values: ``(num_nodes,)``, the covariate of each node.

    Raises:
        EnergyError: for values that are not a vector of finite numbers, and, in an `ERGM`, another number of nodes.

    Example:
        ``NodeCovariate(wealth)``; for the sender of a tie alone, ``EdgeCovariate(np.tile(wealth[:, None], num_nodes))``
    """

    values: Any

    def __post_init__(self):
        object.__setattr__(self, "values", _per_node(type(self).__name__, "values", self.values))

    def check(self, dyads: Dyads) -> None:
        """Check the number of nodes."""
        _check_nodes(self, "values", self.values.shape, (dyads.num_nodes,))

    def weights(self, i: Nodes, j: Nodes) -> Float[Array, "..."]:
        """Return the sum of the covariates of two nodes."""
        return self.values[i] + self.values[j]


@record(eq=False)
class EdgeCovariate(PairStatistic):
    r"""The sum over the ties of a covariate of the pair: :math:`\sum_{ij} y_{ij} x_{ij}` (``edgecov``).

    Args:
        values: ``(num_nodes, num_nodes)``, such as distances or another network. The diagonal does not count; without
            directions, the entries above it do.

    Raises:
        EnergyError: for values that are not a square matrix of finite numbers, and, in an `ERGM`, another number of nodes or
            a matrix that is not symmetric where ties have no direction.

    Example:
        ``EdgeCovariate(np.abs(age[:, None] - age))``
    """

    values: Any

    def __post_init__(self):
        owner, values = type(self).__name__, jnp.asarray(self.values, float)
        if values.ndim != 2 or values.shape[0] != values.shape[1]:
            raise EnergyError(f"{owner} needs values of shape (num_nodes, num_nodes); got shape {values.shape}.")
        check_finite(owner, "values", values)
        object.__setattr__(self, "values", values)

    def check(self, dyads: Dyads) -> None:
        """Check the number of nodes, and symmetry where ties have no direction."""
        _check_nodes(self, "values", self.values.shape, (dyads.num_nodes, dyads.num_nodes))
        if not dyads.is_directed and is_concrete(self.values) and not np.array_equal(self.values, self.values.T):
            raise EnergyError(
                "EdgeCovariate needs symmetric values, since the ties have no direction; got a matrix that is not. Write "
                "0.5 * (values + values.T)."
            )

    def weights(self, i: Nodes, j: Nodes) -> Float[Array, "..."]:
        """Return the covariates of pairs."""
        return self.values[i, j]


@record(eq=False)
class Mutual(AbstractNetworkStatistic):
    r"""The number of pairs with a tie in both directions: :math:`\sum_{i < j} y_{ij} y_{ji}` (``mutual``).

    References:
        Holland and Leinhardt, An exponential family of probability distributions for directed graphs (1981).
    """

    dependence = "pair"
    is_directed = True

    def value(self, network: Network) -> Scalar:
        """Return the number of mutual pairs."""
        tails, heads = network.dyads.ends
        return 0.5 * jnp.sum(network[tails, heads] * network[heads, tails])

    def change(self, network: Network, i: Int[Array, ""], j: Int[Array, ""]) -> Scalar:
        """Return the tie back."""
        return network[j, i]


def _codes(attribute: Any) -> Any:
    """Return known words and numbers as the numbers of their kinds: large numbers would not differ as floats."""
    if hasattr(attribute, "dtype") and not is_concrete(attribute):
        return attribute
    values = np.asarray(attribute)
    if values.dtype.kind == "O":
        missing = [node for node, value in enumerate(values.ravel()) if value is None]
        if missing:
            raise EnergyError(f"NodeMatch needs an attribute of each node; node {missing[0]} has None. Write a word for it.")
        values = values.astype(str)
    if values.dtype.kind in "fc" and not np.all(np.isfinite(values)):
        return values  # refused with the number of the node
    return np.unique(values, return_inverse=True)[1].reshape(values.shape)


def _per_node(owner: str, name: str, value: ArrayLike) -> Float[Array, " nodes"]:
    """Return one finite number per node."""
    array = jnp.asarray(value, float)
    if array.ndim != 1:
        raise EnergyError(f"{owner} needs {name} of shape (num_nodes,), one for each node; got shape {array.shape}.")
    check_finite(owner, name, array)
    return array


def _check_nodes(statistic: Any, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if shape != wanted:
        owner = type(statistic).__name__
        raise EnergyError(f"{owner} needs {name} of shape {wanted} for {wanted[0]} nodes; got shape {shape}.")
