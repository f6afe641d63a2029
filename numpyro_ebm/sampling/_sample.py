"""`sample`: warm-up and draws of all chains in one compiled program, run in blocks of transitions."""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.sharding import Mesh
from jaxtyping import Bool, Shaped

from numpyro_ebm._core import programs
from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.sharding import Placement
from numpyro_ebm._core.typing import Array, LogDensityFn, Position, PRNGKey, PRNGKeys, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels import AbstractKernel, chains
from numpyro_ebm.kernels.densities import Known, keep
from numpyro_ebm.kernels.layout import check_start, draw_start, rows_local, starts_of
from numpyro_ebm.kernels.names import kernel_of
from numpyro_ebm.kernels.starts import check_starts, initial_is_finite
from numpyro_ebm.sampling import target as _target

PerDraw: TypeAlias = Shaped[Array, "chains draws ..."]
"""Values of any shape, one per chain and draw."""
FIRST_BLOCK = 10
"""Transitions in the first block. Its time includes compilation, so it does not set the length of the next block."""
BLOCK_SECONDS = 0.5
"""Target duration of a block: an interruption loses at most one. Shorter blocks spend more time on calls and on copies."""


@dataclasses.dataclass(frozen=True)
class Draws:
    """Draws of MCMC chains, as `to_arviz` accepts them.

    Attributes:
        samples: draws by site, ``(num_chains, num_samples, ...)``, constrained, including deterministic sites.
        stats: statistics by name, ``(num_chains, num_samples)`` followed by any batch shape. They are those of
            ``acceptance_rate``, ``is_divergent``, ``num_gradients``, ``is_nonfinite``, ``energy``, ``tree_depth`` and
            ``swap_rate`` that the kernel lists in ``statistics`` (see `TransitionInfo`), and its ``step_size`` if it has
            one.
        kernel: the adapted kernel; ``num_chains`` is the leading axis of its leaves.
    """

    samples: dict[str, PerDraw]
    stats: dict[str, PerDraw]
    kernel: AbstractKernel

    def get_samples(self, *, group_by_chain: bool = False) -> dict[str, Array]:
        """Return the draws by site, with the chains merged unless ``group_by_chain`` (as ``MCMC.get_samples``)."""
        if group_by_chain:
            return self.samples
        return {name: value.reshape((-1, *value.shape[2:])) for name, value in self.samples.items()}


def sample(
    rng_key: PRNGKey,
    model_or_dist: Callable | EventDistribution,
    kernel: str | AbstractKernel | Mapping[str, Any] | None = None,
    *,
    params: PyTree | None = None,
    num_warmup: int = 500,
    num_samples: int = 1000,
    num_chains: int = 4,
    start: Callable[..., Array] | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    sharding: Mesh | int | None = None,
) -> Draws:
    """Draw from an energy or a model by MCMC, with all chains in one compiled program.

    Each chain adapts by itself during warm-up (step size and mass matrix, for kernels that adapt them), then draws. The
    program runs in blocks of about half a second, which does not change the draws. A keyboard interruption (Ctrl-C) ends the
    run with a warning and returns the draws so far.

    The log density is traced at each call, and the traced computation is the key of the compiled program. A second call with
    the same shapes therefore compiles nothing if only the arrays and coefficients in the log density differ.

    Args:
        rng_key: random key.
        model_or_dist: a NumPyro model, an `EnergyDistribution` or a `ScoreDistribution`. The site of a distribution is named
            "x", and each row of a batch shape has its own chains.
        kernel: a name or a kernel; None for "nuts", or "gibbs" if the target is discrete ("lattice_walk" for integers
            without a largest value). For a model or an event with several members (`Blocks`) also a mapping with a kernel
            for each latent site or member, ``{"x": "nuts", "s": "gibbs"}`` (see `BySite`), which is the default for an event
            with discrete and continuous members, and if discrete energies are latent beside continuous sites.
        params: values of the model's ``numpyro.param`` sites.
        num_warmup: warm-up transitions per chain, whose draws are discarded.
        num_samples: draws per chain.
        num_chains: number of chains.
        start: for a distribution, a sampler ``start(rng_key, distribution, sample_shape)`` that draws the initial events
            (`AnnealedLangevin`, say). None draws them from the base, or from a standard normal in unconstrained space, and
            redraws them with increasing spread where the density or its gradient is not finite.
        model_args: arguments of the model.
        model_kwargs: keyword arguments of the model.
        sharding: devices that share the chains, as for `fit`: a ``jax.sharding.Mesh``, whose first axis splits the chains of
            all rows evenly, or a number of devices; None for one. The devices exchange nothing, and their random keys are
            those of one device, so that the draws differ by rounding only (which the adaptation may amplify). With several
            processes (``jax.distributed``) each one makes the same call and gets all draws, and the program runs in one
            block.

    Returns:
        `Draws`.

    Warns:
        UserWarning: if an interruption ends the run early; the message gives the number of draws returned.

    Raises:
        EnergyError: (a ValueError) for invalid counts, an unknown kernel, a kernel that cannot move on the support, a model
            whose parameters have no value or whose latents are both discrete and continuous, and if no start with a finite
            log density and gradient is found; for chains that the devices cannot share evenly, and more devices than there
            are.
        TypeError: if ``model_or_dist`` is neither a model nor such a distribution, if ``params`` are given with a
            distribution, and if ``start`` is not a sampler or is given with a model.
        KeyboardInterrupt: for an interruption before the first draw.

    Example:
        >>> draws = sample(jax.random.key(0), EnergyDistribution(lambda x: 2.0 * x**2), num_samples=100)
        >>> draws.samples["x"].shape
        (4, 100)
    """
    check_key("sample", rng_key)
    key_start, key_run = jax.random.split(rng_key)
    placement = Placement.of(sharding)
    model_args, model_kwargs = as_arrays("sample", (tuple(model_args), dict(model_kwargs or {})))
    for name, count in {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}.items():
        check_count("sample", name, count, 0 if name == "num_warmup" else 1)
    if isinstance(model_or_dist, EventDistribution):
        if params is not None or model_args or model_kwargs:
            raise TypeError("params and arguments belong to a model; a distribution has its own. Leave them out.")
        check_start("sample", start)
        resolved = kernel_of(kernel, model_or_dist)
        resolved.bind(model_or_dist)  # inside the compiled program its values are not known
        starts = draw_start(start, key_start, model_or_dist, (num_chains,))
        if placement is not None:
            placement.check_count("sample", "num_chains", num_chains, math.prod(model_or_dist.batch_shape))
        task: Any = _OfDistribution(resolved, model_or_dist.closed(float if resolved.relaxes else None), num_chains)
    elif callable(model_or_dist) and not isinstance(model_or_dist, dist.Distribution):
        if start is not None:
            raise TypeError(
                "start belongs to a distribution; chains of a model start at NumPyro's initial values. Write start=None."
            )
        if placement is not None:
            placement.check_count("sample", "num_chains", num_chains)
        arguments: Any = (model_args, model_kwargs)
        resolved = _target.kernel_for(_target.check_model(model_or_dist, params, *arguments), kernel)
        fixed, keys, starts = _target.fixed(model_or_dist, params), jax.random.split(key_start, num_chains), None
        task = programs.compiled(lambda keys, kernel: _of_model(keys, kernel, fixed, *arguments), keys, resolved)
    else:
        raise TypeError(
            f"sample needs a NumPyro model or an EnergyDistribution; got {type(model_or_dist).__name__}. For "
            "several rows write EnergyDistribution(..., batch_shape=...)."
        )
    counts = {"num_warmup": num_warmup, "num_samples": num_samples}
    progress, finite = _begin(task, key_start, key_run, starts, **counts, placement=placement)
    check_outside_jit("sample", finite)
    check_starts(finite)
    progress = _in_blocks(task, progress, placement)
    if progress.num_samples < num_samples:
        warnings.warn(
            f"Interrupted: sample returns the first {progress.num_samples} of {num_samples} draws of each chain.",
            UserWarning,
            stacklevel=2,
        )
    samples, run = _finish(task, progress, placement=placement)
    return Draws(samples, _stats(run), run.kernel)


@partial(jax.tree_util.register_dataclass, data_fields=["kernel", "distribution"], meta_fields=["num_chains"])
@dataclasses.dataclass(frozen=True)
class _OfDistribution:
    """Chains of a distribution, ``num_chains`` for each of its rows."""

    kernel: AbstractKernel
    distribution: Any
    num_chains: int

    def bound(self) -> AbstractKernel:
        return self.kernel.bind(self.distribution)

    def density(self) -> tuple[LogDensityFn, PyTree]:
        return self.distribution.target(self.kernel), rows_local(self.distribution, self._shape)

    def start(self, rng_key: PRNGKey, starts: Array | None) -> tuple[Position, Bool[Array, " chains"]]:
        log_density, local = self.density()
        return starts_of(rng_key, self.distribution, log_density, starts, (self.num_chains,), local)

    def finish(self, run: chains.Run) -> tuple[dict[str, PerDraw], chains.Run]:
        positions = self.bound().as_draws(run.positions)
        draws, info = jax.vmap(jax.vmap(self.distribution.constrain))(positions), run.info
        if self.distribution.batch_shape:
            draws, info = jax.tree.map(lambda leaf: _rows_after_draws(leaf, self._shape), (draws, info))
        return {"x": draws}, run._replace(info=info)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_chains, *self.distribution.batch_shape)


class _OfModel(NamedTuple):
    """Chains of the latents of a model, with its log density and postprocessing as traced programs."""

    kernel: AbstractKernel
    positions: Position
    log_density: Any
    postprocess: Any
    energy: AbstractEnergy | None

    def bound(self) -> AbstractKernel:
        return self.kernel

    def density(self) -> tuple[LogDensityFn, PyTree]:
        known = None if self.energy is None else Known(self.energy)
        return keep(lambda position, _: self.log_density(position), known), None

    def start(self, rng_key: PRNGKey, starts: None) -> tuple[Position, Bool[Array, " chains"]]:
        return self.positions, jax.vmap(lambda z: initial_is_finite(self.log_density, z))(self.positions)

    def finish(self, run: chains.Run) -> tuple[dict[str, PerDraw], chains.Run]:
        return jax.vmap(jax.vmap(self.postprocess))(self.kernel.as_draws(run.positions)), run


def _of_model(keys: PRNGKeys, kernel: AbstractKernel, model: Callable, args: tuple, kwargs: dict[str, Any]) -> _OfModel:
    target = _target.make_target(keys, model, kernel, args, kwargs)
    kernel = kernel.bind(target)
    positions = kernel.as_positions(target.position)
    position = jax.tree.map(lambda leaf: leaf[0], positions)
    log_density = programs.trace(target.log_density(args, kwargs), position, order=1)
    postprocess = programs.trace(target.postprocess(args, kwargs), kernel.as_draws(position))
    energy = None if target.known is None else target.known.energy
    return _OfModel(kernel, positions, log_density, postprocess, energy)


@programs.jit(static_argnames=("num_warmup", "num_samples", "placement"))
def _begin(task, key_start, key_run, starts, *, num_warmup, num_samples, placement):
    """Return the chains before their first transition, and whether the density is finite at each start."""
    positions, finite = task.start(key_start, starts)
    counts = {"num_warmup": num_warmup, "num_samples": num_samples}
    log_density, local = task.density()
    progress = chains.begin(key_run, task.bound(), log_density, positions, local, **counts)
    if placement is None:
        return progress, finite
    # No device needs to hold the draws of all.
    return progress._replace(draws=placement.split(progress.draws)), placement.gathered(finite)


@programs.jit(static_argnames=("placement",))
def _go_on(task, progress, stop, *, placement):
    log_density, local = task.density()
    if placement is None:
        return chains.go_on(progress, task.bound(), log_density, local, stop)

    def part(states, warmups, draws, local, task, step, keys, stop):
        own, axis = chains.Progress(step, states, warmups, draws, keys), placement.axis_name
        return chains.go_on(own, task.bound(), task.density()[0], local, stop, axis).of_chains()

    whole = (task, progress.step, progress.keys, stop)
    states, warmups, draws = placement.on_each_part(part, *progress.of_chains(), local, whole=whole)
    return progress._replace(step=stop, states=states, warmups=warmups, draws=draws)


@programs.jit(static_argnames=("placement",))
def _finish(task, progress, *, placement):
    run = progress.so_far()
    if placement is not None and jax.process_count() > 1:  # each process can read only what lies on its own devices
        run = placement.on_each_part(lambda own: own, run, gathers=True)
    return task.finish(run)


def _in_blocks(task: _OfDistribution | _OfModel, progress: chains.Progress, placement: Placement | None) -> chains.Progress:
    """Run the chains to the end. An interruption keeps the draws so far, and is raised if there are none."""
    num_steps, num_warmup, done, length = len(progress.keys), progress.num_warmup, 0, FIRST_BLOCK
    if placement is not None and jax.process_count() > 1:
        length = num_steps  # all processes have to run the same blocks, and their clocks differ
    try:
        while done < num_steps:
            began, stop = time.perf_counter(), min(done + length, num_steps)
            progress = jax.block_until_ready(_go_on(task, progress, np.int32(stop), placement=placement))
            is_compiled = done > 0
            done = stop
            if is_compiled:
                length = _next_length(length, time.perf_counter() - began)
    except KeyboardInterrupt:
        kept = done - num_warmup
        if kept <= 0:
            raise
        progress = progress._replace(draws=jax.tree.map(lambda leaf: leaf[:, :kept], progress.draws))
    return progress


def _next_length(length: int, seconds: float) -> int:
    """Return how many transitions take `BLOCK_SECONDS` if ``length`` take ``seconds``, at most 16 times ``length``."""
    return max(1, int(length * min(BLOCK_SECONDS / max(seconds, 1e-9), 16)))


def _stats(run: chains.Run) -> dict[str, PerDraw]:
    stats = {name: getattr(run.info, name) for name in run.kernel.statistics}
    shape, step_size = run.info.acceptance_rate.shape, run.kernel.step_size
    per_chain = (shape[0], *shape[2:])  # the rows come after the draws
    if step_size is not None and jnp.shape(step_size) == (math.prod(per_chain),):
        stats["step_size"] = jnp.broadcast_to(step_size.reshape(shape[0], 1, *shape[2:]), shape)
    return stats


def _rows_after_draws(leaf: Shaped[Array, "rows draws ..."], batch_shape: tuple[int, ...]) -> PerDraw:
    """Reshape ``(chains * rows, draws, ...)`` to ``(chains, draws, *rows, ...)``."""
    leaf = leaf.reshape((*batch_shape, *leaf.shape[1:]))
    return jnp.moveaxis(leaf, len(batch_shape), 1)
