"""Calls of the host from inside compiled programs, where a condition holds."""

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


@dataclasses.dataclass(frozen=True)
class Told:
    """What the host is told, equal where function and settings are: so programs are that tell the same.

    Attributes:
        function: ``function(*settings, flags, values)``.
        settings: hashable, and no arrays of the program, which would leak.
    """

    function: Callable[..., None]
    settings: tuple[Hashable, ...] = ()

    def __call__(self, *args: Any) -> None:
        """Tell it."""
        self.function(*self.settings, *args)


def call_where_any(report: Told, flags: Any, values: Any) -> None:
    """Call the host where a flag is up, and leave it alone elsewhere; under vmap, once for the first that has one."""
    _notifier(report)(flags, values)


@functools.lru_cache(maxsize=256)
def _notifier(report: Told) -> Callable[[Any, Any], Any]:
    """One function, and so one rule under vmap, for reports that are equal."""

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
