"""`to_arviz`: draws and training chains as data for ArviZ 0.23 or 1.x, which is imported at the first use."""

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped
from numpyro.infer import MCMC

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, ArrayLike
from numpyro_ebm.diagnostics.arviz._log_likelihoods import normalized
from numpyro_ebm.diagnostics.arviz.read import STATISTICS, ByName, as_numpy, check_shapes, collect
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult

ByChain: TypeAlias = Shaped[Array, "chains draws ..."] | Shaped[np.ndarray, "chains draws ..."]
"""An array of JAX or NumPy, with chains and draws in front."""


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
    """Convert draws, sampler statistics and training chains to ArviZ's ``InferenceData`` (0.23) or ``DataTree`` (1.x).

    By default there is no ``log_likelihood`` group: the term of an energy site lacks log Z, so its ``loo`` would be
    meaningless. The group exists where log Z is given with its error, which is stored in the group's ``attrs``.

    Args:
        draws: a finished ``numpyro.infer.MCMC``, the result of `sample`, a dict of arrays ``(num_chains, num_draws, ...)``,
            or the result of `fit` by itself.
        training: the result of `fit` that the draws belong to.
        observed_data: by name, arrays without chain and draw.
        prior: by name, prior draws ``(num_draws, ...)``.
        prior_predictive: by name, prior draws of the data ``(num_draws, ...)``.
        posterior_predictive: by name, draws ``(num_chains, num_draws, ...)`` or ``(num_chains * num_draws, ...)``.
        log_likelihood: by observed site, ``(num_chains, num_draws, *rows)`` or ``(num_chains * num_draws, *rows)``, the
            result of ``numpyro.infer.log_likelihood(model, samples)`` for the bare model, unnormalised at energy sites.
        log_partition: by the same sites, log Z as `log_partition` returns it, one per draw (and row) where the draws change
            the energy; None for an ordinary site, whose values are normalised already.
        dims: by variable, names of the dimensions after chain and draw.
        coords: by dimension, its coordinates.

    Returns:
        Groups ``posterior`` and, where known, ``sample_stats`` (``acceptance_rate``, ``diverging``, ``energy``,
        ``inner_acceptance_rate``, ``inner_move``, ``lp``, ``n_steps``, ``nonfinite``, ``step_size``, ``swap_rate``,
        ``tree_depth``), ``observed_data``, ``prior``, ``prior_predictive``, ``posterior_predictive``, ``log_likelihood``. A
        training adds ``training``, the persistent chains that ``fit(..., record_chains=n)`` recorded, with one draw per
        check (its coordinate is the number of updates) and their energies as ``"<site>_energy"``; and ``training_stats``,
        ``loss`` by update and ``held_out_loss`` by check.

        R-hat, ESS and rank plots of both versions take ``arviz.convert_to_dataset(data, group="training")``. For zarr write
        ``data.to_zarr(path)`` with ArviZ 1, and with 0.23, which does not support zarr 3,
        ``data.to_datatree().to_zarr(path)`` and ``arviz.InferenceData.from_datatree(xarray.open_datatree(path))``.

    Raises:
        EnergyError: (a ValueError) for arrays whose shapes do not begin with chains and draws, an MCMC that has not run, log
            likelihoods without log Z, and log Z of the wrong shape.
        TypeError: for other types.

    Example:
        ``arviz.summary(to_arviz(mcmc))``
    """
    if isinstance(draws, FitResult):
        if training is not None:
            raise TypeError("to_arviz got two results of fit. Write to_arviz(result), or to_arviz(draws, training=result).")
        draws, training = {}, draws
    if training is not None and not isinstance(training, FitResult):
        raise TypeError(f"training must be what fit returned; got {type(training).__name__}.")
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


def _by_chain(group: str, values: Mapping[str, Any], shape: tuple[int, int] | None) -> dict[str, ByChain]:
    """Return the arrays as ``(chains, draws, ...)``."""
    if values and shape is None:
        raise EnergyError(f"{group} needs draws, and there are none. Write to_arviz(draws, training=result, ...).")
    return {name: _one_by_chain(group, name, value, cast(Any, shape)) for name, value in values.items()}


def _one_by_chain(group: str, name: str, value: ArrayLike, shape: tuple[int, int]) -> ByChain:
    value = value if isinstance(value, Array) else np.asarray(value)
    if value.shape[:2] == shape:
        return value
    if value.shape[:1] != (shape[0] * shape[1],):
        raise EnergyError(f"The shape of {group} '{name}' begins with {value.shape[:2]}; the draws have {shape}.")
    return value.reshape((*shape, *value.shape[1:]))


def _likelihoods(
    values: Mapping[str, ByChain], log_partition: Mapping[str, Any], shape: tuple[int, int] | None
) -> tuple[ByName, dict[str, Any]]:
    """Return log likelihoods, with log Z subtracted, and notes on log Z."""
    missing, unused = sorted(set(values) - set(log_partition)), sorted(set(log_partition) - set(values))
    if missing:
        raise EnergyError(
            f"log_likelihood of {missing} came without log Z, and loo of an unnormalised log density is meaningless. Write "
            f"to_arviz(..., log_partition={{'{missing[0]}': log_z}}) with the result of log_partition(...) for each draw's "
            f"parameters; for an ordinary, normalised site write {{'{missing[0]}': None}}."
        )
    if unused:
        raise EnergyError(
            f"log_partition has {unused}, which log_likelihood does not have. Write to_arviz(..., "
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
    """Return the groups of a training."""
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
    # Without ArviZ's converter, which warns where there are more chains than draws.
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

    # ArviZ 1 has no InferenceData, and accessing the name gives a warning.
    if arviz.__version__.startswith("0."):
        data: Any = arviz.from_dict(**groups, dims=dims, coords=coords)  # pyright: ignore
        if training:
            data.add_groups(training, warn_on_custom_groups=False)
        return data
    data = arviz.from_dict(groups, dims=dims, coords=coords) if groups else xarray.DataTree()
    for name, dataset in training.items():
        data[name] = xarray.DataTree(dataset=dataset)
    return data
