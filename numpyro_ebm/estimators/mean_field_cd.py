"""Mean-field contrastive divergence."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.binary import check_binary

Update = Literal["parallel", "sequential"]

UNITS_AT_ONCE = 64
"""Columns of the Hessian computed at once: more are faster and take more memory."""
CURVATURE = 1e-4
"""Largest relative second derivative along one unit that counts as 0: room for float32 rounding, little for curvature."""
FLAT = 1e-2
"""Smallest second derivative that `CURVATURE` is relative to: below it, rounding is not taken for curvature."""


@dataclasses.dataclass(frozen=True)
class MeanFieldContrastiveDivergence(AbstractEstimator):
    r"""Mean-field contrastive divergence (Welling and Hinton): Boltzmann machines without sampling.

    It takes binary events, 0 or 1, and an energy that is multilinear in its units (of degree one in each, such as
    ``-b @ x - x @ W @ x / 2`` with a diagonal of zeros). Means ``m`` in [0, 1] start at each data row ``x`` and go through
    ``num_steps`` mean-field updates, of all units at once or one after the other, with damping ``alpha``:

    .. math:: m_i \leftarrow \alpha m_i + (1 - \alpha)\, \sigma(-\partial E / \partial m_i)

    The gradient of the surrogate of a row is ``-grad E(x) + grad E(m)``, and none flows through the means. Units that are
    independent given their means have no correlations. This term alone therefore misses the first-order effect of the
    couplings on the correlations, and drives the couplings far too high. `linear_response` adds the missing term (Kappen
    and Rodriguez):

    .. math:: \tfrac12 \sum_{i \ne j} \chi_{ij} \frac{\partial^2 E}{\partial m_i \partial m_j}, \quad
        \chi = \bigl(\operatorname{diag}(m (1 - m))^{-1} + \nabla^2 E(m)\bigr)^{-1}

    where the covariances ``chi``, through which no gradient flows either, are the response of the means to a change of the
    biases. The correction is exact for small couplings, has no noise and needs no chain to mix; it underestimates strong
    couplings. As with "cd", modes away from the data are not seen. The value is an energy gap and means nothing as an
    objective.

    Keep a trained ``W`` off its diagonal inside the energy: ``W = W * (1 - jnp.eye(d))``. Energies that are not multilinear
    at the start of training are refused; later parameters are not checked.

    Args:
        num_steps: updates of each unit.
        damping: share of the old mean that an update keeps, in [0, 1). Without damping, parallel updates of strongly
            coupled units oscillate.
        update: "parallel" (one gradient per update), or "sequential" (one per unit, each after the units before it).
        linear_response: whether the negatives have the correlations of linear response (kept within [-1, 1]), at the cost of
            ``d`` second derivatives and the inverse of a matrix ``(d, d)`` per row. False for plain mean field, whose
            couplings train only as far as the means of different rows stay apart.

    Raises:
        EnergyError: for fewer than one step, a damping outside [0, 1), an unknown update, a support that is not binary, a
            base, values other than 0 and 1, and an energy that is not multilinear in its units at the first row (checked
            where data and parameters are concrete, as in ``svi.init``).

    Example:
        ``estimate(model, "mean_field_cd", num_steps=10)`` with
        ``EnergyDistribution(energy, (d,), support=constraints.boolean)``

    References:
        Welling and Hinton, A new learning algorithm for mean field Boltzmann machines (2002); Kappen and Rodriguez,
        Efficient learning in Boltzmann machines using linear response theory (1998).
    """

    name = "mean_field_cd"
    takes_discrete = True
    role = "gradient"
    is_deterministic = True
    num_steps: int = 10
    damping: float = 0.2
    update: Update = "parallel"
    linear_response: bool = True

    def __post_init__(self):
        owner = type(self).__name__
        check_count(owner, "num_steps", self.num_steps)
        if is_concrete(self.damping) and not (np.ndim(self.damping) == 0 and 0 <= self.damping < 1):
            raise EnergyError(f"{owner} needs 0 <= damping < 1; got {self.damping!r}. Write damping=0.2.")
        if self.update not in get_args(Update):
            raise EnergyError(f"Unknown update={self.update!r}. {nearest(str(self.update), get_args(Update))}")

    def notes(self):
        """Note that mean field is an approximation and starts at the data."""
        order = "second" if self.linear_response else "first"
        return (
            f"the negative phase is mean field: its correlations are wrong from the {order} order of the couplings on",
            "the means start at the data: modes away from them are not seen, and the weights of far modes are not learned",
        )

    def check(self, site: Site) -> None:
        """Refuse events that are not 0/1 units, a base, and an energy that is not multilinear."""
        check_binary(site, self.name)
        if site.distribution.base is not None:
            raise EnergyError(
                f"The estimator '{self.name}' takes the whole density from the energy; this one has a base "
                f"{type(site.distribution.base).__name__}. Write its logits into the energy, -jnp.sum(logits * x), and "
                "leave out base."
            )
        _check_multilinear(site)

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the energy of each row, plus that of its means."""
        energy = _energy(site)
        means = jax.lax.stop_gradient(self.means(site))
        expected = _expected_energy if self.linear_response else (lambda energy, means: energy(means))
        theirs = jax.vmap(lambda m, row: expected(lambda v: energy(v, row), m))(means, site.local)
        return theirs - jax.vmap(energy)(site.value.astype(float), site.local), state

    def means(self, site: Site) -> Float[Array, " {site.num_rows} *event"]:
        """Return each row's means after the updates, ``(num_rows, *event_shape)``; no gradient flows through them."""
        start, local = jax.lax.stop_gradient((site.value.astype(float), site.local))
        first = jax.tree.map(lambda leaf: leaf[0], (start, local))
        slope = jax.grad(freeze(_energy(site), *first))
        sweep = self._parallel if self.update == "parallel" else self._sequential

        @jax.jit
        def run(means, local):
            def step(means, _):
                return jax.vmap(lambda m, row: sweep(lambda m: slope(m, row), m))(means, local), None

            return jax.lax.scan(step, means, None, length=self.num_steps)[0]

        return run(start, local)

    def _parallel(self, slope, means: Float[Array, "*event"]) -> Float[Array, "*event"]:
        return self.damping * means + (1 - self.damping) * jax.nn.sigmoid(-slope(means))

    def _sequential(self, slope, means: Float[Array, "*event"]) -> Float[Array, "*event"]:
        flat, unravel = ravel_pytree(means)

        def update(i, flat):
            return flat.at[i].set(self._parallel(slope, unravel(flat)).ravel()[i])

        return unravel(jax.lax.fori_loop(0, flat.size, update, flat))


def _energy(site: Site):
    """Return the energy function of one event, defined also between 0 and 1, where the density itself is 0."""

    def energy(event, local):
        return jnp.asarray(site.distribution.evaluate_energy(event, None if local is None else local[0]), event.dtype)

    return energy


def _check_multilinear(site: Site) -> None:
    """Refuse an energy with curvature along one unit, at the first row or half way to the centre of the cube."""
    if not (is_concrete(site.value, site.local) and site.num_rows):
        return
    energy = _energy(site)
    units, local = jax.tree.map(lambda leaf: leaf[0], (site.value.astype(float), site.local))
    curved = [_largest_curvature(lambda m: energy(m, local), m) for m in (units, 0.25 + 0.5 * units)]
    if is_concrete(curved) and max(float(value) for value in curved) > CURVATURE:
        raise EnergyError(
            "The energy is not multilinear in its units: its second derivative along one unit is not 0, so that the energy "
            "of a mean is not the mean energy. Use 0/1 units without s_i^2 terms: W = W * (1 - jnp.eye(d)) in x @ W @ x. "
            "Hidden units that were summed out (the free energy of an RBM) are not multilinear: keep them as units, or "
            "write another estimator."
        )


def _largest_curvature(energy, event: Float[Array, "*event"]) -> Scalar:
    """Return the largest second derivative along one unit, relative to the largest of all (at least ``FLAT``)."""
    hessian = jnp.abs(_hessian(energy, event))
    return jnp.max(jnp.diag(hessian)) / jnp.maximum(jnp.max(hessian), FLAT)


def _hessian(energy, event: Float[Array, "*event"]) -> Float[Array, "d d"]:
    """Return the second derivatives of one event's energy, ``(d, d)``."""
    flat, unravel = ravel_pytree(event)
    _, push = jax.linearize(jax.grad(lambda v: energy(unravel(v))), flat)
    return jax.lax.map(push, jnp.eye(flat.size, dtype=flat.dtype), batch_size=UNITS_AT_ONCE)


def _expected_energy(energy, means: Float[Array, "*event"]) -> Scalar:
    """Return the energy at the means plus half the sum over pairs of its second derivatives times their covariances."""
    hessian = _hessian(energy, means)
    scale = jnp.sqrt(means * (1 - means)).ravel()
    size = scale.size
    response = jnp.linalg.inv(jnp.eye(size) + scale[:, None] * jax.lax.stop_gradient(hessian) * scale)
    correlations = jnp.clip(response, -1.0, 1.0) * (1 - jnp.eye(size))
    covariances = scale[:, None] * correlations * scale
    return energy(means) + 0.5 * jnp.sum(covariances * hessian)
