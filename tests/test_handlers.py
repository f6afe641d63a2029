"""`estimate`: what it routes, what it refuses, how it lives with NumPyro."""

import pickle
import warnings
from functools import partial

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from estimator_cases import continuous_options
from helpers import fit, precision_model, some_slow, surrogate
from numpyro import handlers
from numpyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

import numpyro_ebm as ebm

ADAM = optax.adam(0.05)

FAST = ["sm", "nce", "pcd"]


def bayesian(x):
    t = numpyro.sample("t", dist.Gamma(1.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


class Spy(ebm.ScoreMatching):
    """Keeps the sites it is given."""

    def __init__(self):
        object.__setattr__(self, "seen", [])

    def surrogate(self, rng_key, site, state):
        self.seen.append(site)
        return super().surrogate(rng_key, site, state)


class TestSpecification:
    def test_a_name_is_sugar_for_an_object(self, gaussian_data):
        values = [
            surrogate(ebm.estimate(precision_model, *spec, **options), {"t": 2.0}, gaussian_data)
            for spec, options in (
                (("dsm",), {"sigma": 0.1}),
                ((ebm.DenoisingScoreMatching(sigma=0.1),), {}),
                (({"x": ebm.DenoisingScoreMatching(sigma=0.1)},), {}),
            )
        ]
        assert values[0] == values[1] == values[2]

    def test_each_site_its_own(self):
        def model(x, y):
            t = numpyro.param("t", 1.0)
            s = numpyro.param("s", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)
                numpyro.sample("y", ebm.EnergyDistribution(lambda y: 0.5 * s * y**2), obs=y)

        rng = np.random.default_rng(0)
        x, y = rng.normal(0, 1, 500), rng.normal(0, 0.5, 500)
        params = fit(ebm.estimate(model, {"x": "sm", "y": ebm.SlicedScoreMatching()}), x, y, steps=900)
        np.testing.assert_allclose(params["t"], 1 / np.mean(x**2), rtol=1e-3)
        np.testing.assert_allclose(params["s"], 1 / np.mean(y**2), rtol=1e-3)

    def test_two_sites_use_different_streams(self):
        def model(x):
            with numpyro.plate("rows", len(x)):
                for name in ("x", "y"):
                    numpyro.sample(name, ebm.EnergyDistribution(lambda x: 0.5 * x**2), obs=x)

        trace = handlers.trace(handlers.seed(ebm.estimate(model, "dsm", sigma=0.5), 0)).get_trace(np.ones(4))
        values = [trace[name]["fn"].log_prob(trace[name]["value"]) for name in ("x", "y")]
        assert not np.any(np.isclose(*values))

    def test_other_sites_are_left_alone(self):
        def model(x):
            loc = numpyro.sample("loc", dist.Normal(0, 1))
            numpyro.sample("y", dist.Normal(loc, 1), obs=1.0)
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2), obs=x)

        trace = handlers.trace(handlers.seed(ebm.estimate(model, "sm"), 0)).get_trace(1.0)
        assert isinstance(trace["y"]["fn"], dist.Normal)
        # |s|^2 / 2 + trace = 1/2 - 1 at x = 1, and the surrogate is minus that.
        np.testing.assert_allclose(trace["x"]["fn"].log_prob(1.0), 0.5)


class TestPlates:
    @pytest.mark.slow
    def test_subsamples_average_to_the_whole(self, gaussian_data):
        x = gaussian_data[:200]
        grad = lambda t, index: jax.grad(  # noqa: E731
            lambda t: surrogate(ebm.estimate(precision_model, "sm"), {"t": t, "rows": index}, x, num_rows=200, batch_size=10)
        )(t)
        parts = [grad(2.0, jnp.arange(10) + 10 * i) for i in range(20)]
        whole = jax.grad(lambda t: surrogate(ebm.estimate(precision_model, "sm"), {"t": t}, x))(2.0)
        np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "options"), [("sm", {}), ("cd", {"num_steps": 3})])
    def test_scale_multiplies_everything(self, gaussian_data, name, options):
        plain = ebm.estimate(precision_model, name, **options)
        scaled = handlers.scale(plain, scale=10.0)
        inside = ebm.estimate(handlers.scale(precision_model, scale=10.0), name, **options)
        value = surrogate(plain, {"t": 2.0}, gaussian_data)
        for other in (scaled, inside):
            np.testing.assert_allclose(surrogate(other, {"t": 2.0}, gaussian_data), 10 * value, rtol=1e-5)

    @pytest.mark.slow
    def test_weights(self, gaussian_data):
        weights = jnp.where(jnp.arange(2000) < 1000, 2.0, 1.0)

        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", 2000), handlers.scale(scale=weights):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

        np.testing.assert_allclose(fit(ebm.estimate(model, "sm"), gaussian_data)["t"], 4.05582, rtol=1e-4)
        cd = fit(ebm.estimate(model, "cd", num_steps=5), gaussian_data)["t"]
        np.testing.assert_allclose(cd, 4.05582, atol=0.15)

    @pytest.mark.slow
    def test_a_scaled_run_has_the_same_optimum(self, gaussian_data):
        scaled = handlers.scale(precision_model, scale=10.0)
        np.testing.assert_allclose(fit(ebm.estimate(scaled, "cd", num_steps=5), gaussian_data)["t"], 3.99528, atol=0.15)

    def test_to_event_expand_and_double_plates(self):
        x = np.random.default_rng(0).normal(size=(4, 3, 2))

        def model(x, kind):
            d = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,))
            if kind == "plates":
                with numpyro.plate("a", 4, dim=-2), numpyro.plate("b", 3, dim=-1):
                    numpyro.sample("x", d, obs=x)
            elif kind == "to_event":
                with numpyro.plate("a", 4):
                    numpyro.sample("x", d.expand((3,)).to_event(1), obs=x)
            else:
                numpyro.sample("x", d.expand((4, 3)).to_event(2), obs=x)

        values = [surrogate(ebm.estimate(model, "sm"), {}, x, kind) for kind in ("plates", "to_event", "joint")]
        np.testing.assert_allclose(values, np.sum(2 - 0.5 * np.sum(x**2, -1)), rtol=1e-5)

    def test_rows_know_which_they_are_of_the_whole(self):
        def model(x, kind):
            d = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
            if kind == "no plate":
                numpyro.sample("x", d.expand((4,)), obs=x[:4, 0])
            elif kind == "one plate":
                with numpyro.plate("b", 50, subsample_size=3):
                    numpyro.sample("x", d, obs=x[0])
            elif kind == "to_event":
                with numpyro.plate("a", 40, subsample_size=4):
                    numpyro.sample("x", d.expand((3,)).to_event(1), obs=x)
            else:
                with numpyro.plate("b", 50, subsample_size=3), numpyro.plate("a", 40, subsample_size=4, dim=-2):
                    numpyro.sample("x", d, obs=x)

        a, b = np.array([7, 0, 39, 12]), np.array([4, 49, 5])
        expected = {
            "no plate": (np.arange(4), 4),
            "one plate": (b, 50),
            "to_event": ((3 * a[:, None] + np.arange(3)).ravel(), 120),
            "two plates": ((50 * a[:, None] + b).ravel(), 2000),
        }
        for kind, (index, num_total) in expected.items():
            spy = Spy()

            @jax.jit
            def indices(a, b, spy=spy, kind=kind):
                conditioned = handlers.substitute(ebm.estimate(model, spy), {"a": a, "b": b})
                handlers.seed(conditioned, 0)(np.zeros((4, 3)), kind)
                return spy.seen[-1].index

            got = indices(a, b)
            assert got.dtype == jnp.int32
            np.testing.assert_array_equal(got, index)
            assert spy.seen[-1].num_total == num_total

    @pytest.mark.parametrize("where", some_slow(["on to_event"], ["inside", "around"]))
    def test_masked_rows_take_no_part(self, where):
        x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
        keep = np.array([True, True, False, True, False, True])

        def model(x, keep):
            t = numpyro.param("t", jnp.ones(2))
            d = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(t * x**2), (2,))
            if where == "on to_event":
                numpyro.sample("x", d.expand((6, 1)).to_event(1).mask(keep), obs=x[:, None])
                return
            with numpyro.plate("rows", 6):
                if where == "inside":
                    numpyro.sample("x", d.mask(keep), obs=x)
                else:
                    with handlers.mask(mask=keep):
                        numpyro.sample("x", d, obs=x)

        for name in ("sm", "cd", "pcd", "nce") if where == "inside" else ("sm", "pcd"):
            loss = lambda t, x, keep, name=name: surrogate(  # noqa: E731
                ebm.estimate(model, name), {"t": t}, x, keep
            )
            one, other = (np.where(keep[:, None], x, fill).astype(np.float32) for fill in (np.nan, 1e3))
            grads = [jax.grad(loss)(jnp.array([1.5, 2.0]), v, jnp.asarray(keep)) for v in (one, other)]
            assert np.isfinite(grads[0]).all()
            np.testing.assert_allclose(*grads)
            if name == "sm":
                reference = jax.grad(loss)(jnp.array([1.5, 2.0]), x, jnp.ones(6, bool))
                by_row = x**2 * np.array([1.5, 2.0]) - 1
                np.testing.assert_allclose(grads[0], reference + by_row[~keep].sum(0), rtol=1e-4)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["sm", "cd"])
    def test_a_missing_covariate_of_a_masked_row_is_harmless(self, name):
        keep = jnp.array([True, False, True])

        def model(x, k):
            t = numpyro.param("t", 1.0)
            d = ebm.EnergyDistribution(lambda x, k: 0.5 * jnp.exp(t * k) * x**2, context=k, batch_shape=(3,))
            with numpyro.plate("rows", 3), handlers.mask(mask=keep):
                numpyro.sample("x", d, obs=x)

        loss = lambda t, k: surrogate(ebm.estimate(model, name), {"t": t}, np.ones(3, np.float32), k)  # noqa: E731
        grads = [jax.grad(loss)(0.5, jnp.array([0.3, fill, -0.2])) for fill in (np.nan, 9.0)]
        assert np.isfinite(grads[0])
        np.testing.assert_allclose(*grads)

    @pytest.mark.parametrize("name", some_slow(FAST, [name for name in continuous_options() if name not in FAST]))
    def test_all_masked_gives_zero(self, name):
        options = continuous_options()[name]

        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", 3), handlers.mask(mask=jnp.zeros(3, bool)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

        loss = lambda t: surrogate(ebm.estimate(model, name, **options), {"t": t}, np.full(3, np.nan))  # noqa: E731
        assert jax.value_and_grad(loss)(2.0) == (0.0, 0.0)


class TestRoles:
    @pytest.mark.parametrize(
        ("name", "options", "why"),
        [
            ("cd", {}, "only its gradient"),
            pytest.param("mle", {}, "only its gradient", marks=pytest.mark.slow),
            pytest.param("pcd", {}, "only its gradient", marks=pytest.mark.slow),
            ("dsm", {"sigma": 0.1}, "noise is frozen"),
            ("ssm", {}, "noise is frozen"),
            pytest.param("nce", {}, "noise is frozen", marks=pytest.mark.slow),
        ],
    )
    def test_what_nuts_may_not_target(self, name, options, why):
        model = ebm.estimate(bayesian, name, **options)
        kernels = [NUTS(model)] if name == "nce" else [NUTS(model), ebm.BlackJAXKernel(model, "hmc")]
        for kernel in kernels:
            mcmc = MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False)
            with pytest.raises(ValueError, match=rf"site 'x'.*NUTS or HMC.*{why}"):
                mcmc.run(jax.random.key(0), np.ones(5, np.float32))

    @pytest.mark.slow
    def test_a_generalised_posterior_by_exact_score_matching(self, gaussian_data):
        # Prior Gamma(1, 1); the loss of n rows is n (t^2 m / 2 - t): a Gaussian around 1/m shifted by the prior.
        model = ebm.estimate(bayesian, "sm")
        mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=1500, progress_bar=False)
        with pytest.warns(ebm.UncalibratedPosteriorWarning, match="'sm'.*unit of the data"):
            mcmc.run(jax.random.key(0), gaussian_data)
        optimum = (2000 - 1) / (2000 * np.mean(gaussian_data**2))
        np.testing.assert_allclose(mcmc.get_samples()["t"].mean(), optimum, rtol=0.03)
        for guide_type in (AutoDelta, AutoNormal):
            guide = guide_type(model)
            svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ebm.UncalibratedPosteriorWarning)
                result = svi.run(jax.random.key(0), 1000, gaussian_data, progress_bar=False)
            np.testing.assert_allclose(guide.median(result.params)["t"], optimum, rtol=0.03)

    @pytest.mark.filterwarnings("ignore::numpyro_ebm.UncalibratedPosteriorWarning")
    def test_subsampling_under_nuts_is_refused(self, gaussian_data):
        def model(x):
            t = numpyro.sample("t", dist.Gamma(1, 1))
            with numpyro.plate("rows", 2000, subsample_size=20):
                batch = numpyro.subsample(x, event_dim=0)
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=batch)

        mcmc = MCMC(NUTS(ebm.estimate(model, "sm")), num_warmup=5, num_samples=5, progress_bar=False)
        with pytest.raises(ValueError, match="frozen subset"):
            mcmc.run(jax.random.key(0), gaussian_data)

    @pytest.mark.slow
    def test_autoguides_are_no_samplers(self, gaussian_data):
        model = ebm.estimate(bayesian, "pcd", num_steps=5)
        guide = AutoNormal(model)
        svi = SVI(model, guide, optax.adam(0.02), Trace_ELBO())
        result = svi.run(jax.random.key(0), 600, gaussian_data, progress_bar=False)
        np.testing.assert_allclose(guide.median(result.params)["t"], 3.99, atol=0.25)

    def test_no_key_is_an_error_that_names_the_site(self):
        with pytest.raises(ValueError, match=r"site 'x'.*seed"):
            numpyro.infer.util.log_density(ebm.estimate(precision_model, "dsm", sigma=0.1), (np.ones(3),), {}, {"t": 1.0})


class TestState:
    def svi(self, **options):
        options = {"num_steps": 3, **options}
        return SVI(ebm.estimate(precision_model, "pcd", **options), ebm.empty_guide, ADAM, Trace_ELBO())

    @pytest.mark.slow
    def test_particles_are_refused_at_the_first_update(self, gaussian_data):
        for name, vectorize in (("pcd", True), ("cd", False)):
            loss = Trace_ELBO(num_particles=2, vectorize_particles=vectorize)
            svi = SVI(ebm.estimate(precision_model, name), ebm.empty_guide, ADAM, loss)
            state = svi.init(jax.random.key(0), gaussian_data)
            with pytest.raises(ValueError, match=r"num_particles=1"):
                svi.update(state, gaussian_data)
        stateless = ebm.estimate(precision_model, "dsm", sigma=0.2)
        svi = SVI(stateless, ebm.empty_guide, ADAM, Trace_ELBO(num_particles=2))
        svi.run(jax.random.key(0), 2, gaussian_data, progress_bar=False)

    @pytest.mark.parametrize("loss", [RenyiELBO(), TraceGraph_ELBO()], ids=["renyi", "graph"])
    def test_elbos_without_state_are_refused(self, loss, gaussian_data):
        svi = SVI(ebm.estimate(bayesian, "pcd"), AutoNormal(bayesian_sm), ADAM, loss)
        with pytest.raises(ValueError, match="Trace_ELBO"):
            svi.init(jax.random.key(0), gaussian_data)

    @pytest.mark.slow
    def test_updates_are_counted_and_evaluate_leaves_the_state_alone(self, gaussian_data):
        svi = self.svi()
        state = svi.init(jax.random.key(0), gaussian_data)
        assert int(state.mutable_state["x$pcd"]["state"].num_updates) == 1
        update = jax.jit(lambda s: svi.update(s, gaussian_data)[0])
        for _ in range(5):
            state = update(state)
        svi.evaluate(state, gaussian_data)
        chains = state.mutable_state["x$pcd"]["state"]
        assert int(chains.num_updates) == 6
        assert 0 < float(chains.health.acceptance_rate) <= 1

    @pytest.mark.slow
    def test_slots_are_written_back_where_they_were_drawn(self):
        # A kernel that hardly moves: every lineage survives in its own slot.
        x = np.arange(100.0) / 100
        svi = self.svi(num_chains=1000, kernel=ebm.MALA(step_size=1e-11), adapt_step_size=False)
        state = svi.init(jax.random.key(0), x)
        before = state.mutable_state["x$pcd"]["state"].pool.position
        update = jax.jit(lambda s: svi.update(s, x)[0])
        for _ in range(20):
            state = update(state)
        after = state.mutable_state["x$pcd"]["state"].pool.position
        np.testing.assert_allclose(after, before, atol=1e-3)

    @pytest.mark.slow
    @pytest.mark.parametrize("num_chains", some_slow([None], [7, 64]))
    def test_a_short_last_batch_and_one_row(self, num_chains):
        svi = self.svi(num_chains=num_chains)
        state = svi.init(jax.random.key(0), np.ones(16))
        for rows in (16, 5, 1):
            state, loss = jax.jit(svi.update)(state, np.ones(rows))
            assert np.isfinite(loss)
        assert state.mutable_state["x$pcd"]["state"].pool.position.shape == (num_chains or 16,)

    @pytest.mark.slow
    @pytest.mark.parametrize("pickler", some_slow([pickle], [cloudpickle]), ids=["pickle", "cloudpickle"])
    def test_thirty_steps_are_fifteen_saved_and_fifteen(self, pickler, gaussian_data):
        svi = self.svi()
        update = jax.jit(lambda s: svi.update(s, gaussian_data)[0])
        state = svi.init(jax.random.key(0), gaussian_data)
        for _ in range(15):
            state = update(state)
        resumed = pickler.loads(pickler.dumps(state))
        for _ in range(15):
            state, resumed = update(state), update(resumed)
        jax.tree.map(np.testing.assert_array_equal, *(jax.tree.map(as_raw, s) for s in (state, resumed)))

    def test_an_energy_in_a_model_cloudpickles(self, gaussian_data):
        model = ebm.estimate(precision_model, "sm")
        back = cloudpickle.loads(cloudpickle.dumps(model))
        assert surrogate(back, {"t": 2.0}, gaussian_data) == surrogate(model, {"t": 2.0}, gaussian_data)

    def test_scan_equals_the_loop(self, gaussian_data):
        svi = self.svi(kernel=ebm.Langevin(0.05))
        start = svi.init(jax.random.key(0), gaussian_data)
        looped, update = start, jax.jit(lambda s: svi.update(s, gaussian_data))
        for _ in range(8):
            looped, _ = update(looped)
        scanned, _ = jax.lax.scan(lambda s, _: svi.update(s, gaussian_data), start, None, length=8)
        # XLA may round the two programs differently: up to that, with a kernel that no rounding makes accept or reject.
        equal = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
        jax.tree.map(equal, *(jax.tree.map(as_raw, s) for s in (looped, scanned)))

    @pytest.mark.slow
    def test_seeds_may_be_mapped(self, gaussian_data):
        svi = self.svi()

        def train(key):
            state = svi.init(key, gaussian_data)
            return svi.get_params(jax.lax.scan(lambda s, _: svi.update(s, gaussian_data), state, None, length=5)[0])

        values = jax.vmap(train)(jax.random.split(jax.random.key(0), 3))["t"]
        assert len(np.unique(values)) == 3

    @pytest.mark.slow
    def test_chains_go_into_predictive_and_resume(self, gaussian_data):
        svi = self.svi()
        result = svi.run(jax.random.key(0), 20, gaussian_data, progress_bar=False)
        resumed = svi.run(jax.random.key(1), 5, gaussian_data, init_state=result.state, progress_bar=False)
        assert int(resumed.state.mutable_state["x$pcd"]["state"].num_updates) == 26
        draws = Predictive(precision_model, params=result.params, num_samples=3)(jax.random.key(2), num_rows=4)
        assert draws["x"].shape == (3, 4)

    @pytest.mark.slow
    def test_typed_and_raw_keys_agree(self, gaussian_data):
        results = [
            self.svi().run(key, 5, gaussian_data, progress_bar=False).params["t"]
            for key in (jax.random.key(1), jax.random.PRNGKey(1))
        ]
        assert results[0] == results[1]


def bayesian_sm(x):
    return ebm.estimate(bayesian, "sm")(x)


def as_raw(leaf):
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


class TestTraces:
    @pytest.mark.parametrize("name", some_slow(FAST, [name for name in continuous_options() if name not in FAST]))
    def test_fifty_updates_compile_once(self, name, gaussian_data):
        traces = []

        def model(x):
            t = numpyro.param("t", 1.0)

            def energy(x):
                traces.append(1)
                return 0.5 * t * x**2

            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

        options = continuous_options()[name]
        svi = SVI(ebm.estimate(model, name, **options), ebm.empty_guide, ADAM, Trace_ELBO())
        x = jnp.asarray(gaussian_data[:50])
        state = svi.init(jax.random.key(0), x)
        update = jax.jit(svi.update)
        state, _ = update(state, x)
        first = len(traces)
        for _ in range(50):
            state, _ = update(state, x)
        assert len(traces) == first

    def test_new_options_are_a_new_handler(self, gaussian_data):
        handler = ebm.estimate(precision_model, "dsm", sigma=0.1)
        with pytest.raises(AttributeError):
            handler.estimators = ebm.ScoreMatching()
        with pytest.raises(AttributeError):
            ebm.DenoisingScoreMatching(sigma=0.1).sigma = 0.2
