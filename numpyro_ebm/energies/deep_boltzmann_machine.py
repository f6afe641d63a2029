"""Deep Boltzmann machines: binary layers, each coupled to the next."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import log_sum_over_states
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.energies._units import BOOLEAN_VALUES, UnitEnergy, as_parameters, as_weights, draw, offsets_of

Layers = tuple[Array, ...]
"""One array for each layer, the visible one first."""


class LayeredMachine(UnitEnergy):
    """A machine of binary layers, each coupled to the layers before and after it.

    The event holds the units of all layers, the visible ones first. The even layers (visible, second hidden, ...) are
    independent of each other and within themselves given the odd ones, and the other way round.

    Attributes:
        weights: the weights from each layer to the next.
        biases: the biases of each layer.
        offsets: the offsets of each layer.
    """

    units = "boolean"
    weights: Layers
    biases: Layers
    offsets: Layers

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of units of each layer."""
        return tuple(len(biases) for biases in self.biases)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(units,)``, the units of all layers."""
        return (sum(self.sizes),)

    def __call__(self, event: Shaped[Array, " units"]) -> Scalar:
        """Return the energy of one event."""
        centred = self._centred(self.split(event))
        each = zip(centred[:-1], self.weights, centred[1:], strict=True)
        alone = sum((b @ x for b, x in zip(self.biases, centred, strict=True)), jnp.zeros(()))
        return -alone - sum(below @ weights @ above for below, weights, above in each)

    def split(self, event: Shaped[Array, "... units"]) -> tuple[Float[Array, "... _"], ...]:
        """Return the units of each layer of events, as floating-point numbers."""
        return tuple(jnp.split(as_floats(event), np.cumsum(self.sizes)[:-1], axis=-1))

    def local_fields(
        self, event: Shaped[Array, " units"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return the log odds that units are 1, given all others."""
        centred = self._centred(self.split(event))
        if isinstance(index, jax.Array) and not index.ndim:
            return self._field_of_unit(centred, index)
        needed = range(len(self.sizes)) if not isinstance(index, np.ndarray) else self._layers_of(index)
        zeros = [jnp.zeros(size) for size in self.sizes]
        fields = jnp.concatenate([self._fields(centred, k) if k in needed else zeros[k] for k in range(len(zeros))])
        return fields if index is None else fields[index]

    @property
    def blocks(self) -> tuple[np.ndarray, ...]:
        """The units of the odd layers, and those of the even ones."""
        numbers = np.split(np.arange(sum(self.sizes)), np.cumsum(self.sizes)[:-1])
        return np.concatenate(numbers[1::2]), np.concatenate(numbers[::2])

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, " units"]) -> Shaped[Array, " units"]:
        """Draw the odd layers given the even ones, and the even layers given these."""
        event = jnp.asarray(event)
        for key, block in zip(jax.random.split(rng_key), self.blocks, strict=True):
            event = event.at[block].set(draw(key, self.local_fields(event, block)).astype(event.dtype))
        return event

    @property
    def num_terms(self) -> int:
        """``2 ** n``, with ``n`` units in the even layers or in the odd ones, whichever are fewer."""
        return 2 ** sum(self.sizes[self._summed :: 2])

    def log_partition(self) -> Scalar:
        """Return log Z by the sum over the states of every other layer; the layers between them are summed out."""
        own = range(self._summed, len(self.sizes), 2)
        ends = np.cumsum([self.sizes[k] for k in own])

        def log_weight(states):
            known = dict(zip(own, jnp.split(as_floats(states), ends[:-1]), strict=True))
            centred = self._centred([known.get(k, self.offsets[k]) for k in range(len(self.sizes))])
            total = sum((self.biases[k] @ centred[k] for k in own), jnp.zeros(()))
            for k in range(1 - self._summed, len(self.sizes), 2):
                fields = self._fields(centred, k)
                total += jnp.sum(jax.nn.softplus(fields) - self.offsets[k] * fields)
            return total

        return log_sum_over_states(BOOLEAN_VALUES, (int(ends[-1]),), log_weight)

    def scaled(self, factor: Scalar | float) -> "DeepBoltzmannMachine":
        """Return the energy times a factor."""
        times = lambda layers: [factor * each for each in layers]  # noqa: E731
        return DeepBoltzmannMachine(times(self.weights), times(self.biases), list(self.offsets))

    @property
    def _summed(self) -> int:
        """The first of the layers over whose states log Z is a sum: 0 for the even ones, 1 for the odd ones."""
        return int(sum(self.sizes[::2]) > sum(self.sizes[1::2]))

    def _centred(self, layers: Sequence[Array]) -> list[Array]:
        return [units - offsets for units, offsets in zip(layers, self.offsets, strict=True)]

    def _fields(self, centred: Sequence[Array], k: int, which: Any = slice(None)) -> Array:
        """Return the log odds of units of one layer, given the layers around it."""
        fields = self.biases[k][which]
        if k:
            fields += centred[k - 1] @ self.weights[k - 1][:, which]
        return fields + self.weights[k][which] @ centred[k + 1] if k < len(self.weights) else fields

    def _field_of_unit(self, centred: Sequence[Array], index: Int[Array, ""]) -> Scalar:
        """Return the log odds of one unit, from the weights of this unit alone."""
        starts = np.cumsum((0, *self.sizes[:-1]))
        branches = [lambda i, k=k: self._fields(centred, k, i - starts[k]) for k in range(len(starts))]
        return jax.lax.switch(jnp.searchsorted(jnp.asarray(starts), index, side="right") - 1, branches, index)

    def _layers_of(self, index: Int[np.ndarray, "..."]) -> set[int]:
        return set((np.searchsorted(np.cumsum(self.sizes), index.reshape(-1), side="right")).tolist())


@record(eq=False)
class DeepBoltzmannMachine(LayeredMachine):
    r"""The deep Boltzmann machine: binary layers, visible and hidden, each coupled to the next.

    .. math:: E(x_0, \ldots, x_L) = -\sum_{k=1}^{L} (x_{k-1} - m_{k-1})^T W_k (x_k - m_k) - \sum_{k=0}^{L} b_k^T (x_k - m_k)

    The event holds the units of all layers, of 0 and 1, the visible layer :math:`x_0` first; `split` returns them by layer.
    The even layers (visible, second hidden, ...) are independent given the odd ones and the other way round: they are the
    `blocks`, and `sweep` draws one after the other. log Z is the sum over the states of whichever of the two has fewer
    units, the others summed out. A machine with one hidden layer is the joint form of an `RBM`.

    Args:
        weights: a list of matrices, ``(d, n_1), (n_1, n_2), ...``, from each layer to the next.
        biases: a list of one bias for each layer, ``(d,), (n_1,), ...`` or numbers; or one number for all units.
        offsets: a list of one offset for each layer, or one number, subtracted from the units; the means of the layers
            centre the machine.
        centered: short for offsets of 1/2, in the middle of the values. A centred machine trains alike on ``x`` and on
            ``1 - x``, and its layers learn at the same pace.

    Raises:
        EnergyError: for weights that are no matrices or do not fit each other, and for biases or offsets that do not match
            them.

    Example:
        >>> energy = DeepBoltzmannMachine([jnp.zeros((4, 3)), jnp.zeros((3, 2))])
        >>> energy.event_shape, energy.num_terms, round(float(energy.log_partition()), 4)  # 9 log 2
        ((9,), 8, 6.2383)

    References:
        Salakhutdinov and Hinton, Deep Boltzmann machines (2009); Montavon and Mueller, Deep Boltzmann machines and the
        centering trick (2012); Melchior, Fischer and Wiskott, How to center deep Boltzmann machines (2016).
    """

    weights: Any
    biases: Any = 0.0
    offsets: Any = None

    def __init__(
        self,
        weights: Sequence[ArrayLike],
        biases: ArrayLike | Sequence[ArrayLike] = 0.0,
        offsets: ArrayLike | Sequence[ArrayLike] | None = None,
        *,
        centered: bool = False,
    ):
        owner = type(self).__name__
        weights = _as_matrices(owner, weights)
        sizes = [len(weights[0]), *(matrix.shape[1] for matrix in weights)]
        biases, means = _by_layer(owner, "biases", biases, sizes), _by_layer(owner, "offsets", offsets, sizes)
        shaped = [as_parameters(owner, f"biases[{k}]", own, (sizes[k],)) for k, own in enumerate(biases)]
        offset = [
            offsets_of(owner, own, (size,), BOOLEAN_VALUES, centered=centered)
            for own, size in zip(means, sizes, strict=True)
        ]
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "biases", tuple(shaped))
        object.__setattr__(self, "offsets", tuple(offset))


def _as_matrices(owner: str, weights: Any) -> Layers:
    if not isinstance(weights, list | tuple) or not weights:
        raise EnergyError(
            f"{owner} needs a list of weights, one matrix from each layer to the next; got {type(weights).__name__}. Write "
            f"{owner}([jnp.zeros((64, 12)), jnp.zeros((12, 6))])."
        )
    matrices = tuple(as_weights(owner, matrix) for matrix in weights)
    for k, (below, above) in enumerate(zip(matrices[:-1], matrices[1:], strict=True)):
        if below.shape[1] != above.shape[0]:
            raise EnergyError(
                f"{owner} needs weights that fit each other: weights[{k}] of shape {below.shape} lead to a layer of "
                f"{below.shape[1]} units, and weights[{k + 1}] of shape {above.shape} start from {above.shape[0]}."
            )
    return matrices


def _by_layer(owner: str, name: str, value: Any, sizes: list[int]) -> list[Any]:
    """Return a parameter for each layer, given a list of them, or one number (or None) for all."""
    if value is None or (not isinstance(value, list | tuple) and not jnp.ndim(value)):
        return [value] * len(sizes)
    if not isinstance(value, list | tuple) or len(value) != len(sizes):
        got = f"{len(value)} of them" if isinstance(value, list | tuple) else f"an array of shape {jnp.shape(value)}"
        shapes = ", ".join(f"({size},)" for size in sizes)
        raise EnergyError(
            f"{owner} needs a list of {name}, one for each of its {len(sizes)} layers, of shapes {shapes}, or one number; "
            f"got {got}."
        )
    return list(value)
