"""Gradients of a posterior with data sets drawn from its energies, and Newton steps along them to a mode."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.linalg import inverse
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey, Scalar
from numpyro_ebm.bayes._auxiliary import (
    Auxiliary,
    Drawn,
    Positions,
    by_row,
    draw_sets,
    log_densities,
    next_averagings,
    step_sizes,
)
from numpyro_ebm.bayes._posterior import Energies
from numpyro_ebm.distributions.site import Site

FARTHEST = 3.0
"""Longest Newton step, in standard deviations of the posterior per latent."""
ENOUGH_ROWS = 2
"""Rows per latent from which the variance of their scores tells the information."""
DIFFERENCES = 8
"""Differences of two scores per latent from which the first information comes, so that it is well-conditioned."""


class Surface(NamedTuple):
    """A posterior up to log Z as functions of the flat unconstrained latents.

    Attributes:
        log_joint: log density of prior and data, with minus the energy in place of each energy's log likelihood.
        energies: the energy sites.
    """

    log_joint: Callable[[Flat], Scalar]
    energies: Callable[[Flat], Energies]

    def site_between(self, name: str, start: Flat, end: Flat, share: Scalar) -> Site:
        """Return an energy site at latents on the line from ``start`` to ``end``."""
        return self.energies(start + share * (end - start)).sites[name]

    def log_densities(self, z: Flat, data: Positions) -> Scalar:
        """Return the unnormalised log density of a data set of every energy site."""
        sites = self.energies(z).sites
        return sum((log_densities(sites[name], data[name]) for name in sites), jnp.zeros((), float))

    def by_row(self, z: Flat, data: Positions) -> Float[Array, " rows"]:
        """Return the unnormalised log density of each row, of all energy sites one after another."""
        sites = self.energies(z).sites
        return jnp.concatenate([by_row(sites[name], data[name]) for name in sites])

    def log_rest(self, z: Flat) -> Scalar:
        """Return the log density of priors and of other likelihoods, Jacobian included."""
        sites = self.energies(z).sites
        return self.log_joint(z) - self.log_densities(z, {name: site.position for name, site in sites.items()})

    def gradient(self, z: Flat, sets: Positions) -> Flat:
        """Return the gradient of the log posterior, with the mean over data sets drawn at ``z`` as the model term.

        Args:
            z: the flat latents.
            sets: data sets of every energy site, on the leading axis.
        """
        return jax.grad(lambda z: self.log_joint(z) - jnp.mean(jax.vmap(partial(self.log_densities, z))(sets)))(z)

    def observed_information(self, z: Flat) -> Matrix:
        """Return the information of the data about the latents by the variance of the rows' own scores."""
        total = jnp.zeros((z.size, z.size))
        for name, site in self.energies(z).sites.items():
            scores = jax.jacfwd(lambda z, name=name, site=site: by_row(self.energies(z).sites[name], site.position))(z)
            takes_part = jnp.ones((len(scores), 1), bool) if site.mask is None else site.mask[:, None]
            mean = jnp.sum(scores, axis=0) / jnp.maximum(jnp.sum(takes_part), 1)  # `by_row` is 0 for other rows
            deviations = jnp.where(takes_part, scores - mean, 0.0)
            total += deviations.T @ deviations
        return total

    def information(self, z: Flat, sets: Positions) -> Float[Array, "d d"]:
        """Return the information of the data about the latents, by an even number of data sets drawn at ``z``.

        It is the variance of the score, from differences within pairs of sets, and the sum over rows, which are independent
        given the latents.
        """
        slopes = jax.vmap(partial(jax.jacfwd(self.by_row), z))(sets)
        differences = slopes[::2] - slopes[1::2]
        return 0.5 * jnp.einsum("pri,prj->ij", differences, differences) / len(differences)


class Settled(NamedTuple):
    """Where Newton steps have led.

    Attributes:
        z: the flat latents.
        averaging: by energy site, dual averaging of the step size of the inner kernel.
        covariance: ``(d, d)``, inverse of the information of the data and the curvature of the prior.
    """

    z: Flat
    averaging: dict[str, Any]
    covariance: Float[Array, "d d"]


def settle(
    rng_key: PRNGKey,
    surface: Surface,
    auxiliaries: Mapping[str, Auxiliary],
    averaging: dict[str, Any],
    z: Flat,
    num_steps: int,
) -> Settled:
    """Go to a mode of the posterior by stochastic Newton steps, and estimate the covariance there.

    At each step two data sets are drawn. Their mean is the model term of the gradient, and their difference, row by row,
    gives the variance of the score, which is the information of the data about the latents. Of few rows, two data sets tell
    it in few directions, and a step along another one would be as long as the prior is wide: the information before the
    first step comes from as many data sets as tell it in all.

    Far from the mode the difference says little: chains that start at the data do not arrive, or elements hardly vary under
    the model. Where there are enough rows, the steps there add the information of the data's own scores, and are damped as
    for self-concordant functions: they are shorter than one standard deviation of a row. The average of the differences
    begins anew after the last one of them.

    Steps shorten whenever the gradient points against the last step, as in Kesten, Accelerated stochastic approximation
    (1958). Whole steps cover a long distance, and shorter ones follow where noise, or steps that are too long, turn around.
    """
    num_rows = sum(site.num_rows for site in surface.energies(z).sites.values())
    num_pairs = math.ceil(DIFFERENCES * z.size / num_rows)
    key_start, key_steps = jax.random.split(rng_key)

    def draw(key, z, averaging, num):
        drawn = draw_sets(key, auxiliaries, surface.energies(z), step_sizes(averaging), num)
        return drawn, {name: each.positions for name, each in drawn.items()}

    def step(carry, key):
        z, averaging, information, num_near, num_turns, last, _ = carry
        pair, sets = draw(key, z, averaging, 2)
        gradient = surface.gradient(z, sets)
        information += (surface.information(z, sets) - information) / (num_pairs + num_near / 2)
        precision = information + jnp.diag(_prior_precision(surface, z))
        covariance = inverse(precision)
        move, length = _newton(gradient, covariance)
        is_far = length > FARTHEST * z.size**0.5
        move *= jnp.minimum(1.0, FARTHEST * z.size**0.5 / jnp.maximum(length, 1e-6))
        if num_rows >= ENOUGH_ROWS * z.size:
            far_move, length = _newton(gradient, inverse(precision + surface.observed_information(z)))
            move = jnp.where(is_far, far_move / (1 + length / num_rows**0.5), move)
        num_turns += gradient @ last < 0
        move /= 1 + num_turns / 5
        z = jnp.where(jnp.all(jnp.isfinite(move)), z + move, z)
        averaging = next_averagings(auxiliaries, averaging, _first(pair))
        return (z, averaging, information, jnp.where(is_far, 0, num_near + 1), num_turns, move, covariance), None

    information, zero = surface.information(z, draw(key_start, z, averaging, 2 * num_pairs)[1]), jnp.zeros((), jnp.int32)
    start = z, averaging, information, zero, zero, jnp.zeros_like(z), jnp.eye(z.size, dtype=information.dtype)
    (z, averaging, *_, covariance), _ = jax.lax.scan(step, start, jax.random.split(key_steps, num_steps))
    return Settled(z, averaging, covariance)


def _newton(gradient: Flat, covariance: Matrix) -> tuple[Flat, Scalar]:
    """Return a Newton step, and its length in standard deviations."""
    move = covariance @ gradient
    return move, jnp.sqrt(jnp.maximum(gradient @ move, 0.0))


def _first(drawn: dict[str, Drawn]) -> dict[str, Drawn]:
    return jax.tree.map(lambda leaf: leaf[0], drawn)


def _prior_precision(surface: Surface, z: Flat) -> Flat:
    """Return how narrow the prior is at some latents; 1 where it does not say.

    The data may tell nothing of a latent, and a step along it is then as long as the prior is wide. A prior with a spike is
    narrow at zero and wide elsewhere. In exponential and heavier tails the curvature is nearly zero or negative, and a step
    of slope over curvature would end far on the other side: there half the squared slope stands for it. In the tail of a
    Student t distribution such a step ends at the centre or before.
    """
    slope, hessian = jax.grad(surface.log_rest)(z), jax.hessian(surface.log_rest)(z)
    curvature, squared = -jnp.diagonal(hessian), slope**2
    precision = jnp.where(curvature > squared / FARTHEST**2, curvature, squared / 2)
    return jnp.where(precision > 1e-8, precision, 1.0)
