"""Coupled chains: their marginal laws, their meetings, and the unbiased gradient they give."""

from functools import partial

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import fit, precision_model, some_slow
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import kstest, norm

import numpyro_ebm as ebm
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.kernels import coupling as coupling_module
from numpyro_ebm.kernels.coupling import COUPLINGS, couple_noise, coupled_step, unbiased_sum

KERNELS = {"mala": ebm.MALA(step_size=0.3), "hmc": ebm.HMC(step_size=0.4, num_integration_steps=3)}
SETTINGS = {"coupling": "reflection", "burn_in": 0, "num_steps": 0, "max_num_steps": 2000}


def double_well(x, _=None):
    """Log density of two wells of different depth, positions of shape ()."""
    return -(x**4) / 4 + x**2 / 2 + 0.3 * x


def banana(x, _=None):
    """Log density in two dimensions: x_0 ~ N(0, 1), x_1 ~ N(x_0^2 / 2, 1)."""
    return -0.5 * x[0] ** 2 - 0.5 * (x[1] - 0.5 * x[0] ** 2) ** 2


def moments_of_double_well():
    grid = np.linspace(-6, 6, 20_001)
    weight = np.exp(double_well(grid))
    return np.array([np.sum(weight * grid**power) / np.sum(weight) for power in (1, 2)])


def start_pair(first, second, log_density):
    return jax.vmap(lambda x: blackjax.mala.init(x, log_density))(jnp.stack([jnp.asarray(first), jnp.asarray(second)]))


def within(values, truth, errors=5.0):
    """Whether the mean of independent values lies within so many standard errors of the truth."""
    values = np.asarray(values, float)
    return np.all(np.abs(values.mean(0) - truth) < errors * values.std(0) / np.sqrt(len(values)))


@partial(jax.jit, static_argnames=("log_density", "settings"))
def unbiased_moments(rng_key, kernel, log_density, starts, settings):
    """Unbiased x and x^2, ``(num_pairs, 2)``, and the meetings."""

    def add(total, pairs, weights):
        # Two sums, not one of a stack: jaxlib 0.10.2 gets that wrong on CPU from 32768 numbers on (jax issue 39103).
        x = pairs.position
        return total + jnp.stack([jnp.sum(weights * x, axis=1), jnp.sum(weights * x**2, axis=1)])

    zeros = jnp.zeros((2, len(starts)))
    total, meeting = unbiased_sum(rng_key, kernel, log_density, starts, None, add, zeros, **dict(settings))
    return total.T, meeting


class TestCoupledNoise:
    @pytest.mark.slow
    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_meets_as_often_as_the_normals_overlap_and_keeps_its_law(self, coupling):
        @jax.jit
        @partial(jax.vmap, in_axes=(0, None))
        def draw(key, difference):
            key_noise, key_couple = jax.random.split(key)
            noise = jax.random.normal(key_noise, (3,))
            return noise, *couple_noise(key_couple, noise, difference, coupling)

        num, direction = 100_000, np.array([0.6, -0.8, 0.0])
        for distance in (0.01, 0.7, 1.9, 2.5, 6.0):
            keys = jax.random.split(jax.random.key(int(100 * distance)), num)
            noise, other, is_met = map(np.asarray, draw(keys, jnp.asarray(distance * direction)))
            overlap = 2 * norm.cdf(-distance / 2)  # 1 - TV
            assert abs(is_met.mean() - overlap) < 5 * np.sqrt(overlap * (1 - overlap) / num)
            np.testing.assert_allclose(other[is_met], (noise + np.float32(distance * direction))[is_met], atol=1e-6)
            # Standard normal along the difference and across it, and uncorrelated.
            along, across = other @ direction, other @ np.array([0.8, 0.6, 0.0])
            for values in (along, across, other[:, 2]):
                assert kstest(values, norm.cdf).pvalue > 1e-6
            assert within(along * across, 0.0)

    def test_couplings_differ_in_what_they_do_apart(self):
        keys = jax.random.split(jax.random.key(0), 10_000)
        noise = jax.random.normal(jax.random.key(1), (10_000, 2))
        difference = jnp.array([3.0, 0.0])
        across = {}
        for coupling in COUPLINGS:
            draw = jax.jit(jax.vmap(partial(couple_noise, difference=difference, coupling=coupling)))
            other, is_met = draw(keys, noise)
            across[coupling] = np.corrcoef(np.asarray(noise[:, 1])[~is_met], np.asarray(other[:, 1])[~is_met])[0, 1]
        np.testing.assert_allclose(across["reflection"], 1.0, atol=1e-6)
        np.testing.assert_allclose(across["maximal"], 0.0, atol=0.06)

    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_ends_where_the_difference_is_not_finite(self, coupling):
        for value in (np.nan, np.inf):
            _, is_met = jax.jit(partial(couple_noise, coupling=coupling))(
                jax.random.key(0), jnp.zeros(2), jnp.array([value, 0.0])
            )
            assert not is_met


@pytest.mark.parametrize("kernel", list(KERNELS))
class TestCoupledStep:
    def test_the_first_chain_is_blackjax_draw_for_draw(self, kernel):
        kernel = KERNELS[kernel]
        pair = start_pair([0.3, -1.0], [1.5, 0.4], banana)

        @jax.jit
        def both(key):
            moved, _, _ = coupled_step(key, kernel, pair, jnp.zeros((), bool), banana, "reflection")
            key_trajectory, key_mala = jax.random.split(key)
            key_chain, _ = jax.random.split(key_mala)
            state, step_size = jax.tree.map(lambda leaf: leaf[0], pair), kernel.step_size
            if isinstance(kernel, ebm.HMC):
                state = blackjax.hmc(banana, step_size, jnp.ones(2), kernel.draw_length(key_trajectory)).step(
                    key_trajectory, blackjax.hmc.init(state.position, banana)
                )[0]
                state, step_size = blackjax.mala.init(state.position, banana), step_size**2 / 2
            return moved.position[0], blackjax.mala(banana, step_size).step(key_chain, state)[0].position

        ours, theirs = jax.lax.map(both, jax.random.split(jax.random.key(0), 200))
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert len(np.unique(np.asarray(ours)[:, 0])) > 100

    @pytest.mark.slow
    @pytest.mark.parametrize("coupling", some_slow(["maximal"], ["reflection"]))
    def test_the_second_chain_has_the_law_of_the_first(self, kernel, coupling):
        # From the same point, whichever place it has in the pair: two samples of one law.
        point, elsewhere = [0.3, -1.0], [1.5, 0.4]

        @jax.jit
        def draws(key, points):
            pair, keys = start_pair(*points, banana), jax.random.split(key, 40_000)
            move = lambda k: coupled_step(k, KERNELS[kernel], pair, jnp.zeros((), bool), banana, coupling)  # noqa: E731
            return jax.vmap(move)(keys)[0].position

        first = np.asarray(draws(jax.random.key(0), jnp.array([point, elsewhere])), float)[:, 0]
        second = np.asarray(draws(jax.random.key(1), jnp.array([elsewhere, point])), float)[:, 1]
        for statistic in (
            lambda x: x,
            lambda x: x**2,
            lambda x: x[:, 0] * x[:, 1],
            lambda x: np.all(np.isclose(x, point), axis=1),
        ):
            values = [np.asarray(statistic(x), float) for x in (first, second)]
            error = np.sqrt(sum(v.var(0) / len(v) for v in values))
            assert np.all(np.abs(values[0].mean(0) - values[1].mean(0)) < 5 * error)

    @pytest.mark.slow
    @pytest.mark.parametrize("coupling", some_slow(["reflection"], ["maximal"]))
    def test_both_stay_stationary_meet_and_stay_together(self, kernel, coupling):
        # Exact starts; E x_0^2 = 1, E x_1 = 1/2, E (x_1 - x_0^2/2)^2 = 1.
        num = 4000
        noise = jax.random.normal(jax.random.key(0), (num, 2, 2))
        starts = jnp.stack([noise[..., 0], noise[..., 1] + 0.5 * noise[..., 0] ** 2], axis=-1)
        pairs = jax.vmap(lambda p: start_pair(*p, banana))(starts)

        @jax.jit
        def run(pairs):
            def step(carry, key):
                move = lambda k, pair, met: coupled_step(k, KERNELS[kernel], pair, met, banana, coupling)  # noqa: E731
                pairs, is_met, _ = jax.vmap(move)(jax.random.split(key, num), *carry)
                return (pairs, is_met), (is_met, jnp.max(jnp.where(is_met[:, None], jnp.ptp(pairs.position, 1), 0.0)))

            carry = (pairs, jnp.zeros(num, bool))
            return jax.lax.scan(step, carry, jax.random.split(jax.random.key(1), 60))

        (pairs, _), (is_met, widest) = run(pairs)
        is_met = np.asarray(is_met)
        assert np.all(is_met[1:] >= is_met[:-1])
        assert is_met[-1].mean() > 0.9
        together = jax.tree.map(lambda leaf: np.asarray(leaf)[is_met[-1]], pairs)
        for leaf in jax.tree.leaves(together):
            np.testing.assert_allclose(leaf[:, 0], leaf[:, 1], rtol=1e-6)
        assert np.max(widest) < 1e-5
        for x in (np.asarray(pairs.position[:, 0]), np.asarray(pairs.position[:, 1])):
            residual = x[:, 1] - 0.5 * x[:, 0] ** 2
            statistics = np.stack([x[:, 0], x[:, 0] ** 2, x[:, 1], residual, residual**2, x[:, 0] * residual], axis=1)
            assert within(statistics, [0, 1, 0.5, 0, 1, 0])


class TestUnbiasedSum:
    @pytest.mark.slow
    @pytest.mark.parametrize(("burn_in", "num_steps"), [(0, 0), (2, 5)])
    def test_is_the_formula(self, burn_in, num_steps):
        # The same chains step by step, and H_{k:m} in NumPy.
        num, key, kernel = 50, jax.random.key(3), ebm.MALA(step_size=0.1)
        starts = 1.5 + jax.random.normal(jax.random.key(4), (num, 2))
        settings = {**SETTINGS, "burn_in": burn_in, "num_steps": num_steps}
        total, meeting = unbiased_moments(key, kernel, double_well, starts, tuple(settings.items()))

        @jax.jit
        def step(key, pairs, is_met):
            move = lambda k, pair, met: coupled_step(k, kernel, pair, met, double_well, "reflection")  # noqa: E731
            return jax.vmap(move)(jax.random.split(key, num), pairs, is_met)[:2]

        pairs = jax.vmap(lambda p: start_pair(*p, double_well))(starts)
        y_start, x = pairs.position[:, 1], [np.asarray(pairs.position[:, 0])]
        y, is_met, tau = [x[0]], jnp.zeros(num, bool), np.zeros(num, int)
        longest = max(int(meeting.meeting_time.max()), num_steps)
        for t in range(longest + 1):
            moved, is_met = step(jax.random.fold_in(key, t), pairs, is_met)
            if t == 0:
                moved = jax.tree.map(lambda new, old: new.at[:, 1].set(old[:, 1]), moved, pairs)
                np.testing.assert_array_equal(moved.position[:, 1], y_start)
                is_met = jnp.zeros(num, bool)
            tau[np.asarray(is_met) & (tau == 0)] = t + 1
            pairs = moved
            x.append(np.asarray(pairs.position[:, 0]))
            y.append(np.asarray(pairs.position[:, 1]))
        np.testing.assert_array_equal(meeting.meeting_time, tau)
        assert tau.max() > num_steps + 1
        length = num_steps - burn_in + 1
        for power in (1, 2):
            value = np.mean([x[t] ** power for t in range(burn_in, num_steps + 1)], axis=0)
            for t in range(burn_in + 1, tau.max()):
                gap = x[t] ** power - y[t] ** power
                value = value + np.where(t < tau, min(1, (t - burn_in) / length) * gap, 0)
            np.testing.assert_allclose(total[:, power - 1], value, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("coupling", some_slow(["reflection"], ["maximal"]))
    @pytest.mark.parametrize("kernel", some_slow(["mala"], ["hmc"]))
    @pytest.mark.parametrize("window", some_slow([(0, 0)], [(2, 5)]))
    def test_has_the_target_expectation_from_a_distant_start(self, kernel, coupling, window):
        starts = jax.random.uniform(jax.random.key(0), (20_000, 2), minval=1.5, maxval=2.0)
        settings = {**SETTINGS, "coupling": coupling, "burn_in": window[0], "num_steps": window[1]}
        kernel = KERNELS[kernel]
        total, meeting = unbiased_moments(jax.random.key(1), kernel, double_well, starts, tuple(settings.items()))
        assert np.all(meeting.is_met)
        assert within(total, moments_of_double_well())
        # Without the correction it would be the start's.
        assert not within(np.stack([starts[:, 0], starts[:, 0] ** 2], axis=1), moments_of_double_well())


def site_of(energy, x, **kwargs):
    x = jnp.asarray(x, float)
    distribution = ebm.EnergyDistribution(energy, x.shape[1:], **kwargs)
    return Site("x", distribution, x.shape[:1], x, distribution.rows(x, x.shape[:1]).local, None)


def row_values(estimator, site, key=0):
    """Surrogate of each row and the state after it."""
    return estimator.surrogate(jax.random.key(key), site, estimator.init(jax.random.key(key), site))


class TestGradient:
    def estimates(self, model, x, replicates):
        """Gradients in t at t = 1, and the mean meeting times where there are any, over replicates."""

        def one(key):
            def value(t):
                run = numpyro.handlers.substitute(numpyro.handlers.seed(model, key), {"t": t})
                trace = numpyro.handlers.trace(run).get_trace(x)
                times = trace["x$unbiased"]["value"]["state"].meeting_time if "x$unbiased" in trace else 0.0
                return jnp.sum(trace["x"]["fn"].log_prob(x)), times

            return jax.grad(value, has_aux=True)(1.0)

        return jax.jit(partial(jax.lax.map, one))(jax.random.split(jax.random.key(0), replicates))

    @pytest.mark.slow
    def test_is_that_of_the_likelihood_where_chains_of_the_same_cost_are_biased(self):
        # d/dt of log N(x; 0, 1/t) is 1/(2t) - x^2/2 a row. Over 4000 replicates, in standard errors of each:
        # exact 25.31; unbiased 25.36 +- 0.50; CD-14 24.11 +- 0.09; chains of 14 from the same start 27.51 +- 0.09.
        x = np.random.default_rng(0).normal(0, 0.5, 64)
        exact, start, kernel = np.sum(0.5 - 0.5 * x**2), dist.Normal(1.5, 0.5), ebm.MALA(step_size=0.1)
        unbiased = ebm.estimate(precision_model, "unbiased", kernel=kernel, burn_in=5, num_steps=10, start=start)
        grads, times = self.estimates(unbiased, x, 4000)
        assert within(grads, exact, errors=3)
        # Transitions of a pair: two at each step before they meet, one after; at most as long as the longer of the two.
        cost = int(np.ceil(np.mean(2 * (times - 1) + np.maximum(1, 11 - times))))
        assert 10 < cost < 16
        chains = {"num_steps": cost, "kernel": kernel, "adapt_step_size": False}
        for name, options in (("cd", chains), ("mle", {**chains, "start": start})):
            biased, _ = self.estimates(ebm.estimate(precision_model, name, **options), x, 4000)
            assert not within(biased, exact, errors=3)
            assert abs(np.mean(biased) - exact) > 2 * abs(np.mean(grads) - exact)

    @pytest.mark.slow
    @pytest.mark.parametrize("coupling", some_slow(["reflection"], ["maximal"]))
    def test_of_a_double_well_against_quadrature(self, coupling):
        x = np.array([-1.2, 0.4, 1.3])
        model = lambda t: site_of(lambda x: t * (x**4 / 4 - x**2 / 2) - 0.3 * x, x)  # noqa: E731
        estimator = ebm.UnbiasedMaximumLikelihood(
            ebm.MALA(step_size=0.3), coupling, burn_in=3, num_steps=6, num_chains=2000, start=dist.Normal(1.0, 0.2)
        )
        grad = jax.grad(lambda t, key: jnp.sum(row_values(estimator, model(t), key)[0]))
        grads = jax.jit(partial(jax.lax.map, lambda key: grad(1.0, key)))(jnp.arange(20))
        grid = np.linspace(-6, 6, 20_001)
        weight = np.exp(double_well(grid))
        energy = lambda x: x**4 / 4 - x**2 / 2  # noqa: E731
        exact = 3 * np.sum(weight * energy(grid)) / np.sum(weight) - np.sum(energy(x))
        assert within(grads, exact)
        assert np.std(grads) / np.sqrt(20) < 0.05

    @pytest.mark.slow
    def test_is_the_sum_over_samples_that_are_held_fixed(self):
        # Rows share one density: h = x^2 / 2 summed over the same chains run at t = 2, a number.
        x = np.array([0.3, -1.0, 0.7, 0.1])
        settings = {**SETTINGS, "burn_in": 1, "num_steps": 3}
        estimator = ebm.UnbiasedMaximumLikelihood(KERNELS["mala"], **settings, num_chains=7, start=dist.Normal(2, 1))
        value = lambda t: row_values(estimator, site_of(lambda x: 0.5 * t * x**2, x))[0]  # noqa: E731
        key_start, key_chains = jax.random.split(jax.random.key(0))
        starts = jax.jit(lambda key: estimator._starts(key, site_of(lambda x: x**2, x)))(key_start)
        assert starts.shape == (7, 2)
        log_density = lambda x, _: -(x**2)  # noqa: E731
        total, _ = unbiased_moments(key_chains, KERNELS["mala"], log_density, starts, tuple(settings.items()))

        @jax.jit
        def derivatives(t):
            values, forward = jax.jvp(value, (t,), (1.0,))
            return values, forward, jax.grad(lambda t: value(t) @ x)(t)

        values, forward, reverse = derivatives(2.0)
        rows = -0.5 * x**2 + 0.5 * np.mean(total[:, 1])
        np.testing.assert_allclose(forward, rows, rtol=1e-4)
        np.testing.assert_allclose(reverse, rows @ x, rtol=1e-4)
        np.testing.assert_allclose(values, 2.0 * rows, rtol=1e-4)

    @pytest.mark.slow
    def test_of_rows_of_their_own_densities(self):
        # E = t exp(k_i) x^2 / 2 + label_i: each row's own chains, own weight, own derivative in k.
        x, label = np.array([0.3, -1.0, 0.7]), jnp.array([0, 2, 1])
        k, weights = jnp.array([-0.5, 0.1, 0.6]), np.array([0.5, 3.0, 1.0])
        settings = {**SETTINGS, "burn_in": 1, "num_steps": 3}
        estimator = ebm.UnbiasedMaximumLikelihood(KERNELS["mala"], **settings, start=dist.Normal(1, 1))

        def value(t, k, label):
            def energy(x, own):
                return 0.5 * t * jnp.exp(own["k"]) * x**2 + own["label"]

            context = {"k": k, "label": label}
            values, state = row_values(estimator, site_of(energy, x, context=context, batch_shape=(3,)))
            return values @ weights, (values, state)

        key_start, key_chains = jax.random.split(jax.random.key(0))

        @jax.jit
        def expected():
            starts = estimator._starts(key_start, site_of(lambda x, _: x**2, x, context=k, batch_shape=(3,)))
            add = lambda total, pairs, w: total + jnp.sum(w * pairs.position**2, axis=1)  # noqa: E731
            log_density = lambda x, k: -jnp.exp(k) * x**2  # noqa: E731
            return unbiased_sum(key_chains, KERNELS["mala"], log_density, starts, k, add, jnp.zeros(3), **settings)

        squares, meeting = expected()
        gap = 0.5 * np.exp(k) * (squares - x**2)
        # Differentiated outside jit and inside.
        for gradient in (
            jax.grad(jax.jit(value), argnums=(0, 1), has_aux=True),
            jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True)),
        ):
            (in_t, in_k), (values, state) = gradient(2.0, k, label)
            np.testing.assert_allclose(in_t, weights @ gap, rtol=1e-4)
            np.testing.assert_allclose(in_k, 2.0 * weights * gap, rtol=1e-4)
            np.testing.assert_allclose(values, 2.0 * gap, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(state.meeting_time, np.mean(meeting.meeting_time))

    @pytest.mark.parametrize("num_chains", [None, 5])
    def test_starts(self, num_chains):
        x = np.array([0.5, 2.0, 3.0])
        site = site_of(lambda x: x, x, support=constraints.positive, base=dist.Gamma(3.0, 1.0))
        for start in ("data", "base", dist.Exponential(2.0)):
            estimator = ebm.UnbiasedMaximumLikelihood(num_chains=num_chains, start=start)
            starts = jax.jit(lambda key, estimator=estimator: estimator._starts(key, site))(jax.random.key(0))
            assert starts.shape == (num_chains or 3, 2)
            if isinstance(start, str) and start == "data":
                assert set(np.round(np.exp(starts), 4).ravel()) <= {0.5, 2.0, 3.0}
            else:
                assert len(np.unique(starts)) == starts.size


class TestTraining:
    def test_reports_meeting_times_which_a_better_step_shortens(self, gaussian_data):
        site = site_of(lambda x: 2.0 * x**2, gaussian_data[:200])

        @jax.jit
        def report(step_size):
            return row_values(ebm.UnbiasedMaximumLikelihood(ebm.MALA(step_size)), site)[1]

        reports = [report(step_size) for step_size in (0.02, 0.2)]
        for each in reports:
            assert each.num_updates == 1
            assert 1 <= each.meeting_time < each.max_meeting_time <= 1000
        assert reports[1].meeting_time < 0.5 * reports[0].meeting_time
        assert 0.5 < reports[1].acceptance_rate < reports[0].acceptance_rate < 1

    @pytest.mark.slow
    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_hmc_on_a_positive_support(self, coupling):
        x = np.random.default_rng(0).exponential(0.5, 300)

        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: t * x, support=constraints.positive), obs=x)

        kernel = ebm.HMC(step_size=0.4, num_integration_steps=3)
        options = {"kernel": kernel, "coupling": coupling, "burn_in": 2, "num_steps": 4, "start": "data"}
        value = fit(ebm.estimate(model, "unbiased", **options), x, steps=240, rate=0.2)["t"]
        np.testing.assert_allclose(value, 1 / x.mean(), rtol=0.05)

    def test_masked_rows_take_no_part(self):
        k = np.array([0.0, np.nan, 0.5], np.float32)

        def value(t, x):
            def energy(x, k):
                return 0.5 * t * jnp.exp(k) * x**2

            def model():
                numpyro.param("t", 1.0)
                d = ebm.EnergyDistribution(energy, context=jnp.asarray(k), batch_shape=(3,)).mask(~np.isnan(k))
                with numpyro.plate("rows", 3):
                    numpyro.sample("x", d, obs=x)

            wrapped = ebm.estimate(model, "unbiased", burn_in=1, num_steps=2, start="data", kernel=ebm.MALA(0.4))
            trace = numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace()
            return jnp.sum(trace["x"]["fn"].log_prob(x))

        both = jax.jit(jax.value_and_grad(value))
        results = [both(1.0, jnp.array([1.0, hole, 0.2])) for hole in (np.nan, 3.0)]
        np.testing.assert_array_equal(*results)
        assert np.isfinite(results).all()


class TestCap:
    x = np.random.default_rng(0).normal(size=20)
    options = {"kernel": ebm.MALA(step_size=1e-4), "burn_in": 0, "num_steps": 2, "max_num_steps": 5}
    message = (
        r"site 'x': \d+ of 20 pairs of chains had not met after max_num_steps=5 .*acceptance 1.00.*larger max_num_steps"
    )

    def svi(self):
        return SVI(ebm.estimate(precision_model, "unbiased", **self.options), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())

    def test_raises_outside_jit(self):
        with pytest.raises(ebm.EnergyError, match=self.message):
            self.svi().init(jax.random.key(0), self.x)

    @pytest.mark.slow
    def test_raises_inside_jit_scan_and_vmap(self):
        site = site_of(lambda x: 0.5 * x**2, self.x)
        estimator = ebm.UnbiasedMaximumLikelihood(**self.options)
        value = lambda key: jnp.sum(row_values(estimator, site, key)[0])  # noqa: E731
        for run in (jax.vmap(value), partial(jax.lax.map, value)):
            with pytest.raises(jax.errors.JaxRuntimeError, match=self.message):
                jax.block_until_ready(jax.jit(run)(jnp.arange(3)))

    def test_value_and_gradient_are_nan(self, monkeypatch):
        monkeypatch.setattr(ebm.UnbiasedMaximumLikelihood, "_raise_unmet", lambda *_: None)
        estimator = ebm.UnbiasedMaximumLikelihood(**self.options)
        value = lambda t: jnp.sum(row_values(estimator, site_of(lambda x: 0.5 * t * x**2, self.x))[0])  # noqa: E731
        assert np.isnan(jax.jit(jax.value_and_grad(value))(1.0)).all()

    def test_a_density_that_is_not_finite_at_the_start_never_meets(self):
        site = site_of(lambda x: jnp.where(x > 0, jnp.nan, 0.5 * x**2), self.x)
        estimator = ebm.UnbiasedMaximumLikelihood(max_num_steps=50)
        with pytest.raises(ebm.EnergyError, match="had not met"):
            row_values(estimator, site)


REFUSED = {
    "burn-in after the end": ({"burn_in": 60}, ValueError, "burn_in <= num_steps <= max_num_steps; got burn_in=60"),
    "cap before the end": ({"max_num_steps": 20}, ValueError, "max_num_steps=20"),
    "negative burn-in": ({"burn_in": -1}, ValueError, "burn_in >= 0"),
    "steps that are no number": ({"num_steps": 2.5}, ValueError, "num_steps >= 0"),
    "no chains": ({"num_chains": 0}, ValueError, "num_chains >= 1"),
    "unknown coupling": ({"coupling": "reflexion"}, ValueError, "'reflexion'. Did you mean 'reflection'"),
    "kernel without a coupling": ({"kernel": "nuts"}, ValueError, "'nuts' .*coupled: hmc, mala"),
    "unadjusted kernel": ({"kernel": "langevin"}, ValueError, "'langevin' .*coupled: hmc, mala"),
    "mass matrix": ({"kernel": ebm.HMC(inverse_mass_matrix=jnp.ones(1))}, ValueError, "identity"),
    "step size": ({"kernel": ebm.MALA(step_size=0.1), "step_size": 0.2}, TypeError, "no option 'step_size'"),
    "unknown start": ({"start": "dta"}, ValueError, "'dta'"),
    "start of another event": ({"start": dist.Normal(0, 1).expand([2]).to_event(1)}, ValueError, r"event shape \(2,\)"),
    "start that is none": ({"start": 3.0}, TypeError, "distribution"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_settings_that_are_refused(case, gaussian_data):
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        numpyro.handlers.seed(ebm.estimate(precision_model, "unbiased", **options), 0)(gaussian_data[:3])


def test_sites_that_are_refused():
    estimator = ebm.UnbiasedMaximumLikelihood(num_chains=3)
    with pytest.raises(ValueError, match="one pair of chains each; got num_chains=3"):
        estimator.check(site_of(lambda x, k: k * x**2, np.ones(2), context=jnp.ones(2), batch_shape=(2,)))
    discrete = site_of(lambda x: x, np.ones(2), support=constraints.boolean)
    with pytest.raises(ValueError, match="'mala' cannot sample a discrete support"):
        ebm.UnbiasedMaximumLikelihood("mala").check(discrete)


def test_the_remainder_is_accepted_often_at_any_distance():
    # A batch waits for its slowest: 2000 remainders of normals 1e-5 apart need few rounds of rejection.
    halves = jnp.logspace(-5, 1, 2000)
    draw = jax.jit(jax.vmap(coupling_module._remainder))
    values = np.asarray(draw(jax.random.split(jax.random.key(0), 2000), halves))
    v = np.asarray(halves) - values
    near = np.asarray(halves) < 0.01
    assert np.all(v > 0)
    assert kstest(v[near], lambda v: 1 - np.exp(-0.5 * v**2)).pvalue > 1e-3  # Rayleigh in the limit
