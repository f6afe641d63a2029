"""The distributions that `estimate` puts at energy sites."""

from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.numpyro_stack import unguarded
from numpyro_ebm._core.typing import Array, PRNGKey


class Surrogate(dist.Distribution):
    """Stands at a site for an estimator: its log probability is the surrogate, whatever the value."""

    arg_constraints = {}
    pytree_data_fields = ("log_factor", "_support")

    def __init__(self, log_factor: Array, event_shape: tuple[int, ...], support: Any):
        self.log_factor, self._support = log_factor, support
        super().__init__(jnp.shape(log_factor), event_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """The surrogate."""
        return self.log_factor


class FrozenEnergy(dist.Distribution):
    """An energy as a latent site sees it: unnormalised log density, its parameters cut off from differentiation.

    Args:
        distribution: an `EnergyDistribution`, under expand, mask and to_event or not.
    """

    arg_constraints = {}
    pytree_data_fields = ("distribution",)

    def __init__(self, distribution: dist.Distribution):
        self.distribution = distribution
        super().__init__(distribution.batch_shape, distribution.event_shape)

    @property
    def support(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The energy's."""
        return self.distribution.support

    @property
    def has_rsample(self) -> bool:
        """False: no gradient flows through a sampler."""
        return False

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Any:
        """Draw as the energy does."""
        return self.distribution.sample(key, sample_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Any:
        """``log base - E``; its gradient is in the value alone."""
        value = jnp.asarray(value)
        with unguarded():
            return freeze(lambda v: self.distribution.log_prob(v), value)(value)
