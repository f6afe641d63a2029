"""Exact draws of the rows of an energy site: by enumeration of all states, and by coupling from the past."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from numpyro_ebm._core.discrete import numbers_of, state_at
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm._core.uniforms import uniforms
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.states import in_words, num_states
from numpyro_ebm.energies import Ising
from numpyro_ebm.energies.ising import neighbor_sums

MOST_STATES = 2**16
"""Most states of one event whose probabilities `enumeration` tabulates."""
MOST_SWEEPS = 2**20
"""Most sweeps of `coupling_from_the_past`."""

Rows = Shaped[Array, " rows *event"]


def enumeration(rng_key: PRNGKey, site: Site) -> Rows:
    """Draw each row from the table of the probabilities of all states; one table serves rows without a context.

    Raises:
        EnergyError: for an event that is not discrete, and for more than 2**16 states.
    """
    distribution = site.distribution
    if not distribution.is_discrete or num_states(distribution) > MOST_STATES:
        what = f"{in_words(distribution)} states" if distribution.is_discrete else f"the support {distribution.support}"
        raise EnergyError(
            f"exact_sampler='enumeration' tabulates up to 2**16 states of one event, and this event has {what}. Write "
            "inner='gibbs', or exact_sampler='coupling_from_the_past' for an Ising energy."
        )
    states = jax.vmap(lambda index: state_at(distribution.discrete_values, distribution.event_shape, index))(
        jnp.arange(num_states(distribution))
    )

    def sums_of(local: PyTree) -> Float[Array, " states"]:
        log_p = jax.vmap(lambda state: site.log_density(state, local))(states)
        return jnp.cumsum(jnp.exp(log_p - jnp.max(log_p)))

    numbers = uniforms(rng_key, (site.num_rows,))
    if not site.rows_differ:
        sums = sums_of(_first(site.local))
        return states[jnp.searchsorted(sums, numbers * sums[-1], side="right")]

    def draw(number, local):
        sums = sums_of(local)
        return states[jnp.searchsorted(sums, number * sums[-1], side="right")]

    return jax.lax.map(lambda row: draw(*row), (numbers, site.local))


def coupling_from_the_past(rng_key: PRNGKey, site: Site) -> Rows:
    r"""Draw the rows of an `Ising` energy exactly, by sweeps over its colours that started long enough ago.

    Two chains bound all others: with the same random numbers, an element of any chain lies between those of the lower and of
    the upper one. A start further in the past, twice as far each time, is tried until the two agree at time 0. It takes
    couplings of either sign. The number of sweeps grows without bound as the couplings approach the critical ones.

    Raises:
        EnergyError: for anything but an Ising energy, alone in its distribution.

    References:
        Propp and Wilson, Exact sampling with coupled Markov chains and applications to statistical mechanics (1996); Huber,
        Perfect sampling using bounding chains (2004).
    """
    distribution = site.distribution

    def draw(key, local):
        energy = distribution.row_energy(local)
        if not isinstance(energy, Ising):
            raise EnergyError(
                "exact_sampler='coupling_from_the_past' needs numpyro_ebm.energies.Ising, alone in its distribution. Write "
                "inner='gibbs', or exact_sampler='enumeration' for an event with few states."
            )
        return _from_the_past(key, energy)

    return jax.vmap(draw)(jax.random.split(rng_key, site.num_rows), site.local)


def _from_the_past(rng_key: PRNGKey, energy: Ising) -> Shaped[Array, "*event"]:
    values: Any = numbers_of(energy.support)
    size, keys = energy.graph.num_nodes, jax.random.split(rng_key, len(energy.blocks))
    attracting, repelling = jnp.maximum(energy.couplings, 0.0), jnp.maximum(-energy.couplings, 0.0)

    def fields(one, other, block):
        sums = [neighbor_sums(energy.graph, each, x, block) for each, x in ((attracting, one), (repelling, other))]
        return sums[0] - sums[1] + energy.fields.reshape(-1)[block]

    def sweep(k, bounds):
        low, high = bounds
        for key, block in zip(keys, energy.blocks, strict=True):
            numbers = uniforms(jax.random.fold_in(key, k), block.shape)
            odds = [fields(low, high, block), fields(high, low, block)]
            new = [
                jnp.where(numbers < jax.nn.sigmoid((values[1] - values[0]) * each), values[1], values[0]) for each in odds
            ]
            low, high = (x.at[block].set(each.astype(float)) for x, each in zip((low, high), new, strict=True))
        return low, high

    def since(start):
        bounds = tuple(jnp.full(size, float(value)) for value in values)
        return jax.lax.fori_loop(0, start, lambda i, bounds: sweep(start - i, bounds), bounds)

    def is_open(carry):
        start, (low, high) = carry
        return jnp.any(low != high) & (start < MOST_SWEEPS)

    _, (low, high) = jax.lax.while_loop(is_open, lambda carry: (2 * carry[0], since(2 * carry[0])), (8, since(8)))
    # A draw that is not exact must not look like one.
    drawn = jnp.where(jnp.any(low != high), jnp.nan, low)
    return drawn.reshape(energy.event_shape)


def _first(local: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[0], local)


EXACT_SAMPLERS: dict[str, Callable[[PRNGKey, Site], Rows]] = {
    "enumeration": enumeration,
    "coupling_from_the_past": coupling_from_the_past,
}
