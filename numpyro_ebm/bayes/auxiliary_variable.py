"""`AuxiliaryVariableKernel`: the auxiliary variable method, which compares the energy at a draw with a fixed reference."""

from typing import NamedTuple

from jaxtyping import Float

from numpyro_ebm._core.typing import Array, Flat, PRNGKey, Scalar
from numpyro_ebm.bayes._settling import Surface
from numpyro_ebm.bayes.exchange import Compared, ExchangeKernel, ExchangeState
from numpyro_ebm.bayes.posterior_kernel import Start


class Reference(NamedTuple):
    """What a chain of `AuxiliaryVariableKernel` keeps.

    Attributes:
        z: ``(d,)``, the reference parameters, which stay fixed.
        log_weight: log of the unbiased estimate of ``Z(reference) / Z(theta)`` by the auxiliary data of the current
            parameters, over all energy sites.
    """

    z: Float[Array, "*chains d"]
    log_weight: Float[Array, "*chains"]


class AuxiliaryVariableKernel(ExchangeKernel):
    r"""The auxiliary variable method in ``numpyro.infer.MCMC``: draws from the posterior of a model that observes energies.

    Each chain keeps an auxiliary data set ``w``, drawn from the energy at its own parameters, and the weight

    .. math:: W(\theta, w) = \frac{f(w; \tilde\theta)}{f(w; \theta)}, \qquad
        \mathrm{E}_{w \sim f(\cdot; \theta) / Z(\theta)} W(\theta, w) = \frac{Z(\tilde\theta)}{Z(\theta)}

    at reference parameters, the mode that the Newton steps reach. It accepts new parameters and their data set with the
    probability

    .. math:: \min\Big(1, \frac{\pi(\theta') f(x; \theta') W(\theta', w')}{\pi(\theta) f(x; \theta) W(\theta, w)} \cdot
        \frac{q(\theta \mid \theta')}{q(\theta' \mid \theta)}\Big), \qquad w' \sim f(\cdot; \theta') / Z(\theta')

    This is pseudo-marginal Metropolis-Hastings, and exact under the same conditions as `ExchangeKernel`. A chain keeps its
    weight until it moves, and stays for long where the weight is large by chance, as happens far from the reference.
    `ExchangeKernel` mixes better in most models. ``num_bridges`` anneals the data set to the reference, which lowers the
    noise of the weights.

    Args, warnings and errors are those of `ExchangeKernel`. Without Newton steps the reference is the initial parameters.

    Example:
        >>> kernel = AuxiliaryVariableKernel(model, "gibbs", num_steps=50, num_bridges=20)  # doctest: +SKIP
        >>> mcmc = MCMC(kernel, num_warmup=1000, num_samples=5000)  # doctest: +SKIP

    References:
        Moller, Pettitt, Reeves and Berthelsen, An efficient Markov chain Monte Carlo method for distributions with
        intractable normalising constants (2006); Murray, Ghahramani and MacKay (2006), of bridges; Andrieu and Roberts, The
        pseudo-marginal approach for efficient Monte Carlo computations (2009).
    """

    def _first_memory(self, rng_key: PRNGKey, surface: Surface, start: Start, sizes: dict[str, Scalar | None]) -> Reference:
        return Reference(start.mode, self._weigh(rng_key, surface, start.z, start.mode, sizes)[0])

    def _compare(
        self, rng_key: PRNGKey, surface: Surface, state: ExchangeState, new: Flat, sizes: dict[str, Scalar | None]
    ) -> Compared:
        """Return the log ratio of the weights at the new and the current latents."""
        reference: Reference = state.memory
        log_weight, drawn = self._weigh(rng_key, surface, new, reference.z, sizes)
        return Compared(log_weight - reference.log_weight, reference._replace(log_weight=log_weight), drawn)
