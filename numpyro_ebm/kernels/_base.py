"""What every kernel is: settings in a frozen dataclass, state in, state out."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from blackjax.util import pytree_size

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_covariance, check_positive
from numpyro_ebm._core.typing import Array, Position, PRNGKey

K = TypeVar("K", bound=type)
C = TypeVar("C", bound=Callable)


class TransitionInfo(NamedTuple):
    """One record for every kernel; ``AbstractKernel.statistics`` names the fields that mean something.

    Attributes:
        acceptance_rate: Metropolis acceptance probability (NUTS: its average over the trajectory);
            1 for a kernel that never rejects.
        is_divergent: the trajectory's energy error passed BlackJAX's threshold, or, for an unadjusted
            kernel, where it went is not finite.
        num_gradients: gradient evaluations of the log density in this transition; for a kernel without
            gradients, evaluations of the log density.
        energy: the Hamiltonian of the proposal; None for a kernel without one.
        tree_depth: number of doublings of NUTS; 0 elsewhere.
        is_nonfinite: whether the log density or its gradient was not finite where the kernel wanted to go: NaN, a
            wall of infinite energy, or an energy of minus infinity. Kernels that reject do not go there (but for
            minus infinity, which Metropolis always accepts), so the draws do not show it.
        swap_rate: acceptance probability of swaps between temperatures; None for a kernel without them.
    """

    acceptance_rate: Array
    is_divergent: Array
    num_gradients: Array
    energy: Array | None
    tree_depth: Array
    is_nonfinite: Array
    swap_rate: Array | None


class AbstractKernel(abc.ABC):
    """A Markov transition kernel in unconstrained space.

    A kernel is a frozen dataclass and a pytree: ``step_size`` and ``inverse_mass_matrix`` are its leaves, so
    adapted values, one per chain, live in the same class. ``log_density`` maps one position to a scalar.

    Attributes:
        step_size: BlackJAX's step size; with a warm-up, where its adaptation starts; None for a kernel without one.
        target_acceptance: acceptance that the warm-up steers the step size to; None where nothing adapts.
        adapts_mass_matrix: whether the warm-up also adapts ``inverse_mass_matrix``.
        takes_dense_matrix: whether ``inverse_mass_matrix`` may be ``(d, d)``.
        is_exact: whether a transition leaves the density invariant; unadjusted kernels are off by their step's bias.
        is_discrete: whether the kernel moves on discrete supports.
        needs_density: whether it uses values of the log density; without, the gradient of a `ScoreDistribution` will do.
        step_exponent: the step that fits ``log_density / T`` is ``step_size * T ** step_exponent``: 1/2 where the step is
            a length, 1 where it is a squared length.
        statistics: the fields of `TransitionInfo` that mean something for this kernel.
    """

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True
    is_discrete: ClassVar[bool] = False
    needs_density: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = None
    adapts_mass_matrix: ClassVar[bool] = False
    takes_dense_matrix: ClassVar[bool] = True
    step_exponent: ClassVar[float] = 0.5
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "is_divergent", "num_gradients", "is_nonfinite")
    step_size: Any

    @abc.abstractmethod
    def init(self, rng_key: PRNGKey, position: Position, log_density: Any) -> Any:
        """The state at a position, scored under the log density given (nothing older is reused).

        A NamedTuple with ``position`` and, where the kernel keeps them, ``logdensity`` and ``logdensity_grad``. The key is
        for kernels whose state holds more, such as a momentum.
        """

    @abc.abstractmethod
    def step(self, rng_key: PRNGKey, state: Any, log_density: Any) -> tuple[Any, TransitionInfo]:
        """One transition that leaves ``exp(log_density)`` invariant (unadjusted kernels: up to their step's bias)."""

    def bind(self, distribution: Any) -> Any:
        """The kernel with the settings that it takes from the distribution it is to sample; most take none."""
        return self

    def lift(self, position: Position) -> Position:
        """What the kernel moves, started at one position of the target; most move the position itself."""
        return position

    def lower(self, position: Position) -> Position:
        """The position of the target in what the kernel moves: ``lower(lift(x))`` is ``x``."""
        return position

    def gradient(self, state: Any) -> Position | None:
        """Gradient of the log density where the target is at, as far as the state keeps it; None elsewhere."""
        return getattr(state, "logdensity_grad", None)

    def adapted(self, **settings: Any) -> Any:
        """The same kernel with settings that a warm-up arrived at."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore
        return rebuilt(type(self), {**own, **settings})

    def __post_init__(self):
        owner = type(self).__name__
        is_setting = any(field.name == "step_size" for field in dataclasses.fields(self))  # pyright: ignore
        if self.step_size is None and is_setting:
            raise EnergyError(f"{owner} needs a step_size; got None. Write {owner}(step_size=0.1), or leave it out.")
        check_positive(owner, "step_size", self.step_size)
        matrix = getattr(self, "inverse_mass_matrix", None)
        check_covariance(owner, "inverse_mass_matrix", matrix, may_be_dense=self.takes_dense_matrix)


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


def with_jit(method: C) -> C:
    """Make a method run with jit enabled: BlackJAX's Gaussian noise fails under ``jax.disable_jit``."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.disable_jit(disable=False):
            return method(*args, **kwargs)

    return cast(C, call)


def rebuilt(cls: type, settings: dict[str, Any]) -> Any:
    """A kernel with these settings, whatever they are."""
    kernel = object.__new__(cls)
    for name, value in settings.items():
        object.__setattr__(kernel, name, value)
    return kernel


def mass_matrix(kernel: Any, position: Position) -> Array:
    """The kernel's inverse mass matrix, or the identity, for a position of this size.

    Raises:
        EnergyError: where its length is not the number of coordinates, or it is dense and may not be.
    """
    size = pytree_size(position)
    if kernel.inverse_mass_matrix is None:
        return jnp.ones(size, jnp.result_type(*jax.tree.leaves(position)))
    matrix = jnp.asarray(kernel.inverse_mass_matrix)
    shapes = ((size,), (size, size)) if kernel.takes_dense_matrix else ((size,),)
    if matrix.shape not in shapes:
        raise EnergyError(
            f"{type(kernel).__name__} needs inverse_mass_matrix of shape {' or '.join(map(str, shapes))} for a position of "
            f"{size} coordinates; got shape {matrix.shape}."
        )
    return matrix


def not_finite(*values: Any) -> Array:
    """Whether anything in these pytrees is NaN or infinite."""
    return ~jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(values)]).all()


def info(
    acceptance_rate: Any,
    is_divergent: Any,
    num_gradients: Any,
    energy: Any = None,
    tree_depth: Any = 0,
    is_nonfinite: Any = False,  # noqa: FBT002
    swap_rate: Any = None,
):
    """A `TransitionInfo` whose fields are arrays of fixed types, as a scan needs."""
    acceptance_rate = jnp.asarray(acceptance_rate, float)
    return TransitionInfo(
        acceptance_rate,
        jnp.asarray(is_divergent, bool),
        jnp.asarray(num_gradients, jnp.int32),
        None if energy is None else jnp.asarray(energy, acceptance_rate.dtype),
        jnp.asarray(tree_depth, jnp.int32),
        jnp.asarray(is_nonfinite, bool),
        None if swap_rate is None else jnp.asarray(swap_rate, acceptance_rate.dtype),
    )
