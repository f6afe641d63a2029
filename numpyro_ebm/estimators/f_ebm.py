"""Energies trained by f-divergences other than Kullback and Leibler's."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.critic import Critic, check_critic
from numpyro_ebm.estimators.parts.pool import PoolEstimator

Divergence = Literal["kl", "reverse_kl", "jensen_shannon", "squared_hellinger", "pearson", "neyman"]


class Sides(NamedTuple):
    r"""A divergence as functions of the log ratio ``T = log p_data / p``: ``f'(e^T)`` and ``e^T f'(e^T) - f(e^T)``."""

    at_data: Callable[[Array], Array]
    at_model: Callable[[Array], Array]


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
    r"""f-EBM (Yu et al.): the energy descends an f-divergence from the data, by chains and a critic of the log ratio.

    With ``H`` the critic, ``T = H + E`` and ``f*`` the conjugate of ``f``,

    .. math:: D_f(p_{data} \| p) = E_p\Bigl[f\Bigl(\frac{p_{data}}{p}\Bigr)\Bigr]
        = \max_H E_{data}[f'(e^T)] - E_p[f^*(f'(e^T))]

    attained where ``T`` is the log ratio, ``H = log p_data + log Z``. The critic ascends, the energy descends; the model's
    samples move with it, which adds a covariance to its gradient, and with ``g = f*(f'(e^T))``

    .. math:: E_{data}[\partial_\theta f'(e^T)] - E_p[\partial_\theta g] + \operatorname{Cov}_p(\partial_\theta E, g)

    A base and the Jacobian of a support count to ``-E``. The mean of ``E`` over the chains is taken off the derivative of
    ``E`` in ``T``: for the best critic that changes nothing, and a constant in the energy moves nothing for any critic.

    - "kl": maximum likelihood. Its gradient is that of "pcd" whatever the critic is, so write "pcd".
    - "reverse_kl": ``E_p[log p / p_data]``, which leaves modes out rather than covering what lies between them.
    - "jensen_shannon" (twice it: the divergence of GANs) and "squared_hellinger" lie between the two and are tame; the
      others take exponentials of the log ratio, "kl" and "pearson" at the samples, "reverse_kl" and "neyman" at the data,
      and a critic that is wrong there by a few nats throws the energy off.
    - "pearson": ``E_p[(p_data / p - 1)^2]``; "neyman": ``E_data[(p / p_data - 1)^2]``.

    Where the model can be right all have one optimum; elsewhere they choose differently. The critic has to be near its best:
    `alternate` gives it more steps. Chains are those of "pcd", and the gradient is exact as far as they have converged. The
    value is the bound on the divergence for the critic as it is, and no objective.

    State, in the mutable site ``"<site>$f_ebm"``: that of `pcd`.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel, whose step size the training starts from.
        adapt_step_size: this, ``step_size_schedule``, ``temperature``, ``on_unhealthy`` and ``scale`` are those of
            `ContrastiveDivergence`.
        energy_l2: 0; a penalty on energies belongs to the likelihood.
        start: what the chains start from: "data" (rows of the first batch), "base" (the energy's base, or a standard
            normal in unconstrained space), or a NumPyro distribution of one event.
        divergence: one of those above.
        critic: NumPyro model ``critic()`` that returns a function of one event in unconstrained space with a number for a
            value; its parameters are ``numpyro.param`` sites, named unlike the model's. None for a network of two hidden
            layers of 64 SiLU units, in the site ``"<site>$critic"``.
        num_chains: chains, independent of the batch size; None for as many as the first batch has rows.

    Raises:
        EnergyError: for counts below 1, an unknown divergence, kernel or policy, fewer than two chains or rows (one has no
            covariance), rows with a context or a base of their own, a critic that returns another shape, samples or keeps
            state, more than one particle or an ELBO without mutable state.
        TypeError: for a critic that is no model or does not return a function.

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
        """Refuse rows of different densities, and a row that is alone."""
        super().check(site)
        self.refuse_local(site, "the covariance is that of chains that share one density.")
        if site.num_rows < 2:
            raise EnergyError(
                f"The estimator '{self.name}' takes a covariance over as many chains as a batch has rows, and this batch "
                f"has {site.num_rows}. Write a larger batch."
            )

    def size(self, site: Site) -> int:
        """As given, or one per row."""
        return self.num_chains or site.num_rows

    def surrogate(self, rng_key, site: Site, state):
        """Minus each row's part of the bound on the divergence; the critic's derivatives reversed."""
        key_start, key_chains, key_critic = jax.random.split(rng_key, 3)
        critic = Critic.of(self.critic, site, key_critic, ())
        kernel = self.tuned(site, state)
        start = self.begin(key_start, site, state, kernel)
        negatives, state = self.update(key_chains, site, state, kernel, start)
        return -self.bound(site, negatives, critic.adversary().function()), state

    def bound(self, site: Site, negatives: Array, critic: Callable[[Array], Array]) -> Array:
        """The bound on the divergence, per row.

        Args:
            site: the rows.
            negatives: samples of the model in unconstrained space.
            critic: of one position.
        """
        f = DIVERGENCES[self.divergence]
        positions = jnp.concatenate([site.position, negatives])
        log_density = jax.vmap(site.log_density)(positions)
        mean = jnp.mean(log_density[site.num_rows :])
        log_ratio = jax.vmap(critic)(positions) - log_density + (mean - jax.lax.stop_gradient(mean))
        at_data, at_model = f.at_data(log_ratio[: site.num_rows]), f.at_model(log_ratio[site.num_rows :])
        # How the expectation moves with the law of its samples: zero, with that for a derivative.
        weights = jax.lax.stop_gradient(at_model - jnp.mean(at_model))
        law = jnp.mean(weights * (log_density - jax.lax.stop_gradient(log_density))[site.num_rows :])
        return at_data - jnp.mean(at_model) - law
