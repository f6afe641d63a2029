"""Models conditioned on the noise level: processes, training over all levels, and samplers that come down them."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import check_moments, fit, some_slow, surrogate
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO

import numpyro_ebm as ebm

MEAN, VARIANCE = np.array([1.0, -0.5, 0.3]), np.array([0.3, 1.0, 2.0])
PROCESSES = {"ve": ebm.VE(0.1, 10.0), "vp": ebm.VP()}
SMALLEST = jnp.asarray(0.1)
TINY = 0.5  # standard deviation of the modes at -4 and 4
LOGIT = float(np.log(0.2 / 0.8))
LADDER = tuple(float(s) for s in np.geomspace(16.0, 0.1, 12))
FINE = ebm.AnnealedLangevin(np.geomspace(16.0, 0.1, 48), 60)
NOISE = np.random.default_rng(0).normal(0, TINY, (10, 1000)).astype(np.float32)
MODES = np.where(np.arange(1000) < 200, -4.0, 4.0).astype(np.float32) + NOISE  # ten data sets


def law_at(process, t):
    """Mean and variance at t of the data N(MEAN, VARIANCE)."""
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    return alpha * MEAN, alpha**2 * VARIANCE + sigma**2


def gaussian_score(name):
    """The exact score of `law_at`, given sigma."""

    def score(x, sigma):
        alpha = jnp.sqrt(1 - sigma**2) if name == "vp" else 1.0
        return -(x - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)

    return score


def gaussian(name, sampler=None):
    return ebm.ScoreDistribution(gaussian_score(name), (3,), context=SMALLEST, sampler=sampler)


def modes_energy(x, sigma, logit=LOGIT):
    """Of modes at -4 (of weight .2) and 4, with the noise on them."""
    scale = jnp.sqrt(TINY**2 + sigma**2)
    parts = dist.Normal(jnp.array([-4.0, 4.0]), scale).log_prob(x)
    return -jax.nn.logsumexp(parts + jnp.array([jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)]))


def weight_below(draws, weight=0.2):
    """Independent draws have the weight of the lower mode, within 5 standard errors."""
    draws = np.asarray(draws)
    assert np.all(np.abs(np.abs(draws) - 4) < 6 * TINY)
    error = np.sqrt(weight * (1 - weight) / draws.size)
    assert error < 0.01
    assert abs(np.mean(draws < 0) - weight) < 5 * error


class TestProcesses:
    @pytest.mark.parametrize("name", PROCESSES)
    @pytest.mark.usefixtures("x64")
    def test_the_kernel_solves_the_equation(self, name):
        # d log alpha / dt = f / x and d sigma^2 / dt = 2 (f / x) sigma^2 + g^2.
        process, t = PROCESSES[name], 0.3
        rate = process.drift(jnp.asarray(1.0), t)
        np.testing.assert_allclose(jax.grad(lambda t: jnp.log(process.alpha(t)))(t), rate, rtol=1e-9)
        growth = jax.grad(lambda t: process.sigma(t) ** 2)(t)
        np.testing.assert_allclose(growth, 2 * rate * process.sigma(t) ** 2 + process.diffusion(t) ** 2, rtol=1e-9)

    @pytest.mark.parametrize("name", PROCESSES)
    def test_transitions_compose(self, name):
        process = PROCESSES[name]
        a, v = process.transition(0.2, 0.7)
        np.testing.assert_allclose(process.alpha(0.2) * a, process.alpha(0.7), rtol=1e-5)
        np.testing.assert_allclose(a**2 * process.sigma(0.2) ** 2 + v, process.sigma(0.7) ** 2, rtol=1e-5)

    def test_the_ends(self):
        ve, vp = PROCESSES["ve"], PROCESSES["vp"]
        np.testing.assert_allclose([ve.sigma(ve.t_min), ve.sigma(1.0)], [0.1, 10.0], rtol=1e-5)
        np.testing.assert_allclose(ve.prior((2,)).variance, [100.0, 100.0])
        np.testing.assert_allclose(vp.alpha(1.0), np.exp(-0.25 * 20.1), rtol=1e-5)
        assert vp.prior((2,)).event_shape == (2,)
        assert float(vp.sigma(vp.t_min)) < 0.011

    def test_geometric_sigmas(self):
        np.testing.assert_allclose(ebm.geometric_sigmas(8.0, 0.5, 5), [8, 4, 2, 1, 0.5], rtol=1e-6)
        for bad in ((0.1, 1.0, 3), (1.0, 0.1, 1), (-1.0, 0.1, 3), (1.0, 0.1, 0)):
            with pytest.raises(ValueError, match="geometric_sigmas"):
                ebm.geometric_sigmas(*bad)

    def test_refusals(self):
        with pytest.raises(ValueError, match="VE needs sigma_min < sigma_max"):
            ebm.VE(1.0, 0.1)
        with pytest.raises(ValueError, match="VP needs 0 < t_min < 1"):
            ebm.VP(t_min=1.0)
        with pytest.raises(ValueError, match="VP needs beta_max > 0"):
            ebm.VP(beta_max=0.0)


def level_model(x, name="ve"):
    t = numpyro.param("t", 1.0)

    def energy(x, sigma):
        kept = 1 - sigma**2 if name == "vp" else 1.0
        return 0.5 * x**2 / (kept / t + sigma**2)

    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, context=SMALLEST), obs=x)


def modes_model(x):
    logit = numpyro.param("logit", 0.0)
    energy = ebm.EnergyDistribution(lambda x, sigma: modes_energy(x, sigma, logit), context=jnp.asarray(1e-3))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy, obs=x)


class TestTraining:
    def test_one_level_is_dsm_times_its_square(self, gaussian_data):
        x, sigma, keys = gaussian_data[:200], 0.3, jax.random.split(jax.random.key(0), 400)

        def fixed(x):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2 / (1 / 3.0 + sigma**2)), obs=x)

        def values(model, params):
            # Under jit the data are not concrete, so that neither estimator speaks of its scale.
            draw = lambda x, key: surrogate(model, params, x, key=key) / len(x)  # noqa: E731
            return np.asarray(jax.jit(lambda x: jax.lax.map(lambda key: draw(x, key), keys))(x))

        ladder = values(ebm.estimate(level_model, "multiscale_dsm", sigmas=[sigma]), {"t": 3.0})
        single = sigma**2 * values(ebm.estimate(fixed, "dsm", sigma=sigma), {})
        error = np.hypot(ladder.std(), single.std()) / np.sqrt(len(keys))
        assert abs(ladder.mean() - single.mean()) < 5 * error
        assert error < 0.01 * abs(single.mean())

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["vp"], ["ve"]))
    def test_a_process_has_its_optimum_at_the_precision_of_the_data(self, name, gaussian_data):
        # 1 / mean x^2 at each level.
        model, x = ebm.estimate(lambda x: level_model(x, name), "multiscale_dsm", process=PROCESSES[name]), gaussian_data

        def slope(t):
            one = lambda key: jax.grad(lambda t: surrogate(model, {"t": t}, x, key=key))(t)  # noqa: E731
            draws = jax.lax.map(one, jax.random.split(jax.random.key(0), 400))
            return jnp.mean(draws), jnp.std(draws) / 20

        optimum = 1 / np.mean(x**2)
        for t, sign in ((optimum, 0), (0.9 * optimum, 1), (1.1 * optimum, -1)):
            mean, error = slope(t)
            assert abs(mean) < 5 * error if sign == 0 else sign * mean > 5 * error

    @pytest.mark.slow
    @pytest.mark.usefixtures("x64")
    def test_finite_differences_agree_with_its_gradient(self, gaussian_data):
        model, h = ebm.estimate(level_model, "multiscale_dsm", process=PROCESSES["ve"]), 1e-5
        value = lambda t: surrogate(model, {"t": t}, gaussian_data[:50])  # noqa: E731
        numerical = (value(2.0 + h) - value(2.0 - h)) / (2 * h)
        np.testing.assert_allclose(jax.grad(value)(2.0), numerical, rtol=1e-6)

    def test_levels_are_uniform_in_each_row_and_spread_over_the_rows(self):
        from numpyro_ebm.estimators.parts.ladder import stratified

        draws = np.asarray(jax.vmap(lambda key: stratified(key, 8))(jax.random.split(jax.random.key(0), 4000)))
        np.testing.assert_array_equal(np.sort(np.floor(draws * 8), axis=1), np.tile(np.arange(8), (4000, 1)))
        error = 1 / np.sqrt(12 * 4000)
        assert np.all(np.abs(draws.mean(0) - 0.5) < 5 * error)
        assert np.all(np.abs((draws**2).mean(0) - 1 / 3) < 5 * np.sqrt(4 / 45 / 4000))
        estimator = ebm.MultiscaleDenoisingScoreMatching(sigmas=[3.0, 2.0, 1.0])
        np.testing.assert_allclose(estimator.levels(jnp.array([0.0, 0.4, 0.99999]))[1], [3, 2, 1])

    def test_covariates_stay_beside_the_level(self):
        # y = w k + noise: the weight comes out of a regression with sigma in the same dict.
        rng = np.random.default_rng(0)
        k = rng.normal(size=1000).astype(np.float32)
        y = (0.7 * k + 0.3 * rng.normal(size=1000)).astype(np.float32)

        def model(y):
            w = numpyro.param("w", 0.0)
            energy = lambda y, c: 0.5 * (y - w * c["x"]) ** 2 / (0.09 + c["sigma"] ** 2)  # noqa: E731
            context = {"sigma": jnp.full(1000, 0.1), "x": k}
            with numpyro.plate("rows", 1000):
                numpyro.sample("y", ebm.EnergyDistribution(energy, context=context, batch_shape=(1000,)), obs=y)

        w = fit(ebm.estimate(model, "multiscale_dsm", sigmas=[1.0, 0.3, 0.1]), y, steps=500)["w"]
        np.testing.assert_allclose(w, np.sum(k * y) / np.sum(k**2), atol=0.03)

    @pytest.mark.parametrize("options", [{}, {"sigmas": [1.0], "process": ebm.VP()}])
    def test_neither_or_both_are_refused(self, options):
        with pytest.raises(ValueError, match="either sigmas or a process; got (neither|both)"):
            ebm.estimate(level_model, "multiscale_dsm", **options)

    @pytest.mark.parametrize("sigmas", [[], [1.0, -1.0], 0.3, [[1.0]], "ladder", [np.nan]])
    def test_what_is_no_ladder_is_refused(self, sigmas):
        with pytest.raises(ValueError, match="needs sigmas as a list of noise levels"):
            ebm.MultiscaleDenoisingScoreMatching(sigmas=sigmas)

    def test_what_is_no_process_is_refused(self):
        for build in (lambda p: ebm.MultiscaleDenoisingScoreMatching(process=p), ebm.ReverseSDE, ebm.ProbabilityFlow):
            with pytest.raises(TypeError, match="needs a noise process"):
                build(3.0)

    @pytest.mark.parametrize(
        ("context", "came"), [(None, "None"), ({"x": 1.0}, r"a dict of \['x'\]"), (jnp.ones(2), r"shape \(2,\)")]
    )
    def test_a_context_without_a_level_is_refused(self, context, came):
        d = ebm.EnergyDistribution(lambda x, *_: 0.5 * x**2, context=context)
        for sampler in (ebm.AnnealedLangevin(LADDER), ebm.ReverseSDE(ebm.VP()), ebm.ProbabilityFlow(ebm.VP())):
            with pytest.raises(ValueError, match=f"noise level.*context is .*{came}.*Write EnergyDistribution"):
                sampler(jax.random.key(0), d, ())
        model = lambda x: numpyro.sample("x", d, obs=x)  # noqa: E731
        with pytest.raises(ValueError, match=f"site 'x'.*context is .*{came}"):
            surrogate(ebm.estimate(model, "multiscale_dsm", sigmas=[1.0]), {}, np.ones(3))

    @pytest.mark.parametrize("options", [{"sigmas": [0.3, 0.1]}, {"process": ebm.VE(0.01, 0.3)}])
    def test_levels_below_the_spread_of_the_data_warn(self, options, gaussian_data):
        model = ebm.estimate(level_model, "multiscale_dsm", **options)
        svi = SVI(model, ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        with pytest.warns(UserWarning, match="site 'x': the largest noise level is 0.3, the data's standard deviation 0.5"):
            svi.init(jax.random.key(0), gaussian_data)


class TestWeightsOfFarModes:
    """The tutorial's point: one level does not see the weights .2 and .8 of modes at -4 and 4; a ladder does."""

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["sm"], ["ssm_vr"]))
    def test_score_matching_is_blind_to_them(self, name):
        # The little that there is comes from the one datum nearest to the middle: any weight comes out, by data set.
        model = ebm.estimate(modes_model, name)
        values = [float(surrogate(model, {"logit": logit}, MODES[0])) for logit in (LOGIT, 0.0, 2.0)]
        np.testing.assert_allclose(values, values[0], rtol=1e-5)
        assert abs(self.slope(model)) < 1e-7
        weights = self.weights(model)
        assert np.std(weights) > 0.2
        assert np.mean(np.abs(weights - 0.2) > 0.1) > 0.7

    @pytest.mark.slow
    def test_a_ladder_sees_them(self):
        model = ebm.estimate(modes_model, "multiscale_dsm", sigmas=LADDER)
        assert self.slope(model) < -1e-2
        np.testing.assert_allclose(self.weights(model), 0.2, atol=0.03)

    @staticmethod
    def slope(model):
        """Of the surrogate at equal weights, per row."""
        return jax.grad(lambda logit: surrogate(model, {"logit": logit}, MODES[0]))(0.0) / MODES.shape[1]

    @staticmethod
    def weights(model):
        """By data set."""
        return np.asarray(jax.vmap(lambda x: jax.nn.sigmoid(fit(model, x, steps=300)["logit"]))(MODES))

    @pytest.mark.slow
    def test_a_network_and_annealed_langevin_have_them(self):
        class Net(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.first, self.second = nnx.Linear(2, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)
                self.last = nnx.Linear(64, 1, rngs=rngs)

            def __call__(self, x, sigma):
                # Preconditioned: the whole is in units of the noise.
                spread = jnp.sqrt(sigma**2 + 16)
                hidden = nnx.silu(self.first(jnp.stack([x / spread * 2, jnp.log(sigma)])))
                return (self.last(nnx.silu(self.second(hidden)))[0] - x / spread) / sigma

        module = Net()

        def build(net):
            return ebm.ScoreDistribution(net, context=jnp.asarray(0.1), sampler=ebm.AnnealedLangevin(LADDER, 100))

        def model(x):
            net = nnx_module("net", module)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", build(net), obs=x)

        params = fit(ebm.estimate(model, "multiscale_dsm", sigmas=LADDER), MODES[0], steps=6000, rate=5e-3)
        with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
            draws = build(nnx_module("net", module)).sample(jax.random.key(1), (4000,))
        np.testing.assert_allclose(np.mean(np.asarray(draws) < 0), 0.2, atol=0.03)
        np.testing.assert_allclose(np.mean(np.abs(draws)), 4.0, atol=0.1)


class TestAnnealedLangevin:
    @pytest.mark.slow
    @pytest.mark.parametrize("denoise", some_slow([True], [False]))
    def test_the_moments_of_a_gaussian_are_those_of_the_recursion(self, denoise):
        ladder, steps, step_size = (4.0, 1.0, 0.4), 30, 0.04
        sampler = ebm.AnnealedLangevin(ladder[::-1], steps, step_size, denoise=denoise)
        draws = gaussian("ve", sampler).sample(jax.random.key(0), (20_000,))
        mean, variance = np.zeros(3), np.full(3, ladder[0] ** 2)
        for sigma in ladder:
            epsilon, u = step_size * (sigma / ladder[-1]) ** 2, VARIANCE + sigma**2
            for _ in range(steps):
                mean = mean - epsilon * (mean - MEAN) / u
                variance = variance * (1 - epsilon / u) ** 2 + 2 * epsilon
        if denoise:
            kept = 1 - ladder[-1] ** 2 / u
            mean, variance = MEAN + kept * (mean - MEAN), variance * kept**2
        check_moments(draws.reshape(4, 5000, 3), mean, variance)

    @pytest.mark.slow
    def test_many_steps_forget_the_start_up_to_the_known_bias(self):
        # Unadjusted Langevin of step eps on a Gaussian of variance u has variance u / (1 - eps / (2 u)).
        sampler = ebm.AnnealedLangevin((2.0, 1.0), 200, 0.1, denoise=False)
        draws = gaussian("ve", sampler).sample(jax.random.key(1), (10_000,))
        check_moments(draws.reshape(4, 2500, 3), MEAN, (VARIANCE + 1) / (1 - 0.05 / (VARIANCE + 1)))

    @pytest.mark.slow
    def test_rows_keep_their_covariates_and_the_declared_level_is_not_used(self):
        energy = lambda x, c: 0.5 * (x - c["x"]) ** 2 / (0.25 + c["sigma"] ** 2)  # noqa: E731
        context = {"sigma": jnp.full(2, 77.0), "x": jnp.array([-3.0, 5.0])}
        sampler = ebm.AnnealedLangevin((2.0, 0.5), 100, 0.025, denoise=False)
        d = ebm.EnergyDistribution(energy, context=context, batch_shape=(2,), sampler=sampler)
        draws = d.sample(jax.random.key(2), (4000,))
        assert draws.shape == (4000, 2)
        check_moments(draws.reshape(4, 1000, 2), np.array([-3.0, 5.0]), np.full(2, 0.5 / (1 - 0.025)))

    def test_the_trajectory_ends_where_the_draws_are(self):
        sampler = ebm.AnnealedLangevin(LADDER, 3, denoise=False)
        d = gaussian("ve", sampler)
        path = sampler.trajectory(jax.random.key(3), d, (5,))
        assert path.shape == (len(LADDER), 5, 3)
        np.testing.assert_allclose(path[-1], d.sample(jax.random.key(3), (5,)), rtol=1e-5)

    @pytest.mark.slow
    def test_it_keeps_the_weights_of_far_modes(self):
        # It has a bias of .005 with these levels and steps (by 40,000 draws), below the standard error of .0063 here.
        d = ebm.EnergyDistribution(modes_energy, context=SMALLEST, sampler=FINE)
        weight_below(d.sample(jax.random.key(4), (4000,)))

    def test_a_start(self):
        # One step of no length: the draws are the start.
        start = lambda key, d, shape: jnp.full(d.shape(shape), 7.0)  # noqa: E731
        sampler = ebm.AnnealedLangevin([1.0], 1, 1e-12, denoise=False, start=start)
        np.testing.assert_allclose(gaussian("ve", sampler).sample(jax.random.key(0), (4,)), 7.0, atol=1e-4)

    def test_in_a_model(self):
        sampler = ebm.AnnealedLangevin(LADDER, 2)
        model = lambda: numpyro.sample("x", gaussian("ve", sampler).expand([4]))  # noqa: E731
        assert Predictive(model, num_samples=3)(jax.random.key(0))["x"].shape == (3, 4, 3)

    @pytest.mark.slow
    def test_a_support(self):
        # log x ~ N(.5, .3) with noise: the energy in x has + log x.
        energy = lambda x, sigma: jnp.log(x) + 0.5 * (jnp.log(x) - 0.5) ** 2 / (0.3 + sigma**2)  # noqa: E731
        sampler = ebm.AnnealedLangevin((1.0, 0.5), 150, 0.05, denoise=False)
        d = ebm.EnergyDistribution(energy, context=SMALLEST, support=constraints.positive, sampler=sampler)
        draws = jnp.log(d.sample(jax.random.key(5), (8000,)))
        check_moments(draws.reshape(4, 2000), 0.5, 0.55 / (1 - 0.05 / (2 * 0.55)))

    def test_refusals(self):
        for options, message in (
            ({"sigmas": 1.0}, "list of noise levels"),
            ({"sigmas": [1.0], "step_size": -1.0}, "step_size > 0"),
            ({"sigmas": [1.0], "steps_per_sigma": 0}, "steps_per_sigma >= 1"),
        ):
            with pytest.raises(ValueError, match=message):
                ebm.AnnealedLangevin(**options)
        with pytest.raises(TypeError, match="needs start as a sampler"):
            ebm.AnnealedLangevin([1.0], start=3.0)


class TestInpainting:
    covariance = np.array([[1.0, 0.6, 0.3], [0.6, 1.5, -0.4], [0.3, -0.4, 0.8]])
    known = np.array([True, True, False])

    def energy(self, x, sigma):
        values, vectors = np.linalg.eigh(self.covariance)
        return 0.5 * jnp.sum(((x - MEAN) @ vectors) ** 2 / (values + sigma**2))

    @pytest.mark.slow
    def test_conditional_mean_and_variance_of_a_gaussian(self):
        # With the known part at y + sigma z, the rest is N(m + B (y + sigma z - m), 1 / q); Langevin has its own bias, and
        # the denoising step shrinks what is around the conditional mean by 1 - sigma^2 q.
        sigma, step_size = 0.3, 0.045
        sampler = ebm.AnnealedLangevin((2.0, 0.8, sigma), 150, step_size)
        d = ebm.EnergyDistribution(self.energy, (3,), context=SMALLEST)
        value = np.array([[0.0, 1.0, np.nan], [2.0, -2.0, np.nan]])
        draws = sampler.inpaint(jax.random.key(0), d, value, self.known, (4000,))
        assert draws.shape == (4000, 2, 3)
        np.testing.assert_allclose(draws[..., :2], np.broadcast_to(value[:, :2], (4000, 2, 2)), rtol=1e-6)
        smooth = self.covariance + sigma**2 * np.eye(3)
        b = smooth[2, :2] @ np.linalg.inv(smooth[:2, :2])
        q = np.linalg.inv(smooth)[2, 2]
        variance = (1 - sigma**2 * q) ** 2 / q / (1 - step_size * q / 2) + sigma**2 * np.sum(b**2)
        mean = MEAN[2] + (value[:, :2] - MEAN[:2]) @ b
        check_moments(draws[..., 2].reshape(4, 1000, 2), mean, np.full(2, variance))

    def test_rows_and_masks_of_their_own(self):
        sampler = ebm.AnnealedLangevin((2.0, 0.5), 5)
        d = ebm.EnergyDistribution(self.energy, (3,), context=SMALLEST)
        mask = np.array([[True, False, True], [False, True, False]])
        draws = sampler.inpaint(jax.random.key(0), d, np.ones((2, 3)), mask)
        np.testing.assert_allclose(np.asarray(draws)[mask], 1.0)
        assert np.all(np.asarray(draws)[~mask] != 1.0)

    def test_refusals(self):
        sampler, key = ebm.AnnealedLangevin((1.0,), 2), jax.random.key(0)
        d = ebm.EnergyDistribution(self.energy, (3,), context=SMALLEST)
        for mask in (np.array([1, 0, 1]), np.ones(2, bool)):
            with pytest.raises(ValueError, match=r"boolean mask that broadcasts to \(3,\)"):
                sampler.inpaint(key, d, np.ones(3), mask)
        with pytest.raises(ValueError, match="known element.*not inside the support"):
            sampler.inpaint(key, d, np.array([np.nan, 1, 1]), self.known)
        simplex = ebm.EnergyDistribution(lambda x, s: jnp.sum(x), (3,), support=constraints.simplex, context=SMALLEST)
        with pytest.raises(ValueError, match="ties the elements"):
            sampler.inpaint(key, simplex, np.ones(3) / 3, self.known)
        started = ebm.AnnealedLangevin((1.0,), 2, start=ebm.AnnealedLangevin((2.0,), 2))
        with pytest.raises(ValueError, match=r"there are \(2,\) events to inpaint"):
            started.inpaint(key, d, np.ones((2, 3)), self.known)


class TestReverseSDE:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["ve"], ["vp"]))
    @pytest.mark.parametrize(("corrector_steps", "denoise"), [pytest.param(0, False, marks=pytest.mark.slow), (2, True)])
    def test_the_moments_of_a_gaussian_are_those_of_the_recursion(self, name, corrector_steps, denoise):
        process, num_steps, snr = PROCESSES[name], 50, 0.3
        sampler = ebm.ReverseSDE(process, num_steps, corrector_steps, snr, denoise=denoise)
        draws = gaussian(name, sampler).sample(jax.random.key(0), (20_000,))
        mean, variance = np.zeros(3), np.full(3, 100.0 if name == "ve" else 1.0)
        times = np.linspace(1.0, process.t_min, num_steps + 1)
        for later, t in zip(times[:-1], times[1:], strict=True):
            a, v = (float(part) for part in process.transition(t, later))
            mean, variance = self.affine(process, later, mean, variance, 2 - a, v, v)
            epsilon = 2 * (a * snr * float(process.sigma(t))) ** 2
            for _ in range(corrector_steps):
                mean, variance = self.affine(process, t, mean, variance, 1.0, epsilon, 2 * epsilon)
        if denoise:
            mean, variance = self.affine(process, t, mean, variance, 1.0, float(process.sigma(t)) ** 2, 0.0)
        alpha = float(process.alpha(t))
        check_moments(draws.reshape(4, 5000, 3), mean / alpha, variance / alpha**2)

    @staticmethod
    def affine(process, t, mean, variance, scale, gain, noise):
        """Moments after ``scale x + gain s(x) + sqrt(noise) z``."""
        centre, u = law_at(process, t)
        return scale * mean - gain * (mean - centre) / u, variance * (scale - gain / u) ** 2 + noise

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PROCESSES)
    def test_a_fine_grid_has_the_law_of_the_data(self, name):
        # Without a corrector; the discretisation is below the standard errors.
        process = ebm.VE(0.01, 50.0) if name == "ve" else ebm.VP()
        draws = gaussian(name, ebm.ReverseSDE(process, 2000, 0)).sample(jax.random.key(1), (2000,))
        check_moments(draws.reshape(4, 500, 3), MEAN, VARIANCE)

    def test_it_keeps_the_weights_of_far_modes(self):
        d = ebm.EnergyDistribution(modes_energy, context=SMALLEST, sampler=ebm.ReverseSDE(ebm.VE(0.1, 50.0), 300))
        weight_below(d.sample(jax.random.key(4), (4000,)))

    def test_refusals(self):
        for options in ({"num_steps": 0}, {"corrector_steps": -1}, {"snr": 0.0}):
            with pytest.raises(ValueError, match=f"ReverseSDE needs .*{next(iter(options))}"):
                ebm.ReverseSDE(ebm.VP(), **options)


def exact_flow(name, **options):
    """With the exact law at t = 1 for a prior."""
    mean, variance = law_at(PROCESSES[name], 1.0)
    return ebm.ProbabilityFlow(PROCESSES[name], prior=dist.Normal(mean, np.sqrt(variance)).to_event(1), **options)


def smoothed(name):
    """What the flow is the law of."""
    process = PROCESSES[name]
    noise = float(process.sigma(process.t_min) / process.alpha(process.t_min))
    return dist.Normal(MEAN, np.sqrt(VARIANCE + noise**2)).to_event(1)


class TestProbabilityFlow:
    @pytest.mark.parametrize("name", some_slow(["ve"], ["vp"]))
    def test_the_density_of_a_gaussian(self, name):
        x = MEAN + np.sqrt(VARIANCE) * np.random.default_rng(0).normal(size=(20, 3))
        values = exact_flow(name).log_prob(gaussian(name), x)
        np.testing.assert_allclose(values, smoothed(name).log_prob(x), atol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", PROCESSES)
    def test_draws_of_a_gaussian(self, name):
        draws = gaussian(name, exact_flow(name)).sample(jax.random.key(0), (4000,))
        check_moments(draws.reshape(4, 1000, 3), MEAN, smoothed(name).variance)

    @pytest.mark.slow
    def test_rows_a_support_and_an_outer_jit(self):
        # log x ~ N(row's loc, .3), which the process shrinks to N(0, 1).
        def energy(x, c):
            kept = 1 - c["sigma"] ** 2
            return jnp.log(x) + 0.5 * (jnp.log(x) - jnp.sqrt(kept) * c["x"]) ** 2 / (0.3 * kept + c["sigma"] ** 2)

        context = {"sigma": jnp.full(2, 0.1), "x": jnp.array([-0.5, 0.5])}
        d = ebm.EnergyDistribution(energy, context=context, batch_shape=(2,), support=constraints.positive)
        flow = ebm.ProbabilityFlow(ebm.VP(beta_max=40.0))
        x = np.array([[0.5, 2.0], [3.0, 1.0], [-1.0, 1.5]])
        values = flow.log_prob(d, x)
        assert values.shape == (3, 2)
        assert values[2, 0] == -np.inf
        truth = dist.LogNormal(context["x"], np.sqrt(0.3 + float(flow.process.sigma(1e-3)) ** 2)).log_prob(np.abs(x))
        np.testing.assert_allclose(values.at[2, 0].set(truth[2, 0]), truth, atol=1e-3)
        jitted = jax.jit(lambda x: flow.log_prob(d, x))(x)
        np.testing.assert_allclose(jitted.at[2, 0].set(truth[2, 0]), truth, atol=1e-3)

    @pytest.mark.slow
    def test_random_directions_have_the_trace_in_the_mean(self):
        # A linear score: the trace of A(t) = (S + sigma^2)^-1, from directions that do not know its axes.
        covariance = np.array([[1.0, 0.8], [0.8, 1.0]])

        def score(x, sigma):
            return -jnp.linalg.solve(covariance + sigma**2 * jnp.eye(2), x)

        d = ebm.ScoreDistribution(score, (2,), context=SMALLEST)
        process = ebm.VE(0.1, 10.0)
        prior = dist.MultivariateNormal(jnp.zeros(2), covariance + 100 * np.eye(2))
        x = np.broadcast_to(np.array([0.5, -1.0]), (2000, 2))
        probed = ebm.ProbabilityFlow(process, prior=prior, num_probes=2, rtol=1e-4, atol=1e-4)
        values = np.asarray(probed.log_prob(d, x, jax.random.key(0)))
        truth = dist.MultivariateNormal(jnp.zeros(2), covariance + 0.01 * np.eye(2)).log_prob(x[0])
        error = values.std() / np.sqrt(2000)
        assert 1e-3 < error < 0.05
        assert abs(values.mean() - truth) < 5 * error

    @pytest.mark.slow
    def test_it_keeps_the_weights_of_far_modes(self):
        # The process's own prior N(0, 50^2) forgets the mean of 2.4, which would make .211 of the weight.
        prior = dist.Normal(2.4, np.sqrt(16 - 2.4**2 + TINY**2 + 50**2))
        flow = ebm.ProbabilityFlow(ebm.VE(0.1, 50.0), rtol=1e-4, atol=1e-4, prior=prior)
        d = ebm.EnergyDistribution(modes_energy, context=SMALLEST, sampler=flow)
        weight_below(d.sample(jax.random.key(4), (4000,)))

    @pytest.mark.slow
    def test_a_solver_that_does_not_arrive(self):
        flow = ebm.ProbabilityFlow(PROCESSES["ve"], max_steps=2)
        with pytest.raises(ValueError, match=r"Row 0 \(3 of 3\).*did not reach the end.*max_steps=2"):
            flow.log_prob(gaussian("ve"), np.ones((3, 3)))
        with pytest.raises(ValueError, match="did not reach the end"):
            gaussian("ve", flow).sample(jax.random.key(0))
        with pytest.raises(RuntimeError, match="did not reach the end"):
            jax.block_until_ready(jax.jit(lambda x: flow.log_prob(gaussian("ve"), x))(jnp.ones(3)))

    def test_refusals(self, monkeypatch):
        d, key = gaussian("ve"), jax.random.key(0)
        with pytest.raises(ValueError, match="random key where num_probes is a number"):
            ebm.ProbabilityFlow(ebm.VP()).log_prob(d, np.ones(3), key)
        with pytest.raises(ValueError, match="random key where num_probes is a number"):
            ebm.ProbabilityFlow(ebm.VP(), num_probes=2).log_prob(d, np.ones(3))
        with pytest.raises(ValueError, match=r"prior has batch shape \(\) and event shape \(\)"):
            ebm.ProbabilityFlow(ebm.VP(), prior=dist.Normal(0, 1)).log_prob(d, np.ones(3))
        with pytest.raises(TypeError, match="prior as a numpyro distribution"):
            ebm.ProbabilityFlow(ebm.VP(), prior=1.0)
        with pytest.raises(ValueError, match="rtol > 0"):
            ebm.ProbabilityFlow(ebm.VP(), rtol=0.0)
        monkeypatch.setitem(sys.modules, "diffrax", None)
        with pytest.raises(ImportError, match=r"pip install 'numpyro-ebm\[ode\]'"):
            ebm.ProbabilityFlow(ebm.VP()).log_prob(d, np.ones(3))


class TestChainsStartedByASampler:
    @pytest.mark.slow
    def test_sample_keeps_the_weights(self):
        d = ebm.EnergyDistribution(modes_energy, context=jnp.asarray(0.1))
        options = {"kernel": ebm.MALA(0.1), "num_warmup": 0, "num_samples": 20}
        draws = ebm.sample(jax.random.key(0), d, **options, num_chains=3000, start=FINE).samples["x"]
        weight_below(draws[:, -1])
        stuck = ebm.sample(jax.random.key(0), d, **options, num_chains=3000).samples["x"]
        assert abs(np.mean(np.asarray(stuck[:, -1]) < 0) - 0.5) < 0.05

    @pytest.mark.slow
    def test_chain_sampler_keeps_them(self):
        sampler = ebm.ChainSampler(ebm.MALA(0.1), num_warmup=0, num_steps=10, start=FINE)
        d = ebm.EnergyDistribution(modes_energy, context=jnp.asarray(0.1), sampler=sampler)
        weight_below(d.sample(jax.random.key(1), (3000,)))

    def test_any_sampler_starts_them_where_it_says(self):
        start = lambda key, d, shape: jnp.full(d.shape(shape), 5.0)  # noqa: E731
        d = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
        draws = ebm.sample(jax.random.key(0), d, ebm.Langevin(1e-9), num_warmup=0, num_samples=1, num_chains=3, start=start)
        np.testing.assert_allclose(draws.samples["x"], 5.0, atol=1e-3)

    def test_refusals(self):
        d, key = ebm.EnergyDistribution(lambda x: 0.5 * x**2), jax.random.key(0)
        with pytest.raises(TypeError, match="needs start as a sampler"):
            ebm.sample(key, d, start=1.0)
        with pytest.raises(TypeError, match="needs start as a sampler"):
            ebm.ChainSampler(start=1.0)
        with pytest.raises(TypeError, match="start belongs to a distribution"):
            ebm.sample(key, lambda: numpyro.sample("x", dist.Normal()), start=FINE)
        with pytest.raises(ValueError, match=r"returned draws of shape \(2,\); the chains need \(4,\)"):
            ebm.sample(key, d, start=lambda key, d, shape: jnp.zeros(2))
