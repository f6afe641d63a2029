"""A batch of chains, run by one scan."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._core.typing import Array, LogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels import adaptation
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo

YOUNG, FORGETTING, LEAST_RATE = 10.0, 0.6, 0.02
"""Transitions after which a chain's own step size settles, how fast, and what it keeps on following by."""


class ChainHealth(NamedTuple):
    """Figures of a batch of chains, averaged over steps and chains.

    Attributes:
        acceptance_rate: mean acceptance probability.
        divergence_rate: fraction of divergent transitions.
        nonfinite_rate: fraction of transitions whose proposal had no finite log density (a kernel that rejects it hides
            it).
        swap_rate: mean acceptance of swaps between temperatures; None for a kernel without them.
        num_gradients: gradient evaluations per chain.
    """

    acceptance_rate: Array
    divergence_rate: Array
    nonfinite_rate: Array
    swap_rate: Array | None
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


class Pace(NamedTuple):
    """Step sizes of chains of different densities, each by itself.

    A chain's step is that of the kernel times ``exp(log_factor)`` (its square where the step is a squared length). It
    follows the chain's own acceptance, transition by transition, by amounts that fall with its age. A chain that never moves
    is freed within a few transitions, and an old one is hardly disturbed.

    Attributes:
        log_factor: ``(num_chains,)``.
        age: ``(num_chains,)``, transitions of each chain so far.
        largest: the log factor that is not exceeded, a number.
    """

    log_factor: Array
    age: Array
    largest: Array

    def apply(self, kernel: AbstractKernel) -> AbstractKernel:
        """The kernel of one chain, whose fields these are."""
        return kernel.adapted(step_size=kernel.step_size * jnp.exp(2 * kernel.step_exponent * self.log_factor))

    def next(self, kernel: AbstractKernel, acceptance_rate: Array) -> "Pace":
        """After one transition (Robbins and Monro)."""
        rate = jnp.maximum((1.0 + self.age / YOUNG) ** -FORGETTING, LEAST_RATE)
        error = jnp.nan_to_num(acceptance_rate) - jnp.asarray(kernel.target_acceptance)
        return self._replace(log_factor=jnp.minimum(self.log_factor + rate * error, self.largest), age=self.age + 1)


class Advanced(NamedTuple):
    """Where a batch of chains came to.

    Attributes:
        positions: leaves ``(num_chains, ...)``.
        health: figures of the run.
        gradient: of the log density there, where the kernel keeps it, or None.
        pace: the step sizes after the run, or None.
    """

    positions: Position
    health: ChainHealth
    gradient: Position | None
    pace: Pace | None


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
    advanced = advance_at_pace(
        rng_key, kernel, log_density, positions, local, num_steps=num_steps, temperatures=temperatures
    )
    return advanced.positions, advanced.health


def advance_at_pace(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_steps: int,
    temperatures: Array | None = None,
    pace: Pace | None = None,
) -> Advanced:
    """`advance` with a step size for each chain, which adapts on the way; None for the kernel's own."""
    positions = as_positions(kernel, positions)
    num_chains = num_chains_of(positions)
    has_swaps = "swap_rate" in kernel.statistics

    def start(key, position, row, temperature):
        return kernel.init(key, position, _at(log_density, position, row, temperature))

    def step_one(key, state, row, pace, temperature):
        if temperature is not None:
            key, key_init = jax.random.split(key)
            state = start(key_init, state.position, row, temperature)
        own = kernel if pace is None else pace.apply(kernel)
        state, info = own.step(key, state, _at(log_density, state.position, row, temperature))
        return state, info, None if pace is None else pace.next(kernel, info.acceptance_rate)

    pace_axes = None if pace is None else Pace(log_factor=0, age=0, largest=None)  # pyright: ignore[reportArgumentType]

    def step_all(carry, inputs):
        states, pace, totals = carry
        key, temperature = inputs
        keys = jax.random.split(key, num_chains)
        move = jax.vmap(step_one, in_axes=(0, 0, 0, pace_axes, None), out_axes=(0, 0, pace_axes))
        states, info, pace = move(keys, states, local, pace, temperature)
        swap_rate = info.swap_rate if has_swaps else None
        seen = (info.acceptance_rate, info.is_divergent, info.is_nonfinite, swap_rate, info.num_gradients)
        totals = jax.tree.map(lambda total, new: total + jnp.mean(new, dtype=float), totals, ChainHealth(*seen))
        return (states, pace, totals), None

    key_init, key_steps = jax.random.split(rng_key)
    first = None if temperatures is None else temperatures[0]
    keys = jax.random.split(key_init, num_chains)
    states = jax.vmap(start, in_axes=(0, 0, 0, None))(keys, positions, local, first)
    zero = jnp.zeros((), float)
    zeros = ChainHealth(zero, zero, zero, zero if has_swaps else None, zero)
    inputs = (jax.random.split(key_steps, num_steps), temperatures)
    (states, pace, totals), _ = jax.lax.scan(step_all, (states, pace, zeros), inputs, length=num_steps)
    means = jax.tree.map(lambda total: total / num_steps, totals)
    health = means._replace(num_gradients=totals.num_gradients)
    return Advanced(states.position, health, jax.vmap(kernel.gradient)(states), pace)


class Progress(NamedTuple):
    """The state of a run between two of its transitions.

    Attributes:
        step: transitions made, warm-up included.
        states: of the chains.
        warmups: of the chains, with the kernels as adapted so far.
        draws: positions and `TransitionInfo` as in `Run`; zeros for draws that are still to come.
        keys: of all transitions.
    """

    step: Array
    states: Any
    warmups: adaptation.WarmupState
    draws: tuple[Position, TransitionInfo]
    keys: PRNGKey

    @property
    def num_samples(self) -> int:
        """Draws of each chain, those still to come included."""
        return self.draws[1].acceptance_rate.shape[1]

    @property
    def num_warmup(self) -> int:
        """Transitions of each chain before the first draw."""
        return len(self.keys) - self.num_samples

    def so_far(self) -> Run:
        """The draws and the kernels as they are now."""
        return Run(*self.draws, self.warmups.kernel)


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
    return go_on(progress, kernel, log_density, local, num_warmup + num_samples).so_far()


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
    """Prepare a `run`, up to its first transition. The arguments are those of `run`."""
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
    keys = jax.random.split(key_steps, num_warmup + num_samples)
    return Progress(jnp.zeros((), jnp.int32), states, warmups, draws, keys)


def go_on(
    progress: Progress, kernel: AbstractKernel, log_density: LogDensityFn, local: PyTree, stop: int | Array
) -> Progress:
    """Continue a run. The draws do not depend on how many calls a run is divided into.

    Args:
        progress: what `begin` or `go_on` returned.
        kernel: as in `begin`.
        log_density: as in `begin`.
        local: as in `begin`.
        stop: the transition to stop before, counted from the start of the run. It may be traced, so that one compiled
            program serves all values.

    Returns:
        The run after ``stop`` transitions.
    """
    num_warmup = progress.num_warmup
    stages = adaptation.schedule(kernel, num_warmup)

    def step_all(i, carry):
        # One loop for warm-up and draws: the kernel, NUTS above all, is compiled once.
        states, warmups, draws = carry
        states, info = _transition(progress.keys[i], states, warmups, log_density, local)
        if num_warmup:
            warmups = jax.vmap(partial(adaptation.update_at, stages, i))(warmups, states.position, info)
        kept = jnp.maximum(i - num_warmup, 0)
        new = (jax.vmap(kernel.lower)(states.position), info)
        draws = jax.tree.map(lambda all_, new: all_.at[:, kept].set(new), draws, new)
        return states, warmups, draws

    stop = jnp.asarray(stop, jnp.int32)
    start = (progress.states, progress.warmups, progress.draws)
    states, warmups, draws = jax.lax.fori_loop(progress.step, stop, step_all, start)
    return Progress(stop, states, warmups, draws, progress.keys)


def _transition(
    rng_key: PRNGKey, states: Any, warmups: adaptation.WarmupState, log_density: LogDensityFn, local: PyTree
) -> tuple[Any, TransitionInfo]:
    """One transition of every chain, by the kernel as adapted in it."""

    def step_one(key, state, warmup, row):
        return warmup.kernel.step(key, state, _at(log_density, state.position, row))

    keys = jax.random.split(rng_key, num_chains_of(states.position))
    return jax.vmap(step_one)(keys, states, warmups, local)


def _at(
    log_density: LogDensityFn, position: Position, row: PyTree, temperature: Array | None = None
) -> Callable[[Position], Array]:
    """The log density of one chain, in the type of its position (a scan needs it fixed)."""
    dtype = jnp.result_type(*jax.tree.leaves(position), float)
    if temperature is None:
        return lambda x: jnp.asarray(log_density(x, row), dtype)
    return lambda x: jnp.asarray(log_density(x, row) / temperature, dtype)
