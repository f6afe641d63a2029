"""Adversarial contrastive estimation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.flow_nce import adversary, check_is_model
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation
from numpyro_ebm.estimators.parts.noise import Noise


@dataclasses.dataclass(frozen=True)
class AdversarialContrastiveEstimation(NoiseContrastiveEstimation):
    r"""NCE whose noise is a mixture of a fixed law and a sampler trained against the energy (Bose et al.).

    .. math:: p_n(y) = w \, p_0(y) + (1 - w) \, q(y)

    in the loss of "nce". The energy and ``c`` minimise it, the parameters of ``q`` maximise it ("flow_nce" is ``w = 0``):
    the sampler finds negatives that the fixed law would rarely draw, and the fixed law keeps the noise positive wherever the
    data are, whatever becomes of the sampler. Each draw comes from one of the two at random, and its density is that of the
    mixture, so that at any ``q`` the minimum is at the data's density. The paper adds two losses of two classifiers in the
    place of the mixture's density, since its samplers are discrete, and trains them by a score-function gradient; here the
    draws are differentiated. The value means nothing as an objective.

    Args:
        nu: noise draws per row.
        noise: the fixed law ``p_0``, as for "nce"; where it is a NumPyro model, it is fitted to the data.
        log_normalizer: as for "nce".
        proposal: the sampler ``q``, a NumPyro model as the ``noise`` of "flow_nce".
        weight: ``w``, above 0 and below 1.

    Raises:
        EnergyError: without a proposal, for one that "flow_nce" refuses as noise, for a weight that is none, for a base of
            `Empirical` rows, and for what "nce" refuses.
        TypeError: for a proposal that cannot be called.

    Warns:
        UserWarning: where the loss no longer feels the energy, see "nce".

    Example:
        ``estimate(model, "adversarial_nce", noise="gaussian", proposal=flow)``

    References:
        Bose, Ling and Cao, Adversarial contrastive estimation (2018).
    """

    name = "adversarial_nce"
    role = "gradient"
    proposal: Any = None
    weight: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_is_model(type(self).__name__, "proposal", self.proposal, self.name)
        if is_concrete(self.weight) and not (np.ndim(self.weight) == 0 and 0 < self.weight < 1):
            raise EnergyError(
                f"{type(self).__name__} needs a weight of the fixed noise above 0 and below 1; got {self.weight!r}. Write "
                "weight=0.5; for the sampler alone, estimate(model, 'flow_nce', noise=flow)."
            )

    def _is_relative(self, site: Site) -> bool:
        """Never: what is unknown of a part of a mixture does not cancel."""
        return False

    def resolve(self, rng_key: PRNGKey, site: Site) -> tuple[Noise, Array]:
        """The mixture, and what fits its first part where that is a model."""
        fixed, learning = super().resolve(rng_key, site)
        learned = adversary(self.proposal, rng_key, site, "proposal")

        def sample(key, num):
            key_choice, key_fixed, key_learned = jax.random.split(key, 3)
            is_fixed = jax.random.bernoulli(key_choice, self.weight, (num, site.num_rows))
            wide = (...,) + (None,) * (site.value.ndim - 1)
            return jnp.where(is_fixed[wide], fixed.sample(key_fixed, num), learned.sample(key_learned, num))

        def log_prob(events):
            return jnp.logaddexp(
                jnp.log(self.weight) + fixed.log_prob(events), jnp.log1p(-self.weight) + learned.log_prob(events)
            )

        return Noise(sample, log_prob), learning
