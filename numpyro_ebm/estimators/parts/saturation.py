"""A warning where the loss of a classifier is saturated and its gradient is lost."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.site import Site

SATURATED = 1e-6


def warn_where_saturated(site: Site, factors: Array, fault: str, fix: str) -> None:
    """Warn where the loss does not feel the energy: its mean derivative in the log ratios is below 1e-6.

    Args:
        site: the rows.
        factors: sizes of these derivatives, ``(num_rows,)``.
        fault: what is wrong with what the rows are compared with.
        fix: what to write.

    Warns:
        UserWarning: at once where the values are known, from inside a compiled program elsewhere.
    """
    takes_part = jnp.ones(site.num_rows, bool) if site.mask is None else site.mask
    factor = jax.lax.stop_gradient(jnp.mean(factors, where=takes_part))

    # The same words at every update, which Python shows once.
    words = (
        f"At site '{site.name}': {fault} (mean derivative of the loss in the log ratios below {SATURATED}): nothing is "
        f"learned. {fix}"
    )
    if not is_concrete(factor):
        call_where_any(Told(_warn, (words,)), (factor < SATURATED)[None], ())
    elif factor < SATURATED:
        _warn(words)


def _warn(words: str, *_: Any) -> None:
    warnings.warn(words, stacklevel=2)


def slope(fn: Callable[[Array], Array], at: Array) -> Array:
    """Size of an elementwise function's derivative."""
    return jnp.abs(jax.jvp(fn, (at,), (jnp.ones_like(at),))[1])
