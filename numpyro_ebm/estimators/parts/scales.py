"""Lengths per dimension: the running spread of the data, and the scales in which chains move."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.spreads import ROUNDING, eps_of, or_one
from numpyro_ebm._core.typing import Array, PyTree, Scalar
from numpyro_ebm.distributions.site import Site

MEMORY = 100
"""Updates after which the spread starts to forget, because rows of a latent site move; fewer make it noisier."""
STEEPEST = 1e6
"""Largest score that counts, in units of the data's spread: a wall or an overflow does not give a scale of 0."""
WIDEST_MOVE = 10.0
"""Longest move, in standard deviations of the data, to which step sizes adapt: a flat energy gives no bound of its own."""
PATIENCE = 20
"""Updates over which scales are averaged: fewer are noisier, more lag behind the energy."""


class Spread(NamedTuple):
    """Running moments of the rows, per dimension of unconstrained space.

    Attributes:
        mean: of shape ``unconstrained_shape``.
        variance: of the same shape; exactly 0 for a constant column.
    """

    mean: Float[Array, "*position"]
    variance: Float[Array, "*position"]

    @classmethod
    def of(cls, site: Site) -> "Spread":
        """Return the moments of the rows of one batch that take part."""
        mask = None if site.mask is None else site.mask.reshape((-1,) + (1,) * (site.position.ndim - 1))
        counted = site.position if mask is None else jnp.where(mask, site.position, 0)
        num = jnp.maximum(site.num_rows if mask is None else jnp.sum(mask), 1)
        mean = jnp.sum(counted, axis=0) / num.astype(counted.dtype)
        return cls(jax.lax.stop_gradient(mean).astype(float), (site.spread**2).astype(float))

    def then(self, batch: "Spread", num_updates: Int[Array, ""]) -> "Spread":
        """Return the moments with one more batch, by West's update, which also counts the spread between batches."""
        rate = 1.0 / jnp.minimum(num_updates + 1.0, MEMORY)
        change = batch.mean - self.mean
        is_rounding = jnp.abs(change) <= ROUNDING * eps_of(batch.mean) * jnp.abs(batch.mean)
        between = jnp.where(is_rounding & (num_updates > 0), 0.0, change)
        variance = (1 - rate) * (self.variance + rate * between**2) + rate * batch.variance
        return Spread(self.mean + rate * change, variance)

    @property
    def sd(self) -> Float[Array, "*position"]:
        """Standard deviations per dimension."""
        return jnp.sqrt(self.variance)


def next_log_scale(
    log_scale: Float[Array, "*position"],
    spread: Float[Array, "*position"],
    score: Float[Array, " chains *position"],
    num_updates: Int[Array, ""],
) -> Float[Array, "*position"]:
    """Return the moving average of the logs of ``min(sd of the data, 1 / sd of the score over the chains)``.

    The second term is how far the density lets a chain move (from the inverse Fisher information of a shift, the optimal
    preconditioner of MALA): the width of a mode if the data have several, and the sd of the data if the model is a Gaussian
    that fits. The first term bounds it where the energy is flat.

    Args:
        log_scale: the last average.
        spread: standard deviations of the data, per dimension.
        score: gradients of the log density where the chains ended, ``(num_chains, ...)``.
        num_updates: updates before this one.

    References:
        Titsias, Optimal preconditioning and Fisher adaptive Langevin sampling (2023).
    """
    finite = jnp.all(jnp.isfinite(score), axis=tuple(range(1, score.ndim)), keepdims=True)
    # If no score is finite, average zeros instead of dividing by a count of 0.
    deviation = jnp.std(jnp.where(finite, score, 0.0), axis=0, where=finite | ~jnp.any(finite))
    spread = or_one(spread)
    scale = 1 / jnp.clip(deviation.astype(float), 1 / spread, STEEPEST / spread)
    rate = 1.0 / jnp.minimum(num_updates + 1.0, PATIENCE)
    return log_scale + rate * (jnp.log(scale) - log_scale)


def widest_step(kernel: Any, exponent: float, spread: Float[Array, "..."]) -> Scalar:
    """Return the largest step size that adaptation allows, at least that of the kernel as it was given.

    Args:
        kernel: the kernel that adaptation starts from.
        exponent: its `step_exponent`.
        spread: standard deviations of the data, in the scale in which the chains move; 1 for a constant column.
    """
    pooled = jnp.sqrt(jnp.mean(spread**2))
    return jnp.maximum(kernel.step_size, (WIDEST_MOVE * pooled) ** (2 * exponent))


def in_scale(scale: Float[Array, "..."] | None, tree: PyTree) -> PyTree:
    """Divide positions by the scale, which broadcasts over their last dimensions."""
    return tree if scale is None else jax.tree.map(lambda leaf: leaf / _over(scale, leaf), tree)


def out_of_scale(scale: Float[Array, "..."] | None, tree: PyTree) -> PyTree:
    """Undo `in_scale`."""
    return tree if scale is None else jax.tree.map(lambda leaf: leaf * _over(scale, leaf), tree)


def _over(scale: Float[Array, "..."], leaf: Float[Array, "..."]) -> Float[Array, "..."]:
    return scale.astype(leaf.dtype).reshape((1,) * (leaf.ndim - scale.ndim) + scale.shape)
