"""Exact score matching."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm.estimators._base import AbstractEstimator, Site
from numpyro_ebm.estimators._derivatives import over_coordinates


@dataclasses.dataclass(frozen=True)
class ScoreMatching(AbstractEstimator):
    r"""Score matching with the exact trace (Hyvarinen).

    Loss of a row ``x`` with score ``s = -grad E`` (unconstrained space, Jacobian included):

    .. math:: \tfrac12 |s(x)|^2 + \operatorname{tr} \nabla s(x)

    The surrogate is minus the loss. Free of log Z and of randomness; on a Gaussian it is maximum likelihood. Costs ``d``
    forward derivatives of the score per row, at most 64 of them at a time, so the Hessian of a large event is never
    built. Unbounded below for a flexible energy on finite data: stop early on held-out rows.

    Example:
        ``estimate(model, "sm")``

    References:
        Hyvarinen, Estimation of non-normalized statistical models by score matching (2005).
    """

    name = "sm"
    role = "objective"
    needs_energy = False
    is_deterministic = True

    def surrogate(self, rng_key, site: Site, state):
        """Minus the loss, per row."""

        def row_loss(position, local):
            flat, unravel = ravel_pytree(position)
            score, push = jax.linearize(lambda v: ravel_pytree(site.score(unravel(v), local))[0], flat)

            trace = jnp.sum(over_coordinates(push, flat, lambda i, column: column[i]))
            return 0.5 * jnp.sum(score**2) + trace

        return -jax.vmap(row_loss)(site.position, site.local), state
