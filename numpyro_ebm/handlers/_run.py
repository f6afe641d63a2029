"""Evaluate an estimator at an energy site, with its random key and its state from NumPyro."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from numpyro import handlers
from numpyro.primitives import mutable

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PRNGKey, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import AbstractEstimator
from numpyro_ebm.estimators.state import state_site


@contextmanager
def unchanged(holders: list[dict[str, Any]]) -> Iterator[None]:
    """Refuse an energy that changes a layer's state, since it is called once per row and many times per update."""
    before = [dict(holder) for holder in holders]

    def check(error: Exception | None) -> None:
        changed = [any(h[k] is not old.get(k) for k in h) for h, old in zip(holders, before, strict=True)]
        for holder, old in zip(holders, before, strict=True):
            holder.update(old)
        if any(changed):
            raise EnergyError(
                "The energy changes the state of one of its layers (batch norm, dropout, spectral norm). It must be a "
                "function of one event: use a layer without state, such as layer norm, or freeze it (use_running_average, "
                "deterministic)."
            ) from error

    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        check(error)
        raise
    check(None)


@contextmanager
def only_here(values: dict[str, Any]) -> Iterator[None]:
    """Give latent sites these values, and show the sites to no handler outside."""
    with handlers.block(hide=list(values)), handlers.substitute(data=values):
        yield


def run(estimator: AbstractEstimator, site: Site) -> RowValues:
    """Evaluate the estimator's surrogate, with its random key and its state from NumPyro."""
    rng_key: PRNGKey | None = numpyro.prng_key()  # pyright: ignore[reportAssignmentType]
    if rng_key is None:
        if estimator.draws_noise(site.distribution):
            raise EnergyError(
                f"The estimator '{estimator.name}' needs a random key. Write numpyro.handlers.seed(estimate(...), 0), or "
                "run it in SVI."
            )
        return estimator.surrogate(rng_key, site, None)[0]  # pyright: ignore[reportArgumentType]
    if not estimator.is_persistent:
        return estimator.surrogate(rng_key, site, None)[0]
    key_init, key_update = jax.random.split(rng_key)
    start: Any = {"state": estimator.init(key_init, site)}
    holder: Any = mutable(state_site(site.name, estimator.name), start)
    values, holder["state"] = estimator.surrogate(key_update, site, holder["state"])
    return values


def gradient_in_value(site: Site) -> RowValues:
    """Return zero per row, with the gradient of the log density in the value and in nothing else."""
    frozen = freeze(lambda value: jax.vmap(site.distribution.log_density)(value, site.local), site.value)
    log_density = frozen(site.value)
    return log_density - jax.lax.stop_gradient(log_density)


def nan_where_lacking(site: Site, values: RowValues) -> RowValues:
    """Return values of rows, with NaN (also in the gradient) for rows of discrete elements that hold NaN.

    As an integer NaN is a number like any other, so that the rows of a traced program, which are not checked, would hide it.
    """
    is_float = jnp.issubdtype(site.value.dtype, jnp.floating)
    if site.distribution.is_continuous or not is_float or is_concrete(site.value):
        return values
    lacks = jnp.any(jnp.isnan(site.value).reshape(site.num_rows, -1), axis=1)
    lacks = lacks if site.mask is None else lacks & site.mask
    return values * jnp.where(lacks, jnp.nan, 1.0)
