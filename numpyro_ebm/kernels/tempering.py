"""Parallel tempering for any kernel."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import Array, ArrayLike, ChainLogDensityFn, Chains, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info
from numpyro_ebm.kernels._moves import MOVES
from numpyro_ebm.kernels.densities import tempered
from numpyro_ebm.kernels.langevin import MALA


class TemperingState(NamedTuple):
    """All replicas, the first at temperature 1.

    Attributes:
        position: leaves ``(num_temperatures, ...)``.
        logdensity: log density of the replica at temperature 1.
        replicas: states of the inner kernel, leaves ``(num_temperatures, ...)``, each evaluated at its own temperature.
        parity: whether the next swaps are between even (0) or odd (1) neighbours.
    """

    position: Position
    logdensity: Chains
    replicas: Any
    parity: Int[Array, "*chains"]


@record("temperatures")
class ParallelTempering(AbstractKernel):
    r"""Parallel tempering: one replica per temperature, so that hot replicas carry the cold one between modes.

    A transition moves each replica by the kernel under ``log p / T``, with a step size scaled to the temperature
    (``step_size * T`` if it is a squared length, ``step_size * sqrt(T)`` if it is a length). Then it swaps neighbours, even
    and odd pairs in turn, with probability ``min(1, exp((1/T_i - 1/T_j) (log p(x_j) - log p(x_i))))``. The replicas jointly
    follow the product of the ``p^(1/T)``, and the draws are those at temperature 1. Swaps cost no gradients (with
    `Langevin`, which keeps no log density, one evaluation of it per replica).

    Its chains hold all replicas: ``lift`` creates them from one position and ``lower`` extracts the draw, as `sample`,
    `ChainSampler` and `BlackJAXKernel` do. A warm-up adapts one step size to the mean acceptance of the replicas, and the
    mass matrix to the replica at temperature 1. ``swap_rate`` is the mean swap probability of a transition; if it is close
    to 0, insert temperatures in between.

    Args:
        kernel: a name or a kernel, which moves each replica.
        temperatures: at least two, from 1 upwards.

    Raises:
        EnergyError: for temperatures that do not start with 1 or that decrease, an unknown kernel, or nested tempering.

    Example:
        ``sample(rng_key, distribution, ParallelTempering("mala", temperatures=(1.0, 2.0, 4.0)))``

    References:
        Swendsen and Wang, Replica Monte Carlo simulation of spin glasses (1986); Geyer, Markov chain Monte Carlo maximum
        likelihood (1991); Syed, Bouchard-Cote, Deligiannidis and Doucet, Non-reversible parallel tempering (2022).
    """

    name = "parallel_tempering"
    kernel: Any = MALA()
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)

    def __post_init__(self):
        kernel = MOVES.resolve(self.kernel)
        if isinstance(kernel, ParallelTempering):
            raise EnergyError("ParallelTempering cannot temper itself. Write ParallelTempering('mala', temperatures=...).")
        object.__setattr__(self, "kernel", kernel)
        object.__setattr__(self, "temperatures", _checked(self.temperatures))

    @property
    def step_size(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Step size at temperature 1."""
        return self.kernel.step_size

    @property
    def inverse_mass_matrix(self) -> Any:
        """Inverse mass matrix of the inner kernel."""
        return self.kernel.inverse_mass_matrix

    @property
    def target_acceptance(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Target acceptance of the inner kernel."""
        return self.kernel.target_acceptance

    @property
    def adapts_mass_matrix(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a warm-up adapts the inner kernel's mass matrix."""
        return self.kernel.adapts_mass_matrix

    @property
    def is_exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner kernel is exact."""
        return self.kernel.is_exact

    @property
    def takes_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the replicas' kernel takes gradients."""
        return self.kernel.takes_gradients

    @property
    def relaxes(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the replicas' kernel takes gradients on a discrete support."""
        return self.kernel.relaxes

    @property
    def is_discrete(self) -> bool | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner kernel moves on discrete supports; None if it fits either kind of support."""
        return self.kernel.is_discrete

    @property
    def step_exponent(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Step exponent of the inner kernel."""
        return self.kernel.step_exponent

    @property
    def statistics(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Statistics of the inner kernel, and the swap rate."""
        return (*self.kernel.statistics, "swap_rate")

    def adapted(self, **settings: PyTree) -> Any:
        """Return the same tempering with these settings of the inner kernel."""
        return self._over(self.kernel.adapted(**settings))

    def bind(self, distribution: Any) -> Any:
        """Return the same tempering with the inner kernel bound to the distribution."""
        return self._over(self.kernel.bind(distribution))

    def lift(self, position: Position) -> Position:
        """Copy the position to every temperature, leaves ``(num_temperatures, ...)``."""
        number = len(self.temperatures)
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number, *jnp.shape(leaf))), position)

    def lower(self, position: Position) -> Position:
        """Return the position of the replica at temperature 1."""
        return jax.tree.map(lambda leaf: leaf[0], position)

    def gradient(self, state: TemperingState) -> Position | None:
        """Return the gradient at the replica of temperature 1, if the state holds it."""
        gradient = self.kernel.gradient(state.replicas)
        return None if gradient is None else self.lower(gradient)

    def most_changes(self, num_elements: int) -> int:
        """Return those of the kernel."""
        return self.kernel.most_changes(num_elements)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate each replica at its temperature."""
        temperatures = self._ladder(position)
        key_parity, key_replicas = jax.random.split(rng_key)

        def init_one(key, temperature, position):
            return self.kernel.init(key, position, tempered(log_density, temperature))

        keys = jax.random.split(key_replicas, len(self.temperatures))
        replicas = jax.vmap(init_one)(keys, temperatures, position)
        # Random, so that runs of a single transition also swap every pair at times.
        parity = jax.random.randint(key_parity, (), 0, self._num_parities)
        return TemperingState(position, _log_densities(replicas, temperatures, log_density)[0], replicas, parity)

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Move every replica, then swap neighbours."""
        temperatures = self._ladder(state.position)
        key_move, key_swap = jax.random.split(rng_key)

        def move(key, temperature, replica):
            return _heated(self.kernel, temperature).step(key, replica, tempered(log_density, temperature))

        keys = jax.random.split(key_move, len(self.temperatures))
        replicas, details = jax.vmap(move)(keys, temperatures, state.replicas)
        log_densities = _log_densities(replicas, temperatures, log_density)
        order, swap_rate = _swaps(key_swap, log_densities, temperatures, state.parity)
        replicas = _reordered(replicas, order, log_densities, temperatures)
        parity = (state.parity + 1) % self._num_parities
        state = TemperingState(replicas.position, log_densities[order[0]], replicas, parity)
        return state, _pooled(details, swap_rate)

    @property
    def _num_parities(self) -> int:
        # Two temperatures make one pair, which is even.
        return min(2, len(self.temperatures) - 1)

    def _ladder(self, position: Position) -> Shaped[Array, " levels"]:
        return jnp.asarray(self.temperatures, jnp.result_type(float, *jax.tree.leaves(position)))

    def _over(self, kernel: AbstractKernel) -> Any:
        return rebuilt(type(self), {"kernel": kernel, "temperatures": self.temperatures})


def _checked(temperatures: ArrayLike) -> tuple[float, ...]:
    """Check temperatures, and return them as a tuple of floats."""
    values = np.asarray(temperatures, float)
    rises = values.ndim == 1 and np.all(np.isfinite(values)) and np.all(np.diff(values) >= 0)
    if not rises or len(values) < 2 or values[0] != 1:
        raise EnergyError(
            f"ParallelTempering needs two temperatures or more, from 1 upwards; got {temperatures!r}. "
            "Write ParallelTempering('mala', temperatures=(1.0, 2.0, 4.0))."
        )
    return tuple(values.tolist())


def _heated(kernel: AbstractKernel, temperature: Shaped[Array, ""]) -> AbstractKernel:
    """Return the kernel with the step size for this temperature."""
    if kernel.step_size is None:
        return kernel
    return kernel.adapted(step_size=kernel.step_size * temperature**kernel.step_exponent)


def _log_densities(
    replicas: PyTree, temperatures: Shaped[Array, " levels"], log_density: ChainLogDensityFn
) -> Float[Array, " levels"]:
    """Return ``log p`` of each replica, at temperature 1."""
    if hasattr(replicas, "logdensity"):
        return replicas.logdensity * temperatures
    return jax.vmap(log_density)(replicas.position)


def _swaps(
    rng_key: PRNGKey,
    log_densities: Float[Array, " levels"],
    temperatures: Shaped[Array, " levels"],
    parity: Int[Array, ""],
) -> tuple[Int[Array, " levels"], Scalar]:
    """Return which replica moves to each temperature, and the mean acceptance of the swaps."""
    index = jnp.arange(len(temperatures))
    partner = jnp.where(index % 2 == parity, index + 1, index - 1)
    partner = jnp.where((partner < 0) | (partner >= len(temperatures)), index, partner)
    log_ratio = (1 / temperatures - 1 / temperatures[partner]) * (log_densities[partner] - log_densities)
    log_uniform = jnp.log(jax.random.uniform(rng_key, index.shape, log_ratio.dtype))
    # Both members of a pair use the same number; comparisons with NaN are false.
    order = jnp.where(log_uniform[jnp.minimum(index, partner)] < log_ratio, partner, index)
    acceptance = jnp.nan_to_num(jnp.exp(jnp.minimum(log_ratio, 0.0)), nan=0.0)
    return order, jnp.mean(acceptance, where=index < partner)


def _reordered(
    replicas: PyTree,
    order: Int[Array, " levels"],
    log_densities: Float[Array, " levels"],
    temperatures: Shaped[Array, " levels"],
) -> PyTree:
    """Reorder positions and rescale log densities to the new temperatures; momenta stay, as all share one distribution."""
    changes = {"position": jax.tree.map(lambda leaf: leaf[order], replicas.position)}
    if hasattr(replicas, "logdensity"):
        changes["logdensity"] = log_densities[order] / temperatures
    if hasattr(replicas, "logdensity_grad"):
        ratio = temperatures[order] / temperatures
        changes["logdensity_grad"] = jax.tree.map(
            lambda leaf: leaf[order] * ratio.reshape((-1, *(1,) * (leaf.ndim - 1))), replicas.logdensity_grad
        )
    return replicas._replace(**changes)


def _pooled(details: TransitionInfo, swap_rate: Scalar) -> TransitionInfo:
    """Combine the replicas' records into one, with energy and tree depth at temperature 1."""
    return info(
        jnp.mean(details.acceptance_rate),
        jnp.any(details.is_divergent),
        jnp.sum(details.num_gradients),
        None if details.energy is None else details.energy[0],
        details.tree_depth[0],
        jnp.any(details.is_nonfinite),
        swap_rate,
    )
