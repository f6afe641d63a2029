"""`sample`: warm-up and draws of all chains by one compiled program, a block of transitions at a time."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm import _models, chains
from numpyro_ebm._callables import assemble, dismantle
from numpyro_ebm._doors import as_arrays, check_key, check_outside_jit
from numpyro_ebm._errors import EnergyError, check_count
from numpyro_ebm._events import EventDistribution
from numpyro_ebm._reads import reads
from numpyro_ebm._typing import Array, LogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels import AbstractKernel, resolve_kernel
from numpyro_ebm.samplers import check_start, draw_start, rows_local, to_positions

FIRST_BLOCK = 50  # transitions
SHORTEST_BLOCK = 0.5  # seconds
COPIED_PER_SECOND = 1e8  # bytes; memory is twenty times as fast


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
    """Draw from an energy or a model by MCMC, all chains in one compiled loop.

    Each chain warms up by itself (step size and mass matrix, of kernels that adapt), then draws. The loop runs in blocks of
    about half a second, which do not change the draws: an interruption from the keyboard returns those of the blocks until
    then, with a warning. A second call with the same shapes compiles nothing: for a distribution its energy's arrays, for a
    model ``params`` and the arrays in its arguments may change. The model is the cache's key, and what it reads beside its
    arguments (globals, closures): pass the same function.

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
            chains start (`AnnealedLangevin`, say); None for the base, or a standard normal in unconstrained space.
        model_args: arguments of the model.
        model_kwargs: keyword arguments of the model.

    Returns:
        `Draws`.

    Raises:
        EnergyError: (a ValueError) for counts that are none, an unknown kernel, one that cannot move on the support, a
            model whose parameters have no value, one with both discrete and continuous latents, and a start where the log
            density is not finite.
        KeyboardInterrupt: for an interruption during the warm-up.
        TypeError: for something that is neither a model nor such a distribution, for params beside the latter, and for a
            start that is no sampler or is beside a model.

    Example:
        >>> draws = sample(jax.random.key(0), EnergyDistribution(lambda x: 2.0 * x**2), num_samples=100)
        >>> draws.samples["x"].shape
        (4, 100)
    """
    counts = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    check_key("sample", rng_key)
    args, kwargs = as_arrays("sample", (tuple(model_args), dict(model_kwargs or {})))
    for name, count in counts.items():
        check_count("sample", name, count, 0 if name == "num_warmup" else 1)
    if isinstance(model_or_dist, EventDistribution):
        if params is not None or args or kwargs:
            raise TypeError("params and arguments belong to a model; a distribution holds its own.")
        check_start("sample", start)
        resolved = resolve_kernel(kernel, is_discrete=model_or_dist.is_discrete)
        key_start, key_run = jax.random.split(rng_key)
        starts = draw_start(start, key_start, model_or_dist, (num_chains,))
        job: Any = _OfDistribution(resolved, model_or_dist, num_chains)
    elif callable(model_or_dist) and not isinstance(model_or_dist, dist.Distribution):
        if start is not None:
            raise TypeError("start belongs to a distribution; chains of a model start where NumPyro's do. Write start=None.")
        resolved = _models.kernel_for(_models.check_model(model_or_dist, params, args, kwargs), kernel)
        arrays, structure = dismantle((args, kwargs))
        key_start, key_run = jax.random.split(rng_key)
        starts, given = None, dict(params or {})
        job = _OfModel(resolved, given, arrays, num_chains, model_or_dist, structure, reads(model_or_dist))
    else:
        raise TypeError(
            f"sample needs a NumPyro model or an EnergyDistribution; got {type(model_or_dist).__name__}. Rows go "
            "into EnergyDistribution(..., batch_shape=...)."
        )
    progress, finite = _begin(job, key_start, key_run, starts, num_warmup=num_warmup, num_samples=num_samples)
    check_outside_jit("sample", finite)
    if not bool(jnp.all(finite)):
        raise EnergyError(
            "A chain starts where the log density or its gradient is not finite. Look at the energy there, or give the "
            "EnergyDistribution a base that covers where it is finite."
        )
    samples, run = _finish(job, _in_blocks(job, progress))
    kept = run.info.acceptance_rate.shape[1]
    if kept < num_samples:
        warnings.warn(
            f"Interrupted: sample returns the {kept} of {num_samples} draws of each chain that it had.",
            UserWarning,
            stacklevel=2,
        )
    return Draws(samples, _stats(run), run.kernel)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "distribution"], meta_fields=["num_chains"])
@dataclasses.dataclass(frozen=True)
class _OfDistribution:
    """Chains of a distribution, one per row in each of ``num_chains``."""

    kernel: AbstractKernel
    distribution: Any
    num_chains: int

    def starts(self, rng_key: PRNGKey, starts: Array | None) -> Position:
        drawn = self.distribution.reference_sample(rng_key, (self.num_chains,)) if starts is None else starts
        return to_positions(self.distribution, drawn)

    @property
    def bound(self) -> AbstractKernel:
        return self.kernel.bind(self.distribution)

    @property
    def density(self) -> tuple[LogDensityFn, PyTree]:
        return self.distribution.target(self.kernel), rows_local(self.distribution, self._shape)

    def draws(self, run: chains.Run) -> tuple[dict[str, Array], chains.Run]:
        draws, info = jax.vmap(jax.vmap(self.distribution.constrain))(run.positions), run.info
        if self.distribution.batch_shape:
            draws, info = jax.tree.map(lambda leaf: _rows_after_draws(leaf, self._shape), (draws, info))
        return {"x": draws}, run._replace(info=info)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_chains, *self.distribution.batch_shape)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["kernel", "params", "arrays"],
    meta_fields=["num_chains", "model", "structure", "reads"],
)
@dataclasses.dataclass(frozen=True)
class _OfModel:
    """Chains of a model's latents."""

    kernel: AbstractKernel
    params: dict[str, Any]
    arrays: list[Any]
    num_chains: int
    model: Callable
    structure: Any
    reads: Hashable

    def starts(self, rng_key: PRNGKey, starts: None) -> Position:
        return self._target(jax.random.split(rng_key, self.num_chains)).position

    @property
    def bound(self) -> AbstractKernel:
        return self.kernel.bind(self._target()) if self.kernel.is_discrete else self.kernel

    @property
    def density(self) -> tuple[LogDensityFn, PyTree]:
        log_density = self._target().log_density(*self._arguments)
        return lambda z, _: log_density(z), None

    def draws(self, run: chains.Run) -> tuple[dict[str, Array], chains.Run]:
        return jax.vmap(jax.vmap(self._target().postprocess(*self._arguments)))(run.positions), run

    @property
    def _arguments(self) -> tuple[tuple, dict[str, Any]]:
        return assemble(self.arrays, self.structure)

    def _target(self, keys: PRNGKey | None = None) -> _models.Target:
        keys = jax.random.key(0) if keys is None else keys  # the starts of this one are not used
        return _models.make_target(keys, _models.fixed(self.model, self.params), *self._arguments)


_Job = _OfDistribution | _OfModel


@partial(jax.jit, static_argnames=("num_warmup", "num_samples"))
def _begin(job: _Job, key_start, key_run, starts, *, num_warmup, num_samples):
    """The chains before their first transition, and which of them are where the density is finite."""
    positions, (log_density, local) = job.starts(key_start, starts), job.density
    finite = jax.vmap(lambda x, row: _models.initial_is_finite(lambda z: log_density(z, row), x))(positions, local)
    counts = {"num_warmup": num_warmup, "num_samples": num_samples}
    return chains.begin(key_run, job.bound, log_density, positions, local, **counts), finite


@jax.jit
def _go_on(job: _Job, progress: chains.Progress, stop: Array) -> chains.Progress:
    return chains.go_on(progress, *job.density, stop)


@jax.jit
def _finish(job: _Job, progress: chains.Progress) -> tuple[dict[str, Array], chains.Run]:
    return job.draws(chains.so_far(progress))


def _in_blocks(job: _Job, progress: chains.Progress) -> chains.Progress:
    """All transitions, or those before an interruption; in warm-up that is raised.

    A block copies the draws so far: where they are many it is longer, and copying stays a small part of it.
    """
    num_steps, num_samples = len(progress.keys), progress.draws[1].acceptance_rate.shape[1]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(progress.draws))
    done, length, seconds = 0, FIRST_BLOCK, max(SHORTEST_BLOCK, size / COPIED_PER_SECOND)
    try:
        while done < num_steps:
            began, stop = time.perf_counter(), min(done + length, num_steps)
            progress, done = jax.block_until_ready(_go_on(job, progress, jnp.asarray(stop, jnp.int32))), stop
            taken = time.perf_counter() - began
            if done > FIRST_BLOCK:  # the first may have been compiled as well
                length = _next_length(length, taken, seconds)
    except KeyboardInterrupt:
        kept = done - (num_steps - num_samples)
        if kept <= 0:
            raise
        progress = progress._replace(draws=jax.tree.map(lambda leaf: leaf[:, :kept], progress.draws))
    return progress


def _next_length(length: int, taken: float, wanted: float) -> int:
    """How many transitions take the time that is wanted, by what the last block took; 16 times as many at most."""
    return 16 * length if taken < wanted / 16 else max(1, int(length * wanted / taken))


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
