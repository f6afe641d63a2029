"""Proposals fitted to draws of a target: a mixture of Gaussians, or independent elements."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Float, Shaped

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.spreads import spread
from numpyro_ebm._core.typing import Array, PRNGKey, Scalar
from numpyro_ebm.distributions.events import EventDistribution
from numpyro_ebm.kernels.elements import Elements

ITERATIONS = 60
"""Iterations of expectation maximisation. The fit need not converge: it only has to cover the draws."""
RIDGE = 1e-3
"""Share of the draws' variances that is added to each covariance, so that no component collapses onto a row."""
WIDE_SHARE = 0.1
"""Share of the wide component, which keeps importance weights bounded: a defensive mixture (Hesterberg 1995)."""
WIDE_FACTOR = 4.0
"""Covariance of the wide component, in units of the draws' covariance: twice their standard deviation."""
ROWS_PER_COMPONENT = 5
"""Draws per dimension that each component needs: with fewer, its covariance is too uncertain."""


class Proposal(NamedTuple):
    """A normalised distribution of positions of one shape.

    Attributes:
        flat: a NumPyro distribution of flat positions.
        shape: shape of a position.
        values: the values ``(num_values, ...)`` of a discrete element, and ``flat`` is a distribution of their indices;
            None for continuous positions.
    """

    flat: Any
    shape: tuple[int, ...]
    values: Shaped[Array, "values ..."] | None

    def sample(self, rng_key: PRNGKey, num: int) -> Shaped[Array, " {num} *position"]:
        """Draw positions ``(num, *shape)``."""
        flat = self.flat.sample(rng_key, (num,))
        return (flat if self.values is None else self.values[flat]).reshape(num, *self.shape)

    def log_prob(self, position: Shaped[Array, "*position"]) -> Scalar:
        """Return the log density of one position."""
        if self.values is None:
            return self.flat.log_prob(position.reshape(-1))
        return self.flat.log_prob(Elements.of(self.values, position).codes(position))


def check_rows(owner: str, data: Array | np.ndarray | None, distribution: EventDistribution, fewest: int) -> None:
    """Check that a proposal can be fitted to the rows, and raise otherwise.

    Raises:
        EnergyError: with the number of rows, or the coordinate in which they are all the same.
    """
    if data is None or not is_concrete(data):
        return
    rows = np.asarray(data).reshape(len(data), -1) if np.ndim(data) else np.zeros((0, 1))
    if len(rows) < fewest:
        raise EnergyError(f"{owner} fits a proposal to draws and needs at least {fewest} of them; got {len(rows)}.")
    still = np.flatnonzero(spread(rows) == 0)
    if still.size and not distribution.is_discrete:
        raise EnergyError(
            f"{owner} fits a proposal to rows that vary, but coordinate {still[0]} is {rows[0, still[0]]:g} in all of them. "
            "Write method='importance', proposal=a distribution of one event, or method='smc'."
        )


def fit_proposal(
    rng_key: PRNGKey, draws: Shaped[Array, " draws *position"], distribution: EventDistribution, num_components: int
) -> Proposal:
    """Fit a distribution that covers the draws, with a tenth of its mass spread wider than they are.

    Args:
        rng_key: random key.
        draws: positions ``(num, ...)``.
        distribution: the energy of these positions.
        num_components: Gaussians in the mixture; fewer if there are less than 5 draws per dimension for each.
    """
    flat, shape = draws.reshape(len(draws), -1), draws.shape[1:]
    if distribution.is_discrete:
        values = jnp.asarray(distribution.discrete_values)
        elements = Elements.of(values, draws[0])
        shares = jnp.mean(jax.nn.one_hot(jax.vmap(elements.codes)(draws), len(values)), axis=0)
        probs = (1 - WIDE_SHARE) * shares + WIDE_SHARE / len(values)
        return Proposal(dist.CategoricalProbs(probs).to_event(1), shape, values)
    num = max(1, min(num_components, len(flat) // (ROWS_PER_COMPONENT * flat.shape[1])))
    return Proposal(_gaussians(rng_key, flat, num), shape, None)


def _gaussians(rng_key: PRNGKey, rows: Float[Array, "rows d"], num: int) -> dist.Distribution:
    """Fit a mixture by expectation maximisation, and add one wide Gaussian.

    scikit-learn's mixture runs on the host, one fit at a time; this one fits all contexts at once under vmap.
    """
    mean, total = jnp.mean(rows, axis=0), _covariance(rows, jnp.ones(len(rows)))
    ridge = RIDGE * jnp.diag(jnp.diag(total))
    start = (
        jnp.zeros(num),
        _far_apart(rng_key, rows / jnp.sqrt(jnp.diag(total)), rows, num),
        jnp.stack([total + ridge] * num),
    )

    def step(_, mixture):
        log_weights, means, covariances = mixture
        normal = dist.MultivariateNormal(means, covariances)
        log_p = jax.nn.log_softmax(normal.log_prob(rows[:, None]) + log_weights, axis=1)
        shares = jnp.exp(log_p).T  # (num, rows)
        sums = jnp.maximum(jnp.sum(shares, axis=1), 1e-6)
        means = shares @ rows / sums[:, None]
        covariances = jax.vmap(_covariance, in_axes=(None, 0))(rows, shares) + ridge
        return jnp.log(sums / len(rows)), means, covariances

    log_weights, means, covariances = jax.lax.fori_loop(0, ITERATIONS, step, start)
    log_weights = jax.nn.log_softmax(log_weights) + jnp.log(1 - WIDE_SHARE)
    normal = dist.MultivariateNormal(
        jnp.concatenate([means, mean[None]]), jnp.concatenate([covariances, WIDE_FACTOR * (total + ridge)[None]])
    )
    return dist.MixtureSameFamily(
        dist.Categorical(logits=jnp.append(log_weights, jnp.log(WIDE_SHARE))), normal, validate_args=False
    )


def _covariance(rows: Float[Array, "rows d"], shares: Float[Array, " rows"]) -> Float[Array, "d d"]:
    total = jnp.maximum(jnp.sum(shares), 1e-6)
    centred = rows - shares @ rows / total
    return (shares[:, None] * centred).T @ centred / total


def _far_apart(
    rng_key: PRNGKey, scaled: Float[Array, "rows d"], rows: Float[Array, "rows d"], num: int
) -> Float[Array, "{num} d"]:
    """Choose rows to start from, each in proportion to its squared distance from those before it (k-means++)."""

    def choose(nearest, key):
        i = jax.random.categorical(key, jnp.log(nearest))
        return jnp.minimum(nearest, jnp.sum((scaled - scaled[i]) ** 2, axis=1)), i

    _, chosen = jax.lax.scan(choose, jnp.ones(len(rows), rows.dtype), jax.random.split(rng_key, num))
    return rows[chosen]
