"""`plot_calibration`: whether the classifier inside noise contrastive estimation is calibrated."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int
from numpyro import handlers

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import ArrayLike, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import NoiseContrastiveEstimation
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.handlers.energy_sites import energy_sites
from numpyro_ebm.handlers.results import Result, check_values_given, values_of
from numpyro_ebm.handlers.sites import choose
from numpyro_ebm.plots._style import DARK, DATA, MODEL, numbers, several_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWNER = "plot_calibration"
QUANTILE = 1.96
"""Standard errors of a 95 % interval, by the normal distribution."""


def plot_calibration(
    log_ratios_data: ArrayLike,
    log_ratios_noise: ArrayLike,
    axes: "Axes | Sequence[Any] | np.ndarray | None" = None,
    *,
    nu: float = 1.0,
    num_bins: int = 10,
) -> np.ndarray:
    r"""Plot a reliability diagram of the nce classifier: the frequency of data for each predicted probability ``P``.

    With log ratios :math:`G(x) = \log p(x) - \log \nu p_n(x)`, log Z included, and ``n`` data and ``m`` noise draws,

    .. math:: P(\text{data} | x) = \sigma(G(x) + \log \nu - \log (m / n))

    is the correct probability for data from ``p``, whatever ``n`` and ``m``. The upper panel shows the frequency of data
    against the mean prediction in bins of equal width, with 95 % intervals (Wilson's, of a binomial), and the diagonal of a
    calibrated classifier; empty bins are left out. The lower panel shows the number of predictions in each bin. Below the
    diagonal the model has more density than the data. Use held-out rows: on training rows an overfitted model looks
    calibrated.

    Args:
        log_ratios_data: ``G`` at rows, any shape.
        log_ratios_noise: ``G`` at draws of the noise, any shape.
        axes: two matplotlib axes; None for a new figure.
        nu: number of noise draws per row that ``G`` includes; 1 for plain ``log p - log p_n``.
        num_bins: number of bins.

    Returns:
        The axes, ``(2,)``.

    Raises:
        EnergyError: (a ValueError) for log ratios that are NaN, for nu that is not positive, and for the wrong number of
            axes.
        ImportError: without matplotlib.

    Example:
        ::

            result = fit(key, SVI(estimated, empty_guide, optax.adam(1e-2), Trace_ELBO()), 2000, x_train)
            plot_calibration(*log_ratios(key, estimated, result, x_test))

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012); Niculescu-Mizil and
        Caruana, Predicting good probabilities with supervised learning (2005); Wilson, Probable inference (1927).
    """
    check_positive(OWNER, "nu", nu, scalar=True)
    check_count(OWNER, "num_bins", num_bins)
    at_data, at_noise = _ratios("log_ratios_data", log_ratios_data), _ratios("log_ratios_noise", log_ratios_noise)
    shift = np.log(nu) - np.log(len(at_noise) / len(at_data))
    at_data, at_noise = _sigmoid(at_data + shift), _sigmoid(at_noise + shift)
    top, bottom = several_axes(OWNER, axes, (2, 1), (4.6, 5.6), sharex=True, height_ratios=[2.4, 1.0]).reshape(-1)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    _draw_reliability(top, at_data, at_noise, edges)
    _draw_counts(bottom, at_data, at_noise, edges)
    return np.array([top, bottom])


def log_ratios(
    rng_key: PRNGKey, model: estimate, result: Result, *args: Any, site: str | None = None, **kwargs: Any
) -> tuple[Float[np.ndarray, " rows"], Float[np.ndarray, " draws"]]:
    r"""Compute log ratios :math:`\log p(x) - \log p_n(x)` of a trained energy at rows and at new noise draws.

    They are the input of `plot_calibration`. Log Z is the learned one, or 0 where the energy includes it. Masked rows are
    left out.

    Args:
        rng_key: random key of the noise.
        model: the model that was trained, as `estimate` returned it, with the estimator "nce" or a variant of it.
        result: the result of `fit` or of ``svi.run``, or a dict of parameters.
        *args: arguments of the model, with held-out rows in the place of the training rows.
        site: name of the energy site; None for the only one.
        **kwargs: keyword arguments of the model.

    Returns:
        The log ratios at the rows and at their noise draws, both flat.

    Raises:
        EnergyError: (a ValueError) for a site that does not exist, several sites without a choice, and parameters without a
            value.
        TypeError: for a model that does not come from `estimate`, and for an estimator without a classifier of noise.
    """
    estimated = estimated_in(model)
    if estimated is None:
        raise TypeError(f"log_ratios needs the model as estimate returned it; got {type(model).__name__}.")
    model = estimated
    check_key("log_ratios", rng_key)
    args, kwargs = as_arrays("log_ratios", (args, kwargs))
    given = values_of("log_ratios", result)
    energies, trace = energy_sites(model.fn, given, args, kwargs)
    check_values_given(trace, given)
    with handlers.trace() as own, handlers.seed(rng_seed=rng_key), handlers.substitute(data=given):
        estimator, chosen = _site(model.lay_out(energies), site)
        found = estimator.log_ratios(rng_key, chosen)
    check_values_given(own, given)  # those of the noise model
    log_z = given.get(f"{chosen.name}$log_normalizer", 0.0)
    rows = np.ones(chosen.num_rows, bool) if chosen.mask is None else np.asarray(chosen.mask)
    at_data, at_noise = np.asarray(found.data - log_z), np.asarray(found.noise - log_z)
    return at_data[rows], at_noise[np.asarray(found.is_inside) & rows]


def _site(found: dict[str, tuple[Any, Site]], name: str | None) -> tuple[Any, Site]:
    """Return the estimator and the rows of the chosen site."""
    estimator, site = choose("log_ratios", found, name, "log_ratios needs a model with an energy, and this one has none.")
    if not isinstance(estimator, NoiseContrastiveEstimation):
        raise TypeError(f"At site '{site.name}': '{estimator.name}' does not classify data and noise. Train with 'nce'.")
    return estimator, site


def _ratios(name: str, values: ArrayLike) -> Float[np.ndarray, " events"]:
    ratios = numbers(OWNER, name, values).reshape(-1)
    if np.isnan(ratios).any():
        raise EnergyError(f"{OWNER} got {int(np.isnan(ratios).sum())} NaN in {name}. Look at the energy at these events.")
    return ratios


def _sigmoid(values: Float[np.ndarray, " events"]) -> Float[np.ndarray, " events"]:
    return 0.5 * (1 + np.tanh(0.5 * values))


def _draw_reliability(
    ax: "Axes",
    at_data: Float[np.ndarray, " data"],
    at_noise: Float[np.ndarray, " noise"],
    edges: Float[np.ndarray, " edges"],
) -> None:
    means, frequencies, counts = _bins(at_data, at_noise, edges)
    ax.plot([0, 1], [0, 1], color=DARK, ls="--", lw=1.0, label="calibrated")
    low, high = _wilson(frequencies, counts)
    errors = np.maximum([frequencies - low, high - frequencies], 0.0)
    ax.errorbar(means, frequencies, errors, fmt="o", color=MODEL, ms=5, capsize=3, label="bins, 95 % intervals")
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), ylabel="frequency of data")
    ax.legend(fontsize="small")


def _bins(
    at_data: Float[np.ndarray, " data"], at_noise: Float[np.ndarray, " noise"], edges: Float[np.ndarray, " edges"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"], Int[np.ndarray, " bins"]]:
    """Return mean prediction, frequency of data and number of events of the bins that are not empty."""
    predicted = np.concatenate([at_data, at_noise])
    is_data = np.arange(len(predicted)) < len(at_data)
    place = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(place, minlength=len(edges) - 1)
    filled = counts > 0
    sums = (np.bincount(place, weights, minlength=len(edges) - 1)[filled] for weights in (predicted, is_data))
    means, frequencies = (each / counts[filled] for each in sums)
    return means, frequencies, counts[filled]


def _wilson(
    frequencies: Float[np.ndarray, " bins"], counts: Int[np.ndarray, " bins"]
) -> tuple[Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Return the ends of the 95 % interval of a binomial probability."""
    square = QUANTILE**2 / counts
    middle = (frequencies + square / 2) / (1 + square)
    half = np.sqrt(frequencies * (1 - frequencies) * square + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def _draw_counts(
    ax: Any,
    at_data: Float[np.ndarray, " data"],
    at_noise: Float[np.ndarray, " noise"],
    edges: Float[np.ndarray, " edges"],
) -> None:
    ax.hist(at_data, edges, color=DATA, label="data")
    ax.hist(at_noise, edges, histtype="step", color=MODEL, lw=1.5, label="noise")
    # A logarithmic scale, because there are nu times as many noise draws as rows.
    ax.set(xlabel="predicted probability of data", ylabel="events", yscale="log", ylim=(0.5, None))
    ax.legend(fontsize="small")
