"""Ranking noise contrastive estimation."""

import dataclasses

import jax
import jax.numpy as jnp

from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.noise import NEARER, NoiseEstimator
from numpyro_ebm.estimators.parts.saturation import warn_where_saturated


@dataclasses.dataclass(frozen=True)
class RankingNoiseContrastiveEstimation(NoiseEstimator):
    r"""Ranking NCE (Ma and Collins; the form of InfoNCE): find the data row among ``1 + nu`` events, without log Z.

    With ``w(x) = p~(x) / p_n(x)`` for the unnormalised density ``p~``, the loss of a row is

    .. math:: -\log \frac{w(x)}{w(x) + \sum_{j=1}^{\nu} w(y_j)}, \qquad y_j \sim p_n

    with new noise draws at each update, unless ``noise_seed`` fixes them. A constant in the energy cancels, and so does each
    row's own log Z where rows have a context: nothing is learned besides the energy. As ``nu`` grows this becomes maximum
    likelihood with log Z by importance sampling. With noise equal to the data the efficiency is ``nu / (1 + nu)``, as for
    "nce". It costs ``1 + nu`` energies per row.

    With a ``noise_seed`` minus the loss is the log likelihood of which event of each set is the row, given the sets (a
    conditional logistic regression), and ``prior x exp(-loss)`` is the posterior given that. Hessian and covariance of the
    gradient agree where the energy holds, so that it needs no weight. With noise like the data its standard deviations are
    :math:`\sqrt{1 + 1 / \nu}` times those under the likelihood.

    Args:
        nu: noise draws per row.
        noise: as for "nce": a distribution (one for all rows, or one for each), "gaussian", "mixture", a NumPyro model, or
            None for the energy's own base (a standard normal in unconstrained space where it has none).
        noise_seed: as for "nce": None for new noise at each update, a whole number for a fixed set of draws.

    Raises:
        EnergyError: for nu that is not a whole number above 0, and for noise and a noise_seed that do not fit, see "nce".
        TypeError: for noise of another type.

    Warns:
        UserWarning: where the noise does not overlap the data, see "nce".

    Example:
        ``estimate(model, "ranking_nce", nu=10, noise="gaussian")``

    References:
        Ma and Collins, Noise contrastive estimation and negative sampling for conditional models (2018); van den Oord, Li
        and Vinyals, Representation learning with contrastive predictive coding (2018).
    """

    name = "ranking_nce"
    takes_discrete = True

    @property
    def is_likelihood(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the value is the log likelihood of which event of each fixed set is the data row."""
        return self.noise_seed is not None

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log probability that the data row is picked, for each row."""
        ratios = self.log_ratios(rng_key, site)
        noise = jnp.where(ratios.is_inside, ratios.noise, -jnp.inf)
        log_pick = jax.nn.log_softmax(jnp.concatenate([ratios.data[None], noise]), axis=0)[0]
        warn_where_saturated(site, -jnp.expm1(log_pick), "the noise does not overlap the data", NEARER)
        return ratios.learning + log_pick, state
