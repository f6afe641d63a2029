"""Search for starts of chains at which the density and its gradient are finite."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Shaped
from numpyro.distributions import Distribution

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, LogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels.elements import Elements

NUM_TRIES = 100
"""Tries per chain before a start is refused; more tries find narrower supports and take longer to fail."""
NARROWEST, WIDEST = 0.1, 1000.0
"""Range of the standard deviation of the noise added to draws of the reference; it grows geometrically over the tries."""
NO_START = (
    "A chain starts where the log density or its gradient is not finite. Look at the energy there, or give the "
    "EnergyDistribution a base that covers where it is finite."
)


def initial_is_finite(log_density: Callable, position: Position) -> Bool[Array, ""]:
    """Return whether the log density and, for continuous parts of the position, its gradient are finite."""
    leaves, structure = jax.tree.flatten(position)
    floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def at(values):
        return log_density(structure.unflatten([values.get(i, leaf) for i, leaf in enumerate(leaves)]))

    if not floats:
        return jnp.isfinite(log_density(position))
    value, grad = jax.value_and_grad(at)({i: leaves[i] for i in floats})
    return jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((value, grad))]).all()


def are_finite(
    distribution: Any, log_density: LogDensityFn, positions: Shaped[Array, " chains *position"], local: PyTree
) -> Bool[Array, " chains"]:
    """Evaluate `initial_is_finite` of each chain, ``(num_chains,)``."""
    members = distribution.members
    if members is None:
        return jax.vmap(lambda x, row: initial_is_finite(lambda z: log_density(z, row), x))(positions, local)
    # Integers take no part in the gradient.
    by_name = jax.vmap(members.split)(positions)
    return jax.vmap(lambda x, row: initial_is_finite(lambda z: log_density(members.join(z), row), x))(by_name, local)


def find_starts(
    rng_key: PRNGKey, distribution: Any, log_density: LogDensityFn, sample_shape: tuple[int, ...], local: PyTree
) -> tuple[Shaped[Array, " chains *position"], Bool[Array, " chains"]]:
    """Draw starts from the reference, and redraw those without a finite density and gradient, in at most 100 tries.

    Each further try adds wider normal noise to the reference, in unconstrained space, up to a standard deviation of 1000.
    On a discrete support, a growing share of the elements takes one common value, or integers without a largest value grow;
    the discrete members of a mixed event are drawn anew.

    Args:
        rng_key: random key.
        distribution: the distribution that has the reference.
        log_density: ``log_density(position, local)`` of one chain.
        sample_shape: shape of the chains, without the distribution's batch shape.
        local: argument of each chain's own log density, leaves ``(num_chains, ...)``.

    Returns:
        Positions ``(num_chains, ...)``, and which of them have a finite density and gradient.
    """

    def draw(key):
        events = distribution.reference_sample(key, sample_shape).reshape((-1, *distribution.event_shape))
        return jax.vmap(distribution.unconstrain)(events)

    def go_on(carry):
        _, finite, i, _ = carry
        return (i < NUM_TRIES) & ~jnp.all(finite)

    def retry(carry):
        # The positions to check come from the loop's carry, as chains have them. Fused with the draw they would be rounded
        # differently: x - x is then not 0, and a gradient that is NaN on a diagonal seems finite.
        positions, _, i, key = carry
        finite = are_finite(distribution, log_density, positions, local)
        key, key_draw, key_spread = jax.random.split(key, 3)
        tried = _spread(key_spread, distribution, draw(key_draw), (i + 1) / NUM_TRIES)
        wide = (...,) + (None,) * (positions.ndim - 1)
        return jnp.where(finite[wide], positions, tried), finite, i + 1, key

    first = draw(rng_key)
    carry = first, jnp.zeros(len(first), bool), jnp.zeros((), jnp.int32), jax.random.fold_in(rng_key, 1)
    positions, finite, _, _ = jax.lax.while_loop(go_on, retry, carry)
    return positions, finite


def _spread(
    rng_key: PRNGKey, distribution: Distribution, drawn: Shaped[Array, " chains *position"], share: Scalar
) -> Shaped[Array, " chains *position"]:
    """Move draws of the reference away from it, farther for a larger share of the tries used."""
    if not distribution.is_discrete:  # pyright: ignore[reportAttributeAccessIssue]
        scale, members = NARROWEST * (WIDEST / NARROWEST) ** share, distribution.members  # pyright: ignore
        moves = scale.astype(drawn.dtype) * jax.random.normal(rng_key, drawn.shape, drawn.dtype)
        return drawn + (moves if members is None else jnp.where(members.is_continuous, moves, 0.0))
    if not distribution.lists_values:  # pyright: ignore[reportAttributeAccessIssue]
        scale = NARROWEST * (WIDEST / NARROWEST) ** share
        higher = drawn + jnp.floor(scale * jnp.abs(jax.random.normal(rng_key, drawn.shape)))
        highest = distribution.integer_bounds[1]  # pyright: ignore[reportAttributeAccessIssue]
        return jnp.minimum(higher, jnp.asarray(highest, float)).astype(drawn.dtype)
    key_value, key_which = jax.random.split(rng_key)
    # One of the values in the draw, chosen for each chain separately.
    elements = Elements.of(distribution.discrete_values, drawn[0])  # pyright: ignore[reportAttributeAccessIssue]
    codes = jax.vmap(elements.codes)(drawn)
    column = jax.random.randint(key_value, (len(codes), 1), 0, codes.shape[1])
    value = jnp.take_along_axis(codes, column, axis=1)
    codes = jnp.where(jax.random.uniform(key_which, codes.shape) < share, value, codes)
    return jax.vmap(lambda each: elements.position(each, drawn[0]))(codes)


def check_starts(finite: Bool[Array, " chains"]) -> None:
    """Check that all chains start where the density is finite, inside compiled programs too.

    Raises:
        EnergyError: a compiled program raises it as ``jax.errors.JaxRuntimeError``.
    """
    if not is_concrete(finite):
        call_where_any(Told(_refuse), jnp.any(~finite)[None], ())
    elif not bool(jnp.all(finite)):
        _refuse()


def _refuse(*_: object) -> NoReturn:
    raise EnergyError(NO_START)
