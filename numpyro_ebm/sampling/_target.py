"""A NumPyro model as a target for kernels: its parameters fixed, its latents unconstrained, or all discrete."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import init_to_uniform, util
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Position, PRNGKey, PyTree
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.supports import discrete_values
from numpyro_ebm.distributions.surrogates import FrozenEnergy, Surrogate
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.names import resolve_kernel


class Target(NamedTuple):
    """What a kernel needs of a model.

    Attributes:
        position: initial unconstrained latents by site; led by the keys' batch shape.
        log_density: ``log_density(args, kwargs)`` is a function of a position.
        postprocess: ``postprocess(args, kwargs)`` takes a position to constrained latents and deterministic sites.
        discrete_values: by site, the values that an element of it takes, where all latents are discrete.
    """

    position: Position
    log_density: Callable[[tuple, dict], Callable[[Position], jax.Array]]
    postprocess: Callable[[tuple, dict], Callable[[Position], dict[str, jax.Array]]]
    discrete_values: dict[str, np.ndarray] | None = None


class unsubsampled(Messenger):  # noqa: N801
    """Undo the scale of subsampled plates on latent sites, and refuse observed sites under them.

    Rows that nobody observed are independent draws, whatever part of them is drawn: scaled by size / subsample_size their
    density would be raised to that power.
    """

    def __enter__(self):
        self._scales: dict[str, float] = {}
        return super().__enter__()

    def process_message(self, msg: Any) -> None:
        """Note the plates; correct the sites in them."""
        if msg["type"] == "plate":
            size, subsample_size = msg["args"]
            if subsample_size is not None and 0 < subsample_size < size:
                self._scales[msg["name"]] = size / subsample_size
                if msg["value"] is None:
                    msg["value"] = jnp.arange(subsample_size)
        if msg["type"] != "sample":
            return
        plates = [frame.name for frame in msg["cond_indep_stack"] if frame.name in self._scales]
        if plates and msg["is_observed"] and not msg["infer"].get("is_auxiliary"):
            raise EnergyError(
                f"The plate '{plates[0]}' subsamples the observed site '{msg['name']}': MCMC would use one frozen subset of "
                "the data. Write the plate without subsample_size for MCMC."
            )
        for plate in plates:
            msg["scale"] = msg["scale"] / self._scales[plate]


def fixed(model: Callable, params: PyTree | None) -> Callable:
    """The model with its parameters fixed and its plates as MCMC needs them."""
    return unsubsampled(handlers.substitute(model, data=dict(params or {})))


class Latents(NamedTuple):
    """The latent sites of a model.

    Attributes:
        discrete: by site, the values that an element takes; None where they cannot be listed.
        energies: which of these are energies.
        continuous: the others.
    """

    discrete: dict[str, np.ndarray | None]
    energies: list[str]
    continuous: list[str]


def check_model(model: Callable, params: PyTree | None, args: tuple, kwargs: dict) -> Latents:
    """Refuse a model whose parameters would silently stay at their initial values, and one without latents.

    Returns:
        Its latent sites.

    Raises:
        EnergyError: naming the parameters that have no value.
        TypeError: for values that are not by name.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"params are values by name; got {type(params).__name__}. Write params=result.params of what fit or svi.run "
            "returned, or params=svi.get_params(state)."
        )
    trace = _trace(fixed(model, params), args, kwargs)
    missing = [n for n, site in trace.items() if site["type"] == "param" and (params or {}).get(n) is None]
    if missing:
        raise EnergyError(
            f"The model has parameters {missing} without values, so MCMC would use their initial ones. Pass those that "
            "were trained: params=svi_result.params."
        )
    found = _latents(trace)
    if not (found.discrete or found.continuous):
        raise EnergyError("The model has no latent site, so there is nothing to sample. Call it without data.")
    if not found.continuous:  # with continuous latents derivatives tell, and estimate itself judges
        _check_log_density(trace, sorted(found.discrete))
    return found


def _check_log_density(trace: Mapping[str, Any], latents: list[str]) -> None:
    """Refuse sites whose log probability is none of the discrete latents, which no derivative tells."""
    surrogates = [n for n, s in trace.items() if s["type"] == "sample" and isinstance(s["fn"], Surrogate | FrozenEnergy)]
    if surrogates:
        raise EnergyError(
            f"The model comes from estimate, and the surrogates at {surrogates} are no log densities of discrete latents. "
            "Sample the model itself, its parameters fixed: sample(rng_key, model, params=result.params)."
        )
    for name, site in trace.items():
        unwrapped = unwrap(site["fn"]) if site["type"] == "sample" and site["is_observed"] else None
        if unwrapped is not None and not getattr(unwrapped.distribution, "normalized", False):
            raise EnergyError(
                f"The energy at the observed site '{name}' is known up to log Z only, which may depend on the latents "
                f"{latents}: their draws would be wrong. If Z is constant or already inside the energy, write "
                "EnergyDistribution(..., normalized=True)."
            )


def kernel_for(latents: Latents, kernel: Any) -> AbstractKernel:
    """The kernel that moves these latents: the one given, or for None "nuts", and "gibbs" where all of them are discrete.

    Raises:
        EnergyError: for discrete latents beside continuous ones, which no kernel moves together, and for a kernel that
            cannot move on their supports.
    """
    is_discrete = not latents.continuous
    is_gibbs = kernel is not None and resolve_kernel(kernel, is_discrete=None).is_discrete
    if latents.discrete and not is_discrete and (latents.energies or is_gibbs):
        both = f"the discrete latent sites {sorted(latents.discrete)} beside the continuous {sorted(latents.continuous)}"
        raise EnergyError(
            f"The model has {both}, and no kernel here moves both. Fix one kind and sample the other: "
            f"numpyro.handlers.condition(model, {{'{min(latents.continuous)}': value}}) for 'gibbs', "
            f"{{'{min(latents.discrete)}': value}} for 'nuts'."
        )
    return resolve_kernel(kernel, is_discrete=is_discrete)


def _trace(model: Callable, args: tuple, kwargs: dict, init_strategy: Callable = init_to_uniform) -> dict[str, Any]:
    """One run of a model whose latents are started as kernels start them, not drawn: no chain of an energy's runs."""
    started = handlers.substitute(handlers.seed(model, 0), substitute_fn=_starting(init_strategy))
    with handlers.block(), handlers.trace() as trace:
        started(*args, **kwargs)
    return trace


def _starting(init_strategy: Callable) -> Callable:
    """NumPyro's strategy, which knows no start of a discrete energy: there a draw of its reference."""
    strategy = init_strategy if isinstance(init_strategy, partial) else init_strategy()

    def start(site: dict[str, Any]) -> Any:
        if site["type"] != "sample" or site["is_observed"]:
            return None
        unwrapped = unwrap(site["fn"])
        value = strategy(site)
        if value is not None or unwrapped is None or not unwrapped.distribution.is_discrete:
            return value
        law = unwrapped.distribution.reference.expand(unwrapped.batch_shape)
        return law.sample(site["kwargs"]["rng_key"])

    return start


def _latents(trace: Mapping[str, Any]) -> Latents:
    sites = {n: s["fn"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    discrete = {name: fn for name, fn in sites.items() if fn.support.is_discrete}
    energies = [name for name, fn in discrete.items() if unwrap(fn) is not None]
    values = {name: discrete_values(fn.support) for name, fn in discrete.items()}
    return Latents(values, energies, [name for name in sites if name not in discrete])


def make_target(
    rng_key: PRNGKey, model: Callable, args: tuple, kwargs: dict, init_strategy: Callable = init_to_uniform
) -> Target:
    """Initialise a model (as `fixed` returns it) for kernels.

    Args:
        rng_key: one key, or a batch of keys for a batch of initial positions.
        model: the model.
        args: its arguments.
        kwargs: its keyword arguments.
        init_strategy: as in NumPyro's kernels.

    Raises:
        EnergyError: for discrete latents without bounds.
        RuntimeError: by NumPyro, outside jit, where no finite starting point is found.
    """
    latents = _latents(_trace(model, args, kwargs))
    if not latents.continuous:
        return _discrete_target(rng_key, model, latents, args, kwargs, init_strategy)
    info = initialize_model(
        rng_key, model, init_strategy=init_strategy, dynamic_args=True, model_args=args, model_kwargs=kwargs
    )

    def log_density(args, kwargs):
        potential = info.potential_fn(*args, **kwargs)
        return lambda z: -jnp.asarray(potential(z), float)

    return Target(info.param_info.z, log_density, lambda args, kwargs: info.postprocess_fn(*args, **kwargs))


def _discrete_target(rng_key: PRNGKey, model: Callable, latents: Latents, args: tuple, kwargs: dict, strategy: Callable):
    """The target of a model whose latents are all discrete: positions are their values."""
    for name, values in latents.discrete.items():
        if values is None:
            raise EnergyError(
                f"At site '{name}': the values of its support cannot be listed: it needs two bounds, the same for all "
                "elements, as constraints.boolean and constraints.integer_interval(0, 9) have."
            )

    def start(key):
        substituted = handlers.substitute(handlers.seed(model, key), substitute_fn=_starting(strategy))
        with handlers.block(), handlers.trace() as trace:
            substituted(*args, **kwargs)
        return {name: jnp.asarray(trace[name]["value"], int) for name in latents.discrete}

    def log_density(args, kwargs):
        return lambda values: jnp.asarray(util.log_density(handlers.seed(model, 0), args, kwargs, values)[0], float)

    def postprocess(args, kwargs, values):
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=0):
            handlers.substitute(model, data=values)(*args, **kwargs)
        return values | {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

    position = start(rng_key) if is_prng_key(rng_key) else jax.vmap(start)(rng_key)
    return Target(
        position, log_density, lambda args, kwargs: partial(postprocess, args, kwargs), cast(Any, latents.discrete)
    )
