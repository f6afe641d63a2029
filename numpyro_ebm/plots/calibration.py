"""`plot_calibration`: whether the classifier inside noise contrastive estimation means its probabilities."""

from typing import Any

import numpy as np

from numpyro_ebm._errors import EnergyError, check_count, check_positive
from numpyro_ebm.plots._style import DARK, DATA, MODEL, numbers, several_axes

OWNER = "plot_calibration"
QUANTILE = 1.96


def plot_calibration(
    log_ratios_data: Any, log_ratios_noise: Any, axes: Any = None, *, nu: float = 1.0, num_bins: int = 10
) -> np.ndarray:
    r"""Reliability diagram of the nce classifier: how often "data" is right where it says "data" with probability ``P``.

    With log ratios :math:`G(x) = \log p(x) - \log \nu p_n(x)`, log Z included, and ``n`` data among ``m`` noise draws,

    .. math:: P(\text{data} | x) = \sigma(G(x) + \log \nu - \log (m / n))

    is right for data from ``p`` whatever ``n`` and ``m``. Above, in bins of equal width, the frequency of data against the
    mean prediction, with 95 % intervals (Wilson's, of a binomial), and the diagonal of a calibrated classifier; empty bins
    are left out. Below, how many predictions lie in each bin. Points below the diagonal: the model claims more density there
    than the data have. Take rows that were not trained on: on others an overfitted model looks calibrated.

    Args:
        log_ratios_data: ``G`` at rows, any shape.
        log_ratios_noise: ``G`` at draws of the noise, any shape.
        axes: two matplotlib axes; None for a new figure.
        nu: noise draws per row that are inside ``G``; 1 for plain ``log p - log p_n``.
        num_bins: how many.

    Returns:
        The axes, ``(2,)``.

    Raises:
        EnergyError: (a ValueError) for log ratios that are NaN, nu that is not positive, and another number of axes.
        ImportError: without matplotlib.

    Example:
        ::

            log_ratio = lambda x: distribution.log_prob(x) - result.params["x$log_normalizer"] - noise.log_prob(x)
            plot_calibration(log_ratio(x_test), log_ratio(noise.sample(key, (len(x_test),))))

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012); Niculescu-Mizil and
        Caruana, Predicting good probabilities with supervised learning (2005); Wilson, Probable inference (1927).
    """
    check_positive(OWNER, "nu", nu, scalar=True)
    check_count(OWNER, "num_bins", num_bins)
    at_data, at_noise = _ratios("log_ratios_data", log_ratios_data), _ratios("log_ratios_noise", log_ratios_noise)
    shift = np.log(nu) - np.log(len(at_noise) / len(at_data))
    predicted = [_sigmoid(each + shift) for each in (at_data, at_noise)]
    top, bottom = several_axes(OWNER, axes, (2, 1), (4.6, 5.6), sharex=True, height_ratios=[2.4, 1.0]).reshape(-1)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    _draw_reliability(top, *predicted, edges)
    _draw_counts(bottom, *predicted, edges)
    return np.array([top, bottom])


def _ratios(name: str, values: Any) -> np.ndarray:
    ratios = numbers(OWNER, name, values).reshape(-1)
    if np.isnan(ratios).any():
        raise EnergyError(f"{OWNER} got {int(np.isnan(ratios).sum())} NaN in {name}. Look at the energy at these events.")
    return ratios


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * values))


def _draw_reliability(ax: Any, at_data: np.ndarray, at_noise: np.ndarray, edges: np.ndarray) -> None:
    means, frequencies, counts = _bins(at_data, at_noise, edges)
    ax.plot([0, 1], [0, 1], color=DARK, ls="--", lw=1.0, label="calibrated")
    low, high = _wilson(frequencies, counts)
    errors = np.maximum([frequencies - low, high - frequencies], 0.0)
    ax.errorbar(means, frequencies, errors, fmt="o", color=MODEL, ms=5, capsize=3, label="bins, 95 % intervals")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="frequency of data")
    ax.legend(fontsize="small")


def _bins(at_data: np.ndarray, at_noise: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean prediction, frequency of data and number of events in each bin that is not empty."""
    predicted = np.concatenate([at_data, at_noise])
    is_data = np.arange(len(predicted)) < len(at_data)
    place = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    filled = counts > 0
    sums = (np.bincount(place, weights, minlength=len(edges) - 1)[filled] for weights in (predicted, is_data))
    means, frequencies = (each / counts[filled] for each in sums)
    return means, frequencies, counts[filled]


def _wilson(frequencies: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the 95 % interval of a binomial's probability."""
    square = QUANTILE**2 / counts
    middle = (frequencies + square / 2) / (1 + square)
    half = np.sqrt(frequencies * (1 - frequencies) * square + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def _draw_counts(ax: Any, at_data: np.ndarray, at_noise: np.ndarray, edges: np.ndarray) -> None:
    ax.hist(at_data, edges, color=DATA, label="data")
    ax.hist(at_noise, edges, histtype="step", color=MODEL, lw=1.5, label="noise")
    ax.set(xlabel="predicted probability of data", ylabel="events")
    ax.legend(fontsize="small")
