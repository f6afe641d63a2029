"""Log likelihoods of an energy's rows from an estimate of log Z, with notes on its error."""

from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError

Shape = tuple[int, ...]


def normalized(
    name: str, values: Shaped[np.ndarray, "chains draws *rows"], log_partition: Any, sample_shape: Shape
) -> tuple[Float[np.ndarray, "chains draws *rows"], dict[str, Any]]:
    """Subtract log Z from the unnormalised log densities of a site.

    Args:
        name: name of the site.
        values: ``sample_shape + rows``.
        log_partition: object with ``value`` and ``standard_error`` of one shape: ``()`` or ``rows`` where the energy is the
            same in all draws; otherwise per draw, ``(chains, draws)`` or ``(chains * draws,)``, with or without ``rows`` at
            the end. May have ``bound``.
        sample_shape: ``(chains, draws)``.

    Returns:
        The log likelihood, of the shape of ``values``, and notes: the largest standard error of log Z, its bound, and both
        in words.

    Raises:
        EnergyError: for log Z of the wrong shape, a single log Z where the energy differs between draws, or log Z that is
            not finite; the message names the site.
        TypeError: for an object without ``value`` and ``standard_error``.
    """
    if not (hasattr(log_partition, "value") and hasattr(log_partition, "standard_error")):
        raise TypeError(
            f"log_partition['{name}'] needs a value and a standard_error, as log_partition(...) returns them; got "
            f"{type(log_partition).__name__}. For an ordinary, normalised site write log_partition={{'{name}': None}}."
        )
    log_z, error = (np.asarray(each, float) for each in (log_partition.value, log_partition.standard_error))
    if error.shape != log_z.shape:
        raise EnergyError(f"At site '{name}': log Z has shape {log_z.shape} and its standard error {error.shape}.")
    if not np.all(np.isfinite(log_z)):
        raise EnergyError(f"At site '{name}': {np.sum(~np.isfinite(log_z))} of {log_z.size} values of log Z are not finite.")
    log_z = _over_draws(name, log_z, values, sample_shape)
    return values - log_z, _notes(name, error, getattr(log_partition, "bound", None), values.shape[2:])


def _over_draws(
    name: str, log_z: Float[np.ndarray, "..."], values: Shaped[np.ndarray, "chains draws *rows"], sample_shape: Shape
) -> Float[np.ndarray, "..."]:
    """Return log Z in a shape that broadcasts against the values."""
    rows, num_draws = values.shape[2:], sample_shape[0] * sample_shape[1]
    per_draw = {(*lead, *tail) for lead in (sample_shape, (num_draws,)) for tail in ((), rows)}
    shared = {(), rows}
    if log_z.shape in per_draw & shared and num_draws > 1:
        raise EnergyError(
            f"At site '{name}': log Z of shape {log_z.shape} may be one per draw or one per row. Give it shape "
            f"{sample_shape} or {(*sample_shape, *rows)}."
        )
    if log_z.shape in per_draw:
        tail = log_z.shape[2:] if log_z.shape[:2] == sample_shape else log_z.shape[1:]
        return log_z.reshape((*sample_shape, *(tail or (1,) * len(rows))))
    if log_z.shape not in shared:
        raise EnergyError(
            f"At site '{name}': log Z has shape {log_z.shape}; it needs one value per draw, {sample_shape} or "
            f"{(num_draws,)}, followed by the rows' shape {rows} where each row has its own."
        )
    if np.any(values != values[:1, :1]):
        raise EnergyError(
            f"At site '{name}': the energy differs from draw to draw, so in general its log Z does too, but log Z of shape "
            f"{log_z.shape} is the same for all draws. Estimate log Z with each draw's parameters and pass shape "
            f"{sample_shape}. If Z does not depend on the draws, write value=numpy.broadcast_to(value, {sample_shape})."
        )
    return log_z


def _notes(name: str, error: Float[np.ndarray, "..."], bound: str | None, rows: Shape) -> dict[str, Any]:
    largest = float(np.max(error))
    words = f"log_likelihood['{name}'] is the unnormalised log density minus an estimate of log Z"
    if np.isfinite(largest):
        shared = 1 if rows and error.shape[-len(rows) :] == rows else int(np.prod(rows))
        words += f" with a standard error of up to {largest:.3g} nats"
        if shared > 1 and largest > 0:
            words += f", which all {shared} rows share: if all draws share it too, elpd is off by {shared} times this error"
    else:
        words += " with an unknown standard error"
    directions = {
        "lower": "log Z is a stochastic lower bound, so the log likelihood is optimistic: too high in expectation",
        "upper": "log Z is a stochastic upper bound, so the log likelihood is pessimistic: too low in expectation",
    }
    words += f". {directions[bound]}." if bound in directions else "."
    return {
        f"{name}_log_partition_standard_error": largest,
        f"{name}_log_partition_bound": bound or "none",
        f"{name}_note": words,
    }
