"""Errors that say what came, what is needed and what to write."""

import dataclasses
import difflib
import functools
import math
import numbers
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_batching import custom_vmap


class EnergyError(ValueError):
    """A fault in how an energy, its data or its estimator was declared."""


class UnhealthyChainsError(EnergyError):
    """The chains that train an energy are not what they have to be, or under ``on_unhealthy="raise"`` should be.

    Attributes:
        result: out of `fit`, the `FitResult` of what was trained until then; None elsewhere, and before the first update.
    """

    result: Any = None


class UnhealthyChainsWarning(UserWarning):
    """The chains that train an energy are not what they should be; the message says how and what to try."""


class OverfittingWarning(UserWarning):
    """Training went on past the best fit of held-out rows, or its loss runs away; the message has the numbers."""


class NonFiniteLossWarning(UserWarning):
    """A loss or parameters became infinite or NaN in training; the message says what is returned and what to try."""


class UnreliableLogPartitionWarning(UserWarning):
    """Too few effective draws are behind an estimate of log Z for its standard error to mean something."""


class UntrainedParametersWarning(UserWarning):
    """MCMC samples an energy whose parameters are at their initial values; the message says how to pass trained ones."""


class UncalibratedPosteriorWarning(UserWarning):
    """The posterior under an estimator that is no likelihood has an arbitrary width until it is calibrated."""


def warn_uncalibrated(estimator: str, user: str) -> None:
    """Warn that the width of a posterior under an objective is arbitrary.

    Args:
        estimator: the objective's name.
        user: what takes its loss for a log density.

    Warns:
        UncalibratedPosteriorWarning: with what to write instead.
    """
    warnings.warn(
        f"The posterior under '{estimator}' is a generalised one: its centre is that of the estimator, its width depends on "
        "the scale of the loss, such as the unit of the data, and is arbitrary until it is calibrated "
        f"(numpyro.handlers.scale around the site). {user} takes the loss as it is. For the posterior of the likelihood "
        "write SVI with AutoNormal and estimate(model, 'pcd'), or an energy with normalized=True; for a point, AutoDelta.",
        UncalibratedPosteriorWarning,
        stacklevel=3,
    )


@contextmanager
def at_site(name: str | None) -> Iterator[None]:
    """Put the site's name, where there is one, in front of the message of any fault found inside."""
    try:
        yield
    except EnergyError as error:
        if name is None or f"site '{name}'" in str(error) or str(error).startswith("At site '"):
            raise
        raise EnergyError(f"At site '{name}': {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that offer the known name nearest to an unknown one, and list the others."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known names: {', '.join(known) or 'none'}."


def is_concrete(*values: Any) -> bool:
    """Whether every leaf is a value and not a tracer or a placeholder."""
    leaves = jax.tree.leaves(values)
    return all(isinstance(leaf, numbers.Number | np.ndarray | np.generic | jax.Array) for leaf in leaves) and not any(
        isinstance(leaf, Tracer) for leaf in leaves
    )


def eager(*values: Any) -> AbstractContextManager:
    """Inside ``jit``, compute with values that are known there at once, so that they can be checked."""
    return jax.ensure_compile_time_eval() if is_concrete(*values) else nullcontext()


def check_positive(owner: str, name: str, value: Any, *, scalar: bool = False) -> None:
    """Refuse a concrete value that is not positive and finite in every element, or is no scalar where one is needed.

    Raises:
        EnergyError: naming the owner, the option and the value.
    """
    if value is None:
        return
    if scalar and np.shape(value):
        raise EnergyError(f"{owner} needs one number {name}; got shape {np.shape(value)}. Write {owner}({name}=0.1).")
    if not isinstance(value, str) and not is_concrete(value):
        return
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.number) and np.all(np.isfinite(array)) and np.all(array > 0)):
        raise EnergyError(f"{owner} needs {name} > 0 and finite; got {name}={value!r}. Write {owner}({name}=0.1).")


def check_covariance(owner: str, name: str, value: Any, *, may_be_dense: bool = True) -> None:
    """Refuse concrete variances that are not positive and finite, or a matrix that is no covariance.

    Args:
        owner: who asks.
        name: of the option.
        value: ``(d,)``, or ``(d, d)``; None for none.
        may_be_dense: whether a matrix will do.

    Raises:
        EnergyError: with what is wrong, and what to write.
    """
    if value is None or not is_concrete(value):
        return
    array = np.asarray(value)
    write = f"Write {name}=jnp.ones(d), variances by coordinate" + (", or a covariance (d, d)." if may_be_dense else ".")
    if not np.issubdtype(array.dtype, np.number) or array.ndim not in ((1, 2) if may_be_dense else (1,)):
        raise EnergyError(f"{owner} got {name} of shape {array.shape} and type {array.dtype}. {write}")
    if not np.all(np.isfinite(array)):
        raise EnergyError(f"{owner} needs a finite {name}; got {value!r}. {write}")
    if array.ndim == 1 and not np.all(array > 0):
        raise EnergyError(f"{owner} needs {name} > 0 in each coordinate; got {value!r}. {write}")
    if array.ndim == 2 and not is_positive_definite(array.astype(float)):
        raise EnergyError(f"{owner} needs {name} symmetric and positive definite; got {value!r}. {write}")


def is_positive_definite(matrix: np.ndarray) -> bool:
    """Whether an array is a square, symmetric (to rounding in float32) and positive definite matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.all(np.isfinite(matrix)):
        return False
    largest = np.abs(matrix).max(initial=0.0)
    return bool(np.all(np.abs(matrix - matrix.T) <= 1e-5 * largest) and np.all(np.linalg.eigvalsh(matrix) > 0))


def check_count(owner: str, name: str, value: Any, minimum: int = 1) -> None:
    """Refuse a count that is not a whole number of at least ``minimum``.

    Raises:
        EnergyError: naming the owner, the option and the value.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < minimum or not math.isfinite(value):
        raise EnergyError(
            f"{owner} needs a whole number {name} >= {minimum}; got {name}={value!r}. "
            f"Write {owner}({name}={max(minimum, 10)})."
        )


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
