"""Exact score matching."""

import dataclasses
import math
import warnings
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_ebm._core.derivatives import DIRECTIONS_AT_ONCE, over_coordinates
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.laplacian import beyond_forward_laplacian, count_operations, gradient_and_laplacian
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import Projection, check_projection
from numpyro_ebm.estimators.parts.second_order import SecondOrderEstimator, over_rows, probed_loss

Trace = Literal["auto", "forward", "columns"]


@dataclasses.dataclass(frozen=True)
class ScoreMatching(SecondOrderEstimator):
    r"""Score matching (Hyvarinen) with the exact trace, or with random probes of it.

    The loss of a row ``x`` with score ``s = -grad E`` (unconstrained space, Jacobian included) is

    .. math:: \tfrac12 |s(x)|^2 + \operatorname{tr} \nabla s(x)

    The surrogate is minus the loss. It needs no log Z and, with the exact trace, no randomness; on a Gaussian it is maximum
    likelihood. Rows of large events are evaluated a few at a time, and again for the gradient, so that their Hessians are
    never in memory together. The loss is unbounded below for a flexible energy on finite data: stop early on held-out rows.

    Args:
        num_probes: Hutchinson probes per row, whose mean replaces the trace; None for the exact trace. With probes the loss
            is that of "ssm_vr", at one derivative of the score per probe.
        projection: distribution of the probes, "rademacher", "gaussian" or "sphere".
        trace: how the exact trace is computed. "forward" is the forward Laplacian, one pass through the energy (the package
            folx); "columns" computes the d columns of the score's Jacobian, 64 at a time. "auto" is "forward" where folx has
            rules for all of the energy's operations and, in more than 64 dimensions, where it takes no more arithmetic (as
            for an energy whose coordinates hardly interact, such as a sum over them). Elsewhere, and for a
            `ScoreDistribution`, "auto" is "columns".

    Raises:
        EnergyError: for an unknown option, and for ``trace="forward"`` where folx cannot compute it.

    Warns:
        UserWarning: under "auto", where the energy has an operation without a rule in folx; and for a piecewise linear
            energy (ReLU), whose trace is zero almost everywhere.

    Example:
        ``estimate(model, "sm")``

    References:
        Hyvarinen, Estimation of non-normalized statistical models by score matching (2005); Li et al., A computational
        framework for neural network-based variational Monte Carlo with forward Laplacian (2024).
    """

    name = "sm"
    num_probes: int | None = None
    projection: Projection = "rademacher"
    trace: Trace = "auto"

    @property
    def is_deterministic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the trace is exact, without probes."""
        return self.num_probes is None

    def __post_init__(self):
        if self.num_probes is not None:
            check_count("ScoreMatching", "num_probes", self.num_probes)
        check_projection(self.projection)
        if self.trace not in get_args(Trace):
            raise EnergyError(f"Unknown trace '{self.trace}'. {nearest(str(self.trace), get_args(Trace))}")

    def check(self, site: Site) -> None:
        """Refuse a forward Laplacian that folx cannot compute; warn of an energy without curvature."""
        super().check(site)
        missing = _missing(site) if self.num_probes is None and self.trace == "forward" else ()
        if missing:
            raise EnergyError(f"The forward Laplacian (folx) has no rule for {list(missing)}. Write trace='columns'.")

    def surrogate(self, rng_key: PRNGKey | None, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return minus the loss of each row."""
        if self.num_probes is not None:
            return -probed_loss(rng_key, site, self.projection, self.num_probes), state  # pyright: ignore[reportArgumentType]
        forward = self.trace == "forward" or (self.trace == "auto" and _is_forward(site))
        return -over_rows(_forward(site) if forward else _columns(site), site), state


def _forward(site: Site):
    def row_loss(position, local):
        log_density = lambda v: site.log_density(v.reshape(position.shape), local)  # noqa: E731
        score, trace = gradient_and_laplacian(log_density, position.reshape(-1))
        return 0.5 * jnp.sum(score**2) + trace

    return row_loss


def _columns(site: Site):
    def row_loss(position, local):
        flat, unravel = ravel_pytree(position)
        score, push = jax.linearize(lambda v: ravel_pytree(site.score(unravel(v), local))[0], flat)
        return 0.5 * jnp.sum(score**2) + jnp.sum(over_coordinates(push, flat, lambda i, column: column[i]))

    return row_loss


def _is_forward(site: Site) -> bool:
    """Whether folx can compute the forward Laplacian, and it is no more expensive than the columns."""
    missing = _missing(site)
    if missing and site.distribution.has_energy:
        warnings.warn(
            f"At site '{site.name}': the forward Laplacian (folx) has no rule for {list(missing)}, so the trace is taken "
            "column by column, which is slower. Write estimate(model, 'sm', trace='columns') to choose this.",
            stacklevel=2,
        )
    return not missing and _is_cheap(site)


def _is_cheap(site: Site) -> bool:
    if math.prod(site.position.shape[1:]) <= DIRECTIONS_AT_ONCE:
        return True
    row = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
    return count_operations(_forward(site), *row) <= count_operations(_columns(site), *row)


def _missing(site: Site) -> tuple[str, ...]:
    """Return the operations of a site's energy that the forward Laplacian has no rule for."""
    if not site.distribution.has_energy:
        return ("a score without an energy",)
    position, local = jax.tree.map(lambda leaf: leaf[0], (site.position, site.local))
    return beyond_forward_laplacian(lambda z: site.log_density(z, local), position)
