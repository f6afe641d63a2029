"""A batch of chains, run by one scan."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._typing import Array, LogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels import AbstractKernel, TransitionInfo, adaptation


class ChainHealth(NamedTuple):
    """Figures of a batch of chains, averaged over steps and chains.

    Attributes:
        acceptance_rate: mean acceptance probability.
        divergence_rate: fraction of divergent transitions.
        nonfinite_rate: fraction of transitions whose proposal had no finite log density (a kernel that rejects it hides
            it).
        swap_rate: mean acceptance of swaps between temperatures; NaN for a kernel without them.
        num_gradients: gradient evaluations per chain.
    """

    acceptance_rate: Array
    divergence_rate: Array
    nonfinite_rate: Array
    swap_rate: Array
    num_gradients: Array


class Run(NamedTuple):
    """Draws of a batch of chains.

    Attributes:
        positions: pytree, leaves ``(num_chains, num_samples, ...)``, unconstrained.
        info: `TransitionInfo` with fields ``(num_chains, num_samples)``.
        kernel: the adapted kernel, its leaves led by ``num_chains``.
    """

    positions: Position
    info: TransitionInfo
    kernel: AbstractKernel


def num_chains_of(positions: Position) -> int:
    """How many chains a batch of positions holds."""
    return jax.tree.leaves(positions)[0].shape[0]


def as_positions(kernel: AbstractKernel, tree: PyTree) -> PyTree:
    """Every leaf in one type: whole numbers for a discrete kernel, else float64 under x64 and float32 otherwise."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=int if kernel.is_discrete else float), tree)


def advance(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_steps: int,
    temperatures: Array | None = None,
) -> tuple[Position, ChainHealth]:
    """Move every chain by ``num_steps`` transitions and keep the last positions only.

    The chains are scored anew under ``log_density`` first, so a parameter update between two calls is seen. No record is
    kept of the steps: memory does not grow with them.

    Args:
        rng_key: random key.
        kernel: the kernel, its settings shared by the chains.
        log_density: ``log_density(position, local)`` of one chain.
        positions: leaves ``(num_chains, ...)``.
        local: what each chain's log density has of its own, leaves ``(num_chains, ...)``, or None.
        num_steps: transitions per chain.
        temperatures: ``(num_steps,)``; transition i leaves ``exp(log_density / temperatures[i])`` invariant. The chains
            are scored anew at each of them. None for 1 throughout.

    Returns:
        The new positions and the `ChainHealth` of the run.
    """
    positions = as_positions(kernel, positions)
    num_chains = num_chains_of(positions)

    def start(key, position, row, temperature):
        return kernel.init(key, position, _at(log_density, position, row, temperature))

    def step_one(key, state, row, temperature):
        if temperature is not None:
            key, key_init = jax.random.split(key)
            state = start(key_init, state.position, row, temperature)
        return kernel.step(key, state, _at(log_density, state.position, row, temperature))

    def step_all(carry, inputs):
        states, totals = carry
        key, temperature = inputs
        keys = jax.random.split(key, num_chains)
        states, info = jax.vmap(step_one, in_axes=(0, 0, 0, None))(keys, states, local, temperature)
        seen = (info.acceptance_rate, info.is_divergent, info.is_nonfinite, info.swap_rate, info.num_gradients)
        totals = jax.tree.map(lambda total, new: total + jnp.mean(new, dtype=float), totals, ChainHealth(*seen))
        return (states, totals), None

    key_init, key_steps = jax.random.split(rng_key)
    first = None if temperatures is None else temperatures[0]
    keys = jax.random.split(key_init, num_chains)
    states = jax.vmap(start, in_axes=(0, 0, 0, None))(keys, positions, local, first)
    zeros = ChainHealth(*(jnp.zeros((), float),) * len(ChainHealth._fields))
    inputs = (jax.random.split(key_steps, num_steps), temperatures)
    (states, totals), _ = jax.lax.scan(step_all, (states, zeros), inputs, length=num_steps)
    means = jax.tree.map(lambda total: total / num_steps, totals)
    return states.position, means._replace(num_gradients=totals.num_gradients)


class Progress(NamedTuple):
    """A run on its way.

    Attributes:
        step: transitions made, warm-up included.
        states: of the chains.
        warmups: of the chains, the kernels as adapted so far in them.
        draws: positions and `TransitionInfo` as in `Run`, zeros where there is none yet.
        keys: of all transitions.
    """

    step: Any
    states: Any
    warmups: adaptation.WarmupState
    draws: tuple[Position, TransitionInfo]
    keys: PRNGKey


def run(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_warmup: int,
    num_samples: int,
) -> Run:
    """Warm up each chain by itself, then draw from it.

    Args:
        rng_key: random key.
        kernel: the kernel; its warm-up starts from its own settings.
        log_density: ``log_density(position, local)`` of one chain.
        positions: where the chains start, leaves ``(num_chains, ...)``.
        local: as in `advance`.
        num_warmup: adapted transitions, thrown away.
        num_samples: transitions kept.

    Returns:
        The draws, their statistics and the adapted kernel of each chain.
    """
    counts = {"num_warmup": num_warmup, "num_samples": num_samples}
    progress = begin(rng_key, kernel, log_density, positions, local, **counts)
    return so_far(go_on(progress._replace(step=0), log_density, local, num_warmup + num_samples))


def begin(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_warmup: int,
    num_samples: int,
) -> Progress:
    """The start of a `run`, with the same arguments, before its first transition."""
    positions = jax.vmap(kernel.lift)(as_positions(kernel, positions))
    num_chains = num_chains_of(positions)

    def start(key, position, row):
        return kernel.init(key, position, _at(log_density, position, row)), adaptation.start(kernel, position)

    key_init, key_steps = jax.random.split(rng_key)
    states, warmups = jax.vmap(start)(jax.random.split(key_init, num_chains), positions, local)
    _, info = jax.eval_shape(lambda: _transition(rng_key, states, warmups, log_density, local))
    draws = jax.tree.map(
        lambda leaf: jnp.zeros((num_chains, num_samples, *leaf.shape[1:]), leaf.dtype),
        (jax.vmap(kernel.lower)(positions), info),
    )
    return Progress(jnp.zeros((), jnp.int32), states, warmups, draws, jax.random.split(key_steps, num_warmup + num_samples))


def go_on(progress: Progress, log_density: LogDensityFn, local: PyTree, stop: Any) -> Progress:
    """The run after ``stop`` transitions, whatever they were cut into: the draws are the same."""
    num_warmup = len(progress.keys) - progress.draws[1].acceptance_rate.shape[1]
    stages = adaptation.schedule(progress.warmups.kernel, num_warmup)

    def step_all(i, carry):
        # One loop for warm-up and draws: the kernel, NUTS above all, is compiled once.
        states, warmups, draws = carry
        states, info = _transition(progress.keys[i], states, warmups, log_density, local)
        if num_warmup:
            warmups = jax.vmap(partial(adaptation.update_at, stages, i))(warmups, states.position, info)
        kept = jnp.maximum(i - num_warmup, 0)
        new = (jax.vmap(_lower)(warmups, states.position), info)
        draws = jax.tree.map(lambda all_, new: all_.at[:, kept].set(new), draws, new)
        return states, warmups, draws

    # With numbers at both ends this is a scan; otherwise a while loop, one program for blocks of any length.
    start = (progress.states, progress.warmups, progress.draws)
    states, warmups, draws = jax.lax.fori_loop(progress.step, stop, step_all, start)
    return Progress(stop, states, warmups, draws, progress.keys)


def so_far(progress: Progress) -> Run:
    """What a run has come to."""
    return Run(*progress.draws, progress.warmups.kernel)


def _transition(rng_key: PRNGKey, states: Any, warmups: Any, log_density: LogDensityFn, local: PyTree):
    """One transition of every chain, by the kernel as adapted in it."""

    def step_one(key, state, warmup, row):
        return warmup.kernel.step(key, state, _at(log_density, state.position, row))

    keys = jax.random.split(rng_key, num_chains_of(states.position))
    return jax.vmap(step_one)(keys, states, warmups, local)


def _lower(warmup: adaptation.WarmupState, position: Position) -> Position:
    return warmup.kernel.lower(position)


def _at(
    log_density: LogDensityFn, position: Position, row: PyTree, temperature: Array | None = None
) -> Callable[[Position], Array]:
    """The log density of one chain, in the type of its position (a scan needs it fixed)."""
    dtype = jnp.result_type(*jax.tree.leaves(position), float)
    if temperature is None:
        return lambda x: jnp.asarray(log_density(x, row), dtype)
    return lambda x: jnp.asarray(log_density(x, row) / temperature, dtype)
