"""From draws to ArviZ: the only door to it, the same for ArviZ 0.23 and 1.x; slow to import, it waits for its first use."""

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array
from numpyro_ebm.diagnostics.arviz._log_likelihoods import normalized
from numpyro_ebm.diagnostics.arviz.read import STATISTICS, as_numpy, check_shapes, collect
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult


def to_arviz(
    draws: MCMC | Draws | FitResult | Mapping[str, Any],
    *,
    training: FitResult | None = None,
    observed_data: Mapping[str, Any] | None = None,
    prior: Mapping[str, Any] | None = None,
    prior_predictive: Mapping[str, Any] | None = None,
    posterior_predictive: Mapping[str, Any] | None = None,
    log_likelihood: Mapping[str, Any] | None = None,
    log_partition: Mapping[str, Any] | None = None,
    dims: Mapping[str, list[str]] | None = None,
    coords: Mapping[str, Any] | None = None,
) -> Any:
    """Draws, sampler statistics and training chains as ArviZ data: ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    There is no ``log_likelihood`` group of itself: the term of an energy site lacks log Z, and ``loo`` of it would be a
    number without meaning. Given log Z with its error, it is there, with the error in the group's ``attrs``.

    Args:
        draws: a finished ``numpyro.infer.MCMC``, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)``,
            or the result of `fit` by itself.
        training: the result of `fit` that the draws belong to.
        observed_data: by name, arrays without chain and draw.
        prior: by name, prior draws ``(num_draws, ...)``.
        prior_predictive: by name, the same of the data.
        posterior_predictive: by name, draws ``(num_chains, num_draws, ...)`` or ``(num_chains * num_draws, ...)``.
        log_likelihood: by observed site, ``(num_chains, num_draws, *rows)`` or ``(num_chains * num_draws, *rows)``, what
            ``numpyro.infer.log_likelihood(model, samples)`` gives of the bare model: unnormalised at energy sites.
        log_partition: by the same sites, log Z as `log_partition` returns it, one per draw (and row) where the draws change
            the energy; None for an ordinary site, whose values are normalised as they are.
        dims: by variable, names of the dimensions after chain and draw.
        coords: by dimension, its coordinates.

    Returns:
        Groups ``posterior`` and, where known, ``sample_stats`` (``acceptance_rate``, ``diverging``, ``energy``, ``lp``,
        ``n_steps``, ``nonfinite``, ``step_size``, ``swap_rate``, ``tree_depth``), ``observed_data``, ``prior``,
        ``prior_predictive``, ``posterior_predictive``, ``log_likelihood``. Of training ``training``, the persistent chains
        that ``fit(..., record_chains=n)`` recorded, a draw per check (its coordinate the number of updates), their energies
        as ``"<site>_energy"``; and ``training_stats``, ``loss`` by update and ``held_out_loss`` by check.

        ``arviz.convert_to_dataset(data, group="training")`` is what R-hat, ESS and rank plots of either ArviZ take. For zarr
        write ``data.to_zarr(path)`` under ArviZ 1, and under 0.23, which does not know zarr 3,
        ``data.to_datatree().to_zarr(path)`` and ``arviz.InferenceData.from_datatree(xarray.open_datatree(path))``.

    Raises:
        EnergyError: (a ValueError) for arrays that are not led by chains and draws, an MCMC that has not run, log
            likelihoods without log Z, and log Z of a shape that does not fit.
        TypeError: for anything else.

    Example:
        ``arviz.summary(to_arviz(mcmc))``
    """
    if isinstance(draws, FitResult):
        if training is not None:
            raise TypeError("to_arviz got two results of fit. Write to_arviz(result), or to_arviz(draws, training=result).")
        draws, training = {}, draws
    if training is not None and not isinstance(training, FitResult):
        raise TypeError(f"training is what fit returned; got {type(training).__name__}.")
    posterior, stats = collect("to_arviz", draws)
    shape = check_shapes(posterior) if posterior or training is None else None
    given = {"posterior_predictive": posterior_predictive, "log_likelihood": log_likelihood}
    chained = {group: _by_chain(group, values or {}, shape) for group, values in given.items()}
    likelihoods, notes = _likelihoods(chained["log_likelihood"], log_partition or {}, shape)
    groups = {
        "posterior": posterior,
        "sample_stats": {STATISTICS[k]: v for k, v in stats.items() if k in STATISTICS},
        "posterior_predictive": chained["posterior_predictive"],
        "log_likelihood": likelihoods,
        "prior": {k: jnp.asarray(v)[None] for k, v in (prior or {}).items()},
        "prior_predictive": {k: jnp.asarray(v)[None] for k, v in (prior_predictive or {}).items()},
        "observed_data": dict(observed_data or {}),
    }
    groups = {name: {k: as_numpy(k, v) for k, v in group.items()} for name, group in groups.items() if group}
    names = dict(dims or {}), dict(coords or {})
    data = _build(groups, _training(training, *names), *names)
    if notes:
        data["log_likelihood"].attrs.update(notes)
    return data


def _by_chain(group: str, values: Mapping[str, Any], shape: tuple[int, int] | None) -> dict[str, Array]:
    """Arrays led by chains and draws."""
    if values and shape is None:
        raise EnergyError(f"{group} belongs to draws, and there are none. Write to_arviz(draws, training=result, ...).")
    return {name: _one_by_chain(group, name, value, cast(Any, shape)) for name, value in values.items()}


def _one_by_chain(group: str, name: str, value: Any, shape: tuple[int, int]) -> Any:
    value = value if isinstance(value, Array) else np.asarray(value)
    if value.shape[:2] == shape:
        return value
    if value.shape[:1] != (shape[0] * shape[1],):
        raise EnergyError(f"{group} '{name}' leads with {value.shape[:2]}; the draws have {shape}.")
    return value.reshape((*shape, *value.shape[1:]))


def _likelihoods(
    values: Mapping[str, Array], log_partition: Mapping[str, Any], shape: tuple[int, int] | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Log likelihoods less log Z, and what is to say of log Z."""
    missing, unused = sorted(set(values) - set(log_partition)), sorted(set(log_partition) - set(values))
    if missing:
        raise EnergyError(
            f"log_likelihood of {missing} came without log Z, and loo of an unnormalised log density means nothing. Write "
            f"to_arviz(..., log_partition={{'{missing[0]}': log_z}}) with what log_partition(...) returned, under each "
            f"draw's parameters; for an ordinary, normalised site write {{'{missing[0]}': None}}."
        )
    if unused:
        raise EnergyError(
            f"log_partition has {unused}, of which there is no log_likelihood. Write to_arviz(..., "
            f"log_likelihood=numpyro.infer.log_likelihood(model, samples, x))."
        )
    likelihoods, notes = {}, {}
    for name, value in values.items():
        likelihoods[name] = as_numpy(name, value)
        if log_partition[name] is not None:
            pair = normalized(name, likelihoods[name], log_partition[name], cast(Any, shape))
            likelihoods[name], notes = pair[0], notes | pair[1]
    return likelihoods, notes


def _training(result: FitResult | None, dims: dict[str, Any], coords: dict[str, Any]) -> dict[str, Any]:
    """Groups of a training."""
    if result is None:
        return {}
    import xarray

    stats = xarray.Dataset(
        {"loss": ("update", np.asarray(result.losses)), "held_out_loss": ("check", np.asarray(result.held_out_losses))},
        {"update": 1 + np.arange(len(result.losses)), "check": result.check_steps},
    )
    if not result.held_out_losses.size:
        stats = stats.drop_dims("check")
    if result.chains is None:
        return {"training_stats": stats}
    chains = {name: as_numpy(name, value) for name, value in result.chains.samples.items()}
    chains |= {f"{name}_energy": as_numpy(name, value) for name, value in result.chains.energies.items()}
    # By hand: ArviZ warns of more chains than draws, and here both are meant.
    variables = {}
    for name, value in chains.items():
        names = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - 2)])
        variables[name] = (("chain", "draw", *names), value)
    used = {name for names, _ in variables.values() for name in names}
    known = {name: value for name, value in coords.items() if name in used}
    places = {"chain": np.arange(len(next(iter(chains.values())))), "draw": result.chains.steps}
    return {"training": xarray.Dataset(variables, known | places), "training_stats": stats}


def _build(
    groups: dict[str, dict[str, np.ndarray]],
    training: dict[str, Any],
    dims: dict[str, Any],
    coords: dict[str, Any],
) -> Any:
    import arviz
    import xarray

    # ArviZ 1 took InferenceData away, and answers a look for it with a warning.
    if arviz.__version__.startswith("0."):
        data: Any = arviz.from_dict(**groups, dims=dims, coords=coords)  # pyright: ignore
        if training:
            data.add_groups(training, warn_on_custom_groups=False)
        return data
    data = arviz.from_dict(groups, dims=dims, coords=coords) if groups else xarray.DataTree()
    for name, dataset in training.items():
        data[name] = xarray.DataTree(dataset=dataset)
    return data
