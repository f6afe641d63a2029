"""Pairs of Gibbs chains whose elements are drawn by maximal couplings, so that the chains meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.typing import Array, ChainLogDensityFn, PRNGKey
from numpyro_ebm.kernels.densities import has_conditionals
from numpyro_ebm.kernels.elements import DiscreteState, Elements
from numpyro_ebm.kernels.gibbs import Gibbs, logits_of


def couple_values(rng_key: PRNGKey, probabilities: Float[Array, "2 values"]) -> Int[Array, " 2"]:
    """Draw from two distributions of one set of values, so that the draws are equal with the largest possible probability.

    That probability is the sum of the smaller of both probabilities, 1 - TV. Draws that differ are independent.

    Args:
        rng_key: random key.
        probabilities: ``(2, num_values)``.

    Returns:
        Two indices of values.
    """
    key_which, key_shared, *keys = jax.random.split(rng_key, 4)
    shared = jnp.min(probabilities, axis=0)
    # The remainders of equal distributions are empty, and by rounding a draw from them may be asked for.
    remainders = probabilities - shared
    remainders = jnp.where(jnp.sum(remainders, axis=1, keepdims=True) > 0, remainders, probabilities)
    apart = jnp.stack([_draw(key, weights) for key, weights in zip(keys, remainders, strict=True)])
    is_shared = jax.random.uniform(key_which, (), shared.dtype) < jnp.sum(shared)
    return jnp.where(is_shared, _draw(key_shared, shared), apart)


def coupled_gibbs(rng_key: PRNGKey, kernel: Gibbs, pair: DiscreteState, log_density: ChainLogDensityFn) -> DiscreteState:
    """Move two chains so that each follows `Gibbs` and both tend to take the same values.

    Both chains update the same elements in the same order; `couple_values` draws an element from its two conditionals.

    Metropolis flips cannot be coupled in this way: where a flip of a binary unit is always accepted, two chains that differ
    both flip and differ again, and the parity of their flips never agrees.

    Args:
        rng_key: random key.
        kernel: the kernel, with its values.
        pair: the two states, leaves ``(2, ...)``.
        log_density: log density of one position.

    Returns:
        The two new states.

    References:
        Jacob, O'Leary and Atchade, Unbiased Markov chain Monte Carlo methods with couplings (2020), section 4.
    """
    like = jax.tree.map(lambda leaf: leaf[0], pair.position)
    elements = Elements.of(kernel.values, like)

    def scores_of(codes, i, logdensity):
        return logits_of(log_density, elements, like, codes, i, logdensity)[0]

    def update(carry, inputs):
        codes, logdensity = carry
        i, key = inputs
        scores = jax.vmap(scores_of, in_axes=(0, None, 0))(codes, i, logdensity)
        drawn = couple_values(key, jax.vmap(_conditional)(scores, codes[:, i]))
        moved = jnp.take_along_axis(scores, drawn[:, None], axis=1)[:, 0]
        return (codes.at[:, i].set(drawn.astype(codes.dtype)), moved), None

    key_order, key_draws = jax.random.split(rng_key)
    order = kernel.order(key_order, sum(elements.sizes))
    start = (jax.vmap(elements.codes)(pair.position), pair.logdensity)
    (codes, logdensity), _ = jax.lax.scan(update, start, (order, jax.random.split(key_draws, len(order))))
    position = jax.vmap(lambda each: elements.position(each, like))(codes)
    if has_conditionals(log_density):  # the sums of differences of log densities drift
        logdensity = jax.vmap(log_density)(position)
    return DiscreteState(position, logdensity)


def _conditional(scores: Float[Array, " values"], own: Int[Array, ""]) -> Float[Array, " values"]:
    """Return the probabilities of an element's values; it stays where none has a density."""
    stays = jax.nn.one_hot(own, len(scores), dtype=scores.dtype)
    return jnp.where(jnp.isfinite(jnp.max(scores)), jax.nn.softmax(scores), stays)


def _draw(rng_key: PRNGKey, weights: Float[Array, " values"]) -> Int[Array, ""]:
    return jax.random.categorical(rng_key, jnp.log(weights))
