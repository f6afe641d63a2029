"""Metropolis moves of single elements of a discrete event."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import TransitionInfo, info
from numpyro_ebm.kernels.densities import Known, known_of
from numpyro_ebm.kernels.elements import DiscreteKernel, DiscreteState, Elements, is_bad, log_ratio, take_values

Proposals = tuple[Array, Array, Array, Array]
"""Of each proposal: the element, the shift of its code, its number of values, and the log of a uniform number."""


@record("num_flips")
class Flips(DiscreteKernel):
    r"""Metropolis flips: each proposes another value for one element, both drawn uniformly.

    A proposal costs one evaluation of the energy, whatever the number of values, and is accepted with probability
    ``min(1, exp(log p(x') - log p(x)))``. For two values it moves more often than `Gibbs` with a random scan (Peskun order).
    A ready-made energy (`numpyro_ebm.energies`) gives the ratio by its conditional of the element, as in `Gibbs`.

    Args:
        values: as in `Gibbs`.
        num_flips: proposals per transition; None for as many as there are elements.

    Raises:
        EnergyError: for ``num_flips`` below 1.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (9,), support=constraints.boolean), "flips")``

    References:
        Metropolis et al., Equation of state calculations by fast computing machines (1953); Liu, Peskun's theorem and a
        modified discrete-state Gibbs sampler (1996).
    """

    name: ClassVar[str] = "flips"
    is_reversible: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None
    num_flips: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.num_flips is not None:
            check_count("Flips", "num_flips", self.num_flips)

    def most_changes(self, num_elements: int) -> int:
        """Return the number of proposals."""
        return self.num_flips or num_elements

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return DiscreteState(position, log_density(position))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make the proposals one by one."""
        elements = Elements.of(self.values, state.position)
        num = self.most_changes(sum(elements.sizes))
        key_which, key_value, key_accept = jax.random.split(rng_key, 3)
        which = jax.random.randint(key_which, (num,), 0, sum(elements.sizes))
        num_values = elements.num_values_each[which]
        shift = 1 + jnp.floor(jax.random.uniform(key_value, (num,)) * (num_values - 1)).astype(jnp.int32)
        log_uniform = jnp.log1p(-jax.random.uniform(key_accept, (num,)))

        inputs, known = (which, shift, num_values, log_uniform), known_of(log_density)
        if known is not None and known.energy.has_conditionals:
            position, rates, were_bad = _by_conditionals(elements, state.position, known, inputs)
            moved = self.init(rng_key, position, log_density)
        else:
            moved, rates, were_bad = _by_densities(elements, state, log_density, inputs)
        return moved, info(jnp.mean(rates), False, num, is_nonfinite=jnp.any(were_bad))  # noqa: FBT003


def _by_conditionals(
    elements: Elements, position: Position, known: Known, inputs: Proposals
) -> tuple[Position, Float[Array, " flips"], Bool[Array, " flips"]]:
    """Make proposals by conditionals that the energy knows; return position, acceptance, and which were not finite."""
    (event,) = jax.tree.leaves(position)
    held = known.held(event)
    values = elements.values[0].astype(held.dtype)

    def propose(carry, inputs):
        rows, codes = carry
        i, shift, num_values, log_uniform = inputs
        old, new = codes[i], (codes[i] + shift) % num_values
        logits = known.conditional_logits(rows.reshape(event.shape), i)
        ratio = log_ratio(logits[new], logits[old])
        code = jnp.where(log_uniform < ratio, new, old)
        carry = rows.at[i].set(take_values(values, code)), codes.at[i].set(code)
        return carry, (jnp.exp(jnp.minimum(ratio, 0.0)), is_bad(logits[new]))

    start = held.reshape(-1, *values.shape[1:]), elements.codes(position)
    (rows, _), (rates, were_bad) = jax.lax.scan(propose, start, inputs)
    return elements.structure.unflatten([rows.reshape(event.shape).astype(event.dtype)]), rates, were_bad


def _by_densities(
    elements: Elements, state: DiscreteState, log_density: ChainLogDensityFn, inputs: Proposals
) -> tuple[DiscreteState, Float[Array, " flips"], Bool[Array, " flips"]]:
    """Make proposals by log densities of the whole event; return state, acceptance, and which were not finite."""

    def propose(carry, inputs):
        codes, logdensity = carry
        i, shift, num_values, log_uniform = inputs
        proposed = codes.at[i].set((codes[i] + shift) % num_values)
        new = log_density(elements.position(proposed, state.position))
        ratio = log_ratio(new, logdensity)
        accepted = log_uniform < ratio
        codes, logdensity = jax.tree.map(
            lambda ours, theirs: jnp.where(accepted, theirs, ours), (codes, logdensity), (proposed, new)
        )
        return (codes, logdensity), (jnp.exp(jnp.minimum(ratio, 0.0)), is_bad(new))

    start = (elements.codes(state.position), state.logdensity)
    (codes, logdensity), (rates, were_bad) = jax.lax.scan(propose, start, inputs)
    return DiscreteState(elements.position(codes, state.position), logdensity), rates, were_bad
