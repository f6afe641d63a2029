"""Score models without an energy."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import check_moments, fit, surrogate
from numpyro.distributions import constraints

import numpyro_ebm as ebm

PRECISION = jnp.array([[2.0, 0.6], [0.6, 1.0]])
TRAINERS = {
    "sm": {},
    "ssm": {"num_projections": 2},
    "ssm_vr": {},
    "regularized_sm": {"sigma": 0.3},
    "hsm": {},
    "lsd": {},
    "dsm": {"sigma": 0.3},
}


def score_model(x):
    k = numpyro.param("k", jnp.eye(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.ScoreDistribution(lambda x: -k @ x, (2,)), obs=x)


def energy_model(x):
    k = numpyro.param("k", jnp.eye(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ k @ x, (2,)), obs=x)


@pytest.fixture(scope="module")
def data():
    return np.asarray(dist.MultivariateNormal(jnp.zeros(2), precision_matrix=PRECISION).sample(jax.random.key(0), (500,)))


@pytest.mark.parametrize("name", TRAINERS)
def test_the_surrogate_is_that_of_the_energy(name, data):
    params = {"k": PRECISION}
    values = [surrogate(ebm.estimate(m, name, **TRAINERS[name]), params, data) for m in (score_model, energy_model)]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_exact_score_matching_recovers_the_precision(data):
    k = fit(ebm.estimate(score_model, "sm"), data)["k"]
    np.testing.assert_allclose(k, np.linalg.inv(data.T @ data / len(data)), atol=1e-3)


@pytest.mark.slow
def test_it_samples_by_langevin():
    # The bias of the step is known: on a Gaussian the precision it yields is (1 - sqrt(1 - 2 h / v)) / h.
    step = 0.05
    d = ebm.ScoreDistribution(lambda x, c: -c * x, (1,), context=jnp.array([1.0, 4.0]), batch_shape=(2,))
    draws = ebm.sample(jax.random.key(0), d, ebm.Langevin(step), num_warmup=0, num_samples=4000, num_chains=8)
    for row, precision in enumerate((1.0, 4.0)):
        check_moments(draws.samples["x"][:, 100:, row, 0], 0.0, 1 / (precision * (1 - precision * step / 2)))
    assert d.sample(jax.random.key(1), (3,)).shape == (3, 2, 1)


def test_a_support_has_the_jacobian():
    # Gamma(3, 2) on the positive line: the score in x plus one gives that of log x.
    d = ebm.ScoreDistribution(lambda x: 2.0 / x - 2.0, support=constraints.positive)
    energy = ebm.EnergyDistribution(lambda x: 2.0 * x - 2.0 * jnp.log(x), support=constraints.positive)
    for z in (-0.7, 0.4):
        z = jnp.asarray(z)
        np.testing.assert_allclose(d.unconstrained_score(z), energy.unconstrained_score(z), rtol=1e-6)


def test_a_base_adds_its_score():
    base = dist.Normal(1.0, 0.5)
    d = ebm.ScoreDistribution(lambda x: -x, base=base)
    np.testing.assert_allclose(d.unconstrained_score(jnp.asarray(0.3)), -0.3 - (0.3 - 1.0) / 0.25, rtol=1e-6)


class TestRefusals:
    def test_a_log_density(self, data):
        d = ebm.ScoreDistribution(lambda x: -x)
        with pytest.raises(ValueError, match="has no log density"):
            d.log_prob(1.0)
        with pytest.raises(ValueError, match="site 'x'.*has no log density"):
            numpyro.infer.util.log_density(score_model, (data,), {}, {"k": PRECISION})

    @pytest.mark.parametrize("name", ["cd", "nce", "pcd", "fd_ssm", "generalized_sm"])
    def test_an_estimator_of_energies(self, name, data):
        with pytest.raises(ValueError, match=f"site 'x'.*'{name}' needs values of an energy.*ssm_vr"):
            surrogate(ebm.estimate(score_model, name), {"k": PRECISION}, data)

    def test_a_kernel_that_rejects(self):
        d = ebm.ScoreDistribution(lambda x: -x)
        with pytest.raises(ValueError, match="'mala' needs values of the log density"):
            ebm.sample(jax.random.key(0), d, "mala", num_samples=2)

    def test_another_shape(self):
        d = ebm.ScoreDistribution(lambda x: -jnp.sum(x), (2,))
        with pytest.raises(ValueError, match=r"returned shape \(\) for one event of shape \(2,\)"):
            d.sample(jax.random.key(0))

    def test_what_is_no_score(self):
        with pytest.raises(TypeError, match="callable score"):
            ebm.ScoreDistribution(3.0)
        with pytest.raises(ValueError, match="is discrete"):
            ebm.ScoreDistribution(lambda x: -x, support=constraints.boolean)
