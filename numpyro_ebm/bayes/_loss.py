"""The loss of an estimated model as a function of its latents, over its own rows or other ones."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float
from numpyro import handlers
from numpyro.infer import init_to_median

from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey, PyTree, Scalar
from numpyro_ebm.bayes._posterior import Energies, Latents, Posterior, check_energies, make_posterior
from numpyro_ebm.bayes._settling import Surface
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import AbstractEstimator
from numpyro_ebm.estimators.parts.normalizer import WRITE_PRIOR
from numpyro_ebm.handlers import estimate
from numpyro_ebm.sampling.target import check_model

Rows = Callable[[str, Site], Site]
"""Replaces the rows of a site, by its name."""


def same_rows(name: str, site: Site) -> Site:
    """Return a site as it is."""
    return site


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of an estimated model, a sum over rows without priors, as functions of the flat unconstrained latents.

    Attributes:
        posterior: the model without `estimate`.
        estimated: the model as `estimate` returned it.
        args: the model's arguments.
        kwargs: the model's keyword arguments.
        masks: which rows take part, in the order of `of_rows`.
        couples_rows: whether a row's loss depends on other rows.
        holds_noise: whether the loss compares rows with noise that stays the same, also where the rows are replaced.
        own: names of the latents that belong to estimators and not to the model.
    """

    posterior: Posterior
    estimated: estimate
    args: tuple
    kwargs: dict[str, Any]
    masks: tuple[Bool[Array, " _"], ...] = ()
    couples_rows: bool = False
    holds_noise: bool = False
    own: tuple[str, ...] = ()

    @property
    def start(self) -> Flat:
        """Initial latents."""
        return ravel_pytree(self.posterior.position)[0]

    def unflatten(self, z: Flat) -> Latents:
        """Return the unconstrained latents by site."""
        return ravel_pytree(self.posterior.position)[1](z)

    def estimators(self, z: Flat) -> dict[str, tuple[AbstractEstimator, Site]]:
        """Return the estimator and the rows of each energy site."""
        return self._at(z)[1]

    def _at(self, z: Flat) -> tuple[Latents, dict[str, tuple[AbstractEstimator, Site]]]:
        values, found = self.posterior.sites(self.args, self.kwargs)(self.unflatten(z))
        return values, self.estimated.lay_out(found)

    def energies(self, z: Flat) -> Energies:
        """Return the energies."""
        values, found = self.posterior.sites(self.args, self.kwargs)(self.unflatten(z))
        return Energies(values, {name: site.lay_out() for name, site in found.items()})

    def log_rest(self, z: Flat) -> Scalar:
        """Return the log density of priors and of other likelihoods, Jacobian included."""
        return self.surface().log_rest(z)

    def surface(self) -> Surface:
        """Return the posterior of the energies themselves, up to log Z."""
        log_joint = self.posterior.log_joint(self.args, self.kwargs)
        return Surface(lambda z: log_joint(self.unflatten(z)), self.energies)

    def of_rows(self, z: Flat, rows: Rows = same_rows) -> list[Float[Array, " _"]]:
        """Return the loss of each row; sites with equally many rows are in one plate, or independent."""
        groups: dict[int, Any] = {}
        latents, found = self._at(z)
        for name, (estimator, site) in found.items():
            site = rows(name, site)
            with handlers.substitute(data=latents):  # those of the estimator's own
                values = -estimator.surrogate(None, site, None)[0]  # pyright: ignore[reportArgumentType]
            values = values if site.mask is None else jnp.where(site.mask, values, 0.0)
            groups[site.num_rows] = groups.get(site.num_rows, 0.0) + values
        return list(groups.values())

    def total(self, z: Flat, rows: Rows = same_rows) -> Scalar:
        """Return the loss of all rows."""
        return sum((jnp.sum(values) for values in self.of_rows(z, rows)), jnp.zeros(()))

    def log_density(self, z: Flat, weight: Any = 1.0) -> Scalar:
        """Return the log density of the generalised posterior."""
        return self.log_rest(z) - weight * self.total(z)

    def precision(self, z: Flat) -> tuple[Matrix, Matrix]:
        """Return the Hessian of the loss, and minus the Hessian of the log density of all else."""
        return jax.hessian(self.total)(z), -jax.hessian(self.log_rest)(z)

    def constrain(self, z: Float[Array, "draws d"]) -> dict[str, Array]:
        """Return constrained latents and deterministic sites at many unconstrained ones."""
        postprocess = self.posterior.postprocess(self.args, self.kwargs)
        return jax.vmap(lambda each: postprocess(self.unflatten(each)))(z)

    def unconstrain(self, latents: Mapping[str, Any]) -> Float[Array, "draws d"]:
        """Return flat unconstrained latents, given many constrained ones."""
        of_draw = self.posterior.unconstrain(self.args, self.kwargs)
        return jax.vmap(lambda draw: ravel_pytree(of_draw(draw))[0])(dict(latents))


def make_loss(
    owner: str, rng_key: PRNGKey, estimated: estimate, params: PyTree | None, args: tuple, kwargs: dict[str, Any]
) -> Loss:
    """Initialise a model, and check that its estimators are fixed objectives.

    Raises:
        EnergyError: for estimators whose value is no objective or draws noise, a weight, rows that lack elements, parameters
            without values, and what `check_energies` refuses.
    """
    check_model(estimated.fn, params, args, kwargs)
    check_energies(owner, estimated.fn, params, args, kwargs)

    def of(model):
        return Loss(make_posterior(rng_key, model, params, init_to_median, args, kwargs), estimated, args, kwargs)

    loss = of(estimated.fn)
    found, masks = loss.estimators(loss.start), {}
    for name, (estimator, site) in found.items():
        with at_site(name):
            _check(owner, estimator, site)
        own = jnp.ones(site.num_rows, bool) if site.mask is None else site.mask
        masks[site.num_rows] = masks.get(site.num_rows, False) | own
    priors = {name: prior for estimator, site in found.values() for name, prior in estimator.latents(site).items()}
    return dataclasses.replace(
        of(_with_latents(estimated.fn, priors)) if priors else loss,
        masks=tuple(masks.values()),
        couples_rows=any(estimator.couples_rows for estimator, _ in found.values()),
        holds_noise=any(estimator.holds_noise for estimator, _ in found.values()),
        own=tuple(priors),
    )


def _with_latents(model: Callable, priors: Mapping[str, Any]) -> Callable:
    """Return a model with the latents of estimators besides its own."""

    def extended(*args, **kwargs):
        for name, prior in priors.items():
            numpyro.sample(name, prior)
        return model(*args, **kwargs)

    return extended


def _check(owner: str, estimator: AbstractEstimator, site: Site) -> None:
    if estimator.role != "objective" or estimator.draws_noise(site.distribution):
        why = "only its gradient is meaningful" if estimator.role == "gradient" else "its value draws noise"
        raise EnergyError(
            f"{owner} needs a fixed objective, as NUTS does, and '{estimator.name}' is none: {why}. Write an estimator such "
            "as 'pseudolikelihood', 'sm' or 'ksd', or 'nce' with noise_seed=0."
        )
    if site.missing is not None:
        raise EnergyError(
            f"{owner} needs whole rows, and some lack elements. Leave them out: numpyro.handlers.mask(mask=...)."
        )
    estimator.check_mixed(site)
    estimator.check(site)
    with handlers.trace() as trace, handlers.seed(rng_seed=0):
        jax.eval_shape(lambda: estimator.surrogate(None, site, None)[0])  # pyright: ignore[reportArgumentType]
    own = [name for name, message in trace.items() if message["type"] == "param"]
    if own:
        raise EnergyError(
            f"The estimator '{estimator.name}' trains the parameters {own} beside the latents, which have no posterior. "
            f"{WRITE_PRIOR}."
        )
