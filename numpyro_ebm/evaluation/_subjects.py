"""Inputs of the measures: rows under an energy, a score, a normalised distribution or a model."""

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, ArrayLike
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers.sites import as_energy, data_site


def rows_under(owner: str, subject: object, rows: ArrayLike, site: str | None = None) -> Site:
    """Lay out and check rows under one of the things that measures compare.

    Args:
        owner: name of the calling function, for messages.
        subject: an energy, a score, a normalised NumPyro distribution, or ``(model, params)``.
        rows: held-out rows; the argument of ``model(rows)``.
        site: name of the energy site, for a model with several.
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
    """Check that the events are continuous, so that they have derivatives.

    Raises:
        EnergyError: for a discrete support, which the message names.
    """
    if not site.distribution.is_continuous:
        raise EnergyError(
            f"{owner} takes derivatives in the event, and the support {site.distribution.support} is discrete."
        )


def as_vectors(name: str, events: ArrayLike) -> Float[Array, "num d"]:
    """Return events ``(num, ...)`` as finite vectors ``(num, d)``.

    Raises:
        EnergyError: for fewer than two events, and for events that are not finite.
        TypeError: for anything but an array of real numbers.
    """
    events = jnp.asarray(as_arrays(name, events))
    if not jnp.isrealobj(events):
        raise TypeError(f"{name} must be real numbers; got dtype {events.dtype}.")
    if events.ndim == 0 or len(events) < 2:
        raise EnergyError(f"{name} need shape (num, ...) with at least two events; got {events.shape}.")
    vectors = events.reshape(len(events), -1).astype(float)
    if is_concrete(vectors):
        bad = np.flatnonzero(~np.isfinite(np.asarray(vectors)).all(axis=1))
        if bad.size:
            raise EnergyError(f"Row {bad[0]} of {name} is not finite ({bad.size} such rows).")
    return vectors


def check_same_events(draws: Float[Array, "draws _"], rows: Float[Array, "rows _"]) -> None:
    """Check that draws and rows have events of the same size.

    Raises:
        EnergyError: with both sizes.
    """
    if draws.shape[1:] != rows.shape[1:]:
        raise EnergyError(
            f"draws have {draws.shape[1]} numbers per event, rows have {rows.shape[1]}: both need events of the same shape."
        )
