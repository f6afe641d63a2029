"""Records of persistent chains during training: which estimators have them, and snapshots of some of them."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped
from numpyro import handlers
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators import AbstractEstimator, NegativePhaseHealth
from numpyro_ebm.estimators.names import ESTIMATORS
from numpyro_ebm.estimators.parts.pool import PoolEstimator
from numpyro_ebm.estimators.state import Pool, chain_states, holds_state
from numpyro_ebm.handlers import estimate, estimated_in
from numpyro_ebm.handlers.energy_sites import EnergySite, energy_sites
from numpyro_ebm.handlers.minibatch import minibatch


class RecordedChains(NamedTuple):
    """Persistent chains during training: a draw of each at every check of `fit`.

    Attributes:
        samples: by energy site, ``(num_chains, num_checks, ...)``, constrained. A joint event of several sites is one
            vector, named by their names joined by commas.
        energies: by energy site, ``(num_chains, num_checks)``, minus the log density without log Z, base included, under the
            parameters of that check. Missing if the batch does not determine the density of a chain (rows with their own
            context in a plate that subsamples).
        steps: ``(num_checks,)``, number of updates before each check.
    """

    samples: dict[str, Shaped[np.ndarray, "chains checks ..."]]
    energies: dict[str, Float[np.ndarray, "chains checks"]]
    steps: Int[np.ndarray, " checks"]


class RecordedHealth(NamedTuple):
    """Figures of the chains during training, from the last update before every check of `fit`.

    Attributes:
        sites: by energy site, `NegativePhaseHealth` with ``num_checks`` as the leading axis of its leaves.
        steps: ``(num_checks,)``, number of updates before each check.
    """

    sites: dict[str, NegativePhaseHealth]
    steps: Int[np.ndarray, " checks"]


class Look(NamedTuple):
    """Snapshot of a training run: the health of its chains, and a draw of each recorded chain.

    Attributes:
        step: number of updates so far.
        health: by site.
        samples: by site, ``(num_chains, ...)``.
        energies: by site, ``(num_chains,)``.
    """

    step: int
    health: dict[str, NegativePhaseHealth]
    samples: dict[str, Shaped[np.ndarray, "chains ..."]]
    energies: dict[str, Float[np.ndarray, " chains"]]


def find_estimate(svi: SVI) -> estimate | None:
    """Return the handler `estimate` in the model of an SVI, inside any other handlers; None if there is none."""
    return estimated_in(svi.model)


def estimators_of(svi: SVI) -> list[AbstractEstimator]:
    """Return the estimators in the model of an SVI; an empty list if it does not come from `estimate`."""
    model = find_estimate(svi)
    if model is None:
        return []
    return list(model.estimators.values()) if isinstance(model.estimators, dict) else [model.estimators]


def check_recordable(svi: SVI, num_chains: int, state: SVIState) -> None:
    """Refuse to record more persistent chains than there are.

    Raises:
        EnergyError: for a negative count, estimators without persistent chains, and more chains than there are.
    """
    check_count("fit", "record_chains", num_chains, 0)
    if not num_chains:
        return
    keepers = [name for name, cls in sorted(ESTIMATORS.classes.items()) if issubclass(cls, PoolEstimator)]
    pools = _pools(state)
    if not pools:
        names = sorted({each.name for each in estimators_of(svi)})
        raise EnergyError(
            f"record_chains={num_chains} needs chains that persist from one update to the next, and there are none: the "
            f"estimators are {names}. The chains of {keepers} do persist: estimate(model, 'pcd'). For chains of a "
            "trained energy write ebm.sample(rng_key, model, params=result.params)."
        )
    for name, pool in pools.items():
        size = len(pool.age)
        if num_chains > size:
            raise EnergyError(
                f"record_chains={num_chains}, but the site '{name}' has {size} persistent chains. Write "
                f"record_chains={min(size, 16)}."
            )


def look(state: SVIState, step: int, pools: tuple[dict[str, Any], dict[str, Any]]) -> Look:
    """Return a snapshot: the health in ``state``, and the draws and energies from `look_at_pools`."""
    return Look(step, jax.device_get(_health(state)), *jax.device_get(pools))


def health_of(looks: tuple[Look, ...]) -> RecordedHealth | None:
    """Return the health of all snapshots as one record; None if there is none."""
    if not looks or not looks[0].health:
        return None
    sites = {
        name: jax.tree.map(lambda *all_: np.stack(all_), *(each.health[name] for each in looks)) for name in looks[0].health
    }
    return RecordedHealth(sites, np.array([each.step for each in looks], int))


def chains_of(looks: tuple[Look, ...]) -> RecordedChains | None:
    """Return the draws of all snapshots as one record; None if there are none."""
    if not looks or not looks[0].samples:
        return None
    samples, energies = (
        {name: np.stack([getattr(each, field)[name] for each in looks], axis=1) for name in getattr(looks[0], field)}
        for field in ("samples", "energies")
    )
    return RecordedChains(samples, energies, np.array([each.step for each in looks], int))


def look_at_pools(
    svi: SVI, args: tuple, kwargs: dict[str, Any], num_chains: int, state: SVIState
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the events of the first ``num_chains`` chains of each pool, and their energies."""
    samples, energies, pools = {}, {}, _pools(state)
    for estimator, site in sites_of(svi, args, kwargs | svi.static_kwargs, state):
        pool = pools.get(site.name)
        if pool is None:
            continue
        position = jax.tree.map(lambda leaf: leaf[:num_chains], pool.position)
        kernel: Any = estimator.kernel.bind(site.distribution)  # pyright: ignore[reportAttributeAccessIssue]
        position = jax.vmap(kernel.lower)(position)
        samples[site.name] = jax.vmap(site.distribution.constrain)(position)
        is_known, local = _local(site, pool, num_chains)
        if is_known:
            log_density = jax.vmap(site.distribution.unconstrained_log_density)(position, local)
            energies[site.name] = jax.vmap(site.distribution.log_jacobian)(position) - log_density
    return samples, energies


def sites_of(svi: SVI, args: tuple, kwargs: dict[str, Any], state: SVIState) -> list[tuple[AbstractEstimator, Site]]:
    """Return the energy sites under the parameters of a state, with latents drawn once from the guide."""
    model: Any = find_estimate(svi)
    return [] if model is None else list(model.lay_out(traced(svi, args, kwargs, state)[0]).values())


def traced(svi: SVI, args: tuple, kwargs: dict[str, Any], state: SVIState) -> tuple[dict[str, EnergySite], dict[str, Any]]:
    """Return the energy sites of a run of the model without `estimate`, and its trace, with latents drawn from the guide."""
    rows: Any = svi.model if isinstance(svi.model, minibatch) else nullcontext()
    model: Any = find_estimate(svi) or svi.model
    fn: Any = model.fn if isinstance(model, minibatch | estimate) else model
    mutable = {name: value for name, value in (state.mutable_state or {}).items() if not holds_state(name, value)}
    given = svi.get_params(state) | mutable
    with handlers.seed(rng_seed=0), handlers.substitute(data=given):
        guide = handlers.trace(svi.guide).get_trace(*args, **kwargs)
    with rows, handlers.replay(trace=guide):
        return energy_sites(fn, given, args, kwargs)


def _health(state: SVIState) -> dict[str, NegativePhaseHealth]:
    return {site: chains.health for site, chains in chain_states(state.mutable_state).items()}


def _pools(state: SVIState) -> dict[str, Pool]:
    """Return the persistent chains by energy site."""
    chains = chain_states(state.mutable_state)
    return {site: each.pool for site, each in chains.items() if each.pool is not None}


def _local(site: Site, pool: Pool, num_chains: int) -> tuple[bool, PyTree]:
    """Return whether the local values of these chains are known, and the values."""
    if site.local is None:
        return True, None
    local = pool.local
    if local is None:  # one chain per row of the whole data set
        if site.num_total != site.num_rows:
            return False, None
        local = site.local
    return True, jax.tree.map(lambda leaf: jnp.asarray(leaf)[:num_chains], local)
