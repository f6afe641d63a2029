"""Inclusion probabilities under spike-and-slab priors, against quadrature, sums over graphs and exact draws."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import HMC, MCMC, NUTS, DiscreteHMCGibbs, MixedHMC
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm import bayes

KEY = jax.random.key(0)
STATES = np.array(list(itertools.product([0, 1], repeat=3)))
PAIRS = list(itertools.combinations(range(3), 2))
PRODUCTS = np.stack([STATES[:, i] * STATES[:, j] for i, j in PAIRS], axis=1)
BIASES = np.array([-0.3, 0.2, -0.1])
ROWS = STATES[np.random.default_rng(0).choice(8, 60, p=np.array([9, 7, 6, 5, 5, 5, 9, 14]) / 60)]
SPIKE, SLAB, WEIGHT = dist.Normal(0, 0.2), dist.Cauchy(0, 2.5), 0.4


def observe(couplings, x):
    machine = ebm.energies.BoltzmannMachine.from_pairs(couplings, BIASES)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)


def mixture(weight, spike=SPIKE, slab=SLAB):
    return dist.MixtureGeneral(dist.Categorical(probs=jnp.stack([1 - weight, weight], -1)), [spike, slab])


def network(x):
    """A spike and a slab for each of three couplings."""
    observe(numpyro.sample("couplings", mixture(jnp.array(WEIGHT)).expand([3]).to_event(1)), x)


def with_zeros(x):
    """Indicators that make couplings exactly zero."""
    with numpyro.plate("pairs", 3):
        is_in, sizes = numpyro.sample("is_in", dist.Bernoulli(WEIGHT)), numpyro.sample("sizes", dist.Normal(0, 2))
    observe(is_in * sizes, x)


def log_likelihood(couplings):
    """The log likelihood of ROWS at couplings ``(..., 3)``, by a sum over the states."""
    log_z = np.logaddexp.reduce(couplings @ PRODUCTS.T + STATES @ BIASES, axis=-1)
    which = [int(np.flatnonzero((STATES == row).all(1))[0]) for row in ROWS]
    return couplings @ PRODUCTS[which].sum(0) + ROWS.sum(0) @ BIASES - len(ROWS) * log_z


@functools.cache
def quadrature():
    """Points, their posterior probabilities, and the exact inclusion probabilities of `network`."""
    line = np.linspace(-4.5, 6.5, 111)
    spike, slab = (1 - WEIGHT) * stats.norm.pdf(line, 0, 0.2), WEIGHT * stats.cauchy.pdf(line, 0, 2.5)
    log_prior = np.log(spike + slab)
    points = np.stack(np.meshgrid(line, line, line, indexing="ij"), axis=-1).reshape(-1, 3)
    log_p = log_likelihood(points) + np.stack(np.meshgrid(*[log_prior] * 3, indexing="ij"), axis=-1).reshape(-1, 3).sum(1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    marginals = [p.reshape(111, 111, 111).sum(tuple(k for k in range(3) if k != i)) for i in range(3)]
    return points, p, np.array([each @ (slab / (spike + slab)) for each in marginals])


@functools.cache
def graphs():
    """The exact inclusion probabilities of `with_zeros`: a sum over the eight graphs, each with its own quadrature."""
    line = np.linspace(-9, 9, 121)
    log_prior = stats.norm.logpdf(line, 0, 2) + np.log(line[1] - line[0])
    evidence = {}
    for graph in itertools.product([False, True], repeat=3):
        axes = [line if is_in else np.zeros(1) for is_in in graph]
        points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        log_p = log_likelihood(points)
        for k, is_in in enumerate(graph):
            if is_in:
                log_p = log_p + log_prior.reshape([-1 if i == k else 1 for i in range(3)])
        evidence[graph] = np.logaddexp.reduce(log_p, axis=None) + np.log(np.where(graph, WEIGHT, 1 - WEIGHT)).sum()
    total = np.logaddexp.reduce(list(evidence.values()))
    return sum(np.array(graph) * np.exp(value - total) for graph, value in evidence.items())


def run(kernel, *args, num_warmup=500, num_samples=1000, num_chains=4, chain_method="vectorized"):
    counts: dict = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    mcmc = MCMC(kernel, **counts, chain_method=chain_method, progress_bar=False)
    mcmc.run(KEY, *args)
    return mcmc.get_samples(group_by_chain=True)


def check(found, site, exact, largest_error):
    """Five standard errors, which are small enough to say something."""
    errors = found.standard_errors[site]
    assert np.all(errors > 0)
    assert np.all(errors < largest_error)
    assert np.all(abs(found.probabilities[site] - exact) < 5 * errors)


def test_independent_draws_give_the_probabilities_of_quadrature():
    points, p, exact = quadrature()
    draws = points[np.random.default_rng(1).choice(len(points), 20_000, p=p)].reshape(4, -1, 3)
    found = bayes.inclusion_probabilities(network, {"couplings": draws}, ROWS, names=["a - b", "a - c", "b - c"])
    check(found, "couplings", exact, 0.003)
    assert np.ptp(exact) > 0.3  # the elements differ
    np.testing.assert_allclose(found.prior_probabilities["couplings"], WEIGHT, rtol=1e-6)
    odds = found.probabilities["couplings"] / (1 - found.probabilities["couplings"])
    np.testing.assert_allclose(found.bayes_factors["couplings"], odds * (1 - WEIGHT) / WEIGHT, rtol=1e-4)
    lines = str(found).splitlines()
    assert [line.split("  ")[0].strip() for line in lines[:1]] == ["element"]
    best = int(np.argmax(exact))
    assert lines[1].split()[:3] == ["a - b", "a - c", "b - c"][best].split()
    assert f"{found.probabilities['couplings'][best]:.3f}" in lines[1]


def hierarchy():
    """One value under a prior whose weight and spike are latent themselves, with a flat latent beside them."""
    weight = numpyro.sample("weight", dist.Beta(2.0, 1.0))
    numpyro.sample("flat", dist.ImproperUniform(dist.constraints.real, (), ()))
    value = numpyro.sample("value", mixture(weight, dist.Normal(0, 0.3), dist.Normal(0, 3)))
    numpyro.sample("y", dist.Normal(value, 1.0), obs=1.5)


def test_the_prior_of_each_draw_is_its_own():
    """A latent weight, whose posterior mean given the indicator is known: the evidences of spike and slab decide."""
    evidence = stats.norm.pdf(1.5, 0, np.sqrt([1 + 0.3**2, 1 + 3**2])) * [1 / 3, 2 / 3]
    exact = evidence[1] / evidence.sum()
    rng = np.random.default_rng(0)
    is_in = rng.random((4, 5000)) < exact
    variance = 1 / (1 + 1 / np.where(is_in, 3.0, 0.3) ** 2)
    value = rng.normal(1.5 * variance, np.sqrt(variance))
    weight = np.where(is_in, rng.beta(3, 1, is_in.shape), rng.beta(2, 2, is_in.shape))
    draws = {"weight": weight, "value": value, "flat": np.zeros(is_in.shape)}
    found = bayes.inclusion_probabilities(hierarchy, draws)
    check(found, "value", exact, 0.004)
    np.testing.assert_allclose(found.prior_probabilities["value"], 2 / 3, atol=5 * 0.236 / np.sqrt(20_000))
    assert found.labels == {"value": ("value",)}


def test_indicators_are_the_terms_of_the_mean():
    draws = {"is_in": np.random.default_rng(0).random((2, 1000, 3)) < [0.2, 0.5, 1.1], "sizes": np.zeros((2, 1000, 3))}
    found = bayes.inclusion_probabilities(ebm.estimate(with_zeros, "exact"), draws, ROWS)
    np.testing.assert_allclose(found.probabilities["is_in"], draws["is_in"].mean((0, 1)))
    spread = draws["is_in"].std((0, 1))[:2]
    sizes = effective_sample_size(draws["is_in"][..., :2].astype(float))
    np.testing.assert_allclose(found.standard_errors["is_in"], [*spread / np.sqrt(sizes), 0.0])
    np.testing.assert_allclose(found.prior_probabilities["is_in"], WEIGHT, rtol=1e-6)
    assert found.bayes_factors["is_in"][2] == np.inf
    assert found.labels["is_in"] == ("is_in[0]", "is_in[1]", "is_in[2]")


SAMPLERS = {
    "nuts": NUTS(ebm.estimate(network, "exact"), target_accept_prob=0.9),
    "exchange": ebm.ExchangeKernel(network, exact_sampler="enumeration", proposal="differences"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
def test_spikes_and_slabs_have_the_probabilities_of_quadrature(name):
    counts: dict = {"num_chains": 4, "num_samples": 4000} if name == "nuts" else {"num_chains": 32, "num_samples": 3000}
    found = bayes.inclusion_probabilities(network, run(SAMPLERS[name], ROWS, **counts), ROWS)
    check(found, "couplings", quadrature()[2], 0.01)


def test_newton_steps_leave_the_spike():
    """The metric of exchange is the curvature at the mode, which is in the slab, and not that of the spike at the start."""
    x = np.repeat([[0, 0], [0, 1], [1, 0], [1, 1]], [25, 25, 25, 185], axis=0)

    def pair(x):
        coupling = numpyro.sample("coupling", mixture(jnp.array(0.5), dist.Normal(0, 0.05)))
        machine = ebm.energies.BoltzmannMachine.from_pairs(coupling[None], jnp.zeros(2))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)

    kernel = ebm.ExchangeKernel(pair, exact_sampler="enumeration")
    state = kernel.init(KEY, 0, None, (x,), {})
    p = 185 / 260  # exp(s) / (3 + exp(s)) at the maximum likelihood s = 2
    np.testing.assert_allclose(state.z["coupling"], np.log(3 * p / (1 - p)), atol=0.8)
    np.testing.assert_allclose(state.warmup.kernel.inverse_mass_matrix, [[1 / (260 * p * (1 - p))]], rtol=0.2)


GIBBS = {
    "discrete_gibbs": DiscreteHMCGibbs(NUTS(ebm.estimate(with_zeros, "exact")), modified=True),
    "mixed": MixedHMC(HMC(ebm.estimate(with_zeros, "exact"), trajectory_length=2.0), num_discrete_updates=10),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", GIBBS)
def test_exact_zeros_have_the_probabilities_of_all_graphs(name):
    """Bernoulli indicators in a plain model, by NumPyro's own kernels."""
    draws = run(GIBBS[name], ROWS, num_samples=4000, chain_method="sequential")
    found = bayes.inclusion_probabilities(with_zeros, draws, ROWS)
    check(found, "is_in", graphs(), 0.02)


def reversed_prior():
    numpyro.sample("s", mixture(0.5 * jnp.ones(2), dist.Normal(0, 3), dist.Normal(0, 0.1)))


def scaled_prior():
    with numpyro.handlers.scale(scale=0.5):
        numpyro.sample("s", mixture(jnp.array(0.5)))


def plain_prior():
    numpyro.sample("s", dist.Normal(0, 1))


def right_prior():
    numpyro.sample("t", dist.Normal(0, 1))
    numpyro.sample("s", mixture(jnp.array(0.5)).expand([2]).to_event(1))


BOTH = {"t": np.zeros((2, 5)), "s": np.zeros((2, 5, 2))}


@pytest.mark.parametrize(
    ("model", "draws", "names", "words"),
    [
        (plain_prior, {"s": np.zeros((2, 5))}, None, r"the latents \['s'\] have none"),
        (reversed_prior, {"s": np.zeros((2, 5, 2))}, None, "second has the higher density at zero"),
        (scaled_prior, {"s": np.zeros((2, 5))}, None, "the prior has the scale 0.5"),
        (right_prior, {"s": BOTH["s"]}, None, r"there are none of \['t'\]"),
        (right_prior, {"s": np.zeros((5, 2)), "t": np.zeros(5)}, None, "group_by_chain=True"),
        (right_prior, {"s": np.zeros((2, 3, 2)), "t": np.zeros((2, 3))}, None, "4 draws or more"),
        (right_prior, BOTH, ["one"], "2 elements .* and 1 names"),
        (right_prior, BOTH["s"], None, "needs draws by name; got ndarray"),
    ],
)
def test_what_cannot_be_right_is_refused(model, draws, names, words):
    with pytest.raises((ebm.EnergyError, TypeError), match=words):
        bayes.inclusion_probabilities(model, draws, names=names)
