"""Log Z of a family of energies at many parameters, in one compiled program."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from numpyro_ebm._core import programs
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.partition import _problem
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate, LogPartition, in_shape, shaped
from numpyro_ebm.partition._checks import Place, check_found
from numpyro_ebm.partition._rows import estimate_rows

Point = dict[str, Shaped[Array, "..."]]
"""Parameters by name; leaves that lead with the number of points for many of them."""
Family = Callable[[Point], EventDistribution]
"""The energy at a point: events of one shape and support, and one number of rows, at all points."""


class Sloped(NamedTuple):
    """Log Z at many points, and its derivatives.

    Attributes:
        log_z: log Z with its standard error, of shape ``(points,)``.
        slopes: derivatives of log Z in each parameter, ``(points,)``.
        errors: their standard errors; 0 if the method is exact.
    """

    log_z: LogPartition
    slopes: dict[str, Float[Array, " points"]]
    errors: dict[str, Float[Array, " points"]]


def at_each(
    owner: str, rng_key: PRNGKey | None, method: AbstractPartition, family: Family, points: Point, place: Place
) -> LogPartition:
    """Estimate log Z at each point, ``(points, *batch_shape)``, on behalf of a public function.

    Points run one after the other, and the rows and chains of each at once.

    Args:
        owner: the public function.
        rng_key: random key, from which each point gets its own; None is enough for exact methods.
        method: the method.
        family: the energy at a point.
        points: parameters by name, with the number of points in front.
        place: words for a point, given its number.

    Raises:
        EnergyError: for a random method without a key, for data or draws, and as `log_partition`.
    """
    first = _checked(owner, rng_key, method, family, points)
    found = _over(lambda key, point: _at(key, method, family, point)._replace(draws=None), rng_key, points)
    num_rows = _problem.num_rows(first)
    check_found(owner, method, first, found, lambda index: place(index // num_rows), stacklevel=4)
    return shaped(in_shape(found, (-1, *_problem.shape_of(first))), method.bound)


def with_slopes(
    owner: str, rng_key: PRNGKey | None, method: AbstractPartition, family: Family, points: Point, place: Place
) -> Sloped:
    r"""Estimate log Z and its derivatives at each point, for energies that are the same for all rows.

    .. math:: \partial_\theta \log Z = E_p[\partial_\theta \log \tilde p(x; \theta)]

    The derivative of an exact method is that of the computation. That of a random one is the weighted mean over the draws
    with which the method ends, and its standard error that of a ratio of means of independent draws.

    Raises:
        EnergyError: as `at_each`, for a random method that does not end with draws of the target, and for an energy with a
            log Z per row.
    """
    first = _checked(owner, rng_key, method, family, points)
    if _problem.shape_of(first):
        raise EnergyError(
            f"{owner} needs one log Z for each set of parameters, and this energy has one for each of its rows of shape "
            f"{first.batch_shape}. Leave out context=, batch_shape= and a base with rows."
        )
    evaluate = _estimated_slopes if method.needs_key else _exact_slopes
    found, slopes, errors = _over(functools.partial(evaluate, method, family), rng_key, points)
    check_found(owner, method, first, found, place, stacklevel=4)
    for name, each in slopes.items():
        bad = jnp.flatnonzero(~jnp.isfinite(each))
        if bad.size:
            index = int(bad[0])
            raise EnergyError(f"{owner} found that the derivative of log Z in {name}{place(index)} is {each[index]}.")
    return Sloped(shaped(found, method.bound), slopes, errors)


def samples_of(owner: str, posterior_samples: Mapping[str, ArrayLike]) -> Point:
    """Return draws by name as arrays that lead with one number of draws.

    Raises:
        EnergyError: for none, and for draws that differ in number.
        TypeError: for anything but draws by name.
    """
    if not isinstance(posterior_samples, Mapping):
        came = type(posterior_samples).__name__
        raise TypeError(f"{owner} needs draws by name; got {came}. Write posterior_samples=mcmc.get_samples().")
    samples = {name: jnp.asarray(each) for name, each in posterior_samples.items()}
    numbers = {name: each.shape[:1] for name, each in samples.items()}
    if not samples or len(set(numbers.values())) > 1 or not all(sum(each) for each in numbers.values()):
        raise EnergyError(
            f"{owner} needs draws that all lead with their number; got {numbers or 'none'} in front. Write "
            "posterior_samples=mcmc.get_samples()."
        )
    return samples


def _checked(
    owner: str, rng_key: PRNGKey | None, method: AbstractPartition, family: Family, points: Point
) -> EventDistribution:
    """Return the energy at the first point, after a check that the method can handle it and others."""
    if rng_key is None and method.needs_key:
        raise EnergyError(f"The method '{method.name}' is random. Write {owner}(jax.random.key(0), ...).")
    if rng_key is not None:
        check_key(owner, rng_key)
    if method.data is not None:
        raise EnergyError(
            f"{owner} runs the method '{method.name}' at many parameters, and data or draws follow the energy at one of "
            "them. Leave out data= and draws=, or write method='ais'."
        )
    first = family(jax.tree.map(lambda leaf: leaf[0], points))
    method.check(first)
    return first


def _exact_slopes(method: AbstractPartition, family: Family, _: Any, point: Point) -> tuple[Estimate, Point, Point]:
    def log_z(point):
        found = _of_only_row(_at(None, method, family, point))
        return found.value, found

    slopes, found = jax.grad(log_z, has_aux=True)(point)
    return found, slopes, jax.tree.map(jnp.zeros_like, slopes)


def _estimated_slopes(
    method: AbstractPartition, family: Family, rng_key: PRNGKey, point: Point
) -> tuple[Estimate, Point, Point]:
    """Return log Z, weighted means of the derivatives of the log density over draws, and their standard errors."""
    found = _of_only_row(_at(rng_key, method, family, point))
    if found.draws is None:
        raise EnergyError(
            f"The derivative of log Z is a mean over draws of the target, and the method '{method.name}' does not end with "
            "any. Write method='ais', 'smc' or 'importance', or 'enumerate' or 'grid', which are exact."
        )

    def log_target(point, position):
        distribution = family(point)
        local = jax.tree.map(lambda leaf: leaf[0], _problem.local_of(distribution))
        return Densities(distribution, local).log_target(position)

    weights = jax.nn.softmax(found.draws.log_weights)
    each = jax.vmap(jax.grad(log_target), (None, 0))(point, found.draws.positions)
    # Draws without weight may lie where the density, and with it the derivative, is not finite.
    each = jax.tree.map(lambda slope: jnp.where(weights > 0, slope, 0.0), each)
    slopes = jax.tree.map(lambda slope: weights @ slope, each)
    errors = jax.tree.map(lambda slope, mean: jnp.sqrt(weights**2 @ (slope - mean) ** 2), each, slopes)
    return found._replace(draws=None), slopes, errors


def _over(evaluate: Callable[[Any, Point], Any], rng_key: PRNGKey | None, points: Point) -> Any:
    keys = None if rng_key is None else jax.random.split(rng_key, len(jax.tree.leaves(points)[0]))
    each = lambda keys, points: jax.lax.map(lambda own: evaluate(*own), (keys, points))  # noqa: E731
    return programs.compiled(each, keys, points)


def _at(rng_key: Any, method: AbstractPartition, family: Family, point: Point) -> Estimate:
    distribution = family(point)
    keys: Any = [None] * 3 if rng_key is None else jax.random.split(rng_key, 3)
    draws = _problem.target_positions(keys[1], distribution, method.num_draws) if method.num_draws else None
    return estimate_rows(keys[0], keys[2], method, distribution, draws)


def _of_only_row(found: Estimate) -> Estimate:
    """Return the estimate of the only row."""
    return jax.tree.map(lambda leaf: leaf[0], found)
