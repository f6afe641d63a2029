"""Kernels that propose new values of a discrete event by the gradient of the log density: GWG, DULA and DMALA."""

from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.energies import AbstractEnergy
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree, Scalar
from numpyro_ebm.kernels._base import TransitionInfo, info
from numpyro_ebm.kernels.elements import DiscreteKernel, Elements, is_bad, log_ratio

Balance = Literal["sqrt", "barker"]
"""Weight ``g(t)`` of a value that changes the density by the factor ``t``, with ``g(t) = t g(1 / t)``."""


class RelaxedState(NamedTuple):
    """The position, as floating-point numbers, its log density, and the gradient there."""

    position: Any
    logdensity: Any
    logdensity_grad: Any


class RelaxedKernel(DiscreteKernel):
    """A discrete kernel that takes gradients: the energy is evaluated at floating-point numbers that hold the values."""

    relaxes: ClassVar[bool] = True
    takes_gradients: ClassVar[bool] = True
    balance: Balance

    def __post_init__(self):
        super().__post_init__()
        if self.balance not in get_args(Balance):
            raise EnergyError(f"Unknown balance={self.balance!r}. {nearest(str(self.balance), get_args(Balance))}")

    def bind(self, distribution: Any) -> Any:
        """Return the kernel with the values of the support, after a check that the energy has a gradient.

        Raises:
            EnergyError: for an energy that uses elements as indices or in comparisons only, and for values that do not fit.
        """
        energy = getattr(distribution, "energy", None)
        if isinstance(energy, AbstractEnergy) and not energy.is_differentiable:
            raise EnergyError(
                f"The kernel '{self.name}' takes the gradient of the energy in the event, and {type(energy).__name__} uses "
                "its elements as indices, so has none. Write kernel='gibbs'; a Potts energy has a gradient with "
                "is_one_hot=True."
            )
        return super().bind(distribution)

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density and its gradient at the position."""
        return RelaxedState(position, *jax.value_and_grad(log_density)(position))

    def log_weights(self, elements: Elements, state: RelaxedState) -> Float[Array, "elements values"]:
        """Return the log weight of each value of each element by the first-order change of the log density."""
        changes = elements.changes(state.position, state.logdensity_grad)
        # A slope that is not a number tells nothing; the proposal only needs to be a function of the position.
        changes = jnp.nan_to_num(changes, nan=0.0, posinf=jnp.inf, neginf=-jnp.inf)
        return 0.5 * changes if self.balance == "sqrt" else jax.nn.log_sigmoid(changes)


def accept_or_reject(
    rng_key: PRNGKey, state: RelaxedState, proposed: RelaxedState, log_proposal_ratio: Scalar
) -> tuple[RelaxedState, TransitionInfo]:
    """Accept a proposal with the Metropolis-Hastings probability; NaN and infinite densities are rejected and reported."""
    ratio = log_ratio(proposed.logdensity, state.logdensity) + log_proposal_ratio
    ratio = jnp.where(jnp.isnan(ratio), -jnp.inf, ratio)
    accepted = jnp.log1p(-jax.random.uniform(rng_key)) < ratio
    new = jax.tree.map(lambda ours, theirs: jnp.where(accepted, theirs, ours), state, proposed)
    return new, info(jnp.exp(jnp.minimum(ratio, 0.0)), False, 1, is_nonfinite=is_bad(proposed.logdensity))  # noqa: FBT003


@record("balance")
class GibbsWithGradients(RelaxedKernel):
    r"""Gibbs with gradients (GWG): one gradient tells which element to change, and to which value.

    A transition proposes to set element ``i`` to the value ``v`` with probability proportional to ``g(exp(d_iv))``, where
    ``d_iv = grad_i log p(x) (v - x_i)`` is the first-order change of the log density, and accepts or rejects it. It costs
    one gradient, instead of the ``d (k - 1)`` energies of an exact conditional. The energy has to be differentiable in the
    values of the event.

    Args:
        values: as in `Gibbs`; vectors, such as ``jnp.eye(k)``, for one-hot categories.
        balance: the locally balanced weight ``g``: "sqrt", ``sqrt(t)``, or "barker", ``t / (1 + t)``.

    Raises:
        EnergyError: for an unknown weight.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (784,), support=constraints.boolean), "gwg")``

    References:
        Grathwohl et al., Oops I took a gradient: scalable sampling for discrete distributions (2021); Zanella, Informed
        proposals for local MCMC in discrete spaces (2020).
    """

    name: ClassVar[str] = "gwg"
    is_reversible: ClassVar[bool] = True
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "num_gradients", "is_nonfinite")
    step_size: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    values: Any = None
    balance: Balance = "sqrt"

    def most_changes(self, num_elements: int) -> int:
        """Return 1."""
        return 1

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Propose a change of one element, and accept or reject it."""
        elements = Elements.of(self.values, state.position)
        key_choice, key_accept = jax.random.split(rng_key)
        codes = elements.codes(state.position)
        there = self._log_proposal(elements, state, codes)
        choice = jax.random.categorical(key_choice, there.reshape(-1))
        i, code = choice // elements.num_values, choice % elements.num_values
        new_codes = codes.at[i].set(code.astype(codes.dtype))
        proposed = self.init(rng_key, elements.position(new_codes, state.position), log_density)
        back = self._log_proposal(elements, proposed, new_codes)
        return accept_or_reject(key_accept, state, proposed, back[i, codes[i]] - there[i, code])

    def _log_proposal(
        self, elements: Elements, state: RelaxedState, codes: Int[Array, " elements"]
    ) -> Float[Array, "elements values"]:
        """Return the log probability of each change; that of no change is 0."""
        log_weights = self.log_weights(elements, state)
        log_weights = log_weights.at[jnp.arange(len(codes)), codes].set(-jnp.inf)
        return log_weights - jax.nn.logsumexp(log_weights)


class DiscreteLangevin(RelaxedKernel):
    """Discrete Langevin proposals: all elements draw a new value at once, and independently."""

    step_exponent: ClassVar[float] = 1.0
    step_size: Any

    def propose(
        self, rng_key: PRNGKey, elements: Elements, state: RelaxedState, log_density: ChainLogDensityFn
    ) -> tuple[RelaxedState, Int[Array, " elements"]]:
        """Return the proposed state and its codes."""
        codes = jax.random.categorical(rng_key, self.log_proposal(elements, state)).astype(jnp.int32)
        return self.init(rng_key, elements.position(codes, state.position), log_density), codes

    def log_proposal(self, elements: Elements, state: RelaxedState) -> Float[Array, "elements values"]:
        """Return the log probability of each value of each element."""
        squares = elements.squared_moves(state.position)
        penalty = jnp.where(jnp.isinf(squares), jnp.inf, squares / (2 * jnp.asarray(self.step_size)))
        return jax.nn.log_softmax(self.log_weights(elements, state) - penalty)


@record("balance")
class DULA(DiscreteLangevin):
    r"""The discrete unadjusted Langevin algorithm: all elements change at once, and no proposal is rejected.

    Element ``i`` takes the value ``v`` with probability proportional to
    ``g(exp(grad_i log p(x) (v - x_i))) exp(-(v - x_i)^2 / (2 step_size))``. The draws have a bias that falls with the step
    size; `DMALA` has none. There is no acceptance rate to which a warm-up could adapt the step size.

    Args:
        step_size: a squared length. The unit of all squared lengths is the smallest squared distance between two
            values: 1 for binary units and integers, 4 for spins, 2 for one-hot vectors.
        values: as in `GibbsWithGradients`.
        balance: as in `GibbsWithGradients`.

    Raises:
        EnergyError: for a step size that is not positive, and an unknown weight.

    Example:
        ``estimate(model, "pcd", kernel=ebm.DULA(step_size=0.2))``

    References:
        Zhang, Liu and Liu, A Langevin-like sampler for discrete distributions (2022).
    """

    name: ClassVar[str] = "dula"
    is_exact: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ("num_gradients", "is_nonfinite")
    step_size: Any = 0.2
    values: Any = None
    balance: Balance = "sqrt"

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Draw all elements; a draw whose log density is NaN or infinite is not taken."""
        proposed, _ = self.propose(rng_key, Elements.of(self.values, state.position), state, log_density)
        is_infinite = ~jnp.isfinite(proposed.logdensity)
        new = jax.tree.map(lambda ours, theirs: jnp.where(is_infinite, ours, theirs), state, proposed)
        return new, info(1.0, False, 1, is_nonfinite=is_infinite)  # noqa: FBT003


@record("balance")
class DMALA(DiscreteLangevin):
    r"""Discrete Langevin proposals with a Metropolis-Hastings correction.

    The proposal is that of `DULA`. A transition costs one gradient and may change many elements.

    Args:
        step_size: as in `DULA`; a warm-up adapts it to acceptance 0.574.
        values: as in `GibbsWithGradients`.
        balance: as in `GibbsWithGradients`.

    Raises:
        EnergyError: for a step size that is not positive, and an unknown weight.

    Example:
        ``sample(rng_key, EnergyDistribution(energy, (784,), support=constraints.boolean), "dmala")``

    References:
        Zhang, Liu and Liu, A Langevin-like sampler for discrete distributions (2022); Sun, Dai and Schuurmans, Optimal
        scaling for locally balanced proposals in discrete spaces (2022), for the acceptance.
    """

    name: ClassVar[str] = "dmala"
    is_reversible: ClassVar[bool] = True
    target_acceptance: ClassVar[float | None] = 0.574
    statistics: ClassVar[tuple[str, ...]] = ("acceptance_rate", "num_gradients", "is_nonfinite")
    step_size: Any = 0.2
    values: Any = None
    balance: Balance = "sqrt"

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Draw all elements, and accept or reject the result."""
        elements = Elements.of(self.values, state.position)
        key_proposal, key_accept = jax.random.split(rng_key)
        proposed, codes = self.propose(key_proposal, elements, state, log_density)

        def log_probability(start, codes):
            return jnp.sum(jnp.take_along_axis(self.log_proposal(elements, start), codes[:, None], axis=1))

        back = log_probability(proposed, elements.codes(state.position))
        return accept_or_reject(key_accept, state, proposed, back - log_probability(state, codes))
