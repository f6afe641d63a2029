"""`standard_errors`: how far the parameters of an estimator may be from where infinitely many rows would put them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import biject_to, constraints

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.inputs import as_arrays, check_key, check_outside_jit
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.handlers.results import Result, check_values_given, values_of

COLUMNS_AT_ONCE = 32


class StandardErrors(NamedTuple):
    """What `standard_errors` returns.

    Attributes:
        params: the parameters that the errors are of.
        errors: their standard errors, in the same form.
        covariance: of the parameters one after another as ``jax.flatten_util.ravel_pytree(params)`` puts them.
    """

    params: dict[str, PyTree]
    errors: dict[str, PyTree]
    covariance: np.ndarray


def standard_errors(
    rng_key: PRNGKey,
    model: estimate,
    result: Result,
    *args: Any,
    names: str | Sequence[str] | None = None,
    num_draws: int = 1,
    **kwargs: Any,
) -> StandardErrors:
    r"""Sandwich standard errors of the parameters that an "objective" estimator found, log Z among them.

    Estimates are minima of a sum of losses of independent rows, so that near the truth their covariance is

    .. math:: A^{-1} B A^{-1}, \qquad A = \sum_i \nabla^2 \ell_i, \quad B = \sum_i \nabla \ell_i \nabla \ell_i^T

    For "nce" this is the theory of Gutmann and Hyvarinen, and the error of ``"<site>$log_normalizer"`` is that of log Z with
    the energy's parameters estimated beside it. ``A`` has as many columns as there are parameters, each a derivative of the
    gradient: meant for hundreds of them. A network's are not identified; ``names`` takes the others as known, and
    ``names=("x$log_normalizer",)`` then gives the error of log Z of this energy.

    A loss with random draws has those of ``rng_key``. One draw (of its ``nu`` noise events, directions, ...) per row is the
    theory's error of an estimate under frozen noise. Training draws afresh at every update, which averages over the draws as
    its rate decays: ``num_draws`` averages each row's gradient over so many.

    Noise counts as a known law. Where it is the rows of an `Empirical` base, what another sample of these would change is
    not in the errors, which are too small unless there are many more of them than rows.

    Args:
        rng_key: random key.
        model: the model that was trained, as `estimate` returned it.
        result: of `fit` or ``svi.run``, or a dict of parameters.
        *args: arguments of the model, those of training: every row counts.
        names: parameters that were estimated, or the name of one; None for all of the model's.
        num_draws: random draws to average each row's loss over.
        **kwargs: keyword arguments of the model.

    Raises:
        EnergyError: (a ValueError) for an estimator whose value is no objective, or whose loss has no rows of its own; for
            latent sites, subsampling, sites of different shapes or without rows; for unknown names; and where the parameters
            are at no minimum or not identified (``A`` not positive definite).
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

    keys = jax.random.split(rng_key, num_draws)
    covariance = compiled(partial(_sandwich, losses), flat, keys)
    if not np.all(np.isfinite(covariance)):
        _refuse(chosen)
    # From unconstrained to constrained parameters, to first order.
    slopes = jax.jacobian(lambda flat: ravel_pytree(constrain(flat))[0])(flat)
    covariance = np.asarray(slopes @ covariance @ slopes.T)
    errors = ravel_pytree(chosen)[1](jnp.sqrt(jnp.diag(covariance)))
    return StandardErrors(chosen, errors, covariance)


def _sandwich(losses: Callable[[Array, PRNGKey], Array], at: Array, keys: PRNGKey) -> Array:
    """NaN where the second derivatives are not positive definite."""

    def rows_and_gradient(flat):
        mean = lambda flat: jnp.mean(jax.lax.map(lambda key: losses(flat, key), keys), axis=0)  # noqa: E731
        rows, pull = jax.vjp(mean, flat)
        return rows, pull(jnp.ones_like(rows))[0]

    push = jax.linearize(rows_and_gradient, at)[1]
    row_slopes, curvature = jax.lax.map(push, jnp.eye(at.size, dtype=at.dtype), batch_size=COLUMNS_AT_ONCE)
    scale = jnp.sqrt(jnp.abs(jnp.diag(curvature)))  # so that units do not count for the condition
    values, vectors = jnp.linalg.eigh(curvature / jnp.outer(scale, scale))
    is_definite = values[0] > 10 * at.size * jnp.finfo(at.dtype).eps
    half = (vectors / values) @ vectors.T @ (row_slopes / scale[:, None]) / scale[:, None]
    return jnp.where(is_definite, half @ half.T, jnp.nan)


def _trace(model: estimate, values: Mapping[str, Any], rng_key: PRNGKey, args: tuple, kwargs: dict[str, Any]) -> Any:
    with handlers.trace() as trace, handlers.seed(rng_seed=rng_key), handlers.substitute(data=dict(values)):
        model(*args, **kwargs)
    check_values_given(trace, values)
    return trace


def _row_values(trace: Mapping[str, Any]) -> Array:
    """The log joint of the observed sites, row by row."""
    rows = [_scaled(site) for site in trace.values() if site["type"] == "sample"]
    if any(site["type"] == "plate" and len(site["value"]) != site["args"][0] for site in trace.values()):
        raise EnergyError("The model subsamples, and standard errors are those of all rows. Write the plate without it.")
    if len({value.shape for value in rows}) != 1 or rows[0].size < 2:
        raise EnergyError(
            f"Standard errors take the variance between rows, and the observed sites have shapes "
            f"{[value.shape for value in rows]}. Put the rows of all of them into one plate."
        )
    return sum(rows[1:], rows[0]).ravel()


def _scaled(site: Mapping[str, Any]) -> Array:
    if not site["is_observed"]:
        raise EnergyError(
            f"The site '{site['name']}' is latent: its uncertainty is the guide's or the posterior's. Standard errors are "
            "of models whose unknowns are all numpyro.param."
        )
    log_prob = site["fn"].log_prob(site["value"])
    return log_prob if site["scale"] is None else site["scale"] * log_prob


def _constraints(run: Callable[[], Any]) -> dict[str, Any]:
    """Constraint of each parameter, by a run of the model in which nothing is computed."""
    found: dict[str, Any] = {}

    def record():
        params = {name: site["kwargs"] for name, site in run().items() if site["type"] == "param"}
        found.update({name: kwargs.get("constraint", constraints.real) for name, kwargs in params.items()})

    jax.eval_shape(record)
    return found


def _parameters(
    values: Mapping[str, Any], known: Mapping[str, Any], names: Sequence[str] | None
) -> tuple[dict[str, PyTree], dict[str, Any]]:
    """Values that were estimated, and the transforms from unconstrained ones."""
    for name in names or ():
        if name not in known:
            raise EnergyError(f"The model has no parameter '{name}'. {nearest(name, known)}")
    chosen = {
        name: jax.tree.map(lambda leaf: jnp.asarray(leaf, float), values[name])
        for name in (known if names is None else names)
    }
    if not chosen:
        raise EnergyError("There are no parameters to give standard errors of. Write the unknowns as numpyro.param.")
    return chosen, {name: biject_to(known[name]) for name in chosen}


def _checked(model: Any) -> estimate:
    estimated = estimated_in(model)
    if estimated is None:
        raise TypeError(f"standard_errors needs the model as estimate returned it; got {type(model).__name__}.")
    estimators = estimated.estimators
    for each in estimators.values() if isinstance(estimators, dict) else (estimators,):
        if each.role != "objective" or each.couples_rows:
            why = "only its gradient means something" if each.role == "gradient" else "its loss is of pairs of rows"
            raise EnergyError(
                f"The estimator '{each.name}' has no sandwich of its rows: {why}. Objectives whose loss is a sum over rows "
                "have one: 'nce', 'sm', 'dsm', ..."
            )
    return estimated


def _refuse(chosen: Mapping[str, Any]) -> NoReturn:
    raise EnergyError(
        f"The loss has no curvature in some direction of the parameters {list(chosen)}: they are not at a minimum, or not "
        "identified, as a network's weights are. Train for longer, or name those whose errors are wanted, the others taken "
        "as known: names=(...)."
    )
