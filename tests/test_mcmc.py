"""`BlackJAXKernel` in numpyro's MCMC, and `sample`."""

import pickle
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.diagnostics import effective_sample_size
from helpers import check_moments, precision_model, some_slow
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm._core import programs
from numpyro_ebm.sampling import _sample

SCHOOLS_Y = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_S = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools():
    mu = numpyro.sample("mu", dist.Normal(0, 5))
    tau = numpyro.sample("tau", dist.HalfCauchy(5))
    with numpyro.plate("schools", 8):
        effect = numpyro.sample("effect", dist.Normal(0, 1))
        theta = numpyro.deterministic("theta", mu + tau * effect)
        numpyro.sample("y", dist.Normal(theta, SCHOOLS_S), obs=SCHOOLS_Y)


def logistic(x, y=None):
    weights = numpyro.sample("weights", dist.Normal(0, 1).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ weights), obs=y)


def logistic_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    return x, (rng.uniform(size=200) < 1 / (1 + np.exp(-x @ np.array([1.0, -1.0, 0.5])))).astype(np.int32)


def run(kernel, *args, num_warmup=500, num_samples=2000, chain_method="vectorized", num_chains=4, key=0, **kwargs):
    mcmc = MCMC(
        kernel,
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method=chain_method,
        progress_bar=False,
    )
    mcmc.run(jax.random.key(key), *args, **kwargs)
    return mcmc


def assert_same_posterior(ours, theirs, names):
    """Means and log standard deviations of two runs within 5 combined standard errors."""
    for name in names:
        a, b = (np.asarray(s.get_samples(group_by_chain=True)[name], float) for s in (ours, theirs))
        center = b.mean((0, 1))
        for fa, fb in ((a, b), ((a - center) ** 2, (b - center) ** 2)):
            ess = [np.asarray(effective_sample_size(jnp.asarray(v))) for v in (fa, fb)]
            assert min(np.min(e) for e in ess) > 100
            error = np.sqrt(fa.var((0, 1)) / ess[0] + fb.var((0, 1)) / ess[1])
            assert np.all(np.abs(fa.mean((0, 1)) - fb.mean((0, 1))) < 5 * error), name


@pytest.fixture(scope="module")
def schools():
    return run(NUTS(eight_schools, target_accept_prob=0.9), num_samples=4000)


@pytest.fixture(scope="module")
def regression():
    return run(NUTS(logistic), *logistic_data())


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["nuts", "hmc"])
def test_eight_schools_agrees_with_numpyro(kernel, schools):
    ours = run(ebm.BlackJAXKernel(eight_schools, kernel), num_samples=4000, extra_fields=("mean_accept_prob",))
    assert_same_posterior(ours, schools, ["mu", "tau", "theta"])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", some_slow(["mala"], ["nuts", "hmc"]))
def test_logistic_regression_agrees_with_numpyro(kernel, regression):
    ours = run(ebm.BlackJAXKernel(logistic, kernel), *logistic_data(), num_samples=2500)
    assert_same_posterior(ours, regression, ["weights"])
    assert ours.get_extra_fields()["num_steps"].min() >= 1


@pytest.mark.slow
def test_sample_agrees_with_numpyro(regression):
    ours = ebm.sample(jax.random.key(1), logistic, num_samples=2000, model_args=logistic_data())
    wrapped = type("Grouped", (), {"get_samples": staticmethod(lambda group_by_chain: ours.samples)})
    assert_same_posterior(wrapped, regression, ["weights"])


@pytest.mark.slow
def test_sequential_chains_and_the_progress_bar(capfd, monkeypatch):
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # NumPyro shows no bar where it sees these
        monkeypatch.delenv(name, raising=False)
    mcmc = MCMC(
        ebm.BlackJAXKernel(eight_schools, "mala"),
        num_warmup=50,
        num_samples=50,
        num_chains=2,
        chain_method="sequential",
        progress_bar=True,
    )
    mcmc.run(jax.random.key(0), extra_fields=("z.mu", "i"))
    assert "acceptance" in capfd.readouterr().err
    assert mcmc.get_samples(group_by_chain=True)["theta"].shape == (2, 50, 8)
    assert mcmc.get_extra_fields(group_by_chain=True)["z.mu"].shape == (2, 50)
    mcmc.print_summary()
    assert "Number of divergences" in capfd.readouterr().out


@pytest.mark.slow
def test_parallel_chains():
    # Devices have to be counted before JAX starts.
    script = """
    import numpyro
    numpyro.set_host_device_count(2)
    import warnings; warnings.filterwarnings("error", message="There are not enough devices")
    import jax, numpyro.distributions as dist, numpyro_ebm as ebm
    from numpyro.infer import MCMC
    model = lambda: numpyro.sample("x", ebm.EnergyDistribution(lambda x: 2.0 * x**2))
    mcmc = MCMC(ebm.BlackJAXKernel(model, "hmc"), num_warmup=200, num_samples=1000, num_chains=2, chain_method="parallel")
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)["x"]
    assert draws.shape == (2, 1000) and abs(draws.var() - 0.25) < 0.05, (draws.shape, draws.var())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_init_params_warmup_and_continuation():
    kernel = ebm.BlackJAXKernel(eight_schools, "hmc")
    mcmc = MCMC(kernel, num_warmup=30, num_samples=20, progress_bar=False)
    start = {"mu": jnp.array(1.0), "tau": jnp.array(0.0), "effect": jnp.zeros(8)}
    mcmc.warmup(jax.random.key(0), init_params=start, collect_warmup=True)
    assert mcmc.get_samples()["mu"].shape == (30,)
    mcmc.run(jax.random.key(1))
    first = mcmc.last_state
    mcmc.post_warmup_state = first
    mcmc.run(jax.random.key(2))
    assert int(mcmc.last_state.i) == int(first.i) + 20
    np.testing.assert_allclose(mcmc.last_state.step_size, first.step_size)


@pytest.mark.slow
def test_the_same_kernel_on_new_data_with_jit_model_args():
    def model(y):
        mu = numpyro.sample("mu", dist.Normal(0, 10))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mu, 1), obs=y)

    mcmc = MCMC(ebm.BlackJAXKernel(model, "hmc"), num_warmup=200, num_samples=500, progress_bar=False, jit_model_args=True)
    for value in (-3.0, 4.0):
        mcmc.run(jax.random.key(0), jnp.full(100, value))
        assert abs(mcmc.get_samples()["mu"].mean() - value) < 0.1


@pytest.mark.slow
def test_typed_and_raw_keys_give_the_same_chains():
    draws = []
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        mcmc = MCMC(ebm.BlackJAXKernel(eight_schools, "mala"), num_warmup=10, num_samples=10, progress_bar=False)
        mcmc.run(key)
        draws.append(mcmc.get_samples()["mu"])
    np.testing.assert_array_equal(*draws)


@pytest.mark.slow
def test_a_kernel_pickles():
    kernel = ebm.BlackJAXKernel(eight_schools, "mala")
    MCMC(kernel, num_warmup=5, num_samples=5, progress_bar=False).run(jax.random.key(0))
    back = pickle.loads(pickle.dumps(kernel))
    mcmc = MCMC(back, num_warmup=5, num_samples=5, progress_bar=False)
    mcmc.run(jax.random.key(0))
    assert mcmc.get_samples()["mu"].shape == (5,)


def test_settings_cannot_change_after_they_were_compiled():
    kernel = ebm.BlackJAXKernel(eight_schools, "mala")
    with pytest.raises(AttributeError):
        kernel.params = {}
    with pytest.raises(AttributeError):
        kernel.kernel = ebm.NUTS()


class TestEnergySites:
    params = {"t": jnp.array(4.0)}

    @pytest.mark.slow
    def test_a_subsampled_plate_does_not_temper_the_rows(self):
        # 3 of 30 rows: scaled by 10 the variance would be 0.025.
        model = lambda: precision_model(num_rows=30, batch_size=3)  # noqa: E731
        mcmc = run(ebm.BlackJAXKernel(model, "mala", params=self.params), num_samples=2000)
        check_moments(mcmc.get_samples(group_by_chain=True)["x"], 0.0, 0.25)

    @pytest.mark.slow
    def test_scale_is_honoured(self):
        model = numpyro.handlers.scale(lambda: precision_model(num_rows=3), scale=2.0)
        mcmc = run(ebm.BlackJAXKernel(model, "mala", params=self.params), num_samples=2000)
        check_moments(mcmc.get_samples(group_by_chain=True)["x"], 0.0, 0.125)

    def test_parameters_without_values_are_refused(self):
        for call in (
            lambda: run(ebm.BlackJAXKernel(precision_model), num_samples=5),
            lambda: ebm.sample(jax.random.key(0), precision_model),
        ):
            with pytest.raises(ValueError, match=r"\['t'\].*params=svi_result.params"):
                call()
        with pytest.raises(TypeError, match="params=result.params"):
            ebm.sample(jax.random.key(0), precision_model, params=[1.0])
        with pytest.raises(TypeError, match="got Independent"):
            ebm.sample(jax.random.key(0), dist.Normal(jnp.zeros(2), 1).to_event(1))

    def test_observed_rows_in_a_subsampled_plate_are_refused(self):
        def model(y):
            mu = numpyro.sample("mu", dist.Normal(0, 10))
            with numpyro.plate("rows", len(y), subsample_size=2):
                numpyro.sample("y", dist.Normal(mu, 1), obs=numpyro.subsample(y, event_dim=0))

        with pytest.raises(ValueError, match="frozen subset"):
            run(ebm.BlackJAXKernel(model), jnp.ones(10))

    def test_a_model_without_latents_is_refused(self):
        with pytest.raises(ValueError, match="no latent site, so there is nothing to sample"):
            run(ebm.BlackJAXKernel(precision_model, params=self.params), jnp.ones(10))

    @pytest.mark.slow
    def test_names_of_a_guide_among_the_params_are_left_alone(self):
        params = {**self.params, "theta_auto_loc": jnp.zeros(3)}
        draws = ebm.sample(jax.random.key(0), precision_model, "mala", params=params)
        check_moments(draws.samples["x"][..., 0], 0.0, 0.25)


class TestBlocks:
    """`sample` runs in blocks, which change nothing, so that an interruption loses nothing."""

    energy = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,))

    def draws(self, subject=energy):
        return ebm.sample(jax.random.key(0), subject, "mala", num_warmup=20, num_samples=30, num_chains=2)

    @pytest.fixture
    def blocks_of(self, monkeypatch):
        def set_length(length):
            monkeypatch.setattr(_sample, "FIRST_BLOCK", length)
            monkeypatch.setattr(_sample, "_next_length", lambda *_: length)

        return set_length

    @pytest.mark.parametrize("kind", ["distribution", "model"])
    def test_their_lengths_do_not_change_the_draws(self, kind, blocks_of):
        subject = self.energy if kind == "distribution" else lambda: numpyro.sample("x", self.energy)
        blocks_of(1000)
        whole = self.draws(subject)
        blocks_of(7)
        for one, other in zip(*(jax.tree.leaves(vars(each)) for each in (whole, self.draws(subject))), strict=True):
            np.testing.assert_array_equal(one, other)

    def test_a_block_takes_about_the_time_that_is_wanted(self):
        assert [_sample._next_length(100, taken) for taken in (0.0, 0.01, 0.25, 1.0, 100.0)] == [1600, 1600, 200, 50, 1]

    @pytest.mark.parametrize("kept", [0, 10])
    def test_an_interruption_returns_the_draws_until_then(self, kept, blocks_of, monkeypatch):
        whole, go_on, calls = self.draws(), _sample._go_on, []
        blocks_of(10)

        def block(*args, placement):
            calls.append(args)
            if len(calls) == 3 + kept // 10:
                raise KeyboardInterrupt
            return go_on(*args, placement=placement)

        monkeypatch.setattr(_sample, "_go_on", block)
        if not kept:
            with pytest.raises(KeyboardInterrupt):
                self.draws()
            return
        with pytest.warns(UserWarning, match="the first 10 of 30 draws"):
            part = self.draws()
        assert part.samples["x"].shape == (2, 10, 2)
        for name, value in {**part.samples, **part.stats}.items():
            np.testing.assert_array_equal(value, {**whole.samples, **whole.stats}[name][:, :10])


class TestSample:
    def test_a_second_call_compiles_nothing(self):
        def model():
            t = numpyro.param("t", 1.0)
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), (2,)))

        kept = []
        for i, t in enumerate((1.0, 4.0)):
            draws = ebm.sample(jax.random.key(i), model, "mala", params={"t": jnp.array(t)}, num_samples=2000)
            check_moments(draws.samples["x"], 0.0, 1 / t)
            kept.append(set(programs._kept))
        assert kept[1] <= kept[0]

    def test_a_distribution_with_rows(self):
        d = ebm.EnergyDistribution(
            lambda x, t: 0.5 * t * jnp.sum(x**2), (2,), context=jnp.array([1.0, 4.0, 9.0]), batch_shape=(3,)
        )
        draws = ebm.sample(jax.random.key(0), d, "mala", num_samples=3000)
        assert draws.samples["x"].shape == (4, 3000, 3, 2)
        assert draws.stats["acceptance_rate"].shape == (4, 3000, 3)
        for row, t in enumerate((1.0, 4.0, 9.0)):
            check_moments(draws.samples["x"][:, :, row], 0.0, 1 / t)
        assert draws.get_samples()["x"].shape == (12000, 3, 2)

    def test_starts_that_are_not_finite_are_refused(self):
        d = ebm.EnergyDistribution(lambda x: jnp.where(x == 50, x, jnp.inf))
        with pytest.raises(ValueError, match="not finite"):
            ebm.sample(jax.random.key(0), d, num_samples=5)

    @pytest.mark.slow
    def test_arguments_of_a_model_may_be_arrays_and_settings(self):
        def model(y, *, kind, n=None):
            mu = numpyro.sample("mu", dist.Normal(0, 10))
            assert kind == "rows"
            with numpyro.plate("rows", n):
                numpyro.sample("y", dist.Normal(mu, 1), obs=y)

        for value in (-2.0, 2.0):
            draws = ebm.sample(
                jax.random.key(0), model, "hmc", model_args=(np.full(50, value),), model_kwargs={"kind": "rows", "n": 50}
            )
            assert abs(draws.samples["mu"].mean() - value) < 0.1

    def test_wrong_kinds(self):
        with pytest.raises(TypeError, match="NumPyro model or an EnergyDistribution"):
            ebm.sample(jax.random.key(0), 3)
        with pytest.raises(TypeError, match="belong to a model"):
            ebm.sample(jax.random.key(0), ebm.EnergyDistribution(lambda x: x**2), params={"t": 1.0})
