"""`ScoreDistribution`: a distribution that is given only by its score."""

from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped
from numpyro.distributions import constraints

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.numpyro_stack import at_scored_site
from numpyro_ebm._core.pytrees import dismantle
from numpyro_ebm._core.typing import Array, LogDensityFn, PyTree
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels import AbstractKernel
from numpyro_ebm.kernels.chain_sampler import ChainSampler

NO_DENSITY = (
    "A ScoreDistribution models the gradient of a log density and has no log density: a vector field need not be a "
    "gradient, and its integral is not known. Train it with estimate(model, 'dsm', sigma=0.1), 'ssm_vr' or "
    "'sm', and sample it with Langevin; for values declare an EnergyDistribution."
)


class ScoreDistribution(EventDistribution):
    r"""A score model at a ``numpyro.sample`` site: ``grad log p(x) = grad log base(x) + score(x)``, without an energy.

    It is trained by the estimators that need only the score ("sm", with the trace of its Jacobian, "ssm", "ssm_vr", "dsm",
    "multiscale_dsm", "lsd") and sampled by unadjusted Langevin, which needs no density. On a support other than the real
    line both work in unconstrained space: the score is pulled back through the transform, and the gradient of the log
    Jacobian is added.

    Args:
        score: ``score(event)``, or ``score(event, context)`` when there is a context. Maps ONE event of shape
            ``event_shape`` to the gradient of its log density, of the same shape: ``lambda x: -x`` for a standard normal.
        event_shape: shape of one event.
        context: covariates of each row, passed to the score: a pytree whose leaves lead with ``batch_shape``.
        batch_shape: shape of the rows that differ in context or base; for the default see `EnergyDistribution`.
        support: constraint of one event.
        base: a normalised distribution whose score is added, or None.
        sampler: ``sampler(rng_key, distribution, sample_shape)``, called by ``sample``; by default 1000 steps of
            ``langevin`` (step size 0.01), which suit a density of unit scale. For a score conditioned on the noise level:
            `AnnealedLangevin`, `ReverseSDE`, `ProbabilityFlow`.

    Raises:
        EnergyError: (a ValueError) from ``log_prob``; for a base or a context that does not fit, a score without the shape
            of the event (at its first use), and a kernel that needs a density.
        TypeError: if the score is not callable.

    Example:
        >>> import jax
        >>> d = ScoreDistribution(lambda x: -x, event_shape=(3,))
        >>> d.sample(jax.random.key(0), (2,)).shape
        (2, 3)

    References:
        Song and Kingma, How to train your energy-based models (2021), section 4.4; Song and Ermon, Generative modeling by
        estimating gradients of the data distribution (2019).
    """

    has_energy: ClassVar[bool] = False

    def __init__(
        self,
        score: Callable[..., Array],
        event_shape: tuple[int, ...] = (),
        *,
        context: PyTree = None,
        batch_shape: tuple[int, ...] | None = None,
        support: constraints.Constraint = constraints.real,
        base: dist.Distribution | None = None,
        sampler: Callable[..., Array] | None = None,
        validate_args: bool | None = None,
    ):
        if not callable(score):
            raise TypeError(f"ScoreDistribution needs a callable score; got {type(score).__name__}.")
        self._function_arrays, self._function_structure = dismantle(score)
        sampler = ChainSampler("langevin", num_warmup=0, num_steps=1000) if sampler is None else sampler
        super().__init__(event_shape, context, batch_shape, support, base, sampler, validate_args=validate_args)
        if not self.is_continuous:
            raise EnergyError(
                f"A score is a gradient; the support {self.support} is discrete. Declare an EnergyDistribution."
            )

    @property
    def score(self) -> Callable[..., Array]:
        """The score as passed to the constructor."""
        return self._function

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> NoReturn:
        """Raise, because a score has no log density.

        Raises:
            EnergyError: always, with the reason.
        """
        with at_scored_site():
            raise EnergyError(NO_DENSITY)

    def unconstrained_log_density(self, position: Shaped[Array, "*position"], local: PyTree = None) -> NoReturn:
        """Raise, because a score has no log density.

        Raises:
            EnergyError: always, with the reason.
        """
        raise EnergyError(NO_DENSITY)

    def unconstrained_score(self, position: Float[Array, "*position"], local: PyTree = None) -> Float[Array, "*position"]:
        """Return the score of one row at an unconstrained position, the gradient of the log Jacobian included."""
        if self._is_real:
            return self._total_score(position, local)
        event, pull_back = jax.vjp(self.constrain, position)
        return pull_back(self._total_score(event, local))[0] + jax.grad(self.log_jacobian)(position)

    def target(self, kernel: AbstractKernel) -> LogDensityFn:
        """Return a stand-in for the log density, for kernels that use only its gradient: 0, with the score as gradient.

        Raises:
            EnergyError: for a kernel that needs values of the log density.
        """
        if kernel.needs_density:
            raise EnergyError(f"The kernel '{kernel.name}' needs values of the log density. {NO_DENSITY}")

        @jax.custom_jvp
        def log_density(position, local):
            return jnp.zeros((), position.dtype)

        @log_density.defjvp
        def jvp(primals, tangents):
            position, local = primals
            return jnp.zeros((), position.dtype), jnp.sum(self.unconstrained_score(position, local) * tangents[0])

        return log_density

    def _total_score(self, event: Float[Array, "*event"], local: PyTree) -> Float[Array, "*event"]:
        context, base_parameters = local if local is not None else (None, None)
        result = self._call(self.score, event, context)
        if result.shape != self.event_shape:
            raise EnergyError(
                f"The score returned shape {result.shape} for one event of shape {self.event_shape}; it must return the "
                "event's shape. The library vectorises it over rows: write it for one event, e.g. score = lambda x: -x."
            )
        return result if self.base is None else result + jax.grad(self._log_base)(event, base_parameters)
