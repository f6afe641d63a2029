"""Batches of chains, each run by one scan."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.sharding import key_of_each
from numpyro_ebm._core.typing import (
    Array,
    Chains,
    LogDensityFn,
    Position,
    PRNGKey,
    PRNGKeys,
    PyTree,
    Scalar,
)
from numpyro_ebm.kernels import adaptation, densities
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo

YOUNG, FORGETTING, LEAST_RATE = 10.0, 0.6, 0.02
"""Adaptation rate of `Pace` at age a: ``max((1 + a / YOUNG) ** -FORGETTING, LEAST_RATE)``.

Robbins and Monro need FORGETTING in (1/2, 1] for convergence. A larger YOUNG or LEAST_RATE follows a changing density
faster, with more noise in the step size.
"""


class ChainHealth(NamedTuple):
    """Figures of a batch of chains, averaged over steps and chains.

    Attributes:
        acceptance_rate: mean acceptance probability.
        divergence_rate: fraction of divergent transitions.
        nonfinite_rate: fraction of transitions whose proposal had no finite log density (which does not show in the draws
            of a kernel that rejects it).
        swap_rate: mean acceptance of swaps between temperatures; None for a kernel without swaps.
        num_gradients: gradient evaluations per chain.
    """

    acceptance_rate: Scalar
    divergence_rate: Scalar
    nonfinite_rate: Scalar
    swap_rate: Scalar | None
    num_gradients: Scalar


class Run(NamedTuple):
    """Draws of a batch of chains.

    Attributes:
        positions: pytree, leaves ``(num_chains, num_samples, ...)``, unconstrained.
        info: `TransitionInfo` with fields ``(num_chains, num_samples)``.
        kernel: the adapted kernel, with leaves ``(num_chains, ...)``.
    """

    positions: Position
    info: TransitionInfo
    kernel: AbstractKernel


class Pace(NamedTuple):
    """Separate step sizes for chains of different densities.

    A chain's step size is that of the kernel times ``exp(log_factor)`` (times its square if the step size is a squared
    length). It follows the chain's own acceptance at each transition, at a rate that falls with the chain's age: a young
    chain that never moves gets free within a few transitions, and the step size of an old one hardly changes.

    Attributes:
        log_factor: ``(num_chains,)``.
        age: ``(num_chains,)``, transitions of each chain so far.
        largest: upper bound of the log factor, a number.
    """

    log_factor: Chains
    age: Int[Array, "*chains"]
    largest: Scalar

    def apply(self, kernel: AbstractKernel) -> AbstractKernel:
        """Return the kernel of one chain, given the fields of that chain."""
        return kernel.adapted(step_size=kernel.step_size * jnp.exp(2 * kernel.step_exponent * self.log_factor))

    def next(self, kernel: AbstractKernel, acceptance_rate: Chains) -> "Pace":
        """Return the pace after one more transition (a step of Robbins and Monro)."""
        rate = jnp.maximum((1.0 + self.age / YOUNG) ** -FORGETTING, LEAST_RATE)
        error = jnp.nan_to_num(acceptance_rate) - jnp.asarray(kernel.target_acceptance)
        return self._replace(log_factor=jnp.minimum(self.log_factor + rate * error, self.largest), age=self.age + 1)


class Advanced(NamedTuple):
    """A batch of chains after `advance`.

    Attributes:
        positions: last positions, leaves ``(num_chains, ...)``.
        health: figures of the run.
        gradient: gradient of the log density at the last positions if the kernel keeps it, else None.
        pace: the step sizes after the run, or None.
    """

    positions: Position
    health: ChainHealth
    gradient: Position | None
    pace: Pace | None


def num_chains_of(positions: Position) -> int:
    """Return the number of chains in a batch of positions."""
    return jax.tree.leaves(positions)[0].shape[0]


def advance(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_steps: int,
    temperatures: Float[Array, " {num_steps}"] | None = None,
    pace: Pace | None = None,
    counted: Bool[Array, " chains"] | None = None,
    axis_name: str | None = None,
) -> Advanced:
    """Move every chain by ``num_steps`` transitions and return the last positions only.

    The chains are first evaluated again under ``log_density``, so a parameter update between two calls takes effect. The
    steps are not recorded, so memory does not grow with them.

    Args:
        rng_key: random key.
        kernel: the kernel, with settings shared by all chains.
        log_density: ``log_density(position, local)`` of one chain.
        positions: leaves ``(num_chains, ...)``.
        local: argument of each chain's own log density, leaves ``(num_chains, ...)``, or None.
        num_steps: transitions per chain.
        temperatures: ``(num_steps,)``; transition i leaves ``exp(log_density / temperatures[i])`` invariant, and the chains
            are evaluated again before it. None for 1 throughout.
        pace: a separate step size for each chain, which adapts; None for the kernel's own.
        counted: ``(num_chains,)``, chains whose figures enter the means, which are 0 if there are none; None for all.
        axis_name: name of the axis of `Placement.on_each_part` that splits the chains, in which case the means are over the
            chains of one device; None if they are not split.
    """
    positions = kernel.as_positions(positions)
    num_chains = num_chains_of(positions)
    has_swaps = "swap_rate" in kernel.statistics

    def start(key, position, row, temperature):
        return kernel.init(key, position, densities.at(log_density, position, row, temperature))

    def step_one(key, state, row, pace, temperature):
        if temperature is not None:
            key, key_init = jax.random.split(key)
            state = start(key_init, state.position, row, temperature)
        own = kernel if pace is None else pace.apply(kernel)
        state, info = own.step(key, state, densities.at(log_density, state.position, row, temperature))
        return state, info, None if pace is None else pace.next(kernel, info.acceptance_rate)

    def mean(figure):
        if counted is None:
            return jnp.mean(figure, dtype=float)
        return jnp.sum(jnp.where(counted, figure, 0), dtype=float) / jnp.maximum(jnp.sum(counted), 1)

    pace_axes = None if pace is None else Pace(log_factor=0, age=0, largest=None)  # pyright: ignore[reportArgumentType]

    def step_all(carry, inputs):
        states, pace, totals = carry
        key, temperature = inputs
        keys = key_of_each(key, num_chains, axis_name)
        move = jax.vmap(step_one, in_axes=(0, 0, 0, pace_axes, None), out_axes=(0, 0, pace_axes))
        states, info, pace = move(keys, states, local, pace, temperature)
        swap_rate = info.swap_rate if has_swaps else None
        seen = (info.acceptance_rate, info.is_divergent, info.is_nonfinite, swap_rate, info.num_gradients)
        totals = jax.tree.map(lambda total, new: total + mean(new), totals, ChainHealth(*seen))
        return (states, pace, totals), None

    key_init, key_steps = jax.random.split(rng_key)
    first = None if temperatures is None else temperatures[0]
    keys = key_of_each(key_init, num_chains, axis_name)
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
        step: number of transitions so far, warm-up included.
        states: kernel states of the chains.
        warmups: warm-up states of the chains, with the kernels as adapted so far.
        draws: positions and `TransitionInfo` as in `Run`; zeros for draws that are still to come.
        keys: keys of all transitions.
    """

    step: Int[Array, ""]
    states: Any
    warmups: adaptation.WarmupState
    draws: tuple[Position, TransitionInfo]
    keys: PRNGKeys

    @property
    def num_samples(self) -> int:
        """Number of draws per chain, including those still to come."""
        return self.draws[1].acceptance_rate.shape[1]

    @property
    def num_warmup(self) -> int:
        """Number of transitions per chain before the first draw."""
        return len(self.keys) - self.num_samples

    def of_chains(self) -> tuple[Any, adaptation.WarmupState, tuple[Position, TransitionInfo]]:
        """Return the states, warm-up states and draws, which lead with the chains."""
        return self.states, self.warmups, self.draws

    def so_far(self) -> Run:
        """Return the draws and the kernels so far."""
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
    """Warm up each chain separately, then draw from it.

    Args:
        rng_key: random key.
        kernel: the kernel; the warm-up starts from its settings.
        log_density: ``log_density(position, local)`` of one chain.
        positions: starts of the chains, leaves ``(num_chains, ...)``.
        local: as in `advance`.
        num_warmup: transitions with adaptation, which are discarded.
        num_samples: transitions that are kept.

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
    positions = kernel.lift_all(positions)
    num_chains = num_chains_of(positions)

    def start(key, position, row):
        return kernel.init(key, position, densities.at(log_density, position, row)), adaptation.start(kernel, position)

    key_init, key_steps = jax.random.split(rng_key)
    states, warmups = jax.vmap(start)(jax.random.split(key_init, num_chains), positions, local)
    _, info = jax.eval_shape(lambda: _transition(rng_key, states, warmups, log_density, local))
    info = info._replace(parts=None)
    draws = jax.tree.map(
        lambda leaf: jnp.zeros((num_chains, num_samples, *leaf.shape[1:]), leaf.dtype),
        (jax.vmap(kernel.lower)(positions), info),
    )
    keys = jax.random.split(key_steps, num_warmup + num_samples)
    return Progress(jnp.zeros((), jnp.int32), states, warmups, draws, keys)


def go_on(
    progress: Progress,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    local: PyTree,
    stop: int | Int[Array, ""],
    axis_name: str | None = None,
) -> Progress:
    """Continue a run. The draws do not depend on the number of calls that a run is divided into.

    Args:
        progress: return value of `begin` or `go_on`.
        kernel: as in `begin`.
        log_density: as in `begin`.
        local: as in `begin`.
        stop: number of transitions, from the start of the run, after which to stop. It may be traced, so that one
            compiled program serves all values.
        axis_name: name of the axis of `Placement.on_each_part` that splits the chains; None if they are not split.

    Returns:
        The run after ``stop`` transitions.
    """
    num_warmup = progress.num_warmup
    stages = adaptation.schedule(kernel, num_warmup)

    def step_all(i, carry):
        # One loop for warm-up and draws, so that the kernel, which is costly for NUTS, is compiled once.
        states, warmups, draws = carry
        states, info = _transition(progress.keys[i], states, warmups, log_density, local, axis_name)
        if num_warmup:
            warmups = jax.vmap(partial(adaptation.update_at, stages, i))(warmups, states.position, info)
        kept = jnp.maximum(i - num_warmup, 0)
        new = (jax.vmap(kernel.lower)(states.position), info._replace(parts=None))
        draws = jax.tree.map(lambda all_, new: all_.at[:, kept].set(new), draws, new)
        return states, warmups, draws

    stop = jnp.asarray(stop, jnp.int32)
    start = (progress.states, progress.warmups, progress.draws)
    states, warmups, draws = jax.lax.fori_loop(progress.step, stop, step_all, start)
    return Progress(stop, states, warmups, draws, progress.keys)


def _transition(
    rng_key: PRNGKey,
    states: PyTree,
    warmups: adaptation.WarmupState,
    log_density: LogDensityFn,
    local: PyTree,
    axis_name: str | None = None,
) -> tuple[Any, TransitionInfo]:
    """Make one transition of every chain, with its own adapted kernel."""

    def step_one(key, state, warmup, row):
        return warmup.kernel.step(key, state, densities.at(log_density, state.position, row))

    keys = key_of_each(rng_key, num_chains_of(states.position), axis_name)
    return jax.vmap(step_one)(keys, states, warmups, local)
