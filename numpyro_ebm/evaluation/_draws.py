"""Draws of the compared models, thinned to their effective number."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.diagnostics import rhat
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.evaluation._autocorrelation import effective_size, with_squares
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.chain_sampler import ChainSampler
from numpyro_ebm.sampling import sample

NUM_CHAINS = 4
LARGE_RHAT = 1.05
"""R-hat above which a note says that the chains disagree; it lies between the strict 1.01 and the older 1.1."""
FEW_DRAWS = 20
"""Fewest effective draws for mmd and c2st: tests on fewer have little power, a higher limit leaves more blanks."""


class ModelDraws(NamedTuple):
    """Draws of one model.

    Attributes:
        all: ``(num_chains, num, *event_shape)`` for chains, ``(num, *event_shape)`` for independent draws.
        independent: ``(num, *event_shape)``, chains being thinned to their effective number of draws.
        notes: remarks for the table.
    """

    all: Shaped[Array, "chains num *event"] | Shaped[Array, " num *event"]
    independent: Shaped[Array, " samples *event"]
    notes: tuple[str, ...]

    @property
    def are_few(self) -> bool:
        """Whether the chains have too few effective draws for a test."""
        return self.all is not self.independent and len(self.independent) < FEW_DRAWS


def draw(
    rng_key: PRNGKey, site: Site, kernel: str | AbstractKernel | None, num_draws: int, *, is_normalized: bool
) -> ModelDraws:
    """Draw from the density that a site's rows have under the model.

    A normalised distribution, rows with a context each (one draw per row) and a distribution with its own sampler give
    independent draws by ``sample``; any other distribution gives draws of chains.
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


def given(draws: ArrayLike, site: Site, num_draws: int | None = None) -> ModelDraws:
    """Take given draws as independent, or thin them where they are laid out by chains.

    Raises:
        EnergyError: for draws that do not have the event shape of the site.
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


def _thinned(chains: Shaped[Array, "chains num *event"], num_draws: int) -> ModelDraws:
    num_chains, num = chains.shape[:2]
    effective, worst_rhat = (float(each) for each in _mixing(chains.reshape(num_chains, num, -1).astype(float)))
    worth = min(effective, num_chains * num) if math.isfinite(effective) else 0.0
    each = max(1, min(round(worth), num_draws) // num_chains)
    places = np.linspace(0, num - 1, each).round().astype(int)
    independent = chains[:, places].reshape(-1, *chains.shape[2:])
    notes = []
    if len(independent) < FEW_DRAWS:
        notes.append(
            f"its chains have {worth:.0f} effective draws, too few for mmd and c2st. Sample for longer, or pass draws="
        )
    elif len(independent) < num_draws / 2:
        notes.append(f"its chains have {worth:.0f} effective draws, so mmd and c2st compare only {len(independent)}")
    if not worst_rhat < LARGE_RHAT:
        notes.append(f"its chains disagree (R-hat {worst_rhat:.2f}): they may not be draws of the model")
    return ModelDraws(chains, independent, tuple(notes))


@jax.jit
def _mixing(chains: Float[Array, "chains num d"]) -> tuple[Scalar, Scalar]:
    """Return the smallest effective sample size of the coordinates and their squares, and the largest R-hat."""
    both = with_squares(chains)
    moves = jnp.any(both != both[:1, :1], axis=(0, 1))
    return effective_size(both), jnp.max(jnp.where(moves, jnp.atleast_1d(rhat(both)), 1.0))


def _is_chain_sampler(distribution: EventDistribution) -> bool:
    """Whether ``sample`` would run chains anyway, so that a few long chains suffice."""
    sampler = distribution.sampler
    return distribution.has_energy and isinstance(sampler, ChainSampler) and sampler.start is None
