"""Errors that say what came, what is needed and what to write."""

import difflib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class EnergyError(ValueError):
    """A fault in how an energy, its data or its estimator was declared.

    Attributes:
        site: name of the site where it was found, which the message begins with; None where no site is known.
    """

    site: str | None = None

    def __str__(self) -> str:
        """The message, after the name of the site unless it holds that already."""
        message = super().__str__()
        is_told = self.site is None or f"site '{self.site}'" in message
        return message if is_told else f"At site '{self.site}': {message}"


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
    """Give the site's name, where there is one, to any fault found inside; the innermost site stays."""
    try:
        yield
    except EnergyError as error:
        error.site = error.site or name
        raise


def nearest(name: str, known: Iterable[str]) -> str:
    """Words that offer the known name nearest to an unknown one, and list the others."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known names: {', '.join(known) or 'none'}."
