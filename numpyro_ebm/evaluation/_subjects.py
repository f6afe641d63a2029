"""What a measure is given: rows under an energy, a score, a normalised distribution or a model."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers.sites import as_energy, data_site


def rows_under(owner: str, subject: Any, rows: Any, site: str | None = None) -> Site:
    """The rows, laid out and checked, under one of the things that measures compare.

    Args:
        owner: the function that asks, for its messages.
        subject: an energy, a score, a normalised NumPyro distribution, or ``(model, params)``.
        rows: held-out rows; what ``model(rows)`` takes.
        site: which energy site of a model with several.
    """
    if isinstance(subject, dist.Distribution):
        return data_site(owner, as_energy(subject) if unwrap(subject) is None else subject, None, (rows,), {})
    if isinstance(subject, tuple) and len(subject) == 2:
        return data_site(owner, *subject, (rows,), {}, site)
    raise TypeError(
        f"{owner} needs an EnergyDistribution, a ScoreDistribution, a NumPyro distribution or a pair (model, params); got "
        f"{type(subject).__name__}."
    )


def check_continuous(owner: str, site: Site) -> None:
    """Refuse events that have no derivatives.

    Raises:
        EnergyError: naming the support.
    """
    if site.distribution.is_discrete:
        raise EnergyError(
            f"{owner} takes derivatives in the event, and the support {site.distribution.support} is discrete."
        )


def as_vectors(name: str, events: Any) -> Array:
    """Events ``(num, ...)`` as finite vectors ``(num, d)``.

    Raises:
        EnergyError: for fewer than two, and for those that are not finite.
        TypeError: for what is no array of real numbers.
    """
    events = jnp.asarray(as_arrays(name, events))
    if not jnp.isrealobj(events):
        raise TypeError(f"{name} are real numbers; got dtype {events.dtype}.")
    if events.ndim == 0 or len(events) < 2:
        raise EnergyError(f"{name} need shape (number, ...) with at least two; got {events.shape}.")
    vectors = events.reshape(len(events), -1).astype(float)
    if is_concrete(vectors):
        bad = np.flatnonzero(~np.isfinite(np.asarray(vectors)).all(axis=1))
        if bad.size:
            raise EnergyError(f"Row {bad[0]} of {name} is not finite ({bad.size} such rows).")
    return vectors


def check_same_events(draws: Array, rows: Array) -> None:
    """Refuse draws of other events than the rows.

    Raises:
        EnergyError: with both shapes.
    """
    if draws.shape[1:] != rows.shape[1:]:
        raise EnergyError(
            f"draws have {draws.shape[1]} numbers an event, rows {rows.shape[1]}: both need one shape of event."
        )
