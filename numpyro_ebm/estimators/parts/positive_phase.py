"""The positive phase: draws of what the rows lack, given what they have."""

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Shaped

from numpyro_ebm._core.concrete import eager
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.missing import in_position
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import FOR_DISCRETE
from numpyro_ebm.estimators.parts.chain_options import check_by_member
from numpyro_ebm.estimators.parts.scales import in_scale, out_of_scale, widest_step
from numpyro_ebm.estimators.parts.starts import draw_rows
from numpyro_ebm.estimators.parts.unknown import Unknown, by_member, check_names
from numpyro_ebm.kernels import AbstractKernel, BySite, chains
from numpyro_ebm.kernels.averaging import averaging_of, next_averaging
from numpyro_ebm.kernels.by_site import usual_kernels
from numpyro_ebm.kernels.names import kernel_of, resolve_kernel


class PositiveState(NamedTuple):
    """State of a positive phase.

    Attributes:
        acceptance_rate: mean acceptance probability of the last update's transitions, over the rows that lack elements that
            a step size moves; 1 for a kernel that never rejects, and before the first update.
        missing_rate: share of the elements of the last batch that were drawn.
        averaging: dual averaging of the step size; None where it does not adapt.
    """

    acceptance_rate: Scalar
    missing_rate: Scalar
    averaging: Any = None

    def figures(self) -> dict[str, Any]:
        """Return numbers for reports."""
        return {"positive_acceptance_rate": self.acceptance_rate, "missing_rate": self.missing_rate}


@dataclasses.dataclass(frozen=True)
class PositivePhase:
    r"""Draws of what the rows lack, given what they have, before the negative phase of an estimator.

    A row of an event ``(v, h)`` that lacks ``h`` has the density :math:`p(v) = \int p(v, h) dh`, and

    .. math:: \nabla \log p(v) = -E_{p(h | v)}[\nabla E(v, h)] + E_{p(v, h)}[\nabla E(v, h)].

    The second mean is that of the negative phase. For the first, ``num_steps`` transitions of a kernel, which leave
    ``p(h | v)`` invariant, draw ``h`` at each update, and no gradient flows through the draws. ``h`` is whatever a row
    lacks, and may differ from row to row:

    * hidden members of a joint event: sites that an `energy_factor` names and that have neither data nor a value from the
      guide;
    * missing entries: NaN in floating-point data, also of a discrete support (0.0, 1.0 and NaN). If the entries are missing
      at random, this is maximum likelihood of the observed data. A category of `one_hot` is missing if one of its numbers
      is NaN.

    What a row has is not changed. Rows that lack nothing have the same surrogate as without this option, and a batch of such
    rows runs no chain.

    Subsampled rows have no memory from update to update. Missing entries start from observed entries of the same column in
    the batch, and hidden members from the base (without one, from standard normals in unconstrained space or uniform
    values). ``num_steps`` must suffice to get from there to ``p(h | v)``: too few bias the first mean, also with "pcd",
    whose persistent chains are those of the negative phase only. In a Gaussian table of three columns and 1500 rows with a
    quarter of the entries missing, 5 transitions of HMC were off by 1.7 standard errors and 20 by 0.2; in a binary table of
    five columns, 5 sweeps of Gibbs were off by 0.1. Compare a fit with twice as many steps.

    The step size adapts as in the negative phase, separately, and chains move in the scales of that phase.
    `training_report` shows the acceptance as ``positive_acceptance_rate`` and the share of drawn elements as
    ``missing_rate``.

    Args:
        kernel: a name or a kernel; None for "mala", and "gibbs" where the support is discrete. For events with discrete and
            continuous members a kernel for each, ``{"h": "gibbs"}``; members without one have the default.
        num_steps: transitions per row and update.
        adapt_step_size: whether the step size adapts to the kernel's optimal acceptance rate; None for True with every
            kernel that rejects.

    Raises:
        EnergyError: for fewer than one step, an unknown kernel, a kernel that cannot reject but should adapt; when the model
            runs, for a kernel that does not fit the support, "elliptical_slice" and "swendsen_wang", which cannot hold
            elements.

    Example:
        ``estimate(model, "pcd", positive_phase=PositivePhase("gibbs", num_steps=20))``

    References:
        Tieleman, Training restricted Boltzmann machines using approximations to the likelihood gradient (2008);
        Salakhutdinov and Hinton, Deep Boltzmann machines (2009); Song and Kingma (2021), section 2; Little and Rubin,
        Statistical Analysis with Missing Data (2002), for entries missing at random.
    """

    kernel: Any = None
    num_steps: int = 10
    adapt_step_size: bool | None = None

    def __post_init__(self):
        check_count(type(self).__name__, "num_steps", self.num_steps)
        if self.kernel is None:
            return
        kernel = resolve_kernel(self.kernel, is_discrete=None)
        if self.adapt_step_size and kernel.target_acceptance is None and not isinstance(kernel, BySite):
            raise EnergyError(
                f"The kernel '{kernel.name}' never rejects, so its step size cannot adapt to an acceptance. Write "
                "PositivePhase(kernel, adapt_step_size=False), or a kernel such as 'mala'."
            )
        object.__setattr__(self, "kernel", kernel)

    def kernel_for(self, distribution: EventDistribution) -> AbstractKernel:
        """Return the kernel of a whole event, with defaults for members that have none.

        Raises:
            EnergyError: for a kernel that does not fit.
        """
        given, members = self.kernel, distribution.members
        if members is not None and isinstance(given, BySite):
            own = by_member(given)
            check_names(own, members)
            # A default that the user has named is that kernel, so that both share a step size.
            named = {kernel.name: kernel for kernel in own.values()}
            usual = {name: named.get(each, each) for name, each in usual_kernels(members.kinds, "mala").items()}
            given = BySite(usual | own)
        return kernel_of(given, distribution, usual="mala", otherwise=FOR_DISCRETE)

    def check(self, site: Site) -> None:
        """Check that the kernel fits the event.

        Raises:
            EnergyError: with what to write.
        """
        kernel = self.kernel_for(site.distribution)
        if any(each.name in ("elliptical_slice", "swendsen_wang") for each in (kernel, *kernel.parts)):
            raise EnergyError(
                f"The kernel '{kernel.name}' moves all elements of an event and cannot hold those that a row has. Write "
                "PositivePhase('mala'), or 'gibbs' or 'block_gibbs' for a discrete support."
            )
        if isinstance(kernel, BySite):
            check_by_member(kernel, adapt_step_size=self.adapt_step_size, schedule=None, scale=None)
            kernel.bind(site.distribution)
        elif site.missing is not None:
            Unknown.of(site, keeps_energy=True).bind(kernel, {})

    def init(self, distribution: EventDistribution) -> PositiveState:
        """Return the state before the first update."""
        kernel = self.kernel_for(distribution)
        adapts = kernel.target_acceptance is not None if self.adapt_step_size is None else self.adapt_step_size
        averaging = averaging_of(kernel) if adapts and kernel.step_size is not None else None
        return PositiveState(jnp.ones((), float), jnp.zeros((), float), averaging)

    def start(self, rng_key: PRNGKey, site: Site) -> Site:
        """Return the rows with draws that ignore the energy in place of what they lack."""
        if site.missing is None:
            return site
        key_donors, key_base = jax.random.split(rng_key)
        position = site.position
        lacks = in_position(site.distribution.support, site.missing.elements)
        donated, has_donor = _donated(key_donors, position, lacks)
        drawn = jnp.where(has_donor, donated, draw_rows("base", key_base, site)[0].astype(position.dtype))
        return site.completed(jnp.where(lacks, drawn, position))

    def complete(
        self,
        rng_key: PRNGKey,
        site: Site,
        start: Shaped[Array, " rows *position"],
        state: PositiveState,
        scale: Float[Array, "..."] | None,
        spread: Float[Array, "*position"],
    ) -> tuple[Site, PositiveState]:
        """Draw what the rows lack.

        Args:
            rng_key: random key.
            site: the rows, with ``missing``.
            start: positions to start from.
            state: state of the last update.
            scale: length scales of positions, see `ContrastiveDivergence`; None for 1.
            spread: standard deviations of the rows, per number of a position.

        Returns:
            The rows with nothing missing, and the new state.
        """
        unknown = Unknown.of(site, keeps_energy=True)
        whole = self.kernel_for(site.distribution)
        kernel = unknown.bind(whole, by_member(whole) if isinstance(whole, BySite) else {})
        averaging = cast(Any, state.averaging)
        adapts = state.averaging is not None and kernel.target_acceptance is not None
        if adapts:
            kernel = kernel.adapted(step_size=jnp.exp(averaging.log_step_size))
        scale = unknown.of_moved(scale) if adapts and not _has_metric(kernel) else None
        position, rate = self._drawn(rng_key, unknown, kernel, start, scale)
        if adapts:
            largest = widest_step(whole, kernel.step_exponent, or_one(in_scale(scale, unknown.of_moved(spread))))
            updated = next_averaging(averaging, kernel, rate)
            updated = updated._replace(log_step_size=jnp.minimum(updated.log_step_size, jnp.log(largest)))
            any_ = jnp.any(unknown.counted)
            state = state._replace(averaging=jax.tree.map(lambda new, old: jnp.where(any_, new, old), updated, averaging))
        state = state._replace(acceptance_rate=rate, missing_rate=jnp.mean(unknown.lacks, dtype=float))
        return site.completed(position), jax.lax.stop_gradient(state)

    def _drawn(
        self,
        rng_key: PRNGKey,
        unknown: Unknown,
        kernel: AbstractKernel,
        start: Shaped[Array, " rows *position"],
        scale: Float[Array, "..."] | None,
    ) -> tuple[Shaped[Array, " rows *position"], Scalar]:
        """Return positions with draws in place of what they lack, and the acceptance rate; 1 if nothing is counted."""
        density = unknown.density()

        def scaled(moved, row):
            return density(out_of_scale(scale, moved), row)

        @jax.jit  # one program even if the model runs outside jit, as in svi.init
        def run(rng_key, kernel, start, held, local, lacks, counted):
            moved = in_scale(scale, jax.vmap(unknown.moved)(start))
            advanced = chains.advance(
                rng_key,
                kernel,
                density if scale is None else scaled,
                kernel.lift_all(moved),
                ((local, held, lacks),),
                num_steps=self.num_steps,
                counted=counted,
            )
            ended = out_of_scale(scale, jax.vmap(kernel.lower)(advanced.positions))
            rate = jnp.where(jnp.any(counted), advanced.health.acceptance_rate, 1.0)
            return jax.vmap(unknown.filled)(ended, held, lacks).astype(held.dtype), rate

        held, lacks = unknown.site.position, unknown.lacks
        inputs = jax.lax.stop_gradient((rng_key, kernel, start, held, unknown.site.local, lacks, unknown.counted))
        missing = unknown.site.missing
        if missing is not None and missing.is_certain:
            return jax.lax.stop_gradient(run(*inputs))
        nothing = held, jnp.ones((), float)
        return jax.lax.stop_gradient(jax.lax.cond(jnp.any(lacks), run, lambda *_: nothing, *inputs))


def check_positive_phase(owner: str, phase: object) -> None:
    """Check the type of the option ``positive_phase``.

    Raises:
        TypeError: with what to write.
    """
    if not isinstance(phase, PositivePhase | None):
        raise TypeError(
            f"{owner} needs positive_phase as a PositivePhase; got {type(phase).__name__}. Write "
            "positive_phase=numpyro_ebm.PositivePhase('gibbs', num_steps=10)."
        )


def _has_metric(kernel: AbstractKernel) -> bool:
    return kernel.continuous is not None or getattr(kernel, "inverse_mass_matrix", None) is not None


def _donated(
    rng_key: PRNGKey, position: Shaped[Array, " rows *position"], lacks: Bool[Array, " rows *position"]
) -> tuple[Shaped[Array, " rows *position"], Bool[Array, "*position"]]:
    """Return, for each number, one drawn from the rows that have it, and whether there are any."""
    with eager(lacks):  # XLA takes long to fold a sum of constants
        counts = jnp.cumsum(~lacks, axis=0)
    # One draw for all numbers of the last axis, since those of a one-hot vector belong together.
    shape = position.shape[:-1] if position.ndim > 2 else position.shape  # noqa: PLR2004
    ranks = jax.random.uniform(rng_key, shape).reshape(shape + (1,) * (position.ndim - len(shape)))
    wanted = jnp.floor(ranks * counts[-1]).astype(counts.dtype) + 1
    find = jax.vmap(lambda count, want: jnp.searchsorted(count, want), in_axes=(1, 1), out_axes=1)
    flat = (len(position), -1)
    wanted = jnp.broadcast_to(wanted, position.shape).reshape(flat)
    rows = jnp.minimum(find(counts.reshape(flat), wanted), len(position) - 1)
    return jnp.take_along_axis(position.reshape(flat), rows, axis=0).reshape(position.shape), counts[-1] > 0
