"""Kernels on discrete supports: Gibbs."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._errors import EnergyError, is_concrete
from numpyro_ebm._typing import Array
from numpyro_ebm.kernels._base import AbstractKernel, info, kernel_class


class GibbsState(NamedTuple):
    """The position and its log density."""

    position: Any
    logdensity: Any


@kernel_class()
class Gibbs(AbstractKernel):
    r"""Gibbs sampling: each element in turn is drawn from its law given all the others; a transition is one sweep.

    For an event of ``d`` elements that take ``k`` values each, a sweep costs ``d (k - 1)`` evaluations of the energy. It has
    no settings and never rejects; elements that depend strongly on each other change slowly.

    Args:
        values: ``(k,)``, the values of an element, in increasing order; None for those of the support of the
            `EnergyDistribution` that is sampled, ``constraints.boolean`` or ``constraints.integer_interval(low, high)``.

    Raises:
        EnergyError: at its first use, where the support does not say what values there are.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (9,), support=constraints.boolean), "gibbs")``

    References:
        Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (1984).
    """

    name: ClassVar[str] = "gibbs"
    is_discrete: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None

    def __post_init__(self):
        if self.values is None or not is_concrete(self.values):
            return
        values = np.asarray(self.values)
        if values.ndim != 1 or len(values) < 2 or not np.all(np.diff(values.astype(float)) > 0):
            raise EnergyError(
                f"Gibbs needs the values of an element in increasing order, two or more; got {self.values!r}. Write "
                "Gibbs(values=jnp.arange(5)), or Gibbs() for those of the support."
            )

    def bind(self, distribution):
        """The kernel with the values of the distribution's support."""
        return self if self.values is not None else self.adapted(values=jnp.asarray(distribution.discrete_values))

    def init(self, rng_key, position, log_density):
        """Score the position."""
        return GibbsState(position, log_density(position))

    def step(self, rng_key, state, log_density):
        """One sweep."""
        if self.values is None:
            raise EnergyError("Gibbs needs the values that an element takes. Write Gibbs(values=jnp.arange(2)).")
        flat, shape = state.position.reshape(-1), state.position.shape
        values = jnp.asarray(self.values, flat.dtype)
        num_values = len(values)

        def draw(carry, inputs):
            flat, logdensity, is_nonfinite = carry
            i, key = inputs
            others = values[(jnp.argmax(values == flat[i]) + jnp.arange(1, num_values)) % num_values]
            scores = jax.vmap(lambda value: log_density(flat.at[i].set(value).reshape(shape)))(others)
            bad = jnp.any(jnp.isnan(scores) | (scores == jnp.inf))
            scores = jnp.concatenate([logdensity[None], jnp.where(jnp.isnan(scores), -jnp.inf, scores)])
            chosen = jax.random.categorical(key, scores)
            flat = flat.at[i].set(jnp.concatenate([flat[i][None], others])[chosen])
            return (flat, scores[chosen], is_nonfinite | bad), None

        start = (flat, state.logdensity, jnp.isnan(state.logdensity))
        inputs = (jnp.arange(flat.size), jax.random.split(rng_key, flat.size))
        (flat, logdensity, is_nonfinite), _ = jax.lax.scan(draw, start, inputs)
        num_evaluations = flat.size * (num_values - 1)
        moved: Array = flat.reshape(shape)
        return GibbsState(moved, logdensity), info(1.0, False, num_evaluations, is_nonfinite=is_nonfinite)  # noqa: FBT003
