"""What every kernel is: settings in a frozen dataclass, state in, state out."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from blackjax.util import pytree_size

from numpyro_ebm._errors import EnergyError, check_positive
from numpyro_ebm._typing import Array, Position, PRNGKey

K = TypeVar("K", bound=type)


class TransitionInfo(NamedTuple):
    """One record for every kernel; ``AbstractKernel.statistics`` names the fields that mean something.

    Attributes:
        acceptance_rate: Metropolis acceptance probability (NUTS: its average over the trajectory);
            1 for a kernel that never rejects.
        is_divergent: the trajectory's energy error passed BlackJAX's threshold, or, for an unadjusted
            kernel, the new position is not finite.
        num_gradients: gradient evaluations of the log density in this transition.
        energy: the Hamiltonian of the proposal; NaN for a kernel without momentum.
        tree_depth: number of doublings of NUTS; 0 elsewhere.
        is_nonfinite: whether the log density was not finite where the kernel wanted to go; BlackJAX rejects such a
            proposal, so the draws do not show it.
        swap_rate: acceptance probability of swaps between temperatures; NaN for a kernel without them.
    """

    acceptance_rate: Array
    is_divergent: Array
    num_gradients: Array
    energy: Array
    tree_depth: Array
    is_nonfinite: Array
    swap_rate: Array


class AbstractKernel(abc.ABC):
    """A Markov transition kernel in unconstrained space.

    A kernel is a frozen dataclass and a pytree: ``step_size`` and ``inverse_mass_matrix`` are its leaves, so
    adapted values, one per chain, live in the same class. ``log_density`` maps one position to a scalar.

    Attributes:
        step_size: BlackJAX's step size; with a warm-up, where its adaptation starts.
        adapts: what a warm-up adapts: the step size, and for the HMC family the mass matrix.
        target_acceptance: acceptance that the warm-up steers to; None where nothing adapts.
        is_discrete: whether the kernel moves on discrete supports.
        statistics: the fields of `TransitionInfo` that mean something for this kernel.
    """

    name: ClassVar[str]
    is_discrete: ClassVar[bool] = False
    target_acceptance: ClassVar[float | None] = None
    adapts_mass_matrix: ClassVar[bool] = False
    step_power: ClassVar[float] = 1.0
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "is_divergent", "num_gradients")
    step_size: Any

    @abc.abstractmethod
    def init(self, rng_key: PRNGKey, position: Position, log_density: Any) -> Any:
        """The state at a position, scored under the log density given (nothing older is reused).

        The key is for kernels whose state holds more than the position, such as a momentum.
        """

    @abc.abstractmethod
    def step(self, rng_key: PRNGKey, state: Any, log_density: Any) -> tuple[Any, TransitionInfo]:
        """One transition that leaves ``exp(log_density)`` invariant (Langevin: up to its step's bias)."""

    def bind(self, distribution: Any) -> Any:
        """The kernel for an energy: some take settings from its base."""
        return self

    def lift(self, position: Position) -> Position:
        """What the kernel moves, from one position."""
        return position

    def lower(self, position: Position) -> Position:
        """One position, from what the kernel moves."""
        return position

    def adapted(self, **settings: Any) -> Any:
        """The same kernel with settings that a warm-up arrived at."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore
        return rebuilt(type(self), {**own, **settings})

    def __post_init__(self):
        check_positive(type(self).__name__, "step_size", self.step_size)


def kernel_class(*static: str):
    """Make a class a frozen dataclass and a pytree whose ``static`` fields are part of its structure."""

    def wrap(cls: K) -> K:
        """The class, frozen and registered."""
        cls = dataclasses.dataclass(frozen=True)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]

        def flatten(kernel):
            return [getattr(kernel, name) for name in data], tuple(getattr(kernel, name) for name in static)

        def unflatten(settings, leaves):
            # Not through __init__: what a warm-up arrives at is reported, not validated.
            return rebuilt(cls, dict(zip((*data, *static), (*leaves, *settings), strict=True)))

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        return cls

    return wrap


def rebuilt(cls: type, settings: dict[str, Any]) -> Any:
    """A kernel with these settings, whatever they are."""
    kernel = object.__new__(cls)
    for name, value in settings.items():
        object.__setattr__(kernel, name, value)
    return kernel


def mass_matrix(kernel: Any, position: Position) -> Array:
    """The kernel's inverse mass matrix, or the identity, for a position of this size.

    Raises:
        EnergyError: where its length is not the number of coordinates.
    """
    size = pytree_size(position)
    if kernel.inverse_mass_matrix is None:
        return jnp.ones(size, jnp.result_type(*jax.tree.leaves(position)))
    matrix = jnp.asarray(kernel.inverse_mass_matrix)
    if matrix.shape not in ((size,), (size, size)):
        raise EnergyError(
            f"{type(kernel).__name__} needs inverse_mass_matrix of shape ({size},) or ({size}, {size}) for a position of "
            f"{size} coordinates; got shape {matrix.shape}."
        )
    return matrix


def info(
    acceptance_rate: Any,
    is_divergent: Any,
    num_gradients: Any,
    energy: Any = jnp.nan,
    tree_depth: Any = 0,
    *,
    is_nonfinite: Any = False,
    swap_rate: Any = jnp.nan,
):
    """A `TransitionInfo` whose fields are arrays of fixed types, as a scan needs."""
    acceptance_rate = jnp.asarray(acceptance_rate, float)
    return TransitionInfo(
        acceptance_rate,
        jnp.asarray(is_divergent, bool),
        jnp.asarray(num_gradients, jnp.int32),
        jnp.asarray(energy, acceptance_rate.dtype),
        jnp.asarray(tree_depth, jnp.int32),
        jnp.asarray(is_nonfinite, bool),
        jnp.asarray(swap_rate, acceptance_rate.dtype),
    )
