"""Starting positions of the chains of a negative phase."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array, Position, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.supports import check_same_support
from numpyro_ebm.estimators.parts.slots import Slots


class Start(NamedTuple):
    """Start of one update's chains.

    Attributes:
        position: as the kernel moves it (`AbstractKernel.lift`), leaves with a leading dimension of chains.
        local: context and base of each chain, or None.
        paired: whether there is one chain per row, with that row's density.
        slots: where the chains are kept between updates, or None.
        age: transitions since each chain started, if chains are kept.
        log_factor: log factor of each chain's own step size (`chains.Pace`), if it is kept.
    """

    position: Position
    local: PyTree
    paired: bool = True
    slots: Slots | None = None
    age: Int[Array, " chains"] | None = None
    log_factor: Float[Array, " chains"] | None = None


def over(flags: Shaped[Array, " chains"], leaf: Shaped[Array, "chains ..."]) -> Shaped[Array, "chains ..."]:
    """Reshape flags of chains so that they broadcast over a leaf with a leading dimension of chains."""
    return flags.reshape((-1,) + (1,) * (leaf.ndim - 1))


def draw_start(
    start: Literal["data", "base"] | dist.Distribution, rng_key: PRNGKey, site: Site, num_chains: int
) -> tuple[Shaped[Array, " {num_chains} *position"], PyTree]:
    """Draw unconstrained starts, spread evenly over the rows, and return them with the contexts and bases of these rows.

    Args:
        start: "data", "base", or a distribution of one event.
        rng_key: random key.
        site: the rows.
        num_chains: number of chains.
    """
    key_rows, key_draws = jax.random.split(rng_key)
    rows = jnp.resize(jax.random.permutation(key_rows, site.num_rows), (num_chains,))
    repeats = -(-num_chains // max(site.num_rows, 1))
    draws = draw_rows(start, key_draws, site, repeats)[jnp.arange(num_chains) // site.num_rows, rows]
    return draws, jax.tree.map(lambda leaf: leaf[rows], site.local)


def draw_rows(
    start: Literal["data", "base"] | dist.Distribution, rng_key: PRNGKey, site: Site, repeats: int = 1
) -> Shaped[Array, "{repeats} {site.num_rows} *position"]:
    """Return unconstrained starts per row, ``(repeats, num_rows, ...)``: the row, or draws of its base or of ``start``."""
    distribution = site.distribution
    if isinstance(start, str) and start == "data":
        return jnp.broadcast_to(site.position, (repeats, *site.position.shape))
    if isinstance(start, dist.Distribution):
        events = start.expand((site.num_rows,)).sample(rng_key, (repeats,))
    else:
        events = distribution.reference.expand(site.batch_shape).sample(rng_key, (repeats,))
    events = distribution.as_events(jnp.asarray(events, float)).reshape((repeats, site.num_rows, *distribution.event_shape))
    draws = jax.lax.stop_gradient(jax.vmap(jax.vmap(distribution.unconstrain))(events))
    if site.mask is None:
        return draws
    # The base of a masked row may be missing, too.
    return jnp.where(over(site.mask, site.position), draws, jax.lax.stop_gradient(site.position))


def check_start(start: object, site: Site) -> None:
    """Check that a start is known and has the energy's event shape and support, and raise otherwise.

    Raises:
        EnergyError: for an unknown name, and for another event shape or support.
        TypeError: if it is neither a name nor a distribution.
    """
    if isinstance(start, str):
        if start not in ("data", "base"):
            raise EnergyError(
                f"Unknown start '{start}'. {nearest(start, ('data', 'base'))} Or write a numpyro distribution."
            )
        return
    if not isinstance(start, dist.Distribution):
        raise TypeError(f"start needs 'data', 'base' or a numpyro distribution; got {type(start).__name__}.")
    if start.event_shape != site.distribution.event_shape or start.batch_shape != ():
        raise EnergyError(
            f"start has event shape {start.event_shape} and batch shape {start.batch_shape}; the energy has "
            f"event shape {site.distribution.event_shape}. Write start={type(start).__name__}(...).to_event(1)."
        )
    check_same_support("start", start, site.distribution.support)
