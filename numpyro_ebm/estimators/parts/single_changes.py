"""Shared by the estimators that compare each row with all rows that differ from it in one element."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.kernels.elements import Elements

NUMBERS_AT_ONCE = 2**24
"""Elements of the changed events that are held at once: 64 MB in float32; fewer need less memory and run slower."""


class SingleChangeEstimator(AbstractEstimator):
    """An objective that compares discrete events which differ in one element; it draws no noise."""

    role = "objective"
    is_deterministic = True
    takes_discrete = True

    def check(self, site: Site) -> None:
        """Refuse events that are not discrete with finitely many values."""
        check_finite_values(site, self.name)
        super().check(site)


def over_single_changes(site: Site, reduce: Callable[[Float[Array, " values"]], Scalar]) -> RowValues:
    """Return, for each row, the sum over its elements of ``reduce(changes)``.

    ``changes`` holds the change of the log density when the element takes each of its other values, and -inf where it has
    fewer values than others. The backward pass computes the changed rows again instead of keeping them.

    Args:
        site: the rows.
        reduce: function of the changes ``(num_values - 1,)`` of one element.
    """
    known = site.distribution.ready_energy
    if known is not None and known.has_conditionals:
        return _over_logits(site, reduce)
    like = jnp.zeros(site.position.shape[1:], site.position.dtype)
    elements = Elements.of(site.distribution.discrete_values, like)
    sizes, shifts = elements.num_values_each, jnp.arange(1, elements.num_values)
    at_once = max(1, NUMBERS_AT_ONCE // max(1, site.position.size * elements.num_values))
    codes, own = jax.vmap(elements.codes)(site.position), jax.vmap(site.log_density)(site.position, site.local)

    def of_row(i, codes, local, own):
        def changed(shift):
            moved = codes.at[i].set(((codes[i] + shift) % sizes[i]).astype(codes.dtype))
            return site.log_density(elements.position(moved, like), local) - own

        return reduce(jnp.where(shifts < sizes[i], jax.vmap(changed)(shifts), -jnp.inf))

    def of_element(i):
        return jax.vmap(of_row, in_axes=(None, 0, 0, 0))(i, codes, site.local, own)

    each = jax.lax.map(jax.checkpoint(of_element), jnp.arange(len(sizes)), batch_size=min(at_once, len(sizes)))
    return jnp.sum(each, axis=0)


def _over_logits(site: Site, reduce: Callable[[Float[Array, " values"]], Scalar]) -> RowValues:
    """Return `over_single_changes` by the conditionals of the elements, which the energy knows all at once."""
    elements = Elements.of(site.distribution.discrete_values, jnp.zeros(site.position.shape[1:], site.position.dtype))
    shifts = jnp.arange(1, elements.num_values)

    def of_row(row):
        position, local = row
        logits = site.distribution.row_energy(local).conditional_logits(position)
        codes = elements.codes(position)
        others = (codes[:, None] + shifts) % elements.num_values
        own = jnp.take_along_axis(logits, codes[:, None], axis=1)
        return jnp.sum(jax.vmap(reduce)(jnp.take_along_axis(logits, others, axis=1) - own))

    at_once = max(1, NUMBERS_AT_ONCE // (elements.num_values * max(1, sum(elements.sizes))))
    return jax.lax.map(jax.checkpoint(of_row), (site.position, site.local), batch_size=min(at_once, site.num_rows))


def check_finite_values(site: Site, estimator: str) -> None:
    """Check that the event is discrete with values that can be listed, and raise otherwise.

    Raises:
        EnergyError: for a continuous support, and one without two bounds.
    """
    if not site.distribution.is_discrete:
        raise EnergyError(
            f"The estimator '{estimator}' compares discrete events that differ in one element; the support is "
            f"{site.distribution.support}. For continuous events write estimate(model, 'sm') or estimate(model, 'dsm', "
            "sigma=0.1)."
        )
    _ = site.distribution.discrete_values
