"""`gaussian_posterior`: a generalised posterior in closed form, where the loss is quadratic."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from numpyro.distributions import constraints
from numpyro.infer import init_to_median

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.bayes._affine import root
from numpyro_ebm.bayes._modes import is_definite
from numpyro_ebm.bayes._posterior import make_posterior
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.sampling.target import check_model

REALS = (constraints.real, constraints.real_vector, constraints.real_matrix)


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianPosterior:
    """A Gaussian posterior of unconstrained latents: the result of `gaussian_posterior`.

    Attributes:
        mean: by site.
        covariance: ``(d, d)``, in the order of ``jax.flatten_util.ravel_pytree(mean)``, which sorts the sites by name.
    """

    mean: dict[str, Array]
    covariance: Float[np.ndarray, "d d"]

    @property
    def standard_deviation(self) -> dict[str, Array]:
        """Standard deviations by site."""
        return ravel_pytree(self.mean)[1](jnp.sqrt(jnp.diag(jnp.asarray(self.covariance))))

    def sample(self, rng_key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Return draws by site, with ``sample_shape`` in front.

        Raises:
            EnergyError: for something that is no random key.
        """
        check_key("GaussianPosterior.sample", rng_key)
        flat, unravel = ravel_pytree(self.mean)
        noise = jax.random.normal(rng_key, (*sample_shape, flat.size), flat.dtype)
        draws = flat + noise @ root(jnp.asarray(self.covariance, flat.dtype))
        return jax.tree.map(
            lambda leaf: leaf.reshape(*sample_shape, *leaf.shape[1:]), jax.vmap(unravel)(draws.reshape(-1, flat.size))
        )


@in_own_modes
def gaussian_posterior(model: estimate, *args: Any, params: PyTree | None = None, **kwargs: Any) -> GaussianPosterior:
    r"""Return the generalised posterior in closed form, where it is Gaussian.

    An energy that is linear in its parameters, :math:`E(x) = -\theta^\top T(x) - b(x)` (a natural exponential family), has a
    score that is linear in them, so that "sm", "ksd" and other losses that are quadratic in the score are quadratic in the
    parameters. With a Gaussian prior the posterior ``prior x exp(-weight x loss)`` is the Gaussian

    .. math:: N\big(z_0 + \Lambda^{-1} g,\; \Lambda^{-1}\big)

    with ``g`` and :math:`-\Lambda` the gradient and the Hessian of its log density at any ``z_0``, which is what NUTS would
    draw from, at the price of one Hessian. That the log density is quadratic is checked, by Hessians at three points. (The
    losses of discrete events are exponentials of the parameters, also under "discrete_fisher", and not quadratic.)

    Args:
        model: the model as `estimate` returned it, with or without a weight.
        *args: arguments of the model.
        params: values of the model's ``numpyro.param`` sites, which stay fixed.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) for a log density that is not quadratic, latents on a bounded support, parameters without
            values, a posterior that is improper, and what `estimate` refuses under NUTS.
        TypeError: for a model that does not come from `estimate`.

    Warns:
        UncalibratedPosteriorWarning: without a weight, as under NUTS.

    Example:
        ``gaussian_posterior(estimate(model, "ksd", weight=0.5), x).sample(key, (1000,))``

    References:
        Matsubara, Knoblauch, Briol and Oates, Robust generalised Bayesian inference for intractable likelihoods (2022),
        proposition 2.
    """
    if estimated_in(model) is None:
        raise TypeError(f"gaussian_posterior needs the model as estimate returned it; got {type(model).__name__}.")
    args, kwargs = as_arrays("gaussian_posterior", (args, kwargs))
    check_outside_jit("gaussian_posterior", args, kwargs)
    _check_unconstrained(check_model(model, params, args, kwargs).trace)
    posterior = make_posterior(jax.random.key(0), model, params, init_to_median, args, kwargs)
    start, unravel = ravel_pytree(posterior.position)
    log_joint = posterior.log_joint(args, kwargs)
    mean, precision, is_quadratic = compiled(partial(_quadratic, lambda z: log_joint(unravel(z))), start)
    if not is_definite(precision):
        raise EnergyError("The posterior is improper: it has no curvature in some direction. Write proper priors.")
    if not is_quadratic:
        raise EnergyError(
            "The log density of the generalised posterior is not quadratic in the latents, so that it is no Gaussian. It is "
            "where the energy is linear in its parameters, their priors are Gaussian and the loss is quadratic in the score "
            "('sm', 'ksd'). Write NUTS(model)."
        )
    return GaussianPosterior(unravel(mean), np.asarray(jnp.linalg.inv(precision)))


def _quadratic(log_density: Callable[[Array], Array], start: Array) -> tuple[Array, Array, Array]:
    """Return mean and precision of a Gaussian, and whether it is one: whether the Hessian is the same at three points."""
    precision = -jax.hessian(log_density)(start)

    def newton(z):
        return z + jnp.linalg.solve(precision, jax.grad(log_density)(z))

    mean = newton(newton(start))  # the second step takes the rounding of the first away
    scale = jnp.sqrt(jnp.abs(jnp.diag(precision)))
    away = 2 * jax.random.normal(jax.random.key(0), (2, start.size)) / scale
    others = -jax.vmap(jax.hessian(log_density))(mean + away)
    off = jnp.max(jnp.abs(others - precision) / jnp.outer(scale, scale))
    return mean, precision, off < 10 * np.sqrt(jnp.finfo(start.dtype).eps)


def _check_unconstrained(trace: Any) -> None:
    for name, site in trace.items():
        if site["type"] != "sample" or site["is_observed"]:
            continue
        support = site["fn"].support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        if support not in REALS:
            raise EnergyError(
                f"The latent '{name}' has the support {support}, and a Gaussian posterior has no bounds. Write a Gaussian "
                "prior for it, or NUTS(model)."
            )
