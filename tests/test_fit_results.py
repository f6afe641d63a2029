"""What `fit` returns: moving averages, rollbacks, figures of the run, and results that are kept, drawn from and plotted."""

import gc
import pickle
from functools import partial

import cloudpickle
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from conftest import memory
from estimator_cases import continuous_options
from helpers import precision_model, some_slow, vector_model
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta

import numpyro_ebm as ebm

KEY = jax.random.key(0)
fit = partial(ebm.fit, progress_bar=False)
X = np.random.default_rng(0).normal(0, 0.5, 60).astype(np.float32)


def fixed_model(x=None):
    """A model that needs no rows to be sampled."""
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)


def svi_of(name="sm", model=precision_model, optimiser=None, **options):
    return SVI(ebm.estimate(model, name, **options), ebm.empty_guide, optimiser or optax.adam(0.05), Trace_ELBO())


class TestMovingAverage:
    def test_it_is_that_of_the_parameters(self):
        svi = svi_of("dsm", sigma=0.2)
        result = fit(KEY, svi, 30, X, ema=0.9, check_every=7)
        state, path = svi.init(KEY, X), []
        for _ in range(30):
            state, _ = svi.update(state, X)
            path.append(float(svi.get_params(state)["t"]))
        weights = 0.9 ** np.arange(29, -1, -1)
        np.testing.assert_allclose(result.params["t"], np.sum(weights * path) / np.sum(weights), rtol=1e-5)
        np.testing.assert_allclose(svi.get_params(result.state)["t"], path[-1], rtol=1e-6)
        assert result.ema_params["t"] == result.params["t"]

    def test_it_stays_in_the_support(self):
        def model(x):
            t = numpyro.param("t", 1.0, constraint=dist.constraints.positive)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        svi = svi_of(model=model)
        whole = fit(KEY, svi, 20, X, ema=0.9)
        logs = [np.log(fit(KEY, svi, n, X).params["t"]) for n in range(1, 21)]
        weights = 0.9 ** np.arange(19, -1, -1)
        np.testing.assert_allclose(np.log(whole.params["t"]), np.sum(weights * logs) / np.sum(weights), rtol=1e-4)

    def test_held_out_rows_are_evaluated_at_it(self):
        y = X[::2]
        result = fit(KEY, svi_of(), 40, X, ema=0.9, held_out=(y,), check_every=10)
        t = float(result.ema_params["t"])
        np.testing.assert_allclose(result.held_out_losses[-1], 0.5 * t**2 * np.sum(y**2) - t * len(y), rtol=1e-4)
        assert result.held_out_losses[0] == fit(KEY, svi_of(), 10, X, held_out=(y,)).held_out_losses[0]

    @pytest.mark.slow
    def test_it_removes_the_noise_of_the_chains(self):
        """The errors of pcd's last parameters and of their averages, over runs with few chains and a large rate."""
        x = np.random.default_rng(1).normal(0, 0.5, 500)
        optimum = 1 / np.mean(x**2)
        errors = []
        for seed in range(8):
            svi = svi_of("pcd", num_chains=10, optimiser=optax.sgd(2e-3))
            result = fit(jax.random.key(seed), svi, 2000, x, ema=0.99)
            errors.append([float(each["t"]) - optimum for each in (svi.get_params(result.state), result.params)])
        last, averaged = np.sqrt(np.mean(np.square(errors), axis=0))
        assert averaged < 0.5 * last

    def test_parameters_that_stay_are_their_average(self):
        """Weights of 1e-6 in float32, and of 1e-2 in bfloat16, whose numbers have 8 bits."""

        def model(x):
            t = numpyro.param("t", jnp.asarray(3.0, jnp.bfloat16))
            s = numpyro.param("s", jnp.asarray(148.4131, jnp.float32))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", dist.Normal(t.astype(x.dtype), s), obs=x)

        svi = SVI(model, ebm.empty_guide, optax.sgd(0.0), Trace_ELBO())
        for decay in (0.99, 0.999, 0.999999):
            params = fit(KEY, svi, 1500, X, ema=decay, check_every=1500).params
            assert (params["t"].dtype, params["s"].dtype) == (jnp.bfloat16, jnp.float32)
            assert (float(params["t"]), float(params["s"])) == (3.0, float(np.float32(148.4131)))

    def test_another_decay_in_the_next_run(self):
        """The weights of the first run shrink by the new decay."""
        svi = svi_of("dsm", sigma=0.2)
        first = fit(KEY, svi, 5, X, ema=0.5)
        second = fit(KEY, svi, 4, X, ema=0.9, init_state=first)
        path = [float(fit(KEY, svi, n, X).params["t"]) for n in range(1, 10)]
        weights = np.r_[0.5 ** np.arange(5, 0, -1) * 0.9**4, 0.1 * 0.9 ** np.arange(3, -1, -1)]
        np.testing.assert_allclose(second.params["t"], np.sum(weights * path) / np.sum(weights), rtol=1e-5)

    @pytest.mark.parametrize("ema", [0.0, 1.0, 2, "0.9"])
    def test_refusals(self, ema):
        with pytest.raises(ebm.EnergyError, match="ema between 0 and 1"):
            fit(KEY, svi_of(), 3, X, ema=ema)


class TestGoingOn:
    @pytest.mark.parametrize("batches", [False, True])
    def test_two_halves_are_the_whole(self, tmp_path, batches):
        data = {"batches": X, "batch_size": 25} if batches else {"x": X}
        run = partial(fit, KEY, ema=0.9, check_every=5, **data)
        whole = run(svi_of("pcd"), 30)
        run(svi_of("pcd"), 15).save(tmp_path / "half.pkl")
        rest = run(svi_of("pcd"), 15, init_state=ebm.FitResult.load(tmp_path / "half.pkl"))
        assert rest.params["t"] == whole.params["t"]
        jax.tree.map(np.testing.assert_array_equal, _bits(rest.state), _bits(whole.state))

    @pytest.mark.parametrize("name", some_slow(["dsm"], [n for n in continuous_options(shape=(2,)) if n != "dsm"]))
    def test_for_every_estimator(self, tmp_path, name):
        x = np.random.default_rng(0).normal(0, 1, (16, 2)).astype(np.float32)
        svi = partial(svi_of, name, vector_model, optax.adam(1e-3), **continuous_options(shape=(2,))[name])
        whole = fit(KEY, svi(), 30, x, check_every=15)
        fit(KEY, svi(), 15, x, check_every=15).save(tmp_path / "half.pkl", pickler=cloudpickle)
        rest = fit(KEY, svi(), 15, x, check_every=15, init_state=ebm.FitResult.load(tmp_path / "half.pkl"))
        np.testing.assert_array_equal(rest.losses, whole.losses[15:])
        jax.tree.map(np.testing.assert_array_equal, _bits(rest.state), _bits(whole.state))

    @pytest.mark.parametrize("name", some_slow(["pcd"], ["sm", "nce", "replay", "ssm"]))
    def test_an_ensemble_is_its_members(self, name):
        svi = svi_of(name, optimiser=optax.adam(0.01))
        keys = jax.random.split(KEY, 3)
        together = jax.vmap(lambda key: svi.run(key, 40, X, progress_bar=False).params["t"])(keys)
        alone = [svi.run(key, 40, X, progress_bar=False).params["t"] for key in keys]
        np.testing.assert_allclose(together, alone, rtol=1e-4)
        # In one dimension the random directions of "ssm" are 1 or -1, which give the same loss.
        assert len(set(map(float, alone))) == (1 if name in ("sm", "ssm") else 3)


def _bits(tree):
    """Keys as numbers, so that arrays can be compared."""
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), tree)


class TestRollback:
    def test_steps_that_are_too_large_are_halved_until_they_work(self):
        """Descent above 2 / sum(x^2) diverges; the optimum is that of score matching."""
        x = np.random.default_rng(0).normal(0, 0.5, 400)
        svi, seen = svi_of(optimiser=optax.sgd(0.05)), []
        result = fit(KEY, svi, 600, x, check_every=30, on_unhealthy="rollback", callback=seen.append)
        np.testing.assert_array_equal([each["step"] for each in seen], result.history["step"])
        assert result.stopped == "end"
        np.testing.assert_allclose(result.params["t"], 1 / np.mean(x**2), rtol=1e-3)
        assert {each.reason for each in result.rollbacks} == {"nonfinite"}
        assert all(each.to_step < each.step for each in result.rollbacks)
        np.testing.assert_allclose([each.rate for each in result.rollbacks], 0.5 ** np.arange(1, len(result.rollbacks) + 1))
        assert result.losses.size == 600
        assert np.isfinite(result.losses[-30:]).all()
        assert "rollback at 60" in repr(result)
        assert result.rate == result.rollbacks[-1].rate
        rest = fit(KEY, svi, 60, x, check_every=30, on_unhealthy="rollback", init_state=result)
        assert not rest.rollbacks
        assert rest.rate == result.rate

    def test_other_random_numbers_after_a_rollback(self):
        def model(x):
            t = numpyro.param("t", 1.0)
            numpyro.factor("trap", jnp.where(t == 1.0, 0.0, jnp.nan))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        svi = svi_of("dsm", model, optax.sgd(1e-3), sigma=0.3)
        with pytest.warns(ebm.NonFiniteLossWarning, match="after"):
            result = fit(KEY, svi, 1000, X, check_every=10, on_unhealthy="rollback", callback=pytest.fail)
        assert result.stopped == "nonfinite"
        assert [each.to_step for each in result.rollbacks] == [0] * 10
        assert (len(result.losses), result.best_step, result.params["t"]) == (110, 0, 1.0)
        assert len(set(result.losses[::10])) == 11

    @pytest.mark.parametrize("policy", ["warn", "raise"])
    @pytest.mark.filterwarnings("ignore::numpyro_ebm.UnhealthyChainsWarning")
    def test_chains_that_lose_their_density(self, policy):
        def model(x):
            t = numpyro.param("t", 1.0)
            numpyro.factor("pull", -1000 * t)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        svi = svi_of("cd", model, optax.sgd(1e-4), kernel=ebm.Langevin(0.1), on_unhealthy=policy)
        result = fit(KEY, svi, 400, X, check_every=4, on_unhealthy="rollback")
        assert result.stopped == "unhealthy"
        assert result.params["t"] > -0.05  # the health is that of the parameters before the last step
        assert all("unbounded" in each.reason for each in result.rollbacks)

    def test_refusals(self):
        with pytest.raises(ebm.EnergyError, match=r"optax.adam\(1e-3\)"):
            fit(KEY, svi_of(optimiser=numpyro.optim.Adam(0.1)), 3, X, on_unhealthy="rollback")
        with pytest.raises(ebm.EnergyError, match="None or 'rollback'; got 'stop'"):
            fit(KEY, svi_of(), 3, X, on_unhealthy="stop")


@pytest.mark.filterwarnings("ignore::numpyro_ebm.UnhealthyChainsWarning")
def test_an_infinite_energy_of_one_row_stops_before_it_does_harm():
    def model(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: jnp.where(v > 10, jnp.inf, 0.5 * t * v**2)), obs=x)

    svi = svi_of("cd", model)
    with pytest.warns(ebm.NonFiniteLossWarning, match="those after 0. Use a smaller learning rate.*energy overflows"):
        result = fit(KEY, svi, 10, np.r_[X, 50.0].astype(np.float32))
    assert (result.stopped, result.best_step, result.params["t"]) == ("nonfinite", 0, 1.0)


@pytest.mark.slow
def test_many_fits_of_new_data_hold_no_memory():
    """500 fits of arrays of one shape: programs are kept once, and nothing of the data."""
    rng, svi = np.random.default_rng(0), svi_of("pcd")
    for i in range(520):
        if i == 20:
            gc.collect()
            before = memory()
        fit(jax.random.key(i), svi, 3, rng.normal(size=100).astype(np.float32), check_every=3)
    gc.collect()
    assert memory() - before < 50 * 2**20


class TestHistory:
    def test_figures_of_each_check(self):
        seen = []
        result = fit(KEY, svi_of("pcd"), 25, X, check_every=10, callback=seen.append)
        assert set(result.history) == {
            *("step", "loss", "gradient_norm", "steps_per_second", "energy_gap/x", "acceptance_rate/x")
        }
        np.testing.assert_array_equal(result.history["step"], [10, 20, 25])
        means = [np.mean(result.losses[i:j], dtype=float) for i, j in ((0, 10), (10, 20), (20, 25))]
        np.testing.assert_allclose(result.history["loss"], means)
        np.testing.assert_array_equal(result.history["energy_gap/x"], result.health.sites["x"].energy_gap)
        for name, values in result.history.items():
            np.testing.assert_array_equal([each[name] for each in seen], values)
        assert all(isinstance(value, float) for value in seen[0].values())

    def test_the_norm_of_the_gradient(self):
        result = fit(KEY, svi_of(optimiser=optax.sgd(0.0)), 5, X, held_out=(X,), check_every=5)
        gradient = 1.0 * np.sum(X**2) - len(X)  # of t^2 sum(x^2) / 2 - n t at t = 1
        np.testing.assert_allclose(result.history["gradient_norm"], abs(gradient), rtol=1e-5)
        np.testing.assert_array_equal(result.history["held_out_loss"], result.held_out_losses[1:])

    def test_an_optimiser_without_one_gradient(self):
        result = fit(KEY, svi_of(optimiser=numpyro.optim.Minimize()), 3, X)
        assert "gradient_norm" not in result.history
        np.testing.assert_allclose(result.params["t"], 1 / np.mean(X**2), rtol=1e-3)


class TestResult:
    def test_the_table(self):
        text = repr(fit(KEY, svi_of("pcd"), 20, X, ema=0.9, check_every=10))
        assert text.splitlines()[0] == "FitResult"
        assert len(text.splitlines()) < 12
        for words in ("20, stopped: end", "energy_gap/x", "moving averages, after 20 updates: t ()"):
            assert words in text

    def test_draws_and_log_z(self):
        result = fit(KEY, svi_of(model=fixed_model), 400, X)
        t = float(result.params["t"])
        draws = result.sample(jax.random.key(1), "hmc", num_warmup=100, num_samples=400)
        assert abs(np.std(draws.samples["x"]) * np.sqrt(t) - 1) < 0.15
        log_z = result.log_partition(jax.random.key(2), method="grid")
        np.testing.assert_allclose(log_z.value, 0.5 * np.log(2 * np.pi / t), rtol=1e-3)

    def test_arguments_and_latents_of_the_model(self):
        def latent(x=None):
            t = numpyro.sample("t", dist.Gamma(2.0, 2.0))
            with numpyro.plate("rows", 1 if x is None else len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        def with_rows(x):
            fixed_model(x)

        result = fit(KEY, svi_of(model=with_rows), 5, X)
        for method in (result.sample, result.log_partition):
            with pytest.raises(TypeError, match=r"missing a required .*argument.*model_args=\(x,\)"):
                method(jax.random.key(1))
        model = ebm.estimate(latent, "cd")
        svi = SVI(model, AutoDelta(model), optax.adam(0.05), Trace_ELBO())
        result = fit(KEY, svi, 5, X)
        with pytest.raises(ebm.EnergyError, match=r"\['t'\] are latent.*params=guide.median\(result.params\)\)"):
            result.log_partition(jax.random.key(1), method="grid")
        log_z = result.log_partition(jax.random.key(1), method="grid", params={"t": 4.0})
        np.testing.assert_allclose(log_z.value, 0.5 * np.log(2 * np.pi / 4), rtol=1e-3)
        draws = result.sample(jax.random.key(1), "hmc", params={"t": 4.0}, num_warmup=50, num_samples=200)
        assert abs(np.std(draws.samples["x"]) * 2 - 1) < 0.2

    def test_recorded_chains_for_arviz_and_a_picture(self):
        result = fit(KEY, svi_of("pcd"), 20, X, check_every=5, record_chains=4)
        chains = result.to_arviz()["training"]
        np.testing.assert_array_equal(chains["x"], result.chains.samples["x"])
        axes = result.plot()
        assert [each.get_ylabel() for each in axes[1:]] == ["energy gap (nats)", "acceptance rate"]
        plt.close("all")

    def test_pickles(self, tmp_path):
        result = fit(KEY, svi_of("pcd"), 20, X, ema=0.9)
        for again in (pickle.loads(pickle.dumps(result)), cloudpickle.loads(cloudpickle.dumps(result))):
            assert repr(again) == repr(result)
            assert again.params == result.params
        result.save(tmp_path / "result")
        assert ebm.FitResult.load(tmp_path / "result").params == result.params
        assert [each.name for each in tmp_path.iterdir()] == ["result"]

    def test_a_model_without_a_name_needs_cloudpickle(self, tmp_path):
        def local(x):
            precision_model(x)

        for model in (partial(local), local):
            result = fit(KEY, svi_of(model=model), 5, X)
            with pytest.raises(TypeError, match=r"pickle cannot find by name. Write cloudpickle"):
                result.save(tmp_path / "result")
        assert not list(tmp_path.iterdir())
        result.save(tmp_path / "result", pickler=cloudpickle)
        assert ebm.FitResult.load(tmp_path / "result").params == result.params

    def test_other_files_are_refused(self, tmp_path):
        path = tmp_path / "other"
        newer = {"format": 99, "version": "9.9", "result": fit(KEY, svi_of(), 1, X)}
        for content, words in (
            (b"text", "is no file that FitResult.save wrote"),
            (pickle.dumps([1]), "it holds list"),
            (b"I12x\n.", "is no file that FitResult.save wrote"),
            (pickle.dumps(newer), "format 99, written by.*9.9"),
            (b"cnot_a_module\nmodel\n.", "cannot be found here.*cloudpickle"),
        ):
            path.write_bytes(content)
            with pytest.raises(ebm.EnergyError, match=words):
                ebm.FitResult.load(path)

    def test_a_folder_that_cannot_be_written_leaves_the_older_file(self, tmp_path):
        result = fit(KEY, svi_of(), 5, X)
        path = tmp_path / "result"
        result.save(path)
        before = path.read_bytes()
        with pytest.raises(OSError, match="No such file"):
            result.save(tmp_path / "missing" / "result")
        assert path.read_bytes() == before
