"""How much less than independent draws those of chains are worth, and signs that follow their autocorrelation."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.diagnostics import effective_sample_size

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array, PRNGKey

FEWEST = 8
CAPTURED = 0.8
LARGE_TIME = 2.0


class Dependence(NamedTuple):
    """Autocorrelation of draws.

    Attributes:
        time: integrated autocorrelation time: that many draws are worth one; 1 for independent ones.
        persistence: correlation of consecutive signs, 0 for independent draws (`signs`).
        captured: how much of ``time`` signs of that persistence see of an autocorrelation that decays geometrically.
    """

    time: Array
    persistence: Array
    captured: Array


def with_squares(chains: Array, keep: Array | None = None) -> Array:
    """Coordinates ``(num_chains, num, d)`` less their means beside their squares less theirs; 0 for what takes no part."""
    takes_part = None if keep is None else keep[..., None]
    centred = chains - jnp.mean(chains, axis=(0, 1), where=takes_part)
    squares = centred**2 - jnp.mean(centred**2, axis=(0, 1), where=takes_part)
    both = jnp.concatenate([centred, squares], axis=-1)
    return both if takes_part is None else jnp.where(takes_part, both, 0.0)


def effective_size(figures: Array) -> Array:
    """Smallest effective sample size of figures ``(num_chains, num, k)``.

    One that is always the same tells nothing; infinite where all are.
    """
    moves = jnp.any(figures != figures[:1, :1], axis=(0, 1))
    return jnp.min(jnp.where(moves, jnp.atleast_1d(effective_sample_size(figures)), jnp.inf))


def dependence(chains: Array, keep: Array | None = None) -> Dependence:
    """The autocorrelation of draws, by the coordinate or square of one that has most of it.

    Where no correlation of consecutive draws is beyond what independent ones show by chance they count as independent: an
    autocorrelation time is a sum over many lags and of much noise.

    Args:
        chains: ``(num_chains, num, d)``.
        keep: ``(num_chains, num)``, draws that take part; those of a chain close ranks. None for all.
    """
    num_chains, num = chains.shape[:2]
    if num < FEWEST:
        return Dependence(jnp.ones(()), jnp.zeros(()), jnp.ones(()))
    figures = with_squares(chains, keep)
    if keep is not None:
        figures = jnp.take_along_axis(figures, jnp.argsort(~keep, axis=1, stable=True)[..., None], axis=1)
    count = num_chains * num if keep is None else jnp.sum(keep)
    total = jnp.sum(figures**2, axis=(0, 1))
    consecutive = jnp.sum(figures[:, 1:] * figures[:, :-1], axis=(0, 1)) / jnp.where(total > 0, total, 1.0)
    chance = (1.5 + jnp.sqrt(2 * jnp.log(2.0 * figures.shape[-1]))) / jnp.sqrt(count)
    time = num_chains * num / effective_size(figures)
    time = jnp.where(jnp.isfinite(time) & (jnp.max(consecutive) > chance), jnp.maximum(time, 1.0), 1.0)
    seen = CAPTURED * time
    # Of an autocorrelation r^k, signs of persistence p see (r p)^k: the p under which the sum over k is `seen`.
    is_seen = seen > 1
    persistence = jnp.where(is_seen, (seen - 1) / (seen + 1) * (time + 1) / jnp.where(is_seen, time - 1, 1.0), 0.0)
    return Dependence(time, persistence, jnp.where(is_seen, CAPTURED, 1 / time))


def signs(rng_key: PRNGKey, persistence: Array, num_chains: int, num: int, num_series: int) -> Array:
    """Series of signs of mean 0 and autocorrelation ``persistence ** lag`` along each chain, ``(num_chains * num, ...)``."""
    chance = jnp.where(jnp.arange(num) == 0, 0.5, (1 - persistence) / 2)
    flips = jax.random.uniform(rng_key, (num_chains, num, num_series)) < chance[:, None]
    turned = jnp.cumsum(flips, axis=1, dtype=jnp.int32) % 2
    return (1 - 2 * turned).reshape(num_chains * num, num_series)


def warn_where_dependent(owner: str, draws: Array) -> None:
    """Warn of draws ``(num, d)`` whose order shows that they are those of a chain.

    Warns:
        UserWarning: where they are known and worth less than half of independent ones.
    """
    if not is_concrete(draws):
        return
    time = float(_time(draws[None]))
    if time > LARGE_TIME:
        warnings.warn(
            f"{owner}: consecutive draws are correlated, {len(draws)} of them are worth {len(draws) / time:.0f}, and the "
            "p-value is that of independent ones: a true model is rejected too often. Thin them, or write "
            "evaluate(..., draws=...) with draws of shape (chains, num, *event), which does so.",
            stacklevel=3,
        )


@jax.jit
def _time(chains: Array) -> Array:
    return dependence(chains).time
