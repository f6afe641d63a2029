"""A batch of chains, run by one scan."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._typing import Array, LogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels import AbstractKernel, TransitionInfo, adaptation


class ChainHealth(NamedTuple):
    """Figures of a batch of chains, averaged over steps and chains.

    Attributes:
        acceptance_rate: mean acceptance probability.
        divergence_rate: fraction of divergent transitions.
        num_gradients: gradient evaluations per chain.
    """

    acceptance_rate: Array
    divergence_rate: Array
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


def as_float(tree: PyTree) -> PyTree:
    """Every leaf in one floating type: float64 under x64, float32 otherwise."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=float), tree)


def advance(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    positions: Position,
    local: PyTree = None,
    *,
    num_steps: int,
) -> tuple[Position, ChainHealth]:
    """Move every chain by ``num_steps`` transitions and keep the last positions only.

    The chains are scored anew under ``log_density`` first, so a parameter update between two calls is seen.

    Args:
        rng_key: random key.
        kernel: the kernel, its settings shared by the chains.
        log_density: ``log_density(position, local)`` of one chain.
        positions: leaves ``(num_chains, ...)``.
        local: what each chain's log density has of its own, leaves ``(num_chains, ...)``, or None.
        num_steps: transitions per chain.

    Returns:
        The new positions and the `ChainHealth` of the run.
    """
    positions = as_float(positions)
    key_init, key_steps = jax.random.split(rng_key)
    keys = jax.random.split(key_init, num_chains_of(positions))
    states = jax.vmap(lambda key, x, row: kernel.init(key, x, _at(log_density, x, row)))(keys, positions, local)

    def step_one(key, state, row):
        return kernel.step(key, state, _at(log_density, state.position, row))

    def step_all(carry, key):
        states, totals = carry
        states, info = jax.vmap(step_one)(jax.random.split(key, num_chains_of(positions)), states, local)
        seen = (info.acceptance_rate, info.is_divergent, info.num_gradients)
        totals = jax.tree.map(lambda total, new: total + jnp.mean(new, dtype=float), totals, seen)
        return (states, totals), None

    zeros = (jnp.zeros((), float),) * 3
    (states, totals), _ = jax.lax.scan(step_all, (states, zeros), jax.random.split(key_steps, num_steps))
    return states.position, ChainHealth(totals[0] / num_steps, totals[1] / num_steps, totals[2])


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
    positions = as_float(positions)
    stages = adaptation.schedule(kernel, num_warmup)
    num_chains = num_chains_of(positions)

    def start(key, position, row):
        return kernel.init(key, position, _at(log_density, position, row)), adaptation.start(kernel, position)

    def step_one(key, state, warmup, row):
        return warmup.kernel.step(key, state, _at(log_density, state.position, row))

    def step_all(carry, inputs):
        # One loop for warm-up and draws: the kernel, NUTS above all, is compiled once.
        states, warmups, draws = carry
        i, key = inputs
        states, info = jax.vmap(step_one)(jax.random.split(key, num_chains), states, warmups, local)
        if num_warmup:
            adapt = jax.vmap(partial(adaptation.update_at, stages, i))
            warmups = adapt(warmups, states.position, info)
        kept = jnp.maximum(i - num_warmup, 0)
        draws = jax.tree.map(lambda all_, new: all_.at[:, kept].set(new), draws, (states.position, info))
        return (states, warmups, draws), None

    key_init, key_steps = jax.random.split(rng_key)
    states, warmups = jax.vmap(start)(jax.random.split(key_init, num_chains), positions, local)
    one = jax.eval_shape(lambda: jax.vmap(step_one)(jax.random.split(rng_key, num_chains), states, warmups, local))
    draws = jax.tree.map(
        lambda leaf: jnp.zeros((num_chains, num_samples, *leaf.shape[1:]), leaf.dtype), (one[0].position, one[1])
    )
    num_steps = num_warmup + num_samples
    inputs = (jnp.arange(num_steps), jax.random.split(key_steps, num_steps))
    (_, warmups, draws), _ = jax.lax.scan(step_all, (states, warmups, draws), inputs)
    return Run(draws[0], draws[1], warmups.kernel)


def _at(log_density: LogDensityFn, position: Position, row: PyTree) -> Callable[[Position], Array]:
    """The log density of one chain, in the type of its position (a scan needs it fixed)."""
    dtype = jnp.result_type(*jax.tree.leaves(position))
    return lambda x: jnp.asarray(log_density(x, row), dtype)
