"""Gibbs sampling of discrete events."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import TransitionInfo, info
from numpyro_ebm.kernels.densities import ChainDensity, of_chain
from numpyro_ebm.kernels.elements import DiscreteKernel, DiscreteState, Elements

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

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return DiscreteState(position, log_density(position))

    def order(self, rng_key: PRNGKey, num_elements: int) -> Int[Array, " updates"]:
        """Return the elements that a transition updates, in their order."""
        if self.scan == "systematic":
            return jnp.arange(num_elements)
        return jax.random.randint(rng_key, (self.num_updates or num_elements,), 0, num_elements)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Update the elements one by one."""
        elements = Elements.of(self.values, state.position)
        key_order, key_draws = jax.random.split(rng_key)
        order = self.order(key_order, sum(elements.sizes))
        at = lambda codes: elements.position(codes, state.position)  # noqa: E731
        known = of_chain(log_density)

        def scores(codes, i, others, logdensity):
            return scores_of_others(known, elements, state.position, codes, i, others, logdensity)

        sizes = elements.num_values_each
        start = (elements.codes(state.position), state.logdensity, jnp.isnan(state.logdensity))

        def update(carry, inputs):
            i, key = inputs
            return _draw(carry, i, key, elements.num_values, sizes, scores), None

        inputs = (order, jax.random.split(key_draws, len(order)))
        (codes, logdensity, is_nonfinite), _ = jax.lax.scan(update, start, inputs)
        num_evaluations = jnp.sum(sizes[order] - 1)
        moved = (
            self.init(rng_key, at(codes), log_density) if known.has_conditionals else DiscreteState(at(codes), logdensity)
        )
        return moved, info(1.0, False, num_evaluations, is_nonfinite=is_nonfinite)  # noqa: FBT003


def scores_of_others(
    log_density: ChainDensity,
    elements: Elements,
    like: Position,
    codes: Int[Array, " elements"],
    i: Int[Array, ""],
    others: Int[Array, " others"],
    logdensity: Scalar,
) -> Float[Array, " others"]:
    """Return the log density at other values of one element, by the conditionals of a ready-made energy where it has them.

    Args:
        log_density: log density of one position.
        elements: the elements of a position.
        like: a position, for its dtypes.
        codes: codes of all elements.
        i: number of the element.
        others: its other codes.
        logdensity: the log density at ``codes``.
    """
    at = lambda codes: elements.position(codes, like)  # noqa: E731
    if log_density.has_conditionals:
        logits = log_density.conditional_logits(at(codes), i)
        return logdensity + logits[others] - logits[codes[i]]
    return jax.vmap(lambda code: log_density(at(codes.at[i].set(code))))(others)


def _draw(
    carry: tuple[Int[Array, " elements"], Scalar, Bool[Array, ""]],
    i: Int[Array, ""],
    rng_key: PRNGKey,
    num_values: int,
    sizes: Int[Array, " elements"],
    scores_of: Callable[..., Float[Array, " others"]],
) -> tuple[Int[Array, " elements"], Scalar, Bool[Array, ""]]:
    """Draw one element given all others; NaN and infinite densities are avoided and reported."""
    codes, logdensity, is_nonfinite = carry
    others = (codes[i] + jnp.arange(1, num_values, dtype=codes.dtype)) % num_values
    scores = scores_of(codes, i, others, logdensity)
    exists = others < sizes[i]
    is_bad = exists & (jnp.isnan(scores) | (scores == jnp.inf))
    scores = jnp.where(exists & ~jnp.isnan(scores), scores, -jnp.inf)
    scores = jnp.concatenate([logdensity[None], scores])
    chosen = jax.random.categorical(rng_key, scores)
    codes = codes.at[i].set(jnp.concatenate([codes[i][None], others])[chosen])
    return codes, scores[chosen], is_nonfinite | jnp.any(is_bad)
