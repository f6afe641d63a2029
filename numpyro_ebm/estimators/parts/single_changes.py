"""Shared by the estimators that compare each row with all rows that differ from it in one element."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.lattice import Lattice

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


def over_single_changes(
    site: Site,
    reduce: Callable[[Float[Array, " values"]], Scalar],
    lattice: Lattice | None = None,
    shifts: Sequence[int] | None = None,
) -> RowValues:
    """Return, for each row, the sum over its elements of ``reduce(changes)``.

    ``changes`` holds the change of the log density when the code of the element is shifted, and -inf where there is no such
    value. The backward pass computes the changed rows again instead of keeping them.

    Args:
        site: the rows.
        reduce: function of the changes ``(num_shifts,)`` of one element.
        lattice: codes of the elements; None for rings.
        shifts: shifts of an element's code; None for those that lead to all its other values.
    """
    lattice = Lattice.of(site.distribution) if lattice is None else lattice
    by = jnp.arange(1, 1 + int(lattice.high.max())) if shifts is None else jnp.asarray(shifts)
    known = site.distribution.ready_energy
    if known is not None and known.has_conditionals and lattice.elements is not None:
        return _over_logits(site, reduce, lattice, by)
    at_once = max(1, NUMBERS_AT_ONCE // max(1, site.position.size * (len(by) + 1)))
    codes, own = jax.vmap(lattice.codes)(site.position), jax.vmap(site.log_density)(site.position, site.local)

    def of_row(i, codes, local, own):
        def changed(shift):
            moved, exists = lattice.moved(codes[i], shift, i)
            change = site.log_density(lattice.position(codes.at[i].set(moved.astype(codes.dtype))), local) - own
            return jnp.where(exists, change, -jnp.inf)

        return reduce(jax.vmap(changed)(by))

    def of_element(i):
        return jax.vmap(of_row, in_axes=(None, 0, 0, 0))(i, codes, site.local, own)

    numbers = jnp.arange(lattice.num_elements)
    each = jax.lax.map(jax.checkpoint(of_element), numbers, batch_size=min(at_once, len(numbers)))
    return jnp.sum(each, axis=0)


def _over_logits(
    site: Site, reduce: Callable[[Float[Array, " values"]], Scalar], lattice: Lattice, by: Int[Array, " shifts"]
) -> RowValues:
    """Return `over_single_changes` by the conditionals of the elements, which the energy knows all at once."""

    def of_row(row):
        position, local = row
        logits = site.distribution.row_energy(local).conditional_logits(position)
        codes = lattice.codes(position)
        others, exists = lattice.moved(codes[:, None], by, jnp.arange(lattice.num_elements)[:, None])
        own = jnp.take_along_axis(logits, codes[:, None], axis=1)
        changes = jnp.where(exists, jnp.take_along_axis(logits, others, axis=1) - own, -jnp.inf)
        return jnp.sum(jax.vmap(reduce)(changes))

    at_once = max(1, NUMBERS_AT_ONCE // ((len(by) + 1) * max(1, lattice.num_elements)))
    return jax.lax.map(jax.checkpoint(of_row), (site.position, site.local), batch_size=min(at_once, site.num_rows))


def check_finite_values(site: Site, estimator: str) -> None:
    """Check that the event is discrete with values that can be listed, and raise otherwise.

    Raises:
        EnergyError: for a continuous support, and one without two bounds.
    """
    check_discrete(site, estimator)
    try:
        _ = site.distribution.discrete_values
    except EnergyError as error:
        raise EnergyError(f"{error} For counts without a bound write estimate(model, 'discrete_fisher').") from None


def check_discrete(site: Site, estimator: str) -> None:
    """Check that the event is discrete, and raise otherwise.

    Raises:
        EnergyError: for a continuous support.
    """
    if not site.distribution.is_discrete:
        raise EnergyError(
            f"The estimator '{estimator}' compares discrete events that differ in one element; the support is "
            f"{site.distribution.support}. For continuous events write estimate(model, 'sm') or estimate(model, 'dsm', "
            "sigma=0.1)."
        )
