"""Cooperative learning of an energy and a generator."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_ebm._errors import EnergyError
from numpyro_ebm._typing import Array, PRNGKey, PyTree
from numpyro_ebm.estimators._base import Site
from numpyro_ebm.estimators._chains import ChainEstimator, Start


@dataclasses.dataclass(frozen=True)
class CooperativeLearning(ChainEstimator):
    r"""Cooperative learning (Xie et al.): a generator starts the chains, and learns from where they end.

    ``proposal`` is a NumPyro model ``q`` of one event. At each update it draws latents ``z`` and an event ``x0`` for each
    row; a chain of ``num_steps`` transitions takes ``x0`` to ``x'``. The energy's gradient is ``-grad E(x) + grad E(x')``,
    and the generator's that of ``log q(x', z)``: it comes to propose what the chains found (MCMC teaching), so that short
    chains are enough. No gradient flows through the chains. One SVI trains both, the generator's parameters being
    ``numpyro.param`` sites of the proposal. The value means nothing as an objective.

    State, in the mutable site ``"<site>$cooperative"``: ``health``, ``num_updates`` and ``averaging`` (see `pcd`).

    Args:
        num_steps: transitions per chain and update.
        kernel: a name or a kernel, whose step size the training starts from.
        adapt_step_size: this, ``step_size_schedule``, ``temperature``, ``energy_l2`` and ``on_unhealthy`` are those of
            `ContrastiveDivergence`.
        proposal: NumPyro model of one event, ``proposal()``, or ``proposal(context)`` where rows have a context: it samples
            the site of the energy's name, in its support, and any latents before it.

    Raises:
        EnergyError: without a proposal, for one that does not sample the site or gives it another shape, and for what every
            estimator with chains refuses.
        TypeError: for a proposal that cannot be called.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ::

            def proposal():
                z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
                numpyro.sample("x", dist.Normal(flax_module("generator", net, input_shape=(2,))(z), 0.1).to_event(1))

            estimate(model, "cooperative", proposal=proposal)

    References:
        Xie, Lu, Gao and Wu, Cooperative learning of energy-based model and latent variable model via MCMC teaching (2018).
    """

    name = "cooperative"
    num_steps: int = 10
    proposal: Callable[..., Any] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.proposal is None:
            raise EnergyError(
                "CooperativeLearning needs a proposal. Write estimate(model, 'cooperative', proposal=generator)."
            )
        if not callable(self.proposal):
            raise TypeError(f"proposal needs a NumPyro model; got {type(self.proposal).__name__}.")

    def surrogate(self, rng_key, site: Site, state):
        """Energy gap of each row, and the generator's log density at its negative."""
        key_draws, key_chains = jax.random.split(rng_key)
        kernel = self.tuned(site, state)
        generator = _register(self.proposal, site, key_draws)
        draws = _draw(generator, site, key_draws)
        start = self._start(draws, site, kernel)
        negatives, state = self.update(key_chains, site, state, kernel, start)
        events = jax.lax.stop_gradient(jax.vmap(site.distribution.constrain)(negatives))
        taught = _score(generator, site, {**draws, site.name: events})
        return self.contrast(site, negatives, site.local, paired=True) + taught, state

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """At draws of the proposal."""
        return self._start(_draw(_register(self.proposal, site, rng_key), site, rng_key), site, kernel)

    def fresh(self, rng_key, site: Site, num_chains):
        """Draws of the proposal."""
        draws = _draw(_register(self.proposal, site, rng_key), site, rng_key)
        return jax.vmap(site.distribution.unconstrain)(draws[site.name]), site.local

    def _start(self, draws: dict[str, Array], site: Site, kernel) -> Start:
        return Start(jax.vmap(kernel.lift)(jax.vmap(site.distribution.unconstrain)(draws[site.name])), site.local)


def _register(proposal: Any, site: Site, rng_key: PRNGKey) -> Callable[..., Any]:
    """The proposal with its parameters' values, which the handlers around get to see.

    Raises:
        EnergyError: where it does not sample the energy's site, or gives it another shape.
    """
    first = jax.tree.map(lambda leaf: leaf[0], _context_of(site))
    only_params = handlers.block(hide_fn=lambda msg: msg["type"] != "param")
    with only_params, handlers.trace() as trace, handlers.seed(rng_seed=rng_key):
        proposal(*first)
    sampled = trace.get(site.name)
    if sampled is None or sampled["type"] != "sample" or sampled["is_observed"]:
        raise EnergyError(
            f"The proposal does not sample '{site.name}'. Write numpyro.sample('{site.name}', ...) in it, for one event."
        )
    if jnp.shape(sampled["value"]) != site.distribution.event_shape:
        raise EnergyError(
            f"The proposal samples '{site.name}' with shape {jnp.shape(sampled['value'])}; one event has shape "
            f"{site.distribution.event_shape}. The library vectorises it over rows."
        )
    params = {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"}
    return handlers.substitute(proposal, data=params)


def _draw(generator: Callable, site: Site, rng_key: PRNGKey) -> dict[str, Array]:
    """Latents and event of one draw per row, cut off from differentiation."""

    def draw_one(key, context):
        with handlers.block():
            trace = handlers.trace(handlers.seed(generator, key)).get_trace(*context)
        return {name: msg["value"] for name, msg in trace.items() if msg["type"] == "sample" and not msg["is_observed"]}

    draws = jax.vmap(draw_one)(jax.random.split(rng_key, site.num_rows), _context_of(site))
    return jax.lax.stop_gradient(draws)


def _score(generator: Callable, site: Site, draws: dict[str, Array]) -> Array:
    """The generator's log density of each row's latents and event."""

    def score_one(values, context):
        with handlers.block():
            return log_density(generator, context, {}, values)[0]

    return jax.vmap(score_one)(draws, _context_of(site))


def _context_of(site: Site) -> tuple[PyTree, ...]:
    """The proposal's arguments, led by the rows."""
    return () if site.local is None or site.local[0] is None else (site.local[0],)
