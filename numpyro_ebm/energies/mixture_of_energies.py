"""Mixtures of unnormalised densities."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import codes_of
from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, EnergyFn, PRNGKey, Scalar
from numpyro_ebm.energies._parts import Composition, as_parts
from numpyro_ebm.energies._units import as_parameters


@record(eq=False)
class MixtureOfEnergies(Composition):
    r"""The mixture of unnormalised densities.

    .. math:: E(x) = -\log \sum_k e^{a_k - E_k(x)}, \qquad \log Z = \log \sum_k e^{a_k + \log Z_k}

    The components are added as they are, without their log Z: the share of component ``k`` is proportional to
    :math:`e^{a_k} Z_k`, not to :math:`e^{a_k}`. With ``logits = log_weights - log_partitions`` of the components the shares
    are the weights; `log_shares` computes them. log Z is known if that of every component is. The conditionals of elements
    are known if every component knows its own, and `sweep` (a draw of the component given the event, then its own sweep) if
    every component has one.

    Args:
        energies: a list of ready-made energies of one event and one support. Ordinary functions of the same event may be
            among them; then only the value is known.
        logits: ``(num_components,)``, the :math:`a_k`, or one number.

    Raises:
        EnergyError: without a ready-made energy, for energies of different events or supports, and logits that are not one
            per component.
        TypeError: for energies that are not callable.

    Example:
        >>> up, down = Ising(Graph.lattice(2, 2), 0.3, 1.0), Ising(Graph.lattice(2, 2), 0.3, -1.0)
        >>> jnp.exp(MixtureOfEnergies([up, down]).log_shares()).tolist()
        [0.5, 0.5]

    References:
        McLachlan and Peel, Finite mixture models (2000), for mixtures with normalised components.
    """

    energies: Any
    logits: Any = 0.0

    def __init__(self, energies: Sequence[AbstractEnergy | EnergyFn], logits: ArrayLike = 0.0):
        object.__setattr__(self, "energies", as_parts("MixtureOfEnergies", "energies", energies))
        object.__setattr__(self, "logits", as_parameters("MixtureOfEnergies", "logits", logits, (len(energies),)))

    @property
    def parts(self) -> tuple[Any, ...]:
        """The components."""
        return self.energies

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of one event."""
        return -jax.nn.logsumexp(self._log_terms(event))

    def log_responsibilities(self, event: Shaped[Array, "*event"]) -> Float[Array, " components"]:
        """Return the log probabilities that an event comes from each component."""
        return jax.nn.log_softmax(self._log_terms(event))

    def log_shares(self) -> Float[Array, " components"]:
        """Return the log shares of the components: ``logits + log Z_k``, normalised.

        Raises:
            EnergyError: for a component whose log Z is not known.
        """
        return jax.nn.log_softmax(self._log_weights())

    @property
    def num_terms(self) -> int | None:
        """The terms of all components together; None if one of them does not know its log Z."""
        counts = [part.num_terms for part in self.energies if isinstance(part, AbstractEnergy)]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(self.energies) else None

    def log_partition(self) -> Scalar:
        """Return the log of the sum of ``exp(logits) Z_k``."""
        return super().log_partition() if self.num_terms is None else jax.nn.logsumexp(self._log_weights())

    @property
    def has_conditionals(self) -> bool:
        """Whether all components know their conditionals."""
        return self.all_know(lambda part: part.has_conditionals)

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return the logits, from the energy of each component at the event and its own conditionals.

        With one element changed, ``-E_k`` is ``-E_k(x)`` plus the difference of the component's logits at the two values.
        """
        codes = codes_of(self.support, jnp.asarray(event))
        if not self.has_conditionals or codes is None:
            return super().conditional_logits(event, index)
        codes = codes if index is None else codes[index]
        each = jnp.stack([part.conditional_logits(event, index) for part in self.energies])
        own = jnp.take_along_axis(each, jnp.broadcast_to(codes[..., None], (len(each), *codes.shape, 1)), axis=-1)
        terms = self._log_terms(event).reshape(-1, *(1,) * (each.ndim - 1))
        return jax.nn.logsumexp(terms + each - own, axis=0)

    @property
    def has_sweep(self) -> bool:
        """Whether all components have a sweep."""
        return self.all_know(lambda part: part.has_sweep)

    def sweep(self, rng_key: PRNGKey, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Draw the component given the event, and sweep by this component."""
        if not self.has_sweep:
            return super().sweep(rng_key, event)
        key_component, key_sweep = jax.random.split(rng_key)
        component = jax.random.categorical(key_component, self._log_terms(event))
        return jax.lax.switch(component, [part.sweep for part in self.energies], key_sweep, event)

    def _log_terms(self, event: Shaped[Array, "*event"]) -> Float[Array, " components"]:
        return self.logits - jnp.stack(self.values(event))

    def _log_weights(self) -> Float[Array, " components"]:
        return self.logits + jnp.stack([part.log_partition() for part in self.energies])
