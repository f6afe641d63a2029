"""Figures of the data under a trained energy, for the reports of estimators without chains."""

import jax.numpy as jnp
from jaxtyping import Bool, Float

from numpyro_ebm._core.typing import Array, PRNGKey, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.projections import directions, inner, score_and_curvatures

PROBES = 8
"""Rademacher probes per row for the trace: more reduce its noise, at a cost in proportion."""


def mean_over_rows(values: Float[Array, " rows *shape"], mask: Bool[Array, " rows"] | None) -> Float[Array, "*shape"]:
    """Return the mean over the rows that take part; NaN if there are none."""
    if mask is None:
        return jnp.mean(values, axis=0)
    keep = mask.reshape((-1,) + (1,) * (values.ndim - 1))
    return jnp.sum(jnp.where(keep, values, 0.0), axis=0) / jnp.sum(mask)


def score_figures(rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
    r"""Return the size of the score ``s`` and of its divergence at the rows, per dimension of unconstrained space.

    ``score_norm`` is :math:`\sqrt{E|s|^2 / d}` and ``trace_per_dim`` is :math:`E \operatorname{tr} \nabla s / d`, estimated
    by eight Rademacher probes per row. Integration by parts gives :math:`E|s|^2 = -E \operatorname{tr} \nabla s` under the
    model itself. On the training rows this also holds at the optimum of score matching if the energy has a free scale
    factor. On held-out rows the two sides differ if the model has memorised its training rows.

    References:
        Hyvarinen, Estimation of non-normalized statistical models by score matching (2005).
    """
    size = max(site.position[0].size, 1)
    score, traces = score_and_curvatures(site, directions(rng_key, "rademacher", PROBES, site.position))
    square = mean_over_rows(inner(score, score), site.mask) / size
    return {"score_norm": jnp.sqrt(square), "trace_per_dim": mean_over_rows(jnp.mean(traces, axis=0), site.mask) / size}
