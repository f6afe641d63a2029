"""Weights of the modes in draws and in rows."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import effective_sample_size
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, ArrayLike
from numpyro_ebm.evaluation._subjects import as_vectors


class ModeWeights(NamedTuple):
    """Result of `mode_weights`.

    Attributes:
        draws: weight of each mode among the draws, ``(num_modes,)``.
        draws_error: standard errors of ``draws``.
        rows: weight of each mode among the rows.
        rows_error: standard errors of ``rows``.
        total_variation: half the sum of absolute differences of the weights.
        by_chance: approximate ``total_variation`` if draws and rows had the same distribution.
        num_missed: number of modes without a draw.
    """

    draws: Float[np.ndarray, " modes"]
    draws_error: Float[np.ndarray, " modes"]
    rows: Float[np.ndarray, " modes"]
    rows_error: Float[np.ndarray, " modes"]
    total_variation: float
    by_chance: float
    num_missed: int


def mode_weights(
    labels_of: Callable[[Shaped[Array, "*event"]], Any] | Any,
    draws: ArrayLike,
    rows: ArrayLike,
    *,
    num_modes: int | None = None,
) -> ModeWeights:
    r"""Compare the weights of labelled modes in draws of a model and in rows; scores and kernels hardly depend on them.

    A weight ``w`` has the standard error ``sqrt(w (1 - w) / n)``. For chains ``n`` is the effective sample size of the
    mode's indicator: chains that each stay in one mode count as about one draw per chain.

    .. math:: \mathrm{TV} = \tfrac12 \sum_k |p_k - q_k|, \qquad
        \text{by chance about } \tfrac12 \sum_k \sqrt{\tfrac{2}{\pi}\, w_k (1 - w_k) (1 / m_k + 1 / n)}

    with ``w`` the weights in draws and rows together.

    Args:
        labels_of: ``labels_of(event)``, which returns the mode of one event as a whole number from 0 (vectorised here), or
            the modes' centres ``(num_modes, *event_shape)``; an event belongs to the nearest centre.
        draws: draws of the model, ``(num, *event_shape)``, or ``(num_chains, num, *event_shape)`` for chains.
        rows: held-out rows, ``(num_rows, *event_shape)``.
        num_modes: number of labels; None for the number of centres, or one more than the largest label.

    Raises:
        EnergyError: (a ValueError) for draws and rows whose shapes do not match, and for labels that are not whole numbers
            from 0 to ``num_modes - 1``.

    Example:
        >>> x = jnp.array([-1.0, -1.0, 1.0, 1.0])
        >>> mode_weights(lambda x: x > 0, jnp.array([-1.0, 1.0, 1.0, 1.0]), x).total_variation
        0.25
    """
    draws, rows = jnp.asarray(draws), jnp.asarray(rows)
    if draws.ndim not in (rows.ndim, rows.ndim + 1) or draws.shape[draws.ndim - rows.ndim + 1 :] != rows.shape[1:]:
        raise EnergyError(
            f"draws need shape (num, *event) or (chains, num, *event) with the rows' events {rows.shape[1:]}; got "
            f"{draws.shape}."
        )
    chains = draws if draws.ndim == rows.ndim + 1 else draws[None]
    label = _labeller(labels_of, rows)
    as_vectors("draws", chains.reshape(-1, *rows.shape[1:]))
    as_vectors("rows", rows)
    of_draws, of_rows = label(chains.reshape(-1, *rows.shape[1:])), label(rows)
    count = _count(of_draws, of_rows, num_modes, None if callable(labels_of) else len(labels_of))
    inside = (of_draws.reshape(chains.shape[:2])[..., None] == np.arange(count)).astype(float)
    p, q = inside.mean((0, 1)), (of_rows[:, None] == np.arange(count)).mean(0)
    num = of_draws.size if draws.ndim == rows.ndim else _effective(inside)
    pooled = (num * p + len(rows) * q) / (num + len(rows))
    chance = np.sqrt(2 / np.pi * pooled * (1 - pooled) * (1 / num + 1 / len(rows)))
    return ModeWeights(
        draws=p,
        draws_error=np.sqrt(p * (1 - p) / num),
        rows=q,
        rows_error=np.sqrt(q * (1 - q) / len(rows)),
        total_variation=float(np.abs(p - q).sum() / 2),
        by_chance=float(chance.sum() / 2),
        num_missed=int((p == 0).sum()),
    )


def _labeller(
    labels_of: Callable[[Shaped[Array, "*event"]], Any] | ArrayLike, rows: Shaped[Array, " rows *event"]
) -> Callable[[Shaped[Array, " num *event"]], np.ndarray]:
    if callable(labels_of):
        return lambda events: np.asarray(compiled(jax.vmap(labels_of), events))
    centres = jnp.asarray(labels_of)
    if centres.shape[1:] != rows.shape[1:]:
        raise EnergyError(
            f"labels_of needs centres of shape (num_modes, *event) for the rows' events {rows.shape[1:]}; got "
            f"{centres.shape}."
        )
    return lambda events: np.asarray(_nearest(centres, events))


@jax.jit
def _nearest(centres: Shaped[Array, " modes *event"], events: Shaped[Array, " num *event"]) -> Int[Array, " num"]:
    axes = tuple(range(1, centres.ndim))
    return jax.lax.map(lambda event: jnp.argmin(jnp.sum((centres - event) ** 2, axis=axes)), events, batch_size=1024)


def _count(of_draws: np.ndarray, of_rows: np.ndarray, num_modes: int | None, num_centres: int | None) -> int:
    """Check the labels, and return the number of modes."""
    labels = np.concatenate([of_draws.ravel(), of_rows.ravel()])
    if of_draws.ndim != 1 or not (np.issubdtype(labels.dtype, np.integer) or labels.dtype == bool):
        raise EnergyError(
            f"labels_of must return one whole number for one event; got {labels.dtype} of shape {of_draws.shape[1:]}."
        )
    if num_modes is not None:
        check_count("mode_weights", "num_modes", num_modes)
    largest = int(labels.max())
    count = num_modes or num_centres or largest + 1
    if labels.min() < 0 or largest >= count:
        bad = int(labels.min()) if labels.min() < 0 else largest
        raise EnergyError(
            f"Labels must be from 0 to num_modes - 1 = {count - 1}; got {bad}. Give events outside the modes a label too."
        )
    return count


def _effective(inside: Float[np.ndarray, "chains num modes"]) -> Float[np.ndarray, " modes"]:
    """Return the effective number of draws for each weight; the smallest one for modes that no chain enters or leaves."""
    num_chains, num = inside.shape[:2]
    if num < 4:
        return np.full(inside.shape[2], float(num_chains))
    sizes = np.asarray(_sizes(jnp.asarray(inside)), float)
    varies = inside.std((0, 1)) > 0
    stuck = varies & ~(inside.std(1) > 0).any(0)
    sizes = np.where(stuck, num_chains, np.where(varies & np.isfinite(sizes), sizes, np.inf))
    sizes = np.minimum(sizes, num_chains * num)
    return np.where(varies, sizes, sizes.min() if varies.any() else num_chains).clip(1.0)


_sizes = jax.jit(jax.vmap(effective_sample_size, in_axes=2))
