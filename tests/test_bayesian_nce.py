"""Posteriors under the contrastive estimators: a fixed noise set, and log Z as a latent with a prior."""

import functools
import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import check_moments, some_slow
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal
from numpyro.infer.util import initialize_model, log_density
from scipy import stats

import numpyro_ebm as ebm
from numpyro_ebm.bayes._loss import make_loss
from numpyro_ebm.handlers import estimated_in

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 0.5, 200)
LOG_Z = "x$log_normalizer"
PRIOR = dist.Normal(0, 10)


class Recorded(dist.Normal):
    """A normal distribution that keeps its last draws."""

    def sample(self, key, sample_shape=()):
        self.draws = super().sample(key, sample_shape)
        return self.draws


def precision(x, prior=None):
    """Gaussian of unknown precision t, log Z unknown."""
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0) if prior is None else prior)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


def bayesian(model=precision, name="nce", **options):
    chosen = {"nu": 5, "noise": dist.Normal(0, 0.7), "noise_seed": 0}
    chosen |= {} if name == "ranking_nce" else {"log_normalizer": PRIOR}
    return ebm.estimate(model, name, **chosen | options)


def value(model, latents, *args):
    return log_density(model, args or (X,), {}, latents)[0]


def log_density_of(t, c, x):
    return -0.5 * t * x**2 - c


def label_log_likelihood(t, c, x, y, sd, nu):
    """Log probability that x are data and y are noise, given that they are x and y."""
    odds = [np.exp(log_density_of(t, c, each) - stats.norm.logpdf(each, 0, sd)) / nu for each in (x, y)]
    return np.sum(np.log(odds[0] / (1 + odds[0]))) - np.sum(np.log(1 + odds[1]))


class TestFixedNoise:
    at = {"t": 3.0, LOG_Z: 0.4}

    def test_value_is_the_log_likelihood_of_the_labels(self):
        noise = Recorded(0.0, 0.7)
        found = value(bayesian(noise=noise), self.at)
        expected = label_log_likelihood(3.0, 0.4, X, np.asarray(noise.draws), 0.7, 5)
        prior = stats.gamma.logpdf(3.0, 2.0) + stats.norm.logpdf(0.4, 0, 10)
        np.testing.assert_allclose(found, expected + prior, rtol=1e-5)

    def test_ranking_picks_the_row_among_its_own_set(self):
        noise = Recorded(0.0, 0.7)
        found = value(bayesian(name="ranking_nce", noise=noise), {"t": 3.0})
        events = np.concatenate([X[None], np.asarray(noise.draws)])
        weights = np.exp(log_density_of(3.0, 0.0, events) - stats.norm.logpdf(events, 0, 0.7))
        expected = np.sum(np.log(weights[0] / weights.sum(0)))
        np.testing.assert_allclose(found, expected + stats.gamma.logpdf(3.0, 2.0), rtol=1e-5)

    @pytest.mark.parametrize("noise", ["gaussian", "mixture", dist.Normal(0, 0.7), None])
    def test_is_the_same_for_all_keys_and_under_jit(self, noise):
        model = bayesian(noise=noise)
        first = value(model, self.at)
        for key in (0, 1):
            assert value(handlers.seed(model, key), self.at) == first
        under_jit = jax.jit(lambda latents, x: value(model, latents, x))
        for x in (X, X.astype(np.float32)):  # as an argument the rows are no constants
            np.testing.assert_allclose(under_jit(self.at, x), first, rtol=1e-5)
        assert abs(value(bayesian(noise=noise, noise_seed=1), self.at) - first) > 0.1

    def test_sites_have_noise_sets_of_their_own(self):
        def two(x):
            for name in "xy":
                numpyro.sample(name, ebm.EnergyDistribution(lambda x: x**2, batch_shape=x.shape), obs=x)

        trace = handlers.trace(handlers.substitute(bayesian(two), {LOG_Z: 0.0, "y$log_normalizer": 0.0})).get_trace(X)
        first, second = (trace[name]["fn"].log_prob(X) for name in "xy")
        assert np.all(first != second)

    @pytest.mark.parametrize("name", ["nce", "ranking_nce"])
    def test_a_base_of_constants_is_noise_that_stays(self, name):
        def model(x):
            base = dist.Normal(jnp.zeros(()), jnp.sqrt(2.0))  # traced under jit
            t = numpyro.sample("t", dist.Normal(0, 1))
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x, c: t * x**2 + c, base=base, context=jnp.abs(x))
                numpyro.sample("x", d, obs=x)

        options = {"log_normalizer": PRIOR} if name == "nce" else {}
        wrapped = bayesian(model, name, noise=None, **options)
        first = value(wrapped, self.at)
        np.testing.assert_allclose(jax.jit(lambda at, x: value(wrapped, at, x))(self.at, X), first, rtol=1e-5)

    def test_options_compare_and_pickle(self):
        option = functools.partial(ebm.NoiseContrastiveEstimation, noise="gaussian")
        assert option(noise_seed=3) == option(noise_seed=3) != option(noise_seed=4)
        again = pickle.loads(pickle.dumps(bayesian()))
        assert value(again, self.at) == value(bayesian(), self.at)


class TestPriorOfLogZ:
    @pytest.mark.parametrize("outer", [False, True])
    def test_is_one_number_that_counts_once(self, outer):
        """Whatever plates, masks and scales are around the rows; scales around the whole model hold for all priors."""
        keep = np.arange(200) % 2 == 0

        def model(x):
            t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
            with numpyro.plate("rows", len(x)), handlers.mask(mask=keep), handlers.scale(scale=0.5):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

        noise = Recorded(0.0, 0.7)
        wrapped = bayesian(model, noise=noise)
        site = handlers.trace(handlers.seed(wrapped, 0)).get_trace(X)[LOG_Z]
        assert (site["fn"], site["cond_indep_stack"], np.shape(site["value"])) == (PRIOR, [], ())
        found = value(handlers.scale(wrapped, 2.0) if outer else wrapped, {"t": 3.0, LOG_Z: 0.4})
        likelihood = label_log_likelihood(3.0, 0.4, X[keep], np.asarray(noise.draws)[:, keep], 0.7, 5)
        expected = stats.gamma.logpdf(3.0, 2.0) + stats.norm.logpdf(0.4, 0, 10) + 0.5 * likelihood
        np.testing.assert_allclose(found, (2 if outer else 1) * expected, rtol=1e-5)

    def test_names_follow_scopes(self):
        inner = handlers.scope(precision, prefix="a")
        trace = handlers.trace(handlers.seed(handlers.scope(bayesian(inner), prefix="b"), 0)).get_trace(X)
        assert {name for name, site in trace.items() if not site.get("is_observed")} >= {"b/a/t", "b/a/x$log_normalizer"}

    @pytest.mark.slow
    def test_calibrate_takes_the_same_loss_under_scopes(self):
        scoped = handlers.scope(bayesian(handlers.scope(precision, prefix="a")), prefix="b")
        loss = make_loss("calibrate", KEY, estimated_in(scoped), None, (X[:20],), {})
        latents = {"b/a/t": 3.0, "b/a/x$log_normalizer": 0.4}
        z = loss.unconstrain({name: jnp.array([each]) for name, each in latents.items()})[0]
        prior = stats.gamma.logpdf(3.0, 2.0) + stats.norm.logpdf(0.4, 0, 10)
        np.testing.assert_allclose(prior - loss.total(z), value(scoped, latents, X[:20]), rtol=1e-5)

    def test_a_fixed_normaliser_that_is_a_latent_of_the_model_is_the_same(self):
        def model(x):
            c = numpyro.sample("c", PRIOR)
            t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2 + c), obs=x)

        found = value(bayesian(model, log_normalizer="fixed"), {"t": 3.0, "c": 0.4})
        np.testing.assert_allclose(found, value(bayesian(), {"t": 3.0, LOG_Z: 0.4}), rtol=1e-6)


class TestTheory:
    """With noise like the data: information nu / (1 + nu) of the likelihood's; for any noise, parameters are calibrated."""

    n, nu, t = 5000, 4, 4.0
    x = np.random.default_rng(1).normal(0, 0.5, 5000)
    c = 0.5 * np.log(2 * np.pi / 4.0)

    def hessian(self, noise):
        model = bayesian(functools.partial(precision, prior=dist.Uniform(0, 100)), nu=self.nu, noise=noise)

        def loss(z):
            latents = {"t": z[0], LOG_Z: z[1]}
            return PRIOR.log_prob(z[1]) - value(model, latents, self.x)

        return jax.hessian(loss)(jnp.array([self.t, self.c]))

    def test_hessian_at_the_truth(self):
        noise = Recorded(0.0, 0.5)
        hessian = np.asarray(self.hessian(noise))
        events = np.concatenate([self.x, np.asarray(noise.draws).ravel()])
        slopes = np.stack([-0.5 * events**2, -np.ones_like(events)])
        # p / (p + nu q) is 1 / (1 + nu) at all events.
        np.testing.assert_allclose(hessian, self.nu / (1 + self.nu) ** 2 * slopes @ slopes.T, rtol=1e-4)
        ratio = np.linalg.inv(hessian)[0, 0] / (2 * self.t**2 / self.n)
        error = np.sqrt(14 / len(events))  # of 1 / (variance of x^2), relative
        assert abs(ratio - (1 + 1 / self.nu)) < 5 * error * (1 + 1 / self.nu)

    @pytest.mark.slow
    def test_hessian_of_ranking_at_the_truth(self):
        noise = Recorded(0.0, 0.5)
        model = bayesian(functools.partial(precision, prior=dist.Uniform(0, 100)), "ranking_nce", nu=self.nu, noise=noise)
        hessian = -jax.hessian(lambda t: value(model, {"t": t}, self.x))(self.t)
        squares = np.concatenate([self.x[None], np.asarray(noise.draws)]) ** 2
        np.testing.assert_allclose(hessian, np.var(0.5 * squares, axis=0).sum(), rtol=1e-4)  # all weights are equal
        ratio = 1 / hessian / (2 * self.t**2 / self.n)
        assert abs(ratio * self.nu / (1 + self.nu) - 1) < 5 * np.sqrt(14 / squares.size)

    @pytest.mark.slow
    def test_parameters_need_no_calibration_and_log_z_is_wider(self):
        """The sandwich is the inverse Hessian less (1 + 1 / nu) / n for log Z (Prentice and Pyke)."""
        problems, n = [], 20000
        x = np.random.default_rng(1).normal(0, 0.5, n)
        model = bayesian(nu=self.nu, noise=dist.Normal(0, 0.9))
        ebm.calibrate(KEY, model, x, method=lambda _, problem: problems.append(problem) or 1.0)
        problem = problems[0]
        spread = np.linalg.inv(problem.hessian)  # of t and log Z
        sandwich = spread @ np.asarray(problem.score_covariance(KEY)) @ spread
        influence = n * np.asarray(jax.jacfwd(problem.loss.of_rows)(problem.mode)[0]) @ spread
        errors = np.sqrt(2 * np.var(influence[:, :, None] * influence[:, None], axis=0) / n)  # the Hessian's are no larger
        assert np.all(np.abs(n * (spread - sandwich) - np.diag([0, 1 + 1 / self.nu])) < 5 * errors)
        assert np.all(5 * errors < 0.8)


def grid_posterior(log_p, *axes):
    """Means and standard deviations of a density on a grid."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    values = np.stack(np.meshgrid(*axes, indexing="ij")).reshape(len(axes), -1)
    means = values @ p.ravel()
    return means, np.sqrt((values - means[:, None]) ** 2 @ p.ravel())


def nuts(model, *args, num_samples=1500):
    mcmc = MCMC(NUTS(model), num_warmup=500, num_samples=num_samples, progress_bar=False)
    mcmc.run(KEY, *args)
    return mcmc.get_samples(group_by_chain=True)


@pytest.mark.slow
class TestPosteriors:
    def test_precision(self):
        """NUTS draws from the posterior of the labels, which is that of the likelihood up to the noise set."""
        sd = float(np.sqrt(2) * X.std())
        noise = Recorded(0.0, sd)
        draws = nuts(bayesian(nu=20, noise=noise), X)
        value(bayesian(nu=20, noise=noise), {"t": 4.0, LOG_Z: 0.2})  # outside of a program the draws are numbers
        y, (ts, cs) = np.asarray(noise.draws), (np.linspace(2.2, 6.8, 50), np.linspace(-0.35, 0.75, 50))
        log_p = np.array([[label_log_likelihood(t, c, X, y, sd, 20) for c in cs] for t in ts])
        log_p += stats.gamma.logpdf(ts, 2.0)[:, None] + stats.norm.logpdf(cs, 0, 10)
        means, sds = grid_posterior(log_p, ts, cs)
        for mean, deviation, name in zip(means, sds, ("t", LOG_Z), strict=True):
            check_moments(draws[name], mean, deviation**2)
        # With this noise the efficiency is 0.972: so much wider is the posterior, and the rest is how far it is off.
        np.testing.assert_allclose(sds[0] / 0.4190, 1 / np.sqrt(0.972), rtol=0.1)
        off = 5 * np.sqrt(1 / 0.972 - 1) * 0.4190
        assert abs(means[0] - 4.2319) < off
        assert abs(means[1] - 0.5 * np.log(2 * np.pi / 4.2319)) < off / (2 * 4.2319)

    def test_spins_against_the_likelihood(self):
        """A chain of six spins with field and coupling: exact posterior and information by enumeration."""
        states = np.array(list(itertools.product((-1, 1), repeat=6)))
        statistics = np.stack([np.sum(states[:, 1:] * states[:, :-1], axis=1), states.sum(1)], axis=1)
        weights = np.exp(statistics @ [0.4, 0.2])
        p = weights / weights.sum()
        rows = np.random.default_rng(2).choice(64, 400, p=p)

        def model(s):
            j, h = numpyro.sample("j", dist.Normal(0, 1)), numpyro.sample("h", dist.Normal(0, 1))
            energy = lambda s: -j * jnp.sum(s[1:] * s[:-1]) - h * jnp.sum(s)  # noqa: E731
            with numpyro.plate("rows", len(s)):
                numpyro.sample("s", ebm.EnergyDistribution(energy, (6,), support=ebm.spins), obs=s)

        nu = 20
        draws = nuts(bayesian(model, nu=nu, noise="marginals"), states[rows])
        js, hs = np.linspace(0.1, 0.7, 80), np.linspace(0.0, 0.4, 80)
        theta = np.stack(np.meshgrid(js, hs, indexing="ij"), axis=-1)
        log_z = np.log(np.exp(theta @ statistics.T).sum(-1))
        log_p = theta @ statistics[rows].sum(0) - 400 * log_z + stats.norm.logpdf(theta).sum(-1)
        means, sds = grid_posterior(log_p, js, hs)

        share = ((states[:, None] == 1) * p[:, None, None]).sum(0)[0]
        q = np.prod(np.where(states == 1, share, 1 - share), axis=1)
        slopes = np.column_stack([statistics, -np.ones(64)])
        covariance = np.linalg.inv((slopes.T * (p * nu * q / (p + nu * q))) @ slopes)
        exact = np.linalg.inv(np.cov(statistics.T, aweights=p, ddof=0))
        for i, name in enumerate(("j", "h")):
            ratio = covariance[i, i] / exact[i, i]
            found = np.asarray(draws[name]).ravel()
            assert 1.02 < ratio < 1.3
            np.testing.assert_allclose(found.std() / sds[i], np.sqrt(ratio), rtol=0.1)
            error = np.sqrt(ratio - 1 + 1 / numpyro.diagnostics.effective_sample_size(found[None])) * sds[i]
            assert abs(found.mean() - means[i]) < 5 * error
        log_z = np.log(weights.sum())
        found = np.asarray(draws["s$log_normalizer"])
        np.testing.assert_allclose(found.std(), np.sqrt(covariance[2, 2] / 400), rtol=0.1)
        assert abs(found.mean() - log_z) < 5 * found.std()


def two_sites(x, y):
    """Two energies that share a location, with an ordinary likelihood between."""
    m = numpyro.sample("m", dist.Normal(0, 2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * (x - m) ** 2), obs=x)
        numpyro.sample("w", dist.Normal(m, 1), obs=x + 0.1)
    with numpyro.plate("others", len(y)):
        numpyro.sample("y", ebm.EnergyDistribution(lambda y: 2.0 * (y - m) ** 2), obs=y)


TWO = np.random.default_rng(3).normal(0.3, 1.0, 80), np.random.default_rng(4).normal(0.3, 0.5, 60)


def run_svi(model, guide, *args, rate=0.02, steps=1500):
    svi = SVI(model, guide, optax.adam(rate), Trace_ELBO())

    @jax.jit
    def run(key):
        update = lambda state, _: svi.update(state, *args)  # noqa: E731
        return svi.get_params(jax.lax.scan(update, svi.init(key, *args), None, length=steps)[0])

    return run(KEY)


def update_once(model):
    svi = SVI(model, AutoNormal(model), optax.adam(0.1), Trace_ELBO())
    svi.update(svi.init(KEY, X[:20]), X[:20])


class TestOtherInference:
    @pytest.mark.slow
    def test_two_sites_and_other_latents_under_nuts(self):
        draws = nuts(bayesian(two_sites, nu=10, noise=dist.Normal(0.2, 1.2)), *TWO, num_samples=500)
        # 80 + 80 rows of precision 1 and 60 of precision 4.
        mean = (80 * (2 * TWO[0].mean() + 0.1) + 240 * TWO[1].mean()) / 400
        assert abs(draws["m"].mean() - mean) < 5 * np.sqrt(1 / 400 * (1 / 5 + 1 / 100))
        for name, log_z in ((LOG_Z, 0.5 * np.log(2 * np.pi)), ("y$log_normalizer", 0.5 * np.log(np.pi / 2))):
            assert abs(draws[name].mean() - log_z) < 4 * draws[name].std()
            assert draws[name].std() < 0.3

    @pytest.mark.slow
    def test_guides_find_the_same_posterior(self):
        """Mean and spread by AutoNormal and by Laplace: the posterior is near a Gaussian, with a correlation."""
        model = bayesian(two_sites, nu=10, noise=dist.Normal(0.2, 1.2))
        laplace = AutoLaplaceApproximation(model)
        exact = laplace.get_posterior(run_svi(model, laplace, *TWO))
        assert exact.mean.shape == (3,)
        normal = AutoNormal(model)
        found = run_svi(model, normal, *TWO, rate=optax.exponential_decay(0.05, 1000, 0.1), steps=3000)
        order = ("m", LOG_Z, "y$log_normalizer")
        sds = np.sqrt(1 / np.diag(exact.precision_matrix))  # of a factorised Gaussian nearest to it
        for i, name in enumerate(order):
            assert abs(found[f"{name}_auto_loc"] - exact.mean[i]) < 0.3 * sds[i]
            np.testing.assert_allclose(found[f"{name}_auto_scale"], sds[i], rtol=0.15)

    @pytest.mark.parametrize(("name", "options"), [("nce", {"log_normalizer": "fixed"}), ("ranking_nce", {})])
    def test_width_is_that_of_a_likelihood(self, name, options):
        """No warning (an error here), where the value is a log likelihood; another divergence has an arbitrary scale."""
        model = bayesian(name=name, **options)
        start_nuts(model, X[:20])
        update_once(model)

    @pytest.mark.slow
    def test_width_under_exact_is_that_of_the_likelihood(self):
        def model(x):
            t = numpyro.sample("t", dist.Normal(0, 1))
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x: -t * jnp.sum(x), (2,), support=dist.constraints.boolean)
                numpyro.sample("x", d, obs=x > 0)

        wrapped = ebm.estimate(model, "exact")
        svi = SVI(wrapped, AutoNormal(wrapped), optax.adam(0.1), Trace_ELBO())
        svi.update(svi.init(KEY, X.reshape(100, 2)), X.reshape(100, 2))

    def test_width_of_another_divergence_is_arbitrary(self):
        for options in ({"name": "bregman_nce", "divergence": "exponential"}, {"noise_seed": None}):
            model = bayesian(**options)
            with pytest.warns(ebm.UncalibratedPosteriorWarning):
                update_once(model)


def with_base(x):
    scale = numpyro.sample("scale", dist.LogNormal(0, 1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2, base=dist.Normal(0, scale)), obs=x)


def subsampled(x):
    with numpyro.plate("rows", len(x), subsample_size=10):
        batch = numpyro.subsample(x, event_dim=0)
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2), obs=batch)


def own_noise():
    numpyro.sample("x", dist.Normal(0, numpyro.param("scale", 1.0)))


def start_nuts(model, x=X):
    """What MCMC does before its first step."""
    initialize_model(KEY, model, model_args=(x,))


def start_laplace(model):
    guide = AutoLaplaceApproximation(model)
    SVI(model, guide, optax.adam(0.1), Trace_ELBO()).init(KEY, X)


REFUSED = {
    "new noise under NUTS": (lambda: start_nuts(bayesian(noise_seed=None)), "'x'.*'nce' is one of them with noise_seed=0"),
    "a parameter under NUTS": (
        lambda: start_nuts(bayesian(log_normalizer=None, weight=1.0)),
        "'x'.*NUTS or HMC takes as known.*Normal",
    ),
    "a parameter under Laplace": (
        lambda: start_laplace(bayesian(log_normalizer="learned", weight=1.0)),
        "Laplace.* takes as known",
    ),
    "a seed that is no number": (lambda: bayesian(noise_seed=KEY), "whole number noise_seed >= 0"),
    "noise that is trained": (lambda: bayesian(noise=own_noise), "NoiseContrastiveEstimation.*noise_seed.*trained"),
    "a base of latents": (lambda: start_nuts(bayesian(with_base, noise=None)), "'x'.*base is computed from latents"),
    "a subsample": (
        lambda: handlers.trace(handlers.seed(bayesian(subsampled), 0)).get_trace(X),
        "'x'.*10 of 200 rows.*subsample_size",
    ),
    "a prior of a vector": (
        lambda: bayesian(log_normalizer=dist.Normal(jnp.zeros(3), 1)),
        r"one number.*batch shape \(3,\)",
    ),
    "a prior of counts": (lambda: bayesian(log_normalizer=dist.Poisson(3.0)), "real number.*Poisson.*Normal"),
    "an energy as prior": (lambda: bayesian(log_normalizer=ebm.EnergyDistribution(jnp.square)), "no normalised density"),
    "a number": (lambda: bayesian(log_normalizer=1.0), "no log_normalizer 1.0.*fixed, learned.*prior"),
    "a prior of tre": (
        lambda: ebm.estimate(precision, "tre", sigmas=(1.0, 2.0), log_normalizer=PRIOR),
        "TelescopingRatioEstimation has no log_normalizer",
    ),
    "calibrating a parameter": (
        lambda: ebm.calibrate(KEY, bayesian(log_normalizer=None), X),
        "trains.*Normal.0, 10., a prior",
    ),
    "calibrating new noise": (lambda: ebm.calibrate(KEY, bayesian(noise_seed=None), X), "'nce' with noise_seed=0"),
    "the bootstrap": (lambda: ebm.calibrate(KEY, bayesian(), X, method="bootstrap"), "bootstrap.*noise set.*would stay"),
    "simulated data": (
        lambda: ebm.calibrate(KEY, bayesian(), X, method=ebm.bayes.OpenFaced(ebm.bayes.Simulated("hmc"))),
        "noise set.*would stay.*rows, each with its own noise",
    ),
    "curvature": (lambda: ebm.calibrate(KEY, bayesian(), X, method="curvature"), "log_normalizer.*belong to the estimator"),
    "a quadratic": (
        lambda: ebm.gaussian_posterior(bayesian(lambda x: precision(x, PRIOR), nu=1), X[:9]),
        "is not quadratic",
    ),
}
SLOW = ("a quadratic", "the bootstrap", "simulated data")


@pytest.mark.parametrize("case", some_slow([c for c in REFUSED if c not in SLOW], SLOW))
def test_refuses(case):
    run, message = REFUSED[case]
    with pytest.raises(ebm.EnergyError, match=f"(?s){message}"):
        run()


def test_the_class_of_a_prior_and_trained_noise_are_refused():
    with pytest.raises(TypeError, match="noise_seed"):
        bayesian(name="flow_nce", noise=own_noise)
    with pytest.raises(TypeError, match="class Normal as log_normalizer.*Normal"):
        bayesian(log_normalizer=dist.Normal)


@pytest.mark.slow
def test_calibration_maps_draws_of_log_z_too():
    found = ebm.calibrate(KEY, bayesian(), X, method="open_faced")
    assert set(found.mode) == {"t", LOG_Z}
    assert found.hessian.shape == (2, 2)
    draws = {"t": np.full((2, 3), 4.0), LOG_Z: np.zeros((2, 3))}
    assert {name: each.shape for name, each in found.adjust(draws).items()} == {"t": (2, 3), LOG_Z: (2, 3)}


def test_report_needs_the_latent_and_shows_the_classifier():
    report = ebm.training_report(bayesian(), {"t": 4.2319, LOG_Z: 0.1976}, X)
    assert 0 < report.sites[0].figures["overlap"] < 1
    with pytest.raises(ebm.EnergyError, match=r"\['x\$log_normalizer'\] are latent"):
        ebm.training_report(bayesian(), {"t": 4.2319}, X)
