"""Cooperative learning of an energy and a generator."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.generator import Generator, context_of
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator
from numpyro_ebm.estimators.parts.starts import Start
from numpyro_ebm.estimators.state import ChainState
from numpyro_ebm.kernels import MALA, chains
from numpyro_ebm.kernels.averaging import averaging_of, next_averaging
from numpyro_ebm.kernels.names import resolve_kernel


class CooperativeState(NamedTuple):
    """State of `CooperativeLearning`.

    Attributes:
        chains: state of the negative phase.
        latent_acceptance_rate: acceptance rate of the latents' chains in the last update.
        latent_averaging: BlackJAX's dual averaging state of their step size.
    """

    chains: ChainState
    latent_acceptance_rate: Float[Array, "*batch"]
    latent_averaging: Any

    def figures(self) -> dict[str, Any]:
        """Return numbers for reports."""
        return {**self.chains.figures(), "latent_acceptance_rate": self.latent_acceptance_rate}


@dataclasses.dataclass(frozen=True)
class CooperativeLearning(ChainEstimator):
    r"""Cooperative learning (Xie et al.): a generator starts the chains and learns from their ends.

    ``proposal`` is a NumPyro model ``q`` of one event. At each update it draws latents ``z`` and an event ``x0`` for each
    row; a chain of ``num_steps`` transitions takes ``x0`` to ``x'``, and one of ``num_latent_steps`` takes ``z`` to ``z'``
    under ``q(z | x')``. The energy's gradient is ``-grad E(x) + grad E(x')``, and the generator's is that of
    ``log q(x', z')``: the generator learns to propose what the chains found (MCMC teaching), so that short chains are
    enough. No gradient flows through the chains. One SVI trains both; the generator's parameters are ``numpyro.param`` sites
    of the proposal. The value is not an objective.

    State, in the mutable site ``"<site>$cooperative"``: `CooperativeState`.

    Args:
        num_steps: transitions per chain and update.
        kernel: a name or a kernel; training starts from its step size; None for "mala".
        adapt_step_size: as for `ContrastiveDivergence`, like ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy`` and ``scale``.
        proposal: NumPyro model of one event, ``proposal()``, or ``proposal(context)`` where rows have a context. It samples
            the site of the energy's name, in its support, and any latents before it, on the real line.
        num_latent_steps: transitions of the latents' chains per update.
        latent_kernel: the latents' kernel, which has to reject; its step size adapts.

    Raises:
        EnergyError: for no proposal, or one that does not sample the site, gives it another shape or has latents that are
            not real; and for what every estimator with chains refuses.
        TypeError: for a proposal that is not callable.

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
    num_latent_steps: int = 10
    latent_kernel: Any = MALA()
    paces_rows = True

    def __post_init__(self):
        super().__post_init__()
        if self.proposal is None:
            raise EnergyError(
                "CooperativeLearning needs a proposal. Write estimate(model, 'cooperative', proposal=generator)."
            )
        if not callable(self.proposal):
            raise TypeError(f"proposal needs a NumPyro model; got {type(self.proposal).__name__}.")
        check_count("CooperativeLearning", "num_latent_steps", self.num_latent_steps)
        object.__setattr__(self, "latent_kernel", resolve_kernel(self.latent_kernel))
        if self.latent_kernel.target_acceptance is None:
            raise EnergyError(
                f"The latents' chains need a kernel whose step size adapts; that of '{self.latent_kernel.name}' does not. "
                "Write latent_kernel='mala'."
            )

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return the state of the negative phase, with a step size for the latents' chains."""
        return CooperativeState(super().init(rng_key, site), jnp.zeros((), float), averaging_of(self.latent_kernel))

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the energy gap of each row plus the generator's log density at its negative."""
        key_draws, key_chains, key_latents = jax.random.split(rng_key, 3)
        kernel = self.tuned(site, state.chains)
        generator = Generator.of(self.proposal, site, key_draws)
        draws = generator.draw(key_draws, site)
        negatives, phase = self.update(key_chains, site, state.chains, kernel, self._start(draws, site, kernel))
        state = state._replace(chains=phase)
        events = jax.lax.stop_gradient(jax.vmap(site.distribution.constrain)(negatives))
        draws, state = self._infer(key_latents, site, state, generator, {**draws, site.name: events})
        values = self.contrast(site, negatives, site.local, paired=True)
        return values + jax.vmap(generator.log_density)(draws, context_of(site)), state

    def begin(self, rng_key, site: Site, state, kernel) -> Start:
        """Start chains at draws of the proposal."""
        return self._start(Generator.of(self.proposal, site, rng_key).draw(rng_key, site), site, kernel)

    def fresh(self, rng_key, site: Site, num_chains):
        """Return draws of the proposal."""
        draws = Generator.of(self.proposal, site, rng_key).draw(rng_key, site)
        return jax.vmap(site.distribution.unconstrain)(draws[site.name]), site.local

    def _infer(
        self, rng_key, site: Site, state, generator: "Generator", draws: dict[str, Shaped[Array, "{site.num_rows} ..."]]
    ):
        """Move the latents towards ``q(z | x')``, starting from those that the event was drawn with."""
        latents = {name: value for name, value in draws.items() if name != site.name}
        if not latents:
            return draws, state
        kernel = self.latent_kernel.adapted(step_size=jnp.exp(state.latent_averaging.log_step_size))
        frozen = generator.frozen()

        @jax.jit
        def run(rng_key, kernel, latents, events, context):
            def log_density(latents, row):
                event, context = row
                return frozen.log_density({**latents, site.name: event}, context)

            return chains.advance(rng_key, kernel, log_density, latents, (events, context), num_steps=self.num_latent_steps)

        advanced = jax.lax.stop_gradient(run(rng_key, kernel, latents, draws[site.name], context_of(site)))
        averaging = next_averaging(state.latent_averaging, kernel, advanced.health.acceptance_rate)
        latents = advanced.positions
        return {**draws, **latents}, CooperativeState(state.chains, advanced.health.acceptance_rate, averaging)

    def _start(self, draws: dict[str, Shaped[Array, "{site.num_rows} ..."]], site: Site, kernel) -> Start:
        return Start(kernel.lift_all(jax.vmap(site.distribution.unconstrain)(draws[site.name])), site.local)
