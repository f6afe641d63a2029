"""Annealed importance sampling."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.partition._annealing import Annealed, Levels, anneal, default_kernel, exact_kernel, log_mean, pilot
from numpyro_ebm.partition._base import AbstractPartition, Bound, Densities, Estimate, Weighted, from_log_weights
from numpyro_ebm.partition._start import are_still

PILOT_CHAINS = 32
"""Chains of the pilot run: more find the spread at each level more exactly, at a cost in proportion."""
NUM_LEVELS = 1000
"""Default number of levels: in the tests, log Z of a Boltzmann machine of 64 and 12 units is within 0.1 nat."""


@dataclasses.dataclass(frozen=True)
class AnnealedImportanceSampling(AbstractPartition):
    r"""Annealed importance sampling: weighted chains that move from a known distribution to the target.

    Between the start ``q`` and the target lie ``q(x)^{1 - beta} \tilde p(x)^beta`` for ``0 = beta_0 < ... < beta_K = 1``. A
    chain starts at a draw of ``q``. From each level to the next its log weight grows by
    ``(beta_k - beta_{k-1}) log(\tilde p(x) / q(x))``, and then a kernel that leaves level k invariant moves it. However
    slowly the chains mix, ``E[w] = Z``, so the log of the mean weight is below log Z in the mean (by Jensen's inequality):

    .. math:: \log \hat Z = \log \frac 1n \sum_i w_i, \qquad E[\log \hat Z] \le \log Z

    A pilot run of 32 chains places the levels so that the log weights gain equal standard deviations. Each level has the
    step size at which the pilot run reaches the kernel's optimal acceptance, and the variances of the pilot's chains for a
    diagonal mass matrix; all are fixed before the chains that count start. The cost is
    ``num_chains * num_levels * num_steps`` transitions, plus about a tenth of that each for the pilot run and for the fit of
    the start at the default settings. A small ``ess`` means that the levels are too few, or that few chains found modes of
    the target.

    Args:
        num_levels: number of levels that the pilot run places; None for 1000.
        betas: the levels themselves instead, increasing from 0 to 1.
        num_chains: number of chains, each with one weight.
        kernel: a name or a kernel, which has to be exact; None for `DynamicHMC` of up to 5 steps, and `Gibbs` if the support
            is discrete.
        num_steps: transitions at each level.
        start: distribution at beta 0, a NumPyro distribution of one event. None for the energy's ``base``; without a base,
            for the uniform distribution of a discrete support, and otherwise for a distribution fitted to ``data`` or to 64
            chains that run under the target for 200 transitions (independent normals, a tenth of them three times as wide,
            and a tenth of a standard normal in unconstrained space). It has to cover the target: `log_partition` warns if
            chains do not stay where they ended, but cannot warn of modes that no chain saw.
        data: events to which the start is fitted, ``(num, *batch_shape, *event_shape)``: training rows, or draws of the
            target.
        sharding: devices that share the chains: a ``jax.sharding.Mesh``, whose first axis splits them evenly, or a number of
            devices; None for one.

    Raises:
        EnergyError: for counts below 1, betas that do not increase from 0 to 1 or come with ``num_levels``, an unknown or an
            unadjusted kernel, a start of another shape or support, and data together with a start or a base.

    Example:
        ``log_partition(rng_key, distribution, method="ais", num_levels=2000)``

    References:
        Neal, Annealed importance sampling (2001); Salakhutdinov and Murray, On the quantitative analysis of deep belief
        networks (2008); Grosse, Maddison and Salakhutdinov, Annealing between distributions by averaging moments (2013).
    """

    name: ClassVar[str] = "ais"
    takes_mixed: ClassVar[bool] = True
    bound: ClassVar[Bound | None] = "lower"
    fits_start: ClassVar[bool] = True
    unreliable: ClassVar[str] = "Use more num_levels or num_steps, or a start that is nearer to the target and covers it."
    num_levels: int | None = None
    betas: Any = None
    num_chains: int = 100
    kernel: Any = None
    num_steps: int = 1
    start: Any = None
    data: Any = None  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]
    sharding: Any = None

    def __post_init__(self):
        owner = type(self).__name__
        for count in ("num_chains", "num_steps"):
            check_count(owner, count, getattr(self, count))
        if self.placement is not None:
            self.placement.check_count(owner, "num_chains", self.num_chains)
        self._check_levels(owner)
        if isinstance(self.kernel, str | AbstractKernel):
            object.__setattr__(self, "kernel", exact_kernel(owner, self.kernel))

    def _check_levels(self, owner: str) -> None:
        if self.num_levels is not None:
            check_count(owner, "num_levels", self.num_levels)
            if self.betas is not None:
                raise EnergyError(
                    f"{owner} got num_levels={self.num_levels} and betas, which also set the levels. Pass one of the two."
                )
        if self.betas is None or not is_concrete(self.betas):
            return
        betas = np.asarray(self.betas, float)
        if not (betas.ndim == 1 and betas.size > 1 and betas[0] == 0 and betas[-1] == 1 and np.all(np.diff(betas) > 0)):
            raise EnergyError(
                f"{owner} needs betas that increase from 0 to 1; got {self.betas!r}. Write "
                "betas=jnp.linspace(0, 1, 1001) ** 2, or num_levels=1000."
            )

    @property
    def num_starts(self) -> int:
        """Number of chains, including those of the pilot run."""
        return self.num_chains + PILOT_CHAINS

    def check(self, distribution):
        """Check that the kernel can move on the support, and raise otherwise."""
        super().check(distribution)
        default_kernel(self.kernel, distribution)

    def levels(self, rng_key: PRNGKey, densities: Densities, starts: Shaped[Array, " starts *position"]) -> Levels:
        """Return betas and step sizes, by the pilot run."""
        kernel = default_kernel(self.kernel, densities.distribution)
        levels = self.num_levels or NUM_LEVELS if self.betas is None else self.betas
        return pilot(rng_key, kernel, densities, starts[self.num_chains :], levels)

    def anneal(
        self, rng_key: PRNGKey, densities: Densities, starts: Shaped[Array, " chains *position"], levels: Levels
    ) -> Annealed:
        """Return the chains at the end of the levels, whose path is that of all."""
        kernel = default_kernel(self.kernel, densities.distribution)
        axis_name = None if self.placement is None else self.placement.axis_name
        run = self.on_each_part(
            lambda own: anneal(rng_key, kernel, densities, own, levels, self.num_steps, axis_name), starts
        )
        return run._replace(path=log_mean(run.path))

    def estimate(self, rng_key: PRNGKey, densities: Densities, starts: PyTree, draws: PyTree) -> Estimate:
        """Return the log of the mean weight."""
        key_pilot, key_chains = jax.random.split(rng_key)
        levels = self.levels(key_pilot, densities, starts)
        run = self.anneal(key_chains, densities, starts[: self.num_chains], levels)
        found = from_log_weights(run.log_weights)._replace(draws=Weighted(run.settled, run.log_weights))
        if densities.distribution.is_discrete:
            return found
        weights = jnp.exp(run.log_weights - jnp.max(run.log_weights))
        return found._replace(covers=are_still(run.positions, run.settled, weights))


jax.tree_util.register_dataclass(
    AnnealedImportanceSampling,
    data_fields=["betas", "kernel", "start", "data"],
    meta_fields=["num_levels", "num_chains", "num_steps", "sharding"],
)
