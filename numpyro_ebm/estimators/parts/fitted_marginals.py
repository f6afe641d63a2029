"""Noise for discrete events that is fitted to the batch: independent elements with the shares of the data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.kernels.elements import Elements

PRIOR_COUNT = 0.5
"""Added to the count of every value (Jeffreys), so that the noise is positive at values that the batch lacks."""


class FittedMarginals(NamedTuple):
    """Independent elements, with shares of their values fitted to the half of the batch that does not contain the row.

    Attributes:
        log_shares: ``(2, num_elements, num_values)``, log shares for each half.
        half: index of each row's shares, ``(num_rows,)``.
        like: a position, which gives the shape and dtype of draws.
        elements: the elements of a position.
    """

    log_shares: Float[Array, "2 elements values"]
    half: Int[Array, " rows"]
    like: Shaped[Array, "*position"]
    elements: Elements

    def sample(self, rng_key: PRNGKey, num: int) -> Shaped[Array, "{num} {self.half.size} *position"]:
        """Draw positions, each from its row's shares."""
        logits = self.log_shares[self.half]
        codes = jax.random.categorical(rng_key, logits, shape=(num, *logits.shape[:2])).astype(jnp.int32)
        return jax.vmap(jax.vmap(lambda each: self.elements.position(each, self.like)))(codes)

    def log_prob(self, positions: Shaped[Array, "num {self.half.size} *position"]) -> Float[Array, "num {self.half.size}"]:
        """Return the log probabilities of positions, each under its row's shares."""

        def of_row(position, log_shares):
            codes = self.elements.codes(position)
            return jnp.sum(jnp.take_along_axis(log_shares, codes[:, None], axis=1))

        return jax.vmap(jax.vmap(of_row), in_axes=(0, None))(positions, self.log_shares[self.half])


def fit_marginals(site: Site) -> FittedMarginals:
    """Fit the shares to the rows that take part.

    Raises:
        EnergyError: for a continuous support, and a batch of one row.
    """
    distribution = site.distribution
    if not distribution.is_discrete:
        raise EnergyError(
            f"noise='marginals' has the shares of discrete values; the support is {distribution.support}. Write "
            "noise='gaussian' or noise='mixture'."
        )
    if site.num_rows < 2:
        raise EnergyError(
            "The marginals are fitted to the batch, which has only one row. Give a larger batch, or write the noise as a "
            "distribution."
        )
    positions = jax.lax.stop_gradient(site.position)
    elements = Elements.of(distribution.discrete_values, positions[0])
    half = jnp.arange(site.num_rows) % 2
    others: Bool[Array, "2 rows"] = (True if site.mask is None else site.mask) & (half != jnp.arange(2)[:, None])
    own = jax.nn.one_hot(jax.vmap(elements.codes)(positions), elements.num_values)
    exists = jnp.arange(elements.num_values) < elements.num_values_each[:, None]
    counts = jnp.einsum("hr,riv->hiv", others.astype(own.dtype), own) + jnp.where(exists, PRIOR_COUNT, 0.0)
    return FittedMarginals(jnp.log(counts / jnp.sum(counts, axis=2, keepdims=True)), half, positions[0], elements)
