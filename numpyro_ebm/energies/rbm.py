"""Restricted Boltzmann machines with binary visible units: free energy, and joint energy with the hidden units."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import log_sum_over_states
from numpyro_ebm._core.energies import as_floats
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.energies._units import BOOLEAN_VALUES, UnitEnergy, as_parameters, as_weights, draw, offsets_of
from numpyro_ebm.energies.deep_boltzmann_machine import LayeredMachine


@record(eq=False)
class RBM(UnitEnergy):
    r"""The restricted Boltzmann machine as an energy of its visible units, with the hidden units summed out.

    .. math:: E(v, h) = -(v - m)^T W (h - l) - b^T (v - m) - c^T (h - l), \qquad
        F(v) = -b^T (v - m) - \sum_j \left[\log(1 + e^{a_j}) - l_j a_j\right], \quad a = c + W^T (v - m)

    The event is ``v``, of 0 and 1, and ``F``, its free energy, the energy. `sweep` draws the hidden units given the visible
    ones and back. `joint` is the energy of both. log Z is the sum over the states of the smaller layer.

    Args:
        weights: ``(d, num_hidden)``.
        visible_biases: ``(d,)``, or one number.
        hidden_biases: ``(num_hidden,)``, or one number.
        visible_offsets: ``(d,)`` or one number; the means of the data centre the machine.
        hidden_offsets: ``(num_hidden,)`` or one number.
        centered: short for offsets of 1/2, in the middle of the values, where none are given. A centred machine trains
            alike on ``v`` and on ``1 - v``.

    Raises:
        EnergyError: for weights that are no matrix, and biases or offsets that do not match them.

    Example:
        >>> energy = RBM(jnp.zeros((4, 2)))
        >>> round(float(energy.log_partition()), 4)  # 6 log 2
        4.1589

    References:
        Hinton, Training products of experts by minimizing contrastive divergence (2002); Melchior, Fischer and Wiskott, How
        to center deep Boltzmann machines (2016), for the offsets.
    """

    units = "boolean"
    weights: Any
    visible_biases: Any = 0.0
    hidden_biases: Any = 0.0
    visible_offsets: Any = None
    hidden_offsets: Any = None

    def __init__(
        self,
        weights: ArrayLike,
        visible_biases: ArrayLike = 0.0,
        hidden_biases: ArrayLike = 0.0,
        visible_offsets: ArrayLike | None = None,
        hidden_offsets: ArrayLike | None = None,
        *,
        centered: bool = False,
    ):
        owner = type(self).__name__
        weights = as_weights(owner, weights)
        visible, hidden = weights.shape[:1], weights.shape[1:]
        both = {"visible_offsets": (visible_offsets, visible), "hidden_offsets": (hidden_offsets, hidden)}
        object.__setattr__(self, "weights", weights)
        object.__setattr__(
            self, "visible_biases", as_parameters(owner, "visible_biases", visible_biases, visible, transposed=hidden)
        )
        object.__setattr__(
            self, "hidden_biases", as_parameters(owner, "hidden_biases", hidden_biases, hidden, transposed=visible)
        )
        for name, (offsets, shape) in both.items():
            own = offsets_of(owner, offsets, shape, BOOLEAN_VALUES, centered=centered and offsets is None)
            object.__setattr__(self, name, own)

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(d,)``."""
        return self.weights.shape[:1]

    def __call__(self, event: Shaped[Array, " d"]) -> Scalar:
        """Return the free energy of one event."""
        v = as_floats(event) - self.visible_offsets
        return -v @ self.visible_biases - self._hidden_terms(self._activations(v))

    def local_fields(
        self, event: Shaped[Array, " d"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "..."]:
        """Return the log odds that units are 1, given all other visible units."""
        x = as_floats(event)
        every = np.arange(len(x)) if index is None else index
        without = self._activations(x - self.visible_offsets) - x[every][..., None] * self.weights[every]
        gain = self._hidden_terms(without + self.weights[every]) - self._hidden_terms(without)
        return self.visible_biases[every] + gain

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, " d"]) -> Shaped[Array, " d"]:
        """Draw the hidden units given the visible ones, and the visible units given these."""
        key_hidden, key_visible = jax.random.split(rng_key)
        hidden = draw(key_hidden, self.hidden_logits(event))
        return draw(key_visible, self.visible_logits(hidden)).astype(event.dtype)

    def hidden_logits(self, visible: Shaped[Array, " d"]) -> Float[Array, " hidden"]:
        """Return the log odds that each hidden unit is 1, given the visible units."""
        return self._activations(as_floats(visible) - self.visible_offsets)

    def visible_logits(self, hidden: Shaped[Array, " hidden"]) -> Float[Array, " d"]:
        """Return the log odds that each visible unit is 1, given the hidden units."""
        return self.visible_biases + self.weights @ (as_floats(hidden) - self.hidden_offsets)

    def joint(self) -> "JointRBM":
        """Return the energy of visible and hidden units together, ``(d + num_hidden,)``."""
        return JointRBM(self)

    @property
    def num_terms(self) -> int:
        """``2 ** min(d, num_hidden)``."""
        return 2 ** min(self.weights.shape)

    def log_partition(self) -> Scalar:
        """Return log Z by the sum over the states of the smaller layer."""
        visible, hidden = self.weights.shape
        if visible <= hidden:
            return log_sum_over_states(BOOLEAN_VALUES, (visible,), lambda v: -self(v))

        def log_weight(h):
            centred = as_floats(h) - self.hidden_offsets
            logits = self.visible_biases + self.weights @ centred
            return centred @ self.hidden_biases + jnp.sum(jax.nn.softplus(logits) - self.visible_offsets * logits)

        return log_sum_over_states(BOOLEAN_VALUES, (hidden,), log_weight)

    def _activations(self, centred: Float[Array, " d"]) -> Float[Array, " hidden"]:
        return self.hidden_biases + centred @ self.weights

    def _hidden_terms(self, activations: Float[Array, "... hidden"]) -> Float[Array, "..."]:
        return jnp.sum(jax.nn.softplus(activations) - self.hidden_offsets * activations, axis=-1)


@record(eq=False)
class JointRBM(LayeredMachine):
    """The energy of the visible and hidden units of an `RBM` together, in this order: a deep machine of one hidden layer.

    Args:
        marginal: the `RBM`.

    Example:
        ``RBM(weights, visible_biases, hidden_biases).joint()``
    """

    marginal: RBM

    def __init__(self, marginal: RBM):
        object.__setattr__(self, "marginal", marginal)

    @property
    def weights(self) -> tuple[Array, ...]:
        """The weights between the two layers."""
        return (self.marginal.weights,)

    @property
    def biases(self) -> tuple[Array, ...]:
        """The biases of the visible and of the hidden units."""
        return self.marginal.visible_biases, self.marginal.hidden_biases

    @property
    def offsets(self) -> tuple[Array, ...]:
        """The offsets of the visible and of the hidden units."""
        return self.marginal.visible_offsets, self.marginal.hidden_offsets
