"""Effective number of draws of chains, and random signs that follow their autocorrelation."""

import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
from blackjax.diagnostics import effective_sample_size
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar

FEWEST = 8
"""Draws per chain below which they count as independent, because so few do not show their autocorrelation."""
CAPTURED = 0.8
"""Share of the autocorrelation time that the signs follow; 1 would need signs that never change. A test checks the level."""
LARGE_TIME = 2.0
"""Autocorrelation time above which to warn: the draws are worth less than half as many independent ones."""


class Dependence(NamedTuple):
    """Autocorrelation of draws.

    Attributes:
        time: integrated autocorrelation time, the number of draws that are worth one independent draw; 1 if independent.
        persistence: correlation of consecutive signs (`signs`), 0 for independent draws.
        captured: share of ``time`` that signs of that persistence follow, for an autocorrelation that decays geometrically.
    """

    time: Scalar
    persistence: Scalar
    captured: Scalar


def with_squares(
    chains: Float[Array, "chains num d"], keep: Bool[Array, "chains num"] | None = None
) -> Float[Array, "chains num 2*d"]:
    """Return centred coordinates ``(num_chains, num, d)`` beside their centred squares; 0 for draws that take no part."""
    takes_part = None if keep is None else keep[..., None]
    centred = chains - jnp.mean(chains, axis=(0, 1), where=takes_part)
    squares = centred**2 - jnp.mean(centred**2, axis=(0, 1), where=takes_part)
    both = jnp.concatenate([centred, squares], axis=-1)
    return both if takes_part is None else jnp.where(takes_part, both, 0.0)


def effective_size(figures: Float[Array, "chains num k"]) -> Scalar:
    """Return the smallest effective sample size of figures ``(num_chains, num, k)``.

    Constant figures do not count; the result is infinite if all figures are constant.
    """
    moves = jnp.any(figures != figures[:1, :1], axis=(0, 1))
    return jnp.min(jnp.where(moves, jnp.atleast_1d(effective_sample_size(figures)), jnp.inf))


def dependence(chains: Float[Array, "chains num d"], keep: Bool[Array, "chains num"] | None = None) -> Dependence:
    """Estimate the autocorrelation of draws, by the coordinate or squared coordinate that is most correlated.

    Draws count as independent unless consecutive draws are more correlated than independent draws are by chance, because
    an autocorrelation time sums over many lags and accumulates their noise.

    Args:
        chains: ``(num_chains, num, d)``.
        keep: ``(num_chains, num)``, the draws that take part, which count as consecutive; None for all.
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
    # Signs of persistence p follow (r p)^k of an autocorrelation r^k; p is such that the sum over k is `seen`.
    is_seen = seen > 1
    persistence = jnp.where(is_seen, (seen - 1) / (seen + 1) * (time + 1) / jnp.where(is_seen, time - 1, 1.0), 0.0)
    return Dependence(time, persistence, jnp.where(is_seen, CAPTURED, 1 / time))


def signs(
    rng_key: PRNGKey, persistence: Scalar, num_chains: int, num: int, num_series: int
) -> Int[Array, "{num_chains}*{num} {num_series}"]:
    """Draw signs of mean 0 and autocorrelation ``persistence ** lag`` along each chain, ``(num_chains * num, ...)``."""
    chance = jnp.where(jnp.arange(num) == 0, 0.5, (1 - persistence) / 2)
    flips = jax.random.uniform(rng_key, (num_chains, num, num_series)) < chance[:, None]
    turned = jnp.cumsum(flips, axis=1, dtype=jnp.int32) % 2
    return (1 - 2 * turned).reshape(num_chains * num, num_series)


def warn_where_dependent(owner: str, draws: Float[Array, "num d"]) -> None:
    """Warn if the order of draws ``(num, d)`` shows that they come from a chain.

    Warns:
        UserWarning: for concrete draws that are worth less than half as many independent ones.
    """
    if not is_concrete(draws):
        return
    time = float(_time(draws[None]))
    if time > LARGE_TIME:
        warnings.warn(
            f"{owner}: consecutive draws are correlated, {len(draws)} of them are worth {len(draws) / time:.0f}, and the "
            "p-value assumes independent draws, so a true model is rejected too often. Thin the draws, or write "
            "evaluate(..., draws=...) with draws of shape (chains, num, *event), which thins them.",
            stacklevel=3,
        )


@jax.jit
def _time(chains: Float[Array, "chains num d"]) -> Scalar:
    return dependence(chains).time
