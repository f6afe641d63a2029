"""Draws of the models that are compared, thinned to independent ones."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import rhat

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.evaluation._autocorrelation import effective_size, with_squares
from numpyro_ebm.kernels.chain_sampler import ChainSampler
from numpyro_ebm.sampling import sample

NUM_CHAINS = 4
LARGE_RHAT = 1.05
FEW_DRAWS = 20


class ModelDraws(NamedTuple):
    """Draws of one model.

    Attributes:
        all: ``(num_chains, num, *event_shape)`` of chains, ``(num, *event_shape)`` where they are independent.
        independent: ``(num, *event_shape)``, as many of them as chains are worth.
        notes: what is to be said of them.
    """

    all: Array
    independent: Array
    notes: tuple[str, ...]

    @property
    def are_few(self) -> bool:
        """Whether chains are worth too few draws for a test."""
        return self.all is not self.independent and len(self.independent) < FEW_DRAWS


def draw(rng_key: PRNGKey, site: Site, kernel: Any, num_draws: int, *, is_normalized: bool) -> ModelDraws:
    """Draws of the density under which a site's rows are.

    Of a normalised distribution, of rows with a context each (one draw a row), and of a distribution with a sampler of its
    own, independent ones by its ``sample``; else of chains.
    """
    distribution = site.distribution
    if site.rows_differ:
        source = distribution.base if is_normalized else distribution
        return given(source.sample(rng_key, () if site.batch_shape == distribution.batch_shape else site.batch_shape), site)
    if is_normalized or not _is_chain_sampler(distribution):
        source = distribution.base if is_normalized else distribution
        return given(source.sample(rng_key, (num_draws,)).reshape(num_draws, *distribution.event_shape), site)
    num = 2 * math.ceil(num_draws / NUM_CHAINS)
    chains = sample(rng_key, distribution, kernel, num_samples=num, num_chains=NUM_CHAINS).samples["x"]
    if chains.shape[1] < num:  # `sample` was interrupted
        raise KeyboardInterrupt
    return given(chains.reshape(NUM_CHAINS, num, *distribution.event_shape), site, num_draws)


def given(draws: Any, site: Site, num_draws: int | None = None) -> ModelDraws:
    """Draws as they came, independent where they are not laid out by chains.

    Raises:
        EnergyError: for draws that are no events of the site.
    """
    draws, event_shape = jnp.asarray(draws), site.distribution.event_shape
    lead = draws.ndim - len(event_shape)
    if lead not in (1, 2) or draws.shape[lead:] != event_shape:
        raise EnergyError(
            f"draws need shape (num, *event) or (chains, num, *event) with events of shape {event_shape}; got {draws.shape}."
        )
    if lead == 1:
        return ModelDraws(draws, draws, ())
    return _thinned(draws, draws.shape[0] * draws.shape[1] if num_draws is None else num_draws)


def _thinned(chains: Array, num_draws: int) -> ModelDraws:
    num_chains, num = chains.shape[:2]
    effective, worst_rhat = (float(each) for each in _mixing(chains.reshape(num_chains, num, -1).astype(float)))
    worth = min(effective, num_chains * num) if math.isfinite(effective) else 0.0
    each = max(1, min(round(worth), num_draws) // num_chains)
    places = np.linspace(0, num - 1, each).round().astype(int)
    independent = chains[:, places].reshape(-1, *chains.shape[2:])
    notes = []
    if len(independent) < FEW_DRAWS:
        notes.append(f"its chains are worth {worth:.0f} draws, too few for mmd and c2st. Sample for longer, or pass draws=")
    elif len(independent) < num_draws / 2:
        notes.append(f"its chains are worth {worth:.0f} draws, so that mmd and c2st compare {len(independent)} only")
    if not worst_rhat < LARGE_RHAT:
        notes.append(f"its chains disagree (R-hat {worst_rhat:.2f}): the draws may not be the model's")
    return ModelDraws(chains, independent, tuple(notes))


@jax.jit
def _mixing(chains: Array) -> tuple[Array, Array]:
    """Smallest effective sample size of coordinates and of their squares, and largest R-hat."""
    both = with_squares(chains)
    moves = jnp.any(both != both[:1, :1], axis=(0, 1))
    return effective_size(both), jnp.max(jnp.where(moves, jnp.atleast_1d(rhat(both)), 1.0))


def _is_chain_sampler(distribution: Any) -> bool:
    """Whether draws are those of chains anyway, so that a few long ones will do."""
    sampler = distribution.sampler
    return distribution.has_energy and isinstance(sampler, ChainSampler) and sampler.start is None
