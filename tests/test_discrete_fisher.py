"""The discrete Fisher divergence of counts and lattices: closed forms, its optimum, and its ends."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import check_against_grid, fit, rows_of, surrogate
from jax.scipy.special import gammaln
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm

COUNTS = np.random.default_rng(0).poisson(3.0, (400, 2))
CYCLIC, LINE = {"cyclic": True}, {"cyclic": False}


def poisson(x, mask=None, scale=1.0):
    """Poisson counts of log rates t, one for each column."""
    t = numpyro.param("t", jnp.zeros(2))
    energy = lambda x: jnp.sum(gammaln(x + 1.0) - t * x)  # noqa: E731
    mask = np.ones(len(x), bool) if mask is None else mask
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask), numpyro.handlers.scale(scale=scale):
        d = ebm.EnergyDistribution(energy, (2,), support=constraints.nonnegative_integer)
        numpyro.sample("x", d, obs=x)


def conway_maxwell(x, weights=None):
    """A Conway-Maxwell-Poisson distribution: rate exp(t[0]), dispersion t[1]."""
    t = numpyro.param("t", jnp.array([0.0, 1.0]))
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=1.0 if weights is None else weights):
        energy = lambda x: t[1] * gammaln(x + 1.0) - t[0] * x  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, support=constraints.nonnegative_integer), obs=x)


@pytest.mark.usefixtures("x64")
def test_poisson_rows_in_closed_form():
    rates = np.exp([0.4, 1.3])
    values, slopes = rows_of("discrete_fisher", poisson, COUNTS, np.log(rates))
    ratios = COUNTS / rates, (COUNTS + 1) / rates
    np.testing.assert_allclose(-values, np.sum(ratios[0] ** 2 - 2 * ratios[1], axis=1), rtol=1e-10)
    np.testing.assert_allclose(slopes, 2 * ratios[0] ** 2 - 2 * ratios[1], rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_optimum_of_poisson_counts():
    best = np.mean(COUNTS**2, 0) / np.mean(COUNTS + 1, 0)
    slopes = rows_of("discrete_fisher", poisson, COUNTS, np.log(best))[1]
    np.testing.assert_allclose(slopes.mean(0), 0.0, atol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_population_of_a_conway_maxwell_poisson():
    truth, n = jnp.array([1.1, 1.4]), np.arange(60)
    log_p = truth[0] * n - truth[1] * gammaln(n + 1.0)
    p = np.exp(log_p - np.logaddexp.reduce(log_p))
    loss = lambda t: -surrogate(ebm.estimate(conway_maxwell, "discrete_fisher"), {"t": t}, n, p)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(truth), 0.0, atol=1e-9)
    assert np.linalg.eigvalsh(jax.hessian(loss)(truth)).min() > 0.01


def test_a_sample_of_a_conway_maxwell_poisson():
    n = np.arange(60)
    log_p = 1.1 * n - 1.4 * np.asarray(gammaln(n + 1.0))
    x = np.random.default_rng(0).choice(n, 4000, p=np.exp(log_p - np.logaddexp.reduce(log_p)))
    t = fit(ebm.estimate(conway_maxwell, "discrete_fisher"), x, steps=600)["t"]
    assert abs(t[1] - 1.4) < 0.15
    # Given the dispersion the rate has a closed form.
    rate = np.mean(x ** (2 * float(t[1]))) / np.mean((x + 1) ** float(t[1]))
    np.testing.assert_allclose(np.exp(t[0]), rate, rtol=1e-2)


def test_masks_and_scales_of_counts():
    model = ebm.estimate(poisson, "discrete_fisher")
    at, mask = {"t": jnp.array([0.4, 1.3])}, np.arange(len(COUNTS)) % 3 > 0
    kept = surrogate(model, at, COUNTS[mask])
    np.testing.assert_allclose(surrogate(model, at, np.where(mask[:, None], COUNTS, -7), mask), kept, rtol=1e-5)
    np.testing.assert_allclose(surrogate(model, at, COUNTS[mask], scale=2.5), 2.5 * kept, rtol=1e-5)


def table(support, log_p, base=None):
    """A distribution of one element with a table of log probabilities, indexed from the lowest value."""

    def model(x):
        low = getattr(support, "lower_bound", 0)
        energy = lambda x: -jnp.asarray(log_p)[x - low]  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, support=support, base=base), obs=x)

    return model


@pytest.mark.parametrize("options", [CYCLIC, LINE], ids=["ring", "line"])
def test_the_ends_of_a_finite_support(options):
    p = np.random.default_rng(0).dirichlet(np.ones(5))
    x = np.arange(2, 7)
    value = surrogate(
        ebm.estimate(table(constraints.integer_interval(2, 6), np.log(p)), "discrete_fisher", **options), {}, x
    )
    down, up = np.roll(p, 1) / p, p / np.roll(p, -1)
    if options is LINE:
        down[0], up[-1] = 0.0, 0.0
    np.testing.assert_allclose(value, -np.sum(down**2 - 2 * up), rtol=1e-5)


@pytest.mark.parametrize("options", [CYCLIC, LINE], ids=["ring", "line"])
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_population_of_a_finite_support(options):
    # Every table is a model: its loss is least at the table itself, on a ring and on a line.
    p = np.random.default_rng(0).dirichlet(np.full(5, 5.0))
    loss = _population(options, p)
    np.testing.assert_allclose(jax.grad(loss)(jnp.log(p)), 0.0, atol=1e-10)
    assert np.linalg.eigvalsh(jax.hessian(loss)(jnp.log(p)))[1] > 1e-3  # the first is the constant of the energy


def _population(options, p):
    def model(t):
        energy = lambda x: -t[x]  # noqa: E731
        with numpyro.plate("rows", 5), numpyro.handlers.scale(scale=p):
            d = ebm.EnergyDistribution(energy, support=constraints.integer_interval(0, 4))
            numpyro.sample("x", d, obs=np.arange(5))

    def loss(t):
        wrapped = ebm.estimate(lambda: model(numpyro.param("t", t)), "discrete_fisher", **options)
        return -surrogate(wrapped, {"t": t})

    return loss


def test_bounds_of_each_element():
    # The second column starts at 1: there the first term of a row with a 1 is 0.
    support = constraints.integer_greater_than(jnp.array([0, 1]))

    def model(x):
        with numpyro.plate("rows", len(x)):
            energy = lambda x: jnp.sum(jnp.array([0.5, 0.7]) * x)  # noqa: E731
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,), support=support), obs=x)

    r = np.exp([0.5, 0.7])
    value = surrogate(ebm.estimate(model, "discrete_fisher"), {}, np.array([[2, 1]]))
    np.testing.assert_allclose(value, -(r[0] ** 2 - 2 * r.sum()), rtol=1e-5)


def test_a_base_without_density_ends_the_lattice():
    # Counts of a binomial base: 4 has no next value, although the support goes on.
    base = dist.BinomialProbs(0.4, 4)
    x = np.arange(5)
    with_base = table(constraints.integer_interval(0, 4), np.zeros(5), base=base)
    p = np.exp(base.log_prob(x))
    value = surrogate(ebm.estimate(with_base, "discrete_fisher", cyclic=False), {}, x)
    expected = np.sum((p[:-1] / p[1:]) ** 2) - 2 * np.sum(p[:-1] / p[1:])
    np.testing.assert_allclose(value, -expected, rtol=1e-4)


def test_rows_without_density_and_energies_that_are_no_numbers_show():
    """A row of density 0 has an infinite loss, and parameters without a density have none: neither counts as no loss."""

    def cut_off(x):
        energy = lambda x: jnp.where(jnp.sum(x) > 3, jnp.inf, 0.3 * jnp.sum(x))  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,), support=constraints.nonnegative_integer), obs=x)

    value = lambda row: surrogate(ebm.estimate(cut_off, "discrete_fisher"), {}, np.array([row]))  # noqa: E731
    assert np.isfinite(value([1, 2]))
    assert value([2, 2]) == -np.inf
    assert np.isnan(value([9, 9]))

    def counts(x):
        coupling = numpyro.param("coupling", 0.0)
        energy = ebm.energies.PoissonGraphicalModel([(0, 1)], coupling, 0.5)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    rows = np.array([[0, 1], [2, 3]])
    of_coupling = jax.jit(lambda c: surrogate(ebm.estimate(counts, "discrete_fisher"), {"coupling": c}, rows))
    assert np.isfinite(of_coupling(-0.1))
    assert np.isnan(of_coupling(0.1))


def test_a_start_far_from_the_data_stays_finite():
    value = lambda t: surrogate(ebm.estimate(poisson, "discrete_fisher"), {"t": t}, COUNTS)  # noqa: E731
    for start in (-90.0, 60.0):
        at = jnp.full(2, start)
        assert np.isfinite(value(at))
        slope = jax.grad(value)(at)
        assert np.all(np.isfinite(slope))
        assert np.all(np.sign(slope) == -np.sign(start))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::numpyro_ebm.UncalibratedPosteriorWarning")
def test_nuts_samples_the_generalised_posterior():
    x = COUNTS[:50, 0]

    def model(x):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        energy = lambda x: gammaln(x + 1.0) - x * jnp.log(rate)  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, support=constraints.nonnegative_integer), obs=x)

    mcmc = MCMC(NUTS(ebm.estimate(model, "discrete_fisher")), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(jax.random.key(0), x)
    grid = np.linspace(0.5, 12, 20_001)
    log_p = np.log(grid) - grid - (np.sum(x**2) / grid**2 - 2 * np.sum(x + 1) / grid)
    check_against_grid(np.asarray(mcmc.get_samples()["rate"]), grid, log_p)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="cyclic as True or False"):
        ebm.DiscreteFisherDivergence(cyclic=1)
    with pytest.raises(ValueError, match="lies outside the support"):
        surrogate(ebm.estimate(conway_maxwell, "discrete_fisher"), {}, np.array([3, -1]))
