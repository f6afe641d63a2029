"""Adversarial contrastive estimation."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PRNGKey, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.flow_nce import adversary, check_is_model
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation
from numpyro_ebm.estimators.parts.noise import Noise


@dataclasses.dataclass(frozen=True)
class AdversarialContrastiveEstimation(NoiseContrastiveEstimation):
    r"""NCE whose noise mixes a fixed distribution and a sampler trained against the energy (Bose et al.).

    .. math:: p_n(y) = w \, p_0(y) + (1 - w) \, q(y)

    is the noise in the loss of "nce". The energy and ``c`` minimise the loss, and the parameters of ``q`` maximise it
    ("flow_nce" is ``w = 0``). The sampler finds negatives that the fixed distribution would rarely draw, and the fixed
    distribution keeps the noise density positive wherever the data are, whatever the sampler does. Each draw comes from one
    of the two at random, and its density is that of the mixture, so that for any ``q`` the minimum is at the data's density.
    The paper, whose samplers are discrete, adds the losses of two classifiers instead of using the mixture's density, and
    uses a score-function gradient; here the draws are differentiated. The value is not an objective.

    Args:
        nu: noise draws per row.
        noise: the fixed distribution ``p_0``, as for "nce"; a NumPyro model is fitted to the data.
        log_normalizer: as for "nce".
        proposal: the sampler ``q``, a NumPyro model as the ``noise`` of "flow_nce".
        noise_share: ``w``, the share of the fixed distribution, above 0 and below 1.

    Raises:
        EnergyError: for no proposal, for one that "flow_nce" refuses as noise, for a noise_share outside (0, 1), for a base
            of `Empirical` rows, and for what "nce" refuses.
        TypeError: for a proposal that is not callable.

    Warns:
        UserWarning: where the loss has lost its gradient in the energy, see "nce".

    Example:
        ``estimate(model, "adversarial_nce", noise="gaussian", proposal=flow)``

    References:
        Bose, Ling and Cao, Adversarial contrastive estimation (2018).
    """

    name = "adversarial_nce"
    takes_discrete = False
    role = "gradient"
    noise_seed: ClassVar[None] = None  # no option: the noise is trained  # pyright: ignore
    proposal: Any = None
    noise_share: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_is_model(type(self).__name__, "proposal", self.proposal, self.name)
        if is_concrete(self.noise_share) and not (np.ndim(self.noise_share) == 0 and 0 < self.noise_share < 1):
            raise EnergyError(
                f"{type(self).__name__} needs a noise_share of the fixed noise above 0 and below 1; got "
                f"{self.noise_share!r}. Write noise_share=0.5, or estimate(model, 'flow_nce', noise=flow) for the sampler "
                "alone."
            )

    def _is_relative(self, site: Site) -> bool:
        """Return False: in a mixture the unknown density of one part does not cancel."""
        return False

    def resolve(self, rng_key: PRNGKey, site: Site) -> tuple[Noise, RowValues]:
        """Return the mixture, and the term that fits its fixed part where that is a NumPyro model."""
        fixed, learning = super().resolve(rng_key, site)
        learned = adversary(self.proposal, rng_key, site, "proposal")

        def sample(key, num):
            key_choice, key_fixed, key_learned = jax.random.split(key, 3)
            is_fixed = jax.random.bernoulli(key_choice, self.noise_share, (num, site.num_rows))
            wide = (...,) + (None,) * (site.value.ndim - 1)
            return jnp.where(is_fixed[wide], fixed.sample(key_fixed, num), learned.sample(key_learned, num))

        def log_prob(events):
            return jnp.logaddexp(
                jnp.log(self.noise_share) + fixed.log_prob(events), jnp.log1p(-self.noise_share) + learned.log_prob(events)
            )

        return Noise(sample, log_prob), learning
