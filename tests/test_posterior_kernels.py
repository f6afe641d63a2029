"""Kernels over the parameters of energies beside exchange: known posteriors, the bias that is documented, and resuming."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, init_to_value
from scipy import linalg

import numpyro_ebm as ebm
from numpyro_ebm.bayes import AuxiliaryVariableKernel, NoisyLangevinKernel

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(1.0, 1.0, 50)


def shifted(x):
    """A Gaussian with unknown mean and a prior so wide that chains start hundreds of standard deviations away."""
    m = numpyro.sample("m", dist.Normal(0, 100))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda event: 0.5 * (event - m) ** 2), obs=x)


def exact_rows(rng_key, latents):
    return latents["m"] + jax.random.normal(rng_key, (len(ROWS),))


def run(kernel, *args, num_warmup=100, num_samples=500, num_chains=16):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(KEY, *args)
    return mcmc


def check_moments(draws, mean, variance):
    """Check a mean and a variance within 5 standard errors by the effective sizes."""
    draws = np.asarray(draws)
    squares = (draws - mean) ** 2
    for values, expected in ((draws, mean), (squares, variance)):
        ess = effective_sample_size(values)
        assert ess > 400
        assert abs(values.mean() - expected) < 5 * values.std() / np.sqrt(ess)


AUXILIARY = {
    "exact draws": {"exact_sampler": exact_rows},
    "chains": {"inner": "mala", "num_steps": 20, "num_bridges": 0},
    "bridges": {"inner": "mala", "num_steps": 20, "num_bridges": 10},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", AUXILIARY)
def test_the_auxiliary_variable_method_finds_a_known_posterior(case):
    mcmc = run(AuxiliaryVariableKernel(shifted, **AUXILIARY[case]), ROWS, num_samples=6000)
    check_moments(mcmc.get_samples(group_by_chain=True)["m"], ROWS.mean(), 1 / len(ROWS))


def test_a_weight_is_an_unbiased_estimate_of_a_ratio_of_normalizers():
    """For a Gaussian with precision t, Z(r) / Z(t) is (t / r) to the power of half the number of rows."""

    def precision(x):
        t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda event: 0.5 * t * event**2), obs=x)

    kernel = AuxiliaryVariableKernel(
        precision,
        exact_sampler=lambda key, z: jax.random.normal(key, (3,)) / jnp.sqrt(z["t"]),
        num_newton_steps=0,
        proposal="random_walk",
    )
    start = {"t": jnp.full(4000, jnp.log(2.0))}
    state = kernel.init(jax.random.split(KEY, 4000), 0, start, (np.ones(3),), {})
    np.testing.assert_allclose(state.memory.log_weight, 0.0, atol=1e-6)  # the reference is the start
    moved = state._replace(memory=state.memory._replace(z=jnp.full((4000, 1), jnp.log(1.5))))
    surface = kernel._surface((np.ones(3),), {}, lambda z: {"t": z[0]})

    def weigh(key, state):
        return kernel._compare(key, surface, state, jnp.log(jnp.array([2.0])), {"x": None}).memory.log_weight

    weights = np.exp(jax.vmap(weigh)(jax.random.split(jax.random.key(1), 4000), moved))
    assert abs(weights.mean() - (2.0 / 1.5) ** 1.5) < 5 * weights.std() / np.sqrt(len(weights))


LANGEVIN = {
    "as it is": ({}, 1.25 / 0.75),
    "two data sets": ({"num_gradient_draws": 2}, 1.125 / 0.75),
    "colder": ({"temperature": 0.5}, 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LANGEVIN)
def test_langevin_steps_have_the_documented_bias(case):
    options, factor = LANGEVIN[case]
    kernel = NoisyLangevinKernel(shifted, exact_sampler=exact_rows, step_size=0.5, num_newton_steps=1000, **options)
    mcmc = run(kernel, ROWS, num_samples=2000)
    check_moments(mcmc.get_samples(group_by_chain=True)["m"], ROWS.mean(), factor / len(ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [True, False])
def test_one_transition_of_a_chain_has_the_variance_of_its_linear_recursion(persistent):
    """With Langevin steps inside and outside, the mean m and the mean S of the auxiliary data follow a linear recursion.

    In units of the posterior: S' = (1 - h) S + h m + sqrt(2 h) eta, where S is 0 before if chains start at the data, and
    m' = m - e S' + sqrt(2 e) xi.
    """
    e, h = 0.05, 0.2
    kept = (1 - h) * persistent
    transition = np.array([[1 - e * h, -e * kept], [h, kept]])
    noise = np.array([[-e * np.sqrt(2 * h), np.sqrt(2 * e)], [np.sqrt(2 * h), 0.0]])
    variance = linalg.solve_discrete_lyapunov(transition, noise @ noise.T)[0, 0]
    assert (1.2 < variance < 1.5) if persistent else (variance > 5)
    # Without Newton steps the metric is 1, in place of the posterior's variance.
    options = {"step_size": e / len(ROWS), "num_newton_steps": 0, "init_strategy": init_to_value(values={"m": ROWS.mean()})}
    kernel = NoisyLangevinKernel(shifted, ebm.Langevin(step_size=h), num_steps=1, persistent=persistent, **options)
    mcmc = run(kernel, ROWS, num_warmup=500, num_samples=8000)
    check_moments(mcmc.get_samples(group_by_chain=True)["m"], ROWS.mean(), variance / len(ROWS))


@pytest.mark.slow
def test_the_diagnosis_measures_the_bias_of_long_steps():
    mcmc = run(NoisyLangevinKernel(shifted, exact_sampler=exact_rows, step_size=1.0), ROWS, num_samples=2000)
    found = ebm.diagnose(mcmc)
    assert [each.name for each in found.warnings] == ["Bartlett identity"]
    assert "is about 3" in found["Bartlett identity"].measured  # (1 + 1 / 2) / (1 - 1 / 2)


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [10, 50])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_chains_start_at_the_mode_from_far_away(scale, num_steps):
    """Also where the data do not have the variance of the model, so that their scores mistake the information."""
    x = ROWS.mean() + scale * (ROWS - ROWS.mean())
    kernel = ebm.ExchangeKernel(shifted, "mala", num_steps=num_steps, proposal="crank_nicolson")
    state = kernel.init(jax.random.split(KEY, 16), 100, None, (x,), {})
    np.testing.assert_array_less(abs(state.z["m"] - x.mean()), 5 / np.sqrt(len(x)))
    np.testing.assert_allclose(state.warmup.kernel.inverse_mass_matrix, 1 / len(x), rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exchange", "langevin"])
def test_a_saved_state_goes_on_in_a_new_kernel(kind):
    """Parts of a run, with the state pickled between, are the draws of the whole run."""

    def mcmc(num_samples):
        kernel = (
            ebm.ExchangeKernel(shifted, exact_sampler=exact_rows, num_newton_steps=5)
            if kind == "exchange"
            else NoisyLangevinKernel(shifted, "mala", num_steps=2, persistent=True, num_newton_steps=5)
        )
        return MCMC(kernel, num_warmup=5, num_samples=num_samples, progress_bar=False)

    whole, first, second = mcmc(20), mcmc(10), mcmc(10)
    whole.run(KEY, ROWS)
    first.run(KEY, ROWS)
    second.post_warmup_state = pickle.loads(pickle.dumps(first.last_state))
    second.run(second.post_warmup_state.rng_key, ROWS)
    parts = np.concatenate([first.get_samples()["m"], second.get_samples()["m"]])
    np.testing.assert_allclose(parts, whole.get_samples()["m"], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"step_size": 0.0}, "step_size"),
        ({"step_size": 2.0}, "steps of 2 or more diverge"),
        ({"temperature": -1.0}, "temperature"),
        ({"num_gradient_draws": 0}, "num_gradient_draws"),
        ({"persistent": True, "exact_sampler": exact_rows}, "no chain to persist"),
    ],
)
def test_what_cannot_be_right_is_refused(options, words):
    with pytest.raises(ebm.EnergyError, match=words):
        NoisyLangevinKernel(shifted, **options)


@pytest.mark.parametrize("kind", [ebm.ExchangeKernel, AuxiliaryVariableKernel, NoisyLangevinKernel])
def test_an_estimated_model_is_refused(kind):
    with pytest.raises(ebm.EnergyError, match=rf"Write {kind.__name__}\(model, ...\)"):
        kind(ebm.estimate(shifted, "pcd"))


def test_the_refusal_of_nuts_names_the_kernels():
    with pytest.raises(ebm.EnergyError, match=r"'pcd' cannot be the target of NUTS.*ExchangeKernel.*NoisyLangevinKernel"):
        MCMC(NUTS(ebm.estimate(shifted, "pcd")), num_warmup=1, num_samples=1, progress_bar=False).run(KEY, ROWS)
