"""`BlackJAXKernel`: the kernels of BlackJAX in ``numpyro.infer.MCMC``."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int
from numpyro.infer import init_to_uniform
from numpyro.infer.mcmc import MCMCKernel

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.typing import Array, Chains, PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.kernels import AbstractKernel, adaptation
from numpyro_ebm.kernels.names import resolve_kernel
from numpyro_ebm.sampling import target as _target


class BlackJAXState(NamedTuple):
    """State of one chain. Fields that NumPyro's own HMC also has have the same names.

    A field that does not apply to a kernel is None or 0, and is not among its default fields.

    Attributes:
        i: number of transitions so far.
        z: unconstrained latents by site (at temperature 1 under tempering).
        kernel_state: BlackJAX's state.
        warmup: state of dual averaging and of the mass matrix, and the kernel as adapted so far.
        accept_prob: acceptance probability of the last transition.
        mean_accept_prob: mean acceptance probability since the start, or since the end of the warm-up.
        diverging: whether the last transition diverged.
        potential_energy: minus the log density at ``z``; None for kernels that do not evaluate it.
        energy: Hamiltonian of the last proposal; None for a kernel without momentum.
        step_size: step size of the last transition; None for a kernel without one.
        num_steps: gradient evaluations of the last transition.
        tree_depth: number of doublings of the last NUTS trajectory.
        is_nonfinite: whether the last transition proposed a point where the log density is not finite.
        swap_rate: acceptance probability of the last swaps between temperatures; None without tempering.
        rng_key: random key.
    """

    i: Int[Array, "*chains"]
    z: PyTree
    kernel_state: Any
    warmup: adaptation.WarmupState
    accept_prob: Chains
    mean_accept_prob: Chains
    diverging: Bool[Array, "*chains"]
    potential_energy: Chains | None
    energy: Chains | None
    step_size: Chains | None
    num_steps: Int[Array, "*chains"]
    tree_depth: Int[Array, "*chains"]
    is_nonfinite: Bool[Array, "*chains"]
    swap_rate: Chains | None
    rng_key: PRNGKey | PRNGKeys


FIELDS = {
    "acceptance_rate": "accept_prob",
    "is_divergent": "diverging",
    "num_gradients": "num_steps",
    "energy": "energy",
    "tree_depth": "tree_depth",
    "is_nonfinite": "is_nonfinite",
    "swap_rate": "swap_rate",
}
"""Fields of `TransitionInfo`, and their names in `BlackJAXState`."""


class BlackJAXKernel(MCMCKernel):
    """A BlackJAX kernel for ``numpyro.infer.MCMC``, on any NumPyro model.

    Latents move in unconstrained space. During NumPyro's warm-up the step size adapts by dual averaging, and the mass
    matrix, for kernels that adapt one, in Stan's windows; unadjusted kernels keep their settings. The kernel works with
    vectorized, sequential and parallel chains, the progress bar and extra fields (see `BlackJAXState`).

    Args:
        model: a NumPyro model, with or without energy sites.
        kernel: a name from `available_kernels`, or a kernel object with the initial settings of the warm-up; "gibbs" for a
            model whose latents are all discrete ("lattice_walk" if they have no largest value), and a mapping with a kernel
            for each site, ``{"x": "nuts", "s": "gibbs"}`` (see `BySite`), for a model with both kinds.
        params: values of the model's ``numpyro.param`` sites, such as ``svi.run(...).params``; names that are not the
            model's (a guide's) are ignored.
        init_strategy: as in NumPyro's kernels.

    Raises:
        EnergyError: (a ValueError) for an unknown kernel; at the first run, for a kernel that cannot move on the latents'
            supports, for latents of which some are discrete and others continuous, a model whose parameters have no value,
            an energy whose parameters are sampled with it, an observed site in a subsampled plate, and a model without
            latents.
        TypeError: for a model that is not callable, and a kernel that is neither a name nor a kernel object.
        RuntimeError: by NumPyro, if no finite starting point is found.

    Example:
        >>> mcmc = MCMC(BlackJAXKernel(model, "nuts", params=params), num_warmup=500, num_samples=1000)  # doctest: +SKIP

    References:
        Cabezas et al., BlackJAX: composable Bayesian inference in JAX (2024).
    """

    def __init__(
        self,
        model: Callable,
        kernel: str | AbstractKernel | Mapping[str, Any] = "nuts",
        *,
        params: PyTree | None = None,
        init_strategy: Callable = init_to_uniform,
    ):
        if not callable(model):
            raise TypeError(f"BlackJAXKernel needs a NumPyro model; got {type(model).__name__}.")
        # Read-only: the functions that NumPyro has compiled would not see a change.
        self._kernel = resolve_kernel(kernel, is_discrete=None)
        self._params = params
        self._model = model
        self._init_strategy = init_strategy
        # NumPyro reads these attributes before the first run.
        self._sample_fn: Callable | None = None
        self._bound = self._kernel
        self._target: _target.Target | None = None
        self._num_warmup = 0
        self._stages = np.zeros((0, 2), np.int32)

    @property
    def model(self) -> Callable:
        """The model as given."""
        return self._model

    @property
    def kernel(self) -> AbstractKernel:
        """The kernel with its settings at the start of the warm-up."""
        return self._kernel

    @property
    def params(self) -> PyTree | None:
        """The values of the model's parameters."""
        return self._params

    @property
    def sample_field(self) -> str:
        """Name of the state field that holds the draw."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """Names of the draw and of the statistics that apply to this kernel."""
        statistics = tuple(FIELDS[name] for name in self._kernel.statistics)
        step_size = () if self._kernel.step_size is None else ("step_size",)
        return ("z", *statistics, *step_size, *(() if self._kernel.name == "langevin" else ("potential_energy",)))

    @in_own_modes
    def init(
        self,
        rng_key: PRNGKey | PRNGKeys,
        num_warmup: int,
        init_params: PyTree | None,
        model_args: tuple,
        model_kwargs: dict,
    ) -> BlackJAXState:
        """Return the state of one chain, or of a batch of chains for a batch of keys."""
        kwargs = model_kwargs or {}
        keys, is_batch = _target.keys_of(rng_key)
        if self._target is None:
            _target.kernel_for(_target.check_model(self._model, self._params, model_args, kwargs), self._kernel)
        self._num_warmup = num_warmup
        self._stages = adaptation.schedule(self._kernel, num_warmup)
        model = _target.fixed(self._model, self._params)
        self._target = _target.make_target(keys[0], model, self._kernel, model_args, kwargs, self._init_strategy)
        self._bound = self._kernel.bind(self._target)
        position = self._target.position if init_params is None else init_params
        start = partial(self._start, self._target.log_density(model_args, kwargs))
        # A batch of keys means a batch of chains, here and at every transition.
        self._sample_fn = jax.vmap if is_batch else _call
        return jax.jit(self._sample_fn(start))(keys[1], position)

    @in_own_modes
    def sample(self, state: BlackJAXState, model_args: tuple, model_kwargs: dict) -> BlackJAXState:
        """Return the state after one transition."""
        if self._sample_fn is None or self._target is None:
            raise EnergyError("BlackJAXKernel.sample was called before init. Run it in numpyro.infer.MCMC.")
        # Built from these arguments, because under jit_model_args each run has new ones.
        transition = partial(self._transition, self._target.log_density(model_args, model_kwargs or {}))
        return self._sample_fn(transition)(state)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict) -> Callable:
        """Return the map from unconstrained latents to constrained latents and deterministic sites."""
        if self._target is None:
            return lambda z: z
        return self._target.postprocess(model_args, model_kwargs or {})

    def get_diagnostics_str(self, state: BlackJAXState) -> str:
        """Return the text for the progress bar."""
        step = "" if state.step_size is None else f"step {state.step_size:.2e}, "
        return f"{int(state.num_steps)} gradients, {step}acceptance {state.mean_accept_prob:.2f}"

    def _known(self, statistic: str, value: Scalar | None) -> Scalar | None:
        """Return a statistic if the kernel has it; else None, in every state alike."""
        return value if statistic in self._kernel.statistics else None

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings only; a run rebuilds the rest."""
        return {**self.__dict__, "_sample_fn": None, "_target": None}

    def _start(self, log_density: Callable, rng_key: PRNGKey, position: PyTree) -> BlackJAXState:
        position = self._bound.as_positions(position)
        rng_key, key = jax.random.split(rng_key)
        lifted = self._bound.lift(position)
        kernel_state = self._bound.init(key, lifted, log_density)
        warmup = adaptation.start(self._bound, lifted)
        zero = jnp.zeros((), float)
        return BlackJAXState(
            i=jnp.zeros((), jnp.int32),
            z=self._bound.as_draws(position),
            kernel_state=kernel_state,
            warmup=warmup,
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=jnp.zeros((), bool),
            potential_energy=_potential(kernel_state),
            energy=self._known("energy", zero),
            step_size=_step_size(warmup.kernel),
            num_steps=jnp.zeros((), jnp.int32),
            tree_depth=jnp.zeros((), jnp.int32),
            is_nonfinite=jnp.zeros((), bool),
            swap_rate=self._known("swap_rate", zero),
            rng_key=rng_key,
        )

    def _transition(self, log_density: Callable, state: BlackJAXState) -> BlackJAXState:
        rng_key, key = jax.random.split(state.rng_key)
        kernel = state.warmup.kernel
        kernel_state, info = kernel.step(key, state.kernel_state, log_density)
        adapted = state.warmup
        if self._num_warmup:
            adapted = adaptation.update_at(self._stages, state.i, adapted, kernel_state.position, info)
        i = state.i + 1
        since = jnp.where(i > self._num_warmup, i - self._num_warmup, i)
        return BlackJAXState(
            i=i,
            z=kernel.as_draws(kernel.lower(kernel_state.position)),
            kernel_state=kernel_state,
            warmup=adapted,
            accept_prob=info.acceptance_rate,
            mean_accept_prob=state.mean_accept_prob + (info.acceptance_rate - state.mean_accept_prob) / since,
            diverging=info.is_divergent,
            potential_energy=_potential(kernel_state),
            energy=self._known("energy", info.energy),
            step_size=_step_size(kernel),
            num_steps=info.num_gradients,
            tree_depth=info.tree_depth,
            is_nonfinite=info.is_nonfinite,
            swap_rate=self._known("swap_rate", info.swap_rate),
            rng_key=rng_key,
        )


def _call(fn: Callable) -> Callable:
    return fn


def _potential(kernel_state: PyTree) -> Scalar | None:
    log_density = getattr(kernel_state, "logdensity", None)
    return None if log_density is None else -jnp.asarray(log_density, float)


def _step_size(kernel: AbstractKernel) -> Scalar | None:
    return None if kernel.step_size is None else jnp.asarray(kernel.step_size, float)
