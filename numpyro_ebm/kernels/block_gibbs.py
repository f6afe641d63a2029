"""Gibbs sampling by blocks of elements, for ready-made energies."""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from numpyro_ebm._core.discrete import num_elements, values_of
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import TransitionInfo, info, not_finite
from numpyro_ebm.kernels.block_draws import draw_blocks, in_few_bytes
from numpyro_ebm.kernels.densities import Known, described, known_of
from numpyro_ebm.kernels.elements import BlockState, DiscreteKernel, Elements


@record()
class BlockGibbs(DiscreteKernel):
    r"""Block Gibbs: a transition draws all elements, many of them at once, by what a ready-made energy knows of itself.

    * A pairwise energy on a graph (`Ising`, `GraphPotts`) has one block per colour of the graph. The elements of a colour
      are independent given the others: a lattice takes two draws, whatever its size.
    * An `RBM` or a `GaussianRBM` draws its hidden units given the visible ones, and the visible units given these. The joint
      energy of visible and hidden units has its two layers as blocks, and `DeepBoltzmannMachine` its odd and even layers.

    The kernel has no step size, never rejects, and evaluates no energy. On the visible units alone it cannot sample a
    tempered density, because the free energy divided by a temperature has no hidden units: temper ``RBM(...).joint()``.

    Args:
        values: as in `Gibbs`.

    Raises:
        EnergyError: at the first use, for an energy without blocks, and for a temperature where the energy draws its blocks
            at temperature 1 only.

    Example:
        ``sample(rng_key, EnergyDistribution(energies.Ising(energies.Graph.lattice(100, 100), 0.4)), "block_gibbs")``

    References:
        Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (1984); Hinton,
        Training products of experts by minimizing contrastive divergence (2002), for the RBM.
    """

    name: ClassVar[str] = "block_gibbs"
    needs_density: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None

    @property
    def is_discrete(self) -> bool | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True once the kernel has the values of a discrete support; None before, as it fits either kind of support."""
        return None if self.values is None else True

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with the values of a discrete support, after a check that the energy has blocks.

        Raises:
            EnergyError: for an energy without blocks, blocks that do not hold each element once, and values that do not fit.
        """
        known = _checked(self.name, distribution.known)
        if not distribution.is_discrete:
            return self
        if known.has_blocks:
            _check_blocks(known.energy)
        if self.values is not None:
            return super().bind(distribution)
        return self.adapted(values=jax.tree.map(in_few_bytes, distribution.discrete_values))

    def as_positions(self, tree: PyTree) -> PyTree:
        """Cast every leaf to the type of the values, a byte per element for small numbers, or to floats."""
        dtype = float if self.values is None else jnp.result_type(*jax.tree.leaves(self.values))
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)

    def as_draws(self, tree: PyTree) -> PyTree:
        """Return positions as draws: the default integers on a discrete support."""
        return tree if self.values is None else jax.tree.map(lambda leaf: jnp.asarray(leaf, int), tree)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Return the position as the state."""
        return BlockState(position)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Draw each block given all other elements."""
        known = _checked(self.name, known_of(log_density))
        (event,), structure = jax.tree.flatten(state.position)
        if known.has_blocks:
            new, was_bad = draw_blocks(rng_key, known, Elements.of(self.values, state.position).values[0], event)
            num = len(known.energy.blocks or ())
        else:
            new, was_bad = _swept(rng_key, known, event)
            num = 1
        return BlockState(structure.unflatten([new])), info(1.0, False, num, is_nonfinite=was_bad)  # noqa: FBT003


def _checked(kernel: str, known: Known | None) -> Known:
    """Return what is known of a density that can be drawn by blocks, and raise for any other."""
    if known is not None and (known.energy.has_sweep or known.has_blocks):
        return known
    raise EnergyError(
        f"The kernel '{kernel}' needs a ready-made energy whose elements fall into blocks, such as "
        f"numpyro_ebm.energies.Ising or RBM, alone in its distribution; got {described(known)}. Write "
        "kernel='gibbs', or 'nuts' for continuous events."
    )


def _check_blocks(energy: Any) -> None:
    """Check that the blocks of an energy of one's own hold each element once, and raise otherwise."""
    values = values_of(energy.support, energy.event_shape[-1] if energy.event_shape else 0)
    num = num_elements(np.zeros(2) if values is None else values, energy.event_shape)
    counts = np.bincount(np.concatenate([np.ravel(block) for block in energy.blocks]), minlength=num)
    bad = np.flatnonzero(counts != 1)
    if len(counts) > num or bad.size:
        element = num if len(counts) > num else int(bad[0])
        raise EnergyError(
            f"The blocks of {type(energy).__name__} have to hold each of its {num} elements once; the element {element} is "
            f"in {counts[element]} of them. Write blocks of independent elements, such as the colours of a graph, "
            "numpyro_ebm.energies.Graph(edges, shape).blocks."
        )


def _swept(rng_key: PRNGKey, known: Known, position: Array) -> tuple[Array, Bool[Array, ""]]:
    """Draw all elements by the energy's own sweep; return the position, and whether the draw was not finite.

    Units drawn with parameters that are NaN would look like any others, so the parameters are looked at.
    """
    if not known.is_whole:
        owner = type(known.energy).__name__
        raise EnergyError(
            f"{owner} draws its blocks at temperature 1 only, without a base. Write kernel='gibbs', or for an RBM the "
            "energy of visible and hidden units together, energy.joint(), whose layers are blocks at every temperature."
        )
    new = known.sweep(rng_key, position)
    was_bad = not_finite(new, jax.lax.stop_gradient(jax.tree.leaves(known.energy)))
    return jnp.where(was_bad, position, new), was_bad
