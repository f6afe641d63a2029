"""Energy discrepancy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.options import check_count, check_positive
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.graph_noise import GraphNoise, check_fits, check_noise, decay_time, transitions_of
from numpyro_ebm.estimators.parts.moves import FAULT, FIX, check_scale, in_pairs, scale_of
from numpyro_ebm.estimators.parts.saturation import warn_where_saturated
from numpyro_ebm.kernels.elements import Elements

REDRAWN, MOST_REDRAWN = 3.0, 0.9
"""By default noise redraws this number of elements, or at most this share of them."""
FAULT_OF_JUMPS, FIX_OF_JUMPS = "the noise leads to states that have no density", "Write a smaller time."


@dataclasses.dataclass(frozen=True)
class EnergyDiscrepancy(AbstractEstimator):
    r"""Energy discrepancy (Schroeder et al.): compare each row with draws around a noisy copy of it; no log Z, no score.

    Noise ``q(c | x)`` gives a copy ``c`` of the row, and each negative is a draw of what the row may have been,
    ``r(x' | c) = q(c | x') / sum_x'' q(c | x'')``. All draws are fresh at each update. The loss of a row is

    .. math:: \log\Big(\frac{w}{M} + \frac1M \sum_{m=1}^{M} e^{E(x) - E(x_m)}\Big), \qquad
        c \sim q(\cdot \mid x), \quad x_m \sim r(\cdot \mid c)

    where ``-E`` is the log density, base included. For ``w = 0`` and many negatives it is the discrepancy of the paper,
    ``log sum_x' q(c | x') p(x') - log p(x)`` up to a term without parameters.

    **w = 1 is consistent** for every noise and every ``M``. Given the copy, the row is a draw from ``p(x) q(c | x)`` and
    each negative one from ``r(x | c)``, so that the loss is that of picking the row among ``1 + M`` candidates by their
    ratios ``p(x)``. This is "ranking_nce" with noise around each row. For other ``w``, finite ``M`` leaves a bias.

    **Continuous events.** The noise is ``N(0, t)`` in unconstrained space (the Jacobian is included), so that a negative is
    ``x + sqrt(t) xi + sqrt(t) xi_m`` with ``xi, xi_1, ..., xi_M ~ N(0, I)``. For ``M = 1`` the loss is half that of
    "conditional_nce" with ``kappa = 1`` and ``sd = sqrt(2 t)``. As ``t`` goes to 0 the expected loss is, up to a constant,

    .. math:: t\, q \Big( \operatorname{tr} \nabla s + \big(1 - \tfrac{q}{2} (1 + \tfrac1M)\big) |s|^2 \Big),
        \qquad q = \frac{M}{M + w}

    with ``s`` the score. For ``w = 1`` that is ``t M / (M + 1)`` times the loss of "sm". On a Gaussian the optimal precision
    is ``(M + w) / (M + 2 w - 1)`` times that of the data: ``M / (M - 1)`` times for ``w = 0``, and half for a large ``w``.
    As ``t`` and ``M`` grow, the negatives cover the space and the estimate tends to maximum likelihood by importance
    sampling; a ``t`` much larger than the modes needs a correspondingly large ``M``.

    Efficiency for the precision of a Gaussian in one dimension with 16 negatives, ``w = 1`` and the draws frozen, at
    ``sqrt(t)`` of 0.1, 0.5, 1, 2 and 4 standard deviations of the data (benchmarks/efficiency.py): 0.02, 0.32, 0.66, 0.84
    and 0.80 for one draw of ``xi``, and 0.74, 0.80, 0.88, 0.93 and 0.89 for a pair of draws ``+-`` (and their negatives
    mirrored), which cancels a term of order ``sqrt(t)`` and mean zero.

    **Discrete events** with finitely many values. Each element jumps by itself on a graph of its values for the time ``t``,
    ``q = exp(t R)``, where the rates ``R`` are

    * "uniform": at rate 1 the element is drawn anew from all its values;
    * "ordinal": at rate 1/2 each, it moves to the next higher and to the next lower value, if there is one;
    * "cyclic": the same on a ring, where the first value follows the last;
    * "absorbing": at rate 1 the element is hidden, and stays so. A negative draws the hidden elements uniformly and keeps
      the others, so that for many negatives the loss is ``-log p(x_hidden | x_others)`` up to a constant: the composite
      likelihood of random sets of elements.

    The first three are symmetric, so that ``r`` is ``q``. No draws are mirrored. As ``t`` grows, all four tend to maximum
    likelihood by importance sampling from uniform draws. By default ``t`` is the time by which the slowest mode of the noise
    has decayed by a share of ``min(0.9, 3 / d)`` for ``d`` elements: "uniform" and "absorbing" then redraw three elements on
    average. With the default and 16 negatives the efficiency for the 3 x 3 Ising model (coupling 0.3, field 0.1) is 0.68 for
    the coupling and 0.44 for the field, and with ``time=1.5`` it is 0.76 and 0.79. It falls with the number of elements that
    depend on each other: on a chain of 40 spins with coupling 0.3 it is 0.36, with coupling 1 it is 0.07. More elements need
    more negatives, and strong dependence a shorter time.

    **Mixed events** (`Blocks`, or sites that a factor joins) have both noises at once, independent of each other: normal on
    the continuous members and jumps on the discrete ones, where ``d`` of the default time counts the elements of all
    discrete members.

    Args:
        noise_scale: ``sqrt(t)``, the standard deviation of each of the two noises, in data units (in unconstrained units
            where the support is not the real line), a scalar or, for continuous events, one value per dimension; None for
            the batch's standard deviation, per dimension. Not for discrete events.
        num_negatives: ``M``, negatives around each noisy copy.
        num_draws: noisy copies per row, of continuous events in mirrored pairs, where with an odd number the last has no
            partner. The loss takes ``1 + num_draws * num_negatives`` energies per row.
        w_stable: ``w``, 0 or more.
        noise: for discrete events, "uniform", "ordinal", "cyclic" or "absorbing", in the order of the values or categories,
            or a matrix ``(num_values, num_copies)`` whose row ``x`` holds the probabilities ``q(c | x)`` of one element.
            None for "ordinal" on integers of more than two values, and "uniform" on others.
        time: ``t`` for discrete events with noise of a name; None for the default above.

    Raises:
        EnergyError: for counts below 1, a noise_scale that is not positive or does not fit the event, a negative w_stable,
            or ``w_stable=0`` with one negative, where the loss is linear in the energy and has no minimum; for an unknown
            noise, a matrix that is none of probabilities or by which some values are never compared, a time that is not
            positive, options of continuous events with discrete ones and the other way round, and discrete supports whose
            values cannot be listed or are more than 4096.

    Warns:
        UserWarning: where all negatives lie outside the density, so that the loss has lost its gradient in the energy.

    Example:
        ``estimate(model, "energy_discrepancy", noise_scale=1.0, num_negatives=16)``, or
        ``estimate(model, "energy_discrepancy", noise="absorbing")`` with
        ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Schroeder, Ou, Lim, Li, Vollmer and Duncan, Energy discrepancies: a score-independent loss for energy-based models
        (2023); Schroeder, Ou, Li and Duncan, Energy-based modelling for discrete and mixed data via heat equations on
        structured spaces (2024); Ma and Collins, Noise contrastive estimation and negative sampling for conditional models
        (2018), for the consistency of ranking.
    """

    name = "energy_discrepancy"
    role = "objective"
    takes_discrete = True
    takes_mixed = True
    noise_scale: Any = None
    num_negatives: int = 16
    num_draws: int = 2
    w_stable: float = 1.0
    noise: Any = None
    time: float | None = None

    def __post_init__(self):
        owner = type(self).__name__
        check_positive(owner, "noise_scale", self.noise_scale)
        check_count(owner, "num_negatives", self.num_negatives)
        check_count(owner, "num_draws", self.num_draws)
        if not (is_concrete(self.w_stable) and np.shape(self.w_stable) == () and 0 <= self.w_stable < math.inf):
            raise EnergyError(f"{owner} needs one number w_stable >= 0; got {self.w_stable!r}. Write w_stable=1.0.")
        if self.w_stable == 0 and self.num_negatives == 1:
            raise EnergyError(
                f"{owner} with w_stable=0 and one negative has the loss E(x) - E(y), which has no minimum. Write "
                "w_stable=1.0, or num_negatives=16."
            )
        check_noise(owner, self.noise)
        check_positive(owner, "time", self.time, scalar=True)
        if self.time is not None and (not is_concrete(self.time) or not isinstance(self.noise, str | None)):
            raise EnergyError(
                f"{owner} takes a time, as a number, with noise of a name: a matrix of noise holds its time already, and a "
                "traced time is not known. Write noise='uniform', time=0.5."
            )

    def notes(self):
        """Return a note on the bias of a ``w`` other than 1."""
        if self.w_stable == 1:
            return ()
        return (f"w_stable={self.w_stable} with {self.num_negatives} negatives is biased; w_stable=1 is consistent",)

    def check(self, site: Site) -> None:
        """Raise where the noise does not fit the event."""
        super().check(site)
        is_discrete, is_mixed = site.distribution.is_discrete, site.distribution.is_mixed
        names = ("noise_scale",) if is_discrete else ("noise", "time")
        given = [name for name in names if getattr(self, name) is not None]
        if given and not is_mixed:
            raise EnergyError(
                f"The support is {site.distribution.support}, for which the options {given} have no meaning. Write "
                + ("noise='uniform', time=0.5." if is_discrete else "noise_scale=1.0.")
            )
        for values in _values_of(site.distribution).values():
            check_fits(self._graph(values), len(values))
        if is_mixed and np.ndim(self.noise_scale):
            raise EnergyError(
                f"noise_scale has shape {np.shape(self.noise_scale)}; for events with discrete members it is one number, or "
                "None for the standard deviation of each continuous dimension."
            )
        if not is_discrete:
            check_scale(site, "noise_scale", self.noise_scale)

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss, per row."""
        negatives = self._negatives(rng_key, site)
        values = site.over_draws(site.log_density, jnp.concatenate([site.position[None], negatives]))
        rises = (values[1:] - values[0]).reshape(self.num_draws, self.num_negatives, -1)
        total = jax.nn.logsumexp(rises, axis=1)
        if self.w_stable != 0:
            log_w = math.log(self.w_stable)
            words = (FAULT, FIX) if site.distribution.is_continuous else (FAULT_OF_JUMPS, FIX_OF_JUMPS)
            warn_where_saturated(site, jnp.mean(jax.nn.sigmoid(total - log_w), axis=0), *words)
            total = jnp.logaddexp(total, log_w)
        return math.log(self.num_negatives) - jnp.mean(total, axis=0), state

    def _negatives(self, rng_key: PRNGKey, site: Site) -> Shaped[Array, "num {site.num_rows} *position"]:
        """Return the negatives, ``num_draws * num_negatives`` of each row: by moves, by jumps, or both."""
        members, values = site.distribution.members, _values_of(site.distribution)
        if members is None:
            return self._jumped(rng_key, site.position, values["x"]) if values else self._moved(rng_key, site)
        key_moves, *keys = jax.random.split(rng_key, 1 + len(values))
        by_name = members.split(self._moved(key_moves, site))
        rows = members.split(site.position)
        num_elements = sum(sum(Elements.of(own, rows[name][0]).sizes) for name, own in values.items())
        jumped = {
            name: self._jumped(key, rows[name], own, num_elements)
            for key, (name, own) in zip(keys, values.items(), strict=True)
        }
        return members.join(by_name | jumped)

    def _moved(self, rng_key: PRNGKey, site: Site) -> Float[Array, "num {site.num_rows} *position"]:
        """Return the negatives of continuous rows, ``num_draws * num_negatives`` of them."""
        shape = site.position.shape
        key_copies, key_negatives = jax.random.split(rng_key)
        half = -(-self.num_draws // 2)
        noise = jax.random.normal(key_copies, (half, 1, *shape), site.position.dtype)
        noise = noise + jax.random.normal(key_negatives, (half, self.num_negatives, *shape), noise.dtype)
        moves = in_pairs(scale_of(site, self.noise_scale, 1.0) * noise, self.num_draws).reshape(-1, *shape)
        return site.position + moves

    def _jumped(
        self,
        rng_key: PRNGKey,
        rows: Int[Array, " rows *event"],
        values: Shaped[np.ndarray, "values ..."],
        num_elements: int | None = None,
    ) -> Int[Array, "num rows *event"]:
        """Return the negatives of discrete rows, ``num_draws * num_negatives`` of them.

        Args:
            rng_key: random key.
            rows: the rows, of all elements or of one member.
            values: the values of an element.
            num_elements: number of discrete elements of the event; None for those of the rows.
        """
        like = rows[0]
        elements = Elements.of(values, like)
        graph = GraphNoise.of(self._transitions(values, num_elements or sum(elements.sizes)))
        key_copies, key_negatives = jax.random.split(rng_key)
        codes = jax.vmap(elements.codes)(rows)
        copies = graph.draw(key_copies, jnp.broadcast_to(codes, (self.num_draws, 1, *codes.shape)))
        shape = (self.num_draws, self.num_negatives, *codes.shape)
        recovered = graph.recover(key_negatives, jnp.broadcast_to(copies, shape)).reshape(-1, *codes.shape)
        return jax.vmap(jax.vmap(lambda each: elements.position(each, like)))(recovered)

    def _graph(self, values: Shaped[np.ndarray, "values ..."]) -> Any:
        """Return the noise of discrete elements with these values, by name or as a matrix."""
        if self.noise is not None:
            return self.noise
        return "ordinal" if values.ndim == 1 and len(values) > 2 else "uniform"

    def _transitions(
        self, values: Shaped[np.ndarray, "values ..."], num_elements: int
    ) -> Float[np.ndarray, "values copies"]:
        noise: Any = self._graph(values)
        time, num_values = self.time, len(values)
        if isinstance(noise, str) and time is None:
            time = decay_time(noise, num_values, min(MOST_REDRAWN, REDRAWN / num_elements))  # pyright: ignore
        return transitions_of(noise, time, num_values)


def _values_of(distribution: EventDistribution) -> dict[str, Shaped[np.ndarray, "values ..."]]:
    """Return the values of the elements of each discrete member: a discrete event is one, and a continuous one has none."""
    if distribution.members is not None:
        return distribution.part(distribution.members.discrete).discrete_values or {}
    return {"x": distribution.discrete_values} if distribution.is_discrete else {}
