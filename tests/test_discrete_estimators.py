"""Estimators of discrete energies: against enumeration, and their identities."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import check_against_grid, some_slow, surrogate
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.fitted_marginals import fit_marginals

KEY = jax.random.key(0)
GRID = np.arange(9).reshape(3, 3)
LEFT = np.r_[GRID[:, :-1].ravel(), GRID[:-1].ravel()]
RIGHT = np.r_[GRID[:, 1:].ravel(), GRID[1:].ravel()]
SPINS = np.array(list(itertools.product((-1, 1), repeat=9)))
TRUTH = {"beta": 0.3, "h": 0.1}
P = np.exp(0.3 * (SPINS[:, LEFT] * SPINS[:, RIGHT]).sum(1) + 0.1 * SPINS.sum(1) - 6.9126820)


def ising(x, weights=None):
    """The 3 x 3 Ising model with open edges; weights of rows as a scale."""
    beta, h = numpyro.param("beta", 0.0), numpyro.param("h", 0.0)
    energy = lambda s: -beta * jnp.sum(s[LEFT] * s[RIGHT]) - h * jnp.sum(s)  # noqa: E731
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=1.0 if weights is None else weights):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (9,), support=ebm.spins), obs=x)


def units(x):
    """The same with units of 0 and 1, as NumPyro's distributions have them."""
    beta, h = numpyro.param("beta", 0.0), numpyro.param("h", 0.0)

    def energy(x):
        s = 2 * x - 1
        return -beta * jnp.sum(s[LEFT] * s[RIGHT]) - h * jnp.sum(s)

    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (9,), support=constraints.boolean), obs=x)


def potts(x):
    """Three categories on two sites, with all couplings that are free."""
    field, coupling = numpyro.param("field", jnp.zeros((2, 2))), numpyro.param("coupling", jnp.zeros((2, 2)))

    def energy(x):
        return -jnp.sum(field * x[:, 1:]) - x[0, 1:] @ coupling @ x[1, 1:]

    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (2, 3), support=ebm.one_hot), obs=x)


def trained(model, estimator, *args, num_steps=600, rate=0.05):
    optimizer = optax.adam(optax.exponential_decay(rate, num_steps // 3, 0.1))
    svi = SVI(estimator, ebm.empty_guide, optimizer, Trace_ELBO())
    return svi.run(KEY, num_steps, *args, progress_bar=False).params


ROWS = np.repeat(SPINS, np.round(4000 * P).astype(int), axis=0)


@functools.cache
def maximum_likelihood():
    """The parameters by `exact` on the rows, found once for all tests."""
    return trained(ising, ebm.estimate(ising, "exact"), ROWS)


def test_the_weights_are_the_distribution():
    np.testing.assert_allclose(P.sum(), 1, atol=1e-6)


OF_VALUES = ["exact", "pseudolikelihood", "ratio_matching", "mpf", "discrete_fisher", "generalized_sm"]


@pytest.mark.parametrize("name", OF_VALUES)
def test_the_population_has_the_true_parameters(name):
    params = trained(ising, ebm.estimate(ising, name), SPINS, 512 * P)
    np.testing.assert_allclose([params["beta"], params["h"]], [0.3, 0.1], atol=1e-4)


@pytest.mark.parametrize("name", some_slow(OF_VALUES[:4], OF_VALUES[4:]))
def test_one_hot_categories(name):
    # A saturated model: the estimate gives the shares of the data whatever the objective.
    codes = np.array(list(itertools.product(range(3), repeat=2)))
    counts = np.array([8, 3, 5, 2, 9, 4, 6, 1, 7])
    x = np.eye(3, dtype=int)[np.repeat(codes, counts, axis=0)]
    params = trained(potts, ebm.estimate(potts, name), x, num_steps=1500, rate=0.1)
    one_hot = np.eye(3)[codes]
    log_p = np.sum(np.asarray(params["field"]) * one_hot[:, :, 1:], (1, 2))
    log_p += np.einsum("ia,ab,ib->i", one_hot[:, 0, 1:], np.asarray(params["coupling"]), one_hot[:, 1, 1:])
    np.testing.assert_allclose(np.exp(log_p - np.logaddexp.reduce(log_p)), counts / 45, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_values_against_enumeration(seed):
    x = SPINS[np.random.default_rng(seed).choice(512, 5)]
    log_p = lambda s: 0.4 * np.sum(s[..., LEFT] * s[..., RIGHT], -1) - 0.2 * np.sum(s, -1)  # noqa: E731
    flipped = np.stack([x * np.where(np.arange(9) == i, -1, 1) for i in range(9)])
    rise = log_p(flipped) - log_p(x)
    params = {"beta": 0.4, "h": -0.2}
    value = lambda name: float(surrogate(ebm.estimate(ising, name), params, x))  # noqa: E731
    np.testing.assert_allclose(value("exact"), np.sum(log_p(x) - np.logaddexp.reduce(log_p(SPINS))), rtol=1e-5)
    np.testing.assert_allclose(value("pseudolikelihood"), -np.sum(np.logaddexp(0, rise)), rtol=1e-5)
    np.testing.assert_allclose(value("mpf"), -np.sum(np.exp(rise / 2)), rtol=1e-5)
    np.testing.assert_allclose(value("ratio_matching"), -np.sum(1 / (1 + np.exp(-rise)) ** 2), rtol=1e-5)
    np.testing.assert_allclose(value("discrete_fisher"), -np.sum(np.exp(2 * rise) - 2 * np.exp(-rise)), rtol=1e-5)
    # Lyu's marginalisation: for two values the same, up to a constant.
    np.testing.assert_allclose(value("generalized_sm"), value("discrete_fisher") + 3 * x.size, rtol=1e-5)


FIELDS = np.array([-1.0, 0.3, 2.0])


def in_context(x):
    """Three units with a field of each row's own."""
    with numpyro.plate("rows", 3):
        d = ebm.EnergyDistribution(
            lambda x, c: -c * jnp.sum(x), (3,), support=constraints.boolean, context=jnp.asarray(FIELDS)
        )
        numpyro.sample("x", d, obs=x)


def of_factors(x):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", dist.BernoulliProbs(0.5).expand([3]).to_event(1), obs=x)
        ebm.energy_factor("f", lambda x, c: -c * jnp.sum(x), x=x, c=jnp.asarray(FIELDS))


def of_bases(x):
    with numpyro.plate("rows", 3):
        base = dist.BernoulliLogits(jnp.asarray(FIELDS)[:, None] * jnp.ones(3)).to_event(1)
        numpyro.sample(
            "x", ebm.EnergyDistribution(lambda x: 0.0 * jnp.sum(x), (3,), support=constraints.boolean, base=base), obs=x
        )


def one_context(x):
    with numpyro.plate("rows", 3):
        context = jnp.asarray(0.3)
        d = ebm.EnergyDistribution(lambda x, c: -c * jnp.sum(x), (3,), support=constraints.boolean, context=context)
        numpyro.sample("x", d, obs=x)


@pytest.mark.parametrize("model", [in_context, of_factors, of_bases, one_context])
def test_exact_is_the_likelihood_of_rows_with_a_context(model):
    x = np.array([[0, 1, 1], [1, 1, 1], [0, 0, 1]])
    fields = np.full(3, 0.3) if model is one_context else FIELDS
    expected = np.sum(fields * x.sum(1) - 3 * np.logaddexp(0, fields))
    np.testing.assert_allclose(surrogate(ebm.estimate(model, "exact"), {}, x), expected, rtol=1e-5)


@pytest.mark.slow
def test_cd_with_one_update_of_a_random_element_is_pseudolikelihood_on_average():
    x = SPINS[np.random.default_rng(0).choice(512, 64)]
    kernel = ebm.Gibbs(scan="random", num_updates=1)
    estimated = ebm.estimate(ising, "cd", kernel=kernel)
    slopes = lambda model, key: jax.grad(lambda p: surrogate(model, p, x, key=key))(TRUTH)  # noqa: E731
    draws = jax.lax.map(lambda key: slopes(estimated, key), jnp.arange(3000), batch_size=500)
    expected = slopes(ebm.estimate(ising, "pseudolikelihood"), 0)
    for name in TRUTH:
        each = 9 * np.asarray(draws[name])
        assert abs(each.mean() - expected[name]) < 5 * each.std() / np.sqrt(3000)


@pytest.mark.parametrize(
    ("name", "kernel", "num_steps"),
    [
        ("cd", "gibbs", 1),
        ("replay", "gibbs", 1),
        ("mle", "gibbs", 5),
        ("pcd", "gibbs", 1),
        ("pcd", "flips", 2),
        ("pcd", "gwg", 10),
        ("pcd", "dmala", 5),
    ],
)
@pytest.mark.slow
def test_chains_find_the_maximum_likelihood(name, kernel, num_steps):
    params = trained(ising, ebm.estimate(ising, name, kernel=kernel, num_steps=num_steps), ROWS)
    for key, value in maximum_likelihood().items():
        assert abs(params[key] - value) < 0.02


@pytest.mark.parametrize("name", ["nce", "ranking_nce", "bregman_nce"])
@pytest.mark.parametrize("noise", [None, "marginals", dist.BernoulliProbs(0.6).expand([9]).to_event(1)])
@pytest.mark.slow
def test_noise_contrast_finds_the_maximum_likelihood(name, noise):
    params = trained(units, ebm.estimate(units, name, nu=10, noise=noise), (ROWS + 1) // 2)
    for key, value in maximum_likelihood().items():
        assert abs(params[key] - value) < 0.03
    if name != "ranking_nce":
        np.testing.assert_allclose(params["x$log_normalizer"], 6.9127, atol=0.1)


def test_fitted_marginals_are_normalised_and_leave_their_row_out():
    x = jnp.asarray(np.random.default_rng(0).choice(3, (7, 2), p=[0.2, 0.3, 0.5]))
    d = ebm.EnergyDistribution(lambda x: 0.0 * jnp.sum(x), (2,), support=constraints.integer_interval(0, 2))
    fitted = fit_marginals(Site("x", d, (7,), x, None, jnp.arange(7) != 5))
    states = jnp.asarray(list(itertools.product(range(3), repeat=2)))
    log_prob = fitted.log_prob(jnp.broadcast_to(states[:, None], (9, 7, 2)))
    np.testing.assert_allclose(jax.nn.logsumexp(log_prob, axis=0), 0, atol=1e-5)
    others = np.asarray(x)[[1, 3]]  # for row 0: the odd rows, without the masked one
    counts = np.array([np.bincount(others[:, i], minlength=3) for i in range(2)]) + 0.5
    shares = counts / counts.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(log_prob[:, 0]), shares[0, states[:, 0]] * shares[1, states[:, 1]], rtol=1e-5)
    draws = np.asarray(fitted.sample(KEY, 4000))[:, 0]
    found = (draws[:, None] == np.asarray(states)).all(-1).mean(0)
    p = np.exp(np.asarray(log_prob[:, 0]))
    assert np.all(abs(found - p) < 5 * np.sqrt(p * (1 - p) / 4000))


def test_the_default_kernel_follows_the_support():
    pairs = lambda model, x: ebm.estimate(model, "pcd").sites(x)  # noqa: E731
    (discrete, _), *_ = pairs(ising, SPINS[:4])
    assert isinstance(discrete.kernel, ebm.Gibbs)

    def normal(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: x**2), obs=x)

    (continuous, _), *_ = pairs(normal, np.arange(3.0))
    assert isinstance(continuous.kernel, ebm.MALA)


@pytest.mark.slow
def test_nuts_on_exact_is_the_posterior():
    x = SPINS[np.random.default_rng(0).choice(512, 30, p=P / P.sum())]

    def model(x):
        beta = numpyro.sample("beta", dist.Normal(0, 1))
        energy = lambda s: -beta * jnp.sum(s[LEFT] * s[RIGHT])  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (9,), support=ebm.spins), obs=x)

    mcmc = MCMC(NUTS(ebm.estimate(model, "exact")), num_warmup=300, num_samples=2000, progress_bar=False)
    mcmc.run(KEY, x)
    grid = np.linspace(-1, 2, 3001)
    pairs = (SPINS[:, LEFT] * SPINS[:, RIGHT]).sum(1)
    log_z = np.logaddexp.reduce(grid[:, None] * pairs, axis=1)
    log_p = grid * (x[:, LEFT] * x[:, RIGHT]).sum() - len(x) * log_z - grid**2 / 2
    check_against_grid(np.asarray(mcmc.get_samples()["beta"]), grid, log_p)


REFUSED = {
    "a continuous event": ("pseudolikelihood", {}, constraints.real, np.zeros((2, 9)), "'sm'"),
    "no end of values": ("mpf", {}, constraints.nonnegative_integer, np.zeros((2, 9), int), "two bounds.*discrete_fisher"),
    "counts for the conditionals": (
        "generalized_sm",
        {},
        constraints.nonnegative_integer,
        np.zeros((2, 9), int),
        "two bounds",
    ),
    "a weighting": ("generalized_sm", {"weighting": "distance"}, ebm.spins, SPINS[:2], "no ends.*'distance'"),
    "a real number": ("discrete_fisher", {}, constraints.real, np.zeros((2, 9)), "'sm'"),
    "too many states": ("exact", {"max_states": 100}, ebm.spins, SPINS[:2], r"2\*\*9 states.*max_states=100"),
    "zeros as spins": ("exact", {}, ebm.spins, (SPINS[:2] + 1) // 2, r"2 \* x - 1"),
    "spins as units": ("exact", {}, constraints.boolean, SPINS[:2], "support=numpyro_ebm.spins"),
    "a gradient of the event": ("dsm", {"sigma": 0.1}, ebm.spins, SPINS[:2], "'pseudolikelihood'"),
    "a continuous kernel": ("cd", {"kernel": "mala"}, ebm.spins, SPINS[:2], "gibbs"),
    "a discrete kernel": ("cd", {"kernel": "gibbs"}, constraints.real, np.zeros((2, 9)), "mala"),
    "continuous noise": ("nce", {"noise": "gaussian"}, ebm.spins, SPINS[:2], "noise='marginals'"),
    "discrete noise": ("nce", {"noise": "marginals"}, constraints.real, np.zeros((2, 9)), "noise='gaussian'"),
    "an adapted sweep": ("cd", {"adapt_step_size": True}, ebm.spins, SPINS[:2], "'gibbs'.*adapt"),
    "a length": ("cd", {"kernel": "dmala", "scale": "data"}, ebm.spins, SPINS[:2], "scale"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case):
    name, options, support, x, words = REFUSED[case]

    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.1 * jnp.sum(x), (9,), support=support), obs=x)

    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(model, name, **options), {}, x)


def test_the_message_names_every_estimator_of_discrete_events():
    from numpyro_ebm.estimators._base import FOR_DISCRETE
    from numpyro_ebm.estimators.names import ESTIMATORS

    assert [name for name, cls in sorted(ESTIMATORS.classes.items()) if cls.takes_discrete] == FOR_DISCRETE.split("'")[1::2]


CASES = {
    "pseudolikelihood": {"block_size": 2},
    "ratio_matching": {},
    "mpf": {},
    "exact": {},
    "discrete_fisher": {},
    "generalized_sm": {},
    "energy_discrepancy": {"num_negatives": 4},
    "unbiased": {"burn_in": 1, "num_steps": 2},
}
ROW_FIELDS = np.linspace(-1, 1, 6)
ROW_STATES = np.random.default_rng(0).integers(0, 3, (6, 3))


def counts_in_context(x, mask=None, scale=1.0):
    """Three elements of three values with a field of each row's own, a weight t and a constant b."""
    t, b = numpyro.param("t", jnp.asarray(0.5)), numpyro.param("b", jnp.asarray(0.0))
    mask = np.ones(len(x), bool) if mask is None else mask
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask), numpyro.handlers.scale(scale=scale):
        energy = lambda x, c: t * c * jnp.sum(x) + 0.3 * t * x[0] * x[1] + b  # noqa: E731
        support, context = constraints.integer_interval(0, 2), jnp.asarray(ROW_FIELDS, t.dtype)
        numpyro.sample("x", ebm.EnergyDistribution(energy, (3,), support=support, context=context), obs=x)


@pytest.mark.parametrize("name", some_slow(["discrete_fisher", "energy_discrepancy"], list(CASES)[:4] + list(CASES)[5::2]))
class TestInvariants:
    """Values and gradients of rows with a context."""

    def both(self, name, x=ROW_STATES, t=0.5, **settings):
        model = ebm.estimate(counts_in_context, name, **CASES[name])
        value = lambda p: surrogate(model, p, x, **settings)  # noqa: E731
        return jax.value_and_grad(value)({"t": jnp.asarray(t), "b": jnp.asarray(0.2)})

    def test_masked_rows_take_no_part_and_scales_multiply(self, name):
        mask = np.arange(6) % 3 > 0
        value, slope = self.both(name, mask=mask)
        filled = np.where(mask[:, None], ROW_STATES, -9)
        again = self.both(name, filled, mask=mask)
        np.testing.assert_allclose([value, slope["t"]], [again[0], again[1]["t"]], rtol=1e-5)
        assert np.isfinite(value)
        twice = self.both(name, mask=mask, scale=2.0)
        np.testing.assert_allclose([twice[0], twice[1]["t"]], [2 * value, 2 * slope["t"]], rtol=1e-5)
        nothing = self.both(name, mask=np.zeros(6, bool))
        assert nothing[0] == 0
        assert nothing[1]["t"] == 0

    def test_a_constant_in_the_energy_does_not_move(self, name):
        np.testing.assert_allclose(self.both(name)[1]["b"], 0.0, atol=1e-5)

    def test_one_trace_and_a_value_for_each_row(self, name):
        traces = []

        @jax.jit
        def value(t):
            traces.append(t)
            model = ebm.estimate(counts_in_context, name, **CASES[name])
            seeded = numpyro.handlers.substitute(numpyro.handlers.seed(model, 0), {"t": t})
            return numpyro.handlers.trace(seeded).get_trace(ROW_STATES)["x"]["fn"].log_prob(ROW_STATES)

        first, second = value(jnp.asarray(0.5)), value(jnp.asarray(0.7))
        assert first.shape == second.shape == (6,)
        assert np.any(first != second)
        assert len(traces) == 1

    def test_dtypes(self, name, x64):
        for data, parameter in ((np.int8, jnp.float32), (np.float32, jnp.float64), (np.int64, jnp.float32)):
            value, slope = self.both(name, ROW_STATES.astype(data), jnp.asarray(0.5, parameter))
            assert slope["t"].dtype == parameter
            assert np.isfinite(value)

    def test_the_gradient_is_that_of_the_value(self, name, x64):
        if name == "unbiased":  # its value means nothing
            return
        value, slope = self.both(name)
        ends = [self.both(name, t=0.5 + h)[0] for h in (1e-5, -1e-5)]
        np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope["t"], rtol=1e-6)
        assert np.isfinite(value)
