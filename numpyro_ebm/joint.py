"""Observed sites that `energy_factor` names, gathered while a model runs."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro.distributions as dist
from numpyro.distributions import MaskedDistribution
from numpyro.primitives import apply_stack

from numpyro_ebm._bases import without_rows
from numpyro_ebm._errors import EnergyError, is_concrete
from numpyro_ebm._typing import Array
from numpyro_ebm.distributions import EnergyDistribution
from numpyro_ebm.factors import EnergyFactor, scalar_energy


class FactoredSite(NamedTuple):
    """One observed site, the factors that name it, and the message of its own distribution."""

    name: str
    message: dict[str, Any]
    factors: list[EnergyFactor]

    @property
    def value(self) -> Any:
        """The observed value."""
        return self.message["value"]

    def unwrapped(self, result: Any) -> Any:
        """The site as an energy over its own distribution: sum of factors, covariates as context."""
        base, mask = self.message["fn"], None
        while isinstance(base, MaskedDistribution):
            mask = base._mask if mask is None else mask & base._mask
            base = base.base_dist
        for factor in self.factors:
            if factor.row_mask is not None:
                mask = factor.row_mask if mask is None else mask & factor.row_mask
        context = [_repeat(factor, self.name) for factor in self.factors]
        energies = [factor.energy for factor in self.factors]

        def energy(event, context):
            parts = zip(energies, context, strict=True)
            return sum(scalar_energy(part, {self.name: event, **covariates}) for part, covariates in parts)

        is_improper = isinstance(base, dist.ImproperUniform)
        distribution = EnergyDistribution(
            energy if any(context) else (lambda event: energy(event, [{}] * len(energies))),
            base.event_shape,
            context=context if any(context) else None,
            batch_shape=base.batch_shape,
            support=base.support,
            base=None if is_improper else without_rows(base),
        )
        mask = None if mask is None else jnp.broadcast_to(mask, base.batch_shape)
        return result(distribution, base.batch_shape, 0, mask)

    def emit(self, log_factor: Array, surrogate: Any) -> None:
        """Put the surrogate in the place of the site's own log probability, which already counts."""
        own = self.message["fn"].log_prob(self.value)
        name = f"{self.name}$surrogate"
        fn = surrogate(log_factor - own, (0,), dist.constraints.real)
        apply_stack(
            {
                "type": "sample",
                "name": name,
                "fn": fn,
                "args": (),
                "kwargs": {"rng_key": None, "sample_shape": ()},
                "value": jnp.zeros((*fn.batch_shape, 0)),
                "scale": self.message["scale"],
                "is_observed": True,
                "intermediates": [],
                "cond_indep_stack": list(self.message["cond_indep_stack"]),
                "infer": {"is_auxiliary": True},
            }
        )


class FactoredSites:
    """Sites and factors of one run of a model, in the order they came."""

    def __init__(self):
        self._messages: dict[str, dict[str, Any]] = {}
        self._factors: list[EnergyFactor] = []

    def add_site(self, message: dict[str, Any]) -> None:
        """Note a sample site that is no energy site by itself."""
        self._messages[message["name"]] = dict(message)

    def add_factor(self, factor: EnergyFactor) -> None:
        """Note a factor."""
        self._factors.append(factor)

    def check_not_named(self, name: str) -> None:
        """Refuse a factor on a site that is an energy already.

        Raises:
            EnergyError: naming both.
        """
        for factor in self._factors:
            if name in factor.values:
                raise EnergyError(
                    f"The factor '{factor.name}' names '{name}', which is an EnergyDistribution. Put the factor's energy "
                    f"into the EnergyDistribution, or give '{name}' its base as its distribution."
                )

    def sites(self) -> list[FactoredSite]:
        """The observed sites that factors name, once the model has run.

        Raises:
            EnergyError: for a factor that names no observed site, several of them, a latent one, a value that is not the
                site's own, or that stands in other plates than the site.
        """
        grouped: dict[str, list[EnergyFactor]] = {}
        for factor in self._factors:
            grouped.setdefault(self._site_of(factor), []).append(factor)
        return [FactoredSite(name, self._messages[name], factors) for name, factors in grouped.items()]

    def _site_of(self, factor: EnergyFactor) -> str:
        named = [name for name in factor.values if name in self._messages]
        observed = [name for name in named if self._messages[name]["is_observed"]]
        if len(named) != 1 or not observed:
            raise EnergyError(
                f"The factor '{factor.name}' names the sites {named}, of which {observed} are observed; under estimate a "
                "factor names one site, and that one is observed. Stack several variables in one EnergyDistribution."
            )
        name = observed[0]
        message = self._messages[name]
        if not _is_same(factor.values[name], message["value"]):
            raise EnergyError(
                f"The factor '{factor.name}' got another value for '{name}' than the site has. Write "
                f"energy_factor('{factor.name}', energy, {name}={name}), and transform it inside the energy."
            )
        if factor.batch_shape != tuple(message["fn"].batch_shape):
            raise EnergyError(
                f"The factor '{factor.name}' stands in plates of shape {factor.batch_shape}, its site '{name}' in "
                f"{message['fn'].batch_shape}. Write both in the same plates."
            )
        return name


def _repeat(factor: EnergyFactor, site: str) -> dict[str, Array]:
    """The factor's covariates, scalars repeated over its rows."""
    shape = factor.batch_shape
    return {
        name: jnp.broadcast_to(value, shape + value.shape[len(shape) :])
        for name, value in factor.values.items()
        if name != site
    }


def _is_same(ours: Any, theirs: Any) -> bool:
    if ours is theirs:
        return True
    if jnp.shape(ours) != jnp.shape(theirs) or not is_concrete(ours, theirs):
        return False
    return bool(jnp.array_equal(ours, theirs, equal_nan=True))
