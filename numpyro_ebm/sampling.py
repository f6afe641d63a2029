"""`sample`: warm-up and draws of all chains as one compiled program."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm import _models, _programs, chains
from numpyro_ebm._doors import as_arrays, check_key, check_outside_jit
from numpyro_ebm._errors import check_count
from numpyro_ebm._events import EventDistribution
from numpyro_ebm._starts import check_starts, initial_is_finite
from numpyro_ebm._typing import Array, PRNGKey, PyTree
from numpyro_ebm.kernels import AbstractKernel, resolve_kernel
from numpyro_ebm.samplers import check_start, draw_start, rows_local, starts_of


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws of MCMC chains, as `to_arviz` takes them.

    Attributes:
        samples: by site, ``(num_chains, num_samples, ...)``, constrained; deterministic sites included.
        stats: by name, ``(num_chains, num_samples)`` or longer: what the kernel's ``statistics`` names of
            ``acceptance_rate``, ``is_divergent``, ``num_gradients``, ``is_nonfinite``, ``energy``, ``tree_depth`` and
            ``swap_rate`` (see `TransitionInfo`), and its ``step_size`` if it has one (not for a distribution with rows).
        kernel: the adapted kernel, its leaves led by ``num_chains``.
    """

    samples: dict[str, Array]
    stats: dict[str, Array]
    kernel: AbstractKernel

    def get_samples(self, *, group_by_chain: bool = False) -> dict[str, Array]:
        """Draws by site, chains merged unless asked otherwise (as ``MCMC.get_samples``)."""
        if group_by_chain:
            return self.samples
        return {name: value.reshape((-1, *value.shape[2:])) for name, value in self.samples.items()}


def sample(
    rng_key: PRNGKey,
    model_or_dist: Callable | EventDistribution,
    kernel: Any = None,
    *,
    params: PyTree | None = None,
    num_warmup: int = 500,
    num_samples: int = 1000,
    num_chains: int = 4,
    start: Callable[..., Array] | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> Draws:
    """Draw from an energy or a model by MCMC, all chains in one compiled program.

    Each chain warms up by itself (step size and mass matrix, of kernels that adapt), then draws. A second call with the
    same shapes compiles nothing as long as the energy, or the model's log density, computes the same from other arrays and
    coefficients: it is traced at each call, and what it computes is the key.

    Args:
        rng_key: random key.
        model_or_dist: a NumPyro model, an `EnergyDistribution` or a `ScoreDistribution`; the site of the latter two is
            called "x", and each row of a batch shape has chains of its own.
        kernel: a name or a kernel; None for "nuts", and "gibbs" where what is sampled is discrete.
        params: values of the model's ``numpyro.param`` sites.
        num_warmup: adapted transitions per chain, thrown away.
        num_samples: draws per chain.
        num_chains: chains.
        start: for a distribution, a sampler, ``start(rng_key, distribution, sample_shape)``, whose draws are where the
            chains start (`AnnealedLangevin`, say); None for the base, or a standard normal in unconstrained space. Where
            the density or its gradient is not finite there, others are tried, farther and farther out.
        model_args: arguments of the model.
        model_kwargs: keyword arguments of the model.

    Returns:
        `Draws`.

    Raises:
        EnergyError: (a ValueError) for counts that are none, an unknown kernel, one that cannot move on the support, a
            model whose parameters have no value, one with both discrete and continuous latents, and where no start
            with a finite log density and gradient was found.
        TypeError: for something that is neither a model nor such a distribution, for params beside the latter, and for a
            start that is no sampler or is beside a model.

    Example:
        >>> draws = sample(jax.random.key(0), EnergyDistribution(lambda x: 2.0 * x**2), num_samples=100)
        >>> draws.samples["x"].shape
        (4, 100)
    """
    counts = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    check_key("sample", rng_key)
    model_args, model_kwargs = as_arrays("sample", (tuple(model_args), dict(model_kwargs or {})))
    for name, count in counts.items():
        check_count("sample", name, count, 0 if name == "num_warmup" else 1)
    if isinstance(model_or_dist, EventDistribution):
        if params is not None or model_args or model_kwargs:
            raise TypeError("params and arguments belong to a model; a distribution holds its own.")
        check_start("sample", start)
        resolved = resolve_kernel(kernel, is_discrete=model_or_dist.is_discrete)
        key_start, key_run = jax.random.split(rng_key)
        starts = draw_start(start, key_start, model_or_dist, (num_chains,))
        samples, run, finite = _sample_distribution(key_start, key_run, resolved, model_or_dist.closed(), starts, **counts)
    elif callable(model_or_dist) and not isinstance(model_or_dist, dist.Distribution):
        if start is not None:
            raise TypeError("start belongs to a distribution; chains of a model start where NumPyro's do. Write start=None.")
        arguments: Any = (model_args, model_kwargs)
        resolved = _models.kernel_for(_models.check_model(model_or_dist, params, *arguments), kernel)
        key_start, key_run = jax.random.split(rng_key)
        fixed, keys = _models.fixed(model_or_dist, params), jax.random.split(key_start, num_chains)
        started = _programs.compiled(lambda keys, kernel: _start_of_model(keys, kernel, fixed, *arguments), keys, resolved)
        samples, run, finite = _sample_model(key_run, *started, **counts)
    else:
        raise TypeError(
            f"sample needs a NumPyro model or an EnergyDistribution; got {type(model_or_dist).__name__}. Rows go "
            "into EnergyDistribution(..., batch_shape=...)."
        )
    check_outside_jit("sample", finite)
    check_starts(finite)
    return Draws(samples, _stats(run), run.kernel)


@_programs.jit(static_argnames=("num_warmup", "num_samples", "num_chains"))
def _sample_distribution(key_start, key_run, kernel, distribution, starts, *, num_warmup, num_samples, num_chains):
    kernel = kernel.bind(distribution)
    batch_shape = (num_chains, *distribution.batch_shape)
    log_density, local = distribution.target(kernel), rows_local(distribution, batch_shape)
    positions, finite = starts_of(key_start, distribution, log_density, starts, (num_chains,), local)
    run = chains.run(key_run, kernel, log_density, positions, local, num_warmup=num_warmup, num_samples=num_samples)
    draws = jax.vmap(jax.vmap(distribution.constrain))(run.positions)
    info = run.info
    if distribution.batch_shape:
        draws, info = jax.tree.map(lambda leaf: _rows_after_draws(leaf, batch_shape), (draws, info))
    return {"x": draws}, run._replace(info=info), finite


def _start_of_model(keys, kernel, model, args, kwargs):
    """The kernel and where the chains start, and the model's log density and postprocessing as programs."""
    target = _models.make_target(keys, model, args, kwargs)
    kernel = kernel if target.discrete_values is None else kernel.bind(target)
    positions = chains.as_positions(kernel, target.position)
    position = jax.tree.map(lambda leaf: leaf[0], positions)
    log_density = _programs.trace(target.log_density(args, kwargs), position, order=1)
    return kernel, positions, log_density, _programs.trace(target.postprocess(args, kwargs), position)


@_programs.jit(static_argnames=("num_warmup", "num_samples", "num_chains"))
def _sample_model(key_run, kernel, positions, log_density, postprocess, *, num_warmup, num_samples, num_chains):
    finite = jax.vmap(lambda z: initial_is_finite(log_density, z))(positions)
    target = lambda z, _: log_density(z)  # noqa: E731
    run = chains.run(key_run, kernel, target, positions, num_warmup=num_warmup, num_samples=num_samples)
    return jax.vmap(jax.vmap(postprocess))(run.positions), run, finite


def _stats(run: chains.Run) -> dict[str, Array]:
    stats = {name: getattr(run.info, name) for name in run.kernel.statistics}
    num_draws = run.info.acceptance_rate.shape
    if run.kernel.step_size is not None and jnp.shape(run.kernel.step_size) == num_draws[:1]:
        stats["step_size"] = jnp.broadcast_to(run.kernel.step_size[:, None], num_draws)
    return stats


def _rows_after_draws(leaf: Array, batch_shape: tuple[int, ...]) -> Array:
    """From ``(chains * rows, draws, ...)`` to ``(chains, draws, *rows, ...)``."""
    leaf = leaf.reshape((*batch_shape, *leaf.shape[1:]))
    return jnp.moveaxis(leaf, len(batch_shape), 1)
