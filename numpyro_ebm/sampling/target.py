"""A NumPyro model as the target of a kernel: its parameters fixed, its latents unconstrained or all discrete."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import init_to_uniform, util
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger
from numpyro.util import is_prng_key

from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.numpyro_stack import params_in, sums_out
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PRNGKeys, PyTree
from numpyro_ebm.distributions.mixed import Part
from numpyro_ebm.distributions.rows import Unwrapped, unwrap
from numpyro_ebm.distributions.surrogates import FrozenEnergy, Surrogate
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.by_site import BySite, usual_kernels
from numpyro_ebm.kernels.densities import ChainDensity, Known
from numpyro_ebm.kernels.names import resolve_kernel

Kernel: TypeAlias = str | AbstractKernel | Mapping[str, Any] | None


class Target(NamedTuple):
    """Functions of a model that a kernel needs.

    Attributes:
        position: initial unconstrained latents by site; the batch shape of the keys is their leading shape.
        log_density: ``log_density(args, kwargs)`` returns a function of a position.
        postprocess: ``postprocess(args, kwargs)`` returns the map from a position to constrained latents and deterministic
            sites.
        discrete: the discrete sites that kernels move.
        known: what is known of the log density under the first arguments, if a ready-made energy makes it up alone.
    """

    position: Position
    log_density: Callable[[tuple, dict], ChainLogDensityFn]
    postprocess: Callable[[tuple, dict], Callable[[Position], dict[str, jax.Array]]]
    discrete: Part = Part({}, {})
    known: Known | None = None

    @property
    def is_discrete(self) -> bool:
        """Whether the latents are discrete."""
        return self.discrete.is_discrete

    @property
    def discrete_values(self) -> dict[str, np.ndarray] | None:
        """By discrete site, the values that one of its elements takes; None without discrete sites."""
        return self.discrete.discrete_values

    @property
    def integer_bounds(self) -> dict[str, np.ndarray]:
        """By discrete site, the lowest and the highest value of each element."""
        return self.discrete.integer_bounds

    def part(self, sites: tuple[str, ...]) -> "Target":
        """Return the target of some of the sites, which are all discrete or all continuous."""
        return self._replace(discrete=self.discrete.only(sites), known=None)


class unsubsampled(Messenger):  # noqa: N801
    """Undo the scale of subsampled plates on latent sites, and refuse observed sites in them.

    Unobserved rows are independent draws, however many of them are drawn. A scale of size / subsample_size would raise their
    density to that power.
    """

    def __enter__(self):
        self._scales: dict[str, float] = {}
        return super().__enter__()

    def process_message(self, msg: dict[str, Any]) -> None:
        """Record the subsampled plates, and correct the scale of the sites in them."""
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


def keys_of(rng_key: PRNGKey | PRNGKeys) -> tuple[Array, bool]:
    """Return two keys, or two for each of many chains along the second axis, and whether NumPyro runs many chains at once.

    Raises:
        TypeError: for anything but a random key.
    """
    if not isinstance(rng_key, Array | np.ndarray):  # an array holds one key, or the keys of many chains
        check_key("MCMC.run", rng_key)
    if is_prng_key(rng_key):
        return jax.random.split(rng_key), False
    return jnp.swapaxes(jax.vmap(jax.random.split)(rng_key), 0, 1), True


def fixed(model: Callable, params: PyTree | None) -> Callable:
    """Return the model with its parameters fixed and its plates corrected for MCMC."""
    return unsubsampled(handlers.substitute(model, data=dict(params or {})))


class Latents(NamedTuple):
    """The latent sites of a model.

    Attributes:
        discrete: the discrete sites.
        energies: names of the discrete sites that are energies.
        continuous: names of the continuous sites.
        trace: the run of the model in which they were found.
    """

    discrete: Part
    energies: list[str]
    continuous: list[str]
    trace: Mapping[str, Any]

    @property
    def kinds(self) -> dict[str, bool]:
        """Whether each latent site is discrete, by name."""
        return {name: name in self.discrete.supports for name in sorted([*self.discrete.supports, *self.continuous])}


def check_model(model: Callable, params: PyTree | None, args: tuple, kwargs: dict) -> Latents:
    """Find the latents of a model, and refuse parameters without values, which would silently stay at their initial ones.

    Returns:
        The latent sites.

    Raises:
        EnergyError: for parameters without values, which the message names, and for a model without latents.
        TypeError: if ``params`` are not a mapping by name.
    """
    if params is not None and not isinstance(params, Mapping):
        raise TypeError(
            f"params needs a dict of values by name; got {type(params).__name__}. Write params=result.params with the "
            "result of fit or svi.run, or params=svi.get_params(state)."
        )
    trace = trace_at_start(fixed(model, params), args, kwargs)
    missing = [name for name in params_in(trace) if (params or {}).get(name) is None]
    if missing:
        raise EnergyError(
            f"The model has parameters {missing} without values, so MCMC would use their initial ones. Pass the "
            "trained values: params=svi_result.params."
        )
    found = _latents(trace)
    if not found.kinds:
        raise EnergyError("The model has no latent site, so there is nothing to sample. Call it without data.")
    if not found.continuous:  # with continuous latents, the guard on derivatives and `estimate` refuse them
        _check_log_density(trace, sorted(found.kinds))
    return found


def _check_log_density(trace: Mapping[str, Any], latents: list[str]) -> None:
    """Refuse sites whose log probability is not a log density of the discrete latents: no derivative would show it."""
    surrogates = [n for n, s in trace.items() if s["type"] == "sample" and isinstance(s["fn"], Surrogate | FrozenEnergy)]
    if surrogates:
        raise EnergyError(
            f"The model comes from estimate, and the surrogates at {surrogates} are not log densities of discrete latents. "
            "Sample the model itself with its parameters fixed: sample(rng_key, model, params=result.params)."
        )
    for name, site in trace.items():
        unwrapped = unwrap(site["fn"]) if site["type"] == "sample" and site["is_observed"] else None
        if unwrapped is not None and not getattr(unwrapped.distribution, "normalized", False):
            raise EnergyError(
                f"The energy at the observed site '{name}' is known only up to log Z, which may depend on the latents "
                f"{latents}: their draws would be wrong. If Z is constant or already inside the energy, write "
                "EnergyDistribution(..., normalized=True)."
            )


def kernel_for(latents: Latents, kernel: Kernel) -> AbstractKernel:
    """Return the kernel for these latents.

    It is the given one, or for None "nuts" for continuous and "gibbs" for discrete latents ("lattice_walk" for integers
    without a largest value). Discrete latents without energies beside continuous ones are left to "nuts", which sums over
    them.

    Raises:
        EnergyError: for one kernel that cannot move both the discrete and the continuous latents, for a kernel that cannot
            move on their supports, and for kernels by site that are not those of the latents.
    """
    is_discrete, discrete, endless = not latents.continuous, sorted(latents.discrete.supports), latents.discrete.endless
    is_for_each = latents.energies if latents.continuous else 0 < len(endless) < len(discrete)
    if kernel is None and is_for_each:
        kernel = usual_kernels(latents.kinds, endless=endless)
    if isinstance(kernel, Mapping | BySite):
        kernel = kernel if isinstance(kernel, BySite) else BySite(kernel)
        kernel.check(latents.kinds, "the latents of the model", endless)
        _check_log_density(latents.trace, discrete)
        return kernel
    given = None if kernel is None else resolve_kernel(kernel, is_discrete=None)
    is_gibbs = not sums_out(latents.trace, discrete) if given is None else given.is_discrete
    if discrete and not is_discrete and (latents.energies or is_gibbs):
        by_site = usual_kernels(latents.kinds, endless=endless)
        both = f"the discrete latent sites {discrete} beside the continuous {sorted(latents.continuous)}"
        raise EnergyError(
            f"The model has {both}, and no single kernel moves both. Name a kernel for each site: "
            f"kernel={ {name: by_site[name] for name in [*sorted(latents.continuous), *discrete]} }."
        )
    return resolve_kernel(kernel, is_discrete=is_discrete, is_endless=bool(endless))


def trace_at_start(model: Callable, args: tuple, kwargs: dict, init_strategy: Callable = init_to_uniform) -> dict[str, Any]:
    """Trace one run of a model with its latents at initial values, so that no energy runs chains to draw them."""
    started = handlers.substitute(handlers.seed(model, 0), substitute_fn=_starting(init_strategy))
    with handlers.block(), handlers.trace() as trace:
        started(*args, **kwargs)
    return trace


def _starting(init_strategy: Callable) -> Callable:
    """Extend NumPyro's initialisation to discrete energies, which start at a draw of their reference."""
    strategy = init_strategy if isinstance(init_strategy, partial) else init_strategy()

    def start(site: dict[str, Any]) -> Any:
        if site["type"] != "sample" or site["is_observed"]:
            return None
        unwrapped = unwrap(site["fn"])
        value = strategy(site)
        if value is not None or unwrapped is None or not unwrapped.distribution.is_discrete:
            return value
        reference = unwrapped.distribution.reference.expand(unwrapped.batch_shape)
        return reference.sample(site["kwargs"]["rng_key"])

    return start


def _latents(trace: Mapping[str, Any]) -> Latents:
    sites = {n: s["fn"] for n, s in trace.items() if s["type"] == "sample" and not s["is_observed"]}
    discrete = {name: fn for name, fn in sites.items() if fn.support.is_discrete}
    energies = [name for name, fn in discrete.items() if unwrap(fn) is not None]
    part = Part({n: fn.support for n, fn in discrete.items()}, {n: fn.event_shape for n, fn in discrete.items()})
    return Latents(part, energies, [name for name in sites if name not in discrete], trace)


def make_target(
    rng_key: PRNGKey | PRNGKeys,
    model: Callable,
    kernel: AbstractKernel,
    args: tuple,
    kwargs: dict,
    init_strategy: Callable = init_to_uniform,
) -> Target:
    """Initialise a model (as `fixed` returns it) for kernels.

    Args:
        rng_key: one key, or a batch of keys for a batch of initial positions.
        model: the model.
        kernel: the kernel that moves the latents; a `BySite` moves discrete latents beside continuous ones.
        args: its arguments.
        kwargs: its keyword arguments.
        init_strategy: as in NumPyro's kernels.

    Raises:
        EnergyError: for a kernel with gradients on an energy whose gradient is zero everywhere.
        RuntimeError: by NumPyro, outside jit, if no finite starting point is found.
    """
    latents = _latents(trace_at_start(model, args, kwargs))
    given = (rng_key, model, latents, args, kwargs, init_strategy)
    if not latents.continuous:
        target = _discrete_target(*given)
    elif isinstance(kernel, BySite) and latents.discrete.is_discrete:
        return _mixed_target(*given)
    else:
        target = _continuous_target(*given)
    lone = _lone_energy(latents.trace)
    if lone is not None:
        with at_site(lone[0]):
            kernel.check_slope(lone[1].distribution)
    return target


def _continuous_target(
    rng_key: PRNGKey | PRNGKeys, model: Callable, latents: Latents, args: tuple, kwargs: dict, strategy: Callable
):
    """Return the target of a model in unconstrained space."""
    info = initialize_model(rng_key, model, init_strategy=strategy, dynamic_args=True, model_args=args, model_kwargs=kwargs)
    known = _known(model, args, kwargs)

    def log_density(args, kwargs):
        potential = info.potential_fn(*args, **kwargs)
        # The energy may depend on the arguments; a model without one is not run again to look for it.
        return ChainDensity(lambda z: -jnp.asarray(potential(z), float), known and _known(model, args, kwargs))

    def postprocess(args, kwargs):
        return info.postprocess_fn(*args, **kwargs)

    return Target(info.param_info.z, log_density, postprocess, known=known)


def _discrete_target(
    rng_key: PRNGKey | PRNGKeys, model: Callable, latents: Latents, args: tuple, kwargs: dict, strategy: Callable
):
    """Return the target of a model whose latents are all discrete; positions are the values themselves."""
    start = partial(_discrete_start, model, latents, args, kwargs, strategy)
    known = _known(model, args, kwargs)

    def log_density(args, kwargs):
        def of_values(values):
            return jnp.asarray(util.log_density(handlers.seed(model, 0), args, kwargs, values)[0], float)

        return ChainDensity(of_values, known and _known(model, args, kwargs))

    def postprocess(args, kwargs, values):
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=0):
            handlers.substitute(model, data=values)(*args, **kwargs)
        return values | {name: site["value"] for name, site in trace.items() if site["type"] == "deterministic"}

    position = start(rng_key) if is_prng_key(rng_key) else jax.vmap(start)(rng_key)
    return Target(
        position,
        log_density,
        lambda args, kwargs: partial(postprocess, args, kwargs),
        latents.discrete,
        known,
    )


def _mixed_target(
    rng_key: PRNGKey | PRNGKeys, model: Callable, latents: Latents, args: tuple, kwargs: dict, strategy: Callable
):
    """Return the target of discrete latents, whose positions are their values, and unconstrained continuous ones."""

    def given(position):
        values = {name: position[name] for name in latents.discrete.supports}
        rest = {name: leaf for name, leaf in position.items() if name not in values}
        return handlers.seed(handlers.condition(model, cast(Any, values)), 0), values, rest

    def log_density(args, kwargs):
        def of_position(position):
            conditioned, _, rest = given(position)
            return -jnp.asarray(util.potential_energy(conditioned, args, kwargs, rest), float)

        return ChainDensity(of_position)

    def postprocess(args, kwargs, position):
        conditioned, values, rest = given(position)
        found = util.constrain_fn(conditioned, args, kwargs, rest, return_deterministic=True)
        return values | {name: leaf for name, leaf in found.items() if name not in values}

    def start(key):
        key_discrete, key_continuous = jax.random.split(key)
        values = _discrete_start(model, latents, args, kwargs, strategy, key_discrete)
        conditioned = handlers.condition(model, cast(Any, values))
        info = initialize_model(
            key_continuous, conditioned, init_strategy=strategy, model_args=args, model_kwargs=kwargs, validate_grad=False
        )
        return values | info.param_info.z

    position = start(rng_key) if is_prng_key(rng_key) else jax.vmap(start)(rng_key)
    return Target(position, log_density, lambda args, kwargs: partial(postprocess, args, kwargs), latents.discrete)


def _discrete_start(
    model: Callable, latents: Latents, args: tuple, kwargs: dict, strategy: Callable, rng_key: PRNGKey
) -> dict[str, jax.Array]:
    """Return initial values of the discrete latents."""
    substituted = handlers.substitute(handlers.seed(model, rng_key), substitute_fn=_starting(strategy))
    with handlers.block(), handlers.trace() as trace:
        substituted(*args, **kwargs)
    return {name: jnp.asarray(trace[name]["value"], int) for name in latents.discrete.supports}


def _known(model: Callable, args: tuple, kwargs: dict) -> Known | None:
    """Return what is known of a log density that one ready-made energy makes up: a single site, one event, no weight.

    Its event has to be the position, on the reals or a discrete support, and its context none.
    """
    trace = trace_at_start(model, args, kwargs)
    name, unwrapped = _lone_energy(trace) or ("", None)
    if unwrapped is None or unwrapped.batch_shape or unwrapped.mask is not None or trace[name]["scale"] is not None:
        return None
    known = unwrapped.distribution.known
    is_position = known is not None and known.transform is None and unwrapped.distribution.context is None
    return known if is_position else None


def _lone_energy(trace: Mapping[str, Any]) -> tuple[str, Unwrapped] | None:
    """Return the name and the energy of the only site of a model; None for others."""
    sites = [name for name, site in trace.items() if site["type"] == "sample"]
    unwrapped = unwrap(trace[sites[0]]["fn"]) if len(sites) == 1 else None
    return None if unwrapped is None else (sites[0], unwrapped)
