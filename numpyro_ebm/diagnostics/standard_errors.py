"""`standard_errors`: sandwich standard errors of parameters that an objective estimated."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.sandwich import slopes_and_curvature
from numpyro_ebm._core.typing import Array, PRNGKey, PRNGKeys, PyTree, Scalar
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.handlers.results import Result, check_values_given, values_of


class StandardErrors(NamedTuple):
    """Result of `standard_errors`.

    Attributes:
        params: the parameters.
        errors: their standard errors, in the same form.
        covariance: covariance of the parameters, in the order of ``jax.flatten_util.ravel_pytree(params)``.
    """

    params: dict[str, PyTree]
    errors: dict[str, PyTree]
    covariance: Float[np.ndarray, "d d"]


def standard_errors(
    rng_key: PRNGKey,
    model: estimate,
    result: Result,
    *args: Any,
    names: str | Sequence[str] | None = None,
    num_draws: int = 1,
    **kwargs: Any,
) -> StandardErrors:
    r"""Compute sandwich standard errors of the parameters that an "objective" estimator found, including log Z.

    The estimates minimise a sum of losses of independent rows, so near the truth their covariance is

    .. math:: A^{-1} B A^{-1}, \qquad A = \sum_i \nabla^2 \ell_i, \quad B = \sum_i \nabla \ell_i \nabla \ell_i^T

    For "nce" this is the theory of Gutmann and Hyvarinen, and the error of ``"<site>$log_normalizer"`` is that of log Z with
    the energy's parameters estimated beside it. ``A`` has one column per parameter, each a derivative of the gradient, so
    the function is meant for at most hundreds of parameters. Those of a network are not identified: ``names`` selects some
    and takes the others as known, and ``names=("x$log_normalizer",)`` gives the error of log Z of this energy.

    A loss with random draws uses those of ``rng_key``. One draw (of its ``nu`` noise events, directions, ...) per row gives
    the theoretical error of an estimate under fixed noise. Training draws again at every update, which averages over the
    draws as the learning rate decays: ``num_draws`` averages each row's gradient over that many draws.

    A latent site whose value is given (the mode that `AutoDelta` finds, as ``params | guide.median(params)``) is a parameter
    with a penalty, minus the log of its prior, which adds to ``A`` and not to ``B``: the errors are those of the penalised
    estimate over new data, around a value that the prior has moved. Where the loss is a likelihood, the standard deviations
    of the posterior are the roots of the diagonal of ``A^{-1}``, which are larger.

    Noise counts as a known distribution. Where it is the rows of an `Empirical` base, the errors leave out the sampling of
    these rows, and are too small unless there are many more of them than rows of data.

    Args:
        rng_key: random key.
        model: the model that was trained, as `estimate` returned it.
        result: the result of `fit` or ``svi.run``, or a dict of parameters and of latent sites.
        *args: arguments of the model, as in training, with all rows.
        names: names of the parameters and latent sites that were estimated, or one name; None for all of the model.
        num_draws: number of random draws to average each row's loss over.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) for an estimator whose value is not an objective, or whose loss is not a sum over rows;
            for latent sites without a value or in the plate of the rows, subsampling, sites of different shapes or without
            rows; for unknown names; and for parameters that are not at a minimum or not identified (``A`` not positive
            definite).
        TypeError: for a model that does not come from `estimate`.

    Example:
        ``standard_errors(key, estimate(model, "nce", nu=5), result, x).errors["x$log_normalizer"]``

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012), theorem 3; Huber, The
        behavior of maximum likelihood estimates under nonstandard conditions (1967).
    """
    check_key("standard_errors", rng_key)
    args, kwargs = as_arrays("standard_errors", (args, kwargs))
    check_outside_jit("standard_errors", rng_key, args, kwargs)
    check_count("standard_errors", "num_draws", num_draws)
    model = _checked(model)
    values = values_of("standard_errors", result)
    names = (names,) if isinstance(names, str) else names
    run = lambda values, key: _trace(model, values, key, args, kwargs)  # noqa: E731
    chosen, transforms = _parameters(values, _constraints(lambda: run(values, rng_key)), names)
    free = {name: jax.tree.map(transforms[name].inv, value) for name, value in chosen.items()}
    flat, unravel = ravel_pytree(free)

    def constrain(flat):
        return {name: jax.tree.map(transforms[name], value) for name, value in unravel(flat).items()}

    def losses(flat, key):
        return -_row_values(run(values | constrain(flat), key))

    def penalty(flat):
        return -_log_prior(run(values | constrain(flat), rng_key))

    keys = jax.random.split(rng_key, num_draws)
    covariance = compiled(partial(_sandwich, losses, penalty), flat, keys)
    if not np.all(np.isfinite(covariance)):
        _refuse(chosen)
    # Transform from unconstrained to constrained parameters, to first order.
    slopes = jax.jacobian(lambda flat: ravel_pytree(constrain(flat))[0])(flat)
    covariance = np.asarray(slopes @ covariance @ slopes.T)
    errors = ravel_pytree(chosen)[1](jnp.sqrt(jnp.diag(covariance)))
    return StandardErrors(chosen, errors, covariance)


def _sandwich(
    losses: Callable[[Float[Array, " d"], PRNGKey], Float[Array, " rows"]],
    penalty: Callable[[Float[Array, " d"]], Scalar],
    at: Float[Array, " d"],
    keys: PRNGKeys,
) -> Float[Array, "d d"]:
    """Return the covariance; NaN where the second derivatives are not positive definite."""
    mean = lambda flat: jnp.mean(jax.lax.map(lambda key: losses(flat, key), keys), axis=0)  # noqa: E731
    row_slopes, curvature = slopes_and_curvature(mean, penalty, at)
    scale = jnp.sqrt(jnp.abs(jnp.diag(curvature)))  # so that the condition number does not depend on units
    values, vectors = jnp.linalg.eigh(curvature / jnp.outer(scale, scale))
    is_definite = values[0] > 10 * at.size * jnp.finfo(at.dtype).eps
    half = (vectors / values) @ vectors.T @ (row_slopes / scale[:, None]) / scale[:, None]
    return jnp.where(is_definite, half @ half.T, jnp.nan)


def _trace(model: estimate, values: Mapping[str, Any], rng_key: PRNGKey, args: tuple, kwargs: dict[str, Any]) -> Any:
    with handlers.trace() as trace, handlers.seed(rng_seed=rng_key), handlers.substitute(data=dict(values)):
        model(*args, **kwargs)
    check_values_given(trace, values)
    return trace


def _row_values(trace: Mapping[str, Any]) -> Float[Array, " rows"]:
    """Return the log joint of the observed sites, row by row."""
    rows = [_scaled(site) for site in trace.values() if _is_observed(site)]
    if any(site["type"] == "plate" and len(site["value"]) != site["args"][0] for site in trace.values()):
        raise EnergyError("The model subsamples, and standard errors need all rows. Write the plate without subsample_size.")
    if len({value.shape for value in rows}) != 1 or rows[0].size < 2:
        raise EnergyError(
            f"Standard errors need the variance between rows, and the observed sites have shapes "
            f"{[value.shape for value in rows]}. Put the rows of all of them into one plate."
        )
    return sum(rows[1:], rows[0]).ravel()


def _log_prior(trace: Mapping[str, Any]) -> Scalar:
    """Return the log prior of the latent sites."""
    of_rows = {frame.name for site in trace.values() if _is_observed(site) for frame in site["cond_indep_stack"]}
    latents = [site for site in trace.values() if _is_latent(site)]
    for site in latents:
        if of_rows & {frame.name for frame in site["cond_indep_stack"]}:
            raise EnergyError(
                f"The latent site '{site['name']}' is in the plate of the rows: it has a value for each row, and standard "
                "errors are of parameters that all rows share. Sample the site outside of the plate."
            )
    return sum((jnp.sum(_scaled(site)) for site in latents), jnp.zeros(()))


def _is_observed(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and site["is_observed"]


def _is_latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _scaled(site: Mapping[str, Any]) -> Float[Array, "*batch"]:
    log_prob = site["fn"].log_prob(site["value"])
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _constraints(run: Callable[[], Any]) -> dict[str, Any]:
    """Return the constraint of each parameter and latent site, from an abstract run of the model."""
    found: dict[str, Any] = {}

    def record():
        trace = run()
        params = {name: site["kwargs"] for name, site in trace.items() if site["type"] == "param"}
        found.update({name: kwargs.get("constraint", constraints.real) for name, kwargs in params.items()})
        found.update({name: site["fn"].support for name, site in trace.items() if _is_latent(site)})

    jax.eval_shape(record)
    return found


def _parameters(
    values: Mapping[str, Any], known: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Return the estimated values, and their transforms from unconstrained space."""
    for name in names or ():
        if name not in known:
            raise EnergyError(f"The model has no parameter '{name}'. {nearest(name, known)}")
    chosen = {
        name: jax.tree.map(lambda leaf: jnp.asarray(leaf, float), values[name])
        for name in (known if names is None else names)
    }
    if not chosen:
        raise EnergyError("There are no parameters to give standard errors of.")
    return chosen, {name: biject_to(known[name]) for name in chosen}


def _checked(model: object) -> estimate:
    estimated = estimated_in(model)
    if estimated is None:
        raise TypeError(f"standard_errors needs the model as estimate returned it; got {type(model).__name__}.")
    estimators = estimated.estimators
    for each in estimators.values() if isinstance(estimators, dict) else (estimators,):
        if each.role != "objective" or each.couples_rows:
            why = "only its gradient is meaningful" if each.role == "gradient" else "its loss is of pairs of rows"
            raise EnergyError(
                f"The estimator '{each.name}' has no sandwich of its rows: {why}. Use an objective whose loss is a sum over "
                "rows, such as 'nce', 'sm' or 'dsm'."
            )
    return estimated


def _refuse(chosen: Mapping[str, Any]) -> NoReturn:
    raise EnergyError(
        f"The loss has no curvature in some direction of the parameters {list(chosen)}: they are not at a minimum, or not "
        "identified, like the weights of a network. Train for longer, or write names=(...) with the parameters whose errors "
        "you need; the others are then taken as known."
    )
