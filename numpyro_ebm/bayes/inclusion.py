"""`inclusion_probabilities`: which parameters a posterior under spike-and-slab priors takes to be away from zero."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from numpyro import handlers
from numpyro.diagnostics import effective_sample_size
from numpyro.distributions import BernoulliLogits, BernoulliProbs, Distribution, MixtureGeneral, MixtureSameFamily

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_outside_jit
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, PyTree
from numpyro_ebm._core.wrappers import is_improper, strip
from numpyro_ebm.bayes._posterior import is_scaled
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.handlers import estimated_in
from numpyro_ebm.sampling.target import check_model, fixed

OWNER = "inclusion_probabilities"
NUM_PRIOR_DRAWS = 20_000
"""Draws of the prior over which weights are averaged that depend on other latents."""
FEWEST_DRAWS = 4
"""Fewest draws of a chain, of which there is an effective sample size."""
ByName = dict[str, Float[np.ndarray, "..."]]
Labels = Mapping[str, Sequence[str]] | Sequence[str] | None


class Inclusion(NamedTuple):
    """The elements of a site at one draw.

    Attributes:
        included: probability that an element comes from the slab, given the draw.
        excluded: one minus that, without its rounding.
        weight: weight of the slab in the prior.
    """

    included: Float[Array, "*elements"]
    excluded: Float[Array, "*elements"]
    weight: Float[Array, "*elements"]


@dataclasses.dataclass(frozen=True, eq=False)
class InclusionProbabilities:
    """Result of `inclusion_probabilities`: ``str`` gives a table. All figures have the shape of the site's elements.

    Attributes:
        probabilities: by site, the posterior probability that an element comes from the slab.
        standard_errors: by site, the Monte Carlo standard errors of the probabilities.
        prior_probabilities: by site, the prior probability of the slab.
        bayes_factors: by site, posterior odds of the slab over its prior odds.
        labels: by site, a name for each element, in the order of the flat site.
    """

    probabilities: ByName
    standard_errors: ByName
    prior_probabilities: ByName
    bayes_factors: ByName
    labels: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """Return a table with a line for each element, the most probable first."""
        labels = [label for name in self.probabilities for label in self.labels[name]]
        figures = (self.probabilities, self.standard_errors, self.prior_probabilities, self.bayes_factors)
        columns = [np.concatenate([each[name].ravel() for name in self.probabilities]) for each in figures]
        width = max(len("element"), *map(len, labels))
        lines = [f"{'element':>{width}}  inclusion  +- error  prior  Bayes factor"]
        for i in np.argsort(-columns[0], kind="stable"):
            probability, error, prior, factor = (float(column[i]) for column in columns)
            lines.append(f"{labels[i]:>{width}} {probability:10.3f} {error:9.3f} {prior:6.3f} {factor:13.3g}")
        return "\n".join(lines)


@in_own_modes
def inclusion_probabilities(
    model: Callable,
    draws: Mapping[str, ArrayLike],
    *args: Any,
    names: Labels = None,
    params: PyTree | None = None,
    **kwargs: Any,
) -> InclusionProbabilities:
    r"""Return the posterior probability of each parameter with a spike-and-slab prior to come from the slab.

    The prior of an element is ``(1 - w) spike + w slab``: a spike is narrow around zero, a slab is wide. In NumPyro it is a
    mixture of two components in this order, which has no discrete latents, so that `ExchangeKernel`, and NUTS under
    `estimate`, draw from the posterior::

        half = dist.Categorical(probs=jnp.array([0.5, 0.5]))
        prior = dist.MixtureGeneral(half, [dist.Normal(0, 0.1), dist.Cauchy(0, 2.5)])
        couplings = numpyro.sample("couplings", prior.expand([15]).to_event(1))

    The probability of the slab is the mean, over the draws, of that given a draw (Rao and Blackwell), which has less Monte
    Carlo error than a drawn indicator:

    .. math:: P(\gamma = 1 \mid x) = E\Big[\frac{w\, p_1(\theta)}{(1 - w)\, p_0(\theta) + w\, p_1(\theta)} \,\Big|\, x\Big]

    The prior of each draw is that of the model with the draw substituted, so the weight and the widths may be latents
    themselves (``w ~ Beta(1, 1)``). The inclusion Bayes factor divides the posterior odds by the prior odds. A spike of
    positive width stands for values that are zero for practical purposes: a wider one includes fewer elements.

    The posterior has a mode for each set of included elements. Under `ExchangeKernel` write ``proposal="differences"`` with
    twice as many chains as latents, which leads from spikes to slabs, and look at R-hat.

    Zeros that are exact come from indicators that multiply the couplings, ``numpyro.sample("is_in", dist.Bernoulli(0.5))``
    in a plate of pairs, with NumPyro's ``DiscreteHMCGibbs`` or ``MixedHMC`` on ``estimate(model, "exact")``. Such a site is
    reported as well: its draws are the terms of the mean.

    Args:
        model: the model, or the model as `estimate` returned it.
        draws: draws of all continuous latents by site, ``(num_chains, num_draws, *shape)``, as
            ``mcmc.get_samples(group_by_chain=True)`` returns them.
        *args: arguments of the model.
        names: a name for each element, such as pairs of symptoms, or a mapping by site; None for ``site[index]``.
        params: values of the model's ``numpyro.param`` sites.
        **kwargs: keyword arguments of the model.

    Returns:
        `InclusionProbabilities`. Monte Carlo standard errors are those of dependent draws in several chains. A prior
        probability that depends on other latents is a mean over 20 000 draws from their prior, so that its error is below
        0.004.

    Raises:
        EnergyError: (a ValueError) for a model without such a prior, one whose first component is the wider one at zero, or
            that is under a scale; for latents without draws, draws without an axis of chains or fewer than 4 of them, and
            names that do not fit.
        TypeError: for draws that are not by name.

    Example:
        ``print(inclusion_probabilities(model, mcmc.get_samples(group_by_chain=True), x))``

    References:
        George and McCulloch, Variable selection via Gibbs sampling (1993); Marsman, Huth, Waldorp and Ntzoufras, Objective
        Bayesian edge screening and structure selection for Ising networks (2022).
    """
    args, kwargs = as_arrays(OWNER, (args, kwargs))
    check_outside_jit(OWNER, draws, args, kwargs)
    estimated = estimated_in(model)
    model = model if estimated is None else estimated.fn
    trace = check_model(model, params, args, kwargs).trace
    latents = {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    sites, values = _checked_sites(latents), _checked_draws(latents, draws)

    def at(rng_key: PRNGKey, values: Mapping[str, Array]) -> dict[str, Inclusion]:
        run = handlers.seed(handlers.substitute(fixed(model, params), data=dict(values)), rng_key)
        with handlers.block(), handlers.trace() as trace:
            run(*args, **kwargs)
        return {name: _inclusion(trace[name]["fn"], trace[name]["value"]) for name in sites}

    given = compiled(jax.vmap(jax.vmap(partial(at, jax.random.key(0)))), values)
    given = jax.tree.map(lambda leaf: np.asarray(leaf, float), given)
    weights: Any = {name: np.asarray(each.weight[0, 0]) for name, each in given.items()}
    if any(np.any(each.weight != weights[name]) for name, each in given.items()):
        weights = _prior_weights(at, {n: value[0, 0] for n, value in values.items() if not _can_draw(latents[n]["fn"])})
    return _result(given, weights, _labels(names, {name: np.shape(weights[name]) for name in sites}))


def _checked_sites(latents: Mapping[str, Any]) -> list[str]:
    """Return the names of the sites whose elements are in or out, after a check of their priors."""
    mixtures = {name: _mixture(site["fn"]) for name, site in latents.items()}
    sites = [name for name, site in latents.items() if mixtures[name] is not None or _is_indicator(site["fn"])]
    if not sites:
        raise EnergyError(
            f"{OWNER} needs a latent whose prior is a mixture of a spike and a slab, and the latents {sorted(latents)} have "
            "none. Write prior = dist.MixtureGeneral(dist.Categorical(probs=jnp.array([0.5, 0.5])), [dist.Normal(0, 0.1), "
            "dist.Cauchy(0, 2.5)]) and numpyro.sample('couplings', prior.expand([15]).to_event(1))."
        )
    for name in sites:
        if is_scaled(latents[name]):
            raise EnergyError(
                f"At site '{name}': the prior has the scale {latents[name]['scale']}, and a power of a mixture is none. "
                "Write the site without numpyro.handlers.scale."
            )
        if mixtures[name] is not None and _is_reversed(mixtures[name], jnp.zeros_like(latents[name]["value"])):
            raise EnergyError(
                f"At site '{name}': the first component of the prior is the spike and the second the slab, and here the "
                "second has the higher density at zero. Write dist.Categorical(probs=...) and the components in this order: "
                "[dist.Normal(0, 0.1), dist.Cauchy(0, 2.5)]."
            )
    return sites


def _checked_draws(latents: Mapping[str, Any], draws: Mapping[str, ArrayLike]) -> dict[str, Array]:
    """Return the draws of all latents, ``(chains, draws, *shape)``."""
    write = "mcmc.get_samples(group_by_chain=True)"
    if not isinstance(draws, Mapping):
        raise TypeError(f"{OWNER} needs draws by name; got {type(draws).__name__}. Write {write}.")
    missing = [name for name in latents if name not in draws]
    if missing:
        raise EnergyError(f"{OWNER} needs draws of all latents, and there are none of {missing}. Write {write}.")
    values = {name: jnp.asarray(draws[name]) for name in latents}
    shapes = {name: value.shape for name, value in values.items()}
    leading = {shape[:2] for shape in shapes.values()}
    is_grouped = all(shape[2:] == np.shape(latents[name]["value"]) for name, shape in shapes.items())
    if not is_grouped or len(leading) != 1 or leading.pop()[1] < FEWEST_DRAWS:
        raise EnergyError(
            f"{OWNER} needs draws of shape (num_chains, num_draws, *shape), with {FEWEST_DRAWS} draws or more; got "
            f"{shapes}. Write {write}."
        )
    return values


def _mixture(fn: Distribution) -> Any:
    """Return the mixture of two components inside ``expand`` and ``to_event``; None for other distributions."""
    inner = strip(fn)[0]
    is_mixture = isinstance(inner, MixtureGeneral | MixtureSameFamily) and inner.mixture_size == 2
    return inner if is_mixture else None


def _is_indicator(fn: Distribution) -> bool:
    return isinstance(strip(fn)[0], BernoulliProbs | BernoulliLogits)


def _is_reversed(mixture: Any, zero: Array) -> bool:
    """Return whether the second component has the higher density at zero; False where a density is not known there."""
    log_p = mixture.component_log_probs(zero) - jnp.log(mixture.mixing_distribution.probs)
    return bool(jnp.any(log_p[..., 1] > log_p[..., 0]))


def _can_draw(fn: Distribution) -> bool:
    """Return whether a latent can be drawn from its prior: an improper one, or an energy, cannot."""
    return not is_improper(fn) and unwrap(fn) is None


def _inclusion(fn: Distribution, value: Array) -> Inclusion:
    """Return the inclusion of the elements of a site at one draw."""
    mixture, indicator = _mixture(fn), jnp.asarray(value, float)
    if mixture is None:
        weight = strip(fn)[0].probs  # pyright: ignore[reportAttributeAccessIssue]
        return Inclusion(indicator, 1 - indicator, jnp.broadcast_to(weight, indicator.shape))
    log_p = mixture.component_log_probs(value)
    odds = log_p[..., 1] - log_p[..., 0]
    weight = jnp.broadcast_to(mixture.mixing_distribution.probs[..., 1], odds.shape)
    return Inclusion(jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds), weight)


def _prior_weights(at: Callable[..., dict[str, Inclusion]], values: Mapping[str, Array]) -> ByName:
    """Return the mean weight of the slab over the prior, with values for the latents that cannot be drawn from it."""
    keys = jax.random.split(jax.random.key(1), NUM_PRIOR_DRAWS)
    found = compiled(lambda keys, values: jax.vmap(lambda key: at(key, values))(keys), keys, dict(values))
    return {name: np.asarray(np.mean(each.weight, axis=0, dtype=float)) for name, each in found.items()}


def _result(given: Mapping[str, Any], weights: ByName, labels: dict[str, tuple[str, ...]]) -> InclusionProbabilities:
    """Return the means over draws, and their errors."""
    included, excluded = (
        {name: np.asarray(getattr(each, field).mean((0, 1))) for name, each in given.items()}
        for field in ("included", "excluded")
    )
    with np.errstate(divide="ignore"):  # an element that every draw includes has an infinite Bayes factor
        factors = {name: included[name] / excluded[name] * (1 - each) / each for name, each in weights.items()}
    factors = {name: np.asarray(each) for name, each in factors.items()}
    errors = {name: _standard_errors(each.included) for name, each in given.items()}
    return InclusionProbabilities(included, errors, weights, factors, labels)


def _standard_errors(values: Float[np.ndarray, "chains draws *elements"]) -> Float[np.ndarray, "*elements"]:
    """Return Monte Carlo standard errors of the means; 0 where no draw differs."""
    spread = values.std((0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        sizes = np.asarray(effective_sample_size(values))
    return np.where(spread > 0, spread / np.sqrt(np.where(spread > 0, sizes, 1.0)), 0.0)


def _labels(names: Labels, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return a name for each element."""
    by_site = names if isinstance(names, Mapping) else {} if names is None else dict.fromkeys(shapes, names)
    found = {}
    for site, shape in shapes.items():
        usual = (f"{site}[{','.join(map(str, index))}]" if index else site for index in np.ndindex(*shape))
        found[site] = tuple(by_site.get(site, usual))
        if len(found[site]) != np.prod(shape, dtype=int):
            raise EnergyError(
                f"At site '{site}': there are {np.prod(shape, dtype=int)} elements of shape {shape}, and {len(found[site])} "
                "names. Write one for each element, in the order of the flat array."
            )
    return found
