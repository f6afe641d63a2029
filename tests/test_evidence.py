"""Evidence, log Z over posterior draws, and predictive draws under them, against closed forms and quadrature."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import some_slow
from numpyro.distributions import constraints
from numpyro.infer import Predictive
from scipy.special import gammaln

import numpyro_ebm as ebm
from numpyro_ebm._core import programs
from numpyro_ebm.bayes import log_evidence, log_partition_grid
from numpyro_ebm.energies import Graph, Ising

X = np.random.default_rng(0).normal(0, 0.5, 200)
NUM, SQUARES = len(X), float(np.sum(X**2))
LOG_EVIDENCE = -NUM / 2 * math.log(2 * math.pi) + gammaln(2 + NUM / 2) - (2 + NUM / 2) * math.log(1 + SQUARES / 2)
WEALTH = [10, 36, 55, 44, 20, 32, 8, 42, 103, 48, 49, 3, 27, 10, 146, 48]  # of Florentine families, and their marriages
MARRIAGES = [
    (0, 8),
    (1, 5),
    (1, 6),
    (1, 8),
    (2, 4),
    (2, 8),
    (3, 6),
    (3, 10),
    (3, 14),
    (4, 10),
    (4, 14),
    (6, 7),
    (6, 15),
    (8, 12),
    (8, 13),
    (8, 15),
    (9, 13),
    (10, 14),
    (12, 14),
    (12, 15),
]


def precision(x):
    """Case 5: the precision of a Gaussian, whose posterior is Gamma(2 + n / 2, 1 + S / 2)."""
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        energy = lambda x: 0.5 * t * x**2 + 0.5 * jnp.log(2 * math.pi / t)  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, normalized=True), obs=x)


def marriages(y):
    """Independent edges with a covariate: a logistic regression, written as an energy of the whole network."""
    theta = numpyro.sample("theta", dist.Normal(0, 10).expand([2]).to_event(1))
    logits = theta[0] + theta[1] * COVARIATE
    energy = lambda y: jnp.sum(jax.nn.softplus(logits) - logits * y)  # noqa: E731
    d = ebm.EnergyDistribution(energy, (120,), support=constraints.boolean, normalized=True)
    numpyro.sample("y", d, obs=y)


LEFT, RIGHT = np.triu_indices(16, 1)
COVARIATE = jnp.asarray(np.array(WEALTH)[LEFT] + np.array(WEALTH)[RIGHT], float)
EDGES = np.array([(i, j) in MARRIAGES for i, j in zip(LEFT, RIGHT, strict=True)], float)
POSTERIOR = {"t": np.random.default_rng(1).gamma(2 + NUM / 2, 1 / (1 + SQUARES / 2), 2000)}

METHODS = {
    "grid": {},
    "bridge": {"posterior_samples": POSTERIOR},
    "importance": {"posterior_samples": POSTERIOR, "num_samples": 4000},
    "smc": {"num_particles": 500, "num_steps": 3},
    "ais": {"num_levels": 50, "posterior_samples": POSTERIOR},
    "nested": {"num_live": 200, "num_delete": 20},
}


@pytest.mark.parametrize("method", some_slow(["grid", "bridge", "importance"], ["smc", "ais", "nested"]))
def test_the_evidence_of_a_precision(method):
    found = log_evidence(jax.random.key(0), precision, method=method, model_args=(X,), **METHODS[method])
    assert abs(found.value - LOG_EVIDENCE) < 5 * found.standard_error
    assert found.standard_error < 0.1
    assert found.ess > 50


@pytest.mark.filterwarnings("ignore:The grid of log Z has a median error")
def test_the_evidence_under_a_surrogate_of_log_z():
    energy = lambda t: ebm.EnergyDistribution(lambda x: 0.5 * t * x**2)  # noqa: E731
    log_z = log_partition_grid(None, energy, {"t": (1.5, 8.5, 57)}, method="grid")

    def by_grid(x):
        t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", log_z.distribution(t=t), obs=x)

    found = log_evidence(None, by_grid, method="grid", low=0.5, high=2.1, num_points=401, model_args=(X,))
    assert abs(found.value - LOG_EVIDENCE) < 5e-3


def test_the_evidence_of_a_network():
    """Known: -62.924, by quadrature; posterior mean -2.639 and 0.0107."""
    box = {"low": jnp.array([-6.0, -0.03]), "high": jnp.array([1.0, 0.05])}
    exact = log_evidence(None, marriages, method="grid", model_args=(EDGES,), **box)
    assert abs(exact.value + 62.924) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["smc", "bridge"])
def test_the_evidence_of_a_network_by_chains(method):
    draws = {}
    if method == "bridge":
        mcmc = numpyro.infer.MCMC(numpyro.infer.NUTS(marriages), num_warmup=500, num_samples=4000, progress_bar=False)
        mcmc.run(jax.random.key(1), EDGES)
        theta = np.asarray(mcmc.get_samples()["theta"])
        ess = numpyro.diagnostics.effective_sample_size(theta[None])
        assert np.all(ess > 500)
        np.testing.assert_array_less(np.abs(theta.mean(0) - [-2.639, 0.0107]), 5 * theta.std(0) / np.sqrt(ess))
        draws = {"posterior_samples": mcmc.get_samples(), "num_chains": 1}
    found = log_evidence(jax.random.key(2), marriages, method=method, model_args=(EDGES,), **draws)
    assert abs(found.value + 62.924) < 5 * found.standard_error
    assert found.standard_error < 0.1


def unnormalised(x):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


def tilted(x):
    t = numpyro.sample("t", dist.Normal(0, 1))
    ebm.energy_factor("tilt", lambda t: t**4, t=t)


def improper(x):
    numpyro.sample("t", dist.ImproperUniform(constraints.real, (), ()))


def discrete(x):
    numpyro.sample("k", dist.Bernoulli(0.3))
    precision(x)


REFUSED = {
    "log Z": (unnormalised, {"method": "grid"}, "site 'x'.*contains log Z.*normalized=True"),
    "factor": (tilted, {"method": "grid"}, "site 'tilt'.*contains log Z"),
    "estimate": (ebm.estimate(unnormalised, "sm"), {"method": "grid"}, "comes from estimate"),
    "improper": (improper, {"method": "grid"}, "improper prior has no evidence"),
    "discrete": (discrete, {"method": "grid"}, r"\['k'\] are discrete"),
    "draws": (precision, {"method": "grid", "posterior_samples": POSTERIOR}, "takes no draws"),
    "other draws": (precision, {"method": "bridge", "posterior_samples": {"s": X}}, r"\['t'\] have none among \['s'\]"),
    "no draws": (precision, {"method": "bridge", "posterior_samples": {}}, "lead with their number; got none"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_evidence(case):
    model, options, message = REFUSED[case]
    with pytest.raises(ebm.EnergyError, match=message):
        log_evidence(jax.random.key(0), model, model_args=(X,), **options)


def by_row(x=None):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", 3):
        energy = lambda x, c: 0.5 * t * c * x**2  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=jnp.array([1.0, 2.0, 4.0])), obs=x)


def lattice():
    J = numpyro.sample("J", dist.Normal(0, 0.3))  # noqa: N806
    numpyro.sample("s", ebm.EnergyDistribution(Ising(Graph.lattice(3, 3), J)))


def test_log_z_of_draws_of_the_latents():
    t = POSTERIOR["t"][:20]
    exact = 0.5 * np.log(2 * math.pi / (t[:, None] * np.array([1.0, 2.0, 4.0])))
    found = ebm.log_partition(None, by_row, posterior_samples={"t": t}, method="grid")
    np.testing.assert_allclose(found.value, exact, atol=1e-5)
    spins = {"J": jnp.linspace(-0.4, 0.4, 7)}
    found = ebm.log_partition(None, lattice, posterior_samples=spins, method="enumerate")
    exact = jax.vmap(lambda J: Ising(Graph.lattice(3, 3), J).log_partition())(spins["J"])  # noqa: N803
    np.testing.assert_allclose(found.value, exact, rtol=1e-6)


def test_log_z_of_draws_by_chains_compiles_once():
    t = POSTERIOR["t"][:20]
    exact = 0.5 * np.log(2 * math.pi / (t[:, None] * np.array([1.0, 2.0, 4.0])))
    options = {"method": "importance", "proposal": dist.Normal(0, 0.7), "num_samples": 2000}
    found = ebm.log_partition(jax.random.key(0), by_row, posterior_samples={"t": t}, **options)
    assert found.value.shape == (20, 3)
    assert found.bound == "lower"
    assert np.all(np.abs(found.value - exact) < 5 * found.standard_error)
    num = _num_compiled()
    ebm.log_partition(jax.random.key(1), by_row, posterior_samples={"t": t + 0.1}, **options)
    assert _num_compiled() == num


def _num_compiled():
    return sum(each._cache_size() for each in programs._kept.values())


def test_log_z_of_draws_is_refused_with_its_draw():
    with pytest.raises(ebm.EnergyError, match="log Z of draw 2 = "):
        ebm.log_partition(None, by_row, posterior_samples={"t": jnp.array([1.0, 2.0, jnp.nan])}, method="grid")
    with pytest.raises(ebm.EnergyError, match="all lead with their number"):
        ebm.log_partition(None, by_row, posterior_samples={"t": X, "u": X[:3]}, method="grid")
    with pytest.raises(TypeError, match="posterior_samples"):
        ebm.log_partition(None, by_row, posterior_samples=X, method="grid")
    d = ebm.EnergyDistribution(lambda x: x**2)
    with pytest.raises(TypeError, match="belong to a model"):
        ebm.log_partition(None, d, posterior_samples={"t": X}, method="grid")


@pytest.mark.parametrize("parallel", some_slow([True], [False]))
def test_predictive_draws_follow_each_posterior_draw(parallel):
    t = POSTERIOR["t"][:400]
    draws = Predictive(by_row, posterior_samples={"t": t}, parallel=parallel)(jax.random.key(4))["x"]
    assert draws.shape == (400, 3)
    whitened = np.asarray(draws) * np.sqrt(t[:, None] * np.array([1.0, 2.0, 4.0]))
    assert np.all(np.abs(whitened.mean(0)) < 5 / np.sqrt(400))
    np.testing.assert_allclose(whitened.var(0), 1, atol=5 * np.sqrt(2 / 400))


def test_predictive_lattices_follow_each_posterior_draw():
    couplings = jnp.linspace(-0.5, 0.5, 400)
    s = Predictive(lattice, posterior_samples={"J": couplings}, parallel=True)(jax.random.key(5))["s"]
    sums = -np.asarray(jax.vmap(Ising(Graph.lattice(3, 3), 1.0))(s))
    slope = jax.grad(lambda J: Ising(Graph.lattice(3, 3), J).log_partition())  # noqa: N803
    mean, variance = jax.vmap(slope)(couplings), jax.vmap(jax.grad(slope))(couplings)
    scores = (sums - mean) / np.sqrt(variance)
    assert abs(scores.mean()) < 5 / np.sqrt(400)
    assert abs(scores.var() - 1) < 5 * np.sqrt(2 / 400)
