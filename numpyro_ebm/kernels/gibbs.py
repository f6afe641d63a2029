"""Gibbs sampling of discrete events."""

from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm._core.uniforms import uniforms
from numpyro_ebm.kernels._base import TransitionInfo, info
from numpyro_ebm.kernels.densities import Known, known_of
from numpyro_ebm.kernels.elements import DiscreteKernel, DiscreteState, Elements, choose, take_values, without_bad

Scan = Literal["systematic", "random"]


@record("scan", "num_updates")
class Gibbs(DiscreteKernel):
    r"""Gibbs sampling: a transition draws elements in turn, each from its conditional given all others.

    An element of ``k`` values costs ``k - 1`` evaluations of the energy, so a sweep over ``d`` elements costs ``d (k - 1)``.
    A ready-made energy (`numpyro_ebm.energies`) knows the conditional of an element, for ``d`` operations in place of the
    ``d ** 2`` of a pairwise energy; ``num_gradients`` counts it as ``k - 1`` evaluations.
    The kernel has no step size and never rejects; strongly dependent elements change slowly. With ``scan="random"`` and
    ``num_updates=1``, contrastive divergence with one transition follows the gradient of the pseudolikelihood on average.

    Args:
        values: ``(k,)``, the values of an element, in increasing order; None for those of the sampled support,
            ``constraints.boolean`` or ``constraints.integer_interval(low, high)``, of an `EnergyDistribution` or of each
            latent site of a model.
        scan: "systematic" (every element once, in order) or "random" (each update draws its element uniformly).
        num_updates: updates per transition of the random scan; None for as many as there are elements.

    Raises:
        EnergyError: for an unknown scan, ``num_updates`` below 1 or with a systematic scan, and at the first use if the
            support does not determine the values.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (9,), support=constraints.boolean), "gibbs")``

    References:
        Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (1984).
        Hyvarinen, Connections between score matching, contrastive divergence, and pseudolikelihood (2007).
    """

    name: ClassVar[str] = "gibbs"
    statistics: ClassVar[tuple[str, ...]] = ("num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None
    scan: Scan = "systematic"
    num_updates: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.scan not in get_args(Scan):
            raise EnergyError(f"Unknown scan={self.scan!r}. {nearest(str(self.scan), get_args(Scan))}")
        if self.num_updates is not None:
            check_count("Gibbs", "num_updates", self.num_updates)
            if self.scan == "systematic":
                raise EnergyError(
                    f"A systematic scan updates every element once; got num_updates={self.num_updates}. Write "
                    f"Gibbs(scan='random', num_updates={self.num_updates})."
                )

    @property
    def is_reversible(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the scan is random: updates in a fixed order have no detailed balance."""
        return self.scan == "random"

    def reversible(self) -> Any:
        """Return the kernel with a random scan."""
        return self.adapted(scan="random")

    def most_changes(self, num_elements: int) -> int:
        """Return the number of updates."""
        return self.num_updates or num_elements

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return DiscreteState(position, log_density(position))

    def order(self, rng_key: PRNGKey, num_elements: int) -> Int[Array, " updates"]:
        """Return the elements that a transition updates, in their order."""
        if self.scan == "systematic":
            return jnp.arange(num_elements)
        return jax.random.randint(rng_key, (self.most_changes(num_elements),), 0, num_elements)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Update the elements one by one."""
        elements, known = Elements.of(self.values, state.position), known_of(log_density)
        key_order, key_draws = jax.random.split(rng_key)
        order = self.order(key_order, sum(elements.sizes))
        inputs = (order, uniforms(key_draws, order.shape, state.logdensity.dtype))
        if known is not None and known.energy.has_conditionals:
            position, bad = _by_conditionals(elements, state.position, known, inputs)
            moved = self.init(rng_key, position, log_density)
        else:
            moved, bad = _by_densities(elements, state, log_density, inputs)
        num_evaluations = jnp.sum(elements.num_values_each[order] - 1)
        is_nonfinite = bad | jnp.isnan(state.logdensity)
        return moved, info(1.0, False, num_evaluations, is_nonfinite=is_nonfinite)  # noqa: FBT003


def _by_conditionals(
    elements: Elements, position: Position, known: Known, inputs: tuple[Int[Array, " updates"], Float[Array, " updates"]]
) -> tuple[Position, Bool[Array, ""]]:
    """Draw elements in turn by conditionals that the energy knows; return the position, and whether any was not finite."""
    (event,) = jax.tree.leaves(position)
    held = known.held(event)
    values = elements.values[0].astype(held.dtype)

    def update(carry, inputs):
        rows, was_bad = carry
        i, number = inputs
        logits, bad = without_bad(known.conditional_logits(rows.reshape(event.shape), i))
        chosen = take_values(values, choose(number, logits))
        return (rows.at[i].set(jnp.where(jnp.all(logits == -jnp.inf), rows[i], chosen)), was_bad | bad), None

    start = (held.reshape(-1, *values.shape[1:]), jnp.zeros((), bool))
    (rows, was_bad), _ = jax.lax.scan(update, start, inputs)
    return elements.structure.unflatten([rows.reshape(event.shape).astype(event.dtype)]), was_bad


def _by_densities(
    elements: Elements,
    state: DiscreteState,
    log_density: ChainLogDensityFn,
    inputs: tuple[Int[Array, " updates"], Float[Array, " updates"]],
) -> tuple[DiscreteState, Bool[Array, ""]]:
    """Draw elements in turn by the log densities of all their values; return the state, and whether any was not finite."""

    def update(carry, inputs):
        codes, logdensity, was_bad = carry
        i, number = inputs
        logits, bad = logits_of(log_density, elements, state.position, codes, i, logdensity)
        chosen = jnp.where(jnp.all(logits == -jnp.inf), codes[i], choose(number, logits))
        logdensity = jnp.where(chosen == codes[i], logdensity, logits[chosen])
        return (codes.at[i].set(chosen.astype(codes.dtype)), logdensity, was_bad | bad), None

    start = (elements.codes(state.position), state.logdensity, jnp.zeros((), bool))
    (codes, logdensity, was_bad), _ = jax.lax.scan(update, start, inputs)
    return DiscreteState(elements.position(codes, state.position), logdensity), was_bad


def logits_of(
    log_density: ChainLogDensityFn,
    elements: Elements,
    like: Position,
    codes: Int[Array, " elements"],
    i: Int[Array, ""],
    logdensity: Scalar,
) -> tuple[Float[Array, " values"], Bool[Array, ""]]:
    """Return the log density at each value of one element, and whether any was NaN or plus infinity.

    It is -inf there, and where the element has fewer values than others. A ready-made energy gives it by its conditionals.

    Args:
        log_density: log density of one position.
        elements: the elements of a position.
        like: a position, for its dtypes.
        codes: codes of all elements.
        i: number of the element.
        logdensity: the log density at ``codes``.
    """
    num_values, known = elements.num_values, known_of(log_density)
    others = (codes[i] + jnp.arange(1, num_values, dtype=codes.dtype)) % num_values
    at = lambda codes: elements.position(codes, like)  # noqa: E731
    if known is not None and known.energy.has_conditionals:
        (event,) = jax.tree.leaves(at(codes))
        logits = known.conditional_logits(event, i)
        scores = logdensity + logits[others] - logits[codes[i]]
    else:
        scores = jax.vmap(lambda code: log_density(at(codes.at[i].set(code))))(others)
    scores, bad = without_bad(jnp.where(others < elements.num_values_each[i], scores, -jnp.inf))
    return jnp.zeros(num_values, scores.dtype).at[others].set(scores).at[codes[i]].set(without_bad(logdensity)[0]), bad
