"""The posterior of a model with energies, up to the log Z of each: its value, and the energies at given latents."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import util
from numpyro.infer.util import initialize_model

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.numpyro_stack import unguarded
from numpyro_ebm._core.typing import PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.handlers.energy_sites import EnergySite, energy_sites
from numpyro_ebm.sampling.target import fixed

Latents = dict[str, jax.Array]


class Energies(NamedTuple):
    """The energies of a model at given latents.

    Attributes:
        latents: the latents, constrained.
        sites: the energy sites by name, laid out by rows.
    """

    latents: Latents
    sites: dict[str, Site]


class Posterior(NamedTuple):
    """Functions of a model with energies, given its arguments.

    Attributes:
        position: initial unconstrained latents by site; the batch shape of the keys is their leading shape.
        log_joint: ``log_joint(args, kwargs)`` returns the log density of prior and data at unconstrained latents, Jacobian
            included, with minus the energy in place of the log likelihood of each energy site.
        sites: ``sites(args, kwargs)`` returns the constrained latents and all energy sites at unconstrained latents.
        energies: ``energies(args, kwargs)`` returns the `Energies` at unconstrained latents, of the sites that lack log Z.
        postprocess: ``postprocess(args, kwargs)`` returns the map to constrained latents and deterministic sites.
        unconstrain: ``unconstrain(args, kwargs)`` returns the map from constrained latents by name, among others, to the
            unconstrained ones.
    """

    position: Latents
    log_joint: Callable[[tuple, dict], Callable[[Latents], Scalar]]
    sites: Callable[[tuple, dict], Callable[[Latents], tuple[Latents, dict[str, EnergySite]]]]
    energies: Callable[[tuple, dict], Callable[[Latents], Energies]]
    postprocess: Callable[[tuple, dict], Callable[[Latents], PyTree]]
    unconstrain: Callable[[tuple, dict], Callable[[Latents], Latents]]


def make_posterior(
    rng_key: PRNGKey | PRNGKeys, model: Callable, params: PyTree | None, init_strategy: Callable, args: tuple, kwargs: dict
) -> Posterior:
    """Initialise a model, whose energy sites have been checked by `check_energies`."""
    model = fixed(model, params)
    with unguarded():
        info = initialize_model(
            rng_key,
            model,
            init_strategy=init_strategy,
            dynamic_args=True,
            model_args=args,
            model_kwargs=kwargs,
            validate_grad=False,
        )

    def log_joint(args, kwargs):
        def of_latents(z):
            with unguarded():
                return -jnp.asarray(info.potential_fn(*args, **kwargs)(z), float)

        return of_latents

    def sites(args, kwargs):
        def of_latents(z):
            values = util.constrain_fn(handlers.seed(model, 0), args, kwargs, z)
            with handlers.block():
                return values, energy_sites(model, values, args, kwargs)[0]

        return of_latents

    def energies(args, kwargs):
        def of_latents(z):
            values, found = sites(args, kwargs)(z)
            return Energies(values, {name: site.lay_out() for name, site in found.items() if lacks_log_z(site)})

        return of_latents

    def postprocess(args, kwargs):
        return info.postprocess_fn(*args, **kwargs)

    def unconstrain(args, kwargs):
        def of_values(values):
            latents = {name: values[name] for name in info.param_info.z}
            return util.unconstrain_fn(handlers.seed(model, 0), args, kwargs, latents)

        return of_values

    return Posterior(info.param_info.z, log_joint, sites, energies, postprocess, unconstrain)


def lacks_log_z(site: EnergySite) -> bool:
    """Return whether a site's log density is known only up to log Z."""
    return not getattr(site.unwrapped.distribution, "normalized", False)


def check_energies(owner: str, model: Callable, params: PyTree | None, args: tuple, kwargs: dict) -> dict[str, Site]:
    """Return the observed energies of a model at initial latents, after a check that exchange applies to them.

    Raises:
        EnergyError: without an observed energy whose log Z is missing; for a latent one, one under a scale, discrete latents
            and something that has no energy.
    """
    with handlers.block(), unguarded():
        found, trace = energy_sites(handlers.seed(fixed(model, params), 0), {}, args, kwargs)
    found = {name: site for name, site in found.items() if lacks_log_z(site)}
    if not found:
        raise EnergyError(
            f"{owner} is for models that observe an energy, and this one observes none whose log Z is missing. Write "
            "NUTS(model)."
        )
    for name, site in found.items():
        _check_site(owner, name, site, trace)
    discrete = [
        name
        for name, site in trace.items()
        if site["type"] == "sample" and not site["is_observed"] and site["fn"].support.is_discrete
    ]
    if discrete:
        raise EnergyError(
            f"{owner} moves continuous latents, and {discrete} are discrete. Sum over them in the model, for example with "
            "numpyro.distributions.MixtureGeneral."
        )
    return {name: site.lay_out() for name, site in found.items()}


def _check_site(owner: str, name: str, site: EnergySite, trace: Mapping[str, Any]) -> None:
    if not site.is_observed:
        raise EnergyError(
            f"At site '{name}': {owner} draws the parameters of observed energies, and this energy is latent. Observe it "
            "with obs=..., or fix its parameters and sample it with BlackJAXKernel."
        )
    if not site.unwrapped.distribution.has_energy:
        raise EnergyError(f"At site '{name}': {owner} needs an energy; a score has no values to compare.")
    for member in filter(is_scaled, map(trace.__getitem__, site.members)):
        raise EnergyError(
            f"At site '{name}': the likelihood has the scale {member['scale']}, and a power of it is no likelihood that "
            f"data can be drawn from. Write the site without numpyro.handlers.scale and without subsample_size for {owner}."
        )


def is_scaled(site: Mapping[str, Any]) -> bool:
    """Return whether the log density of a traced site counts with a factor other than 1."""
    scale = site["scale"]
    return scale is not None and not (is_concrete(scale) and bool(np.all(np.asarray(scale) == 1)))
