"""Importance sampling."""

import dataclasses
from typing import Any, ClassVar

import jax

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm.partition._base import AbstractPartition, Bound, Estimate, from_log_weights
from numpyro_ebm.partition._proposal import check_rows, fit_proposal


@dataclasses.dataclass(frozen=True)
class ImportanceSampling(AbstractPartition):
    r"""Importance sampling: the mean weight of draws of a normalised law.

    .. math:: \log \hat Z = \log \frac 1n \sum_i \frac{\tilde p(x_i)}{q(x_i)}, \qquad x_i \sim q

    The law is by default a mixture of Gaussians in unconstrained space, fitted by expectation maximisation to draws of the
    target or to data like them, nine tenths of it, and a tenth of a Gaussian of four times their covariance, so that the
    weights stay bounded where the target is broader than its draws. Where the support is discrete it is the law of
    independent elements. In more than ten or so dimensions few weights count, as ``ess`` then says.

    Args:
        num_samples: draws of the proposal.
        proposal: a NumPyro distribution of one event; None for a law fitted to ``data``.
        data: events to fit the proposal to, ``(num, *batch_shape, *event_shape)``: training rows, or draws of the target;
            None for 1000 of the distribution's own ``sampler``, by default a chain each: nearly all of the time then.
        num_components: Gaussians in the mixture.

    Raises:
        EnergyError: for counts that are none, a proposal of another shape or support, both a proposal and data,
            data that are all the same in a coordinate.

    Example:
        ``log_partition(rng_key, model, params=params, method="importance", data=x_train)``

    References:
        Robert and Casella, Monte Carlo statistical methods (2004), chapter 3; Hesterberg, Weighted average importance
        sampling and defensive mixture distributions (1995).
    """

    name: ClassVar[str] = "importance"
    bound: ClassVar[Bound | None] = "lower"
    unreliable: ClassVar[str] = (
        "Use more num_samples, or method='ais' or 'smc', which go from the start to the target in steps."
    )
    num_samples: int = 20_000
    proposal: Any = None
    data: Any = None
    num_components: int = 10

    def __post_init__(self):
        for name in ("num_samples", "num_components"):
            check_count(type(self).__name__, name, getattr(self, name))
        if self.proposal is not None and self.data is not None:
            raise EnergyError("ImportanceSampling fits its proposal to data where none is given. Pass proposal or data.")

    @property
    def start_law(self):
        """The proposal, where it is given."""
        return self.proposal

    @property
    def num_starts(self) -> int:
        """Draws of the proposal, where it is given."""
        return 0 if self.proposal is None else self.num_samples

    @property
    def num_draws(self) -> int:
        """Draws to fit to, where nothing is given."""
        return 1000 if self.proposal is None else 0

    def check(self, distribution):
        """Refuse data that no proposal can be fitted to."""
        super().check(distribution)
        check_rows(type(self).__name__, self.data, distribution, 2)

    def estimate(self, rng_key, densities, starts, draws) -> Estimate:
        """Log of the mean weight."""
        if starts is not None:
            return from_log_weights(jax.vmap(densities.log_ratio)(starts))
        key_fit, key_draw = jax.random.split(rng_key)
        proposal = fit_proposal(key_fit, draws, densities.distribution, self.num_components)
        x = proposal.sample(key_draw, self.num_samples)
        return from_log_weights(jax.vmap(densities.log_target)(x) - jax.vmap(proposal.log_prob)(x))


jax.tree_util.register_dataclass(
    ImportanceSampling, data_fields=["proposal", "data"], meta_fields=["num_samples", "num_components"]
)
