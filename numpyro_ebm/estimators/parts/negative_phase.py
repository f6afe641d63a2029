"""The negative phase, shared by the estimators that sample from the model: its tuning, its health and the contrast."""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, LogDensityFn, Position, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import FOR_DISCRETE, AbstractEstimator
from numpyro_ebm.estimators.parts.chain_options import check_by_member, check_scale_option, check_step_size
from numpyro_ebm.estimators.parts.health import CONDITIONS, NegativePhaseHealth, Observed, Policy, examine, tell, unknown
from numpyro_ebm.estimators.parts.moves import check_scale
from numpyro_ebm.estimators.parts.positive_phase import PositivePhase, check_positive_phase
from numpyro_ebm.estimators.parts.scales import Spread, in_scale, next_log_scale, out_of_scale, widest_step
from numpyro_ebm.estimators.parts.starts import Start, over
from numpyro_ebm.estimators.state import ChainState
from numpyro_ebm.kernels import MALA, AbstractKernel, chains
from numpyro_ebm.kernels.averaging import averaging_of, mean_step, next_averaging
from numpyro_ebm.kernels.densities import keep
from numpyro_ebm.kernels.names import kernel_of, resolve_kernel


class Phase(NamedTuple):
    """Outcome of one update's negative phase.

    Attributes:
        ended: positions of the chains, as the kernel moves them.
        health: figures and conditions.
        lost: ``(num_chains,)``, which chains are lost.
        log_factor: log factor of each chain's own step size, or None.
        score: gradients of the log density at the ends, ``(num_chains, ...)``, if the scales adapt to them, or None.
    """

    ended: Position
    health: NegativePhaseHealth
    lost: Bool[Array, " chains"]
    log_factor: Float[Array, " chains"] | None
    score: Shaped[Array, " chains *position"] | None


@dataclasses.dataclass(frozen=True)
class ChainEstimator(AbstractEstimator):
    """An estimator with a negative phase; subclasses define where its chains start and what it keeps of them.

    State, in the mutable site ``"<site>$<name>"``: `ChainState`.

    Attributes:
        paces_rows: whether rows of different densities have step sizes of their own, which follow their chains. A step size
            that depends on the chain's past leaves no distribution invariant until it settles, so this is off if chains
            start from the data's distribution to see how they leave it.
        positive_phase: how elements that rows lack are drawn before the negative phase; None for complete rows.
    """

    role = "gradient"
    is_persistent = True
    num_steps: int = 1
    kernel: Any = None
    adapt_step_size: bool | None = None
    step_size_schedule: Callable[[Int[Array, ""]], Any] | None = None
    temperature: Any = None
    energy_l2: float = 0.0
    on_unhealthy: Policy = "warn"
    scale: Any = "auto"
    paces_rows: ClassVar[bool] = False
    # Without an annotation it is no field, and the field of a subclass comes after all others.
    positive_phase = cast(PositivePhase | None, None)

    @property
    def takes_missing(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a positive phase draws what rows lack."""
        return self.positive_phase is not None

    def __post_init__(self):
        name = type(self).__name__
        check_count(name, "num_steps", self.num_steps)
        if self.kernel is not None:
            is_discrete = None if self.takes_discrete else False  # None: not known yet
            kernel = resolve_kernel(self.kernel, is_discrete=is_discrete, otherwise=FOR_DISCRETE)
            object.__setattr__(self, "kernel", kernel)
        if self.on_unhealthy not in get_args(Policy):
            raise EnergyError(
                f"Unknown on_unhealthy={self.on_unhealthy!r}. {nearest(str(self.on_unhealthy), get_args(Policy))}"
            )
        if is_concrete(self.energy_l2) and not (np.isfinite(self.energy_l2) and self.energy_l2 >= 0):
            raise EnergyError(f"{name} needs energy_l2 >= 0; got {self.energy_l2!r}. Write energy_l2=0.1.")
        likely = MALA() if self.kernel is None else self.kernel
        check_step_size(name, likely, adapt_step_size=self.adapt_step_size, schedule=self.step_size_schedule)
        check_scale_option(name, likely, self.scale)
        self._temperatures()
        check_positive_phase(name, self.positive_phase)

    def bind(self, distribution: EventDistribution) -> "ChainEstimator":
        """Return the estimator with a kernel: the default is "mala", and "gibbs" where the support is discrete."""
        if self.kernel is not None:
            return self
        return dataclasses.replace(self, kernel=kernel_of(None, distribution, usual="mala"))

    def check(self, site: Site) -> None:
        """Check that the kernel fits the support and the scales fit the event, and raise otherwise."""
        super().check(site)
        kernel_of(self.kernel, site.distribution, usual="mala", otherwise=FOR_DISCRETE).bind(site.distribution)
        if site.distribution.is_mixed:
            steps = {"adapt_step_size": self.adapt_step_size, "schedule": self.step_size_schedule}
            check_by_member(self.kernel, scale=self.scale, **steps)
        if not isinstance(self.scale, str):
            check_scale(site, "scale", self.scale)
        if self.positive_phase is not None:
            self.positive_phase.check(site)

    @abc.abstractmethod
    def begin(self, rng_key: PRNGKey, site: Site, state: ChainState, kernel: AbstractKernel) -> Start:
        """Return where this update's chains start."""

    @abc.abstractmethod
    def fresh(
        self, rng_key: PRNGKey, site: Site, num_chains: int
    ) -> tuple[Shaped[Array, " {num_chains} *position"], PyTree]:
        """Return unconstrained positions, with contexts and bases, for chains that restart."""

    def keep(self, state: ChainState, site: Site, start: Start, ended: Position, lost: Bool[Array, " chains"]) -> ChainState:
        """Return the state with what the next update needs of the chains; lost chains have just restarted."""
        return state

    def init(self, rng_key: PRNGKey, site: Site) -> ChainState:
        """Return the state before the first update."""
        shape = site.position.shape[1:]
        zeros = jnp.zeros(shape, float)
        return ChainState(
            health=unknown(self.kernel, shape),
            num_updates=jnp.zeros((), jnp.int32),
            spread=Spread(zeros, zeros),
            averaging=averaging_of(self.kernel) if self._adapts else None,
            log_scale=zeros if self._scales(site) else None,
            positive=None if self.positive_phase is None else self.positive_phase.init(site.distribution),
        )

    def begun(self, rng_key: PRNGKey, site: Site) -> Site:
        """Return the rows from which persistent chains may start, with draws that ignore the energy for what they lack."""
        return site if self.positive_phase is None else self.positive_phase.start(rng_key, site)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: ChainState) -> tuple[RowValues, ChainState]:
        """Return each row's log density minus that of the negatives, unnormalised: log Z cancels in the gradient."""
        key_start, key_chains = jax.random.split(rng_key)
        site, state = self._completed(rng_key, site, state)
        kernel = self.tuned(site, state)
        start = self.begin(key_start, site, state, kernel)
        negatives, state = self.update(key_chains, site, state, kernel, start)
        return self.contrast(site, negatives, start.local, paired=start.paired), state

    def _completed(self, rng_key: PRNGKey, site: Site, state: ChainState) -> tuple[Site, ChainState]:
        """Return the rows with what they lack drawn given the rest, and the state of these draws."""
        if self.positive_phase is None or state.positive is None or site.missing is None:
            return site, state
        # Not split off, so that rows that lack nothing leave the draws of all other keys as they are.
        key_start, key_draws = jax.random.split(jax.random.fold_in(rng_key, 1))
        started = self.positive_phase.start(key_start, site)
        seen = state._replace(spread=state.spread.then(Spread.of(started), state.num_updates))
        site, positive = self.positive_phase.complete(
            key_draws, site, started.position, state.positive, self._scale(seen), or_one(seen.spread.sd)
        )
        return site, state._replace(positive=positive)

    def update(
        self, rng_key: PRNGKey, site: Site, state: ChainState, kernel: AbstractKernel, start: Start
    ) -> tuple[Shaped[Array, " chains *position"], ChainState]:
        """Move the chains; return their ends in unconstrained space, and the state with health and next step size."""
        key_chains, key_reset = jax.random.split(rng_key)
        num_updates = state.num_updates
        state = state._replace(spread=state.spread.then(Spread.of(site), num_updates))
        phase = self.negative_phase(key_chains, site, state, kernel, start)
        ended, lost = phase.ended, phase.lost
        if self.on_unhealthy == "reset":
            ended = self.replaced(key_reset, site, kernel, ended, lost)
        else:
            lost = jnp.zeros_like(lost)
        start = start._replace(log_factor=phase.log_factor)
        state = self.keep(state, site, start, ended, lost)._replace(health=phase.health, num_updates=num_updates + 1)
        if state.averaging is not None:
            state = state._replace(averaging=self._adapt(state, kernel))
        if state.log_scale is not None and phase.score is not None:
            log_scale = next_log_scale(state.log_scale, state.spread.sd, phase.score, num_updates)
            state = state._replace(log_scale=log_scale)
        return jax.vmap(kernel.lower)(ended), state

    def notes(self) -> tuple[str, ...]:
        """Return notes on a penalty, a temperature and an unadjusted kernel, which change what is estimated."""
        notes = []
        if self.energy_l2 != 0:
            notes.append(f"energy_l2={self.energy_l2}: the maximised objective includes a penalty on both energies")
        temperatures = self._temperatures()
        if temperatures is not None and temperatures[-1] != 1:
            notes.append(
                f"the chains end at temperature {float(temperatures[-1]):.3g}: their distribution is p^(1/T), not p"
            )
        if self.kernel is not None and not self.kernel.is_exact:
            notes.append(f"the kernel '{self.kernel.name}' never rejects: the energy carries the bias of its step size")
        return tuple(notes)

    def negative_phase(self, rng_key: PRNGKey, site: Site, state: ChainState, kernel: AbstractKernel, start: Start) -> Phase:
        """Run this update's chains; estimators whose chains carry a derivative override this method."""
        return self.run_chains(rng_key, site, state, kernel, start)

    def run_chains(self, rng_key: PRNGKey, site: Site, state: ChainState, kernel: AbstractKernel, start: Start) -> Phase:
        """Run the chains with the parameters cut off from differentiation."""
        lower = jax.vmap(kernel.lower)
        start = start._replace(position=kernel.as_positions(start.position))
        first = jax.tree.map(lambda leaf: leaf[0], (lower(start.position), start.local))
        known = site.distribution.known
        log_density = keep(freeze(site.log_density, *first), None if known is None else known.frozen())
        owner = f"At site '{site.name}', estimator '{self.name}'"
        follows_score = state.log_scale is not None

        @jax.jit  # one program even if the model runs outside jit, as in svi.init
        def run(rng_key, kernel, position, local, pace, data, data_local, state):
            scale = self._scale(state)
            advanced, stayed = self.advance(rng_key, kernel, log_density, position, local, scale, pace)
            ended, pace = advanced.positions, advanced.pace
            score = jax.vmap(log_density)
            end = lower(ended)
            seen = Observed(
                chains=advanced.health,
                start=lower(position),
                end=end,
                stayed=stayed,
                num_steps=self.num_steps,
                spread=state.spread,
                log_density_end=score(end, local),
                log_density_data=score(data, data_local),
                step_size=kernel.step_size if pace is None else mean_step(kernel, pace),
                is_adjusted=kernel.target_acceptance is not None,
                is_discrete=kernel.is_discrete,
                continuous=kernel.continuous,
                num_updates=state.num_updates,
            )
            examined, lost = examine(state.health, seen, log_density, local)
            gradient = None
            if follows_score:
                gradient = advanced.gradient
                if gradient is None:  # this kernel does not keep it
                    gradient = jax.vmap(jax.grad(log_density))(end, local)
            factor = None if pace is None else pace.log_factor
            return Phase(ended, tell(examined, self.on_unhealthy, owner), lost, factor, gradient)

        pace = self._pace(site, state, kernel, start)
        outer = state._replace(averaging=None, pool=None, positive=None)
        data = kernel.as_positions(site.position)
        inputs = (start.position, start.local, pace, data, site.local, outer)
        return jax.lax.stop_gradient(run(rng_key, kernel, *jax.lax.stop_gradient(inputs)))

    def advance(
        self,
        rng_key: PRNGKey,
        kernel: AbstractKernel,
        log_density: LogDensityFn,
        position: Position,
        local: PyTree,
        scale: Float[Array, "..."] | None,
        pace: chains.Pace | None = None,
    ) -> tuple[chains.Advanced, Bool[Array, " chains"]]:
        """Move the chains, in scaled coordinates, by the estimator's steps and temperatures.

        Returns:
            The ends of the chains, and whether each chain ended where it started, in its continuous coordinates if it has
            others as well.
        """

        def scaled(position, local):
            return log_density(out_of_scale(scale, position), local)

        began = in_scale(scale, position)
        advanced = chains.advance(
            rng_key,
            kernel,
            log_density if scale is None else scaled,
            began,
            local,
            num_steps=self.num_steps,
            temperatures=self._temperatures(),
            pace=pace,
        )
        lower = jax.vmap(kernel.lower)
        is_same = lower(began) == lower(advanced.positions)
        is_same = is_same if kernel.continuous is None else is_same[:, kernel.continuous]
        still = jnp.all(is_same, axis=tuple(range(1, is_same.ndim)))
        gradient = None if advanced.gradient is None else in_scale(scale, advanced.gradient)
        return advanced._replace(positions=out_of_scale(scale, advanced.positions), gradient=gradient), still

    def contrast(
        self, site: Site, negatives: Shaped[Array, " chains *position"], local: PyTree, *, paired: bool
    ) -> RowValues:
        """Return each row's log density minus that of its own negative, or minus the mean over all negatives."""
        ours = self._penalised(site, site.position, site.local, 1.0)
        theirs = self._penalised(site, negatives, local, -1.0)
        return ours - (theirs if paired else jnp.mean(theirs))

    def tuned(self, site: Site, state: ChainState) -> AbstractKernel:
        """Return the kernel with the step size of this update."""
        kernel = self.kernel.bind(site.distribution)
        if self.step_size_schedule is not None:
            return kernel.adapted(step_size=jnp.asarray(self.step_size_schedule(state.num_updates), float))
        if state.averaging is not None:
            return kernel.adapted(step_size=jnp.exp(state.averaging.log_step_size))
        return kernel

    @property
    def _adapts(self) -> bool:
        if self.adapt_step_size is None:
            return self.kernel.target_acceptance is not None and self.step_size_schedule is None
        return self.adapt_step_size

    def _scales(self, site: Site) -> bool:
        """Return whether the scales of the dimensions adapt."""
        if not isinstance(self.scale, str):
            return False
        has_metric = getattr(self.kernel, "inverse_mass_matrix", None) is not None
        if self.kernel.is_discrete or site.distribution.is_mixed:
            return False
        return self.scale == "data" or (self._adapts and not has_metric and math.prod(site.position.shape[1:]) > 1)

    def _scale(self, state: ChainState) -> Float[Array, "..."] | None:
        """Return the lengths in which positions are measured, per dimension; None for 1."""
        if state.log_scale is None:
            return None if self.scale is None or isinstance(self.scale, str) else jnp.asarray(self.scale, float)
        of_data = jnp.log(or_one(state.spread.sd))
        log_scale = jnp.where(state.num_updates == 0, of_data, state.log_scale)
        return jnp.exp(log_scale - jnp.mean(log_scale) if self.scale == "auto" else log_scale)

    def _pace(self, site: Site, state: ChainState, kernel: AbstractKernel, start: Start) -> chains.Pace | None:
        """Return the chains' own step sizes if rows have their own densities and the step size adapts; None otherwise."""
        if not (self.paces_rows and self._adapts and site.local is not None):
            return None
        num_chains = jax.tree.leaves(start.position)[0].shape[0]
        log_factor = jnp.zeros(num_chains, float) if start.log_factor is None else start.log_factor
        age = jnp.zeros(num_chains, jnp.int32) if start.age is None else start.age
        largest = (jnp.log(self._widest(state, kernel)) - jnp.log(kernel.step_size)) / (2 * kernel.step_exponent)
        return chains.Pace(log_factor, age, largest)

    def _widest(self, state: ChainState, kernel: AbstractKernel) -> Scalar:
        """Return the largest step size that adaptation allows."""
        spread = or_one(in_scale(self._scale(state), state.spread.sd))
        spread = spread if kernel.continuous is None else spread[kernel.continuous]
        return widest_step(self.kernel, kernel.step_exponent, spread)

    def _adapt(self, state: ChainState, kernel: AbstractKernel) -> Any:
        """Take one step of dual averaging on the chains' mean acceptance, with the step size bounded by `_widest`."""
        health = state.health
        updated = next_averaging(state.averaging, kernel, health.acceptance_rate)
        largest = jnp.log(self._widest(state, kernel))
        updated = updated._replace(log_step_size=jnp.minimum(updated.log_step_size, largest))
        if self.on_unhealthy != "reset":
            return updated
        collapsed = health.conditions[list(CONDITIONS).index("collapse")]
        return jax.tree.map(lambda old, new: jnp.where(collapsed, old, new), averaging_of(self.kernel), updated)

    def replaced(
        self, rng_key, site: Site, kernel: AbstractKernel, ended: Position, lost: Bool[Array, " chains"]
    ) -> Position:
        """Return the ends of the chains, with fresh starts in place of lost chains."""
        fresh = kernel.lift_all(self.fresh(rng_key, site, lost.shape[0])[0])
        return jax.tree.map(lambda new, old: jnp.where(over(lost, old), new, old), fresh, ended)

    def _penalised(
        self, site: Site, positions: Shaped[Array, " chains *position"], local: PyTree, sign: float
    ) -> Float[Array, " chains"]:
        """Return log densities, with `energy_l2` minus ``sign * energy_l2 * E(x)^2``."""
        values = jax.vmap(site.log_density)(positions, local)
        if is_concrete(self.energy_l2) and self.energy_l2 == 0:
            return values
        context = None if local is None else local[0]
        energies = jax.vmap(lambda z, row: site.distribution.evaluate_energy(site.distribution.constrain(z), row))
        return values - sign * self.energy_l2 * energies(positions, context) ** 2

    def _temperatures(self) -> Float[Array, " {self.num_steps}"] | None:
        if self.temperature is None:
            return None
        schedule: Any = self.temperature if callable(self.temperature) else lambda _: self.temperature
        with jax.ensure_compile_time_eval():
            values = np.asarray([float(schedule(i)) for i in range(self.num_steps)])
        if not (np.all(np.isfinite(values)) and np.all(values > 0)):
            raise EnergyError(
                f"{type(self).__name__} needs temperatures > 0; got {values}. Write temperature=1.0, or a schedule of the "
                f"transition's index such as optax.linear_schedule(5.0, 1.0, {self.num_steps - 1})."
            )
        return jnp.asarray(values, float)
