"""Noise contrastive estimation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Bool, Float

from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.figures import mean_over_rows
from numpyro_ebm.estimators.parts.noise import NEARER, NoiseEstimator
from numpyro_ebm.estimators.parts.normalizer import LogNormalizer, check_normalizer, learned_normalizer, name_of
from numpyro_ebm.estimators.parts.saturation import slope, warn_where_saturated


@dataclasses.dataclass(frozen=True)
class NoiseContrastiveEstimation(NoiseEstimator):
    r"""Noise contrastive estimation (Gutmann and Hyvarinen): classify data against noise, with log Z as a parameter.

    With ``G(x) = log p(x) - log p_n(x) - log nu`` and ``log p = log base - E - c``, the loss of a row is

    .. math:: -\log \sigma(G(x)) - \sum_{j=1}^{\nu} \log \sigma(-G(y_j)), \qquad y_j \sim p_n

    with new noise draws at each update, unless ``noise_seed`` fixes them. ``c`` is the ``numpyro.param`` named
    ``"<site>$log_normalizer"``; it starts at the value at which the classifier cannot tell the first batch from its noise,
    and converges to log Z. The loss costs ``1 + nu`` energies per row and takes no derivative of the energy in x. With noise
    equal to the data the efficiency is ``nu / (1 + nu)``; with noise far from the data nothing is learned.

    Each row may have noise of its own: any ``p_n`` that does not depend on the row's event will do. Where rows have a
    context (or a base) of their own, log Z is a function of it, and one number can replace it only where it is the same in
    every context. Choose with ``log_normalizer``; "ranking_nce" needs no log Z.

    *Bayesian NCE.* With a ``noise_seed`` and a prior as ``log_normalizer`` the loss is a function of the latents alone, for
    NUTS, Laplace and guides. It is the negative log likelihood of a logistic regression: with the :math:`n` rows and their
    :math:`n \nu` noise draws pooled, a pooled event :math:`u` is a row with probability

    .. math:: h(u) = \frac{p(u)}{p(u) + \nu p_n(u)} = \sigma(G(u)), \qquad
        e^{-\text{loss}} = \prod_i h(x_i) \prod_{ij} \big(1 - h(y_{ij})\big)

    so that ``prior x exp(-loss)`` is the posterior given these labels, which needs no weight. (With fitted noise this holds
    up to the error of the fit.) Where the energy holds, with :math:`g = (-\partial_\theta E, -1)` the derivatives of
    ``log p`` in :math:`(\theta, c)`, the Hessian of the loss per row and the covariance of its gradient are

    .. math:: H = E_p[(1 - h) g g^\top], \qquad J = H - (1 + 1 / \nu) m m^\top, \quad m = E_p[(1 - h) g] = -H e_c

    The posterior's covariance is :math:`H^{-1} / n`, and that of the estimate over data and noise sets is
    :math:`H^{-1} J H^{-1} / n = (H^{-1} - (1 + 1 / \nu) e_c e_c^\top) / n`. Parameters thus have the right width under any
    noise, and only the variance of ``c`` is larger than that of log Z, by :math:`(1 + 1 / \nu) / n`: to the regression the
    share of rows among the events is random. (One weight, as from "sandwich", would be moved by ``c``; "open_faced" keeps
    the parameters and makes ``c`` narrower.) With noise like the data, :math:`h = 1 / (1 + \nu)`, and the covariance of the
    parameters is :math:`1 + 1 / \nu` times that of the likelihood's posterior: standard deviations are
    :math:`\sqrt{1 + 1 / \nu}` times as large. The two means differ by the chance of the noise set, whose variance is
    :math:`1 / \nu` of the likelihood's. As ``nu`` grows the posterior becomes that of the likelihood, with ``c`` at log Z.

    Args:
        nu: noise draws per row.
        noise: the distribution that data are compared with. A normalised NumPyro distribution of the energy's event shape
            and support, one for all rows or, with a batch shape, one for each. "gaussian" or "mixture", fitted to each batch
            in unconstrained space, each row's to the half of the batch that the row is not in: "gaussian" by mean and
            covariance (shrunk towards the diagonal), "mixture" by up to 64 Gaussian kernels of Silverman's width around
            rows, for data in several modes and few dimensions. "marginals", for discrete events: independent elements with
            the shares of their values in that half. A NumPyro model ``noise()`` or ``noise(context)`` that samples the
            site's name for one event and nothing else: its ``numpyro.param`` sites are fitted to the data by maximum
            likelihood during training. None for the energy's own base; where it has none, a standard normal in unconstrained
            space, or the uniform distribution of a discrete support. No gradient of the loss flows through the noise.
        log_normalizer: "learned", one parameter ``c``; "fixed", ``c = 0``, for an energy with a term that can become log Z
            (self-normalised); a NumPyro distribution, the prior of one latent ``c`` of the same name, which all rows share;
            None for "learned" where log Z is one number, and an error where it is not.
        noise_seed: None for new noise at each update; a whole number for a fixed set, one per site, of ``nu`` draws for each
            row.

    Raises:
        EnergyError: for nu that is not a whole number above 0; a noise_seed with noise that is trained or depends on
            latents, and with a subsampled plate; a prior that is not of one real number; "learned" under NUTS or a Laplace
            guide; noise of another event shape or support, or of a batch shape that is not the rows'; noise of density zero
            at a row (which the message names); and rows with a context or a base of their own without a choice of
            ``log_normalizer``.
        TypeError: for noise of another type, and for the class of a prior.

    Warns:
        UserWarning: where the noise does not overlap the data (checked where the data are concrete, as in ``svi.init``), and
            in training, where the loss no longer depends on the energy (mean derivative in G below 1e-6).

    Example:
        ``estimate(model, "nce", nu=5, noise="gaussian")``; for NUTS,
        ``estimate(model, "nce", nu=20, noise="gaussian", noise_seed=0, log_normalizer=dist.Normal(0, 10))``

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012); Ma and Collins, Noise
        contrastive estimation and negative sampling for conditional models (2018); Prentice and Pyke, Logistic disease
        incidence models and case-control studies (1979), for the width of the posterior.
    """

    name = "nce"
    takes_discrete = True
    log_normalizer: LogNormalizer | dist.Distribution | None = None

    def __post_init__(self):
        super().__post_init__()
        check_normalizer(type(self).__name__, self.log_normalizer)

    @property
    def is_likelihood(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the value is the log likelihood of what is data among fixed events."""
        return self.noise_seed is not None and not (self.log_normalizer is None or self.log_normalizer == "learned")

    def latents(self, site: Site) -> dict[str, dist.Distribution]:
        """Return the prior of log Z, where it has one."""
        prior = self.log_normalizer
        return {name_of(site): prior} if isinstance(prior, dist.Distribution) else {}

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the classification loss of each row."""
        ratios = self.log_ratios(rng_key, site)
        log_normalizer = learned_normalizer(site, self.log_normalizer, ratios.data, ratios.noise[0])
        at_data, at_noise = (r - log_normalizer - jnp.log(self.nu) for r in (ratios.data, ratios.noise))
        warn_where_saturated(
            site, self._slopes(at_data, at_noise, ratios.is_inside), "the noise does not overlap the data", NEARER
        )
        loss = self.data_loss(at_data) + self._over_noise(self.noise_loss(at_noise), ratios.is_inside)
        return ratios.learning - loss, state

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        r"""Return how well the classifier separates data from noise, both weighted equally.

        With ``r = p / p_n``, ``accuracy`` is that of guessing data where ``r > 1``, half over the rows and half over
        noise: 1/2 where the two cannot be separated. ``overlap`` is the mean of ``2 min(P, 1 - P)`` with
        ``P = r / (1 + r)``, which estimates :math:`\int \min(p, p_n)`: 1 for noise like the data, 0 where the classifier is
        saturated and nothing more is learned. Where the energy fits, ``accuracy = 1 - overlap / 2``. ``gradient_size`` is
        the mean size of the loss's derivative in the log ratios of a row; training warns below 1e-6.
        """
        ratios = self.log_ratios(rng_key, site)
        log_normalizer = learned_normalizer(site, self.log_normalizer, ratios.data, ratios.noise[0])
        at_data, at_noise = ratios.data - log_normalizer, ratios.noise - log_normalizer
        counts = ratios.is_inside if site.mask is None else ratios.is_inside & site.mask

        def balanced(data, noise):
            return 0.5 * (mean_over_rows(data, site.mask) + mean_over_rows(noise.reshape(-1), counts.reshape(-1)))

        slopes = self._slopes(at_data - jnp.log(self.nu), at_noise - jnp.log(self.nu), ratios.is_inside)
        return {
            "accuracy": balanced((1 + jnp.sign(at_data)) / 2, (1 - jnp.sign(at_noise)) / 2),
            "overlap": 2 * balanced(jax.nn.sigmoid(-jnp.abs(at_data)), jax.nn.sigmoid(-jnp.abs(at_noise))),
            "gradient_size": mean_over_rows(slopes, site.mask),
        }

    def data_loss(self, log_odds: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Return the loss of a row at log odds ``G``."""
        return jax.nn.softplus(-log_odds)

    def noise_loss(self, log_odds: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        """Return the loss of a noise draw at log odds ``G``."""
        return jax.nn.softplus(log_odds)

    def _slopes(
        self, at_data: Float[Array, " rows"], at_noise: Float[Array, "nu rows"], is_inside: Bool[Array, "nu rows"]
    ) -> Float[Array, " rows"]:
        """Return the size of each row's derivatives in the log odds."""
        return slope(self.data_loss, at_data) + self._over_noise(slope(self.noise_loss, at_noise), is_inside)

    def _over_noise(self, values: Float[Array, "nu rows"], is_inside: Bool[Array, "nu rows"]) -> Float[Array, " rows"]:
        return jnp.sum(jnp.where(is_inside, values, 0.0), axis=0)
