"""Bounds that a healthy run passes by chance about once in a million times."""

from statistics import NormalDist

import numpy as np

LEVEL = 1e-6
"""Probability that a healthy run fails one check; small, because a diagnosis makes many checks."""


def normal_bound(num_tests: int = 1) -> float:
    """Return the bound on the absolute value of the largest of ``num_tests`` standard normal variables, 4.9 for one."""
    return -NormalDist().inv_cdf(LEVEL / (2 * max(num_tests, 1)))


def chi2_bound(degrees: float, num_tests: int = 1) -> float:
    """Return the same bound for chi-square variables (Wilson and Hilferty)."""
    z = -NormalDist().inv_cdf(LEVEL / max(num_tests, 1))
    spread = 2 / (9 * degrees)
    return float(degrees * (1 - spread + z * np.sqrt(spread)) ** 3)


def gamma_bound(mean: float, sd: float) -> float:
    """Return the same bound for a gamma variable of this mean and standard deviation, such as a share of rare events."""
    if sd <= 0:
        return mean
    return sd**2 / (2 * mean) * chi2_bound(2 * mean**2 / sd**2)
