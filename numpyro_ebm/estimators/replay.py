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
from numpyro_ebm.estimators.parts.positive_phase import PositivePhase


@dataclasses.dataclass(frozen=True)
class Replay(PoolEstimator):
    r"""Maximum likelihood with a replay buffer (Du and Mordatch): chains continue, and a few restart at each update.

    Each update takes as many chains as there are rows (or all, where the buffer is smaller) from random slots of the buffer,
    as "pcd" does. Each of these chains restarts with probability ``reinit_prob``; all are moved by ``num_steps`` transitions
    and written back. The surrogate of a row is its log density minus the mean over the chains moved. With ``reinit_prob=0``
    this is "pcd".

    A chain keeps the context (and the base) of the row it started with, and is evaluated under it until it restarts with
    another row's. The buffer stores their values: for contexts that are themselves trained (the output of an encoder, a base
    with parameters) write "cd", "mle" or "pcd", which read them at each update.

    Chains that restart and do not reach the model in ``num_steps`` transitions bias the gradient. The bias can reinforce
    itself (the condition "gap" of `NegativePhaseHealth`), above all where the scale differs from row to row: take more
    steps, or ``start="data"``.

    State, in the mutable site ``"<site>$replay"``: `ChainState`, with the chains and their contexts in its `Pool`.

    Args:
        num_steps: transitions per update.
        kernel: a name or a kernel, whose step size the training starts from; None for "mala", and for "gibbs" on a
            discrete support.
        adapt_step_size: see `ContrastiveDivergence`, as for ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy``, ``scale`` and ``positive_phase``.
        start: where chains start: "base" (the energy's base, or a standard normal in unconstrained space), "data" (rows of
            the batch), or a NumPyro distribution of one event.
        buffer_size: number of chains kept.
        reinit_prob: probability that a chain restarts when it is drawn.

    Raises:
        EnergyError: for counts below 1, a probability outside [0, 1], an unknown kernel or policy, more than one particle,
            or an ELBO without mutable state.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "replay", num_steps=40, buffer_size=10_000, reinit_prob=0.05)``

    References:
        Du and Mordatch, Implicit generation and modeling with energy-based models (2019).
    """

    name = "replay"
    takes_discrete = True
    takes_mixed = True
    persists_chains = False
    num_steps: int = 20
    start: Any = "base"
    buffer_size: int = 10_000
    reinit_prob: float = 0.05
    positive_phase: PositivePhase | None = None

    def __post_init__(self):
        super().__post_init__()
        check_count("Replay", "buffer_size", self.buffer_size)
        if is_concrete(self.reinit_prob) and not (np.ndim(self.reinit_prob) == 0 and 0 <= self.reinit_prob <= 1):
            raise EnergyError(f"Replay needs 0 <= reinit_prob <= 1; got {self.reinit_prob!r}. Write reinit_prob=0.05.")

    def size(self, site: Site) -> int:
        """Return the number of chains, ``buffer_size``."""
        return self.buffer_size

    def choose_restarts(self, rng_key, num_chains):
        """Draw which chains restart, each independently."""
        return jax.random.bernoulli(rng_key, self.reinit_prob, (num_chains,))
