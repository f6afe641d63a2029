"""Maximum likelihood with a replay buffer of chains."""

import dataclasses
from typing import Any

import jax
import numpy as np

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.pool import PoolEstimator


@dataclasses.dataclass(frozen=True)
class Replay(PoolEstimator):
    r"""Maximum likelihood with a replay buffer (Du and Mordatch): old chains go on, a few begin anew at each update.

    Each update takes as many chains from the buffer as there are rows (all of them where it is smaller), a run of slots from
    a random one on, lets each begin anew with probability ``reinit_prob``, moves them by ``num_steps`` transitions and
    writes them back. The surrogate of a row is its log density minus the mean over the chains moved. With
    ``reinit_prob=0`` it is "pcd".

    A chain keeps the context (and the base) of the row it began with, and is scored under it until it begins anew with
    another row's. What is kept is a value: for contexts that are themselves trained (the output of an encoder, a base with
    parameters) write "cd", "mle" or "pcd", which read them afresh.

    Chains that begin anew and that ``num_steps`` transitions do not take to the model bias the gradient, and the bias can
    feed on itself (the condition "gap" of `NegativePhaseHealth`), above all where the scale differs from row to row: take
    more steps, or ``start="data"``.

    State, in the mutable site ``"<site>$replay"``: ``position`` ``(buffer_size, ...)`` in unconstrained space, ``age``
    (transitions of each chain since it began), ``local`` (contexts), ``health`` (`NegativePhaseHealth`), ``num_updates``,
    and ``averaging`` where the step size adapts.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel, whose step size the training starts from.
        adapt_step_size: this, ``step_size_schedule``, ``temperature``, ``energy_l2``, ``on_unhealthy`` and ``scale`` are
            those of `ContrastiveDivergence`.
        start: what chains begin with: "base" (the energy's base, or a standard normal in unconstrained space), "data"
            (rows of the batch), or a NumPyro distribution of one event.
        buffer_size: chains kept.
        reinit_prob: probability that a chain begins anew when it is drawn.

    Raises:
        EnergyError: for counts below 1, a probability outside [0, 1], an unknown kernel or policy, more than one particle or
            an ELBO without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "replay", num_steps=40, buffer_size=10_000, reinit_prob=0.05)``

    References:
        Du and Mordatch, Implicit generation and modeling with energy-based models (2019).
    """

    name = "replay"
    persists_chains = False
    num_steps: int = 20
    start: Any = "base"
    buffer_size: int = 10_000
    reinit_prob: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        check_count("Replay", "buffer_size", self.buffer_size)
        if is_concrete(self.reinit_prob) and not (np.ndim(self.reinit_prob) == 0 and 0 <= self.reinit_prob <= 1):
            raise EnergyError(f"Replay needs 0 <= reinit_prob <= 1; got {self.reinit_prob!r}. Write reinit_prob=0.05.")

    def size(self, site: Site) -> int:
        """As given."""
        return self.buffer_size

    def begins_anew(self, rng_key, num_chains):
        """Each by itself."""
        return jax.random.bernoulli(rng_key, self.reinit_prob, (num_chains,))
