"""`energy_factor`: a factor ``exp(-energy)`` on the density of the sites that it names."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped
from numpyro.distributions import constraints
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.primitives import _PYRO_STACK

from numpyro_ebm._core.concrete import eager
from numpyro_ebm._core.errors import EnergyError, at_site
from numpyro_ebm._core.jax_modes import in_own_modes, in_users_modes
from numpyro_ebm._core.numpyro_stack import plates_shape, scope_prefix
from numpyro_ebm._core.typing import Array, EnergyFn, PRNGKey
from numpyro_ebm.distributions import _unnormalized
from numpyro_ebm.distributions.shapes import all_arrays, insert_ones, widen


class EnergyFactor(dist.Distribution):
    """The distribution behind an `energy_factor` site: its log probability is minus the energy of each row.

    The energy is evaluated only in ``log_prob``, so that `estimate` can use it without evaluating it.

    Args:
        name: the factor's site.
        energy: ``energy(**row_values)``, returns a scalar.
        values: arrays that lead with ``batch_shape``, or scalars, by name.
        sites: names that are sample sites; their values may be differentiated.
        batch_shape: shape of the enclosing plates.
        row_mask: rows that take part, or None for all.
    """

    arg_constraints = {}
    support: Any = constraints.real  # pyright: ignore[reportAssignmentType]
    pytree_data_fields = ("values", "row_mask", "row_marker")
    pytree_aux_fields = ("name", "energy", "sites", "order")

    def __init__(
        self,
        name: str,
        energy: EnergyFn,
        values: dict[str, Array | np.ndarray],
        sites: frozenset[str],
        batch_shape: tuple[int, ...],
        row_mask: Array | None = None,
    ):
        self.name, self.energy, self.values, self.sites, self.row_mask = name, energy, values, sites, row_mask
        self.order = tuple(values)
        self.row_marker = np.zeros((*batch_shape, 0), np.float32)
        super().__init__(batch_shape, (0,))

    @classmethod
    def tree_unflatten(cls, aux_data: tuple[Any, ...], params: tuple[Any, ...]) -> "EnergyFactor":
        """Unflatten as NumPyro does; leading dimensions that ``vmap`` or ``scan`` added to all arrays become rows."""
        new: Any = super().tree_unflatten(aux_data, params)
        shape = getattr(new.row_marker, "shape", (0,))[:-1]
        num = len(shape) - len(new.batch_shape)
        if num > 0:
            missing = len(new.batch_shape)
            if all_arrays(new.values):
                new.values = {k: v if v.ndim > num else insert_ones(v, num, missing) for k, v in new.values.items()}
            new._batch_shape = shape
        return new

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Float[Array, "*batch 0"]:
        """Return the empty value of a factor."""
        return jnp.zeros(sample_shape + self.batch_shape + self.event_shape)

    def mask(self, mask: ArrayLike) -> "EnergyFactor":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a factor in which only the rows of the mask take part."""
        mask = jnp.broadcast_to(jnp.asarray(mask, bool), self.batch_shape)
        mask = mask if self.row_mask is None else mask & self.row_mask
        return EnergyFactor(self.name, self.energy, self.values, self.sites, self.batch_shape, mask)

    @in_own_modes
    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Shaped[Array, "*batch"]:
        """Return minus the energy of each row; a derivative in anything but the named sites raises."""
        rows = flatten_rows(self.values, self.batch_shape)
        if self.row_mask is not None:
            keep = self.row_mask.reshape(-1)
            rows = {k: jnp.where(keep.reshape((-1,) + (1,) * (v.ndim - 1)), v, 0) for k, v in rows.items()}
        free = {name: v for name, v in rows.items() if name in self.sites}
        fixed = {name: v for name, v in rows.items() if name not in self.sites}

        def minus_energy(free):
            return jax.vmap(lambda row: -self.evaluate_energy(row), axis_size=_size(self.batch_shape))({**free, **fixed})

        with at_site(self.name):
            result = _unnormalized.log_density(minus_energy, free, self.name)
        result = result if self.row_mask is None else jnp.where(self.row_mask.reshape(-1), result, 0.0)
        return result.reshape(self.batch_shape)

    def evaluate_energy(self, row: Mapping[str, Array | np.ndarray]) -> Shaped[Array, ""]:
        """Return the energy of one row as a scalar.

        Raises:
            EnergyError: if the result does not have shape ``()`` or ``(1,)``.
        """
        # In the user's order: pytrees sort their keys, and an energy that loops over `**values` may rely on the order.
        typed = {name: widen(row[name], booleans=name in self.sites) for name in self.order}
        with in_users_modes():
            result = jnp.asarray(self.energy(**typed))
        if result.shape not in ((), (1,)):
            shapes = {name: jnp.shape(value) for name, value in row.items()}
            raise EnergyError(
                f"The energy returned shape {result.shape} for one row of shapes {shapes}; it must return a scalar, "
                "shape (). Write it for one row: the plates around energy_factor define a row."
            )
        return result.reshape(())


def energy_factor(name: str, energy: EnergyFn, **values: Any) -> None:
    r"""Multiply the joint density by ``exp(-energy(**values))``, one factor per row of the enclosing plates.

    Inside ``numpyro.plate`` the energy is vectorised over rows: each value leads with the plates' shape (scalars are
    shared) and the energy gets one row. Outside any plate it gets the whole values. Values named like an earlier sample
    site belong to the event; the others are covariates.

    ``potential_energy``, NUTS and `BlackJAXKernel` see a potential, for fixed parameters. As for `EnergyDistribution`,
    every inference raises if the energy depends on latents or trained parameters that the factor does not name, or, where
    some of the named sites are data, if the sites' own distributions depend on latents. Under `estimate` the sites that
    factors name form an EBM: their own distributions are the base (``ImproperUniform`` for Lebesgue measure), and the
    energy is the sum of the factors. Sites that factors connect, directly or through others, form one joint event, named
    by the site names joined by commas ("x,y"); they must be in the same plates, and a row masked at one is masked for all.

    Args:
        name: name of the factor.
        energy: ``energy(**row)``, returns a scalar; lower is more likely.
        **values: the arguments of the energy, by name, in this order.

    Raises:
        EnergyError: (a ValueError) without values, for a value that does not lead with the plates' shape, and for an
            energy that does not return a scalar.
        TypeError: if the energy is not callable.

    Example:
        >>> def model(x):
        ...     with numpyro.plate("rows", len(x)):
        ...         x = numpyro.sample("x", dist.Normal(0, 1), obs=x)
        ...         y = numpyro.sample("y", dist.Normal(0, 1))
        ...         energy_factor("tilt", lambda x: 0.1 * x**4, x=x)
        ...         energy_factor("pair", lambda x, y: 0.5 * (x - y) ** 2, x=x, y=y)

    References:
        Song and Kingma, How to train your energy-based models (2021), section 2.
    """
    if not callable(energy):
        raise TypeError(
            f"energy_factor('{name}') needs a callable energy; got {type(energy).__name__}. For a value write "
            "numpyro.factor."
        )
    if not values:
        raise EnergyError(f"energy_factor('{name}') got no values. Write energy_factor('{name}', energy, x=x).")
    batch_shape = plates_shape()
    arrays = {key: _lead(name, key, _as_array(value), batch_shape) for key, value in values.items()}
    factor = EnergyFactor(name, energy, arrays, frozenset(filter(_is_sampled, values)), batch_shape)
    numpyro.sample(name, factor, obs=factor.sample(None), infer={"is_auxiliary": True})


def flatten_rows(
    values: Mapping[str, Array | np.ndarray], batch_shape: tuple[int, ...]
) -> dict[str, Shaped[Array, "rows ..."]]:
    """Lay out values, one row per entry of ``batch_shape``; scalars are repeated."""
    rows = {}
    for name, value in values.items():
        event = value.shape[len(batch_shape) :]
        rows[name] = jnp.broadcast_to(value, batch_shape + event).reshape((-1, *event))
    return rows


def _as_array(value: object) -> Array | np.ndarray:
    # Return arrays unchanged: `estimate` compares a site's value with the factor's by identity.
    if isinstance(value, np.ndarray | jax.Array):
        return value
    with eager(value):
        return jnp.asarray(value)


def _size(batch_shape: tuple[int, ...]) -> int:
    size = 1
    for n in batch_shape:
        size *= n
    return size


def _lead(factor: str, name: str, value: Array | np.ndarray, batch_shape: tuple[int, ...]) -> Array | np.ndarray:
    if value.ndim == 0:
        return value
    lead = value.shape[: len(batch_shape)]
    if len(lead) == len(batch_shape) and all(n in (1, size) for n, size in zip(lead, batch_shape, strict=True)):
        return value
    raise EnergyError(
        f"energy_factor('{factor}') is in plates of shape {batch_shape}, but its value {name} has shape {value.shape} and "
        f"does not lead with them. Subsample it with numpyro.subsample({name}, event_dim=...), or close over it in the "
        "energy if all rows share it."
    )


def _is_sampled(name: str) -> bool:
    """Return whether an enclosing trace already has a sample site of this name, in the factor's scopes or outside them."""
    for i, handler in enumerate(_PYRO_STACK):
        if isinstance(handler, numpyro.handlers.trace):
            sites = (handler.trace.get(prefix + name) for prefix in {scope_prefix(_PYRO_STACK[i + 1 :]), ""})
            if any(site is not None and site["type"] == "sample" for site in sites):
                return True
    return False


@promote_batch_shape.register(EnergyFactor)  # pyright: ignore[reportArgumentType, reportCallIssue]
def _promote(d: EnergyFactor) -> EnergyFactor:
    return d  # tree_unflatten has already added its rows
