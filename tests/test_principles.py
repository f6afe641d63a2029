"""Probability flow, velocity, Stein discrepancy, energy discrepancy, diffusion recovery: limits and exact answers."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import AT, POSITIVE, fit, positive_model, precision_model, rows_of, some_slow, surrogate
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm._core.records import record
from numpyro_ebm.estimators import ksd
from numpyro_ebm.estimators.mpf import STEEPEST, flow
from numpyro_ebm.estimators.parts import single_changes
from numpyro_ebm.kernels._base import info

POINTS, WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
WEIGHTS = WEIGHTS / np.sqrt(2 * np.pi)


def rated_model(x, k):
    """A covariate of each row's own, or one for all."""
    t = numpyro.param("t", 1.0)
    support = constraints.boolean if x.dtype == bool else constraints.real
    energy = lambda x, k: 0.5 * jnp.exp(t * k) * jnp.sum(x.astype(float) - 0.3) ** 2  # noqa: E731
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(energy, (2,), context=k, batch_shape=np.shape(k), support=support)
        numpyro.sample("x", d, obs=x)


@pytest.mark.parametrize("name", some_slow(["mpf"], ["mpf of flips", "minimum_velocity", "energy_discrepancy"]))
def test_each_row_has_its_own_context(name):
    k = np.arange(8) % 2
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    x = x > 0 if name == "mpf of flips" else x
    result = lambda k: rows_of(name.split()[0], lambda x: rated_model(x, jnp.asarray(k, float)), x, 0.7)  # noqa: E731
    for own, zero, one in zip(result(k), result(0), result(1), strict=True):
        np.testing.assert_allclose(own, jnp.where(k == 0, zero, one), rtol=1e-5, atol=1e-6)
        assert np.ptp(own) > 0.1


# --- minimum probability flow ---

STATES = np.array(list(itertools.product([0, 1], repeat=5)), bool)
PAIRS = np.triu_indices(5, 1)
FEATURES = np.concatenate([STATES, STATES[:, PAIRS[0]] & STATES[:, PAIRS[1]]], axis=1).astype(float)


def boltzmann_model(x):
    """Biases, then couplings of pairs."""
    t = numpyro.param("t", jnp.zeros(FEATURES.shape[1]))
    energy = lambda x: -t[:5] @ x - t[5:] @ (x[PAIRS[0]] * x[PAIRS[1]])  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (5,), support=constraints.boolean), obs=x)


@pytest.mark.usefixtures("x64")
class TestFlips:
    def loss(self, t):
        """By hand: all flips of all states."""
        log_p = FEATURES @ t
        place = {tuple(state): i for i, state in enumerate(STATES)}
        flips = [[place[tuple(state ^ (np.arange(5) == i))] for i in range(5)] for state in STATES]
        return jnp.sum(jnp.exp(0.5 * (log_p[jnp.asarray(flips)] - log_p[:, None])), axis=1)

    @pytest.mark.parametrize("at_once", [2**24, 2])
    def test_value_and_gradient_by_enumeration(self, at_once, monkeypatch):
        monkeypatch.setattr(single_changes, "NUMBERS_AT_ONCE", at_once)
        t = np.random.default_rng(0).normal(size=15)
        value, slope = rows_of("mpf", boltzmann_model, STATES, t)
        np.testing.assert_allclose(-value, self.loss(t), rtol=1e-12)
        np.testing.assert_allclose(-slope, jax.jacobian(self.loss)(t), rtol=1e-12, atol=1e-12)

    @pytest.mark.slow
    def test_the_efficiency_on_boltzmann_machines(self):
        # References, section 5: .969. Over machines it has a standard deviation of .035.
        @jax.jit
        def figures(t):
            log_density = lambda t: -surrogate_rows(t)  # noqa: E731
            p = jax.nn.softmax(jnp.asarray(FEATURES) @ t)
            slopes = jax.jacobian(log_density)(t)
            bend = jax.jacfwd(lambda t: p @ jax.jacobian(log_density)(t))(t)
            inverse = jnp.linalg.inv(bend)
            centred = jnp.asarray(FEATURES) - p @ FEATURES
            fisher = jnp.einsum("n,ni,nj->ij", p, centred, centred)
            spread = jnp.einsum("n,ni,nj->ij", p, slopes, slopes)
            return p @ slopes, jnp.trace(jnp.linalg.inv(fisher)) / jnp.trace(inverse @ spread @ inverse)

        wrapped = ebm.estimate(boltzmann_model, "mpf")

        def surrogate_rows(t):
            model = numpyro.handlers.substitute(wrapped, {"t": t})
            return numpyro.handlers.trace(model).get_trace(jnp.asarray(STATES))["x"]["fn"].log_prob(STATES)

        machines = np.random.default_rng(0).normal(size=(60, 15))
        machines[:, :5] = 0
        bias, efficiency = jax.lax.map(figures, machines)
        np.testing.assert_allclose(bias, 0.0, atol=1e-9)  # consistent
        error = np.std(efficiency) / np.sqrt(60)
        assert np.all(efficiency < 1)
        assert error < 0.01
        assert abs(np.mean(efficiency) - 0.969) < 5 * error

    def test_one_unit_is_maximum_likelihood(self):
        x = np.arange(10)[:, None] < 7

        def model(x):
            t = numpyro.param("t", 0.0)
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x: -t * x[0], (1,), support=constraints.boolean)
                numpyro.sample("x", d, obs=x)

        slope = jax.grad(lambda t: surrogate(ebm.estimate(model, "mpf"), {"t": t}, x))
        np.testing.assert_allclose(slope(np.log(0.7 / 0.3)), 0.0, atol=1e-12)
        assert slope(0.0) > 1

    def test_the_lattice_of_case_6(self):
        # 3 x 3 spins, open edges, 2000 draws; maximum likelihood .29579 (.0060) and .09372 (.0053).
        spins = np.array(list(itertools.product([-1, 1], repeat=9)))
        lattice = spins.reshape(-1, 3, 3)
        edges = (lattice[:, 1:] * lattice[:, :-1]).sum((1, 2)) + (lattice[:, :, 1:] * lattice[:, :, :-1]).sum((1, 2))
        weights = np.exp(0.3 * edges + 0.1 * spins.sum(axis=1))
        chosen = np.random.default_rng(11).choice(512, 2000, p=weights / weights.sum())

        def ising(x):
            b = numpyro.param("b", jnp.zeros(2))

            def energy(x):
                s = 2 * x - 1
                return -b[0] * (jnp.sum(s[1:] * s[:-1]) + jnp.sum(s[:, 1:] * s[:, :-1])) - b[1] * jnp.sum(s)

            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(energy, (3, 3), support=constraints.boolean), obs=x)

        params = fit(ebm.estimate(ising, "mpf"), (lattice[chosen] + 1) // 2, steps=400)
        assert np.all(np.abs(np.subtract(params["b"], [0.29579, 0.09372])) < [0.018, 0.016])

    @pytest.mark.slow
    def test_any_free_energy_base_mask_and_dtype(self):
        # An RBM's free energy is not multilinear; a base is part of the density; a masked row may hold anything.
        logits, keep = jnp.array([0.3, -1.0, 2.0]), jnp.array([True, False, True])

        def model(x, mask=True, base=None):
            w = numpyro.param("w", jnp.ones((2, 3)))
            energy = lambda x: -jnp.sum(jax.nn.softplus(w @ x)) - (0.0 if base is not None else logits @ x)  # noqa: E731
            with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
                d = ebm.EnergyDistribution(energy, (3,), support=constraints.boolean, base=base)
                numpyro.sample("x", d, obs=x)

        x = np.array([[0, 1, 1], [1, 0, 0], [1, 1, 0]])
        w = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
        wrapped = ebm.estimate(model, "mpf")
        value = surrogate(wrapped, {"w": w}, x)
        base = dist.Bernoulli(logits=logits).to_event(1)
        np.testing.assert_allclose(surrogate(wrapped, {"w": w}, x.astype(bool), base=base), value, rtol=1e-12)
        masked = surrogate(wrapped, {"w": w}, x, mask=keep)
        np.testing.assert_allclose(masked, surrogate(wrapped, {"w": w}, x[np.asarray(keep)]), rtol=1e-12)

    @pytest.mark.slow
    def test_nuts_may_target_it(self):
        # One unit, a flat prior on its logit: exp(-n (q e^(-t/2) + (1 - q) e^(t/2))) by quadrature.
        x = np.arange(20)[:, None] < 14

        def model(x):
            t = numpyro.sample("t", dist.Normal(0.0, 10.0))
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x: -t * x[0], (1,), support=constraints.boolean)
                numpyro.sample("x", d, obs=x)

        mcmc = MCMC(NUTS(ebm.estimate(model, "mpf")), num_warmup=300, num_samples=2000, progress_bar=False)
        with pytest.warns(ebm.UncalibratedPosteriorWarning):
            mcmc.run(jax.random.key(0), x)
        grid = np.linspace(-10, 10, 4001)
        density = np.exp(-14 * np.exp(-grid / 2) - 6 * np.exp(grid / 2) - grid**2 / 200)
        density /= density.sum()
        mean = density @ grid
        draws = np.asarray(mcmc.get_samples()["t"])
        assert abs(draws.mean() - mean) < 5 * np.sqrt(density @ (grid - mean) ** 2) / np.sqrt(400)


class TestFlow:
    @pytest.mark.slow
    @pytest.mark.usefixtures("x64")
    def test_small_moves_are_score_matching_along_their_directions(self):
        sliced = rows_of("ssm", num_projections=3, projection="gaussian")
        value, slope = rows_of("mpf", sd=1e-3, num_draws=6)
        for got, wanted in zip(((value + 1) * 4e6, slope * 4e6), sliced, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())

    @pytest.mark.parametrize("sd", [0.5, 2.0])
    @pytest.mark.usefixtures("x64")
    def test_the_expected_loss_is_least_at_the_truth_and_its_curvature(self, sd):
        # E over x ~ N(0, 1) and v of exp(-t ((x + v)^2 - x^2) / 4), by quadrature, against our rows at these x.
        x = np.repeat(POINTS, 500)
        weights = np.repeat(WEIGHTS, 500) / 500
        value, slope = rows_of("mpf", precision_model, x, 1.0, sd=sd, num_draws=20)
        grid = POINTS[:, None], sd * POINTS[None]
        change = (grid[0] + grid[1]) ** 2 - grid[0] ** 2
        exact = np.sum(WEIGHTS[:, None] * WEIGHTS * np.exp(-0.25 * change))
        zero = np.sum(WEIGHTS[:, None] * WEIGHTS * np.exp(-0.25 * change) * change)
        np.testing.assert_allclose(zero, 0.0, atol=1e-10)
        for got, wanted in ((-value, exact), (slope, 0.0)):
            rows = np.asarray(got).reshape(40, 500)
            error = np.sqrt(np.sum(WEIGHTS**2 * rows.var(axis=1) / 500))
            assert abs(weights @ np.asarray(got) - wanted) < 5 * error
            assert error < 0.02

    def test_far_rows_stay_finite(self):
        # The ratio of the densities is e^5000 and more.
        value, slope = rows_of("mpf", precision_model, np.array([100.0, 200.0], np.float32), 1.0, sd=50.0)
        assert np.isfinite(value).all()
        assert np.isfinite(slope).all()
        with jax.enable_x64(True):
            rises = jnp.array([-jnp.inf, -3.0, STEEPEST, STEEPEST + 2, jnp.inf])
            np.testing.assert_allclose(flow(rises), [0, np.exp(-1.5), np.exp(20), 2 * np.exp(20), np.inf], rtol=1e-12)
            slopes = jax.vmap(jax.grad(flow))(rises[1:4])
            np.testing.assert_allclose(slopes[0], 0.5 * np.exp(-1.5), rtol=1e-12)
            np.testing.assert_allclose(slopes[2], 0.5 * np.exp(20), rtol=1e-12)

    def test_moves_far_too_long_warn(self):
        model = numpyro.handlers.seed(ebm.estimate(precision_model, "mpf", sd=1e4), 0)
        with pytest.warns(UserWarning, match="site 'x': the moves lead out of the density.*Make them shorter"):
            numpyro.handlers.trace(model).get_trace(np.linspace(-1, 1, 5))

    def test_refusals(self):
        for options, message in (
            ({"sd": -1.0}, "sd > 0"),
            ({"num_draws": 0}, "num_draws >= 1"),
            ({"sd": np.ones(2)}, r"site 'x': sd has shape \(2,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                surrogate(ebm.estimate(precision_model, "mpf", **options), {"t": 1.0}, np.zeros(4))
        for options, x, message in (
            ({"num_draws": 3}, STATES, r"site 'x': Discrete events.*\['num_draws'\] does not apply"),
            ({}, 2 * np.ones((3, 5)), "site 'x': Row 0 of the data lies outside the support"),
        ):
            with pytest.raises(ValueError, match=message):
                ebm.estimate(boltzmann_model, "mpf", **options)(x)

        def counts(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: x, support=constraints.nonnegative_integer), obs=x)

        with pytest.raises(ValueError, match="site 'x': The values of the support.*cannot be listed"):
            ebm.estimate(counts, "mpf")(np.arange(4))
        with pytest.raises(ValueError, match="site 'x'.*'mpf' needs a random key"):
            ebm.estimate(precision_model, "mpf")(np.zeros(4))


# --- minimum velocity ---


def spread_rate(x):
    return 1 + jnp.sum(x**2)


@pytest.mark.usefixtures("x64")
class TestVelocity:
    @pytest.mark.slow
    @pytest.mark.parametrize("projection", ["rademacher", "gaussian"])
    def test_small_steps_are_sliced_score_matching_of_the_same_directions(self, projection):
        options = {"num_projections": 2, "projection": projection}
        sliced = rows_of("ssm_vr", **options)[1]
        errors = []
        for h in (1e-4, 1e-5):
            slope = rows_of("minimum_velocity", step_size=h, **options)[1]
            errors.append(np.abs(slope - sliced).max() / np.abs(sliced).max())
        assert errors[1] < 1e-3
        np.testing.assert_allclose(np.divide(*errors), 10, rtol=0.1)  # of first order in the step

    @pytest.mark.slow
    def test_a_weight_is_generalised_score_matching(self):
        # On the half line, weight x: D = x / x^2. What t[0] and t[2] weigh has a diagonal Hessian: signs give its trace.
        slope = rows_of("minimum_velocity", step_size=1e-6, diffusion=lambda x: 1 / x)[1]
        weighted = rows_of("generalized_sm", weighting="distance")[1]
        np.testing.assert_allclose(slope[:, ::2], weighted[:, ::2], atol=1e-4 * np.abs(weighted).max())

    @pytest.mark.slow
    def test_a_function_of_all_of_the_event_has_its_divergence(self):
        def loss(t, z):
            log_density = lambda z: -t[0] * jnp.sum(jnp.exp(z)) - t[1] * jnp.exp(jnp.sum(z)) + (t[2] + 1) * jnp.sum(z)  # noqa: E731
            field = lambda z: spread_rate(jnp.exp(z)) * jax.grad(log_density)(z)  # noqa: E731
            return 0.5 * jax.grad(log_density)(z) @ field(z) + jnp.trace(jax.jacobian(field)(z))

        expected = -jax.vmap(jax.grad(loss), (None, 0))(jnp.asarray(AT), jnp.log(POSITIVE))
        for diffusion in (spread_rate, lambda x: spread_rate(x) * jnp.ones(2)):
            slope = rows_of("minimum_velocity", step_size=1e-7, diffusion=diffusion)[1]
            np.testing.assert_allclose(slope[:, ::2], expected[:, ::2], atol=1e-4 * np.abs(expected).max())

    @pytest.mark.slow
    def test_a_constant_diffusion_is_a_change_of_units(self):
        four = rows_of("minimum_velocity", step_size=1e-3, diffusion=4.0)
        for diffusion in (np.full(2, 4.0), lambda x: 4.0):
            for a, b in zip(four, rows_of("minimum_velocity", step_size=1e-3, diffusion=diffusion), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12)
        one = rows_of("minimum_velocity", step_size=4e-3)
        np.testing.assert_allclose(four[1], 4 * one[1], rtol=1e-7, atol=1e-9)
        # The default is in units of both.
        np.testing.assert_allclose(*(rows_of("minimum_velocity", diffusion=d)[1] / d for d in (1.0, 4.0)), rtol=1e-7)

    @pytest.mark.slow
    def test_the_fixed_point_of_a_finite_step(self, gaussian_data):
        v, x = np.mean(gaussian_data**2), gaussian_data
        for share in (0.02, 0.3):
            h = share * v
            truth = (1 - np.sqrt(1 - 2 * h / v)) / h
            slope = rows_of("minimum_velocity", precision_model, x, truth, step_size=h)[1]
            np.testing.assert_allclose(np.mean(slope), 0.0, atol=1e-12)
        # Gaussian directions: on average.
        slope = rows_of("minimum_velocity", precision_model, x, truth, step_size=h, projection="gaussian")[1]
        error = np.std(slope) / np.sqrt(len(x))
        assert 0 < abs(np.mean(slope)) < 5 * error

    def test_the_report_names_the_bias(self):
        report = ebm.training_report(ebm.estimate(precision_model, "minimum_velocity"), {"t": 2.0}, np.array([-1.0, 1.0]))
        np.testing.assert_allclose(report.sites[0].figures["score_norm"], 2.0, rtol=1e-6)
        assert "the energy is biased" in str(report)

    @pytest.mark.slow
    def test_masked_rows_do_not_move_the_default_step(self):
        keep = jnp.arange(400) % 3 > 0

        def model(x):
            with numpyro.handlers.mask(mask=keep):
                precision_model(x)

        x = POSITIVE[:, 0] - 1.5
        slopes = [
            rows_of("minimum_velocity", model, np.where(keep, x, fill), 1.3)[1][np.asarray(keep)] for fill in (np.nan, 50.0)
        ]
        np.testing.assert_array_equal(*slopes)
        np.testing.assert_allclose(
            np.mean(slopes[0]), np.mean(1 - 1.3 * x[keep] ** 2 + 0.005 * np.var(x[keep]) * 1.69 * x[keep] ** 2), rtol=1e-8
        )

    def test_refusals_and_warnings(self):
        for options, message in (
            ({"step_size": 0.0}, "step_size > 0"),
            ({"step_size": np.ones(2)}, "one number step_size"),
            ({"num_projections": 0}, "num_projections >= 1"),
            ({"projection": "signs"}, "Unknown projection 'signs'"),
            ({"diffusion": -1.0}, "diffusion > 0"),
            ({"diffusion": np.ones(3)}, r"site 'x': diffusion has shape \(3,\).*has \(2,\)"),
            ({"diffusion": lambda x: jnp.ones((2, 2))}, r"site 'x': diffusion has shape \(2, 2\)"),
            ({"diffusion": lambda x: 1.0 - x}, "site 'x': The diffusion at row .* not negative"),
            ({"diffusion": lambda x: 0.0 * x}, "site 'x': The diffusion at row 0 .* not 0"),
        ):
            with pytest.raises(ValueError, match=message):
                numpyro.handlers.seed(ebm.estimate(positive_model, "minimum_velocity", **options), 0)(POSITIVE)
        with pytest.warns(UserWarning, match="site 'x': step_size is .* of the data's variance"):
            rows_of("minimum_velocity", precision_model, np.array([-1.0, 1.0]), 1.0, step_size=0.6)


# --- kernel Stein discrepancy ---

KERNELS = {
    "imq": lambda x, y: (1 + jnp.sum((x - y) ** 2) / 0.49) ** -0.5,
    "rbf": lambda x, y: jnp.exp(-jnp.sum((x - y) ** 2) / 0.98),
}


@pytest.mark.usefixtures("x64")
class TestStein:
    @staticmethod
    def brute(t, x, kernel):
        """All pairs, by automatic differentiation."""
        log_density = lambda z: -t[0] * jnp.sum(jnp.exp(z)) - t[1] * jnp.exp(jnp.sum(z)) + (t[2] + 1) * jnp.sum(z)  # noqa: E731
        score = jax.grad(log_density)

        def u(x, y):
            s, r = score(x), score(y)
            mixed = jax.jacfwd(jax.grad(kernel, 1), 0)(x, y)
            return s @ r * kernel(x, y) + s @ jax.grad(kernel, 1)(x, y) + r @ jax.grad(kernel)(x, y) + jnp.trace(mixed)

        z = jnp.log(x)
        return jax.vmap(lambda x: jax.vmap(lambda y: u(x, y))(z))(z)

    @pytest.mark.slow
    @pytest.mark.parametrize("kernel", some_slow(["imq"], ["rbf"]))
    @pytest.mark.parametrize("statistic", some_slow(["v"], ["u"]))
    def test_against_all_pairs_one_by_one(self, kernel, statistic, monkeypatch):
        x = POSITIVE[:30]
        expected = lambda t: self.rows(self.brute(t, x, KERNELS[kernel]), statistic)  # noqa: E731
        options = {"kernel": kernel, "statistic": statistic, "bandwidth": 0.7}
        value, slope = rows_of("ksd", x=x, **options)
        np.testing.assert_allclose(value, expected(AT), rtol=1e-10)
        np.testing.assert_allclose(slope, jax.jacfwd(expected)(jnp.asarray(AT)), rtol=1e-9, atol=1e-9)
        monkeypatch.setattr(ksd, "PAIRS_AT_ONCE", 100)  # three rows at once
        for a, b in zip(rows_of("ksd", x=x, **options), (value, slope), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)

    @staticmethod
    def rows(pairs, statistic):
        if statistic == "v":
            return -jnp.mean(pairs, axis=1)
        return -(jnp.sum(pairs, axis=1) - jnp.diag(pairs)) / (len(pairs) - 1)

    @pytest.mark.parametrize("statistic", some_slow(["v"], ["u"]))
    def test_the_least_discrepancy_of_a_gaussian(self, statistic, gaussian_data):
        x = gaussian_data[:200]
        r = (x[:, None] - x) ** 2
        length = np.median(np.sqrt(r[np.triu_indices(200, 1)]))
        r /= length**2
        pairs = 1 - np.eye(200) if statistic == "u" else 1.0
        best = 0.5 * np.sum(pairs * r * (1 + r) ** -1.5) / np.sum(pairs * np.outer(x, x) * (1 + r) ** -0.5)
        slope = rows_of("ksd", precision_model, x, best, statistic=statistic)[1]
        np.testing.assert_allclose(np.mean(slope), 0.0, atol=1e-10)
        assert np.mean(rows_of("ksd", precision_model, x, 0.9 * best, statistic=statistic)[1]) > 0.01

    def test_the_truth_has_none(self):
        # Pairs of different rows: 0 in expectation. Over rows, the sum has twice the spread of its rows' means.
        x = np.random.default_rng(1).normal(size=2000)
        value = rows_of("ksd", precision_model, x, 1.0, bandwidth=1.0)[0]
        batches = np.asarray(value)
        error = 2 * np.std(batches) / np.sqrt(2000) + 1 / 2000
        assert abs(np.mean(value)) < 5 * error
        assert np.mean(value) > rows_of("ksd", precision_model, x, 2.0, bandwidth=1.0)[0].mean() + 5 * error

    @pytest.mark.slow
    def test_masked_rows_are_no_partners(self):
        keep = np.arange(300) % 3 > 0

        def model(x):
            with numpyro.handlers.mask(mask=jnp.asarray(keep)):
                precision_model(x)

        x = np.random.default_rng(0).normal(size=300)
        for bandwidth in (None, 0.5):
            alone = rows_of("ksd", precision_model, x[keep], 1.3, bandwidth=bandwidth)
            for fill in (np.nan, 70.0):
                masked = rows_of("ksd", model, np.where(keep, x, fill), 1.3, bandwidth=bandwidth)
                for a, b in zip(masked, alone, strict=True):
                    np.testing.assert_allclose(np.asarray(a)[keep], b, rtol=1e-9)
                    np.testing.assert_array_equal(np.asarray(a)[~keep], 0.0)

    @pytest.mark.slow
    def test_the_median_distance(self):
        x = np.random.default_rng(0).normal(size=(101, 3))
        distances = np.linalg.norm(x[:, None] - x, axis=-1)[np.triu_indices(101, 1)]
        everyone = jnp.ones(101, bool)
        np.testing.assert_allclose(ksd.median_distance(jnp.asarray(x), everyone), np.median(distances), rtol=1e-12)
        assert ksd.median_distance(jnp.zeros((4, 2)), jnp.ones(4, bool)) == 1.0
        assert ksd.median_distance(jnp.asarray(x), ~everyone) == 1.0
        few = jnp.concatenate([jnp.asarray(x[:40]), jnp.full((400, 3), jnp.inf)])
        distances = np.linalg.norm(x[:40, None] - x[:40], axis=-1)[np.triu_indices(40, 1)]
        got = ksd.median_distance(jnp.where(jnp.isfinite(few), few, few[0]), jnp.arange(440) < 40)
        np.testing.assert_allclose(got, np.median(distances), rtol=1e-12)
        large = np.random.default_rng(0).normal(size=3000)
        got = ksd.median_distance(jnp.asarray(large)[:, None], jnp.ones(3000, bool))
        np.testing.assert_allclose(got, 0.9539, rtol=0.1)  # sqrt(2) times the median of |N(0, 1)|

    @pytest.mark.slow
    def test_a_shared_context_a_score_and_figures(self):
        def shared(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x, c: 0.5 * c * t * x**2, context=jnp.asarray(2.0))
                numpyro.sample("x", d, obs=x)

        def score(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.ScoreDistribution(lambda x: -t * x), obs=x)

        x = np.linspace(-1, 1.5, 12)
        expected = rows_of("ksd", precision_model, x, 2.0)[0]
        np.testing.assert_allclose(rows_of("ksd", shared, x, 1.0)[0], expected, rtol=1e-12)
        np.testing.assert_allclose(rows_of("ksd", score, x, 2.0)[0], expected, rtol=1e-12)
        report = ebm.training_report(ebm.estimate(precision_model, "ksd"), {"t": jnp.asarray(2.0)}, x)
        np.testing.assert_allclose(report.sites[0].figures["squared_ksd"], -expected.mean(), rtol=1e-9)

    @pytest.mark.slow
    def test_nuts_may_target_it(self):
        # Quadratic in t: with a normal prior the generalised posterior is a Gaussian.
        x = np.random.default_rng(0).normal(size=40)

        def model(x):
            t = numpyro.sample("t", dist.Normal(0.0, 2.0))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

        wrapped = ebm.estimate(model, "ksd", bandwidth=1.0)
        slope = jax.grad(lambda t: surrogate(wrapped, {"t": t}, x))
        start, end = slope(0.0), slope(1.0)
        precision = start - end
        mcmc = MCMC(NUTS(wrapped), num_warmup=300, num_samples=2000, progress_bar=False)
        with pytest.warns(ebm.UncalibratedPosteriorWarning):
            mcmc.run(jax.random.key(0), x)
        draws = np.asarray(mcmc.get_samples()["t"])
        assert abs(draws.mean() - start / precision) < 5 / np.sqrt(precision * 400)
        np.testing.assert_allclose(draws.var(), 1 / precision, rtol=5 * np.sqrt(2 / 400))

    def test_refusals(self):
        for options, message in (
            ({"kernel": "imqq"}, "Unknown kernel 'imqq'. Did you mean 'imq'"),
            ({"statistic": "w"}, "Unknown statistic 'w'"),
            ({"bandwidth": -1.0}, "bandwidth > 0"),
            ({"beta": -1.5}, "between -1 and 0"),
            ({"beta": -0.5, "kernel": "rbf"}, "kernel='rbf'. Write kernel='imq'"),
        ):
            with pytest.raises(ValueError, match=message):
                ebm.estimate(precision_model, "ksd", **options)
        with pytest.raises(ValueError, match=r"bandwidth has shape \(2,\), the event has \(\)"):
            ebm.estimate(precision_model, "ksd", bandwidth=np.ones(2))(np.ones(3))
        with pytest.raises(ValueError, match="site 'x'.*1 row that takes part.*statistic='v'"):
            ebm.estimate(precision_model, "ksd")(np.ones(1))

        def model(x):
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x, c: c * x**2, context=jnp.ones(len(x)), batch_shape=(len(x),))
                numpyro.sample("x", d, obs=x)

        with pytest.raises(ValueError, match="site 'x'.*'ksd' cannot train.*its pairs would compare"):
            ebm.estimate(model, "ksd")(np.ones(3))


# --- energy discrepancy ---


@pytest.mark.usefixtures("x64")
class TestDiscrepancy:
    @staticmethod
    def expected(t, sd, w, copies=16, negatives=12):
        """Mean loss of two negatives on x ~ N(0, 1) for E = t x^2 / 2, by quadrature over all four normals."""

        def nodes(num):
            points, weights = np.polynomial.hermite_e.hermegauss(num)
            return points, weights / weights.sum()

        (x, px), (a, pa), (b, pb) = nodes(copies), nodes(copies), nodes(negatives)
        x, a, b, c = x[:, None, None, None], a[:, None, None], b[:, None], b
        ratio = lambda v: jnp.exp(0.5 * t * (x**2 - (x + sd * (a + v)) ** 2))  # noqa: E731
        losses = jnp.log((w + ratio(b) + ratio(c)) / 2)
        return jnp.einsum("xabc,x,a,b,c->", losses, px, pa, pb, pb)

    @pytest.mark.slow
    @pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
    def test_the_expected_loss_by_quadrature(self, w):
        options = {"noise_scale": 0.5, "num_negatives": 2, "w_stable": w}
        x = np.random.default_rng(0).normal(size=20_000)
        value, slope = rows_of("energy_discrepancy", precision_model, x, 1.3, **options)
        loss = lambda t: self.expected(t, 0.5, w)  # noqa: E731
        for got, wanted in ((-value, loss(1.3)), (-slope, jax.grad(loss)(1.3))):
            error = np.std(got) / np.sqrt(20_000)
            assert abs(np.mean(got) - wanted) < 5 * error
            assert error < 0.01

    def test_only_w_of_one_is_consistent(self):
        for sd in (0.1, 0.5):
            slopes = [jax.grad(self.expected)(1.0, sd, w, 24, 24) / sd**2 for w in (0.0, 1.0, 3.0)]
            assert abs(slopes[1]) < 2e-6
            assert slopes[0] < -0.05
            assert slopes[2] > 0.05

    @pytest.mark.slow
    def test_the_optimum_of_little_noise(self):
        # (M + w) / (M + 2 w - 1): 2, 1 and 5 / 7 for two negatives.
        for w, best in ((0.0, 2.0), (1.0, 1.0), (3.0, 5 / 7)):
            slope, bend = (f(best, 0.02, w) for f in (jax.grad(self.expected), jax.grad(jax.grad(self.expected))))
            np.testing.assert_allclose(slope / bend, 0.0, atol=5e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("num", [1, 3])
    def test_little_noise_is_score_matching_row_by_row_in_the_draws(self, num):
        # Two orders of the moves, at the draws themselves.
        key_copies, key_negatives = jax.random.split(self.key_of_surrogate())
        noise = jax.random.normal(key_copies, (1, 1, 400, 2)) + jax.random.normal(key_negatives, (1, num, 400, 2))
        value, _ = rows_of("energy_discrepancy", noise_scale=1e-3, num_negatives=num)
        log_density = lambda z: -AT[0] * jnp.sum(jnp.exp(z)) - AT[1] * jnp.exp(jnp.sum(z)) + (AT[2] + 1) * jnp.sum(z)  # noqa: E731
        score, hessian = (jax.vmap(f(log_density))(np.log(POSITIVE)) for f in (jax.grad, jax.hessian))
        slopes = jnp.einsum("mni,ni->mn", noise[0], score)
        bends = jnp.einsum("mni,nij,mnj->mn", noise[0], hessian, noise[0])
        q = num / (num + 1)
        second = q * jnp.mean(0.5 * bends + 0.5 * slopes**2, axis=0) - 0.5 * q**2 * jnp.mean(slopes, axis=0) ** 2
        scaled = -(value + np.log((num + 1) / num)) * 1e6
        np.testing.assert_allclose(scaled, second, atol=1e-4 * np.abs(second).max())

    @staticmethod
    def key_of_surrogate():
        with numpyro.handlers.seed(rng_seed=jax.random.key(0)):
            return numpyro.prng_key()

    def test_one_negative_is_half_of_conditional_nce(self):
        key_copies, key_negatives = jax.random.split(self.key_of_surrogate())
        x = POSITIVE[:, 0] - 1.5
        y = x + 0.4 * (jax.random.normal(key_copies, (1, 1, 400)) + jax.random.normal(key_negatives, (1, 1, 400))).ravel()
        value, _ = rows_of("energy_discrepancy", precision_model, x, 1.3, noise_scale=0.4, num_negatives=1, num_draws=1)
        np.testing.assert_allclose(-value, jax.nn.softplus(0.65 * (x**2 - y**2)), rtol=1e-12)

    @pytest.mark.parametrize(("num", "expected"), [(1, 0.66), (2, 0.87)])
    @pytest.mark.slow
    def test_efficiency(self, num, expected):
        x = np.random.default_rng(0).normal(size=100_000)
        options = {"noise_scale": 1.0, "num_draws": num}
        slope = rows_of("energy_discrepancy", precision_model, x, 1.0, **options)[1]
        ends = [rows_of("energy_discrepancy", precision_model, x, t, **options)[1].mean() for t in (0.99, 1.01)]
        bend = (ends[1] - ends[0]) / 0.02
        np.testing.assert_allclose(2 * bend**2 / np.mean(slope**2), expected, rtol=0.03)

    def test_refusals_and_warnings(self):
        for options, message in (
            ({"num_negatives": 0}, "num_negatives >= 1"),
            ({"num_draws": 1.5}, "whole number num_draws"),
            ({"noise_scale": 0.0}, "noise_scale > 0"),
            ({"w_stable": -1.0}, "w_stable >= 0"),
            ({"w_stable": np.ones(2)}, "one number w_stable"),
            ({"w_stable": 0, "num_negatives": 1}, "no minimum"),
            ({"noise_scale": np.ones(2)}, r"site 'x': noise_scale has shape \(2,\)"),
        ):
            with pytest.raises(ValueError, match=message):
                surrogate(ebm.estimate(precision_model, "energy_discrepancy", **options), {"t": 1.0}, np.zeros(4))
        model = numpyro.handlers.seed(ebm.estimate(precision_model, "energy_discrepancy", noise_scale=1e5), 0)
        with pytest.warns(UserWarning, match="site 'x': the moves lead out of the density.*Make them shorter"):
            numpyro.handlers.trace(model).get_trace(np.linspace(-1, 1, 5))
        assert ebm.EnergyDiscrepancy(w_stable=2.0).notes()
        assert not ebm.EnergyDiscrepancy().notes()


# --- diffusion recovery ---


class Place(NamedTuple):
    position: jax.Array


@record()
class Exact(ebm.AbstractKernel):
    """A draw of a Gaussian of one dimension, which it reads off the derivatives of its log density."""

    name = "exact"
    step_size = None

    def init(self, rng_key, position, log_density):
        return Place(position)

    def step(self, rng_key, state, log_density):
        slope, bend = jax.grad(log_density)(state.position), jax.grad(jax.grad(log_density))(state.position)
        draw = state.position - slope / bend + jax.random.normal(rng_key) / jnp.sqrt(-bend)
        return Place(draw), info(1.0, is_divergent=False, num_gradients=2)


def level_model(x):
    """A Gaussian of precision t, at each level."""
    t = numpyro.param("t", 1.0)
    energy = lambda x, sigma: 0.5 * x**2 / (1 / t + sigma**2)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=jnp.asarray(0.1)), obs=x)


def log_normal_model(x):
    """The same of log x."""
    t = numpyro.param("t", 1.0)
    energy = lambda x, sigma: jnp.log(x) + 0.5 * jnp.log(x) ** 2 / (1 / t + sigma**2)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(energy, context=jnp.asarray(0.1), support=constraints.positive)
        numpyro.sample("x", d, obs=x)


COVARIATE = np.linspace(-0.5, 1.5, 500)


def regression_model(x):
    """A Gaussian around t times a covariate."""
    t = numpyro.param("t", 1.0)
    energy = lambda x, own: 0.5 * (x - t * own["k"]) ** 2 / (0.25 + own["sigma"] ** 2)  # noqa: E731
    context = {"k": jnp.asarray(COVARIATE), "sigma": jnp.full(500, 0.1)}
    with numpyro.plate("rows", 500):
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=context, batch_shape=(500,)), obs=x)


NUMBERS = np.random.default_rng(0).normal(0, 0.5, 500)
NOISY = 0.8 * COVARIATE + NUMBERS
LADDER = ebm.geometric_sigmas(4.0, 0.2, 8)


def modes_energy(x, sigma, logits, mean):
    """Two modes with a weight of their own at each level."""
    logit, variance = logits[jnp.argmin(jnp.abs(LADDER - sigma))], 0.25 + sigma**2
    left, right = (-0.5 * (x + side * mean) ** 2 / variance for side in (1, -1))
    return -jnp.logaddexp(jax.nn.log_sigmoid(logit) + left, jax.nn.log_sigmoid(-logit) + right)


def modes_model(x):
    logits, mean = numpyro.param("logits", jnp.zeros(8)), numpyro.param("mean", 1.0)
    energy = lambda x, sigma: modes_energy(x, sigma, logits, mean)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=jnp.asarray(0.2)), obs=x)


class TestRecovery:
    @pytest.mark.parametrize(
        ("model", "x", "truth"),
        [
            (level_model, NUMBERS, 1 / np.mean(NUMBERS**2)),
            pytest.param(log_normal_model, np.exp(NUMBERS), 1 / np.mean(NUMBERS**2), marks=pytest.mark.slow),
            (regression_model, NOISY, COVARIATE @ NOISY / np.sum(COVARIATE**2)),
        ],
    )
    def test_under_exact_recovery_the_field_vanishes_at_the_truth(self, model, x, truth):
        wrapped = ebm.estimate(model, "diffusion_recovery", sigmas=(0.8, 0.1, 0.3), num_steps=1, kernel=Exact())

        @jax.jit
        def field(t, keys):
            slope = lambda key: jax.grad(lambda t: surrogate(wrapped, {"t": t}, x, key=key))(t)  # noqa: E731
            return jax.lax.map(slope, keys)

        keys = jax.random.split(jax.random.key(0), 400)
        slopes, below = np.asarray(field(truth, keys)), np.asarray(field(0.9 * truth, keys))
        error = np.std(slopes) / np.sqrt(400)
        assert abs(np.mean(slopes)) < 5 * error
        assert np.mean(below) > 7 * error  # what it would see of a bias of a tenth

    @pytest.mark.slow
    def test_the_pairs_of_levels(self):
        estimator = ebm.DiffusionRecoveryLikelihood(sigmas=(0.8, 0.1, 0.3))
        pairs = ebm.estimate(level_model, estimator).sites
        with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data={"t": 1.0}):
            site = pairs(np.resize(NUMBERS, 30_000))[0][1]
        pair = estimator.pair(jax.random.key(1), site)
        sigma = np.asarray(pair.local[0])
        levels, counts = np.unique(sigma.round(6), return_counts=True)
        np.testing.assert_allclose(levels, [0.1, 0.3, 0.8], rtol=1e-6)
        np.testing.assert_allclose(counts, 10_000, atol=1)
        following = np.array([0.3, 0.8, 0.8**2 / 0.3])
        for level, after in zip(levels, following, strict=True):
            own = np.isclose(sigma, level)
            gap = np.sqrt(after**2 - level**2)
            np.testing.assert_allclose(pair.gap[own], gap, rtol=1e-5)
            spread = 1 / gap**2 + 1 / (level**2 + np.var(NUMBERS))
            np.testing.assert_allclose(pair.unit[own], spread**-0.5, rtol=1e-5)
            for move, size in ((pair.near - site.position, level), (pair.noisier - pair.near, gap)):
                np.testing.assert_allclose(np.std(move[own]), size, rtol=5 / np.sqrt(2 * 10_000))

    @pytest.mark.slow
    def test_masked_rows_and_the_step_that_adapts(self):
        keep = np.arange(500) % 3 > 0

        def model(x):
            with numpyro.handlers.mask(mask=jnp.asarray(keep)):
                level_model(x)

        wrapped = ebm.estimate(model, "diffusion_recovery", sigmas=(0.1, 0.3, 0.8))
        for fill in (np.nan, 7.0):
            x = np.where(keep, NUMBERS, fill)
            value = jax.grad(lambda t, x=x: surrogate(wrapped, {"t": t}, x))(2.0)
            if np.isnan(fill):
                first = value
        assert np.isfinite(first)
        assert first == value

    @pytest.mark.slow
    def test_annealed_langevin_draws_the_weights(self):
        rng = np.random.default_rng(0)
        x = np.where(rng.random(2000) < 0.2, -2, 2) + 0.5 * rng.normal(size=2000)
        share = np.mean(x < 0)
        params = fit(ebm.estimate(modes_model, "diffusion_recovery", sigmas=LADDER), x, steps=1000)
        np.testing.assert_allclose(params["mean"], 2.0, atol=0.02)
        np.testing.assert_allclose(jax.nn.sigmoid(params["logits"][:5]), share, atol=0.02)
        truth = {"logits": jnp.full(8, np.log(share / (1 - share))), "mean": 2.0}

        def drawn(params):
            d = ebm.EnergyDistribution(
                lambda x, sigma: modes_energy(x, sigma, **params),
                context=jnp.asarray(0.2),
                sampler=ebm.AnnealedLangevin(LADDER),
            )
            return np.mean(d.sample(jax.random.key(1), (20_000,)) < 0)

        got, error = drawn(params), np.sqrt(2 * share * (1 - share) / 20_000)
        assert abs(got - drawn(truth)) < 5 * error
        np.testing.assert_allclose(got, share, atol=0.02)

    @pytest.mark.slow
    def test_refusals_and_warnings(self):
        for options, message in (
            ({}, "needs levels.*geometric_sigmas"),
            ({"sigmas": (1.0,)}, "two or more distinct levels"),
            ({"sigmas": (1.0, 1.0)}, "two or more distinct levels"),
            ({"sigmas": (1.0, -1.0)}, "positive"),
            ({"sigmas": (1.0, 0.1), "num_steps": 0}, "num_steps >= 1"),
        ):
            with pytest.raises(ValueError, match=message):
                ebm.estimate(level_model, "diffusion_recovery", **options)
        model = numpyro.handlers.seed(ebm.estimate(level_model, "diffusion_recovery", sigmas=(0.01, 0.1)), 0)
        with pytest.warns(UserWarning, match="site 'x': the largest noise level is 0.1"):
            model(NUMBERS)
        assert "too few steps" in ebm.DiffusionRecoveryLikelihood(sigmas=(0.1, 0.3)).notes()[-1]
