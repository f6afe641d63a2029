"""Checks of user options."""

import math
import numbers
from typing import Any

import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import ArrayLike


def check_positive(owner: str, name: str, value: ArrayLike | None, *, scalar: bool = False) -> None:
    """Check that a concrete value is positive and finite in every element, and a scalar if ``scalar`` is set.

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


def check_covariance(owner: str, name: str, value: ArrayLike | None, *, may_be_dense: bool = True) -> None:
    """Check that concrete variances are positive and finite, or that a matrix is a covariance.

    Args:
        owner: name of the class that has the option.
        name: name of the option.
        value: ``(d,)`` or ``(d, d)``; None passes.
        may_be_dense: whether a matrix is allowed.

    Raises:
        EnergyError: with what is wrong and what to write.
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
    """Return whether an array is a square, symmetric (up to float32 rounding) and positive definite matrix."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not np.all(np.isfinite(matrix)):
        return False
    largest = np.abs(matrix).max(initial=0.0)
    return bool(np.all(np.abs(matrix - matrix.T) <= 1e-5 * largest) and np.all(np.linalg.eigvalsh(matrix) > 0))


def check_count(owner: str, name: str, value: Any, minimum: int = 1) -> None:
    """Check that a count is a whole number of at least ``minimum``.

    Raises:
        EnergyError: naming the owner, the option and the value.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < minimum or not math.isfinite(value):
        raise EnergyError(
            f"{owner} needs a whole number {name} >= {minimum}; got {name}={value!r}. "
            f"Write {owner}({name}={max(minimum, 10)})."
        )
