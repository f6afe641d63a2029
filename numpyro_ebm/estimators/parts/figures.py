"""What reports say of the data under a trained energy, for estimators that keep no chains."""

import jax.numpy as jnp

from numpyro_ebm._core.typing import Array, PRNGKey
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import directions, inner, score_and_curvatures

PROBES = 8


def mean_over_rows(values: Array, mask: Array | None) -> Array:
    """Mean over the rows that take part; NaN where none does."""
    if mask is None:
        return jnp.mean(values, axis=0)
    keep = mask.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(keep, values, 0.0), axis=0) / jnp.sum(mask)


def score_figures(rng_key: PRNGKey, site: Site) -> dict[str, Array]:
    r"""Size of the score ``s`` and of its divergence at the rows, per dimension (unconstrained space).

    ``score_norm`` is :math:`\sqrt{E|s|^2 / d}` and ``trace_per_dim`` is :math:`E \operatorname{tr} \nabla s / d`, by eight
    Rademacher probes a row. By parts :math:`E|s|^2 = -E \operatorname{tr} \nabla s` under the model itself, and on the rows
    for training at the optimum of score matching, where the energy has a factor of its own. On rows that were held out the
    two part where it learned its rows by heart.

    References:
        Hyvarinen, Estimation of non-normalized statistical models by score matching (2005).
    """
    size = max(site.position[0].size, 1)
    score, traces = score_and_curvatures(site, directions(rng_key, "rademacher", PROBES, site.position))
    square = mean_over_rows(inner(score, score), site.mask) / size
    return {"score_norm": jnp.sqrt(square), "trace_per_dim": mean_over_rows(jnp.mean(traces, axis=0), site.mask) / size}
