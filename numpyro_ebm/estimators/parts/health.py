"""The health of a negative phase: its figures, the conditions that they imply, and the warnings."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.errors import UnhealthyChainsError, UnhealthyChainsWarning
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, LogDensityFn, PyTree, Scalar
from numpyro_ebm.estimators.parts.scales import Spread
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.chains import ChainHealth

Policy = Literal["warn", "raise", "reset"]

RUNAWAY_DISTANCE = 1e5
"""In standard deviations of the data: 100 times the widest Gaussian energy that the tests require to pass (1000)."""
RUNAWAY_GAP = 1e3
"""Nats per coordinate. The gap of a model that fits is near 0; the bound leaves room for a model before training."""
GAP_GROWTH = 10.0
"""In units of the largest gap of the first updates: a gap that is large from the start has not grown."""
NONFINITE_RATE = 0.5
"""Share of the proposals: kernels reject fewer of them harmlessly, as near a wall; more waste most transitions."""
COLLAPSED_ACCEPTANCE = 0.02
"""Far below the acceptances that the kernels aim at (0.4 to 0.8): a chain moves once in 50 transitions."""
FROZEN_MOVE = 1e-5
"""In standard deviations of the data per update: a random walk of such steps needs 1e10 updates to cross one."""
SLOW_MOVE, SLOW_SHARE = 1e-3, 1e-2
"""A coordinate is also frozen if it moves by less than this, and by less than this share of the fastest coordinate."""
STUCK_EXCESS = 0.1
"""Share of the chains, beyond chance, that may end an update where they started: fewer bias the gradient little."""
PATIENCE = 20
"""Updates that the moving averages cover, and after which conditions on them count: fewer are noisier, more warn later."""
RAY = tuple(10.0**i for i in range(7))
"""Probes along a ray, in units of the chain's distance from the data: up to a million times as far."""
RAYS = 4
"""Number of rays that are probed, through the farthest chains: each costs one log density per probe."""

CONDITIONS = {
    "unbounded": "the energy falls without limit away from the data, so it defines no density. Give the "
    "EnergyDistribution a base, e.g. base=numpyro.distributions.Normal(0, 1).expand([d]).to_event(1), or an energy that "
    "grows at infinity",
    "runaway": "chains are {distance:.3g} standard deviations of the data away from its mean. Give the EnergyDistribution a "
    "base, or use a smaller step_size, a kernel that rejects (mala, hmc) or on_unhealthy='reset'",
    "gap": "the energies of data and chains have grown {energy_gap:.3g} nats apart: the energy changes faster than "
    "the chains follow. Use more num_steps, a smaller learning rate, or chains that start nearer (start='data')",
    "nonfinite": "the log density is not finite at {nonfinite_rate:.0%} of the proposals, or where chains ended. Check "
    "the energy there (overflow, a logarithm of 0), or use a smaller step_size",
    "collapse": "the acceptance has fallen to {mean_acceptance:.2g}. Use a smaller step_size (it is {step_size:.2g}), or "
    "adapt_step_size=True",
    "frozen": "chains move by {slowest_move:.2g} standard deviations of the data per update in coordinate "
    "{slowest_coordinate:.0f}, and by {mean_move:.2g} on average. Use a larger step_size (it is {step_size:.2g}), a kernel "
    "whose step size adapts (mala) or scale='data', which measures each coordinate in its own spread",
    "stuck": "{stuck_rate:.0%} of the chains have not moved in an update, {stuck_by_chance:.0%} are expected by chance: the "
    "step size is too large for some of them, although the mean acceptance is {mean_acceptance:.2g}. Use a smaller "
    "step_size (it is {step_size:.2g}), more num_steps, or 'pcd' or 'mle', whose chains have step sizes of their own where "
    "rows have a context",
}
STEPLESS = {
    "frozen": "chains move by {mean_move:.2g} standard deviations of the data per update. Use more num_steps, or a kernel "
    "with a step size (mala)",
}
"""Texts that replace those of `CONDITIONS` for a kernel without a step size."""


Figure: TypeAlias = Float[Array, "*records"]
"""One number, or one for each record of training."""


class NegativePhaseHealth(NamedTuple):
    """Figures of the last update's chains. Lengths are in standard deviations of the data, coordinate by coordinate.

    Attributes:
        acceptance_rate: mean acceptance probability of the transitions.
        divergence_rate: fraction of divergent transitions.
        nonfinite_rate: fraction of transitions whose proposal has no finite log density.
        swap_rate: mean acceptance of swaps between temperatures; None without tempering.
        num_gradients: gradient evaluations per chain.
        step_size: the kernel's step size (the geometric mean if chains have their own); None for a kernel without one.
        energy_gap: mean energy (base included) of the data minus that of the negatives; near 0 for a model that fits.
        distance: distance from the data's mean to the farthest negative (root mean square over coordinates).
        move: root mean square move of the chains over the update.
        early_gap: largest absolute ``energy_gap`` of the first 20 updates.
        mean_acceptance: moving average of ``acceptance_rate`` over about 20 updates.
        mean_move: moving average of ``move``.
        mean_moves: moving average of the move of each coordinate, of the shape of unconstrained space.
        slowest_coordinate: flat index of the coordinate that moves least; coordinates that are constant in the data do not
            count.
        slowest_move: the average move of that coordinate.
        stuck_rate: moving average of the share of chains that ended an update where they started.
        stuck_by_chance: the share expected if all chains have the mean acceptance; 0 for a kernel that never rejects.
        conditions: ``(7,)``, whether unbounded, runaway, gap, nonfinite, collapse, frozen and stuck hold.
        reported: ``(7,)``, whether a warning has been given for each.
    """

    acceptance_rate: Figure
    divergence_rate: Figure
    nonfinite_rate: Figure
    swap_rate: Figure | None
    num_gradients: Figure
    step_size: Figure | None
    energy_gap: Figure
    distance: Figure
    move: Figure
    early_gap: Figure
    mean_acceptance: Figure
    mean_move: Figure
    mean_moves: Float[Array, "*position"]
    slowest_coordinate: Figure
    slowest_move: Figure
    stuck_rate: Figure
    stuck_by_chance: Figure
    conditions: Bool[Array, "*records 7"]
    reported: Bool[Array, "*records 7"]


class Observed(NamedTuple):
    """One update's chains, as `examine` needs them.

    Attributes:
        chains: figures of the run.
        start: positions where the chains started, ``(num_chains, ...)``.
        end: positions where they ended.
        stayed: ``(num_chains,)``, whether each chain ended where it started.
        num_steps: transitions per chain.
        spread: running moments of the data.
        log_density_end: log densities at the ends.
        log_density_data: log densities at the batch.
        step_size: step size of the kernel.
        is_adjusted: whether the kernel rejects, so that its acceptance is meaningful.
        is_discrete: whether events are discrete: their density is proper, and a chain may move and return to its start.
        num_updates: updates before this one.
        continuous: which coordinates are continuous; None unless only some are. The others may rest for long, and the
            density is not evaluated between their values.
    """

    chains: ChainHealth
    start: Shaped[Array, " chains *position"]
    end: Shaped[Array, " chains *position"]
    stayed: Bool[Array, " chains"]
    num_steps: int
    spread: Spread
    log_density_end: Float[Array, " chains"]
    log_density_data: Float[Array, " rows"]
    step_size: Any
    is_adjusted: bool
    is_discrete: bool | None
    num_updates: Int[Array, ""]
    continuous: Bool[np.ndarray, " d"] | None = None


def unknown(kernel: AbstractKernel, shape: tuple[int, ...]) -> NegativePhaseHealth:
    """Return the health before the first update: zeros, and ones for the averages of acceptance and moves.

    Args:
        kernel: the kernel that moves the chains.
        shape: shape of an event in unconstrained space.
    """
    nothing, zero, one = jnp.zeros(len(CONDITIONS), bool), jnp.zeros((), float), jnp.ones((), float)
    figures: dict[str, Any] = dict.fromkeys(NegativePhaseHealth._fields, zero)
    figures |= {"mean_acceptance": one, "mean_move": one, "conditions": nothing, "reported": nothing}
    figures |= {"mean_moves": jnp.ones(shape, float), "slowest_move": one}
    if "swap_rate" not in kernel.statistics:
        figures["swap_rate"] = None
    if kernel.step_size is None:
        figures["step_size"] = None
    return NegativePhaseHealth(**figures)


def in_words(condition: str, health: NegativePhaseHealth) -> str:
    """Return the text of a condition, with its figures and what to do."""
    text = CONDITIONS[condition] if health.step_size is not None else STEPLESS.get(condition, CONDITIONS[condition])
    return f"{text.format(**health._asdict())}."


def examine(
    before: NegativePhaseHealth, seen: Observed, log_density: LogDensityFn, local: PyTree
) -> tuple[NegativePhaseHealth, Bool[Array, " chains"]]:
    """Return the health after an update, and which chains are lost: not finite, or too far from the data.

    Args:
        before: health after the previous update.
        seen: the update's chains.
        log_density: ``log_density(position, local)`` of one chain.
        local: context and base of each chain.
    """
    centre, spread = seen.spread.mean, or_one(seen.spread.sd)[None]
    size = max(centre.size, 1)
    distances = _length((seen.end - centre[None]) / spread)
    finite = jnp.isfinite(distances) & jnp.isfinite(seen.log_density_end)
    moves = _moves((seen.end - seen.start) / spread, finite)
    gap = jnp.mean(seen.log_density_end) - jnp.mean(seen.log_density_data)
    seasoned = seen.num_updates + 1 >= PATIENCE
    rate = 1.0 / jnp.minimum(seen.num_updates + 1.0, PATIENCE)
    move = jnp.sqrt(jnp.mean(moves**2))
    mean_moves = before.mean_moves + rate * (moves - before.mean_moves)
    watched = mean_moves if seen.continuous is None else jnp.where(seen.continuous, mean_moves, jnp.inf)
    slowest, slowest_move = _slowest(watched, seen.spread)
    by_chance = (1 - jnp.clip(seen.chains.acceptance_rate, 0.0, 1.0)) ** seen.num_steps if seen.is_adjusted else 0.0
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
        mean_moves=mean_moves,
        slowest_coordinate=slowest,
        slowest_move=slowest_move,
        stuck_rate=before.stuck_rate + rate * (jnp.mean(seen.stayed) - before.stuck_rate),
        stuck_by_chance=before.stuck_by_chance + rate * (by_chance - before.stuck_by_chance),
    )
    may_get_stuck = seen.is_adjusted and not seen.is_discrete
    # A discrete element with a rare value rests for many updates, and is not frozen for that.
    largest = jnp.max(jnp.where(jnp.isfinite(watched), watched, 0.0), initial=0.0)
    is_slow = not seen.is_discrete and slowest_move < jnp.minimum(SLOW_MOVE, SLOW_SHARE * largest)
    conditions = {
        "unbounded": not seen.is_discrete and _is_unbounded(log_density, _centres(seen), seen.end, distances, local),
        "runaway": jnp.any(distances > RUNAWAY_DISTANCE),
        "gap": seasoned & (jnp.abs(gap) > jnp.maximum(RUNAWAY_GAP * size, GAP_GROWTH * health.early_gap)),
        "nonfinite": jnp.any(~finite) | (health.nonfinite_rate > NONFINITE_RATE),
        "collapse": seasoned & seen.is_adjusted & (health.mean_acceptance < COLLAPSED_ACCEPTANCE),
        "frozen": seasoned & ((health.mean_move < FROZEN_MOVE) | is_slow),
        "stuck": seasoned & may_get_stuck & (health.stuck_rate > health.stuck_by_chance + STUCK_EXCESS),
    }
    health = health._replace(conditions=jnp.stack([jnp.asarray(conditions[name], bool) for name in CONDITIONS]))
    return health, ~finite | (distances > RUNAWAY_DISTANCE)


def tell(health: NegativePhaseHealth, policy: Policy, owner: str) -> NegativePhaseHealth:
    """Warn of conditions that were not reported yet, or raise, also from inside a compiled program.

    Raises:
        UnhealthyChainsError: under the policy "raise". From a compiled program, and hence from ``svi.run``, it arrives as a
            ``jax.errors.JaxRuntimeError`` whose message ends in it; `fit` raises the error itself.
    """
    news = health.conditions if policy == "raise" else health.conditions & ~health.reported

    call_where_any(Told(_report_all, (owner, policy)), news, health)
    return health._replace(reported=health.reported | health.conditions)


def _report_all(owner: str, policy: Policy, news: Bool[Array, " conditions"], health: NegativePhaseHealth) -> None:
    for name, is_new in zip(CONDITIONS, news, strict=True):
        if is_new:
            _report(f"{owner}: {name}: {in_words(name, health)}", policy)


@contextmanager
def as_it_was_raised() -> Iterator[None]:
    """Raise an error of the host, which JAX has wrapped inside a compiled program, in its original form.

    Raises:
        UnhealthyChainsError: if `tell` raised it.
        KeyboardInterrupt: if it came during a call of the host.
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


def _length(moves: Shaped[Array, " chains *position"]) -> Float[Array, " chains"]:
    """Return the root mean square over the coordinates of each chain."""
    return jnp.sqrt(jnp.mean(moves.reshape(len(moves), -1) ** 2, axis=1))


def _moves(moves: Shaped[Array, " chains *position"], finite: Bool[Array, " chains"]) -> Float[Array, "*position"]:
    """Return the root mean square over the finite chains, coordinate by coordinate."""
    counted = jnp.where(finite.reshape((-1,) + (1,) * (moves.ndim - 1)), moves, 0.0)
    return jnp.sqrt(jnp.mean(counted**2, axis=0)).astype(float)


def _slowest(moves: Float[Array, "*position"], spread: Spread) -> tuple[Scalar, Scalar]:
    """Return the coordinate that moves least, among those that vary in the data, and its move."""
    if not moves.size:
        return jnp.zeros((), float), jnp.ones((), float)
    counted = jnp.where(spread.variance > 0, moves, jnp.inf).reshape(-1)
    counted = jnp.where(jnp.any(counted < jnp.inf), counted, moves.reshape(-1))
    slowest = jnp.argmin(counted)
    return slowest.astype(float), counted[slowest]


def _is_unbounded(
    log_density: LogDensityFn,
    centres: Float[Array, " chains *position"],
    ends: Shaped[Array, " chains *position"],
    distances: Float[Array, " chains"],
    local: PyTree,
) -> Bool[Array, ""]:
    """Return whether the density still rises at a million times the distance of the farthest chains.

    It probes the rays from the centres through these chains. Along a ray, a proper quadratic falls eventually; it counts
    as unbounded only if its mode is half a million times farther away than the chain.
    """
    distances = jnp.where(jnp.isfinite(distances), distances, -1.0)
    _, farthest = jax.lax.top_k(distances, min(RAYS, len(distances)))
    centres, chosen, local = jax.tree.map(lambda leaf: leaf[farthest], (centres, ends, local))

    def rises(centre, end, row):
        values = jax.vmap(lambda scale: log_density(centre + scale * (end - centre), row))(jnp.asarray(RAY, end.dtype))
        return jnp.all((values[1:] > values[:-1]) | (values[1:] == jnp.inf))

    return jnp.any(jax.vmap(rises)(centres, chosen, local) & (distances[farthest] > 0))


def _centres(seen: Observed) -> Float[Array, " chains *position"]:
    """Return the data's mean for each chain, with its own values in the coordinates that are not continuous."""
    centres = jnp.broadcast_to(seen.spread.mean[None], seen.end.shape).astype(seen.end.dtype)
    return centres if seen.continuous is None else jnp.where(seen.continuous, centres, seen.end)
