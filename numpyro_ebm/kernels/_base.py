"""Base class of the kernels: settings in a frozen dataclass, transitions from state to state."""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.util import pytree_size
from jax.typing import ArrayLike
from jaxtyping import Bool, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_covariance, check_positive
from numpyro_ebm._core.records import rebuilt
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Chains, Position, PRNGKey, PyTree

C = TypeVar("C", bound=Callable)


FLAT = (
    "For whole numbers write support=numpyro.distributions.constraints.integer_interval(0, 9) and kernel='gibbs'. Walls "
    "belong in the support, constraints.interval(low, high)."
)
FLAT_DISCRETE = (
    "Write kernel='gibbs' or 'flips' ('block_gibbs' for a ready-made energy), or an energy with a gradient, such as "
    "-jnp.sum(table * x) with support=numpyro_ebm.one_hot."
)


class TransitionInfo(NamedTuple):
    """Record of one transition; ``AbstractKernel.statistics`` names the fields that are meaningful for a kernel.

    Attributes:
        acceptance_rate: Metropolis acceptance probability (NUTS: its average over the trajectory);
            1 for a kernel that never rejects.
        is_divergent: whether the energy error of the trajectory exceeded BlackJAX's threshold or, for an
            unadjusted kernel, whether the new position is not finite.
        num_gradients: gradient evaluations of the log density in this transition; for a kernel without
            gradients, evaluations of the log density.
        energy: Hamiltonian of the proposal; None for a kernel without one.
        tree_depth: number of doublings of NUTS; 0 elsewhere.
        is_nonfinite: whether the log density or its gradient was not finite at the proposal: NaN, a wall of
            infinite energy, or an energy of minus infinity. Kernels that reject do not move there (except for
            minus infinity, which Metropolis always accepts), so the draws do not show it.
        swap_rate: acceptance probability of swaps between temperatures; None for a kernel without swaps.
        parts: records of the kernels that a kernel consists of; None for a kernel of its own.
    """

    acceptance_rate: Chains
    is_divergent: Bool[Array, "*chains"]
    num_gradients: Int[Array, "*chains"]
    energy: Chains | None
    tree_depth: Int[Array, "*chains"]
    is_nonfinite: Bool[Array, "*chains"]
    swap_rate: Chains | None
    parts: Any = None


class AbstractKernel(abc.ABC):
    """A Markov transition kernel in unconstrained space.

    A kernel is a frozen dataclass and a pytree with ``step_size`` and ``inverse_mass_matrix`` among its leaves, so
    the same class holds adapted values, one per chain. ``log_density`` maps one position to a scalar.

    Attributes:
        step_size: BlackJAX's step size; with a warm-up, the initial value; None for a kernel without one.
        target_acceptance: acceptance rate to which the warm-up adapts the step size; None without adaptation.
        adapts_mass_matrix: whether the warm-up also adapts ``inverse_mass_matrix``.
        takes_dense_matrix: whether ``inverse_mass_matrix`` may be ``(d, d)``.
        is_exact: whether a transition leaves the density invariant; unadjusted kernels have a bias from their step size.
        is_reversible: whether a transition, from its own `init`, satisfies detailed balance.
        is_discrete: whether the kernel moves on discrete supports; None for a kernel that moves on both kinds.
        relaxes: whether it is a discrete kernel that takes gradients, so that positions are floating-point numbers.
        takes_gradients: whether it uses the gradient of the log density.
        needs_density: whether it uses values of the log density; if not, the gradient of a `ScoreDistribution` is enough.
        step_exponent: the step size for ``log_density / T`` is ``step_size * T ** step_exponent``: 1/2 if the step size is
            a length, 1 if it is a squared length.
        statistics: the fields of `TransitionInfo` that are meaningful for this kernel.
    """

    name: ClassVar[str]
    is_exact: ClassVar[bool] = True
    is_reversible: ClassVar[bool] = False
    is_discrete: ClassVar[bool | None] = False
    relaxes: ClassVar[bool] = False
    takes_gradients: ClassVar[bool] = True
    needs_density: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = None
    adapts_mass_matrix: ClassVar[bool] = False
    takes_dense_matrix: ClassVar[bool] = True
    step_exponent: ClassVar[float] = 0.5
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "is_divergent", "num_gradients", "is_nonfinite")
    step_size: Any

    @abc.abstractmethod
    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> Any:
        """Return the state at a position, evaluated under the given log density.

        It is a NamedTuple with ``position`` and, if the kernel keeps them, ``logdensity`` and ``logdensity_grad``. The key
        is used by kernels whose state holds more, such as a momentum.
        """

    @abc.abstractmethod
    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[Any, TransitionInfo]:
        """Make a transition that leaves ``exp(log_density)`` invariant (unadjusted kernels: up to the step's bias)."""

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with settings taken from the distribution to sample; most kernels take none.

        Raises:
            EnergyError: for a kernel with gradients on an energy whose gradient is zero everywhere.
        """
        self.check_slope(distribution)
        return self

    def check_slope(self, distribution: Any) -> None:
        """Check that an energy has the gradient in the event that the kernel takes.

        A kernel that is exact may also follow the gradient of a base or of the log Jacobian alone, as between walls.

        Raises:
            EnergyError: for an energy whose gradient is zero everywhere.
        """
        check = getattr(distribution, "check_slope", None)  # a score, the target of a model and a part of an event have none
        if self.takes_gradients and check is not None:
            instead = FLAT_DISCRETE if self.relaxes else FLAT
            check(f"The kernel '{self.name}'", instead, with_base=self.is_exact and not self.relaxes)

    def reversible(self) -> Any:
        """Return a kernel of this kind whose transitions satisfy detailed balance, often the same; None if there is none."""
        return self if self.is_reversible else None

    def most_changes(self, num_elements: int) -> int:
        """Return the most elements of an event that one transition changes: all, but for kernels that move some."""
        return num_elements

    @property
    def parts(self) -> tuple[Any, ...]:
        """The kernels that this one consists of, each of which adapts by itself; none for a kernel of its own."""
        return ()

    @property
    def continuous(self) -> Bool[np.ndarray, " d"] | None:
        """Which numbers of a flat position are continuous; None unless only some are, as in a mixed event."""
        return None

    def as_positions(self, tree: PyTree) -> PyTree:
        """Cast every leaf to the kernel's type: the default integers, or floats (float64 under x64, float32 otherwise)."""
        is_integer = self.is_discrete and not self.relaxes
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=int if is_integer else float), tree)

    def as_draws(self, tree: PyTree) -> PyTree:
        """Return positions as draws of the target: those of a discrete kernel that takes gradients become integers again."""
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=int), tree) if self.relaxes else tree

    def lift(self, position: Position) -> Position:
        """Return what the kernel moves, for one position of the target; for most kernels, the position itself."""
        return position

    def lift_all(self, positions: Position) -> Position:
        """Return what the kernel moves, in its own type, for a batch of positions with leaves ``(num_chains, ...)``."""
        return self.as_positions(jax.vmap(self.lift)(positions))

    def lower(self, position: Position) -> Position:
        """Return the position of the target, given what the kernel moves: ``lower(lift(x))`` is ``x``."""
        return position

    def gradient(self, state: PyTree) -> Position | None:
        """Return the gradient of the log density at the target position if the state holds it, else None."""
        return getattr(state, "logdensity_grad", None)

    def adapted(self, **settings: PyTree) -> Any:
        """Return the same kernel with adapted settings."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore
        return rebuilt(type(self), {**own, **settings})

    def __post_init__(self):
        owner = type(self).__name__
        is_setting = any(field.name == "step_size" for field in dataclasses.fields(self))  # pyright: ignore
        if self.step_size is None and is_setting:
            raise EnergyError(f"{owner} needs a step_size; got None. Write {owner}(step_size=0.1), or omit it.")
        check_positive(owner, "step_size", self.step_size)
        matrix = getattr(self, "inverse_mass_matrix", None)
        check_covariance(owner, "inverse_mass_matrix", matrix, may_be_dense=self.takes_dense_matrix)


def with_jit(method: C) -> C:
    """Make a method run with jit enabled: BlackJAX's Gaussian noise fails under ``jax.disable_jit``."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.disable_jit(disable=False):
            return method(*args, **kwargs)

    return cast(C, call)


def mass_matrix(kernel: Any, position: Position) -> Shaped[Array, " d"] | Shaped[Array, "d d"]:
    """Return the kernel's inverse mass matrix, or the identity, for a position of this size.

    Raises:
        EnergyError: for a matrix whose shape does not match the number of coordinates, or a dense one that is not allowed.
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


def not_finite(*values: PyTree) -> Bool[Array, ""]:
    """Return whether anything in these pytrees is NaN or infinite."""
    return ~jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(values)]).all()


def info(
    acceptance_rate: ArrayLike,
    is_divergent: ArrayLike,
    num_gradients: ArrayLike,
    energy: ArrayLike | None = None,
    tree_depth: ArrayLike = 0,
    is_nonfinite: ArrayLike = False,  # noqa: FBT002
    swap_rate: ArrayLike | None = None,
):
    """Return a `TransitionInfo` whose fields are arrays of fixed types, as required by a scan."""
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
