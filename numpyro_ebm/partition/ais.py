"""Annealed importance sampling."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.partition._annealing import Levels, anneal, default_kernel, exact_kernel, pilot
from numpyro_ebm.partition._base import AbstractPartition, Bound, Densities, Estimate, from_log_weights
from numpyro_ebm.partition._start import are_still

PILOT_CHAINS = 32
NUM_LEVELS = 1000


@dataclasses.dataclass(frozen=True)
class AnnealedImportanceSampling(AbstractPartition):
    r"""Annealed importance sampling: chains that go from a known law to the target, and weigh what they pass.

    Between the start ``q`` and the target lie ``q(x)^{1 - beta} \tilde p(x)^beta`` for ``0 = beta_0 < ... < beta_K = 1``. A
    chain starts at a draw of ``q``; from each level to the next its log weight grows by
    ``(beta_k - beta_{k-1}) log(\tilde p(x) / q(x))``, and then a kernel that leaves level k invariant moves it. Whatever the
    chains' mixing, ``E[w] = Z``, so that the log of the mean weight is below log Z in the mean (by Jensen's inequality):

    .. math:: \log \hat Z = \log \frac 1n \sum_i w_i, \qquad E[\log \hat Z] \le \log Z

    The levels lie where a pilot run of 32 chains found that the log weights gain equal standard deviations. Each has the
    step size at which the pilot had the kernel's optimal acceptance, and the variances of the pilot's chains for a diagonal
    mass matrix; all are fixed before the chains that count begin. The cost is ``num_chains * num_levels * num_steps``
    transitions, and a tenth of that for the pilot and for the fit of the start at the default settings. A small ``ess`` says
    that the levels are too few, or that modes of the target were found by few chains.

    Args:
        num_levels: how many levels the pilot places; None for 1000.
        betas: the levels themselves in its place, increasing from 0 to 1.
        num_chains: chains, each with one weight.
        kernel: a name or a kernel, which has to be exact; None for `DynamicHMC` of up to 5 steps, and `Gibbs` where the
            support is discrete.
        num_steps: transitions at each level.
        start: the law at beta 0, a NumPyro distribution of one event; None for the energy's ``base``, and without one for a
            law fitted to ``data`` or, without these, to 64 chains that run under the target for 200 transitions (independent
            normals, a tenth of them three times as wide, and a tenth of a standard normal in unconstrained space), and for
            the uniform law of a discrete support. It has to cover the target: `log_partition` warns where chains do not stay
            where they came to from it, and of modes that no chain saw no figure tells.
        data: events to fit the start to, ``(num, *batch_shape, *event_shape)``: training rows, or draws of the target.

    Raises:
        EnergyError: for counts that are none, betas that do not increase from 0 to 1 or come beside ``num_levels``, an
            unknown or an unadjusted kernel, a start of another shape or support, data beside a start or a base.

    Example:
        ``log_partition(rng_key, distribution, method="ais", num_levels=2000)``

    References:
        Neal, Annealed importance sampling (2001); Salakhutdinov and Murray, On the quantitative analysis of deep belief
        networks (2008); Grosse, Maddison and Salakhutdinov, Annealing between distributions by averaging moments (2013).
    """

    name: ClassVar[str] = "ais"
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

    def __post_init__(self):
        owner = type(self).__name__
        for count in ("num_chains", "num_steps"):
            check_count(owner, count, getattr(self, count))
        self._check_levels(owner)
        if isinstance(self.kernel, str | AbstractKernel):
            object.__setattr__(self, "kernel", exact_kernel(owner, self.kernel))

    def _check_levels(self, owner: str) -> None:
        if self.num_levels is not None:
            check_count(owner, "num_levels", self.num_levels)
            if self.betas is not None:
                raise EnergyError(
                    f"{owner} got num_levels={self.num_levels} and betas, which are levels. Pass one of the two."
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
        """The chains that count, and those of the pilot."""
        return self.num_chains + PILOT_CHAINS

    def check(self, distribution):
        """Refuse a kernel that cannot move on the support."""
        super().check(distribution)
        default_kernel(self.kernel, distribution)

    def levels(self, rng_key: PRNGKey, densities: Densities, starts: Array) -> Levels:
        """Betas and step sizes, by the pilot run."""
        kernel = default_kernel(self.kernel, densities.distribution)
        levels = self.num_levels or NUM_LEVELS if self.betas is None else self.betas
        return pilot(rng_key, kernel, densities, starts[self.num_chains :], levels)

    def estimate(self, rng_key, densities, starts, draws) -> Estimate:
        """Log of the mean weight."""
        key_pilot, key_chains = jax.random.split(rng_key)
        levels = self.levels(key_pilot, densities, starts)
        kernel = default_kernel(self.kernel, densities.distribution)
        run = anneal(key_chains, kernel, densities, starts[: self.num_chains], levels, self.num_steps)
        found = from_log_weights(run.log_weights)
        if densities.distribution.is_discrete:
            return found
        weights = jnp.exp(run.log_weights - jnp.max(run.log_weights))
        return found._replace(covers=are_still(run.positions, run.settled, weights))


jax.tree_util.register_dataclass(
    AnnealedImportanceSampling,
    data_fields=["betas", "kernel", "start", "data"],
    meta_fields=["num_levels", "num_chains", "num_steps"],
)
