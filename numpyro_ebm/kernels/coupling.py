"""Pairs of chains of one kernel, coupled so that they meet, and unbiased time averages from them."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import blackjax
import jax
import jax.numpy as jnp
from blackjax.mcmc.hmc import HMCState
from blackjax.mcmc.mala import MALAState
from blackjax.mcmc.proposal import compute_asymmetric_acceptance_ratio, static_binomial_sampling
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, LogDensityFn, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels.coupled_gibbs import coupled_gibbs
from numpyro_ebm.kernels.densities import at as density_at
from numpyro_ebm.kernels.elements import DiscreteState
from numpyro_ebm.kernels.gibbs import Gibbs
from numpyro_ebm.kernels.hamiltonian import HMC
from numpyro_ebm.kernels.langevin import MALA

COUPLINGS = ("maximal", "reflection")

PairState = MALAState | DiscreteState
"""The states of a pair, leaves ``(2, ...)``, on continuous and on discrete supports."""


class Meeting(NamedTuple):
    """Meeting times of pairs of chains.

    Attributes:
        meeting_time: ``(num_pairs,)``, the first t with ``X_t = Y_(t-1)``; for a pair that has not met, the last t.
        is_met: ``(num_pairs,)``, whether the pair has met.
        acceptance_rate: mean acceptance probability over pairs and steps.
    """

    meeting_time: Int[Array, " pairs"]
    is_met: Bool[Array, " pairs"]
    acceptance_rate: Scalar


def check_coupling(kernel: AbstractKernel, coupling: str | None) -> None:
    """Check that a coupling exists and that the kernel can be coupled by it.

    Raises:
        EnergyError: with the available couplings or kernels.
    """
    if coupling is not None and coupling not in COUPLINGS:
        raise EnergyError(f"Unknown coupling '{coupling}'. {nearest(str(coupling), COUPLINGS)}")
    if type(kernel) not in (MALA, HMC, Gibbs):
        write = "kernel='gibbs'" if kernel.is_discrete else "kernel=MALA(step_size=0.1)"
        raise EnergyError(
            f"The kernel '{kernel.name}' has no coupling, so its chains would not meet. Kernels that can be coupled: "
            f"hmc, mala; on discrete supports gibbs. Write {write}."
        )
    if kernel.is_discrete and coupling == "reflection":
        raise EnergyError(
            "A reflection needs continuous proposals; elements are coupled maximally. Write coupling='maximal'."
        )
    if getattr(kernel, "inverse_mass_matrix", None) is not None:
        raise EnergyError("Coupled HMC needs the identity as its mass matrix. Write HMC(step_size=...) without one.")


def couple_noise(
    rng_key: PRNGKey, noise: Float[Array, " d"], difference: Float[Array, " d"], coupling: str
) -> tuple[Float[Array, " d"], Bool[Array, ""]]:
    r"""Draw a standard normal vector that equals ``noise + difference`` with the largest possible probability.

    With ``X = mean_1 + s * noise`` and ``difference = (mean_1 - mean_2) / s``, the result w gives ``Y = mean_2 + s * w``
    with the correct distribution and ``P(Y = X) = 1 - TV = 2 \Phi(-|difference| / 2)``, which no coupling exceeds.

    Args:
        rng_key: random key.
        noise: ``(d,)``, standard normal.
        difference: ``(d,)``, difference of the means in units of the standard deviation.
        coupling: if the two do not meet, "reflection" mirrors the noise in the hyperplane between the means, which brings
            distant chains together; "maximal" draws from the remainder of the second normal independently.

    Returns:
        ``(d,)``, standard normal given ``difference``, and whether it equals ``noise + difference``.

    References:
        Jacob, O'Leary and Atchade, Unbiased Markov chain Monte Carlo methods with couplings (2020), section 4; Bou-Rabee,
        Eberle and Zimmer, Coupling and convergence for Hamiltonian Monte Carlo (2020).
    """
    key_meet, key_fresh, key_along = jax.random.split(rng_key, 3)
    distance = jnp.linalg.norm(difference)
    direction = difference / jnp.where(distance > 0, distance, 1)
    along = direction @ noise
    log_ratio = -distance * (along + 0.5 * distance)
    is_met = jnp.log(jax.random.uniform(key_meet, dtype=noise.dtype)) <= log_ratio
    if coupling == "reflection":
        apart = noise - 2 * along * direction
    else:
        fresh = jax.random.normal(key_fresh, noise.shape, noise.dtype)
        apart = fresh + (_remainder(key_along, 0.5 * distance) - direction @ fresh) * direction
    return jnp.where(is_met, noise + difference, apart), is_met


def _remainder(rng_key: PRNGKey, half: Scalar) -> Scalar:
    """Draw ``half - v`` with v > 0 of density proportional to ``phi(v - half) - phi(v + half)``.

    This is the excess of N(0, 1) over N(2 half, 1). The rejection sampler's acceptance does not fall at small distances:
    plain rejection from the normal would take 1 / distance tries, and a batch of chains waits for the slowest.
    """
    is_near = half < 1
    # For small distances v is nearly Rayleigh, and sinh(x) / x <= exp(x^2 / 6).
    spread = jnp.sqrt(2 / (1 - jnp.where(is_near, half, 0.0) ** 2 / 3))

    def propose(carry):
        key, _, _ = carry
        key, key_v, key_accept = jax.random.split(key, 3)
        near = spread * jnp.sqrt(jax.random.exponential(key_v, dtype=half.dtype))
        v = jnp.where(is_near, near, half + jax.random.normal(key_v, dtype=half.dtype))
        x = half * v
        log_sinh = jnp.where(x < 1e-3, x**2 / 6, jnp.log(jnp.sinh(jnp.minimum(x, 50.0)) / jnp.where(x > 0, x, 1)))
        log_accept = jnp.where(is_near, log_sinh - x**2 / 6, jnp.log1p(-jnp.exp(-2 * jnp.maximum(x, 0))))
        return key, v, jnp.log(jax.random.uniform(key_accept, dtype=half.dtype)) > log_accept

    start = (rng_key, jnp.zeros_like(half), jnp.ones((), bool))
    return half - jax.lax.while_loop(lambda carry: carry[2], propose, start)[1]


def coupled_step(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    pair: PairState,
    is_met: Bool[Array, ""],
    log_density: ChainLogDensityFn,
    coupling: str,
) -> tuple[PairState, Bool[Array, ""], Scalar]:
    """Move two chains so that each follows the kernel and they tend to meet; once equal, they stay equal.

    MALA couples its two proposals by `couple_noise` and accepts both by one uniform. HMC moves both chains with the same
    momentum, number of steps and uniform, which contracts them but never makes them equal; so each transition ends with a
    coupled MALA step of ``step_size**2 / 2`` (one leapfrog step). Gibbs draws each element by a maximal coupling
    (`coupled_gibbs`).

    Args:
        rng_key: random key.
        kernel: `MALA`, `HMC` or `Gibbs`.
        pair: the two states, leaves ``(2, ...)``.
        is_met: whether they have met before; if so, both move as the first does.
        log_density: log density of one position.
        coupling: as in `couple_noise`; Gibbs takes none.

    Returns:
        The two new states, whether they have met, and the mean acceptance probability of the two.

    References:
        Heng and Jacob, Unbiased Hamiltonian Monte Carlo with couplings (2019).
    """
    key_trajectory, key_mala = jax.random.split(rng_key)
    if isinstance(kernel, Gibbs):
        moved, rate = coupled_gibbs(rng_key, kernel, cast(DiscreteState, pair), log_density), jnp.ones((), float)
        met_now = jnp.all(moved.position[0] == moved.position[1])
    elif isinstance(kernel, HMC):
        moved, rate = _common_hmc(key_trajectory, kernel, pair, log_density)
        moved, met_now, _ = _coupled_mala(key_mala, 0.5 * kernel.step_size**2, moved, log_density, coupling)
    else:
        moved, met_now, rate = _coupled_mala(key_mala, kernel.step_size, pair, log_density, coupling)
    # A flag and a copy keep them equal: a compiler may round equal expressions differently.
    is_met = is_met | met_now
    return jax.tree.map(lambda leaf: leaf.at[1].set(jnp.where(is_met, leaf[0], leaf[1])), moved), is_met, rate


def _common_hmc(rng_key, kernel, pair, log_density):
    identity = jnp.ones(pair.position[0].size, pair.position.dtype)
    transition, length = blackjax.hmc.build_kernel(), kernel.draw_length(rng_key)

    def move(state) -> Any:
        return transition(rng_key, HMCState(*state), log_density, kernel.step_size, identity, length)

    moved, info = jax.vmap(move)(pair)
    return MALAState(*moved), jnp.mean(info.acceptance_rate)


def _coupled_mala(rng_key, step_size, pair, log_density, coupling):
    key_chain, key_couple = jax.random.split(rng_key)
    key_noise, key_accept = jax.random.split(key_chain)  # as in BlackJAX: the first chain equals its MALA, draw for draw
    event_shape, scale = pair.position.shape[1:], jnp.sqrt(2 * step_size)
    means = pair.position + step_size * pair.logdensity_grad
    noise = jax.random.normal(key_noise, (pair.position[0].size,), pair.position.dtype)
    difference = (means[0] - means[1]).ravel() / scale
    other, is_shared = couple_noise(key_couple, noise, difference, coupling)
    first = means[0] + scale * noise.reshape(event_shape)
    second = jnp.where(is_shared, first, means[1] + scale * other.reshape(event_shape))
    proposed = jax.vmap(lambda x: blackjax.mala.init(x, log_density))(jnp.stack([first, second]))

    def accept(state, proposal):
        log_ratio = _log_acceptance(state, proposal, step_size=step_size)
        return static_binomial_sampling(key_accept, log_ratio, state, proposal)

    moved, (is_accepted, rate, _) = jax.vmap(accept)(pair, proposed)
    return moved, is_shared & jnp.all(is_accepted), jnp.mean(rate)


def _transition_energy(state, new_state, step_size):
    # Minus the log of target at the new state times proposal density back, up to a constant; private in BlackJAX.
    back = state.position - new_state.position - step_size * new_state.logdensity_grad
    return -new_state.logdensity + 0.25 / step_size * jnp.sum(back**2)


_log_acceptance: Any = compute_asymmetric_acceptance_ratio(_transition_energy)


class _Run(NamedTuple):
    time: Int[Array, ""]
    pairs: PairState
    is_met: Bool[Array, " pairs"]
    meeting_time: Int[Array, " pairs"]
    acceptance: Scalar
    total: PyTree


def unbiased_sum(
    rng_key: PRNGKey,
    kernel: AbstractKernel,
    log_density: LogDensityFn,
    starts: Shaped[Array, "pairs 2 *position"],
    local: PyTree,
    add: Callable[[PyTree, PairState, Float[Array, "pairs 2"]], PyTree],
    total: PyTree,
    *,
    coupling: str,
    burn_in: int,
    num_steps: int,
    max_num_steps: int,
) -> tuple[PyTree, Meeting]:
    r"""Compute weighted sums over pairs of chains whose expectation is that of the target, for chains of any length.

    With ``(X_t, Y_(t-1))``, of lag one, moved by `coupled_step`, and the meeting time :math:`\tau`,

    .. math::
        H_{k:m} = \frac{1}{m-k+1} \sum_{t=k}^{m} h(X_t)
            + \sum_{t=k+1}^{\tau-1} \min\left(1, \frac{t-k}{m-k+1}\right) (h(X_t) - h(Y_{t-1}))

    has expectation :math:`E_p[h]` for every ``k <= m``: burn-in and length affect only variance and cost. No step is
    recorded.

    Args:
        rng_key: random key.
        kernel: `MALA`, `HMC`, or `Gibbs` with its values.
        log_density: ``log_density(position, local)`` of one chain.
        starts: ``(num_pairs, 2, ...)``, X_0 and Y_0 of each pair, from the same distribution.
        local: argument of each pair's own log density, leaves ``(num_pairs, ...)``, or None.
        add: ``add(total, pairs, weights)`` returns the total plus ``weights[:, 0] * h(X_t) + weights[:, 1] * h(Y_(t-1))``,
            given states with leaves ``(num_pairs, 2, ...)`` and weights ``(num_pairs, 2)``.
        total: initial value of the sum.
        coupling: as in `couple_noise`.
        burn_in: k.
        num_steps: m.
        max_num_steps: transitions after which pairs that have not met are given up; the total is then invalid.

    Returns:
        The total and the `Meeting` of the pairs.

    References:
        Jacob, O'Leary and Atchade, Unbiased Markov chain Monte Carlo methods with couplings (2020).
    """
    starts = starts if kernel.is_discrete else jnp.asarray(starts, float)
    num_pairs, dtype = starts.shape[0], jnp.result_type(starts.dtype, float)

    def at(row):
        return density_at(log_density, jnp.zeros((), dtype), row)

    def init(x, row) -> Any:
        return kernel.init(rng_key, x, at(row)) if kernel.is_discrete else blackjax.mala.init(x, at(row))

    def step_one(key, pair, is_met, row):
        return coupled_step(key, kernel, pair, is_met, at(row), coupling)

    def weights(run):
        length, after = num_steps - burn_in + 1, run.time - burn_in
        average = jnp.where((after >= 0) & (run.time <= num_steps), 1 / length, 0.0)
        correction = jnp.where(run.is_met, 0.0, jnp.clip(after / length, 0.0, 1.0))
        return jnp.stack([average + correction, -correction], axis=1)

    def body(run):
        total = jax.lax.cond(run.time >= burn_in, lambda: add(run.total, run.pairs, weights(run)), lambda: run.total)
        keys = jax.random.split(jax.random.fold_in(rng_key, run.time), num_pairs)
        pairs, is_met, rate = jax.vmap(step_one)(keys, run.pairs, run.is_met, local)
        # The lag: at the first step X moves and Y waits, so they meet if both started at one point and X stayed there.
        is_first = run.time == 0
        pairs = jax.tree.map(lambda new, old: new.at[:, 1].set(jnp.where(is_first, old[:, 1], new[:, 1])), pairs, run.pairs)
        stayed = jnp.all((pairs.position[:, 0] == pairs.position[:, 1]).reshape(num_pairs, -1), axis=1)
        is_met = jnp.where(is_first, stayed, is_met)
        meeting_time = jnp.where(run.is_met, run.meeting_time, run.time + 1)
        return _Run(run.time + 1, pairs, is_met, meeting_time, run.acceptance + jnp.mean(rate), total)

    def goes_on(run):
        return (run.time <= num_steps) | ((run.time < max_num_steps) & ~jnp.all(run.is_met))

    states = jax.vmap(lambda pair, row: jax.vmap(lambda x: init(x, row))(pair))(starts, local)
    zero = jnp.zeros((), jnp.int32)
    start = _Run(zero, states, jnp.zeros(num_pairs, bool), jnp.zeros(num_pairs, jnp.int32), jnp.zeros((), float), total)
    run = jax.lax.while_loop(goes_on, body, start)
    return run.total, Meeting(run.meeting_time, run.is_met, run.acceptance / run.time)
