"""The distributions that `estimate` puts at energy sites."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.numpyro_stack import unguarded
from numpyro_ebm._core.typing import Array, PRNGKey


class Surrogate(dist.Distribution):
    """Distribution whose log probability is an estimator's surrogate, whatever the value."""

    arg_constraints = {}
    pytree_data_fields = ("log_factor", "_support")

    def __init__(self, log_factor: Array, event_shape: tuple[int, ...], support: dist.constraints.Constraint):
        self.log_factor, self._support = log_factor, support
        super().__init__(jnp.shape(log_factor), event_shape)

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Float[Array, "*batch"]:
        """Return the surrogate of each row."""
        return self.log_factor


class FrozenEnergy(dist.Distribution):
    """An energy at a latent site: its unnormalised log density, with no gradient in its parameters.

    Args:
        distribution: an `EnergyDistribution`, possibly under expand, mask and to_event.
    """

    arg_constraints = {}
    pytree_data_fields = ("distribution",)

    def __init__(self, distribution: dist.Distribution):
        self.distribution = distribution
        super().__init__(distribution.batch_shape, distribution.event_shape)

    @property
    def support(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The support of the energy."""
        return self.distribution.support

    @property
    def has_rsample(self) -> bool:
        """False: no gradient flows through a sampler."""
        return False

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw from the energy."""
        return self.distribution.sample(key, sample_shape)

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Any:
        """Return ``log base - E``, with a gradient in the value alone."""
        value = jnp.asarray(value)
        with unguarded():
            return freeze(lambda v: self.distribution.log_prob(v), value)(value)
