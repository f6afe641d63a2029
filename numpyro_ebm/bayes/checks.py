"""Checks of a posterior by auxiliary data at its draws: the length of the auxiliary chains, and the Bartlett identity."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.typing import Array, Flat, PRNGKey, Scalar
from numpyro_ebm.bayes._auxiliary import Auxiliary, draw_sets
from numpyro_ebm.bayes._posterior import Latents
from numpyro_ebm.bayes._settling import Surface

LONGER = 10
"""Length of the chains that serve as a reference, in units of the auxiliary chains of the run."""
AT_ONCE = 8
"""Draws of the posterior that are processed together; more need more memory."""


class PosteriorTerms(NamedTuple):
    """Terms at draws of a posterior whose means are zero if it is right; the leading axes are those of the draws.

    Attributes:
        z: ``(..., d)``, the unconstrained latents, flat.
        shift: ``(..., d)``, the score of auxiliary data as the run draws them minus that of data from chains that are ten
            times as long and start away from the data; exactly 0 for exact samplers.
        bartlett: ``(..., d, d)``, Hessian of the log posterior plus the outer product of its gradient, without bias from
            the noise of the auxiliary data.
    """

    z: Float[Array, "... d"]
    shift: Float[Array, "... d"]
    bartlett: Float[Array, "... d d"]


def terms_at(
    rng_key: PRNGKey, surface: Surface, auxiliaries: Mapping[str, Auxiliary], sizes: Mapping[str, Scalar | None], z: Flat
) -> PosteriorTerms:
    """Return the terms at one draw of the posterior."""
    key_short, key_long = jax.random.split(rng_key)
    here, distant = surface.energies(z), {name: each.from_elsewhere(LONGER) for name, each in auxiliaries.items()}
    short, long = (
        {name: drawn.positions for name, drawn in draw_sets(key, by, here, sizes, 2).items()}
        for key, by in ((key_short, auxiliaries), (key_long, distant))
    )
    scores, others = (jax.vmap(partial(jax.grad(surface.log_densities), z))(sets) for sets in (short, long))
    is_exact = all(each.exact is not None for each in auxiliaries.values())
    shift = jnp.zeros_like(z) if is_exact else jnp.mean(scores - others, axis=0)
    one, other = jax.grad(surface.log_joint)(z) - others
    hessian = jax.jacfwd(partial(surface.gradient, sets=long))(z) - surface.information(z, long)
    return PosteriorTerms(z, shift, hessian + 0.5 * (jnp.outer(one, other) + jnp.outer(other, one)))


def terms_of_draws(
    rng_key: PRNGKey,
    surface: Surface,
    auxiliaries: Mapping[str, Auxiliary],
    sizes: Mapping[str, Float[Array, " chains"] | None],
    z: Float[Array, "chains draws d"],
) -> PosteriorTerms:
    """Return the terms at draws of several chains, with the inner step sizes of each chain."""
    chains, draws = z.shape[:2]
    each_size = {name: None if size is None else jnp.repeat(size, draws) for name, size in sizes.items()}
    inputs = jax.random.split(rng_key, chains * draws), each_size, z.reshape(chains * draws, -1)

    def at(key, size, z):
        return terms_at(key, surface, auxiliaries, size, z)

    terms = jax.lax.map(lambda one: at(*one), inputs, batch_size=AT_ONCE)
    return jax.tree.map(lambda leaf: leaf.reshape((chains, draws, *leaf.shape[1:])), terms)


def coordinate_names(z: Latents) -> list[str]:
    """Return a name for each number of the flat latents, such as ``w[0, 1]``."""
    shapes = {name: jnp.shape(z[name]) for name in sorted(z)}
    return [
        name + (f"[{', '.join(map(str, index))}]" if shape else "")
        for name, shape in shapes.items()
        for index in np.ndindex(shape)
    ]
