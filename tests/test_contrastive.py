"""The contrastive estimators against each other, against score matching in their limits, and against exact answers."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import AT, POSITIVE, fit, precision_model, rows_of, some_slow, surrogate
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.fitted_noise import fit_noise
from numpyro_ebm.estimators.parts.noise import _of_fitted

NOISE_NAMES = ["nce", "ranking_nce", "bregman_nce"]


@pytest.mark.usefixtures("x64")
class TestLimits:
    """As moves vanish: minus the loss is ``-2 log 2 - h^2 / 2`` times the loss of score matching."""

    @staticmethod
    def scaled(name, h, **options):
        value, slope = rows_of(name, **options)
        return (value + 2 * np.log(2)) * 2 / h**2, slope * 2 / h**2

    @pytest.mark.slow
    @pytest.mark.parametrize("law", ["rademacher", "sphere"])
    def test_shifted_nce_is_ssm_of_the_same_directions(self, law):
        sliced = rows_of("ssm", num_projections=2, projection=law)
        errors = []
        for h in (1e-2, 1e-3):
            shifted = self.scaled("shifted_nce", h, length=h, num_projections=2, projection=law)
            errors.append([np.abs(a - b).max() / np.abs(b).max() for a, b in zip(shifted, sliced, strict=True)])
        assert np.max(errors[1]) < 1e-5
        # Of second order in the shift.
        np.testing.assert_allclose(np.divide(*errors), 100, rtol=0.1)

    def test_conditional_nce_is_ssm_of_gaussian_directions(self):
        sliced = rows_of("ssm", num_projections=3, projection="gaussian")
        conditional = self.scaled("conditional_nce", 1e-3, sd=1e-3, kappa=6)
        for a, b in zip(conditional, sliced, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())

    @pytest.mark.slow
    def test_conditional_nce_is_sm_on_average(self):
        exact, exact_slope = rows_of("sm")
        value, slope = self.scaled("conditional_nce", 1e-3, sd=1e-3, kappa=500)
        for a, b in ((value, exact), (slope, exact_slope)):
            difference = np.asarray(a - b)
            error = difference.std(axis=0) / np.sqrt(400)
            assert np.all(np.abs(difference.mean(axis=0)) < 5 * error)
            assert np.all(error < 0.02 * np.abs(b).mean(axis=0))

    def test_shifted_nce_of_gaussian_directions_is_conditional_nce(self):
        conditional = rows_of("conditional_nce", sd=0.4, kappa=4)
        shifted = rows_of("shifted_nce", length=0.4, num_projections=2, projection="gaussian")
        np.testing.assert_allclose(shifted[0], conditional[0], rtol=1e-12)

    @pytest.mark.slow
    def test_the_scale_may_differ_by_dimension(self):
        value, _ = rows_of("conditional_nce", sd=np.array([1e-3, 1e-9]), kappa=2)
        x = jnp.log(POSITIVE)
        log_density = lambda z: -AT[0] * jnp.sum(jnp.exp(z)) - AT[1] * jnp.exp(jnp.sum(z)) + (AT[2] + 1) * jnp.sum(z)  # noqa: E731
        first = jax.vmap(jax.grad(log_density))(x)[:, 0]
        second = jax.vmap(jax.hessian(log_density))(x)[:, 0, 0]
        expected = -(0.5 * first**2 + second)
        scaled = np.asarray((value + 2 * np.log(2)) * 2e6)
        # One direction e: e^2 times the loss in the first dimension.
        ratio = scaled / expected
        assert np.all(ratio > 0)
        assert abs(ratio.mean() - 1) < 5 * np.sqrt(2 / 400)


class TestRelations:
    @pytest.mark.slow
    @pytest.mark.parametrize("noise", ["gaussian", None])
    def test_the_logistic_divergence_is_nce(self, noise):
        for a, b in zip(*(rows_of(name, nu=3, noise=noise) for name in ("nce", "bregman_nce")), strict=True):
            np.testing.assert_array_equal(a, b)

    @pytest.mark.slow
    def test_one_draw_ranked_is_the_difference_of_two_log_ratios(self):
        # -log w(x) / (w(x) + w(y)); with the logistic loss of G in place of the difference this would be nce.
        noise = dist.Normal(0, 1)
        model = ebm.estimate(precision_model, "ranking_nce", noise=noise)
        x = np.array([0.3])
        key = jax.random.key(3)
        value = surrogate(model, {"t": 2.0}, x, key=key)
        importance = ebm.estimate(precision_model, "bregman_nce", noise=noise, divergence="importance")
        parts = surrogate(importance, {"t": 2.0, "x$log_normalizer": 0.0}, x, key=key)
        at_data = -0.5 * 2 * 0.3**2 - noise.log_prob(0.3)
        at_noise = jnp.log(at_data - parts)  # minus the loss is log w(x) - w(y)
        np.testing.assert_allclose(value, -jax.nn.softplus(at_noise - at_data), rtol=1e-5)

    def test_a_constant_energy_ranks_by_chance(self):
        model = ebm.estimate(precision_model, "ranking_nce", nu=3, noise=dist.Uniform(-1, 1))
        with pytest.raises(ValueError, match="support"):
            surrogate(model, {"t": 0.0}, np.zeros(4))

        def flat(x):
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x: 7.0, support=constraints.interval(-1.0, 1.0))
                numpyro.sample("x", d, obs=x)

        value = surrogate(ebm.estimate(flat, "ranking_nce", nu=3, noise=dist.Uniform(-1, 1)), {}, np.zeros(4))
        np.testing.assert_allclose(value, -4 * np.log(4), rtol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("divergence", some_slow(["importance"], ["squared", "exponential"]))
    def test_every_divergence_finds_the_precision(self, divergence, gaussian_data):
        options = {"nu": 5, "noise": dist.Normal(0, 1), "divergence": divergence}
        steps = 2700 if divergence == "squared" else 900  # it feels little where the model's density is low
        params = fit(ebm.estimate(precision_model, "bregman_nce", **options), gaussian_data, steps=steps)
        np.testing.assert_allclose(params["t"], 3.99528, atol=0.1)
        np.testing.assert_allclose(params["x$log_normalizer"], 0.2264, atol=0.02)


class TestNoise:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["nce"], ["ranking_nce"]))
    @pytest.mark.parametrize("noise", some_slow(["mixture"], ["gaussian"]))
    def test_noise_fitted_to_the_batch(self, name, noise, gaussian_data):
        # Far from the standard normal that is the noise where nothing is said.
        x = 4 * gaussian_data[:500]
        t = fit(ebm.estimate(precision_model, name, nu=5, noise=noise), x)["t"]
        np.testing.assert_allclose(t, 1 / np.mean(x**2), rtol=0.05)

    @pytest.mark.parametrize("kind", ["gaussian", "mixture"])
    @pytest.mark.usefixtures("x64")
    def test_a_fitted_law_is_normalised_and_does_not_know_its_row(self, kind):
        x = np.random.default_rng(0).gamma(2.0, 1.0, 9)
        mask = jnp.arange(9) < 8
        d = ebm.EnergyDistribution(lambda x: x, support=constraints.positive)
        grid = jnp.exp(jnp.linspace(-15, 12, 4001))

        @jax.jit
        def law(x):
            site = Site("x", d, (9,), x, None, mask)
            fitted = _of_fitted(fit_noise(jax.random.key(0), site.position, mask, kind), site)
            return fitted.log_prob(jnp.broadcast_to(grid[:, None], (4001, 9))), fitted.sample(jax.random.key(1), 50_000)

        log_prob, draws = law(jnp.asarray(x))
        volume = jnp.gradient(jnp.log(grid)) * grid
        np.testing.assert_allclose(volume @ jnp.exp(log_prob), 1.0, rtol=1e-4)
        mean, square = (volume * jnp.log(grid) ** power @ jnp.exp(log_prob) for power in (1, 2))
        error = np.sqrt((square - mean**2) / 50_000)
        assert np.all(np.abs(jnp.log(draws).mean(axis=0) - mean) < 5 * error)
        moved = law(jnp.asarray(x).at[0].set(9.0))[0]
        np.testing.assert_array_equal(moved[:, ::2], log_prob[:, ::2])
        assert np.all(np.any(moved[:, 1::2] != log_prob[:, 1::2], axis=0))
        np.testing.assert_array_equal(law(jnp.asarray(x).at[8].set(9.0))[0], log_prob)  # masked

    @pytest.mark.parametrize("name", NOISE_NAMES)
    def test_one_law_for_all_rows_is_the_same_law_for_each(self, name):
        x = np.linspace(-1, 1, 6)
        laws = dist.Normal(0.3, 2.0), dist.Normal(jnp.full(6, 0.3), 2.0)
        one, each = (surrogate(ebm.estimate(precision_model, name, nu=3, noise=law), {"t": 2.0}, x) for law in laws)
        np.testing.assert_allclose(one, each, rtol=1e-6)

    @pytest.mark.slow
    def test_masked_rows_may_have_noise_that_is_no_number(self):
        x, scale = jnp.array([0.1, jnp.nan, -0.3]), jnp.array([1.0, jnp.nan, 2.0])

        def loss(t, name, keep, noise):
            def model(x):
                with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=keep):
                    numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

            return surrogate(ebm.estimate(model, name, noise=noise), {}, x)

        law = dist.Normal(0.0, scale, validate_args=False)
        for name in NOISE_NAMES:
            value, slope = jax.value_and_grad(loss)(2.0, name, jnp.array([True, False, True]), law)
            assert np.isfinite([value, slope]).all()
            assert slope != 0
            empty = jax.value_and_grad(loss)(2.0, name, jnp.zeros(3, bool), "mixture")
            np.testing.assert_array_equal(empty, (0.0, 0.0))

    @pytest.mark.slow
    def test_a_base_with_parameters_learns_although_it_is_the_noise(self, gaussian_data):
        def model(x):
            s = numpyro.param("s", 1.0, constraint=constraints.positive)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.0 * x, base=dist.Normal(0, s)), obs=x)

        params = fit(ebm.estimate(model, "nce", nu=5), gaussian_data, steps=400)
        np.testing.assert_allclose(params["s"] ** 2, 0.2503, rtol=0.03)
        np.testing.assert_allclose(params["x$log_normalizer"], 0.0, atol=0.02)

    @pytest.mark.slow
    def test_a_noise_model_is_fitted_by_maximum_likelihood(self, gaussian_data):
        def noise():
            loc, scale = numpyro.param("loc", 1.0), numpyro.param("scale", 2.0, constraint=constraints.positive)
            numpyro.sample("x", dist.Normal(loc, scale))

        params = fit(ebm.estimate(precision_model, "nce", nu=5, noise=noise), gaussian_data, steps=600)
        np.testing.assert_allclose([params["loc"], params["scale"]], [gaussian_data.mean(), gaussian_data.std()], atol=1e-3)
        np.testing.assert_allclose(params["t"], 3.99528, atol=0.1)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"noise": "gausian"}, ValueError, "Unknown noise 'gausian'. Did you mean 'gaussian'"),
            ({"noise": 3}, TypeError, "NumPyro model of one event; got int"),
            ({"noise": dist.Normal}, TypeError, "NumPyro model of one event; got the class Normal"),
            ({"noise": lambda: None}, ValueError, r"site 'x': The noise does not sample 'x'"),
            ({"noise": lambda: numpyro.sample("z", dist.Normal(0, 1))}, ValueError, r"site 'x': The noise does not sample"),
            (
                {"noise": lambda: numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), 1))},
                ValueError,
                "site 'x': The noise has a latent 'z'",
            ),
        ],
    )
    def test_noise_that_cannot_be_used(self, options, error, message):
        with pytest.raises(error, match=message):
            surrogate(ebm.estimate(precision_model, "ranking_nce", **options), {"t": 1.0}, np.linspace(-1, 1, 4))

    def test_fitted_noise_needs_two_rows(self):
        with pytest.raises(ValueError, match="site 'x': The mixture noise.*one row"):
            surrogate(ebm.estimate(precision_model, "nce", noise="mixture"), {"t": 1.0}, np.zeros(1))

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("nce", {"log_normalizer": "learn"}, "Did you mean 'learned'"),
            ("bregman_nce", {"divergence": "square"}, "Did you mean 'squared'"),
            ("ranking_nce", {"nu": 0}, "nu >= 1"),
            ("conditional_nce", {"kappa": 0}, "kappa >= 1"),
            ("conditional_nce", {"sd": 0.0}, "sd > 0"),
            ("conditional_nce", {"sd": np.ones(2)}, r"site 'x': sd has shape \(2,\)"),
            ("shifted_nce", {"length": np.ones(2)}, "one number length"),
            ("shifted_nce", {"projection": "spheres"}, "Did you mean 'sphere'"),
        ],
    )
    def test_options_that_cannot_be(self, name, options, message):
        with pytest.raises(ValueError, match=message):
            surrogate(ebm.estimate(precision_model, name, **options), {"t": 1.0}, np.zeros(4))


class TestContext:
    """y ~ N(0, exp(-0.8 k)), one k for each row, and E(y | k) = exp(t k) y^2 / 2."""

    rng = np.random.default_rng(0)
    k = rng.uniform(-1, 1, 1500).astype(np.float32)
    y = (rng.normal(size=1500) * np.exp(-0.4 * k)).astype(np.float32)
    row_noise = staticmethod(lambda k: numpyro.sample("y", dist.Normal(0, jnp.exp(numpyro.param("s", 0.0) * k))))

    def model(self, y):
        t, b = numpyro.param("t", 0.1), numpyro.param("b", jnp.zeros(2))
        energy = lambda y, k: 0.5 * jnp.exp(t * k) * y**2 + b[0] + b[1] * k  # noqa: E731
        with numpyro.plate("rows", 1500):
            numpyro.sample("y", ebm.EnergyDistribution(energy, context=self.k, batch_shape=(1500,)), obs=y)

    def best(self):
        """Maximum likelihood by Newton."""
        t = 0.0
        for _ in range(50):
            weight = np.exp(t * self.k) * self.y**2
            t -= np.sum(self.k * (weight - 1)) / np.sum(self.k**2 * weight)
        return t

    @pytest.mark.slow
    @pytest.mark.parametrize("noise", some_slow(["model"], ["rows", "one law"]))
    def test_ranking_needs_no_log_z(self, noise):
        laws = {"model": self.row_noise, "rows": dist.Normal(0, jnp.exp(-0.5 * self.k)), "one law": dist.Normal(0, 1.5)}
        ranking = ebm.estimate(self.model, "ranking_nce", nu=10, noise=laws[noise])
        params = fit(ranking, self.y, steps=400)
        np.testing.assert_allclose(params["t"], self.best(), atol=0.05)
        slope = jax.grad(lambda b: surrogate(ranking, {"t": 0.7, "b": b}, self.y))(jnp.ones(2))
        np.testing.assert_allclose(slope / 1500, 0.0, atol=1e-6)  # log Z cancels in each context
        if noise == "model":
            np.testing.assert_allclose(params["s"], -self.best() / 2, atol=1e-3)

    @pytest.mark.slow
    def test_a_self_normalised_energy(self):
        options = {"nu": 10, "noise": self.row_noise, "log_normalizer": "fixed"}
        params = fit(ebm.estimate(self.model, "nce", **options), self.y, steps=600)
        assert "y$log_normalizer" not in params
        np.testing.assert_allclose(params["t"], self.best(), atol=0.05)
        np.testing.assert_allclose(params["b"], [0.5 * np.log(2 * np.pi), -self.best() / 2], atol=0.05)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["conditional_nce"], ["shifted_nce"]))
    def test_moves_keep_the_context(self, name):
        # Their minimum on these rows, by the expected loss: normal moves of every size on a grid.
        options = {"sd": 0.5, "kappa": 10} if name == "conditional_nce" else {"length": 0.5}
        t = fit(ebm.estimate(self.model, name, **options), self.y, steps=600)["t"]
        if name == "conditional_nce":
            points, weights = np.polynomial.hermite_e.hermegauss(40)
        else:
            points, weights = np.array([-1.0, 1.0]), np.ones(2)
        moved = (self.y[:, None] + 0.5 * points) ** 2 - self.y[:, None] ** 2
        loss = lambda t: np.mean(np.log1p(np.exp(-0.5 * np.exp(t * self.k)[:, None] * moved)) @ weights)  # noqa: E731
        grid = np.linspace(0.5, 1.2, 701)
        np.testing.assert_allclose(t, grid[np.argmin([loss(g) for g in grid])], atol=0.03)

    @pytest.mark.slow
    def test_one_constant_where_the_context_shifts_the_density(self):
        y = (0.7 * self.k + np.random.default_rng(1).normal(size=1500)).astype(np.float32)

        def model(y):
            t = numpyro.param("t", 0.0)
            d = ebm.EnergyDistribution(lambda y, k: 0.5 * (y - t * k) ** 2, context=self.k, batch_shape=(1500,))
            with numpyro.plate("rows", 1500):
                numpyro.sample("y", d, obs=y)

        options = {"nu": 10, "noise": "gaussian", "log_normalizer": "learned"}
        params = fit(ebm.estimate(model, "nce", **options), y, steps=600)
        np.testing.assert_allclose(params["y$log_normalizer"], 0.5 * np.log(2 * np.pi), atol=0.03)
        np.testing.assert_allclose(params["t"], self.k @ y / (self.k @ self.k), atol=0.05)

    def test_the_choice_is_the_users(self):
        for name in ("nce", "bregman_nce"):
            with pytest.raises(ValueError, match=r"(?s)site 'y'.*'ranking_nce'.*log_normalizer='fixed'.*'learned'"):
                surrogate(ebm.estimate(self.model, name), {"t": 0.1}, self.y)

    @pytest.mark.slow
    def test_rows_that_share_one_context_have_one_log_z(self):
        def model(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x, c: c * x**2, context=jnp.asarray(0.5)), obs=x)

        trace = numpyro.handlers.trace(numpyro.handlers.seed(ebm.estimate(model, "nce"), 0)).get_trace(np.zeros(3))
        assert "x$log_normalizer" in trace


class TestSaturation:
    @pytest.mark.slow
    def test_noise_far_away_never_moves_and_says_so(self, gaussian_data):
        # Case 9: noise N(8, .1), the precision stays where it started. The data are traced: only training can see it.
        model = ebm.estimate(precision_model, "nce", noise=dist.Normal(8.0, 0.1))
        svi = SVI(numpyro.handlers.scale(model, 1 / 2000), ebm.empty_guide, optax.adam(0.02), Trace_ELBO())

        @jax.jit
        def updates(x):
            update = lambda state, _: svi.update(state, x)  # noqa: E731
            return svi.get_params(jax.lax.scan(update, svi.init(jax.random.key(0), x), None, length=1000)[0])

        def run():
            params = updates(gaussian_data)
            jax.effects_barrier()
            return params

        with pytest.warns(UserWarning, match="site 'x': the noise does not overlap the data .*nothing is learned"):
            params = run()
        np.testing.assert_allclose(params["t"], 1.0, atol=1e-3)

    @pytest.mark.parametrize("name", NOISE_NAMES)
    def test_known_values_warn_at_once(self, name, gaussian_data):
        model = numpyro.handlers.seed(ebm.estimate(precision_model, name, noise=dist.Normal(8.0, 0.1)), 0)
        with pytest.warns(UserWarning, match="site 'x': the noise does not overlap the data") as caught:
            numpyro.handlers.trace(model).get_trace(gaussian_data)
        assert len(caught) == 2  # at the data, and in the loss

    @pytest.mark.parametrize("options", [("conditional_nce", {"sd": 1e4}), ("shifted_nce", {"length": 1e4})])
    def test_moves_far_too_long(self, options):
        name, options = options
        model = numpyro.handlers.seed(ebm.estimate(precision_model, name, **options), 0)
        with pytest.warns(UserWarning, match="site 'x': the moves lead out of the density.*Make them shorter"):
            numpyro.handlers.trace(model).get_trace(np.linspace(-1, 1, 5))

    def test_good_noise_is_silent_in_training(self, gaussian_data):
        fit(ebm.estimate(precision_model, "nce", noise=dist.Normal(0, 1)), gaussian_data, steps=50)


class TestTelescoping:
    """Data 100 times narrower than the widest level."""

    x = np.random.default_rng(0).normal(0, 0.01, 1000).astype(np.float32)
    sigmas = ebm.geometric_sigmas(1.0, 0.005, 6)

    @staticmethod
    def model(x, *, sigma=0.005, covariate=None):
        u = numpyro.param("u", 0.0)
        energy = lambda x, c: 0.5 * x**2 / (jnp.exp(2 * u) + (c["sigma"] if isinstance(c, dict) else c) ** 2)  # noqa: E731
        rows = () if covariate is None else (len(x),)
        context = jnp.asarray(sigma) if covariate is None else {"sigma": jnp.full(rows, sigma), "k": covariate}
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, context=context, batch_shape=rows), obs=x)

    @pytest.mark.slow
    def test_scale_and_log_z_at_every_level(self):
        params = fit(ebm.estimate(self.model, "tre", sigmas=self.sigmas), self.x)
        variance = np.mean(self.x**2)
        np.testing.assert_allclose(params["u"], 0.5 * np.log(variance), atol=0.05)
        exact = 0.5 * np.log(2 * np.pi * (variance + np.sort(self.sigmas) ** 2))
        np.testing.assert_allclose(params["x$log_normalizer"], exact, atol=0.1)

    @pytest.mark.slow
    def test_one_bridge_is_nce_under_fitted_noise(self):
        # Rows that are far more spread than the level: its noise does not matter.
        x = 1000 * self.x
        params = {"u": jnp.log(10.0), "x$log_normalizer": jnp.array([3.0])}
        keys = jax.random.split(jax.random.key(0), 20)

        def values_of(model, **params):
            return jax.jit(lambda keys: jax.lax.map(lambda key: surrogate(model, params, x, key=key), keys))(keys)

        one_level = ebm.estimate(self.model, "tre", sigmas=[1e-5])
        values = values_of(one_level, **params)
        nce = values_of(ebm.estimate(self.model, "nce", noise="gaussian"), **{**params, "x$log_normalizer": 3.0})
        error = np.hypot(np.std(values), np.std(nce)) / np.sqrt(20)
        assert 0 < error < 0.01 * abs(np.mean(nce))
        assert abs(np.mean(values) - np.mean(nce)) < 5 * error

    def test_refusals(self):
        with pytest.raises(ValueError, match="needs levels.*geometric_sigmas"):
            ebm.estimate(self.model, "tre")
        model = ebm.estimate(self.model, "tre", sigmas=self.sigmas)
        with pytest.raises(ValueError, match="(?s)site 'x'.*log_normalizer='fixed'"):
            surrogate(model, {"u": 0.0}, self.x, covariate=jnp.ones(1000))

    @pytest.mark.slow
    def test_a_bridge_too_long(self):
        model = ebm.estimate(lambda x: self.model(x, sigma=1e-9), "tre", sigmas=[1e-9, 1e9])
        log_z = jnp.log(jnp.array([1e-9, 1e9]))
        params = {"u": jnp.array(-20.0), "x$log_normalizer": log_z}
        model = numpyro.handlers.substitute(numpyro.handlers.seed(model, 0), params)
        with pytest.warns(UserWarning, match="site 'x': the ends of a bridge do not overlap.*Give more levels"):
            numpyro.handlers.trace(model).get_trace(1e-9 * self.x)
