"""The evidence of a model: log Z of the density of its latents and its data."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from numpyro import handlers
from numpyro.infer import util

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, PyTree
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.factor import EnergyFactor
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.surrogates import FrozenEnergy, Surrogate
from numpyro_ebm.partition import AbstractPartition, LogPartition, log_partition
from numpyro_ebm.partition.family import samples_of
from numpyro_ebm.partition.names import METHODS
from numpyro_ebm.sampling.target import Latents, check_model, fixed

OWNER = "log_evidence"


def log_evidence(
    rng_key: PRNGKey | None,
    model: Callable,
    *,
    method: str | AbstractPartition = "smc",
    posterior_samples: Mapping[str, ArrayLike] | None = None,
    params: PyTree | None = None,
    model_args: tuple = (),
    model_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> LogPartition:
    r"""Estimate the log evidence of a model with continuous latents, its log marginal likelihood, with its standard error.

    .. math:: \log p(x) = \log \int p(x \mid \theta)\, p(\theta)\, d\theta

    That is log Z of the unnormalised density ``p(x | theta) p(theta)`` in unconstrained space, so that every method of
    `log_partition` applies, and its warnings: "smc" tempers from a start that a few chains fit, "bridge" takes draws of the
    posterior, "grid" is exact for one to three latents, and "nested" copes with several modes. The energies of the model
    must hold their log Z, exactly or by `log_partition_grid`; an error of that log Z, times the number of rows, adds to the
    error.

    Args:
        rng_key: random key; None is enough for "grid".
        model: a NumPyro model with proper priors, which observes its data.
        method: a method of `log_partition`, by name or as an object.
        posterior_samples: draws of the latents by name, as ``mcmc.get_samples()`` returns them, to which "bridge" compares
            its proposal, or to which another method fits its start. For "bridge" add ``num_chains=`` if they come from
            chains, laid end to end.
        params: values of the model's parameters.
        model_args: the model's arguments.
        model_kwargs: the model's keyword arguments.
        **options: the method's options, if it is a name.

    Returns:
        `LogPartition` of shape ``()``, in nats. Differences of two models are log Bayes factors.

    Raises:
        EnergyError: (a ValueError) for an energy whose log Z is missing, a model under `estimate`, an improper prior,
            discrete latents, parameters without values and subsampled data; as `log_partition`.
        TypeError: for unknown options.

    Warns:
        UnreliableLogPartitionWarning: as `log_partition`.

    Example:
        ``log_evidence(key, model, method="bridge", posterior_samples=mcmc.get_samples(), num_chains=4, model_args=(x,))``

    References:
        Gronau et al., A tutorial on bridge sampling (2017); Del Moral, Doucet and Jasra, Sequential Monte Carlo samplers
        (2006).
    """
    args, kwargs = as_arrays(OWNER, (tuple(model_args), dict(model_kwargs or {})))
    _check(check_model(model, params, args, kwargs))
    given = handlers.seed(fixed(model, params), 0)
    with handlers.block(), handlers.trace() as trace:
        given(*args, **kwargs)
    names = [n for n, site in trace.items() if site["type"] == "sample" and not site["is_observed"]]

    def flat_of(latents: Mapping[str, Array]) -> Float[Array, " d"]:
        return ravel_pytree(util.unconstrain_fn(given, args, kwargs, latents))[0]

    first = {name: trace[name]["value"] for name in names}
    flat, unravel = ravel_pytree(util.unconstrain_fn(given, args, kwargs, first))

    def potential(z: Float[Array, " d"]) -> Float[Array, ""]:
        return jnp.asarray(util.potential_energy(given, args, kwargs, unravel(z)), float)

    draws = None
    if posterior_samples is not None:
        samples = samples_of(OWNER, posterior_samples)
        missing = [name for name in names if name not in samples]
        if missing:
            raise EnergyError(f"{OWNER} needs draws of all latents, and {missing} have none among {sorted(samples)}.")
        draws = jax.vmap(flat_of)({name: samples[name] for name in names})
    return log_partition(rng_key, EnergyDistribution(potential, flat.shape), method=_method(method, options, draws))


def _method(
    method: str | AbstractPartition, options: dict[str, Any], draws: Float[Array, "draws d"] | None
) -> AbstractPartition:
    """Return the method, with draws of the target in the field that takes them."""
    if draws is None:
        return METHODS.resolve(method, **options)
    cls: Any = METHODS.classes.get(method) if isinstance(method, str) else type(method)
    own = {} if cls is None else {field.name for field in dataclasses.fields(cls)}
    field = next((name for name in ("draws", "data") if name in own), None)
    if field is None and cls is not None:
        raise EnergyError(f"The method '{cls.name}' takes no draws. Leave out posterior_samples=, or write method='bridge'.")
    if isinstance(method, str):
        return METHODS.resolve(method, **options, **({} if field is None else {field: draws}))
    return dataclasses.replace(METHODS.resolve(method, **options), **{field: draws})  # pyright: ignore


def _check(latents: Latents) -> None:
    """Refuse models whose density of latents and data is not normalised over the data, or whose latents are discrete."""
    discrete = sorted(latents.discrete.supports)
    if discrete:
        raise EnergyError(
            f"{OWNER} integrates over continuous latents, and {discrete} are discrete. Sum over them in the model, for "
            "example with numpyro.distributions.MixtureGeneral."
        )
    for name, site in latents.trace.items():
        if site["type"] == "sample":
            _check_site(name, site["fn"])


def _check_site(name: str, fn: Any) -> None:
    unwrapped = None if isinstance(fn, EnergyFactor | Surrogate | FrozenEnergy) else unwrap(fn)
    is_missing = unwrapped is not None and not getattr(unwrapped.distribution, "normalized", False)
    if is_missing or isinstance(fn, EnergyFactor):
        raise EnergyError(
            f"At site '{name}': the evidence contains log Z, and this energy is known only up to it. Write log Z into the "
            "energy and EnergyDistribution(..., normalized=True), or take numpyro_ebm.bayes.log_partition_grid(...)"
            ".distribution(...)."
        )
    if isinstance(fn, Surrogate | FrozenEnergy):
        raise EnergyError(
            f"At site '{name}': the model comes from estimate, whose objectives are no likelihoods, so that it has no "
            "evidence. Give the model itself, with energies that hold their log Z."
        )
    if unwrapped is None and is_improper(fn):
        raise EnergyError(f"At site '{name}': an improper prior has no evidence. Write a proper distribution.")
