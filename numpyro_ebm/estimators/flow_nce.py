"""Flow contrastive estimation."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import PRNGKey, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation
from numpyro_ebm.estimators.parts.critic import check_not_shared
from numpyro_ebm.estimators.parts.generator import Generator
from numpyro_ebm.estimators.parts.noise import Noise, noise_of_model


@dataclasses.dataclass(frozen=True)
class FlowContrastiveEstimation(NoiseContrastiveEstimation):
    r"""NCE whose noise is a normalising flow trained against the energy (Gao et al.).

    The energy and ``c`` minimise the loss of "nce", and the parameters of the noise ``q`` maximise it, through the draws
    ``y = g(z)`` (reparameterisation) and through ``log q``:

    .. math:: \min_{E, c} \max_{q} \; -\log \sigma(G(x)) - \sum_{j=1}^{\nu} \log \sigma(-G(y_j)), \quad
        G = \log p - \log q - \log \nu

    The noise comes as close to the data as the flow can, which keeps the classification hard: for nu = 1, the flow minimises
    the Jensen-Shannon divergence. For any fixed ``q``, the energy's minimum is at the data's density. One SVI trains both,
    with the gradient of the flow's ``numpyro.param`` sites reversed; `alternate` gives them their own optimiser. The value
    is not an objective. A flow that starts far from the data saturates the classifier: train it first by maximum likelihood
    along with the energy, ``estimate(model, "nce", noise=flow)``, and continue from these parameters.

    Args:
        nu: noise draws per row.
        noise: the flow, a NumPyro model of one event, ``noise()``, or ``noise(context)`` where rows have a context, that
            samples the site's name and nothing else, from a distribution with a density and differentiable draws: a NumPyro
            transformed distribution, or a flow of flowjax by ``flowjax.experimental.numpyro``.
        log_normalizer: as for "nce".

    Raises:
        EnergyError: for no flow, or one that does not sample the site, gives it another shape or support, or has latents
            or draws without a gradient; and for what "nce" refuses.
        TypeError: for a flow that is not callable.

    Warns:
        UserWarning: where the loss has lost its gradient in the energy, see "nce".

    Example:
        ::

            flow = coupling_flow(key, base_dist=flowjax.distributions.Normal(jnp.zeros(11)))

            def noise():
                flowjax.experimental.numpyro.sample("x", register_params("flow", flow))

            estimate(model, "flow_nce", noise=noise)

    References:
        Gao, Nijkamp, Kingma, Xu, Dai and Wu, Flow contrastive estimation of energy-based models (2020).
    """

    name = "flow_nce"
    takes_discrete = False
    role = "gradient"
    noise_seed: ClassVar[None] = None  # no option: the noise is trained  # pyright: ignore

    def __post_init__(self):
        super().__post_init__()
        check_is_model(type(self).__name__, "noise", self.noise, self.name)

    def resolve(self, rng_key: PRNGKey, site: Site) -> tuple[Noise, RowValues]:
        """Return the flow with its gradients reversed, and zeros, since no other term trains it."""
        return adversary(self.noise, rng_key, site, "noise"), jnp.zeros(site.num_rows, site.value.dtype)


def adversary(model: Callable[..., Any], rng_key: PRNGKey, site: Site, role: str) -> Noise:
    """Return the noise of a NumPyro model whose parameters ascend where the energy descends."""
    declared = numpyro_stack.declared_params()
    key = jax.random.fold_in(rng_key, 1)
    generator = Generator.of(model, site, key, role, latents=False, is_differentiated=True)
    check_not_shared(role, generator.params, declared)
    return noise_of_model(generator.adversary(), site)


def check_is_model(owner: str, option: str, model: object, name: str) -> None:
    """Check that an option is a NumPyro model.

    Raises:
        EnergyError: where it is None.
        TypeError: where it is not callable, or is a distribution.
    """
    if model is None:
        raise EnergyError(
            f"{owner} needs a {option}. Write estimate(model, '{name}', {option}=flow) with a NumPyro model flow."
        )
    if not callable(model) or isinstance(model, dist.Distribution):
        raise TypeError(
            f"{option} needs a NumPyro model of one event, whose numpyro.param sites are trained; got "
            f"{type(model).__name__}."
        )
