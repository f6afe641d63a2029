"""Gibbs in models: `sample`, `MCMC`, and what no kernel moves."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.distributions import constraints
from numpyro.infer import MCMC

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics.arviz.statistics import effective_size

KEY = jax.random.key(0)
COUPLING = np.array([[0.0, 1.0, -0.5], [1.0, 0.0, 0.7], [-0.5, 0.7, 0.0]])
WEIGHTS = np.array([0.2, 0.5, 0.3])


def ising(x, scale=1.0):
    x = jnp.asarray(x, float)
    return -0.5 * scale * x @ jnp.asarray(COUPLING) @ x - 0.3 * x[0]


def model(y=None):
    """Energies, one in a plate, beside an ordinary discrete site, and data that tie all of them."""
    scale = numpyro.param("scale", 1.0)
    x = numpyro.sample("x", ebm.EnergyDistribution(lambda x: ising(x, scale), (3,), support=constraints.boolean))
    k = numpyro.sample("k", dist.Categorical(jnp.asarray(WEIGHTS)))
    with numpyro.plate("rows", 2):
        level = ebm.EnergyDistribution(lambda u: 0.5 * (u - 1) ** 2, support=constraints.integer_interval(0, 2))
        u = numpyro.sample("u", level)
    total = numpyro.deterministic("total", x.sum() + k + u.sum())
    numpyro.sample("y", dist.Normal(total, 1.0), obs=y)


def exact(y, scale):
    """Means of x, k, u and total by the sum over all 216 states."""
    states = np.array([[*x, k, *u] for x in np.ndindex(2, 2, 2) for k in range(3) for u in np.ndindex(3, 3)])
    totals = states.sum(axis=1)
    energies = [float(ising(x, scale)) for x in states[:, :3]]
    log_p = -np.array(energies) + np.log(WEIGHTS[states[:, 3]]) - 0.5 * ((states[:, 4:] - 1) ** 2).sum(axis=1)
    log_p = log_p - 0.5 * (y - totals) ** 2
    weights = np.exp(log_p - log_p.max())
    return weights @ np.c_[states, totals] / weights.sum()


def check(samples, expected):
    """Each mean within five of its standard errors, by effective draws."""
    columns = [np.asarray(samples[name]).reshape(*np.shape(samples[name])[:2], -1) for name in ("x", "k", "u", "total")]
    chains = np.concatenate(columns, axis=2).astype(float)
    ess = np.array([float(effective_size(chains[..., [i]])[0]) for i in range(chains.shape[2])])
    assert ess.min() > 400
    errors = chains.std(axis=(0, 1)) / np.sqrt(ess)
    assert np.all(np.abs(chains.mean(axis=(0, 1)) - expected) < 5 * errors)


ARGUMENTS = {"num_warmup": 50, "num_samples": 1000}


TEMPERED = pytest.param(ebm.ParallelTempering("gibbs", temperatures=(1.0, 2.0)), marks=pytest.mark.slow)


@pytest.mark.parametrize("kernel", [None, "gibbs", TEMPERED])
@pytest.mark.slow
def test_sample_gives_the_moments_of_the_enumeration(kernel):
    given = {"params": {"scale": 0.8}, "model_kwargs": {"y": 3.0}}
    draws = ebm.sample(KEY, model, *(() if kernel is None else (kernel,)), **given, **ARGUMENTS)
    assert {name: value.shape[2:] for name, value in draws.samples.items()} == {"k": (), "total": (), "u": (2,), "x": (3,)}
    assert all(jnp.issubdtype(draws.samples[name].dtype, jnp.integer) for name in "kux")
    check(draws.samples, exact(3.0, 0.8))


@pytest.mark.slow
@pytest.mark.parametrize("chain_method", ["vectorized", pytest.param("sequential", marks=pytest.mark.slow)])
def test_mcmc_gives_the_moments_of_the_enumeration(chain_method):
    kernel = ebm.BlackJAXKernel(model, "gibbs", params={"scale": 0.8})
    mcmc = MCMC(kernel, **ARGUMENTS, num_chains=2, chain_method=chain_method, progress_bar=False)
    mcmc.run(KEY, y=3.0)
    check(mcmc.get_samples(group_by_chain=True), exact(3.0, 0.8))
    data = ebm.to_arviz(mcmc)
    assert {"lp", "n_steps", "nonfinite"} <= set(data["sample_stats"].data_vars)


def test_a_factor_on_discrete_sites():
    def spins():
        x = numpyro.sample("x", dist.Bernoulli(0.5).expand([3]).to_event(1))
        ebm.energy_factor("link", ising, x=x)

    draws = np.asarray(ebm.sample(KEY, spins, **ARGUMENTS).samples["x"]).reshape(-1, 3)
    states = np.array(list(itertools.product((0, 1), repeat=3)))
    weights = np.exp([-float(ising(x)) for x in states])
    expected = weights @ states / weights.sum()
    assert np.all(np.abs(draws.mean(axis=0) - expected) < 5 * np.sqrt(expected * (1 - expected) / 1000))


def spins(**options):
    return ebm.EnergyDistribution(ising, (3,), support=constraints.boolean, **options)


def test_no_chain_runs_for_where_chains_start():
    def never(*_):
        raise AssertionError("a chain ran to look at the model")

    ebm.sample(KEY, lambda: numpyro.sample("x", spins(sampler=never)), num_warmup=1, num_samples=1, num_chains=1)


def mixed():
    numpyro.sample("x", spins())
    numpyro.sample("z", dist.Normal())


def estimated():
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * v**2), obs=1.0 * k)


def ordinary_mixed():
    numpyro.sample("z", dist.Normal(numpyro.sample("k", dist.Bernoulli(0.3)), 1.0))


@pytest.mark.parametrize("name", ["improved_cd", "cooperative"])
def test_an_estimator_of_continuous_events_names_those_of_discrete_ones(name):
    with pytest.raises(ebm.EnergyError, match="'gibbs'.*Estimators for discrete events.*'pseudolikelihood'"):
        ebm.estimate(lambda x: None, name, kernel="gibbs")


def without_categories(y=None):
    """The model above with a site of units in place of the category, which takes floating-point numbers."""
    x = numpyro.sample("x", spins())
    k = numpyro.sample("k", dist.Bernoulli(0.4))
    numpyro.sample("y", dist.Normal(x.sum() + k, 1.0), obs=y)


@pytest.mark.parametrize("kernel", ["flips", "gwg", "dmala"])
@pytest.mark.slow
def test_kernels_with_gradients_in_mcmc(kernel):
    mcmc = MCMC(ebm.BlackJAXKernel(without_categories, kernel), num_warmup=200, num_samples=4000, progress_bar=False)
    mcmc.run(KEY, y=2.0)
    draws = mcmc.get_samples()
    assert draws["x"].dtype == draws["k"].dtype == jnp.int32
    states = np.array(list(itertools.product((0, 1), repeat=4)))
    log_p = np.array([-float(ising(x)) for x in states[:, :3]]) + np.log([0.6, 0.4])[states[:, 3]]
    log_p -= 0.5 * (2.0 - states.sum(1)) ** 2
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    chain = np.c_[draws["x"], draws["k"]].astype(float)[None]
    ess = np.array([float(effective_size(chain[..., [i]])[0]) for i in range(4)])
    assert ess.min() > 200
    mean = p @ states
    assert np.all(abs(chain[0].mean(0) - mean) < 5 * np.sqrt(mean * (1 - mean) / ess))


BOTH = r"discrete latent sites \['{0}'\] beside the continuous \['z'\].*kernel=\{{'z': 'nuts', '{0}': 'gibbs'\}}"
REFUSED = {
    "nuts on an energy beside a normal": (mixed, "nuts", BOTH.format("x")),
    "the same, for gibbs": (mixed, "gibbs", BOTH.format("x")),
    "ordinary sites, for gibbs": (ordinary_mixed, "gibbs", BOTH.format("k")),
    "nuts on discrete latents": (lambda: numpyro.sample("x", spins()), "nuts", "'nuts' cannot sample a discrete support"),
    "gibbs on a normal": (lambda: numpyro.sample("z", dist.Normal()), "gibbs", "'gibbs' cannot sample a continuous"),
    "no bounds": (lambda: numpyro.sample("k", dist.Poisson(3.0)), "gibbs", "values of 'k' cannot be listed.*lattice_walk"),
    "a surrogate": (ebm.estimate(estimated, "sm"), "gibbs", r"surrogates at \['x'\] are not log densities"),
    "an energy that a latent picks": (estimated, None, r"observed site 'x' is known only up to log Z.*\['k'\]"),
    "nothing": (lambda: None, None, "no latent site"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("door", ["sample", "mcmc"])
def test_what_no_kernel_moves_is_refused(name, door):
    fn, kernel, message = REFUSED[name]
    counts = {"num_warmup": 1, "num_samples": 1}
    if door == "mcmc":  # which asks for a kernel
        kernel = kernel or "nuts"
        run = partial(MCMC(ebm.BlackJAXKernel(fn, kernel), **counts, progress_bar=False).run, KEY)
    else:
        run = partial(ebm.sample, KEY, fn, kernel, **counts)
    with pytest.raises(ebm.EnergyError, match=message):
        run()
