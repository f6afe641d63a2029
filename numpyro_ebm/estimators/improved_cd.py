"""Improved contrastive divergence."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.spreads import or_one
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.cd import ContrastiveDivergence
from numpyro_ebm.estimators.parts.entropies import neighbor_entropies
from numpyro_ebm.estimators.parts.starts import over
from numpyro_ebm.kernels import Langevin
from numpyro_ebm.kernels.names import resolve_kernel


@dataclasses.dataclass(frozen=True)
class ImprovedContrastiveDivergence(ContrastiveDivergence):
    r"""Improved contrastive divergence (Du et al.): CD with the gradient that flows through its chains.

    With ``q`` the distribution of the chains' ends ``x'`` (data moved by ``num_steps`` transitions), CD descends
    ``KL(data || p) - KL(q || p)``. The gradient of this objective is that of "cd" plus a part through ``q``:

    .. math:: -\frac{\partial q}{\partial\theta} \frac{\partial KL(q \| p)}{\partial q}
        = -\partial_\theta \bigl( E_{\bar\theta}(x'(\theta)) - H[q_\theta] \bigr)

    The parameters of ``E`` (which includes a base and a Jacobian) are held constant here, and ``x'`` keeps only the
    derivative of its last ``num_grad_steps`` transitions. The entropy is the nearest-neighbour estimate of Kozachenko and
    Leonenko: up to a constant, ``d`` times the mean log distance from each end to its ``num_neighbors``-th nearest other
    end in the batch. The gradient passes through both ends, and an end at distance 0 adds nothing. Larger batches are split
    into groups of at most 256 rows, each with its own estimate.

    The surrogate *ascends* ``KL(q || p)`` through the chains, as that objective does. On a Gaussian this removes part of
    CD's bias (for steps small against the scale). The paper adds the term to its loss with the opposite sign, which
    increases the bias of CD; it takes the neighbours from a replay buffer and sets the entropy's ``d`` and weights by hand.

    Each differentiated step costs a second derivative of the energy and keeps it in memory. State, in the mutable site
    ``"<site>$improved_cd"``: `ChainState`, whose ``health`` covers the last ``num_grad_steps`` transitions.

    Args:
        num_steps: transitions per row and update.
        kernel: "langevin", or another kernel that never rejects ("mclmc"), since a rejection cannot be differentiated. None
            for ``Langevin()`` with ``scale="data"``, whose step of 0.01 is in squared scales of each dimension.
        step_size_schedule: see `ContrastiveDivergence`, as for ``adapt_step_size``, ``temperature``, ``energy_l2``,
            ``on_unhealthy`` and ``scale``.
        num_grad_steps: number of transitions that are differentiated, the last ones of the chain.
        kl_weight: coefficient of the part through ``q``: 1 for the gradient of the objective, 0 for "cd".
        num_neighbors: rank of the neighbour whose distance is taken. None for the nearest in three or more dimensions, and
            for the square root of the group's size in fewer, where the nearest one's gradient has no finite variance.

    Raises:
        EnergyError: for counts below 1, more differentiated steps than steps, a negative kl_weight, a kernel that rejects,
            rows with a context or a base of their own, or a batch of one row; and where `ContrastiveDivergence` raises.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "improved_cd", num_steps=10, kernel=ebm.Langevin(step_size=0.01))``

    References:
        Du, Li, Tenenbaum and Mordatch, Improved contrastive divergence training of energy based models (2020);
        Hinton (2002), equation 5, for the part that CD leaves out; Kozachenko and Leonenko (1987).
    """

    name = "improved_cd"
    takes_discrete = False
    takes_mixed = False
    positive_phase: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    num_steps: int = 10
    kernel: Any = None
    num_grad_steps: int = 1
    kl_weight: Any = 1.0
    num_neighbors: int | None = None

    def __post_init__(self):
        if self.kernel is None:
            object.__setattr__(self, "kernel", Langevin())
            object.__setattr__(self, "scale", "data" if self.scale == "auto" else self.scale)
        super().__post_init__()
        owner, kernel = type(self).__name__, resolve_kernel(self.kernel)
        check_count(owner, "num_grad_steps", self.num_grad_steps)
        if self.num_grad_steps > self.num_steps:
            raise EnergyError(
                f"{owner} differentiates the last num_grad_steps={self.num_grad_steps} of num_steps={self.num_steps} "
                f"transitions. Write num_steps={self.num_grad_steps}, or a smaller num_grad_steps."
            )
        if self.num_neighbors is not None:
            check_count(owner, "num_neighbors", self.num_neighbors)
        if is_concrete(self.kl_weight) and not (np.isfinite(self.kl_weight) and self.kl_weight >= 0):
            raise EnergyError(
                f"{owner} needs kl_weight >= 0; got {self.kl_weight!r}. A negative weight moves the gradient away from "
                "that of the likelihood. Write kl_weight=1.0."
            )
        if kernel.is_exact or "swap_rate" in kernel.statistics:
            raise EnergyError(
                f"The kernel '{kernel.name}' accepts and rejects, which cannot be differentiated. Write "
                "kernel=Langevin(step_size=0.01), or estimate(model, 'cd') with this kernel."
            )

    def check(self, site: Site) -> None:
        """Refuse rows with densities of their own (a single chain has no entropy), and a batch of one row."""
        super().check(site)
        self.refuse_local(site, "the entropy is that of the chains of all rows together, which must share one density.")
        if site.num_rows < 2:
            raise EnergyError(
                f"The estimator '{self.name}' measures the distances between the chains of a batch, and this batch has "
                f"{site.num_rows} row. Write a plate with subsample_size=2 or more, or estimate(model, 'cd')."
            )

    def negative_phase(self, rng_key, site: Site, state, kernel, start):
        """Run the chains of "cd", whose ends carry the derivative of the last steps here."""
        key_first, key_last = jax.random.split(rng_key)
        first, last = self._parts()
        if first is not None:
            start = start._replace(position=first._moved(key_first, site, state, kernel, start.position, is_cut=True))
        phase = last.run_chains(key_last, site, state, kernel, start)
        # The same steps with the same key. Lost chains step from their rows, since zero times NaN would be NaN.
        safe = self.replaced(key_last, site, kernel, start.position, phase.lost)
        moved = last._moved(key_last, site, state, kernel, jax.lax.stop_gradient(safe), is_cut=False)
        ended = jax.tree.map(lambda end, way: end + (way - jax.lax.stop_gradient(way)), phase.ended, moved)
        return phase._replace(ended=ended)

    def contrast(self, site: Site, negatives, local, *, paired):
        """Return the contrast of "cd" plus each row's part of ``KL(q || p)`` through its negative."""
        values = super().contrast(site, jax.lax.stop_gradient(negatives), local, paired=paired)
        takes_part = jnp.isfinite(negatives).reshape(site.num_rows, -1).all(axis=1)
        if site.mask is not None:
            takes_part &= site.mask
        ends = jnp.where(over(takes_part, negatives), negatives, site.position)
        energy = -jax.vmap(freeze(site.log_density, ends[0]))(ends)
        # In units of each dimension's spread every dimension counts in the distances; the entropy changes by a constant.
        units = (ends / or_one(site.spread)[None]).reshape(site.num_rows, -1)
        entropies = neighbor_entropies(units, takes_part, self.num_neighbors)
        divergence = jnp.where(takes_part, energy - entropies, 0.0)
        return values + self.kl_weight * divergence

    def _parts(self) -> tuple[Any, Any]:
        """Return the estimator of the detached steps (or None) and that of the differentiated steps."""
        num_first, temperature = self.num_steps - self.num_grad_steps, self.temperature
        later = (lambda i: temperature(i + num_first)) if callable(temperature) else temperature
        last = dataclasses.replace(self, num_steps=self.num_grad_steps, temperature=later)
        first = dataclasses.replace(self, num_steps=num_first, num_grad_steps=1) if num_first else None
        return first, last

    def _moved(self, rng_key, site: Site, state, kernel, position, *, is_cut: bool):
        log_density = freeze(site.log_density, site.position[0], None) if is_cut else site.log_density

        @jax.jit
        def run(rng_key, kernel, position, scale):
            return self.advance(rng_key, kernel, log_density, position, None, scale)[0].positions

        moved = run(rng_key, kernel, position, jax.lax.stop_gradient(self._scale(state)))
        return jax.lax.stop_gradient(moved) if is_cut else moved
