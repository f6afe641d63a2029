"""The health of a negative phase: its figures, what they mean, and who is told."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._errors import UnhealthyChainsError, UnhealthyChainsWarning, call_where_any
from numpyro_ebm._typing import Array, PyTree
from numpyro_ebm.chains import ChainHealth
from numpyro_ebm.kernels import AbstractKernel

Policy = Literal["warn", "raise", "reset"]

RUNAWAY_DISTANCE = 1e5
RUNAWAY_GAP = 1e3  # nats per coordinate
GAP_GROWTH = 10.0
NONFINITE_RATE = 0.5
COLLAPSED_ACCEPTANCE = 0.02
FROZEN_MOVE = 1e-5
PATIENCE = 20
RAY = tuple(10.0**i for i in range(7))
RAYS = 4

CONDITIONS = {
    "unbounded": "the energy falls without limit away from the data, so that it has no density at all. Give the "
    "EnergyDistribution a base, e.g. base=numpyro.distributions.Normal(0, 1).expand([d]).to_event(1), or an energy that "
    "grows at infinity",
    "runaway": "chains are {distance:.3g} standard deviations of the data away from them. Give the EnergyDistribution a "
    "base, or use a smaller step_size, a kernel that rejects (mala, hmc) or on_unhealthy='reset'",
    "gap": "the energies of data and chains have grown {energy_gap:.3g} nats apart: the chains do not follow the energy, "
    "which runs away from them. Use more num_steps, a smaller learning rate, or chains that start nearer (start='data')",
    "nonfinite": "the log density is not finite at {nonfinite_rate:.0%} of the proposals, or where chains ended. Look at "
    "the energy there (overflow, a logarithm of 0), or use a smaller step_size",
    "collapse": "the acceptance has come down to {mean_acceptance:.2g}. Use a smaller step_size (it is {step_size:.2g}), or "
    "leave it to adapt_step_size=True",
    "frozen": "chains move by {mean_move:.2g} standard deviations of the data per update. Use a larger step_size (it is "
    "{step_size:.2g})",
}
STEPLESS = {
    "frozen": "chains move by {mean_move:.2g} standard deviations of the data per update. Use more num_steps, or a kernel "
    "with a step size (mala)",
}
"""What is said in their place where the kernel has no step size."""


class NegativePhaseHealth(NamedTuple):
    """Figures of the last update's chains. Lengths are in standard deviations of the batch (all coordinates pooled).

    Attributes:
        acceptance_rate: mean acceptance probability of the transitions.
        divergence_rate: fraction of divergent transitions.
        nonfinite_rate: fraction of transitions whose proposal had no finite log density.
        swap_rate: mean acceptance of swaps between temperatures; None without tempering.
        num_gradients: gradient evaluations per chain.
        step_size: the kernel's step size; None for a kernel without one.
        energy_gap: mean energy (base included) of the data minus that of the negatives; near 0 for a model that fits.
        distance: distance from the data's mean to the farthest negative (root mean square over coordinates).
        move: root mean square move of the chains over the update.
        early_gap: largest absolute ``energy_gap`` of the first 20 updates.
        mean_acceptance: moving average of ``acceptance_rate`` over about 20 updates.
        mean_move: moving average of ``move``.
        conditions: ``(6,)``, which of unbounded, runaway, gap, nonfinite, collapse, frozen hold.
        reported: ``(6,)``, which of them a warning has been given for.
    """

    acceptance_rate: Array
    divergence_rate: Array
    nonfinite_rate: Array
    swap_rate: Array | None
    num_gradients: Array
    step_size: Array | None
    energy_gap: Array
    distance: Array
    move: Array
    early_gap: Array
    mean_acceptance: Array
    mean_move: Array
    conditions: Array
    reported: Array


class Observed(NamedTuple):
    """What one update's chains did.

    Attributes:
        chains: figures of the run.
        start: where the chains started, ``(num_chains, ...)``.
        end: where they ended.
        data: the batch.
        log_density_end: at the ends.
        log_density_data: at the batch.
        step_size: the kernel's.
        is_adjusted: whether the kernel rejects, so that its acceptance means something.
        num_updates: updates before this one.
    """

    chains: ChainHealth
    start: Array
    end: Array
    data: Array
    log_density_end: Array
    log_density_data: Array
    step_size: Any
    is_adjusted: bool
    num_updates: Array


def unknown(kernel: AbstractKernel) -> NegativePhaseHealth:
    """Health before the first update of chains that this kernel moves: zeros, and averages of 1."""
    nothing, zero, one = jnp.zeros(len(CONDITIONS), bool), jnp.zeros((), float), jnp.ones((), float)
    figures: dict[str, Any] = dict.fromkeys(NegativePhaseHealth._fields, zero)
    figures |= {"mean_acceptance": one, "mean_move": one, "conditions": nothing, "reported": nothing}
    if "swap_rate" not in kernel.statistics:
        figures["swap_rate"] = None
    if kernel.step_size is None:
        figures["step_size"] = None
    return NegativePhaseHealth(**figures)


def in_words(condition: str, health: NegativePhaseHealth) -> str:
    """What a condition means and what to do, with the figures in it."""
    text = CONDITIONS[condition] if health.step_size is not None else STEPLESS.get(condition, CONDITIONS[condition])
    return f"{text.format(**health._asdict())}."


def spread_of(data: Array) -> tuple[Array, Array]:
    """Mean of a batch, and its standard deviation pooled over coordinates (1 where the rows are all the same)."""
    centre = jnp.mean(data, axis=0)
    spread = jnp.sqrt(jnp.mean((data - centre) ** 2))
    return centre, jnp.where(spread > 0, spread, 1.0)


def examine(
    before: NegativePhaseHealth, seen: Observed, log_density: Callable[[Array, PyTree], Array], local: PyTree
) -> tuple[NegativePhaseHealth, Array]:
    """The figures after an update, and which chains are lost: not finite, or out of all proportion.

    Args:
        before: health after the last update.
        seen: what the chains did.
        log_density: ``log_density(position, local)`` of one chain.
        local: what each chain has of its own.
    """
    centre, spread = spread_of(seen.data)
    size = max(centre.size, 1)
    distances = _length(seen.end - centre) / spread
    finite = jnp.isfinite(distances) & jnp.isfinite(seen.log_density_end)
    move = jnp.sqrt(jnp.mean(jnp.where(finite, _length(seen.end - seen.start) / spread, 0.0) ** 2))
    gap = jnp.mean(seen.log_density_end) - jnp.mean(seen.log_density_data)
    seasoned = seen.num_updates + 1 >= PATIENCE
    rate = 1.0 / jnp.minimum(seen.num_updates + 1.0, PATIENCE)
    health = before._replace(
        acceptance_rate=seen.chains.acceptance_rate,
        divergence_rate=seen.chains.divergence_rate,
        nonfinite_rate=seen.chains.nonfinite_rate,
        swap_rate=seen.chains.swap_rate,
        num_gradients=seen.chains.num_gradients,
        step_size=None if seen.step_size is None else jnp.asarray(seen.step_size, float),
        energy_gap=gap,
        distance=jnp.max(distances),
        move=move,
        early_gap=jnp.where(seasoned, before.early_gap, jnp.fmax(before.early_gap, jnp.abs(gap))),
        mean_acceptance=before.mean_acceptance + rate * (seen.chains.acceptance_rate - before.mean_acceptance),
        mean_move=before.mean_move + rate * (move - before.mean_move),
    )
    conditions = {
        "unbounded": _is_unbounded(
            log_density, centre, seen.end, jnp.where(jnp.isfinite(distances), distances, -1.0), local
        ),
        "runaway": jnp.any(distances > RUNAWAY_DISTANCE),
        "gap": seasoned & (jnp.abs(gap) > jnp.maximum(RUNAWAY_GAP * size, GAP_GROWTH * health.early_gap)),
        "nonfinite": jnp.any(~finite) | (health.nonfinite_rate > NONFINITE_RATE),
        "collapse": seasoned & seen.is_adjusted & (health.mean_acceptance < COLLAPSED_ACCEPTANCE),
        "frozen": seasoned & (health.mean_move < FROZEN_MOVE),
    }
    health = health._replace(conditions=jnp.stack([jnp.asarray(conditions[name], bool) for name in CONDITIONS]))
    return health, ~finite | (distances > RUNAWAY_DISTANCE)


def tell(health: NegativePhaseHealth, policy: Policy, owner: str) -> NegativePhaseHealth:
    """Warn of conditions that were not reported yet, or raise; from inside a compiled program where need be.

    Raises:
        UnhealthyChainsError: under the policy "raise". Out of a compiled program, and so of ``svi.run``, it arrives as a
            ``jax.errors.JaxRuntimeError`` whose message ends in it; `fit` raises it as it is.
    """
    news = health.conditions if policy == "raise" else health.conditions & ~health.reported

    def report(news, health):
        for name, is_new in zip(CONDITIONS, news, strict=True):
            if is_new:
                _report(f"{owner}: {name}: {in_words(name, health)}", policy)

    call_where_any(report, news, health)
    return health._replace(reported=health.reported | health.conditions)


@contextmanager
def as_it_was_raised() -> Iterator[None]:
    """Raise what the host raised inside a compiled program as it is; JAX wraps it in a message of its own.

    Raises:
        UnhealthyChainsError: for one of `tell`.
        KeyboardInterrupt: for one that came while the host was called.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        _, is_ours, message = str(error).rpartition(f"{UnhealthyChainsError.__name__}: ")
        if is_ours:
            raise UnhealthyChainsError(message.strip()) from error
        if str(error).rstrip().endswith(KeyboardInterrupt.__name__):
            raise KeyboardInterrupt from error
        raise


def _report(message: str, policy: Policy) -> None:
    if policy == "raise":
        raise UnhealthyChainsError(message)
    warnings.warn(message, UnhealthyChainsWarning, stacklevel=2)


def _length(moves: Array) -> Array:
    """Root mean square over the coordinates of each chain."""
    return jnp.sqrt(jnp.mean(moves.reshape(len(moves), -1) ** 2, axis=1))


def _is_unbounded(log_density: Callable, centre: Array, ends: Array, distances: Array, local: PyTree) -> Array:
    """Whether the density still rises a million times farther out than the farthest chains are.

    Probes the rays from the data's mean through those chains. Along a ray a proper quadratic falls in the end; it is not
    taken for unbounded unless its mode is half a million times farther away than the chain.
    """
    distances = jnp.where(jnp.isfinite(distances), distances, -1.0)
    _, farthest = jax.lax.top_k(distances, min(RAYS, len(distances)))
    chosen, local = jax.tree.map(lambda leaf: leaf[farthest], (ends, local))

    def rises(end, row):
        values = jax.vmap(lambda scale: log_density(centre + scale * (end - centre), row))(jnp.asarray(RAY, end.dtype))
        return jnp.all((values[1:] > values[:-1]) | (values[1:] == jnp.inf))

    return jnp.any(jax.vmap(rises)(chosen, local) & (distances[farthest] > 0))
