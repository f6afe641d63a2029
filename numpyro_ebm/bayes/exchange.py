"""`ExchangeKernel`: posteriors over the parameters of an energy, honest about log Z."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Int
from numpyro.infer import init_to_median

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.typing import Array, Chains, PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.bayes._auxiliary import Drawn, draw_all, draw_sets, step_sizes
from numpyro_ebm.bayes._halves import by_halves
from numpyro_ebm.bayes._posterior import Latents
from numpyro_ebm.bayes._settling import Surface
from numpyro_ebm.bayes.names import PROPOSALS
from numpyro_ebm.bayes.posterior_kernel import PosteriorKernel, Start
from numpyro_ebm.bayes.proposals import AbstractProposal
from numpyro_ebm.kernels import AbstractKernel, adaptation

FEWEST, FEWEST_PER_LATENT = 16, 4
"""Fewest chains that move along differences unless asked to: a half of fewer chains spans few directions."""


class ExchangeState(NamedTuple):
    """State of one chain of `ExchangeKernel`.

    Attributes:
        i: number of transitions so far.
        z: unconstrained latents by site.
        log_joint: log density of prior and data at ``z`` without log Z.
        gradient: noisy gradient of the log posterior at ``z``, flat; 0 for proposals that use none.
        memory: what the chain keeps of its auxiliary data; empty for `ExchangeKernel`, which draws new ones.
        warmup: the proposal as adapted so far.
        averaging: by energy site, dual averaging of the step size of the inner kernel; None for one without.
        accept_prob: acceptance probability of the last transition.
        mean_accept_prob: mean acceptance probability since the start, or since the end of the warm-up.
        inner_accept_prob: mean acceptance probability of the inner chains of the last transition, over the energy sites.
        inner_move: root mean square distance of the auxiliary data from the data where they started, in standard deviations
            of the data (in units of the values where these do not vary, as in a single row), the least of the energy sites.
        is_nonfinite: whether the last acceptance ratio was not a number.
        rng_key: random key; of a population, one for all chains.
    """

    i: Int[Array, "*chains"]
    z: Latents
    log_joint: Chains
    gradient: Array
    memory: PyTree
    warmup: adaptation.WarmupState
    averaging: dict[str, Any]
    accept_prob: Chains
    mean_accept_prob: Chains
    inner_accept_prob: Chains
    inner_move: Chains
    is_nonfinite: Bool[Array, "*chains"]
    rng_key: PRNGKey | PRNGKeys


class Compared(NamedTuple):
    """What auxiliary data say of a proposal.

    Attributes:
        log_ratio: their part of the log acceptance ratio.
        memory: what the chain keeps of them if the proposal is accepted.
        drawn: the data set of every energy site.
    """

    log_ratio: Scalar
    memory: PyTree
    drawn: dict[str, Drawn]


class ExchangeKernel(PosteriorKernel):
    r"""The exchange algorithm in ``numpyro.infer.MCMC``: draws from the posterior of a model that observes energies.

    The likelihood of an energy is ``f(x; theta) / Z(theta)``. For proposed parameters the kernel draws an auxiliary data set
    ``w`` from the energy at them, and accepts with the probability

    .. math:: \min\Big(1, \frac{\pi(\theta') f(x; \theta')}{\pi(\theta) f(x; \theta)} \cdot
        \frac{q(\theta \mid \theta')}{q(\theta' \mid \theta)} \cdot \frac{f(w; \theta)}{f(w; \theta')}\Big),
        \qquad w \sim f(\cdot; \theta') / Z(\theta')

    in which Z cancels. The posterior is exact if the auxiliary data are exact draws. Those of a chain are exact in the limit
    of many steps, and too few bias the posterior. ``inner_move`` of `ExchangeState` says how far they came from the data
    (about 1.4 for data that do not depend on their start). ``diagnose(mcmc)`` compares them with longer chains from
    elsewhere, and checks the posterior by the Bartlett identity.

    Chains start near a mode of the posterior, where stochastic Newton steps lead. The covariance there, the inverse of the
    information of the data and the curvature of the prior, is the metric of the proposals.

    All continuous latents of the model move, those of hyperpriors and of other likelihoods included; several energies, in
    plates or not, have auxiliary data of their own. Each row has an auxiliary draw of its own, given its context.

    Args:
        model: a NumPyro model that observes one or more energies.
        inner: the kernel of the auxiliary chains: a name from `available_kernels`, a kernel object, or a mapping by energy
            site; None for "mala", and "gibbs" on a discrete support. Its step size adapts during the warm-up.
        num_steps: transitions of an auxiliary chain, which starts at the data.
        exact_sampler: in place of chains, exact draws: "enumeration" of the states of a discrete event,
            "coupling_from_the_past" for an `Ising` energy, a function ``(rng_key, latents)`` of the constrained latents by
            name, which returns the rows ``(num_rows, *event_shape)``; or a mapping by energy site.
        num_bridges: parameters on the line between ``theta'`` and ``theta``, through which the auxiliary data are annealed
            with one transition of the inner kernel at each (of `Gibbs`, with a random scan). They lower the noise of the
            acceptance ratio, so that proposals can be longer. None for a fifth of ``num_steps``, and for 0 where exact
            samplers draw or the kernel has no detailed balance, as "block_gibbs" has none.
        num_newton_steps: Newton steps before the first transition, each of which draws two data sets; 0 to start at the
            initial values, with a unit metric.
        proposal: "random_walk", "crank_nicolson", "differences", "noisy_mala", or an object; None for "differences" if
            there are, in ``chain_method="vectorized"``, an even number of chains, 16 or more, and at least four times as
            many as parameters, and "crank_nicolson" elsewhere.
        params: values of the model's ``numpyro.param`` sites, which stay fixed.
        init_strategy: as in NumPyro's kernels.

    Warns:
        UnhealthyChainsWarning: for auxiliary chains that cannot change every element of an event.

    Raises:
        EnergyError: (a ValueError) for an unknown name, and a model under `estimate`; at the first run, for a model without
            an observed energy, or with a latent one, discrete latents, a scale or a subsampled plate at an energy,
            parameters without values, a kernel that does not fit or, for bridges, has no detailed balance, and
            "differences" without a population of chains.
        TypeError: for a model that is not callable.

    Example:
        >>> mcmc = MCMC(ExchangeKernel(model, "gibbs", num_steps=50), num_warmup=1000, num_samples=5000)  # doctest: +SKIP

    References:
        Murray, Ghahramani and MacKay, MCMC for doubly-intractable distributions (2006), also of bridges.
    """

    def __init__(
        self,
        model: Callable,
        inner: str | AbstractKernel | Mapping[str, Any] | None = None,
        *,
        num_steps: int = 50,
        exact_sampler: Any = None,
        num_bridges: int | None = None,
        num_newton_steps: int = 100,
        proposal: str | AbstractProposal | None = None,
        params: PyTree | None = None,
        init_strategy: Callable = init_to_median,
    ):
        super().__init__(
            model,
            inner,
            num_steps=num_steps,
            exact_sampler=exact_sampler,
            num_bridges=num_bridges,
            num_newton_steps=num_newton_steps,
            params=params,
            init_strategy=init_strategy,
        )
        self._proposal = None if proposal is None else PROPOSALS.resolve(proposal)
        self._used: AbstractProposal | None = self._proposal
        self._stages = np.zeros((0, 2), np.int32)

    @property
    def default_fields(self) -> tuple[str, ...]:
        """Names of the draw and of the statistics."""
        return ("z", "accept_prob", "inner_accept_prob", "inner_move", "is_nonfinite")

    @property
    def is_ensemble_kernel(self) -> bool:
        """Whether chains depend on each other, so that NumPyro has to run them together."""
        return self._used is not None and self._used.uses_population

    @in_own_modes
    def sample(self, state: ExchangeState, model_args: tuple, model_kwargs: dict) -> ExchangeState:
        """Return the state after one transition."""
        proposal = self._moves()
        self._take_note(model_args, model_kwargs or {})
        transition = partial(self._transition, model_args, model_kwargs or {})
        if not jnp.ndim(state.i):
            return transition(state, self._no_partners(state))
        if not proposal.uses_population:
            partners = jax.vmap(self._no_partners)(state)
            return jax.vmap(transition)(state, partners)
        return by_halves(transition, state)

    def get_diagnostics_str(self, state: ExchangeState) -> str:
        """Return the text for the progress bar."""
        return f"acceptance {jnp.mean(state.mean_accept_prob):.2f}, inner move {jnp.mean(state.inner_move):.2f}"

    def _prepare(self, position: Latents) -> None:
        self._used = used = self._proposal_for(position)
        self._stages = adaptation.schedule(used, self._num_warmup)

    def _proposal_for(self, position: Latents) -> AbstractProposal:
        """Return the proposal, by the number of chains where none was given."""
        leaves = jax.tree.leaves(position)
        num_chains = leaves[0].shape[0] if self._is_batch else 1
        size = sum(leaf.size for leaf in leaves) // num_chains
        if self._proposal is None:
            is_population = self._is_batch and num_chains % 2 == 0 and num_chains >= max(FEWEST_PER_LATENT * size, FEWEST)
            return PROPOSALS.resolve("differences" if is_population else "crank_nicolson")
        if self._proposal.uses_population and (not self._is_batch or num_chains % 2 or num_chains < 4):
            raise EnergyError(
                f"The proposal '{self._proposal.name}' moves along differences between chains of the other half, so it "
                f"needs an even number of chains, four or more, run together; got {num_chains}. Write "
                "MCMC(kernel, num_chains=16, chain_method='vectorized', ...), or proposal='crank_nicolson'."
            )
        return self._proposal

    def _first(self, args: tuple, kwargs: dict, rng_key: PRNGKey, position: Latents) -> ExchangeState:
        proposal = self._moves()
        flat, unravel = ravel_pytree(position)
        surface = self._surface(args, kwargs, unravel)
        rng_key, key_start, key_gradient, key_memory = jax.random.split(rng_key, 4)
        start = self._start(key_start, surface, self._auxiliaries, flat)
        if not proposal.uses_population:
            proposal = proposal.settled(start.mode, start.covariance)
        sizes, position, zero = step_sizes(start.averaging), unravel(start.z), jnp.zeros((), float)
        return ExchangeState(
            i=jnp.zeros((), jnp.int32),
            z=position,
            log_joint=surface.log_joint(start.z),
            gradient=self._gradient(key_gradient, surface, start.z, sizes),
            memory=self._first_memory(key_memory, surface, start, sizes),
            warmup=adaptation.start(proposal, position),
            averaging=start.averaging,
            accept_prob=zero,
            mean_accept_prob=zero,
            inner_accept_prob=zero,
            inner_move=zero,
            is_nonfinite=jnp.zeros((), bool),
            rng_key=rng_key,
        )

    def _transition(self, args: tuple, kwargs: dict, state: ExchangeState, partners: Array) -> ExchangeState:
        rng_key, key_propose, key_draw, key_gradient, key_accept = jax.random.split(state.rng_key, 5)
        proposal: Any = state.warmup.kernel
        flat, unravel = ravel_pytree(state.z)
        surface = self._surface(args, kwargs, unravel)
        sizes = self._sizes(state)
        new_flat = proposal.propose(key_propose, flat, state.gradient, partners)
        new, log_joint = unravel(new_flat), surface.log_joint(new_flat)
        compared = self._compare(key_draw, surface, state, new_flat, sizes)
        gradient = self._gradient(key_gradient, surface, new_flat, sizes)
        ratio = (
            log_joint - state.log_joint + proposal.log_ratio(flat, state.gradient, new_flat, gradient) + compared.log_ratio
        )
        is_bad = jnp.isnan(ratio)
        ratio = jnp.where(is_bad, -jnp.inf, ratio)
        accepted = jnp.log1p(-jax.random.uniform(key_accept)) < ratio
        z, log_joint, gradient, memory = jax.tree.map(
            lambda a, b: jnp.where(accepted, a, b),
            (new, log_joint, gradient, compared.memory),
            (state.z, state.log_joint, state.gradient, state.memory),
        )
        accept_prob = jnp.exp(jnp.minimum(ratio, 0.0))
        i = state.i + 1
        since = jnp.where(i > self._num_warmup, i - self._num_warmup, i)
        drawn = compared.drawn
        rates = [each.acceptance_rate for each in drawn.values()]
        return ExchangeState(
            i=i,
            z=z,
            log_joint=log_joint,
            gradient=gradient,
            memory=memory,
            warmup=self._adapted(state, z, accept_prob),
            averaging=self._averaged(state, drawn),
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / since,
            inner_accept_prob=jnp.mean(jnp.stack(rates)),
            inner_move=jnp.min(jnp.stack([each.move for each in drawn.values()])),
            is_nonfinite=is_bad,
            rng_key=rng_key,
        )

    def _compare(
        self, rng_key: PRNGKey, surface: Surface, state: ExchangeState, new: Array, sizes: dict[str, Scalar | None]
    ) -> Compared:
        """Return the log ratio of the auxiliary data's densities at the old and the new latents, over all sites."""
        log_ratio, drawn = self._weigh(rng_key, surface, new, ravel_pytree(state.z)[0], sizes)
        return Compared(log_ratio, state.memory, drawn)

    def _first_memory(self, rng_key: PRNGKey, surface: Surface, start: Start, sizes: dict[str, Scalar | None]) -> PyTree:
        """Return what a chain remembers of its auxiliary data; nothing, since each transition draws new ones."""
        return ()

    def _weigh(
        self, rng_key: PRNGKey, surface: Surface, at: Array, other: Array, sizes: dict[str, Scalar | None]
    ) -> tuple[Scalar, dict[str, Drawn]]:
        """Draw auxiliary data at some latents, and return the log ratio of their densities at others and there."""
        key_draw, key_bridge = jax.random.split(rng_key)
        drawn, total = draw_all(key_draw, self._auxiliaries, surface.energies(at), sizes), jnp.zeros((), float)
        for key, (name, each) in zip(jax.random.split(key_bridge, len(drawn)), self._auxiliaries.items(), strict=True):
            path = partial(surface.site_between, name, at, other)
            total += each.log_ratio(key, path, drawn[name].positions, sizes[name])
        return total, drawn

    def _gradient(self, rng_key: PRNGKey, surface: Surface, z: Array, sizes: dict[str, Scalar | None]) -> Array:
        """Return the noisy gradient of the log posterior, for a proposal that uses it; else 0."""
        num = self._moves().num_gradient_draws
        if not num:
            return jnp.zeros_like(z)
        here = surface.energies(z)
        drawn = draw_sets(rng_key, self._auxiliaries, here, sizes, num)
        return surface.gradient(z, {name: each.positions for name, each in drawn.items()})

    def _adapted(self, state: ExchangeState, z: Latents, accept_prob: Scalar) -> adaptation.WarmupState:
        if not self._num_warmup:
            return state.warmup
        return adaptation.update_at(self._stages, state.i, state.warmup, z, _Accepted(accept_prob))

    def _no_partners(self, state: ExchangeState) -> Array:
        flat = ravel_pytree(state.z)[0]
        return jnp.zeros((2, flat.size), flat.dtype)

    def _moves(self) -> AbstractProposal:
        self._ready()
        return self._used  # pyright: ignore[reportReturnType]  # init has chosen it


class _Accepted(NamedTuple):
    """What the adaptation needs of a transition."""

    acceptance_rate: Scalar
