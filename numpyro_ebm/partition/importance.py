"""Importance sampling."""

import dataclasses
from typing import Any, ClassVar

import jax
from jaxtyping import Float, Shaped

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.partition._base import AbstractPartition, Bound, Densities, Estimate, Weighted, from_log_weights
from numpyro_ebm.partition._proposal import check_rows, fit_proposal


@dataclasses.dataclass(frozen=True)
class ImportanceSampling(AbstractPartition):
    r"""Importance sampling: the mean weight of draws of a normalised proposal.

    .. math:: \log \hat Z = \log \frac 1n \sum_i \frac{\tilde p(x_i)}{q(x_i)}, \qquad x_i \sim q

    By default nine tenths of the proposal are a mixture of Gaussians in unconstrained space, fitted by expectation
    maximisation to draws of the target or similar data, and one tenth is a Gaussian of four times their covariance, so that
    the weights stay bounded if the target is broader than its draws. On a discrete support the proposal has independent
    elements. In more than about ten dimensions few weights count, which ``ess`` shows.

    Args:
        num_samples: number of draws of the proposal.
        proposal: a NumPyro distribution of one event; None for one fitted to ``data``.
        data: events to which the proposal is fitted, ``(num, *batch_shape, *event_shape)``: training rows, or draws of the
            target; None for 1000 draws of the distribution's own ``sampler``, by default one chain per draw, which is then
            nearly all of the cost.
        num_components: Gaussians in the mixture.
        sharding: devices that share the draws: a ``jax.sharding.Mesh``, whose first axis splits them evenly, or a number of
            devices; None for one.

    Raises:
        EnergyError: for counts below 1, a proposal of another shape or support, both a proposal and data, and data that are
            all the same in a coordinate.

    Example:
        ``log_partition(rng_key, model, params=params, method="importance", data=x_train)``

    References:
        Robert and Casella, Monte Carlo statistical methods (2004), chapter 3; Hesterberg, Weighted average importance
        sampling and defensive mixture distributions (1995).
    """

    name: ClassVar[str] = "importance"
    takes_mixed: ClassVar[bool] = True
    bound: ClassVar[Bound | None] = "lower"
    unreliable: ClassVar[str] = (
        "Use more num_samples, or method='ais' or 'smc', which move from the start to the target in steps."
    )
    num_samples: int = 20_000
    proposal: Any = None
    data: Any = None
    num_components: int = 10
    sharding: Any = None

    def __post_init__(self):
        for name in ("num_samples", "num_components"):
            check_count(type(self).__name__, name, getattr(self, name))
        if self.placement is not None:
            self.placement.check_count(type(self).__name__, "num_samples", self.num_samples)
        if self.proposal is not None and self.data is not None:
            raise EnergyError("ImportanceSampling fits its proposal to data only if none is given. Pass proposal or data.")

    @property
    def start_distribution(self):
        """The given proposal; None for a fitted one."""
        return self.proposal

    @property
    def num_starts(self) -> int:
        """Number of draws of a given proposal."""
        return 0 if self.proposal is None else self.num_samples

    @property
    def num_draws(self) -> int:
        """Number of draws to fit a proposal to, if none is given."""
        return 1000 if self.proposal is None else 0

    def check(self, distribution):
        """Check that a proposal can be fitted to the data, and raise otherwise."""
        super().check(distribution)
        if distribution.is_mixed and self.proposal is None:
            raise EnergyError(
                "ImportanceSampling fits a proposal to continuous events, or to discrete ones with one list of values; this "
                "event has members of several kinds. Write method='importance', proposal=a distribution of one event, or "
                "method='ais'."
            )
        check_rows(type(self).__name__, self.data, distribution, 2)

    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the mean weight."""
        if starts is not None:
            return _weighted(starts, self.on_each_part(jax.vmap(densities.log_ratio), starts))
        key_fit, key_draw = jax.random.split(rng_key)
        proposal = fit_proposal(key_fit, draws, densities.distribution, self.num_components)
        x = proposal.sample(key_draw, self.num_samples)
        log_weight = lambda x: densities.log_target(x) - proposal.log_prob(x)  # noqa: E731
        return _weighted(x, self.on_each_part(jax.vmap(log_weight), x))


jax.tree_util.register_dataclass(
    ImportanceSampling, data_fields=["proposal", "data"], meta_fields=["num_samples", "num_components", "sharding"]
)


def _weighted(positions: Shaped[Array, " samples *position"], log_weights: Float[Array, " samples"]) -> Estimate:
    return from_log_weights(log_weights)._replace(draws=Weighted(positions, log_weights))
