"""An energy site laid out one event per row, as estimators see it."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.concrete import eager
from numpyro_ebm._core.spreads import spread
from numpyro_ebm._core.typing import Array, PyTree, Scalar
from numpyro_ebm.distributions.missing import Missing

ROWS_AT_ONCE = 4096
"""Rows of one call: bounds the memory of a network's layers over all rows; below it one call is as fast as several."""


@dataclasses.dataclass(frozen=True)
class Site:
    """An energy site as an estimator sees it: one event per row, data or (for a latent site) the guide's draw.

    Attributes:
        name: the site's name.
        distribution: an `EnergyDistribution` (or `ScoreDistribution`), with its support and base.
        batch_shape: shape of the rows before they were flattened.
        value: ``(num_rows, *event_shape)``, constrained; masked rows hold a harmless value.
        local: context and base parameters of each row, leaves ``(num_rows, ...)``, or None.
        mask: ``(num_rows,)``, rows that take part, or None for all.
        index: ``(num_rows,)`` int32, each row's index in the whole data set: a subsampled plate's indices, with nested
            plates flattened in the order of the batch shape. None if int32 cannot count the rows.
        num_total: number of rows in the whole data set, so that ``index < num_total``; 0 if ``index`` is None.
        missing: elements of the events that rows lack, where ``value`` holds a placeholder; None if they lack none.
    """

    name: str
    distribution: Any
    batch_shape: tuple[int, ...]
    value: Shaped[Array, " rows *event"]
    local: PyTree
    mask: Bool[Array, " rows"] | None
    index: Int[Array, " rows"] | None = None
    num_total: int = 0
    missing: Missing | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows, masked ones included."""
        return self.value.shape[0]

    @functools.cached_property
    def position(self) -> Shaped[Array, " {self.num_rows} *position"]:
        """The rows in unconstrained space."""
        with eager(self.value):
            return jax.vmap(self.distribution.unconstrain)(self.value)

    @property
    def spread(self) -> Float[Array, "*position"]:
        """Standard deviation of the rows that take part, per dimension of unconstrained space; exactly 0 without any."""
        mask = None if self.mask is None else self.mask.reshape((-1,) + (1,) * (self.position.ndim - 1))
        return jax.lax.stop_gradient(spread(self.position, mask))

    @property
    def rows_differ(self) -> bool:
        """Whether each row has its own density, through its context or base."""
        return self.local is not None and math.prod(self.distribution.batch_shape) > 1

    def completed(self, position: Shaped[Array, " {self.num_rows} *position"]) -> "Site":
        """Return the site with the elements that rows lack taken from these positions; all others keep their bits."""
        if self.missing is None:
            return self
        drawn = jax.vmap(self.distribution.constrain)(position)
        value = jnp.where(self.missing.elements, drawn.astype(self.value.dtype), self.value)
        completed = dataclasses.replace(self, value=value, missing=None)
        # The positions themselves: a draw that is rounded to the boundary of the support has no position of its own.
        vars(completed)["position"] = position
        return completed

    def over_rows(self, fn: Callable[[Shaped[Array, "*event"], PyTree], PyTree]) -> PyTree:
        """Evaluate ``fn(event, local)`` for every row, a few thousand rows at once to bound the memory."""
        rows = (self.value, self.local)
        if self.num_rows <= ROWS_AT_ONCE:
            return jax.vmap(fn)(*rows)
        return jax.lax.map(lambda row: fn(*row), rows, batch_size=ROWS_AT_ONCE)

    def over_draws(
        self,
        fn: Callable[[Shaped[Array, "..."], PyTree], Shaped[Array, "..."]],
        draws: Shaped[Array, "num {self.num_rows} ..."],
    ) -> Shaped[Array, "num {self.num_rows} ..."]:
        """Evaluate ``fn(draw, local)`` at draws ``(num, num_rows, ...)`` of each row.

        The draws are flattened: with two batch dimensions the products of a network run at half their speed on CPU.
        """
        local = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * len(draws)), self.local)
        values = jax.vmap(fn)(draws.reshape(-1, *draws.shape[2:]), local)
        return values.reshape(*draws.shape[:2], *values.shape[1:])

    def log_density(self, position: Shaped[Array, "*position"], local: PyTree = None) -> Scalar:
        """Return the unnormalised log density of one row in unconstrained space, Jacobian included."""
        return self.distribution.unconstrained_log_density(position, local)

    def score(self, position: Float[Array, "*position"], local: PyTree = None) -> Float[Array, "*position"]:
        """Return the gradient of `log_density` in the position."""
        return self.distribution.unconstrained_score(position, local)
