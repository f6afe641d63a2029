"""The learned Stein discrepancy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.critic import Critic, check_critic
from numpyro_ebm.estimators.parts.figures import mean_over_rows
from numpyro_ebm.estimators.parts.generator import context_of
from numpyro_ebm.estimators.parts.projections import Projection, check_projection, directions, inner

Penalty = Literal["l2", "spectral"]


@dataclasses.dataclass(frozen=True)
class LearnedSteinDiscrepancy(AbstractEstimator):
    r"""The learned Stein discrepancy (Grathwohl et al.): a critic shows where the score is wrong, the energy mends it.

    For a critic ``f`` with values in the space of the events, and ``s`` the energy's score (unconstrained space, Jacobian
    included), the critic ascends and the energy descends

    .. math:: E_{data}\bigl[ s(x)^T f(x) + \operatorname{tr} \nabla f(x) \bigr] - \lambda\, E_{data} |f(x)|^2

    The first expectation is :math:`E[(s - s_{data})^T f]` (Stein's identity): zero for every critic where the model is
    right. With ``penalty="l2"`` the best critic is :math:`(s - s_{data}) / 2\lambda`, and the value of the game the Fisher
    divergence over :math:`4\lambda`: with ``penalty_weight=0.5`` that of score matching, which "sm" descends in closed form.
    What is gained is that the score is never differentiated in ``x``: |x| can be learned, whose second derivative "sm" does
    not see. With ``penalty="spectral"`` there is no such term; every matrix of the critic is divided by its largest singular
    value where that is above 1, and vectors and numbers (biases) by their length: a critic of dense layers and 1-Lipschitz
    activations is then Lipschitz, and bounded at 0. Train it by plain gradient ascent (``optax.sgd``): the steps of Adam
    let its arrays grow, and it follows the energy ever more slowly.

    The score's derivative in the parameters is taken at the rows. Where a kink of the energy *moves* with the parameters
    (a mixing matrix inside a Laplace density, the weights of a ReLU network), the derivative of the expectation has a part
    at the kink that no row shows, and the gradient is wrong without it: rotations of a Laplace ICA drift away.

    The critic's parameters are ``numpyro.param`` sites beside the model's own. Their gradient is reversed, so that one SVI
    trains both players; `alternate` gives the critic more steps and an optimiser of its own. The value is that of the
    game for the critic as it is, and no objective. The built-in critic expects data of about unit scale. With critics
    that fit the rows one by one the energy overfits as by score matching.

    Args:
        critic: NumPyro model ``critic()`` that returns a function of one event in unconstrained space (and of its row's
            context where rows have one), with values of the same shape; its parameters are ``numpyro.param`` sites, named
            unlike the model's. None for a network of two hidden layers of 64 SiLU units, in the site ``"<site>$critic"``.
        num_projections: Hutchinson probes per row for the trace; None for the exact trace, which costs one derivative of the
            critic per dimension.
        projection: law of the probes, "rademacher", "gaussian" or "sphere".
        penalty: "l2" or "spectral", what keeps the critic bounded.
        penalty_weight: ``lambda`` of "l2".

    Raises:
        EnergyError: for a count below 1, an unknown option, a weight that is not positive, a critic that returns another
            shape, samples or keeps state, and under "spectral" for parameters of more than two dimensions.
        TypeError: for a critic that is no model or does not return a function.

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

    def surrogate(self, rng_key, site: Site, state):
        """Minus the Stein term and the penalty, per row; the critic's derivatives reversed."""
        stein, square = self._terms(rng_key, site, self._critic(rng_key, site).adversary())
        return -(stein - self.penalty_weight * square if self.penalty == "l2" else stein), state

    def figures(self, rng_key, site: Site) -> dict[str, Array]:
        r"""``stein`` and its standard error, and ``critic_norm``.

        ``stein`` is :math:`E[s^T f + \operatorname{tr} \nabla f] / d` for the critic as trained, 0 for a model that it finds
        no fault with; on rows that the critic was not trained on, a test of the model. ``critic_norm`` is
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

    def _terms(self, rng_key: PRNGKey, site: Site, critic: Critic) -> tuple[Array, Array]:
        """``s f + tr grad f`` and ``|f|^2`` of each row."""
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


def _trace(push: Callable[[Array], Array], positions: Array) -> Array:
    """The exact trace of each row's Jacobian, coordinate by coordinate."""
    size = math.prod(positions.shape[1:])

    def add(total, i):
        direction = jnp.zeros((size,), positions.dtype).at[i].set(1.0).reshape(positions.shape[1:])
        direction = jnp.broadcast_to(direction, positions.shape)
        return total + inner(direction, push(direction)), None

    return jax.lax.scan(add, jnp.zeros(len(positions), positions.dtype), jnp.arange(size))[0]
