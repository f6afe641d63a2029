"""What a method of `calibrate` gets and returns."""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.programs import compiled
from numpyro_ebm._core.sandwich import slopes_and_curvature
from numpyro_ebm._core.typing import Array, Flat, Matrix, PRNGKey
from numpyro_ebm.bayes._loss import Loss
from numpyro_ebm.bayes._modes import find_mode
from numpyro_ebm.bayes.simulated import Simulated, covariance_over_sets, of_units


class Adjustment(NamedTuple):
    r"""How a generalised posterior is to be changed: its weight, and an affine map of its draws.

    Draws ``z`` under the weight become :math:`t + A (z - m)`, with ``m`` the mode of the posterior under weight 1.

    Attributes:
        weight: the number for ``estimate(..., weight=...)``.
        matrix: ``A``, ``(d, d)``; None for draws that stay as they are.
        target: ``t``, ``(d,)``, where the mode goes; None for a mode that stays.
        notes: what the method found about itself.
    """

    weight: Any = 1.0
    matrix: Matrix | None = None
    target: Flat | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class CalibrationProblem:
    """A generalised posterior near its mode, in flat unconstrained latents, sorted by name.

    Attributes:
        loss: the loss: ``loss.total(z)`` and ``loss.log_density(z, weight)``.
        mode: ``(d,)``, the mode under weight 1.
        hessian: ``(d, d)``, Hessian of the loss there, summed over rows, without priors.
        prior_precision: ``(d, d)``, minus the Hessian of the log density of all else: priors and other likelihoods.
    """

    loss: Loss
    mode: Flat
    hessian: Matrix
    prior_precision: Matrix

    @property
    def precision(self) -> Matrix:
        """``(d, d)``, precision of the generalised posterior under weight 1."""
        return self.hessian + self.prior_precision

    def mode_under(self, weight: Any) -> Flat:
        """Return the mode of the generalised posterior under a weight."""
        return compiled(lambda z, weight: find_mode(lambda z: self.loss.log_density(z, weight), z), self.mode, weight)

    def score_covariance(self, rng_key: PRNGKey, source: Any = "rows") -> Matrix:
        """Return the covariance of the gradient of the loss at the mode.

        Args:
            rng_key: random key of simulated data.
            source: "rows" for that between rows, which are taken as independent; or a `Simulated`.

        Raises:
            EnergyError: for one row, which does not say how it varies.
        """
        if isinstance(source, Simulated):
            self.check_noise_varies("score_covariance=Simulated(...)")
            key_at, key_sets = jax.random.split(rng_key)
            draw = source.at(key_at, self.loss, self.mode)
            score = lambda key: of_units(self.loss, self.mode, draw(key))  # noqa: E731
            return compiled(lambda key: covariance_over_sets(score, key, source.num_sets)[1], key_sets)
        return self._between_rows()

    def check_noise_varies(self, owner: str) -> None:
        """Check that the loss of replaced rows varies as that of new data would.

        Raises:
            EnergyError: for a fixed noise set, which would stay where new data come with new noise.
        """
        if self.loss.holds_noise:
            raise EnergyError(
                f"{owner} replaces the rows, and the noise set that noise_seed fixes would stay: the variance of the loss "
                "would lack that of the noise. Write method='open_faced', 'rescaling' or 'sandwich', whose variance between "
                "rows, each with its own noise, contains both."
            )

    def _between_rows(self) -> Matrix:
        masks = self.loss.masks
        for mask in masks:
            if jnp.sum(mask) < 2:
                raise EnergyError(
                    "The variance of the score between rows needs two rows or more, and there is one: a dependent "
                    "observation, such as a lattice, does not say how it varies. Write score_covariance="
                    "numpyro_ebm.bayes.Simulated('gibbs') in the method, for data sets drawn from the model."
                )
        slopes = compiled(self._without_each if self.loss.couples_rows else self._of_each, self.mode)
        return sum((_centred(own, mask) for own, mask in zip(slopes, masks, strict=True)), jnp.zeros_like(self.hessian))

    def _of_each(self, z: Flat) -> list[Float[Array, "_ d"]]:
        sizes = [len(mask) for mask in self.loss.masks]
        rows, _ = slopes_and_curvature(lambda z: jnp.concatenate(self.loss.of_rows(z)), lambda z: jnp.zeros(()), z)
        return jnp.split(rows.T, np.cumsum(sizes)[:-1].tolist())

    def _without_each(self, z: Flat) -> list[Float[Array, "_ d"]]:
        """Return by how much the gradient falls without each row (the jackknife), where rows are coupled."""
        whole = jax.grad(self.loss.total)(z)

        def without(size, i):
            def rows(name, site):
                if site.num_rows != size:
                    return site
                others = jnp.arange(size) != i
                return dataclasses.replace(site, mask=others if site.mask is None else site.mask & others)

            return whole - jax.grad(lambda z: self.loss.total(z, rows))(z)

        sizes = [len(mask) for mask in self.loss.masks]
        return [jax.lax.map(lambda i, size=size: without(size, i), jnp.arange(size)) for size in sizes]


class AbstractCalibration(abc.ABC):
    """A method of `calibrate`.

    Attributes:
        name: the name that `calibrate` takes.
        limits: when it is known to fail, beside skewed posteriors.
    """

    name: ClassVar[str]
    limits: ClassVar[str]

    @abc.abstractmethod
    def adjustment(self, rng_key: PRNGKey, problem: CalibrationProblem) -> Adjustment:
        """Return the weight and the map of draws.

        Args:
            rng_key: random key.
            problem: the generalised posterior near its mode.
        """


def _centred(slopes: Float[Array, "rows d"], mask: Any) -> Matrix:
    count = jnp.sum(mask)
    mean = jnp.sum(slopes, axis=0) / count
    off = jnp.where(mask[:, None], slopes - mean, 0.0)
    return count / (count - 1) * off.T @ off
