"""Metropolis random walks on integers, with or without a largest value."""

import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info
from numpyro_ebm.kernels.densities import Known, known_of
from numpyro_ebm.kernels.elements import DiscreteState, is_bad, log_ratio

LONGEST = 2.0**24
"""The longest jump, in steps: beyond, a float no longer holds every integer."""


class Jumps(NamedTuple):
    """Proposals of a transition, in their order, each with the leading dimension of moves.

    Attributes:
        which: the element.
        step: by how much it changes, before it is folded at the bounds.
        low: the lowest value of the element.
        high: the highest.
        log_uniform: log of the uniform number that decides.
    """

    which: Int[Array, " moves"]
    step: Int[Array, " moves"]
    low: Float[Array, " moves"]
    high: Float[Array, " moves"]
    log_uniform: Float[Array, " moves"]


@record("num_moves")
class LatticeWalk(AbstractKernel):
    r"""Metropolis random walk on a lattice of integers: each proposal moves one element up or down, by one or more.

    It is the kernel for counts and other integers without a largest value, whose conditionals cannot be listed, and for
    those with so many values that `Gibbs` would be slow. The length of a jump is geometric,

    .. math:: P(m) = (1 - q) q^{m - 1}, \quad m = 1, 2, \ldots, \qquad q = \frac{h}{1 + h},

    with the step size :math:`h` and the mean :math:`1 + h`; a small step size gives moves by one, and between two bounds
    :math:`h` is at most their distance. A jump beyond a bound is
    folded back (``low - 1`` becomes ``low``, ``low - 2`` becomes ``low + 1``), which keeps the proposal symmetric, so it is
    accepted with probability ``min(1, exp(log p(x') - log p(x)))``. A warm-up, or training, adapts the step size to the
    acceptance. A proposal costs one evaluation of the energy; a `PoissonGraphicalModel` gives the ratio by the neighbours
    of the element alone.

    Args:
        step_size: mean length of a jump above 1, in units of the integers; a warm-up adapts it to acceptance 0.44, the
            optimum for moves of one element.
        num_moves: proposals per transition, each for an element drawn uniformly; None for one proposal for every element, in
            order.
        bounds: lowest and highest value of each element, ``(2, *event_shape)``, infinite for none, or a mapping of these by
            site; None for those of the sampled support.

    Raises:
        EnergyError: for a step size that is not positive, ``num_moves`` below 1, and at the first use for a support that is
            none of integers.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (9,), support=constraints.nonnegative_integer), "lattice_walk")``

    References:
        Metropolis et al., Equation of state calculations by fast computing machines (1953); Roberts, Gelman and Gilks, Weak
        convergence and optimal scaling of random walk Metropolis algorithms (1997), for the acceptance.
    """

    name: ClassVar[str] = "lattice_walk"
    is_discrete: ClassVar[bool] = True  # pyright: ignore[reportIncompatibleVariableOverride]
    takes_gradients: ClassVar[bool] = False
    target_acceptance: ClassVar[float | None] = 0.44
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "num_gradients", "is_nonfinite")
    step_size: Any = 1.0
    num_moves: int | None = None
    bounds: Any = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_moves is not None:
            check_count("LatticeWalk", "num_moves", self.num_moves)

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with the bounds of the support to sample, by site for the latents of a model.

        Raises:
            EnergyError: for a support that is none of integers, and for other bounds than those of the support.
        """
        theirs = distribution.integer_bounds
        if self.bounds is not None and is_concrete(self.bounds):
            pairs = zip(*(jax.tree.leaves(each) for each in (self.bounds, theirs)), strict=True)
            if not all(bool(np.all(np.asarray(own) == np.asarray(other))) for own, other in pairs):
                raise EnergyError(
                    f"LatticeWalk has the bounds {self.bounds!r}, and the support has {theirs!r}: chains would leave it, or "
                    "leave states out. Write LatticeWalk() for the bounds of the support."
                )
        return self.adapted(bounds=jax.tree.map(jnp.asarray, theirs)) if self.bounds is None else self

    def most_changes(self, num_elements: int) -> int:
        """Return the number of proposals."""
        return self.num_moves or num_elements

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return DiscreteState(position, log_density(position))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make the proposals one by one."""
        flat, unravel = ravel_pytree(state.position)
        jumps, known = self._jumps(rng_key, state.position), known_of(log_density)
        if known is not None and known.has_log_ratios:
            new, rates, were_bad = _by_ratios(flat, unravel, known, jumps)
            moved = self.init(rng_key, unravel(new), log_density)
        else:
            (new, logdensity), rates, were_bad = _by_densities(flat, unravel, state.logdensity, log_density, jumps)
            moved = DiscreteState(unravel(new), logdensity)
        # A jump that was folded onto its start is no proposal: it would make long jumps look good.
        has_jumped = jnp.isfinite(rates)
        rate = jnp.sum(jnp.where(has_jumped, rates, 0.0)) / jnp.maximum(jnp.sum(has_jumped), 1)
        return moved, info(rate, False, len(jumps.which), is_nonfinite=jnp.any(were_bad))  # noqa: FBT003

    def _jumps(self, rng_key: PRNGKey, position: Position) -> Jumps:
        """Draw the proposals of a transition."""
        low, high = _flat_bounds(self.bounds, position)
        key_which, key_sign, key_length, key_accept = jax.random.split(rng_key, 4)
        which = jnp.arange(len(low))
        if self.num_moves is not None:
            which = jax.random.randint(key_which, (self.num_moves,), 0, len(low))
        # Between two bounds, jumps of their distance reach every value; adaptation to a flat density would go on for ever.
        size = jnp.minimum(jnp.asarray(self.step_size, float), jnp.minimum(high - low + 1, LONGEST)[which])
        log_q = jnp.log(size) - jnp.log1p(size)
        length = 1 + jnp.floor(jnp.log1p(-jax.random.uniform(key_length, which.shape)) / log_q)
        step = jax.random.rademacher(key_sign, which.shape, int) * jnp.minimum(length, LONGEST).astype(int)
        return Jumps(which, step, low[which], high[which], jnp.log1p(-jax.random.uniform(key_accept, which.shape)))


def _by_ratios(flat: Int[Array, " d"], unravel: Any, known: Known, jumps: Jumps):
    """Make proposals by ratios that the energy knows; return the position, the acceptance, and which were not finite."""

    def propose(flat, jump):
        new = fold(flat[jump.which] + jump.step, jump.low, jump.high)
        (event,) = jax.tree.leaves(unravel(flat))
        ratio = known.log_ratio(event, jump.which, new)
        bad = is_bad(ratio)
        ratio = jnp.where(bad, -jnp.inf, ratio)
        is_still = new == flat[jump.which]
        flat = flat.at[jump.which].set(jnp.where(jump.log_uniform < ratio, new, flat[jump.which]))
        return flat, (_rate(ratio, is_still), bad)

    flat, (rates, were_bad) = jax.lax.scan(propose, flat, jumps)
    return flat, rates, were_bad


def _by_densities(flat: Int[Array, " d"], unravel: Any, logdensity: Scalar, log_density: ChainLogDensityFn, jumps: Jumps):
    """Make proposals by log densities; return position and log density, the acceptance, and which were not finite."""

    def propose(carry, jump):
        flat, logdensity = carry
        there = fold(flat[jump.which] + jump.step, jump.low, jump.high)
        proposed, is_still = flat.at[jump.which].set(there), there == flat[jump.which]
        new = log_density(unravel(proposed))
        ratio = log_ratio(new, logdensity)
        accepted = jump.log_uniform < ratio
        moved = jnp.where(accepted, proposed, flat), jnp.where(accepted, new, logdensity)
        return moved, (_rate(ratio, is_still), is_bad(new))

    carry, (rates, were_bad) = jax.lax.scan(propose, (flat, logdensity), jumps)
    return carry, rates, were_bad


def _rate(log_ratio: Scalar, is_still: Bool[Array, ""]) -> Scalar:
    """Return the acceptance of a proposal; NaN for one that goes nowhere."""
    return jnp.where(is_still, jnp.nan, jnp.exp(jnp.minimum(log_ratio, 0.0)))


def fold(value: Int[Array, ""], low: Float[Array, ""], high: Float[Array, ""]) -> Int[Array, ""]:
    """Return an integer reflected at the bounds, each halfway between the last value and the one beyond, until it is inside.

    The reflected walk is symmetric: as many ways lead from one value to another as back.
    """
    from_low, from_high = jnp.isfinite(low), jnp.isfinite(high)
    first, last = (jnp.where(jnp.isfinite(end), end, 0.0).astype(value.dtype) for end in (low, high))
    above = jnp.where(from_low, jnp.where(value < first, 2 * first - 1 - value, value), value)
    below = jnp.where(value > last, 2 * last + 1 - value, value)
    size = jnp.maximum(last - first + 1, 1)
    place = (value - first) % (2 * size)
    between = first + jnp.minimum(place, 2 * size - 1 - place)
    return jnp.where(from_high, jnp.where(from_low, between, below), above)


def _flat_bounds(bounds: PyTree, position: Position) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Return the bounds of each number of the flat position.

    Raises:
        EnergyError: without bounds.
    """
    if bounds is None:
        raise EnergyError(
            "LatticeWalk needs the bounds of the integers that it moves. Write bounds=jnp.array([0.0, jnp.inf])."
        )
    leaves, each = jax.tree.leaves(position), jax.tree.leaves(bounds)
    each = each * len(leaves) if len(each) == 1 else each
    whole: list[Shaped[Array, "2 _"]] = []
    for leaf, own in zip(leaves, each, strict=True):
        own = jnp.asarray(own, float)
        wide = own.reshape(2, *(1,) * (leaf.ndim - own.ndim + 1), *own.shape[1:])
        whole.append(jnp.broadcast_to(wide, (2, *leaf.shape)).reshape(2, math.prod(leaf.shape)))
    low, high = jnp.concatenate(whole, axis=1)
    return low, high
