"""Learned Stein discrepancy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.critic import Critic, check_critic
from numpyro_ebm.estimators.parts.figures import mean_over_rows
from numpyro_ebm.estimators.parts.generator import context_of
from numpyro_ebm.estimators.parts.projections import Projection, check_projection, directions, inner

Penalty = Literal["l2", "spectral"]


@dataclasses.dataclass(frozen=True)
class LearnedSteinDiscrepancy(AbstractEstimator):
    r"""Learned Stein discrepancy (Grathwohl et al.): a critic finds where the score is wrong, and the energy corrects it.

    For a critic ``f`` with values in the space of the events and the energy's score ``s`` (unconstrained space, Jacobian
    included), the critic ascends and the energy descends

    .. math:: E_{data}\bigl[ s(x)^T f(x) + \operatorname{tr} \nabla f(x) \bigr] - \lambda\, E_{data} |f(x)|^2

    The first expectation equals :math:`E[(s - s_{data})^T f]` (Stein's identity), which is zero for every critic where the
    model is right. With ``penalty="l2"`` the best critic is :math:`(s - s_{data}) / 2\lambda`, and the value of the game is
    the Fisher divergence over :math:`4\lambda`. With ``penalty_weight=0.5`` this is the loss of score matching, which "sm"
    descends in closed form. Here the score is never differentiated in ``x``, so that an energy like |x| can be learned,
    whose second derivative "sm" does not see. ``penalty="spectral"`` has no such term; instead, every matrix of the critic
    is divided by its largest singular value where that is above 1, and vectors and scalars (biases) by their length. A
    critic of dense layers and 1-Lipschitz activations is then Lipschitz, and bounded at 0. Train it by plain gradient ascent
    (``optax.sgd``): the steps of Adam let its arrays grow, so that it follows the energy ever more slowly.

    The score's derivative in the parameters is evaluated at the rows. Where a kink of the energy *moves* with the parameters
    (a mixing matrix inside a Laplace density, the weights of a ReLU network), the derivative of the expectation has a part
    at the kink that no row contributes. The gradient is wrong without it: rotations of a Laplace ICA drift away.

    The critic's parameters are ``numpyro.param`` sites beside the model's own. Their gradient is reversed, so that one SVI
    trains both players; `alternate` gives the critic more steps and an optimiser of its own. The value is that of the
    game at the current critic, and not an objective. The built-in critic expects data of about unit scale. Where the critic
    can fit single rows, the energy overfits as under score matching.

    Args:
        critic: NumPyro model ``critic()`` that returns a function of one event in unconstrained space (and of its row's
            context where rows have one), with values of the same shape. Its parameters are ``numpyro.param`` sites, whose
            names differ from the model's. None for a network of two hidden layers of 64 SiLU units, in the site
            ``"<site>$critic"``.
        num_projections: Hutchinson probes per row for the trace; None for the exact trace, which costs one derivative of the
            critic per dimension.
        projection: distribution of the probes, "rademacher", "gaussian" or "sphere".
        penalty: how the critic is kept bounded, "l2" or "spectral".
        penalty_weight: ``lambda`` of "l2".

    Raises:
        EnergyError: for a count below 1, an unknown option, a weight that is not positive, a critic that returns another
            shape, samples or keeps state, and under "spectral" for parameters of more than two dimensions.
        TypeError: for a critic that is not callable or does not return a function.

    Example:
        ::

            critic = lambda: nnx_module("critic", net)  # net maps (d,) to (d,)
            optimizer = ebm.alternate(optax.adam(1e-3), optax.adam(1e-3), adversary="critic")
            svi = SVI(ebm.estimate(model, "lsd", critic=critic), ebm.empty_guide, optimizer, Trace_ELBO())

    References:
        Grathwohl, Wang, Jacobsen, Duvenaud and Zemel, Learning the Stein discrepancy for training and evaluating
        energy-based models without sampling (2020); Gorham and Mackey, Measuring sample quality with Stein's method (2015).
    """

    name = "lsd"
    role = "gradient"
    needs_energy = False
    critic: Callable[[], Callable[..., Any]] | None = None
    num_projections: int | None = 1
    projection: Projection = "rademacher"
    penalty: Penalty = "l2"
    penalty_weight: Any = 0.5

    def __post_init__(self):
        owner = type(self).__name__
        check_critic(owner, self.critic)
        if self.num_projections is not None:
            check_count(owner, "num_projections", self.num_projections)
        check_projection(self.projection)
        if self.penalty not in get_args(Penalty):
            raise EnergyError(f"Unknown penalty '{self.penalty}'. {nearest(str(self.penalty), get_args(Penalty))}")
        check_positive(owner, "penalty_weight", self.penalty_weight, scalar=True)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the Stein term, plus the penalty, per row; the critic's derivatives are reversed."""
        stein, square = self._terms(rng_key, site, self._critic(rng_key, site).adversary())
        return -(stein - self.penalty_weight * square if self.penalty == "l2" else stein), state

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        r"""Return ``stein``, its standard error ``stein_error``, and ``critic_norm``.

        ``stein`` is :math:`E[s^T f + \operatorname{tr} \nabla f] / d` for the trained critic, and 0 for a model in which it
        finds no error. On rows that the critic was not trained on, it is a test of the model. ``critic_norm`` is
        :math:`\sqrt{E|f|^2 / d}`.
        """
        size = max(site.position[0].size, 1)
        stein, square = self._terms(rng_key, site, self._critic(rng_key, site))
        mean = mean_over_rows(stein, site.mask)
        count = site.num_rows if site.mask is None else jnp.sum(site.mask)
        error = jnp.sqrt(mean_over_rows((stein - mean) ** 2, site.mask) / count)
        norm = jnp.sqrt(mean_over_rows(square, site.mask) / size)
        return {"stein": mean / size, "stein_error": error / size, "critic_norm": norm}

    def _critic(self, rng_key: PRNGKey, site: Site) -> Critic:
        return Critic.of(self.critic, site, jax.random.fold_in(rng_key, 1), site.position.shape[1:])

    def _terms(self, rng_key: PRNGKey, site: Site, critic: Critic) -> tuple[RowValues, RowValues]:
        """Return ``s f + tr grad f`` and ``|f|^2`` of each row."""
        critic = critic.bounded() if self.penalty == "spectral" else critic
        function, context = critic.function(), context_of(site)
        score = jax.vmap(site.score)(site.position, site.local)
        value, push = jax.linearize(lambda z: jax.vmap(function)(z, *context), site.position)
        if self.num_projections is None:
            trace = _trace(push, site.position)
        else:
            probes = directions(rng_key, self.projection, self.num_projections, site.position)
            trace = jnp.mean(jax.lax.map(lambda v: inner(v, push(v)), probes), axis=0)
        return inner(score, value) + trace, inner(value, value)


def _trace(
    push: Callable[[Float[Array, " rows *position"]], Float[Array, " rows *position"]],
    positions: Float[Array, " rows *position"],
) -> Float[Array, " rows"]:
    """Return the exact trace of each row's Jacobian, computed coordinate by coordinate."""
    size = math.prod(positions.shape[1:])

    def add(total, i):
        direction = jnp.zeros((size,), positions.dtype).at[i].set(1.0).reshape(positions.shape[1:])
        direction = jnp.broadcast_to(direction, positions.shape)
        return total + inner(direction, push(direction)), None

    return jax.lax.scan(add, jnp.zeros(len(positions), positions.dtype), jnp.arange(size))[0]
