"""Conditionals of single elements of mixed events: sums over the values of discrete ones, integrals over continuous ones."""

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.members import Members
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.trapezoid import log_integral
from numpyro_ebm._core.typing import Array, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.scales import Spread
from numpyro_ebm.estimators.parts.single_changes import NUMBERS_AT_ONCE
from numpyro_ebm.kernels.elements import Elements

HALF_WIDTH = 8.0
"""Half width of the interval of an integral, in standard deviations of the data; it also covers every row of the batch."""
LARGEST_ERROR = 0.01
"""Nats by which the log of an integral may be wrong, on average over rows, before a warning."""


def log_conditionals(site: Site, num_points: int) -> RowValues:
    """Return, for each row of a mixed event, the sum of the log conditional densities of all its elements.

    A continuous element is a coordinate of unconstrained space. Its conditional is normalised by the trapezoidal rule on an
    interval of 8 standard deviations of the data to either side of their mean, and exponential tails beyond its ends.

    Args:
        site: the rows.
        num_points: points of the interval.

    Warns:
        UserWarning: if the integrals are not accurate to 0.01 on average.
    """
    members: Members = site.distribution.members
    values = site.distribution.part(members.discrete).discrete_values or {}
    low, high = _interval(site)
    coordinates = np.flatnonzero(members.is_continuous)

    def of_row(row):
        position, local = row
        own = site.log_density(position, local)
        discrete = sum(_of_discrete(site, members, name, each, position, local) for name, each in values.items())
        if not coordinates.size:
            return discrete, jnp.zeros((), float)
        integral = jax.vmap(lambda j: _over_coordinate(site, j, (low[j], high[j]), num_points, position, local))
        log_value, error = integral(coordinates)
        return discrete + jnp.sum(own - log_value), jax.lax.stop_gradient(jnp.max(error))

    most = max([num_points * coordinates.size, *(math.prod(v.shape) * members.is_continuous.size for v in values.values())])
    at_once = max(1, min(site.num_rows, NUMBERS_AT_ONCE // (members.is_continuous.size * most)))
    total, errors = jax.lax.map(jax.checkpoint(of_row), (site.position, site.local), batch_size=at_once)
    _warn_of_error(site, errors)
    return total


def _of_discrete(
    site: Site, members: Members, name: str, values: Shaped[np.ndarray, "values ..."], position: Array, local: PyTree
) -> Scalar:
    """Return the sum of the log conditionals of the elements of one discrete member."""
    parts = members.split(position)
    elements = Elements.of(values, parts[name])
    codes = elements.codes(parts[name])

    def at(i, code):
        changed = elements.position(codes.at[i].set(code.astype(codes.dtype)), parts[name])
        return site.log_density(members.join({**parts, name: changed}), local)

    def of_element(i):
        scores = jax.vmap(lambda code: at(i, code))(jnp.arange(len(values)))
        return scores[codes[i]] - jax.nn.logsumexp(scores)

    return jnp.sum(jax.vmap(of_element)(jnp.arange(sum(elements.sizes))))


def _over_coordinate(
    site: Site, j: Int[Array, ""], ends: tuple[Scalar, Scalar], num_points: int, position: Float[Array, " d"], local: PyTree
) -> tuple[Scalar, Scalar]:
    """Return the log of the integral of the density along one coordinate, and a bound on its error."""
    low, high = (end[None] for end in ends)
    integral = log_integral(lambda t: site.log_density(position.at[j].set(t), local), (), low, high, num_points)
    return integral.log_value, integral.error


def _interval(site: Site) -> tuple[Float[Array, " d"], Float[Array, " d"]]:
    """Return the ends of the interval of each coordinate."""
    spread = Spread.of(site)
    reach = HALF_WIDTH * or_one(spread.sd)
    rows = jax.lax.stop_gradient(site.position)
    if site.mask is not None:
        rows = jnp.where(site.mask[:, None], rows, spread.mean)
    return jnp.minimum(spread.mean - reach, jnp.min(rows, axis=0)), jnp.maximum(spread.mean + reach, jnp.max(rows, axis=0))


def _warn_of_error(site: Site, errors: RowValues) -> None:
    takes_part = jnp.ones(site.num_rows, bool) if site.mask is None else site.mask
    is_wrong = ~(jnp.mean(errors, where=takes_part) <= LARGEST_ERROR) & jnp.any(takes_part)
    words = (
        f"At site '{site.name}': the integrals over the continuous elements are not accurate to {LARGEST_ERROR}: their "
        "conditionals are much narrower than the data, or so wide that they leave 8 standard deviations of the data. Write "
        "a larger num_points, start the training at an energy that rises with its elements, or write estimate(model, 'cd')."
    )
    if not is_concrete(is_wrong):
        call_where_any(Told(_warn, (words,)), is_wrong[None], ())
    elif is_wrong:
        _warn(words)


def _warn(words: str, *_: Any) -> None:
    warnings.warn(words, stacklevel=2)
