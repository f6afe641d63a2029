"""The Gaussian-Bernoulli restricted Boltzmann machine."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from numpyro_ebm._core.discrete import log_sum_over_states
from numpyro_ebm._core.energies import AbstractEnergy, as_floats
from numpyro_ebm._core.options import check_positive
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.energies._units import BOOLEAN_VALUES, as_parameters, as_weights, draw


@record(eq=False)
class GaussianRBM(AbstractEnergy):
    r"""The restricted Boltzmann machine with Gaussian visible and binary hidden units, the hidden ones summed out.

    .. math:: E(v, h) = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - a(v)^T h, \qquad
        F(v) = \sum_i \frac{(v_i - b_i)^2}{2 \sigma_i^2} - \sum_j \log\left(1 + e^{a_j(v)}\right), \qquad
        a_j(v) = c_j + \sum_i \frac{v_i}{\sigma_i^2} w_{ij}

    It is a mixture of ``2 ** num_hidden`` Gaussians with means ``b + W h``. The event is ``v``, real numbers. log Z is the
    sum over the hidden states; `sweep` draws the hidden units given the visible ones and back.

    Args:
        weights: ``(d, num_hidden)``.
        visible_biases: ``(d,)``, or one number.
        hidden_biases: ``(num_hidden,)``, or one number.
        scale: ``(d,)`` or one number, the standard deviations of the visible units given the hidden ones.

    Raises:
        EnergyError: for weights that are no matrix, biases or scales that do not match them, and scales that are not
            positive.

    Example:
        >>> energy = GaussianRBM(jnp.zeros((1, 1)))
        >>> round(float(energy.log_partition()), 4)  # log 2 + log(2 pi) / 2
        1.6121

    References:
        Welling, Rosen-Zvi and Hinton, Exponential family harmoniums with an application to information retrieval (2004);
        Liao et al., Gaussian-Bernoulli RBMs without tears (2022), for this form of the energy.
    """

    weights: Any
    visible_biases: Any = 0.0
    hidden_biases: Any = 0.0
    scale: Any = 1.0

    def __init__(
        self,
        weights: ArrayLike,
        visible_biases: ArrayLike = 0.0,
        hidden_biases: ArrayLike = 0.0,
        scale: ArrayLike = 1.0,
    ):
        owner = type(self).__name__
        weights = as_weights(owner, weights)
        visible, hidden = weights.shape[:1], weights.shape[1:]
        check_positive(owner, "scale", scale)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(
            self, "visible_biases", as_parameters(owner, "visible_biases", visible_biases, visible, transposed=hidden)
        )
        object.__setattr__(
            self, "hidden_biases", as_parameters(owner, "hidden_biases", hidden_biases, hidden, transposed=visible)
        )
        object.__setattr__(self, "scale", as_parameters(owner, "scale", scale, visible))

    @property
    def event_shape(self) -> tuple[int, ...]:
        """``(d,)``."""
        return self.weights.shape[:1]

    def __call__(self, event: Shaped[Array, " d"]) -> Scalar:
        """Return the free energy of one event."""
        v = as_floats(event)
        bowl = 0.5 * jnp.sum(((v - self.visible_biases) / self.scale) ** 2)
        return bowl - jnp.sum(jax.nn.softplus(self.hidden_logits(v)))

    def hidden_logits(self, visible: Float[Array, " d"]) -> Float[Array, " hidden"]:
        """Return the log odds that each hidden unit is 1, given the visible units."""
        return self.hidden_biases + (visible / self.scale**2) @ self.weights

    def visible_means(self, hidden: Shaped[Array, " hidden"]) -> Float[Array, " d"]:
        """Return the means of the visible units given the hidden ones; their standard deviations are ``scale``."""
        return self.visible_biases + self.weights @ as_floats(hidden)

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, " d"]) -> Shaped[Array, " d"]:
        """Draw the hidden units given the visible ones, and the visible units given these."""
        key_hidden, key_visible = jax.random.split(rng_key)
        means = self.visible_means(draw(key_hidden, self.hidden_logits(event)))
        return (means + self.scale * jax.random.normal(key_visible, means.shape, means.dtype)).astype(event.dtype)

    @property
    def num_terms(self) -> int:
        """``2 ** num_hidden``."""
        return 2 ** self.weights.shape[1]

    def log_partition(self) -> Scalar:
        """Return log Z by the sum over the hidden states."""

        def log_weight(h):
            shift = self.visible_means(h)
            gained = 0.5 * jnp.sum((shift**2 - self.visible_biases**2) / self.scale**2)
            return as_floats(h) @ self.hidden_biases + gained

        normal = 0.5 * len(self.scale) * np.log(2 * np.pi) + jnp.sum(jnp.log(self.scale))
        return normal + log_sum_over_states(BOOLEAN_VALUES, (self.weights.shape[1],), log_weight)
