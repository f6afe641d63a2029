"""`EnergyDistribution`: an unnormalised density as a NumPyro distribution."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.distributions import constraints

from numpyro_ebm._autodiff import guard
from numpyro_ebm._bases import split_rows
from numpyro_ebm._blocks import Blocks
from numpyro_ebm._callables import assemble, dismantle
from numpyro_ebm._context import site_being_scored
from numpyro_ebm._errors import EnergyError, at_site, is_concrete
from numpyro_ebm._typing import Array, EnergyFn, PRNGKey, PyTree
from numpyro_ebm.samplers import ChainSampler

GUARD = (
    "The log density of an energy is known up to log Z only, and log Z depends on the parameters: its derivative in "
    "anything but the event is wrong. To train the parameters, write numpyro_ebm.estimate(model, 'dsm', sigma=0.1) or "
    "another of numpyro_ebm.available_estimators(). To sample the event, fix the parameters: "
    "numpyro.handlers.substitute(model, params) or BlackJAXKernel(model, params=params). If Z is constant or already "
    "inside the energy, write EnergyDistribution(..., normalized=True)."
)


def guard_message() -> str:
    """What the guard says, with the name of the site where NumPyro knows it."""
    name = site_being_scored()
    return f"At site '{name}': {GUARD}" if name else GUARD


class Rows(NamedTuple):
    """Events laid out one per row.

    Attributes:
        value: ``(num_rows, *event_shape)``.
        local: what each row has of its own (context, base parameters), leaves ``(num_rows, ...)``.
    """

    value: Array
    local: PyTree


class EnergyDistribution(dist.Distribution):
    r"""An energy-based model at a ``numpyro.sample`` site: ``p(x) = base(x) exp(-E(x)) / Z``.

    ``log_prob`` is ``log base(x) - E(x)``, without log Z. Its derivative in anything but ``x`` raises, since log Z
    depends on the parameters: train them with `estimate`.

    Args:
        energy: ``energy(event)``, or ``energy(event, context)`` when there is a context. Maps ONE event of shape
            ``event_shape`` to a scalar (shape ``()`` or ``(1,)``); lower is more likely. A closure, a
            ``functools.partial`` (as ``flax_module`` and ``nnx_module`` return), an equinox module or a function.
        event_shape: shape of one event.
        context: pytree whose leaves lead with ``batch_shape``: covariates, one per row, handed to the energy.
        batch_shape: shape of the rows that differ in context or base; a plate broadcasts it.
        support: constraint of one event. Chains run in unconstrained space with the Jacobian and draws come back
            constrained.
        base: a normalised distribution of the same event that the energy tilts; None for Lebesgue measure.
        sampler: ``sampler(rng_key, distribution, sample_shape)``, what ``sample`` calls; `ChainSampler` by default.
            Draws are those of MCMC and so approximate.
        normalized: True where Z does not depend on any parameter; switches the guard off.

    Raises:
        EnergyError: (a ValueError) for a base of another event shape or of a narrower support, for a context that does
            not lead with ``batch_shape``, for an energy of another shape than a scalar (at its first use).
        TypeError: where the energy is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> d = EnergyDistribution(lambda x: 2.0 * jnp.sum(x**2), event_shape=(3,))
        >>> d.log_prob(jnp.ones((5, 3))).shape
        (5,)

    References:
        Song and Kingma, How to train your energy-based models (2021), section 2.
    """

    arg_constraints = {}
    pytree_data_fields = ("context", "base", "_support", "_energy_arrays", "_sampler_arrays")
    pytree_aux_fields = ("normalized", "_energy_structure", "_sampler_structure")

    def __init__(
        self,
        energy: EnergyFn,
        event_shape: tuple[int, ...] = (),
        *,
        context: PyTree = None,
        batch_shape: tuple[int, ...] = (),
        support: Any = constraints.real,
        base: dist.Distribution | None = None,
        sampler: Callable[..., Array] | None = None,
        normalized: bool = False,
        validate_args: bool | None = None,
    ):
        for name, value in (("energy", energy), ("sampler", sampler)):
            if value is not None and not callable(value):
                raise TypeError(f"EnergyDistribution needs a callable {name}; got {type(value).__name__}.")
        event_shape, batch_shape = _shape("event_shape", event_shape), _shape("batch_shape", batch_shape)
        _check_context(context, batch_shape)
        self._support = _event_support(support, event_shape)
        if base is not None:
            batch_shape = _check_base(base, event_shape, batch_shape, self._support)
        self._energy_arrays, self._energy_structure = dismantle(energy)
        self._sampler_arrays, self._sampler_structure = dismantle(sampler or ChainSampler())
        self.context, self.base, self.normalized = context, base, normalized
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    @property
    def energy(self) -> EnergyFn:
        """The energy as it was given."""
        return assemble(self._energy_arrays, self._energy_structure)

    @property
    def sampler(self) -> Callable[..., Array]:
        """What ``sample`` calls."""
        return assemble(self._sampler_arrays, self._sampler_structure)

    @property
    def support(self) -> constraints.Constraint:
        """The constraint of one event."""
        return self._support  # pyright: ignore[reportReturnType]

    @property
    def has_rsample(self) -> bool:
        """False: no gradient flows through a sampler."""
        return False

    def log_prob(self, value: Any, intermediates: Any = None) -> Array:
        """``log base(x) - E(x)`` per row: the log density without log Z.

        Args:
            value: events, ``sample_shape + batch_shape + event_shape``.
            intermediates: not used.

        Raises:
            EnergyError: where a derivative in anything but ``value`` is taken, and for events of another shape.
        """
        with at_site(site_being_scored()):
            value = self.as_events(value)
            shape = self._broadcast(value)
            rows = self.rows(value, shape)

            def batched(events):
                return jax.vmap(self.log_density)(events, rows.local)

            values = batched(rows.value) if self.normalized else guard(batched, rows.value, guard_message())
        return values.reshape(shape)

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw by the sampler; approximate, as MCMC is.

        Args:
            key: random key.
            sample_shape: shape of independent draws.

        Returns:
            Draws of shape ``sample_shape + batch_shape + event_shape``.
        """
        if key is None:
            raise EnergyError(
                "EnergyDistribution.sample needs a random key. Inside a model, write numpyro.handlers.seed(model, 0)."
            )
        shape = self.shape(sample_shape)
        if 0 in shape:
            return jnp.zeros(shape)
        return self.sampler(key, self, tuple(sample_shape))

    def evaluate_energy(self, event: Array, context: PyTree = None) -> Array:
        """The energy of one event as a scalar.

        Raises:
            EnergyError: for a result of another shape than ``()`` or ``(1,)``.
        """
        result = jnp.asarray(self.energy(event) if self.context is None else self.energy(event, context))
        if result.shape not in ((), (1,)):
            raise EnergyError(
                f"The energy returned shape {result.shape} for one event of shape {self.event_shape}; it has to return a "
                "scalar, shape (). The library vectorises it over rows: write it for one event, e.g. "
                "energy = lambda x: 0.5 * jnp.sum(x**2)."
            )
        return result.reshape(())

    def log_density(self, event: Array, local: PyTree = None) -> Array:
        """``log base - E`` of one event, given what its row has of its own; unguarded."""
        value = self._tilted(event, local)
        if self._is_real:
            return value
        return jnp.where(jnp.all(self.support(event)), value, -jnp.inf)

    def unconstrained_log_density(self, position: Array, local: PyTree = None) -> Array:
        """`log_density` at an unconstrained position, with the log Jacobian of the transform."""
        if self._is_real:
            return self.log_density(position, local)
        event = self.constrain(position)
        jacobian = jnp.sum(self._transform.log_abs_det_jacobian(position, event))
        # Inside the transform's range by construction; rounding to the wall must not read as -inf.
        return self._tilted(event, local) + jacobian

    def constrain(self, position: Array) -> Array:
        """From unconstrained space to the support, one event."""
        return self._transform(position)

    def unconstrain(self, event: Array) -> Array:
        """From the support to unconstrained space, one event."""
        return self._transform.inv(event)

    def rows(self, value: Array, batch_shape: tuple[int, ...]) -> Rows:
        """Events broadcast to ``batch_shape`` and laid out one per row, with each row's context and base."""
        flat = jnp.broadcast_to(value, batch_shape + self.event_shape).reshape((-1, *self.event_shape))
        base_parameters = None if self.base is None else split_rows(self.base, self.batch_shape)[1]
        own = (self.context, base_parameters)
        if not jax.tree.leaves(own):
            return Rows(flat, None)
        return Rows(flat, jax.tree.map(lambda leaf: _repeat(leaf, len(self.batch_shape), batch_shape), own))

    @property
    def reference(self) -> dist.Distribution:
        """The base, or a standard normal in unconstrained space where there is none.

        Where chains start, and the noise of NCE, unless told otherwise.
        """
        if self.base is not None:
            return self.base
        shape = self.unconstrained_shape
        normal = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape))
        return normal if self._is_real else dist.TransformedDistribution(normal, self._transform)

    def reference_sample(self, rng_key: PRNGKey, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draws of `reference`, of shape ``sample_shape + batch_shape + event_shape``."""
        return self.as_events(self.reference.expand(self.batch_shape).sample(rng_key, sample_shape))

    @property
    def unconstrained_shape(self) -> tuple[int, ...]:
        """Shape of one event in unconstrained space."""
        return tuple(self._transform.inverse_shape(self.event_shape))

    def as_events(self, value: Any) -> Array:
        """Values as an array of the float type in use (discrete supports keep theirs), their shape checked.

        Raises:
            EnergyError: where the trailing shape is not ``event_shape`` or the leading one does not broadcast.
            TypeError: for complex or non-numeric values.
        """
        value = jnp.asarray(value)
        if not (jnp.isrealobj(value) and (jnp.issubdtype(value.dtype, jnp.number) or value.dtype == bool)):
            raise TypeError(f"An EnergyDistribution needs real numbers; got dtype {value.dtype}.")
        if not self.is_discrete:
            value = value.astype(float)
        self._broadcast(value)
        return value

    def _broadcast(self, value: Array) -> tuple[int, ...]:
        """The rows' shape of a value."""
        cut = value.ndim - len(self.event_shape)
        problem = cut < 0 or value.shape[cut:] != self.event_shape
        if not problem:
            try:
                return jnp.broadcast_shapes(value.shape[:cut], self.batch_shape)
            except ValueError:
                pass
        raise EnergyError(
            f"Data of shape {value.shape} do not match event_shape={self.event_shape} and "
            f"batch_shape={self.batch_shape}: the data need shape (..., {', '.join(map(str, self.event_shape)) or 'rows'}). "
            f"Write EnergyDistribution(energy, event_shape={value.shape[len(self.batch_shape) or 1 :]}) or reshape the data."
        )

    def _tilted(self, event: Array, local: PyTree) -> Array:
        context, base_parameters = local if local is not None else (None, None)
        value = -self.evaluate_energy(event, context)
        if self.base is not None:
            value = value + split_rows(self.base, self.batch_shape)[0](event, base_parameters)
        return value

    @property
    def _transform(self) -> Any:
        if self.is_discrete:
            raise EnergyError(
                f"The support {self.support} is discrete: gradient kernels and score-based estimators cannot work on it."
            )
        return dist.biject_to(self.support)

    @property
    def _is_real(self) -> bool:
        return type(_elementary(self.support)) is type(constraints.real)


def _shape(name: str, shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int | np.integer) and n >= 0 for n in shape):
        raise EnergyError(f"{name} needs a tuple of sizes, e.g. {name}=(3,); got {shape!r}.")
    return tuple(int(n) for n in shape)


def _event_support(support: Any, event_shape: tuple[int, ...]) -> Any:
    """The constraint of a whole event, from that of its elements."""
    extra = len(event_shape) - support.event_dim
    if extra < 0:
        raise EnergyError(
            f"The support {support} constrains events of {support.event_dim} dimensions; event_shape={event_shape} has "
            f"{len(event_shape)}. Write event_shape=(n,)."
        )
    check_one_support(support, event_shape)
    return constraints.independent(support, extra) if extra else support


def check_one_support(support: Any, event_shape: tuple[int, ...]) -> None:
    """Refuse bounds that differ from row to row.

    Raises:
        EnergyError: with their shape.
    """
    for bound in jax.tree.leaves(support):
        if jnp.ndim(bound) > len(event_shape):
            raise EnergyError(
                f"The support {support} has bounds of shape {jnp.shape(bound)} for events of shape {event_shape}: all rows "
                "share one support. Write bounds of one event, and move the rest into the energy."
            )


def _check_context(context: PyTree, batch_shape: tuple[int, ...]) -> None:
    for leaf in jax.tree.leaves(context):
        if jnp.shape(leaf)[: len(batch_shape)] != batch_shape:
            raise EnergyError(
                f"Each leaf of context leads with batch_shape={batch_shape}; got a leaf of shape {jnp.shape(leaf)}. "
                f"Write EnergyDistribution(..., context=context, batch_shape={jnp.shape(leaf)[:1]})."
            )


def _check_base(base: Any, event_shape: tuple[int, ...], batch_shape: tuple[int, ...], support: Any) -> tuple[int, ...]:
    """The batch shape with the base's own, once the base is known to fit."""
    if not isinstance(base, dist.Distribution):
        raise TypeError(f"base needs a numpyro distribution; got {type(base).__name__}.")
    if base.event_shape != event_shape:
        raise EnergyError(
            f"base has event_shape {base.event_shape}, the energy has {event_shape}. "
            f"Write base=numpyro.distributions.Normal(0, 1).expand({list(event_shape)}).to_event({len(event_shape)})."
        )
    check_same_support("base", base, support)
    try:
        return jnp.broadcast_shapes(batch_shape, base.batch_shape)
    except ValueError:
        raise EnergyError(f"base has batch shape {base.batch_shape}, which does not broadcast to {batch_shape}.") from None


def check_same_support(role: str, distribution: dist.Distribution, support: Any) -> None:
    """Refuse a distribution that lives on another support than the energy's.

    Raises:
        EnergyError: naming both supports.
    """
    theirs, ours = _elementary(distribution.support), _elementary(support)
    if _region(theirs) != _region(ours):
        raise EnergyError(
            f"The {role} {type(distribution).__name__} has support {theirs}, the energy has {ours}. Give both the "
            f"same: write EnergyDistribution(..., support={theirs}) or another {role}."
        )


def _elementary(constraint: Any) -> Any:
    while isinstance(constraint, constraints.independent):  # pyright: ignore[reportArgumentType]
        constraint = constraint.base_constraint  # pyright: ignore[reportAttributeAccessIssue]
    return constraint


def _region(constraint: Any) -> Any:
    """The set a constraint stands for: intervals by their bounds (open or closed alike), others by their type."""
    if isinstance(constraint, Blocks):
        return tuple(
            (_region(_elementary(part)), shape) for part, shape in zip(constraint.parts, constraint.shapes, strict=True)
        )
    has_bounds = hasattr(constraint, "lower_bound") or hasattr(constraint, "upper_bound")
    if constraint.is_discrete or not (has_bounds or type(constraint) is type(constraints.real)):
        return type(constraint)
    low, high = getattr(constraint, "lower_bound", -np.inf), getattr(constraint, "upper_bound", np.inf)
    if not is_concrete(low, high):
        return "an interval"
    return float(np.min(np.asarray(low))), float(np.max(np.asarray(high)))


def _repeat(leaf: Any, own_ndim: int, batch_shape: tuple[int, ...]) -> Array:
    """A leaf that leads with the distribution's batch shape, broadcast to the rows and flattened over them."""
    leaf = jnp.asarray(leaf)
    event = leaf.shape[own_ndim:]
    return jnp.broadcast_to(leaf, batch_shape + event).reshape((-1, *event))
