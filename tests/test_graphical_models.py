"""Graphical models and autologistic regression, against enumeration and quadrature."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from energy_cases import (
    AUTOLOGISTIC,
    COUNTS,
    COVARIATES,
    ISING,
    RNG,
    TRIANGLE,
    check_shares,
    log_weights,
    plainly,
    probabilities,
    surrogate,
    swept,
)
from helpers import some_slow
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.energies import (
    Autologistic,
    ExponentialGraphicalModel,
    GaussianGraphicalModel,
    Graph,
    Ising,
    PoissonGraphicalModel,
)

PRECISION = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.4], [0.0, -0.4, 1.5]])
GAUSSIAN = GaussianGraphicalModel(PRECISION, [0.5, -1.0, 0.2])
POISSON = PoissonGraphicalModel([(0, 1)], -0.4, [1.0, 0.5])
EXPONENTIAL = ExponentialGraphicalModel([(0, 1)], 0.8, [1.0, 0.5])
SQUARE = np.array([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]])
"""Neighbours on a lattice of 2 by 2."""


class TestGaussian:
    @pytest.mark.slow
    def test_it_is_the_multivariate_normal(self):
        normal = numpyro.distributions.MultivariateNormal(GAUSSIAN.loc, precision_matrix=PRECISION)
        x = jnp.asarray(RNG.normal(size=(10, 3)))
        ours = -jax.vmap(GAUSSIAN)(x) - GAUSSIAN.log_partition()
        np.testing.assert_allclose(ours, normal.log_prob(x), rtol=1e-4, atol=1e-5)
        d = ebm.EnergyDistribution(GAUSSIAN)
        np.testing.assert_allclose(surrogate(d, x, "exact"), jnp.sum(normal.log_prob(x)), rtol=1e-4)
        gradient = jax.grad(lambda energy: energy.log_partition())(GAUSSIAN)
        np.testing.assert_allclose(gradient.precision, -0.5 * np.linalg.inv(PRECISION), atol=1e-5)

    def test_conditionals_are_those_of_its_covariance(self):
        x, covariance = RNG.normal(size=3), np.linalg.inv(PRECISION)
        given = GAUSSIAN.conditional(jnp.asarray(x))
        assert given.batch_shape == (3,)
        for i, others in enumerate(([1, 2], [0, 2], [0, 1])):
            weights = covariance[i, others] @ np.linalg.inv(covariance[np.ix_(others, others)])
            mean = GAUSSIAN.loc[i] + weights @ (x[others] - np.asarray(GAUSSIAN.loc)[others])
            np.testing.assert_allclose(given.mean[i], mean, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(given.variance[i], covariance[i, i] - weights @ covariance[others, i], rtol=1e-4)
        np.testing.assert_allclose(
            GAUSSIAN.conditional(jnp.asarray(x), np.array([[2, 0]])).mean, given.mean[jnp.array([[2, 0]])]
        )

    def test_a_sweep_leaves_the_normal_as_it_is(self):
        covariance = np.linalg.inv(PRECISION)
        start = RNG.multivariate_normal(np.asarray(GAUSSIAN.loc), covariance, 40_000)
        moved = np.asarray(swept(GAUSSIAN, start))
        assert np.all(moved != start)
        np.testing.assert_array_less(abs(moved.mean(0) - GAUSSIAN.loc), 5 * np.sqrt(np.diag(covariance) / 40_000))
        variance = np.outer(np.diag(covariance), np.diag(covariance)) + covariance**2
        np.testing.assert_array_less(abs(np.cov(moved.T) - covariance), 5 * np.sqrt(variance / 40_000))

    def test_log_z_of_a_matrix_that_is_not_positive_definite_is_nan(self):
        matrix = jnp.array([[1.0, 2.0], [2.0, 1.0]])
        assert np.isnan(jax.jit(lambda q: GaussianGraphicalModel(q).log_partition())(matrix))
        assert np.isnan(jax.jit(lambda q: GaussianGraphicalModel(q).log_partition())(-jnp.eye(2)))

    def test_a_trained_precision_finds_that_of_the_data(self):
        x = jnp.asarray(RNG.multivariate_normal(np.zeros(3), np.linalg.inv(PRECISION), 2000))

        def model(x):
            factor = numpyro.param("factor", jnp.eye(3))
            with numpyro.plate("rows", len(x)):
                energy = GaussianGraphicalModel(factor @ factor.T)
                numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

        svi = SVI(ebm.estimate(model, "exact"), ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
        factor = svi.run(jax.random.key(0), 400, x, progress_bar=False).params["factor"]
        np.testing.assert_allclose(factor @ factor.T, np.linalg.inv(x.T @ x / len(x)), atol=0.01)


class TestPoisson:
    STATES = np.array(list(itertools.product(range(40), repeat=2)))

    def test_conditionals_are_those_of_the_table(self):
        table = log_weights(POISSON, self.STATES).reshape(40, 40)
        given = POISSON.conditional(jnp.array([3, 2]))
        for i, row in enumerate((table[:, 2], table[3])):
            mean = np.exp(row - np.logaddexp.reduce(row)) @ np.arange(40)
            np.testing.assert_allclose(given.mean[i], mean, rtol=1e-5)
        cut = COUNTS.conditional(jnp.array([0, 1, 2, 1, 0]), np.array([2, 1]))
        logits = COUNTS.conditional_logits(jnp.array([0, 1, 2, 1, 0]), np.array([2, 1]))
        np.testing.assert_allclose(cut.probs, jax.nn.softmax(logits), rtol=1e-5)

    def test_a_sweep_leaves_the_distribution_as_it_is(self):
        p = probabilities(POISSON, self.STATES)
        start = self.STATES[RNG.choice(len(p), 40_000, p=p)]
        kept = p > 1e-5  # rarer states have no normal error
        check_shares(swept(POISSON, start), self.STATES[kept], p[kept])

    def test_the_largest_count_cuts_the_distribution_off(self):
        cut = PoissonGraphicalModel([(0, 1)], -0.4, [1.0, 0.5], maximum=39)
        expected = np.logaddexp.reduce(log_weights(POISSON, self.STATES))
        np.testing.assert_allclose(cut.log_partition(), expected, rtol=1e-5)
        assert cut.num_terms == 40**2 + 40
        assert POISSON.num_terms is None
        assert not POISSON.has_conditionals
        with pytest.raises(ValueError, match="is not known"):
            POISSON.log_partition()

    def test_it_is_sampled_by_gibbs_with_values_up_to_a_bound(self):
        d = ebm.EnergyDistribution(PoissonGraphicalModel([(0, 1)], -0.4, [1.0, 0.5], maximum=9))
        draws = np.asarray(ebm.sample(jax.random.key(0), d, "gibbs", num_warmup=20, num_samples=2000).samples["x"])
        p, x = probabilities(POISSON, self.STATES), self.STATES
        np.testing.assert_allclose(draws.reshape(-1, 2).mean(0), p @ x, atol=0.1)

    def test_traced_couplings_above_zero_give_no_number(self):
        energy = lambda j: PoissonGraphicalModel([(0, 1)], j)(jnp.array([1, 2]))  # noqa: E731
        assert np.isnan(jax.jit(energy)(0.1))
        assert np.isfinite(jax.jit(energy)(-0.1))
        assert np.isfinite(jax.jit(jax.grad(energy))(-0.1))


class TestExponential:
    GRID = (np.arange(1200) + 0.5) * 0.02

    def test_conditionals_and_moments_are_those_of_quadrature(self):
        x = np.stack(np.meshgrid(self.GRID, self.GRID, indexing="ij"), axis=-1).reshape(-1, 2)
        p = probabilities(EXPONENTIAL, x)
        start = x[RNG.choice(len(p), 40_000, p=p)] + RNG.uniform(-0.01, 0.01, (40_000, 2))
        moved = np.asarray(swept(EXPONENTIAL, start))
        for power in ([1, 0], [0, 1], [1, 1], [2, 0]):
            of = lambda x, power=power: np.prod(x ** np.array(power), axis=-1)  # noqa: E731
            mean, square = p @ of(x), p @ of(x) ** 2
            assert abs(of(moved).mean() - mean) < 5 * np.sqrt((square - mean**2) / 40_000) + 1e-3
        table = log_weights(EXPONENTIAL, np.stack([self.GRID, np.full_like(self.GRID, 1.5)], axis=-1))
        mean = np.exp(table - np.logaddexp.reduce(table)) @ self.GRID
        np.testing.assert_allclose(EXPONENTIAL.conditional(jnp.array([1.0, 1.5])).mean[0], mean, rtol=1e-3)

    def test_chains_with_gradients_and_score_matching_take_it(self):
        d = ebm.EnergyDistribution(EXPONENTIAL)
        draws = ebm.sample(jax.random.key(0), d, "mala", num_warmup=20, num_samples=5).samples["x"]
        assert bool((draws > 0).all())
        x = jnp.asarray(RNG.exponential(size=(6, 2)))
        np.testing.assert_allclose(surrogate(d, x, "sm"), surrogate(plainly(EXPONENTIAL), x, "sm"), rtol=1e-5)

    def test_traced_parameters_out_of_bounds_give_no_number(self):
        energy = lambda j, r: ExponentialGraphicalModel([(0, 1)], j, r)(jnp.ones(2))  # noqa: E731
        assert np.isnan(jax.jit(energy)(-0.1, 1.0))
        assert np.isnan(jax.jit(energy)(0.1, -1.0))
        np.testing.assert_allclose(jax.jit(energy)(0.1, 1.0), 2.1, rtol=1e-6)


class TestAutologistic:
    """Two rows with covariates of their own."""

    CONTEXT = jnp.asarray(np.stack([COVARIATES, RNG.normal(size=(5, 2))]))
    ROWS = jnp.asarray([[1, 0, 0, 1, 1], [0, 1, 0, 1, 0]])

    def by_hand(self):
        """Log weights of all states for each row, ``(rows, states)``."""
        states = np.array(list(itertools.product((0, 1), repeat=5)))
        left, right = TRIANGLE.edges.T
        found = []
        for z in np.asarray(self.CONTEXT, float):
            h = np.asarray(AUTOLOGISTIC.intercept) + z @ [1.0, -0.5]
            kappa, couplings = 1 / (1 + np.exp(-h)), np.asarray(AUTOLOGISTIC.couplings)
            pairs = states[:, left] * states[:, right] - kappa[left] * states[:, right] - states[:, left] * kappa[right]
            found.append(pairs @ couplings + states @ h)
        return states, np.array(found)

    def distribution(self, energy=AUTOLOGISTIC):
        return ebm.EnergyDistribution(energy, context=self.CONTEXT, batch_shape=(2,))

    def plain(self):
        function = lambda s, z: AUTOLOGISTIC(s, z)  # noqa: E731
        return ebm.EnergyDistribution(function, (5,), context=self.CONTEXT, batch_shape=(2,), support=constraints.boolean)

    def test_log_odds_are_those_of_the_centred_model(self):
        x, z = self.ROWS[0], self.CONTEXT[0]
        h = np.asarray(AUTOLOGISTIC.intercept) + np.asarray(z) @ [1.0, -0.5]
        matrix = np.zeros((5, 5))
        for (a, b), coupling in zip(TRIANGLE.edges, np.asarray(AUTOLOGISTIC.couplings), strict=True):
            matrix[a, b] = matrix[b, a] = coupling
        expected = h + matrix @ (np.asarray(x) - 1 / (1 + np.exp(-h)))
        np.testing.assert_allclose(AUTOLOGISTIC.given(z).local_fields(x), expected, rtol=1e-5)
        spins = Autologistic(TRIANGLE, AUTOLOGISTIC.couplings, [1.0, -0.5], units="spins", centered=True)
        h = np.asarray(z) @ [1.0, -0.5]
        expected = h + matrix @ (2 * np.asarray(x) - 1 - np.tanh(h))
        np.testing.assert_allclose(spins.given(z).local_fields(2 * x - 1), expected, rtol=1e-5)

    def test_each_row_has_its_own_log_z(self):
        expected = np.logaddexp.reduce(self.by_hand()[1], axis=1)
        for d in (self.distribution(), self.plain()):
            np.testing.assert_allclose(ebm.log_partition(None, d, method="enumerate").value, expected, rtol=1e-5)
        assert self.distribution().known_energy is None  # not one energy for all rows
        assert self.distribution().ready_energy.num_terms == ISING.num_terms

    @pytest.mark.parametrize("estimator", some_slow(["exact", "pseudolikelihood", "cd"], ["ratio_matching", "mpf"]))
    def test_estimators_use_the_energy_of_each_row(self, estimator):
        ours = surrogate(self.distribution(), self.ROWS, estimator)
        np.testing.assert_allclose(ours, surrogate(self.plain(), self.ROWS, estimator), rtol=2e-5, atol=1e-5)
        if estimator == "exact":
            states, log_p = self.by_hand()
            log_p -= np.logaddexp.reduce(log_p, axis=1, keepdims=True)
            which = [(states == np.asarray(row)).all(1).argmax() for row in self.ROWS]
            np.testing.assert_allclose(ours, log_p[0, which[0]] + log_p[1, which[1]], rtol=1e-5)

    @pytest.mark.parametrize("kernel", some_slow(["gibbs", "swendsen_wang"], ["flips", "block_gibbs"]))
    def test_draws_follow_the_covariates_of_their_row(self, kernel):
        states, log_p = self.by_hand()
        sampler = ebm.ChainSampler(kernel, num_warmup=0, num_steps=40)
        d = ebm.EnergyDistribution(AUTOLOGISTIC, context=self.CONTEXT, batch_shape=(2,), sampler=sampler)
        draws = d.sample(jax.random.key(0), (4000,))
        for row in range(2):
            p = np.exp(log_p[row] - np.logaddexp.reduce(log_p[row]))
            check_shares(draws[:, row], states, p)

    def test_chains_use_the_conditionals_of_the_row(self, monkeypatch):
        # With conditionals that always say 1, the chains end in the state of ones.
        monkeypatch.setattr(Ising, "local_fields", lambda self, event, index: jnp.full((), 1e6))
        ones = jnp.ones(5, int)
        expected = sum(AUTOLOGISTIC(ones, z) - AUTOLOGISTIC(x, z) for x, z in zip(self.ROWS, self.CONTEXT, strict=True))
        np.testing.assert_allclose(surrogate(self.distribution(), self.ROWS, "cd"), expected, rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("estimator", ["exact", "pseudolikelihood"])
    def test_coefficients_train_at_a_site(self, estimator):
        graph, z = Graph.lattice(2, 2), jnp.asarray(RNG.normal(size=(3000, 2, 2, 1)))
        truth = Autologistic(graph, 0.8, [1.0], -0.5)
        sampler = ebm.ChainSampler("gibbs", num_warmup=0, num_steps=20)
        x = ebm.EnergyDistribution(truth, context=z, batch_shape=(3000,), sampler=sampler).sample(jax.random.key(0))

        def model(x, z):
            names = {"coupling": 0.0, "slope": jnp.zeros(1), "intercept": 0.0}
            coupling, slope, intercept = (numpyro.param(name, start) for name, start in names.items())
            with numpyro.plate("rows", len(x)):
                energy = Autologistic(graph, coupling, slope, intercept)
                numpyro.sample("x", ebm.EnergyDistribution(energy, context=z), obs=x)

        svi = SVI(ebm.estimate(model, estimator), ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
        found = svi.run(jax.random.key(0), 300, x, z, progress_bar=False).params
        x, z = np.asarray(x).reshape(-1, 4), np.asarray(z).reshape(-1, 4)
        around, h = x @ SQUARE, found["slope"][0] * z + found["intercept"]
        if estimator == "pseudolikelihood":  # the equations of a logistic regression on the neighbours
            left = x - 1 / (1 + np.exp(-(h + found["coupling"] * around)))
            equations = [(left * each).mean() for each in (around, z, 1)]
        else:  # maximum likelihood: the statistics are those of the data
            states = np.array(list(itertools.product((0, 1), repeat=4)))
            pairs = 0.5 * (states * (states @ SQUARE)).sum(1)
            log_p = found["coupling"] * pairs + h @ states.T
            p = np.exp(log_p - np.logaddexp.reduce(log_p, axis=1, keepdims=True))
            left = x - p @ states
            equations = [(0.5 * (x * around).sum(1) - p @ pairs).mean(), (left * z).mean(), left.mean()]
        np.testing.assert_allclose(equations, 0.0, atol=1e-3)
