"""A NumPyro model of one event, run once per row: the proposal of "cooperative", the noise of contrastive estimators."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Shaped
from numpyro import handlers
from numpyro.distributions import Distribution
from numpyro.infer.util import log_density

from numpyro_ebm._core.autodiff import reverse_gradient
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, Scalar
from numpyro_ebm.distributions.blocks import is_real
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.supports import check_same_support


@dataclasses.dataclass(frozen=True)
class Generator:
    """A NumPyro model of one event, and its parameters."""

    model: Callable[..., Any]
    params: dict[str, PyTree]

    @classmethod
    def of(
        cls,
        model: Any,
        site: Site,
        rng_key: PRNGKey,
        role: str = "proposal",
        *,
        latents: bool = True,
        is_differentiated: bool = False,
    ) -> "Generator":
        """Run the model once and return it with its parameters, which the surrounding handlers record.

        Args:
            model: ``model()``, or ``model(context)`` if rows have a context.
            site: the rows.
            rng_key: random key.
            role: name of the model in messages.
            latents: whether the model may have latents besides the event.
            is_differentiated: whether gradients flow through its draws. If not, chains move its latents.

        Raises:
            EnergyError: if the model does not sample the site, samples it with another shape or support, has latents that
                are not allowed, or has draws that cannot be differentiated where they have to be.
        """
        first = jax.tree.map(lambda leaf: leaf[0], context_of(site))
        only_params = handlers.block(hide_fn=lambda msg: msg["type"] != "param")
        with only_params, handlers.trace() as trace, handlers.seed(rng_seed=rng_key):
            model(*first)
        _check(trace, site, role)
        for name, msg in trace.items():
            if not _is_drawn(msg):
                continue
            if is_differentiated:
                _check_is_differentiable(name, msg["fn"], role)
            if name != site.name:
                _check_latent(name, msg["fn"], site, role, allowed=latents, is_moved=not is_differentiated)
        return cls(model, {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"})

    def frozen(self) -> "Generator":
        """Return the same model with its parameters cut off from differentiation."""
        return Generator(self.model, jax.lax.stop_gradient(self.params))

    def adversary(self) -> "Generator":
        """Return the same model with its gradient reversed: it ascends where the energy descends."""
        return Generator(self.model, reverse_gradient(self.params))

    def draw(self, rng_key: PRNGKey, site: Site) -> dict[str, Shaped[Array, "{site.num_rows} ..."]]:
        """Draw latents and event once per row, cut off from differentiation."""
        return jax.lax.stop_gradient(self.frozen().rdraw(rng_key, site))

    def rdraw(self, rng_key: PRNGKey, site: Site) -> dict[str, Shaped[Array, "{site.num_rows} ..."]]:
        """Draw latents and event once per row, differentiable in the parameters where they are reparameterised."""

        def draw_one(key, context):
            with handlers.block():
                trace = handlers.trace(handlers.seed(self._model, key)).get_trace(*context)
            return {name: msg["value"] for name, msg in trace.items() if _is_drawn(msg)}

        keys = jax.random.split(rng_key, site.num_rows)
        return jax.vmap(draw_one)(keys, context_of(site))

    def log_density(self, draws: dict[str, Array], context: tuple[PyTree, ...]) -> Scalar:
        """Return the log density of one row's latents and event."""
        with handlers.block():
            return jnp.asarray(log_density(self._model, context, {}, draws)[0])

    @property
    def _model(self) -> Callable[..., Any]:
        return handlers.substitute(self.model, data=self.params)


def context_of(site: Site) -> tuple[PyTree, ...]:
    """Return the model's arguments, with a leading dimension of rows: the context, if there is one."""
    return () if site.local is None or site.local[0] is None else (site.local[0],)


def _is_drawn(msg: Mapping[str, Any]) -> bool:
    return msg["type"] == "sample" and not msg["is_observed"]


def _check(trace: Mapping[str, Any], site: Site, role: str) -> None:
    """Check that the model draws events of this site, and raise otherwise."""
    sampled = trace.get(site.name)
    if sampled is None or not _is_drawn(sampled):
        raise EnergyError(
            f"The {role} does not sample '{site.name}'. Write numpyro.sample('{site.name}', ...) in it, for one event."
        )
    if jnp.shape(sampled["value"]) != site.distribution.event_shape:
        raise EnergyError(
            f"The {role} samples '{site.name}' with shape {jnp.shape(sampled['value'])}; one event has shape "
            f"{site.distribution.event_shape}. The library vectorises it over rows."
        )
    check_same_support(f"{role}'s", sampled["fn"], site.distribution.support)


def _check_latent(name: str, fn: Distribution, site: Site, role: str, *, allowed: bool, is_moved: bool) -> None:
    """Check that a latent is allowed, and on the real line if chains move it, and raise otherwise."""
    if not allowed:
        raise EnergyError(
            f"The {role} has a latent '{name}', but its density of '{site.name}' alone has to be known. Write a model "
            f"that samples '{site.name}' and nothing else."
        )
    if is_moved and not is_real(fn.support):
        raise EnergyError(
            f"The {role}'s latent '{name}' has support {fn.support}, but its chains move on the real line. Write a "
            f"normal latent and transform it inside the {role}."
        )


def _check_is_differentiable(name: str, fn: Distribution, role: str) -> None:
    """Check that a distribution's draws are differentiable in its parameters, and raise otherwise."""
    if not fn.has_rsample:
        raise EnergyError(
            f"The {role} draws '{name}' from a {type(fn).__name__}, whose draws are no differentiable function of its "
            "parameters (has_rsample is False), but it learns through its draws. Write a reparameterised distribution: "
            "normals, transformed normals (flows), or a mixture by way of a continuous latent."
        )
