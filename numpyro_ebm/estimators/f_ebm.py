"""f-EBM: training of energies by f-divergences."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.critic import Critic, check_critic
from numpyro_ebm.estimators.parts.pool import PoolEstimator

Divergence = Literal["kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "pearson", "neyman"]


class Sides(NamedTuple):
    r"""A divergence as two functions of the log ratio ``T = log p_data / p``: ``f'(e^T)`` and ``e^T f'(e^T) - f(e^T)``."""

    at_data: Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]
    at_model: Callable[[Float[Array, "*batch"]], Float[Array, "*batch"]]


DIVERGENCES = {
    "kl": Sides(lambda t: 1 + t, jnp.exp),
    "reverse_kl": Sides(lambda t: -jnp.exp(-t), lambda t: t - 1),
    "jensen_shannon": Sides(lambda t: jnp.log(2.0) - jax.nn.softplus(-t), lambda t: jax.nn.softplus(t) - jnp.log(2.0)),
    "squared_hellinger": Sides(lambda t: -jnp.expm1(-t / 2), lambda t: jnp.expm1(t / 2)),
    "pearson": Sides(lambda t: 2 * jnp.expm1(t), lambda t: jnp.expm1(2 * t)),
    "neyman": Sides(lambda t: -jnp.expm1(-2 * t), lambda t: -2 * jnp.expm1(-t)),
}


@dataclasses.dataclass(frozen=True)
class FDivergence(PoolEstimator):
    r"""f-EBM (Yu et al.): minimise an f-divergence from the data, with chains and a critic that learns the log ratio.

    With ``H`` the critic, ``T = H + E`` and ``f*`` the conjugate of ``f``,

    .. math:: D_f(p_{data} \| p) = E_p\Bigl[f\Bigl(\frac{p_{data}}{p}\Bigr)\Bigr]
        = \max_H E_{data}[f'(e^T)] - E_p[f^*(f'(e^T))]

    attained where ``T`` is the log ratio, ``H = log p_data + log Z``. The critic ascends the bound and the energy descends
    it. The model's samples move with the energy, which adds a covariance to its gradient; with ``g = f*(f'(e^T))`` it is

    .. math:: E_{data}[\partial_\theta f'(e^T)] - E_p[\partial_\theta g] + \operatorname{Cov}_p(\partial_\theta E, g)

    where ``-E`` includes a base and the Jacobian of a support. In the derivative of ``T``, that of ``E`` is taken minus its
    mean over the chains: this changes nothing for the best critic, and a constant in the energy has no effect for any.

    - "kl": maximum likelihood. Its gradient is that of "pcd" for any critic, so write "pcd".
    - "reverse_kl": ``E_p[log p / p_data]``, which leaves modes out rather than covering what lies between them.
    - "jensen_shannon" (twice that divergence, as in GANs) and "squared_hellinger" lie between the two and are stable. The
      others take exponentials of the log ratio, "kl" and "pearson" at the samples, "reverse_kl" and "neyman" at the data,
      so that a critic that is wrong there by a few nats misleads the energy.
    - "pearson": ``E_p[(p_data / p - 1)^2]``; "neyman": ``E_data[(p / p_data - 1)^2]``.

    Where the model can match the data, all have the same optimum; elsewhere their optima differ. The critic has to be near
    its optimum: `alternate` gives it more steps. Chains are those of "pcd", and the gradient is exact as far as they have
    converged. The value is the bound on the divergence for the current critic, not an objective.

    State, in the mutable site ``"<site>$f_ebm"``: `ChainState` with a ``pool``.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel; training starts from its step size; None for "mala".
        adapt_step_size: as for `ContrastiveDivergence`, like ``step_size_schedule``, ``temperature``, ``on_unhealthy`` and
            ``scale``.
        energy_l2: has to be 0; the penalty belongs to the likelihood.
        start: what the chains start from: "data" (rows of the first batch), "base" (the energy's base, or a standard
            normal in unconstrained space), or a NumPyro distribution of one event.
        divergence: one of the names above.
        critic: NumPyro model ``critic()`` that returns a function from one event in unconstrained space to a number; its
            ``numpyro.param`` sites have other names than the model's. None for a network of two hidden layers of 64 SiLU
            units, in the site ``"<site>$critic"``.
        num_chains: number of chains, independent of the batch size; None for as many as the first batch has rows.

    Raises:
        EnergyError: for counts below 1, an unknown divergence, kernel or policy, fewer than two chains or rows (one has no
            covariance), rows with a context or a base of their own, a critic that returns another shape, samples or keeps
            state, more than one particle or an ELBO without mutable state.
        TypeError: for a critic that is not a model or does not return a function.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ::

            optimizer = ebm.alternate(optax.adam(1e-3), optax.adam(1e-3), adversary="x$critic")
            svi = SVI(ebm.estimate(model, "f_ebm", num_steps=20), ebm.empty_guide, optimizer, Trace_ELBO())

    References:
        Yu, Song, Song and Ermon, Training deep energy-based models with f-divergence minimization (2020); Nowozin, Cseke and
        Tomioka, f-GAN (2016).
    """

    name = "f_ebm"
    divergence: Divergence = "jensen_shannon"
    critic: Callable[[], Callable[..., Any]] | None = None
    num_chains: int | None = None

    def __post_init__(self):
        super().__post_init__()
        owner = type(self).__name__
        if self.divergence not in DIVERGENCES:
            raise EnergyError(
                f"Unknown divergence '{self.divergence}'. {nearest(str(self.divergence), get_args(Divergence))}"
            )
        check_critic(owner, self.critic)
        if self.num_chains is not None:
            check_count(owner, "num_chains", self.num_chains, 2)
        if not (is_concrete(self.energy_l2) and self.energy_l2 == 0):
            raise EnergyError(f"{owner} has no penalty on energies; got energy_l2={self.energy_l2!r}. Leave it out.")

    def check(self, site: Site) -> None:
        """Raise for rows of different densities, and for a batch of one row."""
        super().check(site)
        self.refuse_local(site, "the covariance needs chains that share one density.")
        if site.num_rows < 2:
            raise EnergyError(
                f"The estimator '{self.name}' needs two rows or more for a covariance over as many chains; this batch has "
                f"{site.num_rows}. Write a larger batch."
            )

    def size(self, site: Site) -> int:
        """Return ``num_chains``, or one chain per row."""
        return self.num_chains or site.num_rows

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus each row's part of the bound on the divergence, with the critic's derivatives reversed."""
        key_start, key_chains, key_critic = jax.random.split(rng_key, 3)
        critic = Critic.of(self.critic, site, key_critic, ())
        kernel = self.tuned(site, state)
        start = self.begin(key_start, site, state, kernel)
        negatives, state = self.update(key_chains, site, state, kernel, start)
        return -self.bound(site, negatives, critic.adversary().function()), state

    def bound(
        self,
        site: Site,
        negatives: Float[Array, " chains *position"],
        critic: Callable[[Float[Array, "*position"]], Scalar],
    ) -> RowValues:
        """Return the bound on the divergence, per row.

        Args:
            site: the rows.
            negatives: samples of the model in unconstrained space.
            critic: function of one position.
        """
        f = DIVERGENCES[self.divergence]
        positions = jnp.concatenate([site.position, negatives])
        log_density = jax.vmap(site.log_density)(positions)
        mean = jnp.mean(log_density[site.num_rows :])
        log_ratio = jax.vmap(critic)(positions) - log_density + (mean - jax.lax.stop_gradient(mean))
        at_data, at_model = f.at_data(log_ratio[: site.num_rows]), f.at_model(log_ratio[site.num_rows :])
        # Its value is zero; its derivative is that of the expectation through the distribution of its samples.
        weights = jax.lax.stop_gradient(at_model - jnp.mean(at_model))
        through_draws = jnp.mean(weights * (log_density - jax.lax.stop_gradient(log_density))[site.num_rows :])
        return at_data - jnp.mean(at_model) - through_draws
