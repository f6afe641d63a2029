"""`estimate`: the handler that puts an estimator in the place of an intractable log likelihood."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import ExpandedDistribution, Independent, MaskedDistribution
from numpyro.primitives import Messenger, mutable

from numpyro_ebm import _context
from numpyro_ebm._errors import EnergyError, at_site, eager, is_concrete, nearest
from numpyro_ebm._typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions import EnergyDistribution
from numpyro_ebm.estimators import ESTIMATORS, AbstractEstimator, Site
from numpyro_ebm.factors import EnergyFactor
from numpyro_ebm.joint import FactoredSites


class Surrogate(dist.Distribution):
    """Stands at a site for an estimator: its log probability is the surrogate, whatever the value."""

    arg_constraints = {}
    pytree_data_fields = ("log_factor", "_support")

    def __init__(self, log_factor: Array, event_shape: tuple[int, ...], support: Any):
        self.log_factor, self._support = log_factor, support
        super().__init__(jnp.shape(log_factor), event_shape)

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """The surrogate."""
        return self.log_factor


class Unwrapped(NamedTuple):
    """An `EnergyDistribution` under expand, mask and to_event."""

    distribution: EnergyDistribution
    batch_shape: tuple[int, ...]
    event_dims: int
    mask: Array | None


class Plate(NamedTuple):
    """Rows of the whole that a plate holds: their indices, and how many there are in all."""

    indices: Array
    size: int


class estimate(Messenger):  # noqa: N801 (a handler, named as NumPyro names its own)
    """Make a model trainable: at each observed energy site an estimator's surrogate replaces the log likelihood.

    What comes back is a NumPyro model with the same arguments, for SVI with any guide, and, where the estimator is a
    deterministic objective, for NUTS (a generalised posterior). Plates, subsampling, scales and masks act on the
    surrogate row by row; all other sites are left alone. An observed site that an `energy_factor` names is an energy
    site too, its own distribution the base.

    Args:
        fn: a NumPyro model.
        estimator: a name of `available_estimators`, an estimator object, or a dict from site names to either.
        **options: the estimator's options, when it is a name.

    Raises:
        EnergyError: (a ValueError) for an unknown estimator; and when the model runs, naming the site: data that do not
            fit the energy or its support, an energy site that is not observed, a "gradient" or random estimator under
            NUTS/HMC, subsampling under NUTS/HMC, a persistent estimator under an ELBO that would lose its chains, no
            random key.
        TypeError: for an unknown option or something that is no estimator.

    Example:
        >>> svi = SVI(estimate(model, "dsm", sigma=0.1), empty_guide, optax.adam(1e-3), Trace_ELBO())  # doctest: +SKIP

    References:
        Song and Kingma, How to train your energy-based models (2021).
    """

    def __init__(self, fn: Callable, estimator: Any, **options: Any):
        if not callable(fn):
            raise TypeError(f"estimate needs a NumPyro model; got {type(fn).__name__}. Write estimate(model, 'cd').")
        if isinstance(estimator, Mapping):
            if options:
                raise TypeError(f"Options {sorted(options)} came beside a dict of estimators. Write them into its objects.")
            self._estimators: dict[str, AbstractEstimator] | AbstractEstimator = {
                site: ESTIMATORS.resolve(spec) for site, spec in estimator.items()
            }
        else:
            self._estimators = ESTIMATORS.resolve(estimator, **options)
        super().__init__(fn)

    @property
    def estimators(self) -> Any:
        """The estimator, or a dict of them by site. Read only: what was compiled would not see a change."""
        return self._estimators

    def __enter__(self):
        # What is known of one run of the model; a handler may be entered many times.
        self._plates: dict[str, Plate] = {}
        self._seen: set[str] = set()
        self._factored = FactoredSites()
        self._holders: list[dict[str, Any]] = []
        return super().__enter__()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, then the sites that factors made energies."""
        with self:
            result = self.fn(*args, **kwargs)  # pyright: ignore[reportOptionalCall]
            for name in self._seen:
                self._factored.check_not_named(name)
            for site in self._factored.sites():
                log_factor = self._surrogate(site.name, site.unwrapped(Unwrapped), site.value, site.message)
                site.emit(log_factor, Surrogate)
            self._check_all_seen()
        return result

    def process_message(self, msg: Any) -> None:
        """Replace an energy site's distribution by its surrogate; note factors."""
        if msg["type"] != "sample":
            return
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, EnergyFactor):
            self._factored.add_factor(fn)
            msg["fn"] = Surrogate(jnp.zeros(fn.batch_shape), fn.event_shape, fn.support)
            return
        unwrapped = unwrap(fn)
        if unwrapped is None:
            self._factored.add_site(msg)
            return
        if not msg["is_observed"]:
            raise EnergyError(
                f"The energy site '{name}' is not observed, so there is nothing to estimate from. Pass its data: "
                f"numpyro.sample('{name}', ..., obs=x); to draw from it, use the model without estimate."
            )
        log_factor = self._surrogate(name, unwrapped, msg["value"], msg)
        msg["fn"] = Surrogate(log_factor, fn.event_shape, fn.support)

    def postprocess_message(self, msg: Any) -> None:
        """Note plates, and the state of network layers, which an energy must leave alone."""
        if msg["type"] == "plate":
            self._plates[msg["name"]] = Plate(msg["value"], msg["args"][0])
        if msg["type"] == "mutable" and isinstance(msg["value"], dict):
            self._holders.append(msg["value"])

    def _surrogate(self, name: str, unwrapped: Unwrapped, value: Any, msg: Any) -> Array:
        """Values of the site's surrogate, in the batch shape its log probability has."""
        with at_site(name):
            self._seen.add(name)
            estimator = self._estimator_of(name)
            self._check_context(name, estimator, msg)
            plates = {frame.dim: self._plates[frame.name] for frame in msg["cond_indep_stack"] if frame.name in self._plates}
            site = lay_out(name, unwrapped, value, plates)
            estimator.check(site)
            with _unchanged(list(self._holders)):
                values = run(estimator, site)
        values = values if site.mask is None else jnp.where(site.mask, values, 0.0)
        values = values.reshape(site.batch_shape)
        return jnp.sum(values, axis=tuple(range(-unwrapped.event_dims, 0))) if unwrapped.event_dims else values

    def _estimator_of(self, name: str) -> AbstractEstimator:
        if isinstance(self._estimators, AbstractEstimator):
            return self._estimators
        if name not in self._estimators:
            raise EnergyError(
                f"No estimator is given for the energy site '{name}'. Write estimate(model, {{'{name}': 'cd', ...}}). "
                f"{nearest(name, self._estimators)}"
            )
        return self._estimators[name]

    def _check_context(self, name: str, estimator: AbstractEstimator, msg: Any) -> None:
        if estimator.is_persistent:
            _context.check_carries_state(estimator.name)
        if not _context.is_potential():
            return
        if estimator.role == "gradient" or not estimator.is_deterministic:
            why = (
                "only its gradient means something, its value is no log density"
                if estimator.role == "gradient"
                else "its noise is frozen there, so the target would be an accident of one draw"
            )
            usable = [n for n, cls in ESTIMATORS.classes.items() if cls.is_deterministic]
            raise EnergyError(
                f"The estimator '{estimator.name}' cannot be the target of NUTS or HMC: {why}. Write SVI with AutoDelta or "
                f"AutoNormal, or one of {usable} for a generalised posterior."
            )
        subsampled = {name for name, plate in self._plates.items() if len(plate.indices) != plate.size}
        frames = {frame.name for frame in msg["cond_indep_stack"]} & subsampled
        if frames:
            raise EnergyError(
                f"The plate {sorted(frames)} subsamples, and NUTS or HMC would use one frozen subset of the data. Write the "
                "plate without subsample_size for MCMC, or use SVI."
            )

    def _check_all_seen(self) -> None:
        if isinstance(self._estimators, AbstractEstimator):
            return
        unknown = sorted(set(self._estimators) - self._seen)
        if unknown:
            raise EnergyError(
                f"estimate got estimators for {unknown}, which are no energy sites of this model. "
                f"{nearest(unknown[0], self._seen)}"
            )


@contextmanager
def _unchanged(holders: list[dict[str, Any]]) -> Iterator[None]:
    """Refuse an energy that changes a layer's state: it is called once per row and many times per update."""
    before = [dict(holder) for holder in holders]

    def check(error: Exception | None) -> None:
        changed = [any(h[k] is not old.get(k) for k in h) for h, old in zip(holders, before, strict=True)]
        for holder, old in zip(holders, before, strict=True):
            holder.update(old)
        if any(changed):
            raise EnergyError(
                "The energy changes the state of one of its layers (batch norm, dropout, spectral norm). An energy is a "
                "function of one event: use a layer without state, such as layer norm, or freeze it (use_running_average, "
                "deterministic)."
            ) from error

    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        check(error)
        raise
    check(None)


def unwrap(fn: Any) -> Unwrapped | None:
    """The `EnergyDistribution` inside expand, mask and to_event, or None where there is none."""
    batch_shape, event_dims, masks = tuple(fn.batch_shape), 0, []
    inner = fn
    while not isinstance(inner, EnergyDistribution):
        if isinstance(inner, Independent):
            batch_shape += tuple(inner.event_shape[: inner.reinterpreted_batch_ndims])
            event_dims += inner.reinterpreted_batch_ndims
        elif isinstance(inner, MaskedDistribution):
            masks.append((inner._mask, event_dims))
        elif not isinstance(inner, ExpandedDistribution):
            return None
        inner = inner.base_dist
    mask = None
    for own, dims_outside in masks:
        own = jnp.asarray(own)
        # A mask outside to_event speaks of whole rows: give it the inner dimensions it lacks.
        inside = event_dims - dims_outside
        own = jnp.broadcast_to(own.reshape(own.shape + (1,) * (inside if own.ndim else 0)), batch_shape)
        mask = own if mask is None else mask & own
    return Unwrapped(inner, batch_shape, event_dims, mask)


def lay_out(name: str, unwrapped: Unwrapped, value: Any, plates: Mapping[int, Plate]) -> Site:
    """The site's data, one event per row, checked as far as they are concrete; plates by their dimension."""
    distribution = unwrapped.distribution
    with eager(value):
        events = distribution.as_events(value)
    cut = events.ndim - len(distribution.event_shape)
    try:
        batch_shape = jnp.broadcast_shapes(events.shape[:cut], unwrapped.batch_shape)
    except ValueError:
        raise EnergyError(
            f"Data of shape {events.shape} do not match the rows {unwrapped.batch_shape} and "
            f"event_shape={distribution.event_shape}: the data need shape "
            f"{(*unwrapped.batch_shape, *distribution.event_shape)}. Reshape them, or change the plate's size."
        ) from None
    local = distribution.rows(events, batch_shape).local
    with eager(events, unwrapped.mask):
        flat = jnp.broadcast_to(events, batch_shape + distribution.event_shape)
        flat = flat.reshape((-1, *distribution.event_shape))
        mask = None if unwrapped.mask is None else jnp.broadcast_to(unwrapped.mask, batch_shape).reshape(-1)
        own = _harmless(flat, mask, distribution), _harmless_local(local, mask), mask
        index, num_total = row_index(batch_shape, unwrapped.event_dims, plates)
        site = Site(name, distribution, batch_shape, *own, index, num_total)
        _check_values(site)
    return site


def row_index(batch_shape: tuple[int, ...], event_dims: int, plates: Mapping[int, Plate]) -> tuple[Array | None, int]:
    """Which row of the whole data set each row is, flat over all dimensions of the batch, and how many there are.

    A dimension without a plate, or under ``to_event``, is whole. None and 0 where int32 cannot count the rows.
    """
    whole = [Plate(jnp.arange(size), size) for size in batch_shape]
    for dim, plate in plates.items():
        position = len(batch_shape) - event_dims + dim
        if batch_shape[position] == len(plate.indices):  # else a plate of one row that broadcasts
            whole[position] = plate
    num_total = math.prod(plate.size for plate in whole)
    if num_total > jnp.iinfo(jnp.int32).max:
        return None, 0
    flat = jnp.zeros((), jnp.int32)
    for indices, size in whole:
        flat = flat[..., None] * size + jnp.asarray(indices, jnp.int32)
    return flat.reshape(-1), num_total


def run(estimator: AbstractEstimator, site: Site) -> Array:
    """The estimator's surrogate, with its random key and its state from NumPyro."""
    rng_key: PRNGKey | None = numpyro.prng_key()  # pyright: ignore[reportAssignmentType]
    if rng_key is None:
        if not estimator.is_deterministic:
            raise EnergyError(
                f"The estimator '{estimator.name}' needs a random key. Write numpyro.handlers.seed(estimate(...), 0), or "
                "run it in SVI."
            )
        return estimator.surrogate(rng_key, site, None)[0]  # pyright: ignore[reportArgumentType]
    if not estimator.is_persistent:
        return estimator.surrogate(rng_key, site, None)[0]
    key_init, key_update = jax.random.split(rng_key)
    start: Any = {"state": estimator.init(key_init, site)}
    holder: Any = mutable(f"{site.name}${estimator.name}", start)
    values, holder["state"] = estimator.surrogate(key_update, site, holder["state"])
    return values


def _harmless(value: Array, mask: Array | None, distribution: EnergyDistribution) -> Array:
    """Masked rows replaced by the first row that takes part, so that what is in them cannot reach a gradient."""
    if mask is None:
        return value
    feasible = distribution.constrain(jnp.zeros(distribution.unconstrained_shape, value.dtype))
    first = jnp.where(jnp.any(mask), value[jnp.argmax(mask)], feasible)
    return jnp.where(mask.reshape((-1,) + (1,) * (value.ndim - 1)), value, first)


def _harmless_local(local: PyTree, mask: Array | None) -> PyTree:
    """The same for what rows have of their own: a missing covariate is no more harmful than a missing value."""
    if mask is None:
        return local

    def replace(leaf):
        first = jnp.nan_to_num(leaf[jnp.argmax(mask)])
        return jnp.where(mask.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, first)

    return jax.tree.map(replace, local)


def _check_values(site: Site) -> None:
    """Refuse concrete rows that are not numbers or lie outside the support or on its boundary."""
    if site.distribution.is_discrete or not is_concrete(site.value, site.mask):
        return
    inside = jax.vmap(lambda event: jnp.all(site.distribution.support(event)))(site.value)
    finite = jnp.isfinite(site.value).reshape(site.num_rows, -1).all(axis=1)
    interior = jnp.isfinite(site.position).reshape(site.num_rows, -1).all(axis=1)
    for fine, fault, fix in (
        (finite, "is not finite", "Mask missing rows: numpyro.handlers.mask(mask=~jnp.isnan(x).any(-1))."),
        (inside, f"lies outside the support {site.distribution.support}", "Write the support that the data have."),
        (interior, f"lies on the boundary of the support {site.distribution.support}", "Move it inside."),
    ):
        bad = jnp.flatnonzero(~fine)
        if bad.size:
            row = int(bad[0])
            raise EnergyError(f"Row {row} of the data {fault}: {site.value[row]} ({bad.size} such rows). {fix}")


def empty_guide(*args: Any, **kwargs: Any) -> None:
    """A guide without sites: for models whose unknowns are all ``numpyro.param``.

    Example:
        ``SVI(estimate(model, "sm"), empty_guide, optax.adam(1e-3), Trace_ELBO())``
    """
