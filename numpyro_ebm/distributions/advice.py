"""What to write for data that do not fit the support: where they leave it, and which transform brings them in."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Shaped

from numpyro_ebm._core.discrete import OneHot, Spins
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.blocks import Blocks, cut, elementary
from numpyro_ebm.distributions.supports import region_of

Event = Shaped[np.ndarray, "*event"]


def describe_outside(support: Any, event: Event) -> str:
    """Return the first entry of an event that the support does not contain, or the whole event if none is to blame."""
    if isinstance(support, Blocks):
        for name, part, block in zip(support.names, support.parts, cut(event, support.shapes), strict=True):  # pyright: ignore
            if not np.all(part(block)):
                return f"member '{name}', {describe_outside(part, np.asarray(block))}"
    inside = np.asarray(elementary(support)(event))
    return describe(event, ~inside if inside.shape in (event.shape, event.shape[:-1]) else np.zeros(()))


def describe(event: Event, bad: Bool[np.ndarray, "..."]) -> str:
    """Return place and value of the first bad entry of an event, or of the first bad vector along its last axis."""
    if not bad.ndim:
        return str(event)
    index = tuple(np.argwhere(bad)[0].tolist())
    return f"{f'column {index[0]}' if len(index) == 1 else f'entry {index}'} is {event[index]}"


def to_support(support: Any, values: Event) -> str:
    """Return what to write for values, of all rows, of which some lie outside the support.

    Args:
        support: the constraint of an event.
        values: ``(num_rows, *event)``.
    """
    own, found = elementary(support), np.unique(values)
    region = region_of(own)
    if isinstance(own, Spins) and set(found) <= {0, 1}:
        return "The values are 0 and 1: pass spins, 2 * x - 1, or write support=numpyro.distributions.constraints.boolean."
    if isinstance(own, OneHot):
        return (
            "A one-hot vector has a single 1 among zeros. For codes of categories from 0 on write jax.nn.one_hot(x, k, "
            "dtype=int), or support=numpyro.distributions.constraints.integer_interval(0, k - 1)."
        )
    if region.kind != "integers" or any(np.size(bound) != 1 for bound in region.bounds if bound is not None):
        return "Write the support of the data."
    if not np.all(found == np.round(found)):
        return "The values of this support are whole numbers; round the data, jnp.round(x), or write another support."
    low, high = (np.inf if bound is None else float(bound) for bound in region.bounds)
    if set(found) <= {-1, 1} and (low, high) == (0, 1):
        return "The values are spins: write support=numpyro_ebm.spins, or pass 0 and 1, (x + 1) // 2."
    if found.min() == low + 1 and found.max() == high + 1:
        return f"The values are {found.min():g} to {found.max():g}, so they count from {low + 1:g}: pass x - 1."
    ends = f"{min(found.min(), low):g}, {max(found.max(), high):g}"
    return f"Write the support of the data, numpyro.distributions.constraints.integer_interval({ends})."


def to_shape(support: Any, event_shape: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Return what to write for categories given as codes where they should be one-hot, or the other way round; else empty.

    Args:
        support: the constraint of an event.
        event_shape: the shape of an event.
        shape: the shape of the data.
    """
    own, size = elementary(support), len(event_shape)
    if isinstance(own, OneHot) and shape[len(shape) - size + 1 :] == event_shape[:-1]:
        return (
            f" Rows of codes of categories become one-hot by jax.nn.one_hot(x, {event_shape[-1]}, dtype=int); or write "
            f"support=numpyro.distributions.constraints.integer_interval(0, {event_shape[-1] - 1}) and "
            f"event_shape={event_shape[:-1]}."
        )
    region = region_of(own)
    if region.kind != "integers" or any(bound is None or np.size(bound) != 1 for bound in region.bounds):
        return ""
    num = float(region.bounds[1]) - float(region.bounds[0]) + 1
    if shape[len(shape) - size - 1 :] == (*event_shape, int(num) if np.isfinite(num) else -1):
        return (
            f" One-hot rows become codes of categories by jnp.argmax(x, -1){_plus(float(region.bounds[0]))}; or write "
            f"support=numpyro_ebm.one_hot and event_shape={(*event_shape, int(num))}."
        )
    return ""


def _plus(low: float) -> str:
    return f" + {low:g}" if low else ""


def needs_integers(function: Callable[..., Any], event: Shaped[Array, "*event"], *context: Any) -> bool:
    """Return whether a function that has failed on an event of floating-point numbers takes one of integers."""
    if not jnp.issubdtype(event.dtype, jnp.floating):
        return False
    try:
        jax.eval_shape(function, jax.ShapeDtypeStruct(event.shape, jnp.result_type(int)), *context)
    except Exception:  # noqa: BLE001  (whatever it is, the first error tells more)
        return False
    return True


def on_integers(support: Any) -> EnergyError:
    """Return the error for an energy of whole numbers that gets floating-point ones."""
    got = "The energy takes whole numbers only, as indices do, and got floating-point numbers."
    if isinstance(support, Blocks):
        return EnergyError(
            f"{got} The event of several members is one vector of them: write event[2:].astype(int) for a part."
        )
    if support.is_discrete:
        return EnergyError(
            f"{got} Pass data of integers. Kernels and estimators that take the gradient in the event evaluate it at such "
            "numbers: write kernel='gibbs' or 'flips' ('block_gibbs' for a ready-made energy) instead, or an energy with a "
            "gradient, such as -jnp.sum(table * x) with support=numpyro_ebm.one_hot."
        )
    return EnergyError(
        f"{got} The support {support} is continuous. For codes of categories write "
        "support=numpyro.distributions.constraints.integer_interval(0, 9), and for chains kernel='gibbs' or 'flips'."
    )
