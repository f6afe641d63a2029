"""Hidden members and missing entries, drawn given the rest of their row: against enumeration and closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import fit, some_slow, surrogate
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.distributions.rows import Unwrapped, lay_out
from numpyro_ebm.estimators.parts.unknown import log_completions

KEY = jax.random.key(0)
ROW, COLUMN = np.triu_indices(5, 1)
STATES = np.array(list(itertools.product((0, 1), repeat=5)))
TRUE = {
    "w": np.array([0.8, -0.5, 1.0, 0.3, 0.6, -0.9, 0.4, 0.7, -0.3, 0.5]),
    "b": np.array([-0.4, 0.2, -0.6, 0.3, -0.2]),
}
ZERO = {name: jnp.zeros(value.shape) for name, value in TRUE.items()}
AT = jax.tree.map(jnp.asarray, TRUE)
PHASE = ebm.PositivePhase(num_steps=10)


def energy(x, t):
    """A fully visible Boltzmann machine of five units."""
    return -jnp.sum(t["w"] * x[ROW] * x[COLUMN]) - t["b"] @ x


def log_likelihood(t, rows, lacks):
    """Log likelihood of what each row has, by enumeration."""
    values = jax.vmap(lambda state: -energy(state, t))(jnp.asarray(STATES))
    fits = jnp.all((jnp.nan_to_num(rows)[:, None] == STATES) | lacks[:, None], axis=-1)
    return jax.nn.logsumexp(jnp.where(fits, values, -jnp.inf), axis=1) - jax.nn.logsumexp(values)


def draws(num, seed=0):
    p = np.asarray(jax.nn.softmax(jax.vmap(lambda state: -energy(state, AT))(jnp.asarray(STATES))), float)
    return STATES[np.random.default_rng(seed).choice(32, num, p=p / p.sum())]


def improper(constraint, *shape):
    return dist.ImproperUniform(constraints.independent(constraint, len(shape)), (), shape)


def parameters(start=None):
    return {name: numpyro.param(name, jnp.asarray(value)) for name, value in (start or ZERO).items()}


def hidden_model(v, h=None):
    """Three visible units and two hidden ones."""
    t = parameters()
    with numpyro.plate("rows", len(v)):
        v = numpyro.sample("v", improper(constraints.boolean, 3), obs=v)
        h = numpyro.sample("h", improper(constraints.boolean, 2), obs=h)
        ebm.energy_factor("e", lambda v, h: energy(jnp.concatenate([v, h]), t), v=v, h=h)


def table_model(x):
    """Five columns, whose entries may be missing."""
    t = parameters()
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: energy(x, t), (5,), support=constraints.boolean), obs=x)


def gaussian_model(x, rows=None, size=None):
    k = numpyro.param("k", jnp.eye(3))
    k = 0.5 * (k + k.T)
    with numpyro.plate("rows", rows or len(x), subsample_size=size):
        batch = x if size is None else numpyro.subsample(x, event_dim=1)
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ k @ x, (3,)), obs=batch)


def gradients(model, params, *args, key=0, site="v,h$surrogate", **options):
    """Gradient of each row's surrogate, flat in the parameters."""
    flat, unravel = ravel_pytree(params)
    wrapped = ebm.estimate(model, options.pop("name", "mle"), **options)

    @jax.jit
    def of_rows(flat):
        def values(flat):
            seeded = handlers.substitute(handlers.seed(wrapped, key), unravel(flat))
            return handlers.trace(seeded).get_trace(*args)[site]["fn"].log_factor

        return jax.jacfwd(values)(flat)

    return np.asarray(of_rows(flat))


def check_mean(got, exact):
    """Independent rows against a mean, within 5 standard errors, which must be small beside the gradient."""
    error = got.std(0, ddof=1) / np.sqrt(len(got))
    assert np.all(error < 0.15 * np.abs(exact).max())
    assert np.all(np.abs(got.mean(0) - exact) < 5 * error)


def newton(loss, start, steps=12):
    flat, unravel = ravel_pytree(start)
    value = lambda flat: loss(unravel(flat))  # noqa: E731
    for _ in range(steps):
        flat = flat - jnp.linalg.solve(jax.hessian(value)(flat), jax.grad(value)(flat))
    return flat, jax.hessian(value)(flat)


HOLES = np.random.default_rng(1).uniform(size=(2500, 5)) < 0.2
TABLE = np.where(HOLES, np.nan, draws(2500))


@pytest.fixture(scope="module")
def observed_data_estimate():
    """The maximiser of the observed data likelihood of the table, and its standard errors, by enumeration."""
    loss = lambda t: -jnp.sum(log_likelihood(t, TABLE, HOLES))  # noqa: E731
    best, curvature = newton(loss, AT)
    return best, jnp.sqrt(jnp.diag(jnp.linalg.inv(curvature)))


class TestHiddenMembers:
    rows = np.tile(draws(40)[:, :3], (150, 1))

    def exact(self, params=AT):
        lacks = jnp.array([0, 0, 0, 1, 1], bool)
        whole = jnp.concatenate([jnp.asarray(self.rows[:40]), jnp.zeros((40, 2), int)], axis=1)
        grad = jax.grad(lambda t: jnp.mean(log_likelihood(t, whole, jnp.broadcast_to(lacks, (40, 5)))))(params)
        return ravel_pytree(grad)[0]

    @pytest.mark.parametrize("kernel", some_slow([None], ["flips", "gwg", "dmala"]))
    def test_gradient_of_the_marginal_likelihood(self, kernel):
        params = {"w": 0.5 * AT["w"], "b": AT["b"]}
        phase = ebm.PositivePhase(kernel, num_steps=15)
        got = gradients(hidden_model, params, self.rows, num_steps=15, positive_phase=phase)
        check_mean(got, self.exact(params))

    @pytest.mark.slow
    def test_one_start_without_steps_would_be_wrong(self):
        # The check above can fail: uniform h in place of h given v has another mean.
        h = np.random.default_rng(0).integers(0, 2, (len(self.rows), 2))
        params = {"w": 0.5 * AT["w"], "b": AT["b"]}
        got = gradients(hidden_model, params, self.rows, h, num_steps=15)
        error = got.std(0) / np.sqrt(len(got))
        assert np.max(np.abs(got.mean(0) - self.exact(params)) / error) > 10

    def test_exact_sums_hidden_units_out(self):
        v = jnp.asarray(self.rows[:40])
        value, grad = jax.value_and_grad(lambda p: surrogate(ebm.estimate(hidden_model, "exact"), p, v))(AT)
        whole = jnp.concatenate([v, jnp.zeros((40, 2), int)], axis=1)
        lacks = jnp.broadcast_to(jnp.array([0, 0, 0, 1, 1], bool), (40, 5))
        np.testing.assert_allclose(value, jnp.sum(log_likelihood(AT, whole, lacks)), rtol=1e-5)
        np.testing.assert_allclose(ravel_pytree(grad)[0] / 40, self.exact(), atol=1e-5)

    @pytest.mark.slow
    def test_a_fit_reaches_the_maximum_of_the_marginal_likelihood(self):
        v = jnp.asarray(draws(3000)[:, :3])
        lacks = jnp.broadcast_to(jnp.array([0, 0, 0, 1, 1], bool), (3000, 5))
        whole = jnp.concatenate([v, jnp.zeros((3000, 2), int)], axis=1)
        # Three binary columns have 8 probabilities, which a saturated table fits exactly.
        counts = np.bincount(np.asarray(v) @ [4, 2, 1], minlength=8) / 3000
        best = np.sum(counts * np.log(counts))
        params = fit(ebm.estimate(hidden_model, "pcd", num_steps=5, positive_phase=PHASE), v, rate=0.05)
        assert best - jnp.mean(log_likelihood(params, whole, lacks)) < 0.004
        assert best - jnp.mean(log_likelihood(ZERO, whole, lacks)) > 0.05

    @pytest.mark.slow
    def test_a_row_has_what_it_had(self):
        trace = handlers.trace(handlers.seed(ebm.estimate(hidden_model, "cd", positive_phase=PHASE), 0)).get_trace(
            self.rows[:8]
        )
        assert trace["v"]["value"] is not None
        np.testing.assert_array_equal(trace["v"]["value"], self.rows[:8])


def rbm_pair(v):
    """A restricted Boltzmann machine as a general energy of two members."""
    w = numpyro.param("weights", jnp.zeros((3, 2)))
    a, c = numpyro.param("visible", jnp.zeros(3)), numpyro.param("hidden", jnp.zeros(2))
    with numpyro.plate("rows", len(v)):
        v = numpyro.sample("v", improper(constraints.boolean, 3), obs=v)
        h = numpyro.sample("h", improper(constraints.boolean, 2))
        ebm.energy_factor("e", lambda v, h: -v @ w @ h - a @ v - c @ h, v=v, h=h)


def rbm_free(v):
    """The same by its free energy."""
    w = numpyro.param("weights", jnp.zeros((3, 2)))
    a, c = numpyro.param("visible", jnp.zeros(3)), numpyro.param("hidden", jnp.zeros(2))
    with numpyro.plate("rows", len(v)):
        numpyro.sample("v", ebm.EnergyDistribution(ebm.energies.RBM(w, a, c)), obs=v)


class TestRBM:
    params = {"weights": jnp.array([[0.5, -1.0], [1.2, 0.3], [-0.7, 0.9]]), "visible": jnp.array([0.1, -0.3, 0.2])}
    params |= {"hidden": jnp.array([-0.2, 0.4])}
    rows = jnp.asarray(np.random.default_rng(0).integers(0, 2, (30, 3)))

    def grad(self, model):
        return ravel_pytree(jax.grad(lambda p: surrogate(ebm.estimate(model, "exact"), p, self.rows))(self.params))[0]

    def test_exact_is_that_of_the_free_energy(self):
        np.testing.assert_allclose(self.grad(rbm_pair), self.grad(rbm_free), rtol=1e-4, atol=1e-5)

    @pytest.mark.slow
    def test_sampled_mean_is_that_of_the_free_energy(self):
        got = gradients(rbm_pair, self.params, jnp.tile(self.rows, (150, 1)), num_steps=15, positive_phase=PHASE)
        check_mean(got, np.asarray(self.grad(rbm_free)) / 30)


class TestGaussian:
    root = np.array([[1.3, 0.4, -0.5, 0.2], [0.0, 1.1, 0.6, -0.3], [0.0, 0.0, 0.9, 0.5], [0.0, 0.0, 0.0, 1.2]])
    k = jnp.asarray(root.T @ root, jnp.float32)

    def model(self, v):
        k = numpyro.param("k", self.k)
        k = 0.5 * (k + k.T)
        with numpyro.plate("rows", len(v)):
            v = numpyro.sample("v", improper(constraints.real, 2), obs=v)
            h = numpyro.sample("h", improper(constraints.real, 2))
            ebm.energy_factor("e", lambda v, h: 0.5 * jnp.concatenate([v, h]) @ k @ jnp.concatenate([v, h]), v=v, h=h)

    @pytest.mark.parametrize("kernel", some_slow([], [ebm.HMC(0.4, 5), None, "barker"]))
    def test_gradient_of_the_marginal(self, kernel):
        v = np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32) * [1.0, 0.5]

        def marginal(k):
            cov = jnp.linalg.inv(0.5 * (k + k.T))[:2, :2]
            return jnp.mean(dist.MultivariateNormal(jnp.zeros(2), cov).log_prob(v))

        # The negatives start from the model itself, so that the positive phase alone is under test.
        phase = ebm.PositivePhase(kernel, num_steps=60)
        start = dist.MultivariateNormal(jnp.zeros(4), precision_matrix=self.k)
        rows = jnp.asarray(np.tile(v, (200, 1)), jnp.float32)
        got = gradients(self.model, {"k": self.k}, rows, start=start, num_steps=1, positive_phase=phase)
        exact = np.asarray(jax.grad(marginal)(self.k)).reshape(-1)
        error = got.std(0, ddof=1) / np.sqrt(len(got))
        assert np.all(np.abs(got.mean(0) - exact) < 5 * error)
        assert np.all(error < 0.1 * np.abs(exact).max())


class TestMissingEntries:
    """Missing completely at random: the maximiser of the observed data likelihood is found, and others are not."""

    def test_exact(self, observed_data_estimate):
        best, errors = observed_data_estimate
        gradient = jax.grad(lambda p: surrogate(ebm.estimate(table_model, "exact"), p, TABLE))
        unravel = ravel_pytree(AT)[1]
        np.testing.assert_allclose(ravel_pytree(gradient(unravel(best)))[0], 0, atol=0.02)

    @pytest.mark.slow
    def test_the_mean_gradient_is_0_at_the_maximum(self, observed_data_estimate):
        best = ravel_pytree(AT)[1](observed_data_estimate[0])
        options = {"site": "x", "num_steps": 15, "positive_phase": PHASE}
        got = gradients(table_model, best, TABLE, **options)
        error = got.std(0) / np.sqrt(len(got))
        assert np.all(np.abs(got.mean(0)) < 5 * error)
        away = gradients(table_model, AT, TABLE, **options)
        assert np.all(np.abs(away - got).std(0) > 0)

    @pytest.mark.slow
    def test_pcd(self, observed_data_estimate):
        best, errors = observed_data_estimate
        phase = ebm.PositivePhase(num_steps=5)
        found = fit(ebm.estimate(table_model, "pcd", num_steps=3, positive_phase=phase), TABLE)
        assert np.max(np.abs(ravel_pytree(found)[0] - best) / errors) < 0.5

    @pytest.mark.slow
    def test_filling_with_the_mode_is_another_estimate(self, observed_data_estimate):
        best, errors = observed_data_estimate
        filled = np.where(HOLES, np.round(np.nanmean(TABLE, axis=0)), TABLE)
        found, _ = newton(lambda t: -jnp.sum(log_likelihood(t, filled, np.zeros((2500, 5), bool))), AT)
        assert np.max(np.abs(found - best) / errors) > 3

    @pytest.mark.slow
    def test_dropping_rows_has_larger_errors(self, observed_data_estimate):
        best, errors = observed_data_estimate
        whole = TABLE[~HOLES.any(axis=1)]
        found, curvature = newton(lambda t: -jnp.sum(log_likelihood(t, whole, np.zeros(whole.shape, bool))), AT)
        assert np.all(jnp.sqrt(jnp.diag(jnp.linalg.inv(curvature))) > 1.3 * errors)
        assert np.max(np.abs(found - best) / errors) > 1

    @pytest.mark.slow
    def test_gaussian_table(self):
        rng = np.random.default_rng(2)
        precision = np.array([[1.5, 0.6, -0.4], [0.6, 1.2, 0.3], [-0.4, 0.3, 1.0]])
        x = rng.multivariate_normal(np.zeros(3), np.linalg.inv(precision), 1500)
        holes = rng.uniform(size=x.shape) < 0.25
        table = np.where(holes, np.nan, x).astype(np.float32)
        lower = np.tril_indices(3)

        def loss(flat):
            k = jnp.zeros((3, 3)).at[lower].set(flat)
            cov = jnp.linalg.inv(k + k.T - jnp.diag(jnp.diag(k)))
            has = ~holes
            both = has[:, :, None] & has[:, None, :]
            # Missing columns become independent standard normals at 0, whose densities are constants.
            own = jnp.where(both, cov, jnp.eye(3))
            return -jnp.sum(dist.MultivariateNormal(jnp.zeros(3), own).log_prob(jnp.nan_to_num(table)))

        best, curvature = newton(loss, jnp.asarray(precision[lower]))
        errors = jnp.sqrt(jnp.diag(jnp.linalg.inv(curvature)))
        phase = ebm.PositivePhase(ebm.HMC(0.5, 4), num_steps=20)
        found = fit(ebm.estimate(gaussian_model, "pcd", kernel=ebm.HMC(0.5, 4), num_steps=4, positive_phase=phase), table)
        k = 0.5 * (found["k"] + found["k"].T)
        assert np.max(np.abs(k[lower] - best) / errors) < 0.5
        filled = np.where(holes, np.nanmean(table, axis=0), table)
        assert np.max(np.abs(np.linalg.inv(filled.T @ filled / 1500)[lower] - best) / errors) > 2


def laid_out(distribution, rows):
    return lay_out("x", Unwrapped(distribution, (len(rows),), 0, None), rows, {}, may_lack=True)


def completed(distribution, rows, phase):
    site = laid_out(distribution, rows)
    phase.check(site)
    start = phase.start(jax.random.key(1), site)
    state = phase.init(distribution)
    done, _ = phase.complete(KEY, site, start.position, state, None, jnp.ones(site.position.shape[1:]))
    return done


class TestDraws:
    boltzmann = ebm.EnergyDistribution(ebm.energies.BoltzmannMachine.from_pairs(AT["w"], AT["b"]))
    plain = ebm.EnergyDistribution(lambda x: energy(x, AT), (5,), support=constraints.boolean)

    LONG = [*itertools.product(("plain", "boltzmann"), ("flips", "gwg", ebm.Gibbs(scan="random"))), ("plain", "dmala")]

    @pytest.mark.parametrize("case", some_slow([("plain", "gibbs"), ("boltzmann", "gibbs")], LONG))
    def test_conditional_of_a_discrete_row(self, case):
        name, kernel = case
        # Two patterns in one batch: each row's own elements are drawn.
        row = np.array([1, np.nan, 0, np.nan, np.nan])
        other = np.array([0, 1, np.nan, 1, 0.0])
        rows = np.stack([row, other] * 4000)
        done = completed(getattr(self, name), rows, ebm.PositivePhase(kernel, num_steps=25))
        assert done.missing is None
        np.testing.assert_array_equal(np.asarray(done.value)[~np.isnan(rows)], rows[~np.isnan(rows)])
        weights = np.exp(-np.asarray(jax.vmap(lambda s: energy(s, AT))(jnp.asarray(STATES))))
        for first, pattern in ((0, row), (1, other)):
            fits = ((pattern == STATES) | np.isnan(pattern)).all(1)
            p = weights * fits / np.sum(weights * fits)
            found = np.asarray(done.value[first::2]) @ 2 ** np.arange(5)[::-1]
            share = np.bincount(found.astype(int), minlength=32) / 4000
            assert np.all(np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / 4000))

    def test_blocks_of_a_lattice(self):
        graph = ebm.energies.Graph.lattice(2, 2)
        ising = ebm.EnergyDistribution(ebm.energies.Ising(graph, 0.5, 0.2))
        rows = np.tile(np.array([[1.0, np.nan], [np.nan, -1.0]]), (4000, 1, 1))
        done = completed(ising, rows, ebm.PositivePhase("block_gibbs", num_steps=3))
        np.testing.assert_array_equal(np.asarray(done.value)[~np.isnan(rows)], rows[~np.isnan(rows)])
        # Both free nodes have one neighbour of each sign, so that only the field tells.
        p = 1 / (1 + np.exp(-2 * 0.2))
        np.testing.assert_allclose(
            (np.asarray(done.value)[:, [0, 1], [1, 0]] == 1).mean(0), p, atol=5 * np.sqrt(0.25 / 4000)
        )

    def test_categories(self):
        fields = jnp.array([0.2, -0.3, 0.9])
        potts = ebm.EnergyDistribution(lambda x: -jnp.sum(x @ fields) - 1.5 * x[0] @ x[1], (2, 3), support=ebm.one_hot)
        rows = np.tile(np.array([[0.0, 1.0, 0.0], [np.nan, np.nan, np.nan]]), (4000, 1, 1))
        rows[::2, 1] = [0.0, 0.0, 1.0]
        done = np.asarray(completed(potts, rows, PHASE).value)
        np.testing.assert_array_equal(done[::2], rows[::2])
        np.testing.assert_array_equal(done[:, 0], rows[:, 0])
        p = np.asarray(jax.nn.softmax(fields + jnp.array([0, 1.5, 0])))
        np.testing.assert_allclose(done[1::2, 1].mean(0), p, atol=5 * np.sqrt(0.25 / 2000))

    @pytest.mark.parametrize("kernel", some_slow([None], ["nuts", "hmc", "langevin", "parallel_tempering"]))
    def test_conditional_of_a_positive_row(self, kernel):
        # Rates that a factor couples: x1 given x0 is exponential of rate 1 + x0.
        d = ebm.EnergyDistribution(lambda x: jnp.sum(x) + x[0] * x[1], (2,), support=constraints.positive)
        rows = np.tile(np.array([2.0, np.nan], np.float32), (4000, 1))
        rows[::2] = [0.5, 0.25]
        num_steps = {"langevin": 400, "nuts": 15}.get(kernel, 150)
        done = np.asarray(completed(d, rows, ebm.PositivePhase(kernel, num_steps=num_steps)).value)
        np.testing.assert_array_equal(done[::2], rows[::2])
        np.testing.assert_array_equal(done[:, 0], rows[:, 0])
        mean = done[1::2, 1].mean()
        assert abs(mean - 1 / 3) < 5 * (1 / 3) / np.sqrt(2000) + (0.03 if kernel == "langevin" else 0.0)

    @pytest.mark.slow
    def test_mixed_members(self):
        # x given s is normal with mean 2 s - 1, and s is as likely as not.
        support = ebm.Blocks(("x", "s"), (constraints.real, constraints.boolean), ((), ()))
        d = ebm.EnergyDistribution(lambda e: 0.5 * (e[0] - 2 * e[1] + 1) ** 2, (2,), support=support)
        rows = np.tile(np.array([np.nan, 1.0], np.float32), (6000, 1))
        rows[1::3] = [1.0, np.nan]
        rows[2::3] = [0.3, 1.0]
        done = np.asarray(completed(d, rows, ebm.PositivePhase({"x": ebm.HMC(1.0, 3)}, num_steps=20)).value)
        np.testing.assert_array_equal(done[~np.isnan(rows)], rows[~np.isnan(rows)])
        assert abs(done[::3, 0].mean() - 1) < 5 / np.sqrt(2000)
        assert abs(done[::3, 0].std() - 1) < 5 / np.sqrt(4000)
        p = 1 / (1 + np.exp(-2.0))
        assert abs(done[1::3, 1].mean() - p) < 5 * np.sqrt(p * (1 - p) / 2000)

    def test_starts_are_of_the_column(self):
        rows = np.random.default_rng(0).normal([50.0, -3.0], [10.0, 0.1], (500, 2)).astype(np.float32)
        rows[::2, 0] = np.nan
        d = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,))
        start = np.asarray(PHASE.start(KEY, laid_out(d, rows)).value)
        assert np.isin(start[::2, 0], rows[1::2, 0]).all()
        assert len(np.unique(start[::2, 0])) > 50

    def test_sum_over_completions(self):
        rows = np.where(np.random.default_rng(0).uniform(size=(50, 5)) < 0.4, np.nan, draws(50))
        got = jax.jit(lambda rows: log_completions(laid_out(self.plain, rows), 32))(rows)
        lacks = np.isnan(rows)
        values = jax.vmap(lambda s: -energy(s, AT))(jnp.asarray(STATES))
        np.testing.assert_allclose(got, log_likelihood(AT, rows, lacks) + jax.nn.logsumexp(values), rtol=1e-4, atol=1e-5)


class TestNothingMissing:
    @pytest.mark.parametrize("name", some_slow(["cd"], ["pcd", "replay", "mle"]))
    def test_complete_rows_have_the_same_surrogate(self, name):
        rows = draws(60).astype(np.float32)
        values = [
            surrogate(ebm.estimate(table_model, name, **options), AT, rows) for options in ({}, {"positive_phase": PHASE})
        ]
        assert values[0] == values[1]
        gauss = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
        traced = [
            jax.jit(
                lambda x, options=options: surrogate(ebm.estimate(gaussian_model, name, **options), {"k": jnp.eye(3)}, x)
            )(gauss)
            for options in ({}, {"positive_phase": PHASE})
        ]
        np.testing.assert_allclose(*traced, rtol=1e-6)

    @pytest.mark.slow
    def test_a_guide_that_gives_the_hidden_member_stays(self):
        v, h = draws(60)[:, :3], draws(60, 1)[:, 3:]

        def values(**options):
            wrapped = handlers.substitute(
                handlers.seed(ebm.estimate(hidden_model, "cd", **options), 0), {"h": jnp.asarray(h)}
            )
            return handlers.trace(wrapped).get_trace(v)["v,h$surrogate"]["fn"].log_factor

        np.testing.assert_array_equal(values(), values(positive_phase=PHASE))


class TestTraining:
    @pytest.mark.slow
    def test_subsampled_rows(self):
        # Missing entries are in rows that the first batch need not hold.
        x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
        x[::7, 1] = np.nan
        estimated = ebm.estimate(gaussian_model, "pcd", positive_phase=PHASE)
        svi = SVI(estimated, ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
        result = ebm.fit(KEY, svi, 60, x, 200, 40)
        assert np.isfinite(result.losses).all()
        figures = ebm.training_report(estimated, result).sites[0].figures
        assert 0 < figures["missing_rate"] < 0.15
        assert 0.3 < figures["positive_acceptance_rate"] < 1
        again = ebm.fit(KEY, svi, 5, x, 200, 40, init_state=result.state)
        assert np.isfinite(again.losses).all()
        assert "energy gap" in str(ebm.diagnose(estimated, result, x, 200, 200))

    @pytest.mark.slow
    def test_masked_rows_take_no_part(self):
        def model(x, keep):
            with handlers.mask(mask=keep):
                table_model(x)

        rows = TABLE[:40].copy()
        keep = np.arange(40) < 30
        changed = rows.copy()
        changed[30:] = np.nan
        values = [surrogate(ebm.estimate(model, "cd", positive_phase=PHASE), AT, each, keep) for each in (rows, changed)]
        assert values[0] == values[1]
        assert np.isfinite(values[0])
        nothing = surrogate(ebm.estimate(model, "cd", positive_phase=PHASE), AT, rows, np.zeros(40, bool))
        assert nothing == 0

    @pytest.mark.slow
    def test_integer_members_beside_missing_ones(self):
        def model(x, s):
            b = numpyro.param("b", jnp.zeros(2))
            with numpyro.plate("rows", len(x)):
                x = numpyro.sample("x", dist.Normal(0, 1), obs=x)
                s = numpyro.sample("s", dist.Bernoulli(0.5), obs=s)
                ebm.energy_factor("e", lambda x, s: -b[0] * x * s - b[1] * s, x=x, s=s)

        x = np.random.default_rng(0).normal(size=100).astype(np.float32)
        x[3] = np.nan
        s = np.arange(100) % 2
        found = fit(ebm.estimate(model, "cd", positive_phase=PHASE), x, s, steps=3)
        assert np.isfinite(found["b"]).all()


def run(model, *args, **options):
    """An update of SVI after its initialisation."""
    svi = SVI(ebm.estimate(model, options.pop("name", "cd"), **options), ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    return svi.update(svi.init(KEY, *args), *args)


class TestRefusals:
    @pytest.mark.parametrize("name", some_slow(["cd", "pseudolikelihood"], ["ratio_matching"]))
    def test_missing_entries_without_the_option(self, name):
        rows = TABLE[:20].copy()
        first = np.argwhere(np.isnan(rows))[0]
        text = rf"Row {first[0]} of the data is not finite: column {first[1]} is NaN.*positive_phase=numpyro_ebm"
        with pytest.raises(ebm.EnergyError, match=text):
            surrogate(ebm.estimate(table_model, name), ZERO, rows)

    def test_a_joint_event_names_the_member(self):
        v, h = np.zeros((4, 3)), np.zeros((4, 2))
        h[2, 1] = np.nan
        with pytest.raises(ebm.EnergyError, match="'v,h': Row 2 .* column 1 of 'h' is NaN"):
            run(hidden_model, v, h)

    @pytest.mark.parametrize("name", some_slow(["pseudolikelihood"], ["cd"]))
    def test_traced_rows_of_a_discrete_event_give_nan(self, name):
        # As an integer NaN would be a 0 that nobody sees.
        estimated = ebm.estimate(table_model, name)
        value, grad = jax.jit(jax.value_and_grad(lambda p, x: surrogate(estimated, p, x)))(ZERO, jnp.asarray(TABLE[:20]))
        assert np.isnan(value)
        assert np.isnan(grad["b"]).any()

    def test_likelihood(self):
        rows = np.zeros((3, 5))
        rows[1, 4] = np.nan
        with pytest.raises(ebm.EnergyError, match="Row 1 .* column 4 is NaN"):
            ebm.log_likelihood(table_model, TRUE, rows, log_partition=0.0)
        with pytest.raises(ebm.EnergyError, match="'h'.*hidden"):
            ebm.log_likelihood(hidden_model, TRUE, np.zeros((3, 3), int), log_partition=0.0)

    @pytest.mark.parametrize("hidden", [improper(constraints.boolean, 2), dist.Bernoulli(0.5).expand([2]).to_event(1)])
    def test_a_hidden_member_without_a_guide_or_the_option(self, hidden):
        def model(v):
            with numpyro.plate("rows", len(v)):
                v = numpyro.sample("v", improper(constraints.boolean, 3), obs=v)
                h = numpyro.sample("h", hidden)
                ebm.energy_factor("e", lambda v, h: jnp.sum(v) * jnp.sum(h), v=v, h=h)

        with pytest.raises(ebm.EnergyError, match="give the guide a site 'h'.*positive_phase="):
            run(model, np.zeros((3, 3), int))

    def test_nothing_observed(self):
        def model(n):
            with numpyro.plate("rows", n):
                h = numpyro.sample("h", improper(constraints.boolean, 2))
                ebm.energy_factor("e", lambda h: jnp.sum(h), h=h)

        with pytest.raises(ebm.EnergyError, match="No member of the event 'h' is observed"):
            run(model, 3, positive_phase=PHASE)

    @pytest.mark.parametrize("where", ["another site", "a closure", "the base", "a covariate"])
    def test_a_hidden_member_that_other_densities_use(self, where):
        def model(v):
            with numpyro.plate("rows", len(v)):
                h = numpyro.sample("h", dist.Normal(0, 1))
                v = numpyro.sample("v", dist.Normal(h if where == "the base" else 0, 1), obs=v)
                ebm.energy_factor("e", lambda v, h: v * h, v=v, h=h)
                if where == "another site":
                    numpyro.sample("y", dist.Normal(h, 1), obs=v)
                if where == "a closure":
                    ebm.energy_factor("f", lambda v: v * jnp.sum(h), v=v)
                if where == "a covariate":
                    ebm.energy_factor("f", lambda v, z: v * z, v=v, z=2 * h)

        with pytest.raises(ebm.EnergyError, match=r"hidden sites \['h'\].*depends on them in another way"):
            run(model, np.zeros(3), positive_phase=PHASE)

    def test_a_guide_of_some_members(self):
        def model(v):
            with numpyro.plate("rows", len(v)):
                v = numpyro.sample("v", dist.Normal(0, 1), obs=v)
                h = numpyro.sample("h", dist.Normal(0, 1))
                z = numpyro.sample("z", dist.Normal(0, 1))
                ebm.energy_factor("e", lambda v, h, z: v * h * z, v=v, h=h, z=z)

        estimated = handlers.substitute(
            handlers.seed(ebm.estimate(model, "cd", positive_phase=PHASE), 0), {"z": jnp.zeros(3)}
        )
        with pytest.raises(ebm.EnergyError, match=r"guide gives \['z'\], and \['h'\] are hidden"):
            handlers.trace(estimated).get_trace(np.zeros(3))

    def test_obs_mask_of_a_joint_event(self):
        def model(x):
            with numpyro.plate("rows", 3):
                x = numpyro.sample("x", dist.Normal(0, 1), obs=x, obs_mask=np.array([True, False, True]))
                ebm.energy_factor("e", lambda x: x**4, x=x)

        with pytest.raises(ebm.EnergyError, match="obs_mask makes two sites.*Put NaN"):
            run(model, np.zeros(3))

    def test_elements_that_are_bound_to_each_other(self):
        def model(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: x[0], (3,), support=constraints.simplex), obs=x)

        rows = np.full((2, 3), 1 / 3)
        rows[0, 0] = np.nan
        with pytest.raises(ebm.EnergyError, match="bound to each other"):
            run(model, rows, positive_phase=PHASE)

    def test_exact_of_a_continuous_event(self):
        with pytest.raises(ebm.EnergyError, match="Row 0 of the data is not finite: column 1 is NaN"):
            run(gaussian_model, np.array([[0.0, np.nan, 1.0]] * 3), name="exact")

    def test_exact_of_many_states(self):
        chain = ebm.energies.Graph.lattice(24)

        def model(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(ebm.energies.Ising(chain, numpyro.param("c", 0.3))), obs=x)

        rows = np.ones((4, *ebm.energies.Ising(chain, 0.3).event_shape), np.float32)
        estimated = ebm.estimate(model, "exact", max_states=1000)
        value = jax.jit(lambda x: surrogate(estimated, {"c": 0.3}, x))
        np.testing.assert_allclose(value(rows), surrogate(estimated, {"c": 0.3}, rows), rtol=1e-6)
        rows[2] = np.nan
        assert np.isnan(value(rows))
        with pytest.raises(ebm.EnergyError, match="lack have 16777216 states, more than max_states=1000"):
            surrogate(estimated, {"c": 0.3}, rows)

    @pytest.mark.parametrize(
        ("phase", "match"),
        [
            ("gibbs", "cannot sample a continuous"),
            ("elliptical_slice", "cannot hold"),
            ({"y": "mala"}, "is one event"),
        ],
    )
    def test_kernels(self, phase, match):
        x = np.zeros((5, 3))
        x[0, 0] = np.nan
        with pytest.raises(ebm.EnergyError, match=match):
            run(gaussian_model, x, positive_phase=ebm.PositivePhase(phase))

    def test_options(self):
        with pytest.raises(ebm.EnergyError, match="num_steps"):
            ebm.PositivePhase(num_steps=0)
        with pytest.raises(ebm.EnergyError, match="Unknown kernel"):
            ebm.PositivePhase("gibs")
        with pytest.raises(ebm.EnergyError, match="never rejects"):
            ebm.PositivePhase("langevin", adapt_step_size=True)
        with pytest.raises(TypeError, match="needs positive_phase as a PositivePhase"):
            ebm.ContrastiveDivergence(positive_phase="gibbs")
        for name in ("sm", "improved_cd", "multigrid_cd", "f_ebm", "diffusion_recovery"):
            with pytest.raises(TypeError, match="no option 'positive_phase'"):
                ebm.estimate(table_model, name, positive_phase=PHASE)
