"""Improved contrastive divergence against closed forms on Gaussians.

E = t |x|^2 / 2 in d dimensions, data N(0, v I), unadjusted Langevin of step h at temperature T: with a = 1 - h t / T a step
takes the variance u to a^2 u + 2 h, and its derivative in t to a^2 times itself less 2 h a u / T. The nearest-neighbour
gradient of the entropy has the exact mean here, for the mean of dx'/dt given x' is linear in x'.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from helpers import surrogate
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density
from scipy.special import digamma, gammaln

import numpyro_ebm as ebm
from numpyro_ebm import ImprovedContrastiveDivergence
from numpyro_ebm.estimators.parts.entropies import neighbor_entropies

V, STEP, ROWS, KEYS = 1.0, 0.1, 60, 600
PRECISIONS = np.array([0.4, 2.5])  # too small, too large for the data's variance of 1
KERNEL = ebm.Langevin(step_size=STEP)


def model(x, mask=True):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), x.shape[1:]), obs=x)


def closed_forms(t, num_steps, num_grad_steps, temperature=lambda i: 1.0):
    """Derivative in t, a row and dimension, of: the log likelihood, CD's surrogate, and improved CD's."""
    variance, slope = V, 0.0
    for i in range(num_steps):
        a = 1 - STEP * t / temperature(i)
        if i >= num_steps - num_grad_steps:
            slope = a**2 * slope - 2 * STEP / temperature(i) * a * variance
        variance = a**2 * variance + 2 * STEP
    cd = 0.5 * (variance - V)
    return 0.5 / t - 0.5 * V, cd, cd + 0.5 * (t - 1 / variance) * slope


def gradients(dim, *estimators):
    """For each estimator and precision: mean over keys and fresh data of the derivative, and its standard error."""
    wrapped = [ebm.estimate(model, estimator) for estimator in estimators]

    def one(inputs):
        key, t = inputs
        key_data, key = jax.random.split(key)
        x = jnp.sqrt(V) * jax.random.normal(key_data, (ROWS, dim))

        def value(t, wrapped):
            return log_density(numpyro.handlers.seed(wrapped, key), (x,), {}, {"t": t})[0] / (ROWS * dim)

        return jnp.stack([jax.grad(value)(t, each) for each in wrapped])

    # Not vmap, under which the chains' health calls the host each time.
    keys = jax.random.split(jax.random.key(0), KEYS * len(PRECISIONS))
    values = jax.jit(lambda *inputs: jax.lax.map(one, inputs))(keys, np.tile(PRECISIONS, KEYS))
    values = np.asarray(values).reshape(KEYS, len(PRECISIONS), -1)
    return values.mean(axis=0).T, values.std(axis=0).T / np.sqrt(KEYS)


# One dimension and several (the factor d); one step, all of several, and the last of several differentiated.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "num_steps", "num_grad_steps"),
    [(2, 3, 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 2, 2), (2, 1, 1), (4, 3, 2)))],
)
def test_it_is_the_gradient_of_the_objective_and_nearer_to_that_of_the_likelihood_than_cd(dim, num_steps, num_grad_steps):
    improved = ImprovedContrastiveDivergence(num_steps=num_steps, kernel=KERNEL, num_grad_steps=num_grad_steps)
    without = dataclasses.replace(improved, kl_weight=0.0)
    means, errors = gradients(dim, improved, ebm.ContrastiveDivergence(num_steps=num_steps, kernel=KERNEL), without)
    exact, cd, ours = np.transpose([closed_forms(t, num_steps, num_grad_steps) for t in PRECISIONS])
    assert np.all(np.abs(means - [ours, cd, cd]) < 5 * errors)
    assert np.all(np.abs(means[0] - exact) + 5 * (errors[0] + errors[1]) < np.abs(means[1] - exact))


@pytest.mark.slow
def test_a_schedule_of_temperatures_goes_over_both_parts():
    def temperature(i):
        return (4.0, 2.0, 0.5)[i]

    improved = ImprovedContrastiveDivergence(num_steps=3, kernel=KERNEL, num_grad_steps=2, temperature=temperature)
    means, errors = gradients(1, improved)
    ours = [closed_forms(t, 3, 2, temperature)[2] for t in PRECISIONS]
    assert np.all(np.abs(means[0] - ours) < 5 * errors[0])


def constant(size, neighbors, dim):
    """Kozachenko and Leonenko's: log volume of the ball, psi(size) - psi(k)."""
    return 0.5 * dim * np.log(np.pi) - gammaln(0.5 * dim + 1) + digamma(size) - digamma(neighbors)


@pytest.mark.slow
def test_entropy_is_the_nearest_neighbour_estimate():
    ends = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    distances = np.linalg.norm(ends[:, None] - ends, axis=-1) + np.diag(np.full(40, np.inf))
    everyone = jnp.ones(40, bool)
    for wanted, nearest in ((None, 1), (4, 4), (100, 39)):
        expected = 3 * np.log(np.sort(distances, axis=1)[:, nearest - 1]) + constant(40, nearest, 3)
        values = neighbor_entropies(jnp.asarray(ends), everyone, wanted)
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-4)
    # In one dimension the neighbour is the one whose rank is the square root of the number of rows.
    line = np.abs(ends[:, :1] - ends[:, 0]) + np.diag(np.full(40, np.inf))
    values = neighbor_entropies(jnp.asarray(ends[:, :1]), everyone, None)
    np.testing.assert_allclose(values, np.log(np.sort(line, axis=1)[:, 6]) + constant(40, 7, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("rows", "dim"), [(600, 3), (601, 1)])
def test_the_entropy_of_a_normal(rows, dim):
    # In groups of 200 and 201.
    ends = jax.random.normal(jax.random.key(0), (rows, dim))
    values = np.asarray(neighbor_entropies(ends, jnp.ones(rows, bool), None))
    # The neighbour's rank over the group's size smooths the density: less than 0.04 here.
    truth = 0.5 * dim * np.log(2 * np.pi * np.e)
    assert abs(values.mean() - truth) < 5 * values.std() / np.sqrt(rows) + 0.04


def test_ends_that_take_no_part_are_no_neighbours_and_duplicates_give_no_nan():
    ends = jnp.array([[0.0, 0.0], [3.0, 4.0], [0.1, 0.0], [3.0, 4.0]])
    values = neighbor_entropies(ends, jnp.array([True, True, False, False]), 1)
    np.testing.assert_allclose(values[:2], 2 * np.log(5.0) + constant(2, 1, 2), rtol=1e-6)
    for takes_part in (jnp.ones(4, bool), jnp.array([True, False, False, False]), jnp.zeros(4, bool)):
        values, back = jax.vjp(lambda ends, takes_part=takes_part: neighbor_entropies(ends, takes_part, 1), ends)
        assert np.isfinite(values).all()
        assert np.isfinite(back(jnp.ones(4))[0]).all()
    assert values[1] == values[3] == 0


@pytest.mark.slow
def test_masked_rows_take_no_part():
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    wrapped = numpyro.handlers.seed(ebm.estimate(model, "improved_cd", num_steps=2), 0)
    value = jax.jit(jax.value_and_grad(lambda t, x, mask: log_density(wrapped, (x, mask), {}, {"t": t})[0]))
    hole = np.where(np.arange(6)[:, None] < 4, x, np.nan)
    other = np.where(np.arange(6)[:, None] < 4, x, 9.0)
    results = [value(2.0, data, np.arange(6) < 4) for data in (hole, other)]
    assert np.isfinite(results).all()
    assert results[0] == results[1]
    assert value(2.0, x, np.zeros(6, bool)) == (0, 0)


@pytest.mark.slow
def test_lost_chains_begin_anew_and_give_no_nan():
    x = np.array([[0.1], [-0.2], [0.3], [30.0]], np.float32)

    def quartic(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: t * jnp.sum(x**4), (1,)), obs=x)

    wrapped = ebm.estimate(quartic, "improved_cd", num_steps=8, num_grad_steps=2, kernel=KERNEL, on_unhealthy="reset")
    svi = SVI(wrapped, ebm.empty_guide, optax.sgd(0.01), Trace_ELBO())
    with pytest.warns(ebm.UnhealthyChainsWarning, match="nonfinite"):
        result = svi.run(jax.random.key(0), 2, x, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert np.isfinite(result.params["t"])


REFUSED = {
    "a kernel that rejects": ({"kernel": "mala"}, "'mala' accepts and rejects.*Langevin"),
    "a kernel that swaps": ({"kernel": ebm.ParallelTempering("langevin")}, "'parallel_tempering' accepts and rejects"),
    "a negative weight": ({"kl_weight": -1.0}, "kl_weight >= 0.*likelihood"),
    "a weight that is no number": ({"kl_weight": np.nan}, "kl_weight >= 0"),
    "more differentiated steps than steps": ({"num_steps": 2, "num_grad_steps": 3}, "num_grad_steps=3 of num_steps=2"),
    "no differentiated step": ({"num_grad_steps": 0}, "num_grad_steps >= 1"),
    "no neighbour": ({"num_neighbors": 0}, "num_neighbors >= 1"),
    "adaptation": ({"adapt_step_size": True}, "never rejects"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    options, words = REFUSED[case]
    with pytest.raises(ebm.EnergyError, match=words):
        ImprovedContrastiveDivergence(**options)


def test_refused_data():
    with pytest.raises(ebm.EnergyError, match="site 'x'.*1 row.*subsample_size"):
        surrogate(ebm.estimate(model, "improved_cd"), {}, np.ones((1, 2)))

    def rows(x):
        d = ebm.EnergyDistribution(lambda x, k: k * x**2, context=jnp.ones(3), batch_shape=(3,))
        numpyro.sample("x", d, obs=x)

    with pytest.raises(ebm.EnergyError, match="site 'x'.*context.*entropy"):
        surrogate(ebm.estimate(rows, "improved_cd"), {}, np.ones(3))
