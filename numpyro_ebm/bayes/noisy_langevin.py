"""`NoisyLangevinKernel`: Langevin steps over the parameters of an energy, along the gradients of CD or PCD."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import blackjax
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Bool, Float, Int
from numpyro.infer import init_to_median

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.linalg import cholesky
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, Chains, Flat, Matrix, PRNGKey, PRNGKeys, PyTree
from numpyro_ebm.bayes._auxiliary import Drawn, Positions, draw_sets, step_sizes
from numpyro_ebm.bayes._posterior import Latents
from numpyro_ebm.bayes._settling import Surface
from numpyro_ebm.bayes.checks import LONGER
from numpyro_ebm.bayes.posterior_kernel import PosteriorKernel
from numpyro_ebm.kernels import AbstractKernel


class NoisyLangevinState(NamedTuple):
    """State of one chain of `NoisyLangevinKernel`.

    Attributes:
        i: number of transitions so far.
        z: unconstrained latents by site.
        scale: ``(d, d)``, root of the covariance at the mode, by which steps are scaled.
        data: by energy site, the auxiliary data sets where persistent chains are; empty for chains that start at the data.
        averaging: by energy site, dual averaging of the step size of the inner kernel; None for one without.
        inner_accept_prob: mean acceptance probability of the inner chains of the last transition, over the energy sites.
        inner_move: as in `ExchangeState`.
        is_nonfinite: whether the last step was not finite and was left out.
        rng_key: random key.
    """

    i: Int[Array, "*chains"]
    z: Latents
    scale: Float[Array, "*chains d d"]
    data: Positions
    averaging: dict[str, Any]
    inner_accept_prob: Chains
    inner_move: Chains
    is_nonfinite: Bool[Array, "*chains"]
    rng_key: PRNGKey | PRNGKeys


class NoisyLangevinKernel(PosteriorKernel):
    r"""Stochastic gradient Langevin dynamics over the parameters of energies, along the gradients of CD or PCD.

    .. math:: \theta \leftarrow \theta + \varepsilon M \hat g(\theta) + \sqrt{2 \varepsilon T}\, L\xi, \qquad
        \hat g(\theta) = \nabla \log \tilde\pi(\theta) - \tfrac1m \sum_{k=1}^m \nabla \log f(u_k; \theta)

    with ``tilde pi`` the density of prior and data without log Z, data sets ``u_k`` drawn from the energy at ``theta``, and
    ``M = L L^T`` the covariance at the mode where the Newton steps lead. The steps are those of ``blackjax.sgld``.

    Nothing is rejected, so **the draws are biased**, in three ways:

    * The finite step and the noise of the gradient widen the posterior. Where the posterior is Gaussian, the prior is wide
      and the data sets are independent draws, the variance of the draws is

      .. math:: \frac{T + \varepsilon / (2m)}{1 - \varepsilon / 2}

      times the right one: 1.11 for ``step_size=0.1``, 1.01 for 0.01. ``temperature = 1 - step_size * (1 + 1 / m) / 2`` makes
      it 1 there.
    * Chains that are too short move the mean: those of CD stay near the data.
    * The noise of persistent chains is correlated in time and widens the posterior further, as a smaller ``m`` would.

    `diagnose` measures all of them, by the Bartlett identity and by longer chains. `ExchangeKernel` has the second only, and
    rejects proposals for that.

    Args:
        model: a NumPyro model that observes one or more energies.
        inner: the kernel of the auxiliary chains, as in `ExchangeKernel`.
        num_steps: transitions of the auxiliary chains between two steps of the parameters.
        exact_sampler: exact draws in place of chains, as in `ExchangeKernel`.
        persistent: whether the auxiliary chains go on where they were (PCD), or start at the data each time (CD).
        step_size: ``epsilon``, in BlackJAX's convention, in coordinates in which the covariance at the mode is 1.
        temperature: ``T``, factor of the variance of the noise that is added.
        num_gradient_draws: the data sets ``m`` for each gradient.
        num_newton_steps: Newton steps before the first transition, as in `ExchangeKernel`. For persistent chains they draw
            with chains that are ten times as long.
        params: values of the model's ``numpyro.param`` sites, which stay fixed.
        init_strategy: as in NumPyro's kernels.

    Warns:
        UnhealthyChainsWarning: for auxiliary chains that cannot change every element of an event.

    Raises:
        EnergyError: (a ValueError) for step sizes and temperatures that are not positive, a step size of 2 or more, at which
            the dynamics are unstable, persistent chains with an exact sampler, and what `ExchangeKernel` refuses.
        TypeError: for a model that is not callable.

    Example:
        >>> kernel = NoisyLangevinKernel(model, "gibbs", num_steps=5, persistent=True)  # doctest: +SKIP
        >>> mcmc = MCMC(kernel, num_warmup=500, num_samples=5000)  # doctest: +SKIP

    References:
        Welling and Teh, Bayesian learning via stochastic gradient Langevin dynamics (2011); Murray and Ghahramani, Bayesian
        learning in undirected graphical models: approximate MCMC algorithms (2004); Alquier, Friel, Everitt and Boland,
        Noisy Monte Carlo (2016).
    """

    def __init__(
        self,
        model: Callable,
        inner: str | AbstractKernel | Mapping[str, Any] | None = None,
        *,
        num_steps: int = 50,
        exact_sampler: Any = None,
        persistent: bool = False,
        step_size: float = 0.05,
        temperature: float = 1.0,
        num_gradient_draws: int = 1,
        num_newton_steps: int = 100,
        params: PyTree | None = None,
        init_strategy: Callable = init_to_median,
    ):
        owner = type(self).__name__
        super().__init__(
            model,
            inner,
            num_steps=num_steps,
            exact_sampler=exact_sampler,
            num_bridges=0,
            num_newton_steps=num_newton_steps,
            params=params,
            init_strategy=init_strategy,
        )
        check_positive(owner, "step_size", step_size)
        check_positive(owner, "temperature", temperature)
        check_count(owner, "num_gradient_draws", num_gradient_draws)
        if step_size >= 2:
            raise EnergyError(f"{owner} got step_size={step_size}, and steps of 2 or more diverge. Write step_size=0.05.")
        if persistent and exact_sampler is not None:
            raise EnergyError(f"{owner} got exact_sampler, whose draws have no chain to persist. Write persistent=False.")
        self._step_size, self._temperature = step_size, temperature
        self._num_draws, self._is_persistent = num_gradient_draws, persistent

    @property
    def default_fields(self) -> tuple[str, ...]:
        """Names of the draw and of the statistics."""
        return ("z", "inner_accept_prob", "inner_move", "is_nonfinite")

    @in_own_modes
    def sample(self, state: NoisyLangevinState, model_args: tuple, model_kwargs: dict) -> NoisyLangevinState:
        """Return the state after one transition."""
        self._ready()
        self._take_note(model_args, model_kwargs or {})

        def transition(state):
            return self._transition(model_args, model_kwargs or {}, state)

        return jax.vmap(transition)(state) if jnp.ndim(state.i) else transition(state)

    def get_diagnostics_str(self, state: NoisyLangevinState) -> str:
        """Return the text for the progress bar."""
        return f"inner move {jnp.mean(state.inner_move):.2f}"

    def _first(self, args: tuple, kwargs: dict, rng_key: PRNGKey, position: Latents) -> NoisyLangevinState:
        flat, unravel = ravel_pytree(position)
        surface = self._surface(args, kwargs, unravel)
        rng_key, key_start, key_draw = jax.random.split(rng_key, 3)
        times = LONGER if self._is_persistent else 1
        longer = {name: replace(each, num_steps=times * each.num_steps) for name, each in self._auxiliaries.items()}
        start = self._start(key_start, surface, longer, flat)
        data = {}
        if self._is_persistent:
            sizes = step_sizes(start.averaging)
            drawn = draw_sets(key_draw, longer, surface.energies(start.z), sizes, self._num_draws)
            data = {name: each.positions for name, each in drawn.items()}
        zero = jnp.zeros((), float)
        return NoisyLangevinState(
            i=jnp.zeros((), jnp.int32),
            z=unravel(start.z),
            scale=cholesky(start.covariance),
            data=data,
            averaging=start.averaging,
            inner_accept_prob=zero,
            inner_move=zero,
            is_nonfinite=jnp.zeros((), bool),
            rng_key=rng_key,
        )

    def _transition(self, args: tuple, kwargs: dict, state: NoisyLangevinState) -> NoisyLangevinState:
        rng_key, key_draw, key_step = jax.random.split(state.rng_key, 3)
        flat, unravel = ravel_pytree(state.z)
        surface = self._surface(args, kwargs, unravel)
        sizes = self._sizes(state)
        drawn = draw_sets(key_draw, self._auxiliaries, surface.energies(flat), sizes, self._num_draws, state.data)
        sets = {name: each.positions for name, each in drawn.items()}
        moved = self._moved(key_step, surface, flat, state.scale, sets)
        is_bad = ~jnp.all(jnp.isfinite(moved))
        rates = jnp.stack([jnp.mean(each.acceptance_rate) for each in drawn.values()])
        return NoisyLangevinState(
            i=state.i + 1,
            z=unravel(jnp.where(is_bad, flat, moved)),
            scale=state.scale,
            data=sets if self._is_persistent else {},
            averaging=self._averaged(state, _mean_rates(drawn)),
            inner_accept_prob=jnp.mean(rates),
            inner_move=jnp.min(jnp.stack([jnp.mean(each.move) for each in drawn.values()])),
            is_nonfinite=is_bad,
            rng_key=rng_key,
        )

    def _moved(self, rng_key: PRNGKey, surface: Surface, z: Flat, scale: Matrix, sets: Positions) -> Flat:
        """Return the latents after a step of ``blackjax.sgld``, in coordinates in which the covariance is 1."""

        def gradient(_, sets):
            return scale.T @ surface.gradient(z, sets)

        step: Any = blackjax.sgld.build_kernel()
        return z + scale @ step(rng_key, jnp.zeros_like(z), gradient, sets, self._step_size, self._temperature)


def _mean_rates(drawn: dict[str, Drawn]) -> dict[str, Drawn]:
    """Return the data sets with the mean acceptance of each site, by which inner step sizes adapt."""
    return {name: each._replace(acceptance_rate=jnp.mean(each.acceptance_rate)) for name, each in drawn.items()}
