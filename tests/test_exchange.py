"""The exchange algorithm: that a transition leaves exact posteriors as they are, known posteriors, and what is refused."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import simuk
from helpers import some_slow
from jax.extend.core import jaxprs_in_params
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.bayes import CrankNicolson, Differences, ExchangeKernel, NoisyMALA, RandomWalk
from numpyro_ebm.bayes.exact_samplers import coupling_from_the_past, enumeration
from numpyro_ebm.distributions.rows import lay_out, unwrap
from numpyro_ebm.energies import Graph, Ising
from numpyro_ebm.kernels import chains
from numpyro_ebm.kernels.densities import keep
from numpyro_ebm.kernels.names import resolve_kernel

KEY = jax.random.key(0)
SQUARE = Graph.lattice(2, 2)
STATES = np.array(list(itertools.product([-1, 1], repeat=4))).reshape(-1, 2, 2)
ROWS = np.random.default_rng(1).choice([-1, 1], size=(5, 2, 2), p=[0.35, 0.65])
NUM = 8000
ONE_SITE = ebm.Gibbs(scan="random", num_updates=1)


def run(model, *args, num_warmup=3, num_samples=4, num_chains=1, chain_method="vectorized", **options):
    counts = {"num_warmup": num_warmup, "num_samples": num_samples, "num_chains": num_chains}
    mcmc = MCMC(ExchangeKernel(model, **options), **counts, chain_method=chain_method, progress_bar=False)
    mcmc.run(KEY, *args)
    return mcmc


def lattice(x):
    """Five rows of a small lattice, whose coupling and field have priors."""
    coupling, field = numpyro.sample("coupling", dist.Normal(0, 0.7)), numpyro.sample("field", dist.Normal(0, 0.7))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(Ising(SQUARE, coupling, field)), obs=x)


@functools.cache
def exact_posterior():
    """A grid over coupling and field, and the probabilities of its points given `ROWS`."""
    grid = np.stack(np.meshgrid(np.linspace(-3, 3, 241), np.linspace(-3, 3, 241), indexing="ij"), axis=-1).reshape(-1, 2)
    pairs = STATES[:, 0, 0] * (STATES[:, 0, 1] + STATES[:, 1, 0]) + STATES[:, 1, 1] * (STATES[:, 0, 1] + STATES[:, 1, 0])
    of_states = np.stack([pairs, STATES.sum((1, 2))], axis=1)
    log_z = np.logaddexp.reduce(grid @ of_states.T, axis=1)
    which = [int(np.flatnonzero((STATES == row).all((1, 2)))[0]) for row in ROWS]
    log_p = grid @ of_states[which].sum(0) - len(ROWS) * log_z - 0.5 * (grid**2).sum(1) / 0.49
    p = np.exp(log_p - log_p.max())
    return grid, p / p.sum()


GAUSSIAN = jnp.array([0.1, 0.2]), jnp.array([[0.05, 0.01], [0.01, 0.07]])
CASES = {
    "random walk, enumeration": {"exact_sampler": "enumeration", "proposal": RandomWalk(0.1)},
    "random walk, from the past": {"exact_sampler": "coupling_from_the_past", "proposal": RandomWalk(0.1)},
    "random walk, gibbs": {"inner": "gibbs", "num_steps": 30, "proposal": RandomWalk(0.1)},
    "random walk, blocks": {"inner": "block_gibbs", "num_steps": 30, "proposal": RandomWalk(0.1)},
    "differences": {"exact_sampler": "enumeration", "proposal": Differences()},
    "noisy gradients": {"exact_sampler": "enumeration", "proposal": NoisyMALA(0.01, num_gradient_draws=2)},
    "towards a Gaussian": {"exact_sampler": "enumeration", "proposal": CrankNicolson(0.8, *GAUSSIAN, jnp.inf)},
    "towards a Student t": {"exact_sampler": "enumeration", "proposal": CrankNicolson(0.8, *GAUSSIAN, 3.0)},
    "bridges": {"exact_sampler": "enumeration", "inner": "gibbs", "num_bridges": 3, "proposal": RandomWalk(0.1)},
}
QUICK = ["noisy gradients"]


@pytest.mark.parametrize("case", some_slow(QUICK, [name for name in CASES if name not in QUICK]))
def test_transitions_leave_the_posterior_as_it_is(case):
    grid, p = exact_posterior()
    start = grid[np.random.default_rng(0).choice(len(grid), NUM, p=p)]
    kernel = ExchangeKernel(lattice, num_newton_steps=0, **CASES[case])
    mcmc = MCMC(kernel, num_warmup=0, num_samples=3, num_chains=NUM, chain_method="vectorized", progress_bar=False)
    given = {"coupling": jnp.asarray(start[:, 0]), "field": jnp.asarray(start[:, 1])}
    mcmc.run(KEY, ROWS, init_params=given, extra_fields=("accept_prob",))
    draws = mcmc.get_samples(group_by_chain=True)
    ends = np.stack([draws[name][:, -1] for name in ("coupling", "field")], axis=1)
    assert 0.1 < mcmc.get_extra_fields()["accept_prob"].mean() < 0.95
    powers = lambda x: np.concatenate([x, x**2, x[:, :1] * x[:, 1:], x**3], axis=1)  # noqa: E731
    mean = p @ powers(grid)
    error = np.sqrt((p @ powers(grid) ** 2 - mean**2) / NUM)
    # Half of the proposals are accepted, so that the ends are not the starts.
    assert np.mean(np.all(ends == start, axis=1)) < 0.7
    assert np.all(abs(powers(ends).mean(0) - mean) < 5 * error)


def equations(jaxpr):
    """Yield the equations of a program and of the programs within."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("proposal", ["random_walk", "crank_nicolson", "noisy_mala"])
def test_chains_take_their_matrices_one_after_another(proposal):
    """Batches of LAPACK calls can wait for each other's threads forever: see ``numpyro_ebm/_core/linalg.py``."""
    kernel = ExchangeKernel(lattice, exact_sampler="enumeration", num_newton_steps=2, proposal=proposal)

    def first_transition(keys):
        return kernel.sample(kernel.init(keys, 2, None, (ROWS,), {}), (ROWS,), {})

    program = jax.make_jaxpr(first_transition)(jax.random.split(KEY, 3)).jaxpr
    lapack = [each for each in equations(program) if each.primitive.name in ("lu", "cholesky", "triangular_solve")]
    assert {each.primitive.name for each in lapack} == {"lu", "cholesky", "triangular_solve"}
    assert all(each.invars[0].aval.ndim == 2 for each in lapack)


@pytest.mark.slow
def test_a_chain_that_is_too_short_biases_the_posterior():
    grid, p = exact_posterior()
    counts = {"num_warmup": 200, "num_samples": 300, "num_chains": 64}
    with pytest.warns(ebm.UnhealthyChainsWarning, match="at most 1 of the 4 elements"):
        mcmc = run(lattice, ROWS, **counts, inner=ONE_SITE, num_steps=1, proposal=RandomWalk(0.1))
    variance = p @ grid**2 - (p @ grid) ** 2
    assert mcmc.get_samples()["coupling"].var() > 1.15 * variance[0]  # little of the data's weight is left


def site_of(energy, num_rows):
    d = ebm.EnergyDistribution(energy)
    return lay_out("x", unwrap(d.expand([num_rows])), jnp.ones((num_rows, *d.event_shape), int), {})


@pytest.mark.parametrize("sampler", [enumeration, coupling_from_the_past])
@pytest.mark.parametrize("units", ["spins", "boolean"])
def test_exact_samplers_draw_from_the_enumerated_distribution(sampler, units):
    energy = Ising(SQUARE, [0.9, -0.7, 0.4, -0.3], [[0.3, -0.5], [0.1, 0.0]], units=units)
    states = STATES if units == "spins" else (STATES + 1) // 2
    log_p = -np.asarray(jax.vmap(energy)(jnp.asarray(states)))
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    draws = np.asarray(sampler(KEY, site_of(energy, 20_000)))
    found = np.array([np.mean((draws == state).all((1, 2))) for state in states])
    assert np.all(abs(found - p) < 5 * np.sqrt(p * (1 - p) / len(draws)))


def gumbel():
    """A skewed density, where the first and the second of two draws differ unless they are exchangeable."""
    return ebm.EnergyDistribution(lambda event: jnp.sum(event + jnp.exp(-event)), (2,))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel", ["mala", "barker", "hmc", "dynamic_hmc", "nuts", ebm.EllipticalSlice(jnp.zeros(2), jnp.eye(2))]
)
def test_reversible_kernels_have_detailed_balance(kernel):
    """A stationary start and the end of a transition are exchangeable: moments are symmetric in the two."""
    d, kernel = gumbel(), resolve_kernel(kernel)
    start = dist.Gumbel().sample(KEY, (40_000, 2))
    assert kernel.reversible() is kernel
    if kernel.step_size is not None:
        kernel = kernel.bind(d).adapted(step_size=0.3)

    def move(key, x):
        log_density = lambda x: -d.energy(x)  # noqa: E731
        return kernel.step(key, kernel.init(key, x, log_density), log_density)[0].position

    end = jax.vmap(move)(jax.random.split(jax.random.key(1), len(start)), start)
    x, y = np.asarray(start), np.asarray(end)
    terms = np.concatenate([x**2 * y - x * y**2, x[:, :1] * y[:, 1:] - y[:, :1] * x[:, 1:]], axis=1)
    assert np.all(abs(terms.mean(0)) < 5 * terms.std(0) / np.sqrt(len(terms)))
    assert np.mean(x != y) > 0.3


@pytest.mark.parametrize("name", some_slow(["gibbs"], ["flips", "gwg", "dmala", "swendsen_wang"]))
def test_reversible_kernels_have_detailed_balance_on_states(name):
    energy = Ising(SQUARE, [0.9, 0.7, 0.4, 0.3], [[0.3, -0.5], [0.1, 0.4]])
    d = ebm.EnergyDistribution(energy)
    kernel = resolve_kernel(name, is_discrete=True).bind(d).reversible()
    kernel = kernel if kernel.step_size is None else kernel.adapted(step_size=0.5)
    log_p = -np.asarray(jax.vmap(energy)(jnp.asarray(STATES)))
    which = np.random.default_rng(0).choice(16, 40_000, p=np.exp(log_p - np.logaddexp.reduce(log_p)))
    start = kernel.lift_all(jax.vmap(d.unconstrain)(jnp.asarray(STATES[which])))
    log_density = keep(lambda x, _: d.log_prob(x), d.known)
    ends = chains.advance(KEY, kernel, log_density, start, None, num_steps=1).positions
    reached = np.asarray(jax.vmap(kernel.lower)(kernel.as_draws(ends))).reshape(-1, 4) > 0
    pairs = np.zeros((16, 16))
    np.add.at(pairs, (which, reached @ np.array([8, 4, 2, 1])), 1)
    assert np.diagonal(pairs).sum() < 0.98 * pairs.sum()
    both = pairs + pairs.T
    assert np.all(abs(pairs - pairs.T)[both > 0] < 5 * np.sqrt(both[both > 0]))


def precision(x):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda event: 0.5 * t * event**2), obs=x)


def exact_rows(rng_key, latents):
    return jax.random.normal(rng_key, (200,)) / jnp.sqrt(latents["t"])


def check_against(draws, mean, sd, share=0.05):
    """Check a posterior's mean within 3 Monte Carlo errors and its standard deviation within a share."""
    draws = np.asarray(draws)
    ess = effective_sample_size(draws)
    assert np.all(ess > 400)
    assert np.all(abs(draws.mean((0, 1)) - mean) < 3 * draws.std((0, 1)) / np.sqrt(ess))
    assert np.all(abs(draws.std((0, 1)) / sd - 1) < share)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"exact_sampler": exact_rows}, {"inner": "mala", "num_steps": 50}])
def test_the_precision_of_a_gaussian_has_its_known_posterior(options):
    x = np.random.default_rng(0).normal(0, 0.5, 200)
    mcmc = run(precision, x, num_warmup=200, num_samples=1000, num_chains=8, **options)
    check_against(mcmc.get_samples(group_by_chain=True)["t"], 4.2319, 0.4190)


@pytest.mark.slow
def test_ranks_of_the_truth_are_uniform():
    """Simulation based calibration: 200 data sets from the prior, each with a chain of its own in one compiled program."""
    num, every = 200, 10
    kernel = ExchangeKernel(precision, exact_sampler=lambda key, z: jax.random.normal(key, (20,)) / jnp.sqrt(z["t"]))

    def run(key, x):
        def step(state, _):
            state = kernel.sample(state, (x,), {})
            return state, state.z["t"]

        state, _ = jax.lax.scan(step, kernel.init(key, 200, None, (x,), {}), None, length=200)
        return jax.lax.scan(step, state, None, length=990)[1][::every]

    keys = jax.random.split(KEY, 3)
    truth = jax.random.gamma(keys[0], 2.0, (num,))
    x = jax.random.normal(keys[1], (num, 20)) / jnp.sqrt(truth)[:, None]
    draws = np.exp(jax.jit(jax.vmap(run))(jax.random.split(keys[2], num), x))
    ranks = np.sum(draws < np.asarray(truth)[:, None], axis=1)
    counts = np.histogram(ranks, 10, (-0.5, 99.5))[0]
    assert np.sum((counts - num / 10) ** 2 / (num / 10)) < stats.chi2.ppf(1 - 1e-6, 9)
    # The middle half of the ranks holds half of them, as a band of 95 % allows.
    assert abs(np.mean((ranks >= 25) & (ranks < 75)) - 0.5) < 1.96 * np.sqrt(0.25 / num)


@pytest.mark.slow
def test_simuk_calibrates_the_kernel_unchanged():
    def model(x=None):
        t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
        with numpyro.plate("rows", 20):
            numpyro.sample("x", ebm.EnergyDistribution(lambda event: 0.5 * t * event**2), obs=x)

    kernel = ExchangeKernel(model, exact_sampler=lambda key, z: jax.random.normal(key, (20,)) / jnp.sqrt(z["t"]))
    settings = {"num_warmup": 50, "num_samples": 100}
    sbc = simuk.SBC(kernel, num_simulations=2, sample_kwargs=settings, seed=1, data_dir={"x": np.zeros(20)})
    sbc.run_simulations()
    assert sbc.simulations["prior_sbc"]["t"].shape == (1, 2)


@pytest.mark.slow
def test_exact_draws_leave_the_step_of_their_bridges_alone():
    """They are never rejected, which would let it grow without bound."""
    options = {"exact_sampler": exact_rows, "inner": ebm.MALA(step_size=0.2), "num_bridges": 3}
    mcmc = run(precision, np.random.default_rng(0).normal(0, 0.5, 200), num_warmup=50, num_samples=200, **options)
    assert mcmc.last_state.averaging == {"x": None}
    assert mcmc.get_extra_fields()["accept_prob"].mean() > 0.3


@pytest.mark.slow
def test_several_energies_and_an_ordinary_likelihood_share_a_hierarchy():
    """Two Gaussian energies with precisions from a common prior, and a count: the posterior of a joint grid."""

    def model(x, y, count):
        rate = numpyro.sample("rate", dist.Gamma(3.0, 1.0))
        s, t = numpyro.sample("s", dist.Exponential(rate)), numpyro.sample("t", dist.Exponential(rate))
        numpyro.sample("count", dist.Poisson(rate), obs=count)
        with numpyro.plate("xs", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda event: 0.5 * s * event**2), obs=x)
        with numpyro.plate("ys", len(y)):
            numpyro.sample("y", ebm.EnergyDistribution(lambda event: 0.5 * t * event**2), obs=y)

    rng = np.random.default_rng(2)
    x, y = rng.normal(0, 1.0, 6), rng.normal(0, 0.6, 9)

    def exact(name, num):
        return lambda key, latents: jax.random.normal(key, (num,)) / jnp.sqrt(latents[name])

    samplers = {"x": exact("s", 6), "y": exact("t", 9)}
    mcmc = run(model, x, y, 2, num_warmup=300, num_samples=500, num_chains=32, exact_sampler=samplers)
    # Given the rate, s and t are Gamma(1 + n / 2, rate + S / 2).
    rate = np.linspace(0.01, 15, 3000)
    shapes, sums = 1 + np.array([6, 9]) / 2, np.array([np.sum(x**2), np.sum(y**2)]) / 2
    log_p = 2 * np.log(rate) - rate + 2 * np.log(rate) - rate + 2 * np.log(rate)
    log_p -= sum(shape * np.log(rate + half) for shape, half in zip(shapes, sums, strict=True))
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    draws = mcmc.get_samples(group_by_chain=True)
    for name, mean in (
        ("rate", p @ rate),
        ("s", p @ (shapes[0] / (rate + sums[0]))),
        ("t", p @ (shapes[1] / (rate + sums[1]))),
    ):
        values = np.asarray(draws[name])
        ess = effective_sample_size(values)
        assert ess > 400
        assert abs(values.mean() - mean) < 5 * values.std() / np.sqrt(ess)


@pytest.mark.slow
def test_chains_run_one_by_one_and_go_on_where_they_stopped():
    whole = run(lattice, ROWS, num_chains=2, chain_method="sequential", inner="gibbs", num_steps=2)
    assert whole.get_samples(group_by_chain=True)["coupling"].shape == (2, 4)
    together = run(lattice, ROWS, num_chains=2, inner="gibbs", num_steps=2)
    np.testing.assert_allclose(whole.get_samples()["coupling"], together.get_samples()["coupling"], rtol=1e-4)
    together.post_warmup_state = together.last_state
    together.run(together.post_warmup_state.rng_key, ROWS)
    assert together.last_state.i.tolist() == [11, 11]
    posterior = ebm.to_arviz(together)["posterior"]
    assert set(posterior.data_vars) == {"coupling", "field"}


@pytest.mark.slow
def test_a_population_goes_on_after_a_warm_up_of_its_own():
    kernel = ExchangeKernel(lattice, exact_sampler="enumeration", num_newton_steps=2)
    mcmc = MCMC(kernel, num_warmup=3, num_samples=20, num_chains=16, chain_method="vectorized", progress_bar=False)
    mcmc.warmup(KEY, ROWS)
    mcmc.run(KEY, ROWS)
    assert kernel.is_ensemble_kernel
    assert mcmc.last_state.i.tolist() == [23] * 16
    draws = np.asarray(mcmc.get_samples(group_by_chain=True)["coupling"])
    assert len(np.unique(draws)) > 32


def diagnosis(model, *args, **options):
    mcmc = run(model, *args, num_warmup=300, num_samples=500, num_chains=8, **options)
    with pytest.raises(TypeError, match="draws of parameters"):
        ebm.diagnose(mcmc, data=args[0])
    return ebm.diagnose(mcmc, min_ess=50)


def with_many_numbers(x):
    """A deterministic site is no latent: its size must not keep the posterior from being checked."""
    numpyro.deterministic("many", jnp.arange(200.0))
    lattice(x)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"exact_sampler": "enumeration"}, {"inner": "gibbs", "num_steps": 20}])
def test_a_right_posterior_passes_the_diagnosis(options):
    found = diagnosis(with_many_numbers, ROWS, **options)
    assert found.is_healthy, str(found)
    assert ("auxiliary chains" in found.as_dict()) == ("inner" in options)
    assert {"auxiliary acceptance", "auxiliary move", "Bartlett identity"} < set(found.as_dict())


@pytest.mark.slow
def test_the_diagnosis_sees_chains_that_are_too_short():
    with pytest.warns(ebm.UnhealthyChainsWarning, match="at most 1 of the 4 elements"):
        found = diagnosis(lattice, ROWS, inner=ONE_SITE, num_steps=1)
    assert "Bartlett identity" in {each.name for each in found.warnings}
    assert "times the right one" in found["Bartlett identity"].measured


@pytest.mark.slow
def test_the_diagnosis_sees_a_frozen_inner_kernel():
    x = np.random.default_rng(0).normal(0, 0.5, 20)
    options = {"num_steps": 5, "proposal": "crank_nicolson"}  # which mixes even here, so that errors are small
    found = diagnosis(precision, x, inner=ebm.Langevin(step_size=1e-9), **options)
    assert {"auxiliary move", "auxiliary chains"} <= {each.name for each in found.warnings}


@pytest.mark.slow
def test_terms_of_a_known_posterior_are_zero_on_average():
    """At exact draws of a posterior, and with an energy of one row, whose score has no variance between rows."""
    grid, p = exact_posterior()
    draws = grid[np.random.default_rng(3).choice(len(grid), 4000, p=p)]
    kernel = ExchangeKernel(lattice, exact_sampler="enumeration", num_newton_steps=0)
    mcmc = MCMC(kernel, num_warmup=0, num_samples=1, progress_bar=False)
    mcmc.run(KEY, ROWS)
    given = {"coupling": jnp.asarray(draws[None, :, 0]), "field": jnp.asarray(draws[None, :, 1])}
    names, terms = kernel.terms_of_draws(mcmc.last_state, given)
    assert names == ["coupling", "field"]
    bartlett = np.asarray(terms.bartlett)[0]
    assert np.all(abs(bartlett.mean(0)) < 5 * bartlett.std(0) / np.sqrt(len(bartlett)))
    assert np.all(bartlett.std(0) / np.sqrt(len(bartlett)) < 0.1 * np.linalg.inv(np.cov(draws.T)).max())


def ordinary(x):
    numpyro.sample("x", dist.Normal(numpyro.sample("m", dist.Normal(0, 1)), 1), obs=x)


def scaled(x):
    with numpyro.handlers.scale(scale=0.5):
        lattice(x)


def with_latent_energy(x):
    numpyro.sample("z", ebm.EnergyDistribution(lambda event: 0.5 * event**2))
    lattice(x)


def with_discrete(x):
    numpyro.sample("k", dist.Bernoulli(0.5))
    lattice(x)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (ordinary, {}, "observes none whose log Z is missing"),
        (scaled, {}, "the likelihood has the scale 0.5"),
        (with_latent_energy, {}, "this energy is latent"),
        (with_discrete, {}, "are discrete"),
        (lattice, {"inner": "mala"}, "cannot sample a discrete support"),
        (lattice, {"inner": "gibs"}, "Unknown kernel 'gibs'"),
        (lattice, {"exact_sampler": "enumerate"}, "Unknown exact sampler"),
        (lattice, {"exact_sampler": {"y": "enumeration"}}, "no energy site 'y'"),
        (lattice, {"exact_sampler": lambda key, latents: jnp.ones((3, 2, 2))}, r"returned shape \(3, 2, 2\)"),
        (lattice, {"proposal": "differences"}, "an even number of chains"),
        (lattice, {"proposal": "difference"}, "Unknown proposal"),
        (lattice, {"num_steps": 0}, "num_steps"),
        (lattice, {"inner": "block_gibbs", "num_bridges": 3}, "needs a kernel with detailed balance"),
        (lattice, {"inner": "gibbs", "exact_sampler": "enumeration"}, "of which only one draws"),
    ],
)
def test_what_cannot_be_right_is_refused(model, options, words):
    with pytest.raises((ebm.EnergyError, TypeError), match=words):
        run(model, ROWS, **options)
