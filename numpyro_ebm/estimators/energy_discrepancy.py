"""Energy discrepancy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.moves import FAULT, FIX, check_scale, in_pairs, scale_of
from numpyro_ebm.estimators.parts.saturation import warn_where_saturated


@dataclasses.dataclass(frozen=True)
class EnergyDiscrepancy(AbstractEstimator):
    r"""Energy discrepancy (Schroeder et al.): compare each row with draws around a noisy copy of it; no log Z, no score.

    With noises ``xi, xi_1, ..., xi_M ~ N(0, I)`` fresh at each update (unconstrained space, Jacobian included), the loss of
    a row is

    .. math:: \log\Big(\frac{w}{M} + \frac1M \sum_{m=1}^{M} e^{E(x) - E(x + \sqrt t\, \xi + \sqrt t\, \xi_m)}\Big)

    where ``-E`` is the log density, base included. For ``w = 0`` and many negatives it is the discrepancy of the paper,
    ``log p_t(x + sqrt(t) xi) - log p(x)``, where ``p_t`` is ``p`` smoothed by ``N(0, t)``.

    **w = 1 is consistent** for every ``t`` and every ``M``. Given the noisy copy ``c = x + sqrt(t) xi``, the row is a draw
    from ``p(x) N(c; x, t)`` and each negative one from ``N(c, t)``, so that the loss is that of picking the row among
    ``1 + M`` candidates by their ratios ``p(x)``. This is "ranking_nce" with noise around each row, and for ``M = 1`` half
    the loss of "conditional_nce" with ``kappa = 1`` and ``sd = sqrt(2 t)``. For other ``w``, finite ``M`` leaves a bias. As
    ``t`` goes to 0 the expected loss is, up to a constant,

    .. math:: t\, q \Big( \operatorname{tr} \nabla s + \big(1 - \tfrac{q}{2} (1 + \tfrac1M)\big) |s|^2 \Big),
        \qquad q = \frac{M}{M + w}

    with ``s`` the score. For ``w = 1`` that is ``t M / (M + 1)`` times the loss of "sm". On a Gaussian the optimal precision
    is ``(M + w) / (M + 2 w - 1)`` times that of the data: ``M / (M - 1)`` times for ``w = 0``, and half for a large ``w``.
    As ``t`` and ``M`` grow, the negatives cover the space and the estimate tends to maximum likelihood by importance
    sampling; a ``t`` much larger than the modes needs a correspondingly large ``M``.

    Efficiency for the precision of a Gaussian in one dimension with 16 negatives, ``w = 1`` and the draws frozen, at
    ``sqrt(t)`` of 0.1, 0.5, 1, 2 and 4 standard deviations of the data (benchmarks/efficiency.py): 0.02, 0.32, 0.66, 0.84
    and 0.80 for one draw of ``xi``, and 0.74, 0.80, 0.88, 0.93 and 0.89 for a pair of draws ``+-`` (and their negatives
    mirrored), which cancels a term of order ``sqrt(t)`` and mean zero.

    Args:
        noise_scale: ``sqrt(t)``, the standard deviation of each of the two noises, in data units (in unconstrained units
            where the support is not the real line), a scalar or one value per dimension; None for the batch's standard
            deviation, per dimension.
        num_negatives: ``M``, negatives around each noisy copy.
        num_draws: noisy copies ``xi`` per row, in mirrored pairs; with an odd number the last has no partner. The loss takes
            ``1 + num_draws * num_negatives`` energies per row.
        w_stable: ``w``, 0 or more.

    Raises:
        EnergyError: for counts below 1, a noise_scale that is not positive or does not fit the event, a negative w_stable,
            or ``w_stable=0`` with one negative, where the loss is linear in the energy and has no minimum.

    Warns:
        UserWarning: where all negatives lie outside the density, so that the loss has lost its gradient in the energy.

    Example:
        ``estimate(model, "energy_discrepancy", noise_scale=1.0, num_negatives=16)``

    References:
        Schroeder, Ou, Lim, Li, Vollmer and Duncan, Energy discrepancies: a score-independent loss for energy-based models
        (2023); Ma and Collins, Noise contrastive estimation and negative sampling for conditional models (2018), for the
        consistency of ranking.
    """

    name = "energy_discrepancy"
    role = "objective"
    noise_scale: Any = None
    num_negatives: int = 16
    num_draws: int = 2
    w_stable: float = 1.0

    def __post_init__(self):
        owner = type(self).__name__
        check_positive(owner, "noise_scale", self.noise_scale)
        check_count(owner, "num_negatives", self.num_negatives)
        check_count(owner, "num_draws", self.num_draws)
        if not (is_concrete(self.w_stable) and np.shape(self.w_stable) == () and 0 <= self.w_stable < math.inf):
            raise EnergyError(f"{owner} needs one number w_stable >= 0; got {self.w_stable!r}. Write w_stable=1.0.")
        if self.w_stable == 0 and self.num_negatives == 1:
            raise EnergyError(
                f"{owner} with w_stable=0 and one negative has the loss E(x) - E(y), which has no minimum. Write "
                "w_stable=1.0, or num_negatives=16."
            )

    def notes(self):
        """Return a note on the bias of a ``w`` other than 1."""
        if self.w_stable == 1:
            return ()
        return (f"w_stable={self.w_stable} with {self.num_negatives} negatives is biased; w_stable=1 is consistent",)

    def check(self, site: Site) -> None:
        """Raise where ``noise_scale`` does not fit the event."""
        super().check(site)
        check_scale(site, "noise_scale", self.noise_scale)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss, per row."""
        shape = site.position.shape
        key_copies, key_negatives = jax.random.split(rng_key)
        half = -(-self.num_draws // 2)
        noise = jax.random.normal(key_copies, (half, 1, *shape), site.position.dtype)
        noise = noise + jax.random.normal(key_negatives, (half, self.num_negatives, *shape), noise.dtype)
        moves = in_pairs(scale_of(site, self.noise_scale, 1.0) * noise, self.num_draws).reshape(-1, *shape)
        ends = site.position + jnp.concatenate([jnp.zeros_like(moves[:1]), moves])
        values = site.over_draws(site.log_density, ends)
        rises = (values[1:] - values[0]).reshape(self.num_draws, self.num_negatives, -1)
        total = jax.nn.logsumexp(rises, axis=1)
        if self.w_stable != 0:
            log_w = math.log(self.w_stable)
            warn_where_saturated(site, jnp.mean(jax.nn.sigmoid(total - log_w), axis=0), FAULT, FIX)
            total = jnp.logaddexp(total, log_w)
        return math.log(self.num_negatives) - jnp.mean(total, axis=0), state
