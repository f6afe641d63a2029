"""Mean-field contrastive divergence against machines of five units, enumerated."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import fit, surrogate
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm import MeanFieldContrastiveDivergence
from numpyro_ebm.distributions.site import Site

STATES = np.array(list(itertools.product([0, 1], repeat=5)))
BIASES = np.array([0.3, -0.8, 0.5, 0.0, -0.4])
COUPLINGS = np.triu(np.random.default_rng(0).normal(0, 0.3, (5, 5)), 1)


def energy_of(b, w):
    return lambda x: -b @ x - x @ jnp.triu(w, 1) @ x


def model(x, weights=1.0, mask=True):
    b, w = numpyro.param("b", jnp.zeros(5)), numpyro.param("w", jnp.zeros((5, 5)))
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=weights), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(energy_of(b, w), (5,), support=constraints.boolean), obs=x)


def machine():
    return ebm.EnergyDistribution(energy_of(BIASES, COUPLINGS), (5,), support=constraints.boolean)


def probabilities(b, w):
    logits = -jax.vmap(energy_of(jnp.asarray(b), jnp.asarray(w)))(STATES.astype(float))
    return jax.nn.softmax(logits)


def log_likelihood(params, weights):
    return jnp.sum(weights * jnp.log(probabilities(params["b"], params["w"])))


def gradients(params, weights, **options):
    """Of the surrogate and of the log likelihood, on all states, weighted."""
    wrapped = ebm.estimate(model, "mean_field_cd", **options)
    ours = jax.grad(lambda params: surrogate(wrapped, params, STATES, weights))(params)
    return ours, jax.grad(log_likelihood)(params, weights)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{"damping": 0.0}, {"damping": 0.5}, {"update": "sequential"}], ids=str)
def test_the_means_solve_the_mean_field_equations(options):
    w = jnp.asarray(3 * COUPLINGS)
    d = ebm.EnergyDistribution(energy_of(BIASES, w), (5,), support=constraints.boolean)
    site = Site("x", d, (32,), jnp.asarray(STATES), None, None)
    means = MeanFieldContrastiveDivergence(num_steps=80, **options).means(site)
    np.testing.assert_allclose(means, jax.nn.sigmoid(BIASES + means @ (w + w.T)), atol=1e-6)
    assert np.ptp(np.asarray(means), axis=0).max() < 1e-6  # one solution, from every row


def test_a_sequential_update_sees_those_before_it():
    site = Site("x", machine(), (32,), jnp.asarray(STATES), None, None)
    means = MeanFieldContrastiveDivergence(num_steps=1, damping=0.0, update="sequential").means(site)
    expected, symmetric = STATES.astype(float), COUPLINGS + COUPLINGS.T
    for i in range(5):
        expected[:, i] = 1 / (1 + np.exp(-BIASES[i] - expected @ symmetric[:, i]))
    np.testing.assert_allclose(means, expected, atol=1e-6)


@pytest.mark.parametrize("linear_response", [True, False])
def test_independent_units_are_maximum_likelihood(linear_response):
    # d/db of the log likelihood of independent units is x - sigmoid(b): one undamped step gives it from any row.
    params = {"b": jnp.asarray(BIASES), "w": jnp.zeros((5, 5))}
    ours, exact = gradients(params, 1.0, num_steps=1, damping=0.0, linear_response=linear_response)
    np.testing.assert_allclose(ours["b"], np.sum(STATES - 1 / (1 + np.exp(-BIASES)), axis=0), atol=1e-4)
    if linear_response:
        np.testing.assert_allclose(ours["b"], exact["b"], atol=1e-4)
        np.testing.assert_allclose(np.triu(ours["w"], 1), exact["w"], atol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("scale", "bound", "plain"), [(0.1, 3e-5, 2.5e-3), (1.0, 4e-3, 1.8e-2)])
def test_the_gradient_is_near_that_of_the_likelihood(scale, bound, plain):
    # Away from the truth, where the largest derivatives are 0.25 and 0.33. Largest errors measured for couplings up to 0.04
    # and 0.38: 2.2e-5 and 3.5e-3 (second order); plain mean field 2.3e-3 and 1.7e-2, in the couplings (first order).
    params = {"b": jnp.asarray(BIASES[::-1]), "w": jnp.asarray(-scale * COUPLINGS)}
    weights = probabilities(BIASES, COUPLINGS)
    for linear_response, allowed in ((True, bound), (False, plain)):
        ours, exact = gradients(params, weights, num_steps=30, linear_response=linear_response)
        errors = [np.abs(ours["b"] - exact["b"]).max(), np.abs(np.triu(ours["w"], 1) - exact["w"]).max()]
        assert max(errors) < allowed
    assert max(errors) > 0.8 * allowed  # plain mean field has this error, and linear response takes it off


def test_training_recovers_biases_and_couplings():
    # On all states with their probabilities maximum likelihood is the truth. Measured: 0.0117 and 0.0232 off, and a
    # Kullback-Leibler divergence of 7.1e-5 where independent units have 1.66e-2.
    truth = probabilities(BIASES, COUPLINGS)
    params = fit(ebm.estimate(model, "mean_field_cd"), STATES, truth * 100, steps=600)
    np.testing.assert_allclose(params["b"], BIASES, atol=0.015)
    np.testing.assert_allclose(np.triu(params["w"], 1), COUPLINGS, atol=0.03)
    divergence = jnp.sum(truth * jnp.log(truth / probabilities(params["b"], params["w"])))
    assert divergence < 1e-4


def test_masked_rows_and_kinds_of_binary_data():
    params = {"b": jnp.asarray(BIASES), "w": jnp.asarray(COUPLINGS)}
    wrapped = ebm.estimate(model, "mean_field_cd")
    value = lambda x, mask=True: surrogate(wrapped, params, x, mask=mask)  # noqa: E731
    x = STATES[:6]
    np.testing.assert_allclose(value(x.astype(bool)), value(x), rtol=1e-6)
    holes = np.where(np.arange(6)[:, None] < 4, x, np.nan)
    np.testing.assert_allclose(value(holes, np.arange(6) < 4), value(x[:4]), rtol=1e-5)
    assert value(x, np.zeros(6, bool)) == 0


def test_context_of_each_row():
    # E = -(b + c) . x: maximum likelihood of b, one undamped step.
    c = np.linspace(-1, 1, 6 * 2).reshape(6, 2)
    x = np.random.default_rng(0).integers(0, 2, (6, 2))

    def model(x):
        b = numpyro.param("b", jnp.zeros(2))
        d = ebm.EnergyDistribution(
            lambda x, c: -jnp.sum((b + c) * x), (2,), context=c, batch_shape=(6,), support=constraints.integer_interval(0, 1)
        )
        with numpyro.plate("rows", 6):
            numpyro.sample("x", d, obs=x)

    wrapped = ebm.estimate(model, "mean_field_cd", num_steps=1, damping=0.0)
    grad = jax.grad(lambda b: surrogate(wrapped, {"b": b}, x))(jnp.array([0.3, -0.4]))
    np.testing.assert_allclose(grad, np.sum(x - 1 / (1 + np.exp(-np.array([0.3, -0.4]) - c)), axis=0), rtol=1e-5)


def test_saturated_units_give_no_nan():
    params = {"b": jnp.full(5, 200.0), "w": jnp.asarray(COUPLINGS)}
    ours, _ = gradients(params, 1.0)
    assert np.isfinite(ours["b"]).all()
    assert np.isfinite(ours["w"]).all()


def start(energy, x, **settings):
    settings = {"support": constraints.boolean, **settings}

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, x.shape[1:], **settings), obs=x)

    svi = SVI(ebm.estimate(model, "mean_field_cd"), ebm.empty_guide, optax.sgd(0.1), Trace_ELBO())
    return svi.init(jax.random.key(0), x)


def free_energy(v):
    return -jnp.sum(jax.nn.softplus(0.05 * (v @ jnp.arange(15.0).reshape(5, 3))))


REFUSED_MODELS = {
    "a real support": ((energy_of(BIASES, COUPLINGS), STATES, {"support": constraints.real}), "binary.*support=.*boolean"),
    "counts": ((energy_of(BIASES, COUPLINGS), STATES, {"support": constraints.nonnegative_integer}), "binary"),
    "more than two": ((energy_of(BIASES, COUPLINGS), STATES, {"support": constraints.integer_interval(0, 2)}), "binary"),
    "spins": (
        (energy_of(BIASES, COUPLINGS), 2 * STATES - 1, {}),
        r"Row 0 of the data lies outside the support.*\(x \+ 1\) // 2",
    ),
    "a base": (
        (energy_of(BIASES, COUPLINGS), STATES, {"base": dist.Bernoulli(0.5).expand([5]).to_event(1)}),
        "base.*logits into the energy",
    ),
    "a diagonal": ((lambda x: x @ jnp.eye(5) @ x, STATES, {}), r"not multilinear.*W \* \(1 - jnp.eye"),
    "a restricted machine's free energy": ((free_energy, STATES, {}), "not multilinear.*free energy of an RBM"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_refused_models(case):
    (energy, x, settings), words = REFUSED_MODELS[case]
    with pytest.raises(ebm.EnergyError, match=f"site 'x'.*{words}"):
        start(energy, x, **settings)


@pytest.mark.slow
def test_multilinear_energies_of_any_degree_pass():
    start(lambda x: x[0] * x[1] * x[2] - x[3] * x[4] + 0.3 * x[0], STATES)


REFUSED_OPTIONS = {
    "no step": ({"num_steps": 0}, "num_steps >= 1"),
    "full damping": ({"damping": 1.0}, "0 <= damping < 1"),
    "an unknown order": ({"update": "sequentially"}, "Did you mean 'sequential'"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_refused_options(case):
    options, words = REFUSED_OPTIONS[case]
    with pytest.raises(ebm.EnergyError, match=words):
        MeanFieldContrastiveDivergence(**options)


@pytest.mark.slow
def test_nuts_is_offered_objectives_only():
    with pytest.raises(ebm.EnergyError, match=r"'mean_field_cd' cannot be the target.*'sm'\]"):
        numpyro.infer.util.initialize_model(
            jax.random.key(0), ebm.estimate(prior_model, "mean_field_cd"), model_args=(STATES,)
        )


def prior_model(x):
    b = numpyro.sample("b", dist.Normal(0, 1).expand([5]).to_event(1))
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(energy_of(b, jnp.zeros((5, 5))), (5,), support=constraints.boolean)
        numpyro.sample("x", d, obs=x)
