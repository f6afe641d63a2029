"""`Simulated`: data sets drawn from the model at its estimate, for the covariance of a score."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey
from numpyro_ebm.bayes._auxiliary import Auxiliary, auxiliaries, draw_all, next_averagings, step_sizes
from numpyro_ebm.bayes._loss import Loss, Rows
from numpyro_ebm.distributions.site import Site

Draw = Callable[[PRNGKey], Rows]
"""Draws a data set of every energy site, in place of the model's own rows."""
ADAPTED_SETS = 100
"""Data sets over which the step sizes of the chains adapt."""


@dataclasses.dataclass(frozen=True)
class Simulated:
    """Data sets drawn from the model at its estimate, by chains that start at the data or exactly.

    They say how much a loss varies from one data set to another if the energy holds. One dependent observation, such as a
    lattice, has no other rows that could say it.

    Args:
        inner: the kernel of the chains, as in `ExchangeKernel`.
        num_steps: transitions of a chain.
        exact_sampler: exact draws in place of chains, as in `ExchangeKernel`.
        num_sets: data sets. The relative error of a variance is about ``sqrt(2 / num_sets)`` for one row, and smaller for
            more rows.

    Raises:
        EnergyError: for a count below 1, or fewer than two sets.

    Example:
        ``ebm.bayes.Sandwich(ebm.bayes.Simulated("block_gibbs", num_steps=50))``
    """

    inner: Any = None
    num_steps: int = 50
    exact_sampler: Any = None
    num_sets: int = 400

    def __post_init__(self):
        check_count("Simulated", "num_steps", self.num_steps)
        check_count("Simulated", "num_sets", self.num_sets, 2)

    def auxiliaries(self, owner: str, loss: Loss) -> dict[str, Auxiliary]:
        """Return how the data of each site are drawn."""
        sites = loss.energies(loss.start).sites
        return auxiliaries(owner, sites, self.inner, self.num_steps, 0, self.exact_sampler)

    def at(self, rng_key: PRNGKey, loss: Loss, z: Flat, owner: str = "calibrate") -> Draw:
        """Return a function that draws data sets at given latents, after an adaptation of the chains' step sizes."""
        drawers, energies = self.auxiliaries(owner, loss), loss.energies(z)
        averaging = {name: each.averaging() for name, each in drawers.items()}

        def adapt(averaging, key):
            drawn = draw_all(key, drawers, energies, step_sizes(averaging))
            return next_averagings(drawers, averaging, drawn), None

        if any(each is not None for each in averaging.values()):
            averaging, _ = jax.lax.scan(adapt, averaging, jax.random.split(rng_key, ADAPTED_SETS))
        sizes = step_sizes(averaging, is_adapting=False)

        def draw(rng_key):
            drawn = draw_all(rng_key, drawers, energies, sizes)
            return lambda name, site: with_positions(site, drawn[name].positions)

        return draw


def with_positions(site: Site, positions: Any) -> Site:
    """Return a site with other rows, given in unconstrained space."""
    value = jax.vmap(site.distribution.constrain)(positions)
    return dataclasses.replace(site, value=value.astype(site.value.dtype))


def covariance_over_sets(
    score: Callable[[PRNGKey], Float[Array, "units d"]], rng_key: PRNGKey, num_sets: int
) -> tuple[Flat, Matrix]:
    """Return the mean over data sets of the sum of scores of independent units, and its covariance.

    The covariance is the sum of those of the units, by Welford's updates, which cancel no digits.
    """

    def step(carry, inputs):
        mean, squares = carry
        k, key = inputs
        found = score(key)
        off = found - mean
        mean += off / (k + 1)
        return (mean, squares + off.T @ (found - mean)), None

    shape = jax.eval_shape(score, rng_key)
    start = jnp.zeros(shape.shape, shape.dtype), jnp.zeros((shape.shape[1],) * 2, shape.dtype)
    (mean, squares), _ = jax.lax.scan(step, start, (jnp.arange(num_sets), jax.random.split(rng_key, num_sets)))
    return jnp.sum(mean, axis=0), squares / (num_sets - 1)


def of_units(loss: Loss, z: Flat, rows: Rows) -> Float[Array, "units d"]:
    """Return the gradient of the loss of each independent unit: of each row, or of all where rows are coupled."""
    if loss.couples_rows:
        return jax.grad(lambda z: loss.total(z, rows))(z)[None]
    slopes = jax.jacfwd(lambda z: loss.of_rows(z, rows))(z)
    return jnp.concatenate(slopes)
