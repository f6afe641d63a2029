"""What the estimators that sample from the model share: the negative phase, its tuning, its health and the contrast."""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from blackjax.adaptation.step_size import dual_averaging_adaptation

from numpyro_ebm import chains
from numpyro_ebm._autodiff import freeze
from numpyro_ebm._errors import EnergyError, check_count, is_concrete, nearest
from numpyro_ebm._supports import check_same_support
from numpyro_ebm._typing import Array, Position, PRNGKey, PyTree
from numpyro_ebm.estimators import _health
from numpyro_ebm.estimators._base import FOR_BINARY_UNITS, AbstractEstimator, Site
from numpyro_ebm.kernels import MALA, AbstractKernel, resolve_kernel

WIDEST_MOVE = 10.0
"""The longest move, in standard deviations of the data, that an adapted step size grows to."""


class Start(NamedTuple):
    """Where the chains of one update begin.

    Attributes:
        position: as the kernel moves it (`AbstractKernel.lift`), leaves led by the number of chains.
        local: what each chain's density has of its own, or None.
        paired: whether there is one chain per row, of that row's own density.
        slots: where the chains are kept between updates, or None.
        age: transitions of each chain since it began, where chains are kept.
    """

    position: Position
    local: PyTree
    paired: bool = True
    slots: Array | None = None
    age: Array | None = None


@dataclasses.dataclass(frozen=True)
class ChainEstimator(AbstractEstimator):
    """The negative phase; each estimator says where its chains start and what it keeps of them.

    State, in the mutable site ``"<site>$<name>"``: ``health`` (`NegativePhaseHealth`), ``num_updates`` and, where the step
    size adapts, ``averaging`` (BlackJAX's dual averaging).
    """

    role = "gradient"
    is_persistent = True
    num_steps: int = 1
    kernel: Any = MALA()
    adapt_step_size: bool | None = None
    step_size_schedule: Callable[[Array], Any] | None = None
    temperature: Any = None
    energy_l2: float = 0.0
    on_unhealthy: _health.Policy = "warn"

    def __post_init__(self):
        name = type(self).__name__
        check_count(name, "num_steps", self.num_steps)
        object.__setattr__(self, "kernel", resolve_kernel(self.kernel, otherwise=FOR_BINARY_UNITS))
        if self.on_unhealthy not in get_args(_health.Policy):
            raise EnergyError(
                f"Unknown on_unhealthy={self.on_unhealthy!r}. {nearest(str(self.on_unhealthy), get_args(_health.Policy))}"
            )
        if is_concrete(self.energy_l2) and not (np.isfinite(self.energy_l2) and self.energy_l2 >= 0):
            raise EnergyError(f"{name} needs energy_l2 >= 0; got {self.energy_l2!r}. Write energy_l2=0.1.")
        self._check_step_size(name)
        self._temperatures()

    @abc.abstractmethod
    def begin(self, rng_key: PRNGKey, site: Site, state: PyTree, kernel: AbstractKernel) -> Start:
        """Where this update's chains begin."""

    @abc.abstractmethod
    def fresh(self, rng_key: PRNGKey, site: Site, num_chains: int) -> tuple[Array, PyTree]:
        """Unconstrained positions, and their locals, for chains that begin anew."""

    def keep(self, state: PyTree, site: Site, start: Start, ended: Position, lost: Array) -> PyTree:
        """The state with what the next update needs of the chains; lost ones have just begun anew."""
        return state

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Health, counters and step size before the first update."""
        state: dict[str, Any] = {"health": _health.unknown(self.kernel), "num_updates": jnp.zeros((), jnp.int32)}
        if self._adapts:
            state["averaging"] = averaging_of(self.kernel)
        return state

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[Array, PyTree]:
        """Log density of each row minus that of the negatives, unnormalised: log Z cancels in the gradient."""
        key_start, key_chains = jax.random.split(rng_key)
        kernel = self.tuned(site, state)
        start = self.begin(key_start, site, state, kernel)
        negatives, state = self.update(key_chains, site, state, kernel, start)
        return self.contrast(site, negatives, start.local, paired=start.paired), state

    def update(
        self, rng_key: PRNGKey, site: Site, state: PyTree, kernel: AbstractKernel, start: Start
    ) -> tuple[Array, PyTree]:
        """Where the chains ended, in unconstrained space, and the state with their health and the next step size."""
        key_chains, key_reset = jax.random.split(rng_key)
        ended, health, lost = self.negative_phase(key_chains, site, state, kernel, start)
        if self.on_unhealthy == "reset":
            ended = self._replace(key_reset, site, kernel, ended, lost)
        else:
            lost = jnp.zeros_like(lost)
        state = {**self.keep(state, site, start, ended, lost), "health": health, "num_updates": state["num_updates"] + 1}
        if self._adapts:
            state["averaging"] = self._adapt(state["averaging"], site, kernel, health)
        return jax.vmap(kernel.lower)(ended), state

    def notes(self) -> tuple[str, ...]:
        """A penalty, a temperature and an unadjusted kernel change what is estimated."""
        notes = []
        if self.energy_l2 != 0:
            notes.append(f"energy_l2={self.energy_l2}: a penalty on both energies is part of what was maximised")
        temperatures = self._temperatures()
        if temperatures is not None and temperatures[-1] != 1:
            notes.append(f"the chains end at temperature {float(temperatures[-1]):.3g}: their law is p^(1/T), not p")
        if not self.kernel.is_exact:
            notes.append(f"the kernel '{self.kernel.name}' never rejects: the energy carries the bias of its step size")
        return tuple(notes)

    def negative_phase(self, rng_key: PRNGKey, site: Site, state: PyTree, kernel: AbstractKernel, start: Start):
        """Move the chains under parameters cut off from differentiation.

        Returns:
            Where they ended (lifted), the `NegativePhaseHealth`, and which of them are lost.
        """
        lower = jax.vmap(kernel.lower)
        first = jax.tree.map(lambda leaf: leaf[0], (lower(start.position), start.local))
        log_density = freeze(site.log_density, *first)
        owner = f"At site '{site.name}', estimator '{self.name}'"

        @jax.jit  # one program also where the model runs outside jit, as in svi.init
        def run(rng_key, kernel, position, local, data, data_local, before, num_updates):
            ended, figures = chains.advance(
                rng_key,
                kernel,
                log_density,
                position,
                local,
                num_steps=self.num_steps,
                temperatures=self._temperatures(),
            )
            score = jax.vmap(log_density)
            end = lower(ended)
            seen = _health.Observed(
                chains=figures,
                start=lower(position),
                end=end,
                data=data,
                log_density_end=score(end, local),
                log_density_data=score(data, data_local),
                step_size=kernel.step_size,
                is_adjusted=kernel.target_acceptance is not None,
                num_updates=num_updates,
            )
            health, lost = _health.examine(before, seen, log_density, local)
            return ended, _health.tell(health, self.on_unhealthy, owner), lost

        inputs = (start.position, start.local, site.position, site.local, state["health"], state["num_updates"])
        return jax.lax.stop_gradient(run(rng_key, kernel, *jax.lax.stop_gradient(inputs)))

    def contrast(self, site: Site, negatives: Array, local: PyTree, *, paired: bool) -> Array:
        """Log density of each row minus that of its own negative, or minus the mean over all negatives."""
        ours = self._penalised(site, site.position, site.local, 1.0)
        theirs = self._penalised(site, negatives, local, -1.0)
        return ours - (theirs if paired else jnp.mean(theirs))

    def tuned(self, site: Site, state: PyTree) -> AbstractKernel:
        """The kernel with the step size of this update."""
        kernel = self.kernel.bind(site.distribution)
        if self.step_size_schedule is not None:
            return kernel.adapted(step_size=jnp.asarray(self.step_size_schedule(state["num_updates"]), float))
        if self._adapts:
            return kernel.adapted(step_size=jnp.exp(state["averaging"].log_step_size))
        return kernel

    @property
    def _adapts(self) -> bool:
        if self.adapt_step_size is None:
            return self.kernel.target_acceptance is not None and self.step_size_schedule is None
        return self.adapt_step_size

    def _adapt(self, averaging: Any, site: Site, kernel: AbstractKernel, health: _health.NegativePhaseHealth) -> Any:
        """One step of dual averaging on the mean acceptance of all chains; a flat energy cannot send the step off."""
        _, spread = _health.spread_of(site.position)
        widest = jnp.maximum(self.kernel.step_size, (WIDEST_MOVE * spread) ** (2 * kernel.step_exponent))
        updated = next_averaging(averaging, kernel, health.acceptance_rate)
        updated = updated._replace(log_step_size=jnp.minimum(updated.log_step_size, jnp.log(widest)))
        if self.on_unhealthy != "reset":
            return updated
        collapsed = health.conditions[list(_health.CONDITIONS).index("collapse")]
        return jax.tree.map(lambda old, new: jnp.where(collapsed, old, new), averaging_of(self.kernel), updated)

    def _replace(self, rng_key, site: Site, kernel: AbstractKernel, ended: Position, lost: Array) -> Position:
        """Lost chains begin anew."""
        fresh = jax.vmap(kernel.lift)(self.fresh(rng_key, site, lost.shape[0])[0])
        return jax.tree.map(lambda new, old: jnp.where(over(lost, old), new, old), fresh, ended)

    def _penalised(self, site: Site, positions: Array, local: PyTree, sign: float) -> Array:
        """Log densities; with `energy_l2`, less ``sign * energy_l2 * E(x)^2``."""
        values = jax.vmap(site.log_density)(positions, local)
        if is_concrete(self.energy_l2) and self.energy_l2 == 0:
            return values
        context = None if local is None else local[0]
        energies = jax.vmap(lambda z, row: site.distribution.evaluate_energy(site.distribution.constrain(z), row))
        return values - sign * self.energy_l2 * energies(positions, context) ** 2

    def _temperatures(self) -> Array | None:
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

    def _check_step_size(self, name: str) -> None:
        if self.step_size_schedule is not None and (self.adapt_step_size or not callable(self.step_size_schedule)):
            raise EnergyError(
                f"{name} takes a step_size_schedule (a function of the number of updates) in the place of adaptation. Write "
                "step_size_schedule=optax.exponential_decay(0.1, 1000, 0.5) without adapt_step_size=True."
            )
        if self.adapt_step_size and self.kernel.target_acceptance is None:
            raise EnergyError(
                f"The kernel '{self.kernel.name}' never rejects, so its step size cannot adapt to an acceptance. Write "
                "adapt_step_size=False, a step_size_schedule, or a kernel such as 'mala'."
            )


def averaging_of(kernel: AbstractKernel) -> Any:
    """Dual averaging that begins at the kernel's own step size and shrinks towards it."""
    step_size = jnp.asarray(kernel.step_size, float)
    # BlackJAX shrinks towards ten times the start, which is for warm-ups that begin low.
    return dual_averaging_adaptation(0.0)[0](step_size / 10)._replace(log_step_size=jnp.log(step_size))


def next_averaging(averaging: Any, kernel: AbstractKernel, acceptance_rate: Array) -> Any:
    """One step of dual averaging to the kernel's optimal acceptance."""
    acceptance_rate = jnp.nan_to_num(acceptance_rate)
    return dual_averaging_adaptation(kernel.target_acceptance)[1](averaging, acceptance_rate)  # pyright: ignore


def over(flags: Array, leaf: Array) -> Array:
    """Flags of chains, shaped to go over a leaf that they lead."""
    return flags.reshape((-1,) + (1,) * (leaf.ndim - 1))


def draw_start(start: Any, rng_key: PRNGKey, site: Site, num_chains: int) -> tuple[Array, PyTree]:
    """Unconstrained starts, and what their rows have of their own, over the rows as evenly as it goes.

    Args:
        start: "data", "base", or a distribution of one event.
        rng_key: random key.
        site: the rows.
        num_chains: how many.
    """
    key_rows, key_draws = jax.random.split(rng_key)
    rows = jnp.resize(jax.random.permutation(key_rows, site.num_rows), (num_chains,))
    repeats = -(-num_chains // max(site.num_rows, 1))
    draws = draw_rows(start, key_draws, site, repeats)[jnp.arange(num_chains) // site.num_rows, rows]
    return draws, jax.tree.map(lambda leaf: leaf[rows], site.local)


def draw_rows(start: Any, rng_key: PRNGKey, site: Site, repeats: int = 1) -> Array:
    """Unconstrained starts for each row, ``(repeats, num_rows, ...)``: the row itself, or draws of its own base."""
    distribution = site.distribution
    if isinstance(start, str) and start == "data":
        return jnp.broadcast_to(site.position, (repeats, *site.position.shape))
    if isinstance(start, dist.Distribution):
        events = start.expand((site.num_rows,)).sample(rng_key, (repeats,))
    else:
        events = distribution.reference.expand(site.batch_shape).sample(rng_key, (repeats,))
    events = distribution.as_events(jnp.asarray(events, float)).reshape((repeats, site.num_rows, *distribution.event_shape))
    draws = jax.lax.stop_gradient(jax.vmap(jax.vmap(distribution.unconstrain))(events))
    if site.mask is None:
        return draws
    # The base of a masked row may be missing as well.
    return jnp.where(over(site.mask, site.position), draws, jax.lax.stop_gradient(site.position))


def check_start(start: Any, site: Site) -> None:
    """Refuse a start that is unknown, or of another event shape or support than the energy's.

    Raises:
        EnergyError: naming both.
        TypeError: where it is neither a name nor a distribution.
    """
    if isinstance(start, str):
        if start not in ("data", "base"):
            raise EnergyError(f"Unknown start '{start}'. {nearest(start, ('data', 'base'))} Or a numpyro distribution.")
        return
    if not isinstance(start, dist.Distribution):
        raise TypeError(f"start needs 'data', 'base' or a numpyro distribution; got {type(start).__name__}.")
    if start.event_shape != site.distribution.event_shape or start.batch_shape != ():
        raise EnergyError(
            f"start has event shape {start.event_shape} and batch shape {start.batch_shape}; the energy has "
            f"event shape {site.distribution.event_shape}. Write start={type(start).__name__}(...).to_event(1)."
        )
    check_same_support("start", start, site.distribution.support)
