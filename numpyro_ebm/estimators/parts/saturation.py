"""A warning for a classifier whose loss is saturated, so that its gradient vanishes."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.typing import Array, RowValues
from numpyro_ebm.distributions.site import Site

SATURATED = 1e-6
"""Mean derivative of the loss in the log ratios below which it does not train the energy; otherwise it is of order 1."""


def warn_where_saturated(site: Site, factors: RowValues, fault: str, fix: str) -> None:
    """Warn if the loss does not depend on the energy: its mean derivative in the log ratios is below 1e-6.

    Args:
        site: the rows.
        factors: absolute values of these derivatives, ``(num_rows,)``.
        fault: what is wrong with the noise or the moves that the rows are compared with.
        fix: what to write.

    Warns:
        UserWarning: at once for concrete values, otherwise from inside the compiled program.
    """
    takes_part = jnp.ones(site.num_rows, bool) if site.mask is None else site.mask
    factor = jax.lax.stop_gradient(jnp.mean(factors, where=takes_part))

    # The text is the same at every update, so Python shows it once.
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


def slope(
    fn: Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]], at: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    """Return the absolute value of an elementwise function's derivative."""
    return jnp.abs(jax.jvp(fn, (at,), (jnp.ones_like(at),))[1])
