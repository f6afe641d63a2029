"""What kernels over the parameters of energies share: the posterior, data sets drawn from it, and where chains start."""

import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.linalg import cholesky
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey, PRNGKeys, PyTree
from numpyro_ebm.bayes._auxiliary import Auxiliary, Drawn, auxiliaries, next_averagings, step_sizes
from numpyro_ebm.bayes._posterior import Latents, Posterior, check_energies, make_posterior
from numpyro_ebm.bayes._settling import Surface, settle
from numpyro_ebm.bayes.checks import PosteriorTerms, coordinate_names, terms_of_draws
from numpyro_ebm.handlers import estimated_in
from numpyro_ebm.sampling.target import check_model, keys_of


class Start(NamedTuple):
    """Where a chain starts.

    Attributes:
        mode: ``(d,)``, where the Newton steps have led; the initial latents without them.
        covariance: ``(d, d)``, of the posterior at the mode; the unit matrix without Newton steps.
        z: ``(d,)``, the first latents: the mode plus one draw with this covariance; the mode without Newton steps.
        averaging: by energy site, dual averaging of the step size of the inner kernel; None for one without.
    """

    mode: Flat
    covariance: Matrix
    z: Flat
    averaging: dict[str, Any]


class PosteriorKernel(MCMCKernel):
    """A kernel of ``numpyro.infer.MCMC`` over the parameters of observed energies, with data sets drawn from these.

    Subclasses give `_first`, the state of one chain, and `sample`. Their states have the fields ``i``, ``z``, ``averaging``
    and ``rng_key``, and the fields `inner_accept_prob` and `inner_move` of the auxiliary data for `diagnose`.
    """

    def __init__(
        self,
        model: Callable,
        inner: Any,
        *,
        num_steps: int,
        exact_sampler: Any,
        num_bridges: int | None,
        num_newton_steps: int,
        params: PyTree | None,
        init_strategy: Callable,
    ):
        owner = type(self).__name__
        if not callable(model):
            raise TypeError(f"{owner} needs a NumPyro model; got {type(model).__name__}.")
        if estimated_in(model) is not None:
            raise EnergyError(
                f"{owner} draws from the posterior of the model itself, and this one is estimate(model, ...), whose "
                f"estimator has no use there. Write {owner}(model, ...)."
            )
        check_count(owner, "num_steps", num_steps)
        check_count(owner, "num_newton_steps", num_newton_steps, 0)
        if num_bridges is not None:
            check_count(owner, "num_bridges", num_bridges, 0)
        if inner is not None and exact_sampler is not None and not isinstance(exact_sampler, Mapping) and not num_bridges:
            raise EnergyError(f"{owner} got inner and exact_sampler, of which only one draws. Leave one out.")
        # Read-only: the functions that NumPyro has compiled would not see a change.
        self._model, self._params, self._init_strategy = model, params, init_strategy
        self._inner, self._num_steps, self._exact_sampler = inner, int(num_steps), exact_sampler
        self._num_bridges, self._num_newton_steps = num_bridges, int(num_newton_steps)
        # NumPyro reads attributes before the first run.
        self._is_batch = False
        self._posterior: Posterior | None = None
        self._auxiliaries: dict[str, Auxiliary] = {}
        self._given: tuple[tuple, dict] | None = None
        self._num_warmup = 0
        # NumPyro calls `init` again for a run that goes on from a state as long as this is None.
        self._sample_fn: Callable | None = None

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

    @in_own_modes
    def init(
        self,
        rng_key: PRNGKey | PRNGKeys,
        num_warmup: int,
        init_params: PyTree | None,
        model_args: tuple,
        model_kwargs: dict,
    ) -> Any:
        """Return the state of one chain, or of a batch of chains for a batch of keys."""
        owner, kwargs = type(self).__name__, model_kwargs or {}
        keys, self._is_batch = keys_of(rng_key)
        check_model(self._model, self._params, model_args, kwargs)
        self._given = None
        self._take_note(model_args, kwargs)
        sites = check_energies(owner, self._model, self._params, model_args, kwargs)
        self._auxiliaries = auxiliaries(owner, sites, self._inner, self._num_steps, self._num_bridges, self._exact_sampler)
        self._posterior = make_posterior(keys[0], self._model, self._params, self._init_strategy, model_args, kwargs)
        position = self._posterior.position if init_params is None else init_params
        self._num_warmup = num_warmup
        self._prepare(position)
        start = partial(self._first, model_args, kwargs)
        state = jax.jit(jax.vmap(start) if self._is_batch else start)(keys[1], position)
        self._sample_fn = self.sample
        # NumPyro puts one random key back into the state of chains that depend on each other.
        return state._replace(rng_key=state.rng_key[0]) if self.is_ensemble_kernel else state

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict) -> Callable:
        """Return the map from unconstrained latents to constrained latents and deterministic sites."""
        if self._posterior is None:
            return lambda z: z
        return self._posterior.postprocess(model_args, model_kwargs or {})

    @in_own_modes
    def terms_of_draws(self, state: Any, draws: Mapping[str, Array]) -> tuple[list[str], PosteriorTerms]:
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
        args, kwargs = self._given
        z = jax.vmap(jax.vmap(self._ready().unconstrain(args, kwargs)))(dict(draws))
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
        return {**self.__dict__, "_posterior": None, "_auxiliaries": {}, "_given": None, "_sample_fn": None}

    @abc.abstractmethod
    def _first(self, args: tuple, kwargs: dict, rng_key: PRNGKey, position: Latents) -> Any:
        """Return the first state of one chain."""

    def _take_note(self, args: tuple, kwargs: dict) -> None:
        """Keep the arguments of the model for `terms_of_draws`, unless they are those of a compiled run."""
        if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((args, kwargs))):
            self._given = args, kwargs

    def _prepare(self, position: Latents) -> None:
        """Take note of the initial latents, whose batch shape is that of the keys."""

    def _start(self, rng_key: PRNGKey, surface: Surface, auxiliaries: Mapping[str, Auxiliary], z: Flat) -> Start:
        """Go to a mode by Newton steps, and return where the chain starts around it."""
        averaging = {name: each.averaging() for name, each in auxiliaries.items()}
        if not self._num_newton_steps:
            return Start(z, jnp.eye(z.size), z, averaging)
        key_settle, key_spread = jax.random.split(rng_key)
        mode, averaging, covariance = settle(key_settle, surface, auxiliaries, averaging, z, self._num_newton_steps)
        noise = cholesky(covariance) @ jax.random.normal(key_spread, z.shape)
        return Start(mode, covariance, mode + noise, averaging)

    def _averaged(self, state: Any, drawn: dict[str, Drawn]) -> dict[str, Any]:
        """Return the dual averaging of the inner step sizes, which ends with the warm-up."""
        new = next_averagings(self._auxiliaries, state.averaging, drawn)
        return jax.tree.map(lambda a, b: jnp.where(state.i < self._num_warmup, a, b), new, state.averaging)

    def _sizes(self, state: Any) -> dict[str, Any]:
        """Return the step sizes of the inner kernels."""
        return step_sizes(state.averaging, is_adapting=state.i < self._num_warmup)

    def _surface(self, args: tuple, kwargs: dict, unravel: Callable[[Array], Latents]) -> Surface:
        """Return the posterior under these arguments."""
        posterior = self._ready()
        log_joint, energies = posterior.log_joint(args, kwargs), posterior.energies(args, kwargs)
        return Surface(lambda z: log_joint(unravel(z)), lambda z: energies(unravel(z)))

    def _ready(self) -> Posterior:
        if self._posterior is None:
            raise EnergyError(f"{type(self).__name__}.sample was called before init. Run it in numpyro.infer.MCMC.")
        return self._posterior
