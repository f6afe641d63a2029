"""Conditional host callbacks from compiled programs."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Bool

from numpyro_ebm._core.typing import Array, PyTree


@dataclasses.dataclass(frozen=True)
class Told:
    """A host callback, compared by its function and settings, so that programs with equal callbacks are equal.

    Attributes:
        function: ``function(*settings, flags, values)``.
        settings: hashable values; no arrays of the program, which would leak.
    """

    function: Callable[..., None]
    settings: tuple[Hashable, ...] = ()

    def __call__(self, *args: Any) -> None:
        """Call the function with the settings in front."""
        self.function(*self.settings, *args)


def call_where_any(report: Told, flags: Bool[Array, " num"], values: PyTree) -> None:
    """Call the host if any flag is set; under vmap, once, with the first batch element that has a flag set."""
    _notifier(report)(flags, values)


@functools.lru_cache(maxsize=256)
def _notifier(report: Told) -> Callable[[Any, Any], Any]:
    """Return one function, with one vmap rule, for all equal reports."""

    @custom_vmap
    def notify(flags, values):
        jax.lax.cond(jnp.any(flags), lambda: jax.debug.callback(report, flags, values), lambda: None)
        return jnp.zeros(())

    @notify.def_vmap
    def notify_batch(_, is_batched, flags, values):
        first = jnp.argmax(jnp.any(flags, axis=-1)) if is_batched[0] else 0
        chosen = jax.tree.map(lambda leaf, batched: leaf[first] if batched else leaf, (flags, values), tuple(is_batched))
        return notify(*chosen), False

    return notify
