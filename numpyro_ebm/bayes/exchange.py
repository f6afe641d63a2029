"""`ExchangeKernel`: posteriors over the parameters of an energy, honest about log Z."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Int
from numpyro.infer import init_to_median
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, Chains, PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.bayes._auxiliary import Auxiliary, Drawn, auxiliaries, draw_all, draw_sets, next_averagings, step_sizes
from numpyro_ebm.bayes._halves import by_halves
from numpyro_ebm.bayes._posterior import Latents, Posterior, check_energies, make_posterior
from numpyro_ebm.bayes._settling import Surface, settle
from numpyro_ebm.bayes.checks import PosteriorTerms, coordinate_names, terms_of_draws
from numpyro_ebm.bayes.names import PROPOSALS
from numpyro_ebm.bayes.proposals import AbstractProposal
from numpyro_ebm.kernels import AbstractKernel, adaptation
from numpyro_ebm.sampling.target import check_model, keys_of


class ExchangeState(NamedTuple):
    """State of one chain of `ExchangeKernel`.

    Attributes:
        i: number of transitions so far.
        z: unconstrained latents by site.
        log_joint: log density of prior and data at ``z`` without log Z.
        gradient: noisy gradient of the log posterior at ``z``, flat; 0 for proposals that use none.
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
    warmup: adaptation.WarmupState
    averaging: dict[str, Any]
    accept_prob: Chains
    mean_accept_prob: Chains
    inner_accept_prob: Chains
    inner_move: Chains
    is_nonfinite: Bool[Array, "*chains"]
    rng_key: PRNGKey | PRNGKeys


class ExchangeKernel(MCMCKernel):
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
            there are, in ``chain_method="vectorized"``, an even number of chains and at least twice as many as parameters;
            "crank_nicolson" elsewhere, and "random_walk" without Newton steps.
        params: values of the model's ``numpyro.param`` sites, which stay fixed.
        init_strategy: as in NumPyro's kernels.

    Warns:
        UnhealthyChainsWarning: for auxiliary chains that cannot change every element of an event.

    Raises:
        EnergyError: (a ValueError) for an unknown name; at the first run, for a model without an observed energy, or with a
            latent one, discrete latents, a scale or a subsampled plate at an energy, parameters without values, a kernel
            that does not fit or, for bridges, has no detailed balance, and "differences" without a population of chains.
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
        if not callable(model):
            raise TypeError(f"ExchangeKernel needs a NumPyro model; got {type(model).__name__}.")
        check_count("ExchangeKernel", "num_steps", num_steps)
        if num_bridges is not None:
            check_count("ExchangeKernel", "num_bridges", num_bridges, 0)
        check_count("ExchangeKernel", "num_newton_steps", num_newton_steps, 0)
        if inner is not None and exact_sampler is not None and not isinstance(exact_sampler, Mapping) and not num_bridges:
            raise EnergyError("ExchangeKernel got inner and exact_sampler, of which only one draws. Leave one out.")
        # Read-only: the functions that NumPyro has compiled would not see a change.
        self._model, self._params, self._init_strategy = model, params, init_strategy
        self._inner, self._num_steps, self._exact_sampler = inner, int(num_steps), exact_sampler
        self._num_bridges, self._num_newton_steps = num_bridges, int(num_newton_steps)
        self._proposal = None if proposal is None else PROPOSALS.resolve(proposal)
        # NumPyro reads these attributes before the first run.
        self._is_batch = False
        self._posterior: Posterior | None = None
        self._auxiliaries: dict[str, Auxiliary] = {}
        self._used: AbstractProposal | None = self._proposal
        self._given: tuple[tuple, dict] | None = None
        self._num_warmup = 0
        self._stages = jnp.zeros((0, 2), jnp.int32)

    @property
    def model(self) -> Callable:
        """The model as given."""
        return self._model

    @property
    def num_steps(self) -> int:
        """Number of transitions of an auxiliary chain."""
        return self._num_steps

    @property
    def sample_field(self) -> str:
        """Name of the state field that holds the draw."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """Names of the draw and of the statistics."""
        return ("z", "accept_prob", "inner_accept_prob", "inner_move", "is_nonfinite")

    @property
    def is_ensemble_kernel(self) -> bool:
        """Whether chains depend on each other, so that NumPyro has to run them together."""
        return self._used is not None and self._used.uses_population

    @in_own_modes
    def init(
        self,
        rng_key: PRNGKey | PRNGKeys,
        num_warmup: int,
        init_params: PyTree | None,
        model_args: tuple,
        model_kwargs: dict,
    ) -> ExchangeState:
        """Return the state of one chain, or of a batch of chains for a batch of keys."""
        kwargs = model_kwargs or {}
        keys, self._is_batch = keys_of(rng_key)
        check_model(self._model, self._params, model_args, kwargs)
        is_traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((model_args, kwargs)))
        self._given = None if is_traced else (model_args, kwargs)
        sites = check_energies("ExchangeKernel", self._model, self._params, model_args, kwargs)
        self._auxiliaries = auxiliaries(
            "ExchangeKernel", sites, self._inner, self._num_steps, self._num_bridges, self._exact_sampler
        )
        self._posterior = make_posterior(keys[0], self._model, self._params, self._init_strategy, model_args, kwargs)
        position = self._posterior.position if init_params is None else init_params
        self._num_warmup, self._used = num_warmup, self._proposal_for(position)
        self._stages = adaptation.schedule(self._used, num_warmup)  # pyright: ignore[reportArgumentType]
        start = partial(self._start, model_args, kwargs)
        state = jax.jit(jax.vmap(start) if self._is_batch else start)(keys[1], position)
        return state._replace(rng_key=state.rng_key[0]) if self._used.uses_population else state

    @in_own_modes
    def sample(self, state: ExchangeState, model_args: tuple, model_kwargs: dict) -> ExchangeState:
        """Return the state after one transition."""
        _, proposal = self._ready()
        transition = partial(self._transition, model_args, model_kwargs or {})
        if not self._is_batch:
            return transition(state, self._no_partners(state))
        if not proposal.uses_population:
            partners = jax.vmap(self._no_partners)(state)
            return jax.vmap(transition)(state, partners)
        return by_halves(transition, state)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict) -> Callable:
        """Return the map from unconstrained latents to constrained latents and deterministic sites."""
        if self._posterior is None:
            return lambda z: z
        return self._posterior.postprocess(model_args, model_kwargs or {})

    def get_diagnostics_str(self, state: ExchangeState) -> str:
        """Return the text for the progress bar."""
        return f"acceptance {jnp.mean(state.mean_accept_prob):.2f}, inner move {jnp.mean(state.inner_move):.2f}"

    @in_own_modes
    def terms_of_draws(self, state: ExchangeState, draws: Mapping[str, Array]) -> tuple[list[str], PosteriorTerms]:
        """Return terms whose means over the posterior are zero if it is right, as `diagnose` uses them.

        Args:
            state: the last state of the chains.
            draws: constrained draws by site, ``(num_chains, num_draws, ...)``.

        Returns:
            The name of each unconstrained coordinate, and the terms at each draw.

        Raises:
            EnergyError: for a kernel that has not run in this process, whose data are not known.
        """
        if self._given is None:
            raise EnergyError("the arguments of the model are not known: the run was compiled as a whole, or unpickled")
        posterior, (args, kwargs) = self._ready()[0], self._given
        z = jax.vmap(jax.vmap(posterior.unconstrain(args, kwargs)))(dict(draws))
        flat = jax.vmap(jax.vmap(lambda each: ravel_pytree(each)[0]))(z)
        one = jax.tree.map(lambda leaf: leaf[0, 0], z)
        sizes = jax.tree.map(jnp.atleast_1d, step_sizes(state.averaging, is_adapting=False))
        keys, is_batch = keys_of(state.rng_key)
        key = keys[0][0] if is_batch else keys[0]
        surface = self._surface(args, kwargs, ravel_pytree(one)[1])
        terms = jax.jit(lambda key, sizes, z: terms_of_draws(key, surface, self._auxiliaries, sizes, z))(key, sizes, flat)
        return coordinate_names(one), terms

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings only; a run rebuilds the rest."""
        return {**self.__dict__, "_posterior": None, "_auxiliaries": {}, "_given": None}

    def _proposal_for(self, position: Latents) -> AbstractProposal:
        """Return the proposal, by the number of chains where none was given."""
        leaves = jax.tree.leaves(position)
        num_chains = leaves[0].shape[0] if self._is_batch else 1
        size = sum(leaf.size for leaf in leaves) // num_chains
        if self._proposal is None:
            is_population = self._is_batch and num_chains % 2 == 0 and num_chains >= max(2 * size, 4)
            alone = "crank_nicolson" if self._num_newton_steps else "random_walk"
            return PROPOSALS.resolve("differences" if is_population else alone)
        if self._proposal.uses_population and (not self._is_batch or num_chains % 2 or num_chains < 4):
            raise EnergyError(
                f"The proposal '{self._proposal.name}' moves along differences between chains of the other half, so it "
                f"needs an even number of chains, four or more, run together; got {num_chains}. Write "
                "MCMC(kernel, num_chains=16, chain_method='vectorized', ...), or proposal='random_walk'."
            )
        return self._proposal

    def _start(self, args: tuple, kwargs: dict, rng_key: PRNGKey, position: Latents) -> ExchangeState:
        _, proposal = self._ready()
        flat, unravel = ravel_pytree(position)
        surface = self._surface(args, kwargs, unravel)
        rng_key, key, key_settle, key_spread = jax.random.split(rng_key, 4)
        averaging = {name: each.averaging() for name, each in self._auxiliaries.items()}
        zero = jnp.zeros((), float)
        matrix = jnp.eye(flat.size)
        if self._num_newton_steps:
            steps = self._num_newton_steps
            flat, averaging, matrix = settle(key_settle, surface, self._auxiliaries, averaging, flat, steps)
        if not proposal.uses_population:
            proposal = proposal.settled(flat, matrix)
        if self._num_newton_steps:
            flat += jnp.linalg.cholesky(matrix) @ jax.random.normal(key_spread, flat.shape)
        position = unravel(flat)
        return ExchangeState(
            i=jnp.zeros((), jnp.int32),
            z=position,
            log_joint=surface.log_joint(flat),
            gradient=self._gradient(key, surface, flat, step_sizes(averaging)),
            warmup=adaptation.start(proposal, position),
            averaging=averaging,
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
        sizes = step_sizes(state.averaging, is_adapting=state.i < self._num_warmup)
        new_flat = proposal.propose(key_propose, flat, state.gradient, partners)
        new, log_joint = unravel(new_flat), surface.log_joint(new_flat)
        exchanged, drawn = self._exchange(key_draw, surface, flat, new_flat, sizes)
        gradient = self._gradient(key_gradient, surface, new_flat, sizes)
        ratio = log_joint - state.log_joint + proposal.log_ratio(flat, state.gradient, new_flat, gradient) + exchanged
        is_bad = jnp.isnan(ratio)
        ratio = jnp.where(is_bad, -jnp.inf, ratio)
        accepted = jnp.log1p(-jax.random.uniform(key_accept)) < ratio
        z, log_joint, gradient = jax.tree.map(
            lambda a, b: jnp.where(accepted, a, b), (new, log_joint, gradient), (state.z, state.log_joint, state.gradient)
        )
        accept_prob = jnp.exp(jnp.minimum(ratio, 0.0))
        i = state.i + 1
        since = jnp.where(i > self._num_warmup, i - self._num_warmup, i)
        rates = [each.acceptance_rate for each in drawn.values()]
        return ExchangeState(
            i=i,
            z=z,
            log_joint=log_joint,
            gradient=gradient,
            warmup=self._adapted(state, z, accept_prob),
            averaging=self._averaged(state, drawn),
            accept_prob=accept_prob,
            mean_accept_prob=state.mean_accept_prob + (accept_prob - state.mean_accept_prob) / since,
            inner_accept_prob=jnp.mean(jnp.stack(rates)),
            inner_move=jnp.min(jnp.stack([each.move for each in drawn.values()])),
            is_nonfinite=is_bad,
            rng_key=rng_key,
        )

    def _exchange(
        self, rng_key: PRNGKey, surface: Surface, old: Array, new: Array, sizes: dict[str, Scalar | None]
    ) -> tuple[Scalar, dict[str, Drawn]]:
        """Return the log ratio of the auxiliary data's densities at the old and the new latents, over all sites."""
        key_draw, key_bridge = jax.random.split(rng_key)
        drawn, total = draw_all(key_draw, self._auxiliaries, surface.energies(new), sizes), jnp.zeros((), float)
        for key, (name, each) in zip(jax.random.split(key_bridge, len(drawn)), self._auxiliaries.items(), strict=True):
            path = partial(surface.site_between, name, new, old)
            total += each.log_ratio(key, path, drawn[name].positions, sizes[name])
        return total, drawn

    def _gradient(self, rng_key: PRNGKey, surface: Surface, z: Array, sizes: dict[str, Scalar | None]) -> Array:
        """Return the noisy gradient of the log posterior, for a proposal that uses it; else 0."""
        num = self._ready()[1].num_gradient_draws
        if not num:
            return jnp.zeros_like(z)
        here = surface.energies(z)
        drawn = draw_sets(rng_key, self._auxiliaries, here, sizes, num)
        return surface.gradient(z, {name: each.positions for name, each in drawn.items()})

    def _averaged(self, state: ExchangeState, drawn: dict[str, Drawn]) -> dict[str, Any]:
        """Return the dual averaging of the inner step sizes, which ends with the warm-up."""
        new = next_averagings(self._auxiliaries, state.averaging, drawn)
        return jax.tree.map(lambda a, b: jnp.where(state.i < self._num_warmup, a, b), new, state.averaging)

    def _surface(self, args: tuple, kwargs: dict, unravel: Callable[[Array], Latents]) -> Surface:
        """Return the posterior under these arguments."""
        posterior, _ = self._ready()
        log_joint, energies = posterior.log_joint(args, kwargs), posterior.energies(args, kwargs)
        return Surface(lambda z: log_joint(unravel(z)), lambda z: energies(unravel(z)))

    def _adapted(self, state: ExchangeState, z: Latents, accept_prob: Scalar) -> adaptation.WarmupState:
        if not self._num_warmup:
            return state.warmup
        return adaptation.update_at(self._stages, state.i, state.warmup, z, _Accepted(accept_prob))  # pyright: ignore

    def _no_partners(self, state: ExchangeState) -> Array:
        flat = ravel_pytree(state.z)[0]
        return jnp.zeros((2, flat.size), flat.dtype)

    def _ready(self) -> tuple[Posterior, AbstractProposal]:
        if self._posterior is None or self._used is None:
            raise EnergyError("ExchangeKernel.sample was called before init. Run it in numpyro.infer.MCMC.")
        return self._posterior, self._used


class _Accepted(NamedTuple):
    """What the adaptation needs of a transition."""

    acceptance_rate: Scalar
