"""Data sets drawn from the energies of a model at given parameters, by chains or exactly."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from numpyro_ebm._core.discrete import num_elements
from numpyro_ebm._core.errors import EnergyError, UnhealthyChainsWarning, at_site, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, Chains, PRNGKey, Scalar
from numpyro_ebm.bayes._posterior import Energies
from numpyro_ebm.bayes.exact_samplers import EXACT_SAMPLERS
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.kernels import AbstractKernel, chains
from numpyro_ebm.kernels.averaging import averaging_of, next_averaging
from numpyro_ebm.kernels.densities import keep
from numpyro_ebm.kernels.names import kernel_of
from numpyro_ebm.kernels.starts import find_starts

Positions = Mapping[str, Shaped[Array, " rows *position"]]
"""A data set of every energy site, by name, in unconstrained space."""
EMPTY: Positions = MappingProxyType({})
ExactSampler = Callable[[PRNGKey, Energies, str], Shaped[Array, " rows *event"]]


class Drawn(NamedTuple):
    """One data set of a site.

    Attributes:
        positions: the rows in unconstrained space.
        acceptance_rate: mean acceptance of the chains; 1 for exact draws.
        move: root mean square distance of the rows from where their chains started, in standard deviations of the data.
    """

    positions: Shaped[Array, " rows *position"]
    acceptance_rate: Scalar
    move: Scalar


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """How data sets of one site are drawn: by transitions of a kernel that start at the data, or by an exact sampler.

    Attributes:
        kernel: the kernel, bound to the site's distribution; None for exact draws without bridges.
        num_steps: transitions.
        num_bridges: sets of parameters between two others, through which `log_ratio` anneals a data set.
        bridge: the reversible kernel of these; None without bridges.
        exact: the exact sampler, ``exact(rng_key, energies, name)``; None for chains.
        starts_at_data: whether chains start at the data; if not, they start around them or at draws of the reference.
    """

    kernel: AbstractKernel | None
    num_steps: int
    num_bridges: int = 0
    bridge: AbstractKernel | None = None
    exact: ExactSampler | None = None
    starts_at_data: bool = True

    def from_elsewhere(self, times: int) -> "Auxiliary":
        """Return chains that are so many times as long and do not start at the data."""
        return dataclasses.replace(self, num_steps=times * self.num_steps, starts_at_data=False)

    def averaging(self) -> Any:
        """Return the first state of the step size's dual averaging; None for a step size that does not adapt.

        Exact draws have no acceptance, so that the kernel of their bridges keeps its step size.
        """
        if self.kernel is None or self.exact is not None or self.kernel.target_acceptance is None:
            return None
        return averaging_of(self.kernel)

    def next_averaging(self, averaging: Any, acceptance_rate: Scalar) -> Any:
        """Return the state after one more data set."""
        return None if self.kernel is None or averaging is None else next_averaging(averaging, self.kernel, acceptance_rate)

    def draw(
        self,
        rng_key: PRNGKey,
        energies: Energies,
        name: str,
        step_size: Scalar | None,
        start: Shaped[Array, " rows *position"] | None = None,
    ) -> Drawn:
        """Draw a data set of the named site at given latents, through which no gradient flows.

        Args:
            rng_key: random key.
            energies: the energies at these latents.
            name: the site.
            step_size: step size of the kernel.
            start: where chains start; None for where `starts_at_data` says.
        """
        site = energies.sites[name]
        if self.exact is not None:
            rows = self.exact(rng_key, energies, name)
            positions = jax.vmap(site.distribution.unconstrain)(rows)
            return Drawn(jax.lax.stop_gradient(positions), jnp.ones((), float), _move(site, positions))
        kernel = _tuned(self.kernel, step_size)
        log_density = keep(site.log_density, site.distribution.known)
        key_start, key_run = jax.random.split(rng_key)
        if start is None:
            start = site.position if self.starts_at_data else _elsewhere(key_start, site)
        lifted = kernel.lift_all(start)
        advanced = chains.advance(key_run, kernel, log_density, lifted, site.local, num_steps=self.num_steps)
        positions = jax.lax.stop_gradient(jax.vmap(kernel.lower)(kernel.as_draws(advanced.positions)))
        return Drawn(positions, advanced.health.acceptance_rate, _move(site, positions))

    def log_ratio(
        self,
        rng_key: PRNGKey,
        path: Callable[[Scalar], Site],
        positions: Shaped[Array, " rows *position"],
        step_size: Scalar | None,
    ) -> Scalar:
        """Return ``log f(w; old) - log f(w; new)`` of a data set drawn at the new parameters.

        With bridges it is the log weight of the data set while it is annealed to the old parameters, with one transition at
        each bridge. The transitions have detailed balance, so that the way back has the same density.

        Args:
            rng_key: random key.
            path: the site on the way from the new parameters, at 0, to the old ones, at 1.
            positions: the data set, drawn at the new parameters.
            step_size: step size of the kernel.
        """
        marks = jnp.arange(self.num_bridges + 2) / (self.num_bridges + 1)

        def change(positions, k):
            return log_densities(path(marks[k + 1]), positions) - log_densities(path(marks[k]), positions)

        if self.bridge is None:
            return change(positions, 0)

        def cross(positions, inputs):
            key, k = inputs
            ratio, site = change(positions, k), path(marks[k + 1])
            return self._moved(key, site, positions, step_size), ratio

        keys = jax.random.split(rng_key, self.num_bridges)
        positions, ratios = jax.lax.scan(cross, positions, (keys, jnp.arange(self.num_bridges)))
        return jnp.sum(ratios) + change(positions, self.num_bridges)

    def _moved(
        self, rng_key: PRNGKey, site: Site, positions: Shaped[Array, " rows *position"], step_size: Scalar | None
    ) -> Shaped[Array, " rows *position"]:
        """Return the data set after one reversible transition."""
        kernel = _tuned(self.bridge, step_size)
        log_density = keep(site.log_density, site.distribution.known)
        moved = chains.advance(rng_key, kernel, log_density, kernel.lift_all(positions), site.local, num_steps=1).positions
        return jax.vmap(kernel.lower)(kernel.as_draws(moved))


def _tuned(kernel: Any, step_size: Scalar | None) -> Any:
    return kernel if step_size is None else kernel.adapted(step_size=step_size)


def draw_all(
    rng_key: PRNGKey,
    auxiliaries: Mapping[str, Auxiliary],
    energies: Energies,
    sizes: Mapping[str, Scalar | None],
    starts: Positions = EMPTY,
) -> dict[str, Drawn]:
    """Draw a data set of every site, with the step sizes of the inner kernels, and from starts where given."""
    keys = jax.random.split(rng_key, len(auxiliaries))
    pairs = zip(keys, auxiliaries.items(), strict=True)
    return {name: each.draw(key, energies, name, sizes[name], starts.get(name)) for key, (name, each) in pairs}


def draw_sets(
    rng_key: PRNGKey,
    auxiliaries: Mapping[str, Auxiliary],
    energies: Energies,
    sizes: Mapping[str, Scalar | None],
    num: int,
    starts: Positions = EMPTY,
) -> dict[str, Drawn]:
    """Draw several data sets of every site; the fields, and the starts, have the data sets on their leading axis."""

    def draw(key, starts):
        return draw_all(key, auxiliaries, energies, sizes, starts)

    return jax.vmap(draw)(jax.random.split(rng_key, num), dict(starts))


def step_sizes(averaging: Mapping[str, Any], *, is_adapting: Any = True) -> dict[str, Chains | None]:
    """Return the step sizes of the inner kernels: the current ones while they adapt, the averaged ones later."""

    def of(each: Any) -> Chains:
        return jnp.exp(jnp.where(is_adapting, each.log_step_size, each.log_step_size_avg))

    return {name: None if each is None else of(each) for name, each in averaging.items()}


def next_averagings(
    auxiliaries: Mapping[str, Auxiliary], averaging: Mapping[str, Any], drawn: Mapping[str, Drawn]
) -> dict[str, Any]:
    """Return the dual averaging of the inner step sizes after one more data set of every site."""
    return {name: each.next_averaging(averaging[name], drawn[name].acceptance_rate) for name, each in auxiliaries.items()}


def log_densities(site: Site, positions: Shaped[Array, " rows *position"]) -> Scalar:
    """Return the unnormalised log density of a data set at the parameters of a site."""
    return jnp.sum(by_row(site, positions))


def by_row(site: Site, positions: Shaped[Array, " rows *position"]) -> Float[Array, " rows"]:
    """Return the unnormalised log density of each row of a data set; 0 for rows that take no part."""
    values = jax.vmap(site.log_density)(positions, site.local)
    return values if site.mask is None else jnp.where(site.mask, values, 0.0)


def auxiliaries(
    owner: str,
    sites: Mapping[str, Site],
    inner: Any,
    num_steps: int,
    num_bridges: int | None,
    exact_sampler: Any,
) -> dict[str, Auxiliary]:
    """Return how the data sets of each site are drawn.

    Raises:
        EnergyError: for a kernel that does not fit the site, no step, and an unknown name of a site or an exact sampler.
    """
    check_count(owner, "num_steps", num_steps)
    exact = exact_sampler if isinstance(exact_sampler, Mapping) else dict.fromkeys(sites, exact_sampler)
    by_site = isinstance(inner, Mapping) and set(inner) & set(sites)
    for name in (*exact, *(inner if by_site else ())):
        if name not in sites:
            raise EnergyError(f"The model has no energy site '{name}'. {nearest(name, sites)}")
    found = {}
    for name, site in sites.items():
        with at_site(name):
            sampler = None if exact.get(name) is None else exact_sampler_of(exact[name])
            kernel = None
            if sampler is None or num_bridges:
                kernel = kernel_of(inner.get(name) if by_site else inner, site.distribution, usual="mala")
                kernel = kernel.bind(site.distribution)
            if kernel is not None and sampler is None:
                _warn_if_short(owner, site, kernel, num_steps)
            found[name] = Auxiliary(kernel, num_steps, *_bridges(owner, kernel, num_steps, num_bridges), exact=sampler)
    return found


def _bridges(
    owner: str, kernel: AbstractKernel | None, num_steps: int, num_bridges: int | None
) -> tuple[int, AbstractKernel | None]:
    """Return the number of bridges, a fifth of the steps where none is given, and their kernel."""
    bridge = None if kernel is None else kernel.reversible()
    if bridge is None and num_bridges and kernel is not None:
        raise EnergyError(
            f"num_bridges={num_bridges} needs a kernel with detailed balance, and the transitions of '{kernel.name}' have "
            f"an order or a bias. Write {owner}(..., num_bridges=0), or inner='gibbs' for a discrete support and 'mala' "
            "for a continuous one."
        )
    usual = 0 if bridge is None else num_steps // 5
    num = usual if num_bridges is None else num_bridges
    return num, bridge if num else None


def _warn_if_short(owner: str, site: Site, kernel: AbstractKernel, num_steps: int) -> None:
    """Warn where the transitions of a chain cannot change every element of a discrete event."""
    distribution = site.distribution
    if not distribution.is_discrete:
        return
    values = distribution.discrete_values
    size = num_elements(np.zeros(2) if values is None else values, distribution.event_shape)
    changes = kernel.most_changes(size)
    if num_steps * changes < size:
        warnings.warn(
            f"At site '{site.name}': an auxiliary chain of num_steps={num_steps} changes at most {num_steps * changes} of "
            f"the {size} elements of an event, so that the auxiliary data stay near the data and the posterior is wrong. "
            f"Write {owner}(..., num_steps={10 * -(-size // changes)}) or more.",
            UnhealthyChainsWarning,
            stacklevel=2,
        )


def exact_sampler_of(sampler: Any) -> ExactSampler:
    """Return an exact sampler, given its name or itself.

    Raises:
        EnergyError: for an unknown name.
        TypeError: for anything that is neither.
    """
    if isinstance(sampler, str):
        if sampler not in EXACT_SAMPLERS:
            raise EnergyError(f"Unknown exact sampler '{sampler}'. {nearest(sampler, EXACT_SAMPLERS)}")
        named = EXACT_SAMPLERS[sampler]
        return lambda rng_key, energies, name: named(rng_key, energies.sites[name])
    if not callable(sampler):
        raise TypeError(
            f"exact_sampler needs a name or a function (rng_key, latents) that returns rows; got {type(sampler).__name__}."
        )

    def draw(rng_key, energies, name):
        rows, wanted = jnp.asarray(sampler(rng_key, energies.latents)), energies.sites[name].value.shape
        if rows.shape != wanted:
            raise EnergyError(
                f"At site '{name}': exact_sampler returned shape {rows.shape}, and the data have {wanted}. Write a function "
                "(rng_key, latents) that draws as many rows as there are."
            )
        return rows

    return draw


def _elsewhere(rng_key: PRNGKey, site: Site) -> Shaped[Array, " rows *position"]:
    """Return starts away from the data: with noise of twice their spread, or for discrete events draws of the reference."""
    distribution = site.distribution
    if distribution.is_discrete or distribution.members is not None:
        shape = () if site.rows_differ else (site.num_rows,)
        return find_starts(rng_key, distribution, site.log_density, shape, site.local)[0]
    noise = jax.random.normal(rng_key, site.position.shape, site.position.dtype)
    return site.position + 2 * jnp.where(site.spread > 0, site.spread, 1.0) * noise


def _move(site: Site, positions: Shaped[Array, " rows *position"]) -> Float[Array, ""]:
    spread = jnp.where(site.spread > 0, site.spread, 1.0)
    moves = (positions - site.position) / spread
    squares = jnp.mean(moves.reshape(len(moves), -1) ** 2, axis=1)
    return jnp.sqrt(jnp.mean(squares) if site.mask is None else jnp.mean(squares, where=site.mask))
