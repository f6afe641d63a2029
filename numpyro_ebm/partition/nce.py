"""Log Z by classifying data against noise."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree
from numpyro_ebm.partition._base import AbstractPartition, Densities, Estimate
from numpyro_ebm.partition._contrast import log_partition_by_contrast
from numpyro_ebm.partition._proposal import fit_proposal

FEWEST = 16
"""Fewest rows for noise fitted to halves of them: with fewer, it is the reference."""


@dataclasses.dataclass(frozen=True)
class NoiseContrast(AbstractPartition):
    r"""Noise contrastive estimation of one constant: the log Z that best separates data from noise, for a fixed energy.

    .. math:: \max_c \sum_i \log s(G(x_i)) + \sum_j \log s(-G(y_j)), \qquad G = \log\tilde p - c - \log q - \log\nu

    No chain runs: the data replace draws of the model, and the standard error is valid only if they are such draws. If the
    model does not fit its data, the result is the constant of an energy trained by "nce" with the same noise, not log Z;
    `log_partition` warns if the data show this. With draws of the target as data, this is bridge sampling with a given
    ``q``.

    Args:
        data: ``(num, *batch_shape, *event_shape)``, data that follow the model, or draws of it.
        noise: a NumPyro distribution of one event. None for the energy's ``base``; without a base, for the uniform
            distribution of a discrete support, and otherwise for a Gaussian fitted to the data in unconstrained space (each
            half of the data is compared with the Gaussian fitted to the other half).
        nu: noise draws per row of data.

    Raises:
        EnergyError: without data, for a ``nu`` below 1, and for noise of another shape or support.

    Example:
        ``log_partition(rng_key, model, params=result.params, method="nce", data=x_test, nu=10)``

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012); Geyer, Estimating
        normalizing constants and reweighting mixtures (1994).
    """

    name: ClassVar[str] = "nce"
    unreliable: ClassVar[str] = "Data and noise do not overlap: give noise nearer to the data, or use method='ais'."
    data: Any = None
    noise: Any = None
    nu: int = 10

    def __post_init__(self):
        check_count(type(self).__name__, "nu", self.nu)
        if self.data is None:
            raise EnergyError(
                "NoiseContrast classifies data against noise and needs data. Write log_partition(..., method='nce', data=x)."
            )

    @property
    def start_distribution(self):
        """Distribution of the noise."""
        return self.noise

    @property
    def num_starts(self) -> int:
        """Number of noise draws."""
        return self.nu * jnp.shape(self.data)[0]

    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the constant that best separates data from noise."""
        ratios = jax.vmap(densities.log_ratio)
        distribution, num = densities.distribution, len(draws)
        if self.noise is not None or distribution.base is not None or distribution.is_discrete or num < FEWEST:
            return log_partition_by_contrast(ratios(draws), ratios(starts))
        halves = draws[: num // 2], draws[num // 2 :]
        keys = jax.random.split(rng_key)
        found = [self._told(*each, distribution, densities) for each in zip(keys, halves, halves[::-1], strict=True)]
        first, second = found
        return Estimate(
            (first.value + second.value) / 2,
            jnp.hypot(first.standard_error, second.standard_error) / 2,
            first.ess + second.ess,
            are_draws=first.are_draws & second.are_draws,
        )

    def _told(self, rng_key, rows, others, distribution, densities) -> Estimate:
        """Return the constant that best separates rows from noise fitted to other rows."""
        key_fit, key_draw = jax.random.split(rng_key)
        noise = fit_proposal(key_fit, others, distribution, 1)
        noisy = Densities(distribution, densities.local, noise)
        ratios = jax.vmap(noisy.log_ratio)
        return log_partition_by_contrast(ratios(rows), ratios(noise.sample(key_draw, self.nu * len(rows))))


jax.tree_util.register_dataclass(NoiseContrast, data_fields=["data", "noise"], meta_fields=["nu"])
