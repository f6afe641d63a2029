"""Kernels on discrete supports: Gibbs."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info, kernel_class


class GibbsState(NamedTuple):
    """The position and its log density."""

    position: Any
    logdensity: Any


@kernel_class()
class Gibbs(AbstractKernel):
    r"""Gibbs sampling: a transition is one sweep, which draws each element from its conditional given all others.

    For an event of ``d`` elements with ``k`` values each, a sweep costs ``d (k - 1)`` evaluations of the energy. It has no
    tuning parameters and never rejects; strongly dependent elements change slowly.

    Args:
        values: ``(k,)``, the values of an element, in increasing order; None for those of the sampled support,
            ``constraints.boolean`` or ``constraints.integer_interval(low, high)``, of an `EnergyDistribution` or of each
            latent site of a model.

    Raises:
        EnergyError: at the first use, if the support does not determine the values.

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
        if self.values is None or isinstance(self.values, Mapping) or not is_concrete(self.values):
            return
        values = np.asarray(self.values)
        if values.ndim != 1 or len(values) < 2 or not np.all(np.diff(values.astype(float)) > 0):
            raise EnergyError(
                f"Gibbs needs the values of an element in increasing order, two or more; got {self.values!r}. Write "
                "Gibbs(values=jnp.arange(5)), or Gibbs() for the values of the support."
            )
        object.__setattr__(self, "values", values)  # the entries of a list would be leaves of their own

    def bind(self, distribution):
        """Return the kernel with the values of the support to sample, by site for the latents of a model."""
        return (
            self if self.values is not None else self.adapted(values=jax.tree.map(jnp.asarray, distribution.discrete_values))
        )

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return GibbsState(position, log_density(position))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Make one sweep, site by site."""
        if self.values is None:
            raise EnergyError("Gibbs needs the values that an element takes. Write Gibbs(values=jnp.arange(2)).")
        sites, tree = jax.tree.flatten(state.position)
        values = jax.tree.leaves(self.values)
        values = values * len(sites) if len(values) == 1 else values
        sizes = [site.size for site in sites]
        keys = jnp.split(jax.random.split(rng_key, sum(sizes)), np.cumsum(sizes)[:-1])
        logdensity, is_nonfinite = state.logdensity, jnp.isnan(state.logdensity)
        for i in range(len(sites)):

            def score(site, i=i):
                return log_density(jax.tree.unflatten(tree, [*sites[:i], site, *sites[i + 1 :]]))

            sites[i], logdensity, is_nonfinite = _sweep(keys[i], sites[i], logdensity, is_nonfinite, values[i], score)
        num_evaluations = sum(size * (len(each) - 1) for size, each in zip(sizes, values, strict=True))
        moved = jax.tree.unflatten(tree, sites)
        return GibbsState(moved, logdensity), info(1.0, False, num_evaluations, is_nonfinite=is_nonfinite)  # noqa: FBT003


def _sweep(
    keys: PRNGKeys,
    site: Shaped[Array, "*position"],
    logdensity: Scalar,
    is_nonfinite: Bool[Array, ""],
    values: ArrayLike,
    score: Callable[[Shaped[Array, "*position"]], Scalar],
) -> tuple[Shaped[Array, "*position"], Scalar, Bool[Array, ""]]:
    """Draw each element of an array in turn; return the array, its log density, and whether any was NaN or infinite."""
    flat, shape = site.reshape(-1), site.shape
    values = jnp.asarray(values, flat.dtype)
    num_values = len(values)

    def draw(carry, inputs):
        flat, logdensity, is_nonfinite = carry
        i, key = inputs
        others = values[(jnp.argmax(values == flat[i]) + jnp.arange(1, num_values)) % num_values]
        scores = jax.vmap(lambda value: score(flat.at[i].set(value).reshape(shape)))(others)
        bad = jnp.any(jnp.isnan(scores) | (scores == jnp.inf))
        scores = jnp.concatenate([logdensity[None], jnp.where(jnp.isnan(scores), -jnp.inf, scores)])
        chosen = jax.random.categorical(key, scores)
        flat = flat.at[i].set(jnp.concatenate([flat[i][None], others])[chosen])
        return (flat, scores[chosen], is_nonfinite | bad), None

    inputs = (jnp.arange(flat.size), keys)
    (flat, logdensity, is_nonfinite), _ = jax.lax.scan(draw, (flat, logdensity, is_nonfinite), inputs)
    return flat.reshape(shape), logdensity, is_nonfinite
