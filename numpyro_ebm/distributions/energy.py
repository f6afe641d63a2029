"""`EnergyDistribution`: an unnormalised density as a NumPyro distribution."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.energies import AbstractEnergy, ready_made
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.laplacian import is_flat
from numpyro_ebm._core.numpyro_stack import at_scored_site, is_scored_whole
from numpyro_ebm._core.pytrees import dismantle
from numpyro_ebm._core.typing import Array, EnergyFn, LogDensityFn, PyTree, Scalar
from numpyro_ebm.distributions import _unnormalized
from numpyro_ebm.distributions.blocks import members_of
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.shapes import as_shape
from numpyro_ebm.distributions.supports import discrete_values, region_of
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.by_site import BySite, usual_kernels
from numpyro_ebm.kernels.chain_sampler import ChainSampler
from numpyro_ebm.kernels.densities import Known, keep
from numpyro_ebm.kernels.names import kernel_of

FLAT_SCORE = (
    "For data of whole numbers write support=numpyro.distributions.constraints.integer_interval(0, 9) and "
    "estimate(model, 'pseudolikelihood'); for others an energy that changes smoothly, or estimate(model, 'nce')."
)


class EnergyDistribution(EventDistribution):
    r"""An energy-based model at a ``numpyro.sample`` site: ``p(x) = base(x) exp(-E(x)) / Z``.

    ``log_prob`` is ``log base(x) - E(x)``, without log Z. If NumPyro infers or trains a value on which log Z depends, or on
    which a weight of the energy depends (that of a mixture component, a power), every inference raises. A derivative in
    anything but ``x`` raises too. Train with `estimate`.

    Args:
        energy: ``energy(event)``, or ``energy(event, context)`` when there is a context. Maps ONE event of shape
            ``event_shape`` to a scalar (shape ``()`` or ``(1,)``); lower is more likely. A closure, a
            ``functools.partial`` (as ``flax_module`` and ``nnx_module`` return), an equinox module, a function or a
            ready-made energy.
        event_shape: shape of one event; None for that of a ready-made energy, and ``()`` for a function.
        context: covariates of each row, passed to the energy: a pytree whose leaves lead with ``batch_shape``.
            Inside plates the leaves lead with the plates' sizes, and scalars are repeated.
        batch_shape: shape of the rows that differ in context or base; a plate broadcasts it. By default it is that of the
            enclosing plates if the context has leaves that are not scalars, even if a leaf has the plate's size only by
            chance; write ``batch_shape=()`` if all rows share the context.
        support: constraint of one event; None for that of a ready-made energy, and the reals for a function. Chains run in
            unconstrained space, with the Jacobian; draws are constrained. `Blocks` for discrete members beside continuous
            ones.
        base: a normalised distribution of the same event that the energy tilts; None for Lebesgue measure.
        sampler: ``sampler(rng_key, distribution, sample_shape)``, called by ``sample``; by default a `ChainSampler` with
            NUTS, with `Gibbs` if the support is discrete (`LatticeWalk` if it has no largest value), and with one of them
            for each member of `Blocks`. Such MCMC draws are approximate.
        normalized: True if Z does not depend on any parameter; disables the checks of log Z. In a mixture Z must be 1.

    Raises:
        EnergyError: (a ValueError) for a base with another event shape or support, for a context that does not lead with
            ``batch_shape`` or the plates, for an energy that does not return a scalar (at its first use).
        TypeError: if the energy is not callable.

    Example:
        >>> import jax.numpy as jnp
        >>> d = EnergyDistribution(lambda x: 2.0 * jnp.sum(x**2), event_shape=(3,))
        >>> d.log_prob(jnp.ones((5, 3))).shape
        (5,)

    References:
        Song and Kingma, How to train your energy-based models (2021), section 2.
    """

    pytree_aux_fields = ("normalized",)
    has_energy: ClassVar[bool] = True

    def __init__(
        self,
        energy: EnergyFn,
        event_shape: tuple[int, ...] | None = None,
        *,
        context: PyTree = None,
        batch_shape: tuple[int, ...] | None = None,
        support: constraints.Constraint | None = None,
        base: dist.Distribution | None = None,
        sampler: Callable[..., Array] | None = None,
        normalized: bool = False,
        validate_args: bool | None = None,
    ):
        if not callable(energy):
            raise TypeError(f"EnergyDistribution needs a callable energy; got {type(energy).__name__}.")
        event_shape, support = _event_of(energy, event_shape, support)
        _check_context(energy, context)
        self._function_arrays, self._function_structure = dismantle(energy)
        self.normalized = normalized
        if sampler is None:
            sampler = _default_sampler(support, event_shape)
        super().__init__(event_shape, context, batch_shape, support, base, sampler, validate_args=validate_args)

    @property
    def energy(self) -> EnergyFn:
        """The energy as passed to the constructor."""
        return self._function

    @property
    def ready_energy(self) -> AbstractEnergy | None:
        """The energy if it is a ready-made one on its own support and makes up the log density alone, without a base."""
        known = ready_made(self.energy) if self.base is None else None
        return known if known is not None and region_of(self.support).is_that_of(region_of(known.support)) else None

    @property
    def known(self) -> Known | None:
        """What kernels may know of the log density of a position; None unless the energy is a ready-made one."""
        energy = self.ready_energy
        if energy is None:
            return None
        if self.is_mixed:  # kernels move its members, of which a ready-made energy knows nothing
            return None
        return Known(energy, transform=None if self._is_real or self.is_discrete else self._transform)

    @in_own_modes
    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> Float[Array, "*batch"]:
        """Return ``log base(x) - E(x)`` per row: the log density without log Z.

        Args:
            value: events, ``sample_shape + batch_shape + event_shape``.
            intermediates: unused.

        Raises:
            EnergyError: for a derivative in anything but ``value``, and for events of another shape.
        """
        with at_scored_site():
            value = self.as_events(value)
            self._check_rows_of_site(value.shape)
            shape = self._broadcast(value)
            rows = self.rows(value, shape)

            def batched(events):
                return jax.vmap(self.log_density)(events, rows.local)

            values = batched(rows.value) if self.normalized else _unnormalized.log_density(batched, rows.value)
        return values.reshape(shape)

    def evaluate_energy(self, event: Shaped[Array, "*event"], context: PyTree = None) -> Shaped[Array, ""]:
        """Return the energy of one event as a scalar.

        Raises:
            EnergyError: if the result does not have shape ``()`` or ``(1,)``.
        """
        result = self._call(self.energy, event, context)
        if result.shape not in ((), (1,)):
            raise EnergyError(
                f"The energy returned shape {result.shape} for one event of shape {self.event_shape}; it must return a "
                "scalar, shape (). The library vectorises it over rows: write it for one event, e.g. "
                "energy = lambda x: 0.5 * jnp.sum(x**2)."
            )
        return result.reshape(())

    def log_density(self, event: Shaped[Array, "*event"], local: PyTree = None) -> Scalar:
        """Return ``log base - E`` of one event, given its row's context and base parameters; unguarded."""
        value = self._tilted(event, local)
        if self._is_real:
            return value
        return jnp.where(jnp.all(self.support(event)), value, -jnp.inf)

    def log_ratio_to_base(self, event: Shaped[Array, "*event"], local: PyTree = None) -> Shaped[Array, ""]:
        """Return ``-E`` of one event, given its row's context."""
        return -self.evaluate_energy(event, None if local is None else local[0])

    def unconstrained_log_density(self, position: Shaped[Array, "*position"], local: PyTree = None) -> Scalar:
        """Return `log_density` at an unconstrained position, with the log Jacobian of the transform."""
        if self._is_real:
            return self.log_density(position, local)
        # Inside the support by construction; an event rounded to the boundary must not give -inf.
        return self._tilted(self.constrain(position), local) + self.log_jacobian(position)

    def check_slope(self, user: str = "A score", instead: str = FLAT_SCORE, *, with_base: bool = False) -> None:
        """Check that the energy has a gradient in the event, by its structure alone.

        Args:
            user: what takes the gradient.
            instead: what to write.
            with_base: whether the gradient of the base and the log Jacobian count too.

        Raises:
            EnergyError: for an energy that the event reaches through comparisons, rounding or conversions to integers only.
        """
        position = jax.ShapeDtypeStruct(self.unconstrained_shape, jnp.result_type(float))
        local = jax.eval_shape(lambda: jax.tree.map(lambda leaf: leaf[0], self._one_row()))

        def energy(position, local):
            return self.evaluate_energy(self.constrain(position), None if local is None else local[0])

        if is_flat(self.unconstrained_log_density if with_base else energy, position, local):
            raise EnergyError(
                f"{user} takes the gradient of the energy in the event, which is zero everywhere: the event passes through "
                f"comparisons, rounding or conversions to integers only. {instead}"
            )

    def unconstrained_score(self, position: Float[Array, "*position"], local: PyTree = None) -> Float[Array, "*position"]:
        """Return the gradient of `unconstrained_log_density` in the position."""
        if self.is_discrete:
            raise EnergyError(f"A score is a gradient; the support {self.support} is discrete. Write kernel='gibbs'.")
        if self.members is not None:
            raise EnergyError(
                f"A score is a gradient, and the members {self.members.discrete} of the support {self.support} are discrete."
            )
        self.check_slope()
        return jax.grad(self.unconstrained_log_density)(position, local)

    def target(self, kernel: AbstractKernel) -> LogDensityFn:
        """Return `unconstrained_log_density`, the target of every kernel that works on the support."""
        kernel_of(kernel, self)
        if kernel.relaxes:
            return lambda position, local: self.unconstrained_log_density(position.astype(float), local)
        return keep(self.unconstrained_log_density, self.known)

    def _one_row(self) -> PyTree:
        """Return context and base parameters of rows, one or more."""
        return self.rows(jnp.zeros(self.event_shape), self.batch_shape).local

    def _check_rows_of_site(self, shape: tuple[int, ...]) -> None:
        """Check data of a site; outside a site, and in a mixture, columns broadcast against the distribution."""
        try:
            self.rows_of_site(shape, self.batch_shape)
        except ValueError:
            if is_scored_whole(self):
                raise

    def _tilted(self, event: Shaped[Array, "*event"], local: PyTree) -> Scalar:
        context, base_parameters = local if local is not None else (None, None)
        return self._log_base(event, base_parameters) - self.evaluate_energy(event, context)


def _check_context(energy: EnergyFn, context: PyTree) -> None:
    """Check that a ready-made energy gets a context if, and only if, it takes one."""
    if not isinstance(energy, AbstractEnergy):
        return
    if not energy.takes_context:
        energy.given(context)  # which raises for a context
    elif context is None:
        raise EnergyError(
            f"{type(energy).__name__} is an energy given covariates; got no context. Write EnergyDistribution(energy, "
            "context=covariates), one row of covariates for each row of the data."
        )


def _default_sampler(support: constraints.Constraint, event_shape: tuple[int, ...]) -> ChainSampler:
    """Return chains with NUTS, with Gibbs on a discrete support, and with one of them on each member of a mixed event."""
    members = members_of(support)
    if members is None:
        if support.is_discrete and discrete_values(support, as_shape("event_shape", event_shape)) is None:
            return ChainSampler("lattice_walk")
        return ChainSampler("gibbs") if support.is_discrete else ChainSampler()
    return ChainSampler(BySite(usual_kernels(members.kinds, endless=members.endless)))


def _event_of(
    energy: EnergyFn, event_shape: tuple[int, ...] | None, support: constraints.Constraint | None
) -> tuple[tuple[int, ...], constraints.Constraint]:
    """Return shape and support of an event: as given, else those of a ready-made energy, else a real number."""
    if not isinstance(energy, AbstractEnergy):
        return () if event_shape is None else event_shape, constraints.real if support is None else support
    own = energy.event_shape
    if event_shape is not None and as_shape("event_shape", event_shape) != own:
        raise EnergyError(
            f"{type(energy).__name__} is an energy of events of shape {own}; got event_shape={event_shape}. Leave "
            "event_shape out."
        )
    return own, energy.support if support is None else support
