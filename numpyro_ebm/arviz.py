"""From draws to ArviZ: the only door to it, the same for ArviZ 0.23 and 1.x; slow to import, it waits for its first use."""

import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC

from numpyro_ebm._errors import EnergyError, nearest
from numpyro_ebm._normalized import normalized
from numpyro_ebm._typing import Array
from numpyro_ebm.sampling import Draws
from numpyro_ebm.training import FitResult

STATISTICS = {
    "accept_prob": "acceptance_rate",
    "acceptance_rate": "acceptance_rate",
    "diverging": "diverging",
    "is_divergent": "diverging",
    "num_steps": "n_steps",
    "num_gradients": "n_steps",
    "potential_energy": "lp",
    "energy": "energy",
    "step_size": "step_size",
    "tree_depth": "tree_depth",
    "is_nonfinite": "nonfinite",
    "swap_rate": "swap_rate",
}
"""The names of statistics here, and ArviZ's."""


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
    posterior, stats = _collect("to_arviz", draws)
    shape = _check_shapes(posterior) if posterior or training is None else None
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
    groups = {name: {k: _as_numpy(k, v) for k, v in group.items()} for name, group in groups.items() if group}
    names = dict(dims or {}), dict(coords or {})
    data = _build(groups, _training(training, *names), *names)
    if notes:
        data["log_likelihood"].attrs.update(notes)
    return data


def _collect(owner: str, draws: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    if isinstance(draws, Draws):
        return dict(draws.samples), dict(draws.stats)
    if isinstance(draws, MCMC):
        if draws.last_state is None:
            raise EnergyError("This MCMC has no draws yet. Write mcmc.run(jax.random.key(0)) first.")
        fields = draws.get_extra_fields(group_by_chain=True)
        return dict(draws.get_samples(group_by_chain=True)), {k: v for k, v in fields.items() if v is not None}
    if isinstance(draws, Mapping):
        return dict(draws), {}
    raise TypeError(
        f"{owner} needs an MCMC, the result of sample or of fit, or a dict of arrays; got {type(draws).__name__}."
    )


def _check_shapes(posterior: dict[str, Any]) -> tuple[int, int]:
    """The (chains, draws) that all variables share."""
    for name, value in posterior.items():
        if isinstance(value, Mapping):
            raise EnergyError(f"'{name}' is a dict; to_arviz needs one flat dict of arrays (chains, draws, ...).")
    shapes = {name: np.shape(value)[:2] for name, value in posterior.items()}
    distinct = set(shapes.values())
    if len(distinct) != 1 or len(next(iter(distinct))) != 2:
        raise EnergyError(
            f"Every variable leads with the same (chains, draws); got {shapes}. For a single chain write x[None]."
        )
    return next(iter(distinct))  # pyright: ignore[reportReturnType]


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
        likelihoods[name] = _as_numpy(name, value)
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
    chains = {name: _as_numpy(name, value) for name, value in result.chains.samples.items()}
    chains |= {f"{name}_energy": _as_numpy(name, value) for name, value in result.chains.energies.items()}
    # By hand: ArviZ warns of more chains than draws, and here both are meant.
    variables = {}
    for name, value in chains.items():
        names = dims.get(name, [f"{name}_dim_{i}" for i in range(value.ndim - 2)])
        variables[name] = (("chain", "draw", *names), value)
    used = {name for names, _ in variables.values() for name in names}
    known = {name: value for name, value in coords.items() if name in used}
    places = {"chain": np.arange(len(next(iter(chains.values())))), "draw": result.chains.steps}
    return {"training": xarray.Dataset(variables, known | places), "training_stats": stats}


def _as_numpy(name: str, value: Any) -> np.ndarray:
    """An array that netCDF can hold: half precision widened, random keys refused."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise EnergyError(f"'{name}' holds random keys, which are no data. Leave it out.")
    value = np.asarray(value)  # not by JAX, which would narrow float64
    return value.astype(np.float32) if value.dtype in (jnp.bfloat16, jnp.float16) else value


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


class Recorded(NamedTuple):
    """Draws as diagnostics read them, whatever they came as.

    Attributes:
        variables: by name, ``(chains, draws, ...)``.
        stats: by ArviZ's names, ``(chains, draws, ...)``.
        observed: by name, data that came with the draws.
        kernel: what drew them, where it is known.
    """

    variables: dict[str, np.ndarray]
    stats: dict[str, np.ndarray]
    observed: dict[str, np.ndarray]
    kernel: Any = None


def read(owner: str, draws: Any) -> Recorded:
    """Take what `to_arviz` takes, what it gives, or training chains.

    Args:
        owner: who asks, for messages.
        draws: an MCMC, `Draws`, a dict of arrays, ``InferenceData``, a ``DataTree``, or the result of `fit` with its
            recorded chains.

    Raises:
        EnergyError: (a ValueError) for draws that are not there, or not led by chains and draws.
        TypeError: for anything else.
    """
    if isinstance(draws, FitResult):
        if draws.chains is None:
            raise EnergyError(f"{owner}: this result of fit has no chains. Write fit(..., record_chains=8).")
        return Recorded(draws.chains.samples, {}, {})
    if hasattr(draws, "groups"):  # ArviZ's, of either kind
        if "posterior" not in _group_names(draws):
            raise EnergyError(f"{owner} needs a posterior group. Write to_arviz(draws).")
        return Recorded(*(_arrays(draws, group) for group in ("posterior", "sample_stats", "observed_data")))
    posterior, stats = _collect(owner, draws)
    _check_shapes(posterior)
    kernel = getattr(draws, "kernel", None) if isinstance(draws, Draws) else getattr(draws, "sampler", None)
    variables = {name: _as_numpy(name, value) for name, value in posterior.items()}
    known = {STATISTICS[name]: _as_numpy(name, value) for name, value in stats.items() if name in STATISTICS}
    return Recorded(variables, known, {}, getattr(kernel, "kernel", kernel) if isinstance(draws, MCMC) else kernel)


def _group_names(data: Any) -> set[str]:
    names: Any = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names}


def _arrays(data: Any, group: str) -> dict[str, np.ndarray]:
    if group not in _group_names(data):
        return {}
    arrays = {name: data[group][name] for name in data[group].data_vars}
    if group != "observed_data":
        arrays = {name: array.transpose("chain", "draw", ...) for name, array in arrays.items()}
    return {name: np.asarray(array.values) for name, array in arrays.items()}


def rank_rhat(values: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of ``(chains, draws, ...)``, by coordinate; NaN for one chain or constant values."""
    return _of_coordinates("rhat", values, "rank")


def effective_size(values: np.ndarray, method: str = "bulk") -> np.ndarray:
    """Effective sample size of ``(chains, draws, ...)``, by coordinate."""
    return _of_coordinates("ess", values, method)


def _of_coordinates(function: str, values: np.ndarray, method: str) -> np.ndarray:
    import arviz
    import xarray

    values = np.asarray(values, float)
    flat = values.reshape((*values.shape[:2], -1))
    dataset = xarray.Dataset({"values": (("chain", "draw", "coordinate"), flat)})
    with np.errstate(all="ignore"):
        return np.asarray(getattr(arviz, function)(dataset, method=method)["values"].values).reshape(values.shape[2:])


MAX_PANELS = 20


def draw_chains(
    kind: Literal["rank", "trace"], draws: Any, group: str, colors: list[str], dashes: list[Any], **choice: Any
) -> np.ndarray:
    """Rank or trace plots by whichever ArviZ there is; what `numpyro_ebm.plots` draws chains by.

    Args:
        kind: which.
        draws: what `to_arviz` takes or returns.
        group: the group to draw.
        colors: of the chains, in turn.
        dashes: line styles of the chains, in turn.
        **choice: ArviZ's ``var_names`` and ``coords``.

    Returns:
        The axes, ``(num_panels,)`` or for traces ``(num_panels, 2)``.

    Raises:
        EnergyError: for groups, variables or coordinates that are not there, and for more than 20 panels.
    """
    import arviz
    import xarray

    is_old = arviz.__version__.startswith("0.")
    data = draws if isinstance(draws, arviz.InferenceData if is_old else xarray.DataTree) else to_arviz(draws)
    _check_choice(data, group, **choice)
    with warnings.catch_warnings():
        # ArviZ 0.23 calls what matplotlib 3.11 is going to take away, and has no successor of its own line.
        warnings.filterwarnings("ignore", "Passing a dict or None as alias_mapping")
        axes = (_draw_by_0 if is_old else _draw_by_1)(arviz, kind, data, group, colors, dashes, choice)
    axes.flat[0].figure.set_layout_engine("constrained")
    return axes


def _check_choice(data: Any, group: str, var_names: Any, coords: Any) -> None:
    names = _group_names(data)
    if group not in names:
        raise EnergyError(f"There is no group '{group}'. {nearest(group, filter(None, names))}")
    known = data[group].data_vars
    for name in var_names or ():
        if name not in known:
            raise EnergyError(f"There is no variable '{name}'. {nearest(name, map(str, known))}")
    chosen = data[group].to_dataset() if hasattr(data[group], "to_dataset") else data[group]
    try:
        chosen = chosen[list(var_names or known)].sel(coords or {})
    except KeyError as error:
        sizes = dict(chosen.sizes)
        raise EnergyError(f"There are no coordinates {coords!r} in the group '{group}', which has {sizes}.") from error
    panels = sum(value.size // (value.sizes["chain"] * value.sizes["draw"]) for value in chosen.values())
    if panels > MAX_PANELS:
        raise EnergyError(
            f"{panels} panels are too many to read, {MAX_PANELS} the most. Write var_names=['x'] or coords="
            f"{{'x_dim_0': [0, 1]}} for some of the {dict(chosen.sizes)}."
        )


def _draw_by_0(arviz: Any, kind: str, data: Any, group: str, colors: Any, dashes: Any, choice: Any) -> np.ndarray:
    data = data if group == "posterior" else data[group]
    if kind == "rank":
        axes = np.atleast_1d(arviz.plot_rank(data, colors="#56B4E9", **choice)).reshape(-1)
        return np.array([ax for ax in axes if ax.has_data()])
    chain_prop = {"color": colors, "linestyle": dashes}
    return arviz.plot_trace(data, compact=False, chain_prop=chain_prop, legend=True, **choice)


def _draw_by_1(arviz: Any, kind: str, data: Any, group: str, colors: Any, dashes: Any, choice: Any) -> np.ndarray:
    options = {"aes": {"color": ["chain"], "linestyle": ["chain"]}, "color": colors, "linestyle": dashes}
    if kind == "rank":
        drawn = arviz.plot_rank(data, group=group, backend="matplotlib", **options, **choice)  # pyright: ignore
    else:
        drawn = arviz.plot_trace_dist(  # pyright: ignore
            data, group=group, compact=False, backend="matplotlib", visuals={"trace": {"width": 0.7}}, **options, **choice
        )
    drawn.add_legend("chain")
    axes = np.array([ax for ax in drawn.viz["figure"].item().axes if ax.has_data()])
    return axes.reshape(-1, 2) if kind == "trace" else axes
