"""R-hat of functions of the draws, and nested R-hat of many short chains."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm.diagnostics.arviz.read import read
from numpyro_ebm.diagnostics.arviz.statistics import effective_size, rank_rhat
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult


@dataclasses.dataclass(frozen=True)
class FunctionRhat:
    """Convergence of one function of the draws.

    Attributes:
        mean: mean over all draws.
        rhat: rank-normalised split R-hat; infinite where each chain is constant at a different value, NaN where unknown.
        ess_bulk: effective sample size for the mean; NaN where nothing moves.
        ess_tail: effective sample size for the 5 % and 95 % quantiles.
        note: remark on the values, or "".
    """

    mean: float
    rhat: float
    ess_bulk: float
    ess_tail: float
    note: str = ""

    def __str__(self) -> str:
        """Return one line of text."""
        figures = f"mean {self.mean:.4g}, R-hat {self.rhat:.4g}, ESS bulk {self.ess_bulk:.4g}, tail {self.ess_tail:.4g}"
        return f"{figures} ({self.note})" if self.note else figures


def split_rhat(
    draws: MCMC | Draws | FitResult | Mapping[str, Any], functions: Mapping[str, Callable[[Any], Any]]
) -> dict[str, FunctionRhat]:
    r"""Compute R-hat and effective sample size of functions of the draws, such as the energy or the indicator of a mode.

    R-hat is the rank-normalised split R-hat of ArviZ (the larger of bulk and tail). Chains in different places may agree in
    the means of their coordinates, and differ in the energy or in the indicator of a mode.

    Args:
        draws: an MCMC, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)``, ArviZ data, or the result
            of `fit` with recorded chains.
        functions: by name, functions of ONE draw that return a number or a truth value. The argument is an event where the
            draws have one variable, and a dict of events by variable otherwise.

    Returns:
        `FunctionRhat` by name. The note of a constant function says so, and its R-hat is NaN.

    Raises:
        EnergyError: (a ValueError) for functions that do not return a scalar, and for missing or misshapen draws.
        TypeError: for anything but a dict of functions.

    Example:
        ``split_rhat(draws, {"energy": energy, "left": lambda x: x[0] < 0})``

    References:
        Vehtari, Gelman, Simpson, Carpenter and Burkner, Rank-normalization, folding, and localization: an improved R-hat
        (2021).
    """
    values = _evaluate("split_rhat", read("split_rhat", draws).variables, functions)
    return {name: _convergence(value) for name, value in values.items()}


def nested_rhat(
    draws: MCMC | Draws | FitResult | Mapping[str, Any],
    num_superchains: int,
    functions: Mapping[str, Callable[[Any], Any]] | None = None,
) -> dict[str, Float[np.ndarray, "..."] | np.floating]:
    r"""Compute nested R-hat of many chains that are too short for R-hat, grouped in superchains that share their start.

    With K superchains of M chains of N draws, means :math:`\bar x^{(mk)}` of chains and :math:`\bar x^{(k)}` of superchains,

    .. math::
        \hat R_\nu = \sqrt{1 + B / W}, \quad B = \operatorname{var}_k \bar x^{(k)}, \quad
        W = \frac{1}{K} \sum_k \Bigl( \operatorname{var}_m \bar x^{(mk)} + \frac{1}{M} \sum_m s^2_{mk} \Bigr)

    where variances have the denominator n - 1, the first term of W is 0 for M = 1, and the second term, the variance within
    a chain, is 0 for N = 1. One draw per chain is enough where chains share starts. For stationary chains of independent
    draws B / W is about 1 / (M (N + 1)), or 1 / M for N = 1; superchains that still depend on their start make it large.

    Args:
        draws: as in `split_rhat`. Chains of one superchain are adjacent: the first M chains are the first superchain.
        num_superchains: K, at least 2, a divisor of the number of chains.
        functions: as in `split_rhat`, to use in the place of the variables.

    Returns:
        One R-hat per coordinate of each variable, or one per function, by name.

    Raises:
        EnergyError: (a ValueError) for K that does not divide the number of chains, and for M = N = 1, which has no variance
            within superchains.

    Example:
        ``nested_rhat(draws, num_superchains=16)["x"]``

    References:
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari and Gelman, Nested R-hat: assessing the convergence of Markov
        chain Monte Carlo when running many short chains (2022).
    """
    check_count("nested_rhat", "num_superchains", num_superchains, 2)
    variables = read("nested_rhat", draws).variables
    if functions is not None:
        variables = _evaluate("nested_rhat", variables, functions)
    num_chains, num_draws = next(iter(variables.values())).shape[:2]
    size, rest = divmod(num_chains, num_superchains)
    if rest or size == 0:
        raise EnergyError(
            f"nested_rhat needs superchains of equal size; got num_superchains={num_superchains} for {num_chains} chains."
        )
    if size == 1 and num_draws == 1:
        raise EnergyError(
            "nested_rhat has no variance within a superchain of one chain with one draw. Write a smaller num_superchains, "
            "with chains that share their starts."
        )
    return {name: _nested(np.asarray(value, float), num_superchains) for name, value in variables.items()}


def _nested(
    values: Float[np.ndarray, "chains draws *event"], num_superchains: int
) -> Float[np.ndarray, "*event"] | np.floating:
    values = values.reshape((num_superchains, -1, *values.shape[1:]))
    chain_means = values.mean(axis=2)
    within = np.zeros(chain_means[:, 0].shape)
    if values.shape[1] > 1:
        within = within + chain_means.var(axis=1, ddof=1)
    if values.shape[2] > 1:
        within = within + values.var(axis=2, ddof=1).mean(axis=1)
    between = chain_means.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(1 + between / within.mean(axis=0))


def _evaluate(
    owner: str,
    variables: Mapping[str, Shaped[np.ndarray, "chains draws ..."]],
    functions: Mapping[str, Callable[[Any], Any]],
) -> dict[str, Float[np.ndarray, "chains draws"]]:
    """Return the values ``(chains, draws)`` of each function."""
    if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
        raise TypeError(f"{owner} needs functions by name, e.g. {{'left': lambda x: x[0] < 0}}; got {functions!r}.")
    single = next(iter(variables)) if len(variables) == 1 else None
    given = {name: jnp.asarray(value) for name, value in variables.items()}
    values = {}
    for name, function in functions.items():
        value = compiled(jax.vmap(jax.vmap(function)), given if single is None else given[single])
        if not hasattr(value, "shape") or value.ndim != 2:
            shape = np.shape(value)[2:] if hasattr(value, "shape") else type(value).__name__
            raise EnergyError(
                f"{owner}: '{name}' returned {shape} for one draw, and must return a number. Write a function of one draw "
                f"({'a dict of ' + str(list(variables)) if single is None else repr(single)}) that returns a scalar."
            )
        values[name] = np.asarray(value, float)
    return values


def _convergence(values: Float[np.ndarray, "chains draws"]) -> FunctionRhat:
    mean, nan = float(values.mean()), float("nan")
    if not np.all(np.isfinite(values)):
        return FunctionRhat(mean, nan, nan, nan, f"{np.sum(~np.isfinite(values))} of {values.size} values are not finite")
    if np.all(values == values.flat[0]):
        return FunctionRhat(mean, nan, nan, nan, f"it is {values.flat[0]:.4g} in all draws of all chains")
    if np.all(values == values[:, :1]):
        return FunctionRhat(mean, float("inf"), nan, nan, "it is constant in each chain and differs between chains")
    note = "one chain: R-hat needs two or more" if len(values) == 1 else ""
    bulk, tail = (float(effective_size(values, method)) for method in ("bulk", "tail"))
    return FunctionRhat(mean, float(rank_rhat(values)), bulk, tail, note)
