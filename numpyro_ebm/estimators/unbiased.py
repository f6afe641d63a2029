"""Maximum likelihood with a negative phase that is unbiased for chains of any length."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.callbacks import Told, call_where_any
from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError, UnhealthyChainsError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, LogDensityFn, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import FOR_DISCRETE, AbstractEstimator
from numpyro_ebm.estimators.parts.starts import check_start, draw_rows, draw_start
from numpyro_ebm.kernels import MALA, Gibbs
from numpyro_ebm.kernels.coupling import Meeting, check_coupling, unbiased_sum
from numpyro_ebm.kernels.densities import keep
from numpyro_ebm.kernels.names import resolve_kernel

FIX_CONTINUOUS = (
    "a step_size nearer to its optimum (acceptance about 0.6), or a start nearer to the model, e.g. start='data': where the "
    "gradient is large compared with 1 / step_size, a chain rejects for a long time."
)
FIX_DISCRETE = (
    "or estimate(model, 'pcd'): elements that depend on each other strongly, as in an ordered phase, keep two chains apart "
    "for a time that grows exponentially with their number."
)


class UnbiasedState(NamedTuple):
    """Figures of the pairs of chains in the last update.

    Attributes:
        meeting_time: transitions until a pair met, averaged over the pairs.
        max_meeting_time: the longest meeting time.
        acceptance_rate: mean acceptance probability of the chains.
        num_updates: updates so far.
    """

    meeting_time: Float[Array, "*batch"]
    max_meeting_time: Int[Array, "*batch"]
    acceptance_rate: Float[Array, "*batch"]
    num_updates: Int[Array, "*batch"]

    @property
    def chains(self) -> None:
        """None, since pairs of chains have no health."""
        return

    def figures(self) -> dict[str, Any]:
        """Return all attributes by name."""
        return self._asdict()


@dataclasses.dataclass(frozen=True)
class UnbiasedMaximumLikelihood(AbstractEstimator):
    r"""Unbiased maximum likelihood by coupled chains (Jacob et al.; Qiu et al.'s unbiased contrastive divergence).

    Pairs of chains with lag one run until they meet. With :math:`\tau` their meeting time, k = ``burn_in``,
    m = ``num_steps`` and h the derivative of the log density in the parameters,

    .. math::
        H_{k:m} = \frac{1}{m-k+1} \sum_{t=k}^{m} h(X_t)
            + \sum_{t=k+1}^{\tau-1} \min\left(1, \frac{t-k}{m-k+1}\right) (h(X_t) - h(Y_{t-1}))

    has exactly the expectation of h under the model, wherever the chains start and however short they are. The expected
    gradient is therefore that of the log likelihood, and variance takes the place of bias. As a rule, with k well above
    typical meeting times and m several times k, the variance is little more than that of a long chain. Memory does not grow
    with the length. The value is an energy gap and means nothing as an objective. Discrete chains meet after a few sweeps
    where elements depend on each other weakly; in an ordered phase the time grows exponentially with their number.

    State, in the mutable site ``"<site>$unbiased"``: `UnbiasedState`.

    Args:
        kernel: "mala" or "hmc", or `MALA` or `HMC` with its settings; on a discrete support, "gibbs" or
            `Gibbs`; None for "mala" and "gibbs". HMC is followed by one MALA step of half its ``step_size`` squared, by
            which the chains meet (see `coupling.coupled_step`).
        coupling: coupling of the proposals, "reflection" or "maximal" (see `coupling.couple_noise`); None for "reflection".
            Gibbs draws each element of both chains by a maximal coupling (see `coupled_gibbs.coupled_gibbs`).
        burn_in: k, transitions before the time average.
        num_steps: m, the last transition of the time average; chains run longer only where they have not met.
        max_num_steps: number of transitions within which every pair must meet.
        num_chains: pairs of chains, independent of the batch size; None for as many as there are rows.
        start: where both chains of a pair start: "base" (the energy's base; without one, a standard normal in unconstrained
            space, or uniform draws of discrete events), "data" (rows of the batch), or a NumPyro distribution of one event,
            which is drawn from twice.

    Raises:
        EnergyError: for settings that are not ``burn_in <= num_steps <= max_num_steps``, an unknown kernel or coupling, a
            kernel that does not fit the support, a start of another event shape or support, ``num_chains`` with rows that
            have a context or a base of their own (each has its own pair), and pairs that have not met after
            ``max_num_steps``, since stopping them there would bias the gradient. Inside ``jit``, JAX raises the last one as
            ``jax.errors.JaxRuntimeError``.

    Example:
        ``estimate(model, "unbiased", kernel=ebm.MALA(step_size=0.2), burn_in=20, num_steps=100)``, or
        ``estimate(model, "unbiased")`` with ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Jacob, O'Leary and Atchade, Unbiased Markov chain Monte Carlo methods with couplings (2020); Qiu, Zhang and Wang,
        Unbiased contrastive divergence algorithm for training energy-based latent variable models (2020); Heng and Jacob,
        Unbiased Hamiltonian Monte Carlo with couplings (2019).
    """

    name = "unbiased"
    role = "gradient"
    is_persistent = True
    takes_discrete = True
    kernel: Any = None
    coupling: str | None = None
    burn_in: int = 10
    num_steps: int = 50
    max_num_steps: int = 1000
    num_chains: int | None = None
    start: Any = "base"

    def __post_init__(self):
        for name, minimum in (("burn_in", 0), ("num_steps", 0), ("max_num_steps", 1)):
            check_count("UnbiasedMaximumLikelihood", name, getattr(self, name), minimum)
        if not self.burn_in <= self.num_steps <= self.max_num_steps:
            raise EnergyError(
                "UnbiasedMaximumLikelihood needs burn_in <= num_steps <= max_num_steps; got "
                f"burn_in={self.burn_in}, num_steps={self.num_steps}, max_num_steps={self.max_num_steps}. "
                "Write burn_in=10, num_steps=50, max_num_steps=1000."
            )
        if self.num_chains is not None:
            check_count("UnbiasedMaximumLikelihood", "num_chains", self.num_chains)
        if self.kernel is not None:
            object.__setattr__(self, "kernel", resolve_kernel(self.kernel, is_discrete=None))
        check_coupling(MALA() if self.kernel is None else self.kernel, self.coupling)

    def bind(self, distribution: EventDistribution) -> "UnbiasedMaximumLikelihood":
        """Return the estimator with a kernel and a coupling: by default MALA and "reflection", and Gibbs where discrete."""
        is_discrete = distribution.is_discrete
        kernel = self.kernel if self.kernel is not None else Gibbs() if is_discrete else MALA()
        return dataclasses.replace(
            self, kernel=kernel, coupling=self.coupling or ("maximal" if is_discrete else "reflection")
        )

    def check(self, site: Site) -> None:
        """Refuse a kernel and a start that do not fit the event, and a number of pairs where each row has its own pair."""
        super().check(site)
        kernel = self.bind(site.distribution).kernel
        resolve_kernel(kernel, is_discrete=site.distribution.is_discrete, otherwise=FOR_DISCRETE).bind(site.distribution)
        check_start(self.start, site)
        if site.local is not None and self.num_chains is not None:
            raise EnergyError(
                "Rows with a context or a base of their own have one pair of chains each; got "
                f"num_chains={self.num_chains}. Write num_chains=None."
            )

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return zeros, before any pair has met."""
        zero = jnp.zeros((), float)
        return UnbiasedState(zero, jnp.zeros((), jnp.int32), zero, jnp.zeros((), jnp.int32))

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log density of each row minus a term whose gradient is the unbiased negative phase."""
        key_start, key_chains = jax.random.split(rng_key)
        starts = jax.lax.stop_gradient(self._starts(key_start, site))
        bound = self.bind(site.distribution)
        with eager():  # the backward pass of rows with a context runs in another trace
            bound = dataclasses.replace(bound, kernel=bound.kernel.bind(site.distribution))
        negative_phase = _shared if site.local is None else _row_by_row
        negative, meeting = negative_phase(bound, key_chains, site, starts)
        meeting = jax.lax.stop_gradient(meeting)
        is_met = meeting.is_met if site.local is None or site.mask is None else meeting.is_met | ~site.mask
        self._raise_unmet(site, is_met, meeting.acceptance_rate)
        values = jax.vmap(site.log_density)(site.position, site.local) - negative
        state = UnbiasedState(
            meeting_time=jnp.mean(meeting.meeting_time, dtype=float),
            max_meeting_time=jnp.max(meeting.meeting_time),
            acceptance_rate=meeting.acceptance_rate,
            num_updates=state.num_updates + 1,
        )
        # As a factor, NaN makes the gradient NaN as well.
        return values * jnp.where(jnp.all(is_met), 1.0, jnp.nan).astype(values.dtype), state

    def simulate(
        self,
        rng_key: PRNGKey,
        log_density: LogDensityFn,
        starts: Shaped[Array, "pairs 2 *position"],
        local: PyTree,
        add: Callable,
        gradient: PyTree,
    ) -> tuple[Float[Array, " pairs"], PyTree, Meeting]:
        """Run the pairs, and return the unbiased log density of each, the total that ``add`` sums, and how they met."""

        def add_both(total, pairs, weights):
            values, gradient = total
            terms = jnp.where(weights == 0, 0.0, weights * pairs.logdensity)
            return values + jnp.sum(terms, axis=1), add(gradient, pairs.position, weights)

        settings = {name: getattr(self, name) for name in ("coupling", "burn_in", "num_steps", "max_num_steps")}
        total = (jnp.zeros(starts.shape[0], float), gradient)
        total, meeting = unbiased_sum(rng_key, self.kernel, log_density, starts, local, add_both, total, **settings)
        return *total, meeting

    def _starts(self, rng_key, site: Site) -> Shaped[Array, "pairs 2 *position"]:
        """Draw X_0 and Y_0 of each pair, ``(num_pairs, 2, ...)``, independent and identically distributed."""
        keys = jax.random.split(rng_key)
        if self.num_chains is None:  # given its row, a start is a fixed point or a draw of the row's own base
            return jnp.stack([draw_rows(self.start, key, site)[0] for key in keys], axis=1)
        return jnp.stack([draw_start(self.start, key, site, self.num_chains)[0] for key in keys], axis=1)

    def _raise_unmet(self, site: Site, is_met: Bool[Array, " pairs"], acceptance_rate: Scalar) -> None:
        fix = FIX_DISCRETE if site.distribution.is_discrete else FIX_CONTINUOUS
        complain = Told(_complain, (site.name, is_met.size, self.max_num_steps, fix))
        is_any = ~jnp.all(is_met)
        figures = (jnp.sum(~is_met), acceptance_rate)
        if not is_concrete(is_any, figures):
            call_where_any(complain, is_any[None], figures)
        elif is_any:
            complain(is_any, figures)


def _complain(
    name: str, num_pairs: int, max_num_steps: int, fix: str, _: Bool[Array, "..."], figures: tuple[Int[Array, ""], Scalar]
) -> NoReturn:
    num_unmet, rate = figures
    raise UnhealthyChainsError(
        f"At site '{name}': {int(num_unmet)} of {num_pairs} pairs of chains had not met after max_num_steps={max_num_steps} "
        f"transitions (acceptance {float(rate):.2f}), and stopping them there would bias the gradient. Write a larger "
        f"max_num_steps, {fix}"
    )


def _shared(
    estimator: UnbiasedMaximumLikelihood, rng_key, site: Site, starts: Shaped[Array, "pairs 2 *position"]
) -> tuple[Scalar, Meeting]:
    """Return the mean over pairs for one density of all rows, as a linear form in the density's parameters."""
    density, constants = jax.closure_convert(lambda x: site.log_density(x), starts[0, 0])
    frozen = jax.lax.stop_gradient(constants)

    def weighted(constants, positions, weights):
        values = jax.vmap(jax.vmap(lambda x: density(x, *constants)))(positions)
        return jnp.sum(weights * values) / starts.shape[0]

    @jax.jit  # one program also where the model runs outside jit, as in svi.init
    def run(rng_key, starts, frozen):
        def add(gradient, positions, weights):
            return _plus(gradient, jax.grad(weighted)(frozen, positions, weights))

        zeros = jax.tree.map(jnp.zeros_like, frozen)
        known = site.distribution.known
        chains = keep(lambda x, _: density(x, *frozen), None if known is None else known.frozen())
        return estimator.simulate(rng_key, chains, starts, None, add, zeros)

    values, gradient, meeting = jax.lax.stop_gradient(run(rng_key, starts, frozen))
    linear = [jnp.sum(g * (c - f)) for g, c, f in zip(gradient, constants, frozen, strict=True)]
    return jnp.mean(values) + sum(linear), meeting


def _row_by_row(
    estimator: UnbiasedMaximumLikelihood, rng_key, site: Site, starts: Shaped[Array, "{site.num_rows} 2 *position"]
) -> tuple[RowValues, Meeting]:
    """Return one value per row. The rows' weights are known only in the backward pass, so the chains run again there."""
    floats, others, join = _split(site.local)
    density, constants = jax.closure_convert(
        site.log_density, *jax.tree.map(lambda leaf: leaf[0], (starts[:, 0], site.local))
    )

    def simulate(rng_key, starts, others, constants, floats, row_weights):
        local = join(floats, others)

        def weighted(variables, positions, weights):
            constants, floats = variables
            pair_density = jax.vmap(lambda x, row: density(x, row, *constants), in_axes=(0, None))
            return jnp.sum(weights * jax.vmap(pair_density)(positions, join(floats, others)))

        def add(gradient, positions, weights):
            if row_weights is None:
                return gradient
            return _plus(gradient, jax.grad(weighted)((constants, floats), positions, row_weights[:, None] * weights))

        zeros = jax.tree.map(jnp.zeros_like, (constants, floats))
        return estimator.simulate(rng_key, lambda x, row: density(x, row, *constants), starts, local, add, zeros)

    run: Any = jax.jit(simulate)

    @jax.custom_vjp
    def negative(rng_key, starts, others, constants, floats):
        values, _, meeting = run(rng_key, starts, others, constants, floats, None)
        return values, meeting

    def forward(*inputs):
        return negative(*inputs), inputs

    def backward(inputs, cotangents):
        _, gradient, _ = run(*inputs, cotangents[0])
        return None, None, None, *gradient

    negative.defvjp(forward, backward)
    return negative(rng_key, starts, others, constants, floats)


def _plus(total: PyTree, new: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, total, new)


def _split(tree: PyTree) -> tuple[list[Array], list[Array], Callable[[list[Array], list[Array]], PyTree]]:
    """Return the leaves that can be differentiated, the others, and a function that joins them again."""
    leaves, treedef = jax.tree.flatten(jax.tree.map(jnp.asarray, tree))
    is_float = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    floats = [leaf for leaf, own in zip(leaves, is_float, strict=True) if own]
    others = [leaf for leaf, own in zip(leaves, is_float, strict=True) if not own]

    def join(floats, others):
        supplies = {True: iter(floats), False: iter(others)}
        return jax.tree.unflatten(treedef, [next(supplies[own]) for own in is_float])

    return floats, others, join
