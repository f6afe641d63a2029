"""Errors and warnings. Each message says what was given, what is needed and what to write."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class EnergyError(ValueError):
    """An error in the declaration of an energy, its data or its estimator.

    Attributes:
        site: name of the site where the error was found, which starts the message; None if no site is known.
    """

    site: str | None = None

    def __str__(self) -> str:
        """Return the message, with the name of the site in front unless the message contains it."""
        message = super().__str__()
        is_told = self.site is None or f"site '{self.site}'" in message
        return message if is_told else f"At site '{self.site}': {message}"


class UnhealthyChainsError(EnergyError):
    """The chains that train an energy cannot be used, or are unhealthy under ``on_unhealthy="raise"``.

    Attributes:
        result: when `fit` raises, the `FitResult` so far; None elsewhere and before the first update.
    """

    result: Any = None


class UnhealthyChainsWarning(UserWarning):
    """The chains that train an energy, or draw auxiliary data from it, are unhealthy; the message says what to try."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read.

    Attributes:
        result: when `fit` raises, the `FitResult` so far, so that nothing trained is lost; None before the first update.
    """

    result: Any = None


class OverfittingWarning(UserWarning):
    """Training continued past the best held-out loss, or the loss diverges; the message gives the numbers."""


class NonFiniteLossWarning(UserWarning):
    """A loss or parameters became infinite or NaN in training; the message says what is returned and what to try."""


class TrainingStoppedWarning(UserWarning):
    """Training stopped early because its source of batches ended or failed, or its callback failed."""


class UnreliableLogPartitionWarning(UserWarning):
    """An estimate of log Z has an unreliable standard error, or an error that is too large for the rows that multiply it."""


class UntrainedParametersWarning(UserWarning):
    """MCMC samples an energy whose parameters have their initial values; the message says how to pass trained ones."""


class UncalibratedPosteriorWarning(UserWarning):
    """The posterior under an estimator other than a likelihood has an arbitrary width until it is calibrated."""


def warn_uncalibrated(estimator: str, user: str) -> None:
    """Warn that the width of a posterior under an objective is arbitrary.

    Args:
        estimator: name of the objective.
        user: name of the guide or sampler that uses its loss as a log density.

    Warns:
        UncalibratedPosteriorWarning: with what to write instead.
    """
    warnings.warn(
        f"The posterior under '{estimator}' is a generalised posterior: it is centred at the estimate, but its width "
        "depends on the scale of the loss, such as the unit of the data, and is arbitrary until it is calibrated: write "
        f"estimate(model, '{estimator}', weight=numpyro_ebm.calibrate(...).weight), or weight=1.0 if this scale is meant. "
        f"{user} takes the loss without calibration. For the posterior of the "
        "likelihood write SVI with AutoNormal and estimate(model, 'pcd'), or an energy with normalized=True; for a point "
        "estimate, AutoDelta.",
        UncalibratedPosteriorWarning,
        stacklevel=3,
    )


@contextmanager
def at_site(name: str | None) -> Iterator[None]:
    """Add the site's name, if there is one, to an `EnergyError` raised inside; the innermost name is kept."""
    try:
        yield
    except EnergyError as error:
        error.site = error.site or name
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint that suggests the known name closest to an unknown one and lists all known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known names: {', '.join(known) or 'none'}."
