"""Front doors: random keys, what holds an array, and a place outside of jit."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pandas as pd
import pytest
import xarray as xr
from numpyro.infer import MCMC, SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.inputs import as_arrays

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(0, 0.5, (40, 2))
NORMAL = ebm.EnergyDistribution(lambda v: jnp.sum(v**2) / 2, (2,))
LOG_Z = ebm.LogPartition(jnp.log(2 * jnp.pi), jnp.zeros(()), jnp.inf, None)


def model(x):
    t = numpyro.param("t", jnp.ones(()), constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(x), subsample_size=20):
        batch = numpyro.subsample(x, event_dim=1)
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: t * jnp.sum(v**2) / 2, (2,)), obs=batch)


def whole(x):
    t = numpyro.param("t", jnp.ones(()), constraint=dist.constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: t * jnp.sum(v**2) / 2, (2,)), obs=x)


def regression(x):
    slope = numpyro.sample("slope", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(slope * x, 1).to_event(1), obs=x)


ESTIMATED = ebm.estimate(whole, "sm")
PARAMS = {"t": jnp.asarray(1 / np.mean(X**2))}  # the minimum of the score matching loss


def svi_of(fn):
    return SVI(ebm.estimate(fn, "sm"), ebm.empty_guide, optax.adam(0.05), Trace_ELBO())


def fit(x, rng_key=KEY, fn=model, **options):
    return ebm.fit(rng_key, svi_of(fn), 5, x, progress_bar=False, **options)


def short_chains(rng_key=KEY, subject=NORMAL, **options):
    return ebm.sample(rng_key, subject, "mala", num_warmup=3, num_samples=4, num_chains=1, **options)


WITH_KEYS = {
    "sample": short_chains,
    "fit": lambda key: fit(X, key),
    "log_partition": lambda key: ebm.log_partition(key, NORMAL, method="importance"),
    "log_partition_bounds": lambda key: ebm.log_partition_bounds(key, NORMAL),
    "evaluate": lambda key: ebm.evaluate(key, {"normal": NORMAL}, X),
    "standard_errors": lambda key: ebm.standard_errors(key, ESTIMATED, PARAMS, X),
    "ksd_test": lambda key: ebm.ksd_test(key, NORMAL, X),
    "mmd": lambda key: ebm.mmd(key, X, X),
    "classifier_two_sample_test": lambda key: ebm.classifier_two_sample_test(key, X, X),
    "EnergyDistribution.sample": lambda key: NORMAL.sample(key, (3,)),
    "ChainSampler": lambda key: ebm.ChainSampler()(key, NORMAL, (3,)),
    "AnnealedLangevin": lambda key: ebm.AnnealedLangevin([1.0, 0.1])(key, NORMAL, (3,)),
    "ReverseSDE": lambda key: ebm.ReverseSDE(ebm.VE(0.01, 5.0))(key, NORMAL, (3,)),
}


@pytest.mark.parametrize("owner", WITH_KEYS)
@pytest.mark.parametrize("key", [7, None, jnp.ones(3), jax.random.split(KEY, 2)], ids=["seed", "None", "array", "keys"])
def test_a_key_that_is_none_is_refused_with_the_line_to_write(owner, key):
    with pytest.raises(ebm.EnergyError, match=rf"jax\.random\.key\({7 if isinstance(key, int) else 0}\)|seed\(model, 0\)"):
        WITH_KEYS[owner](key)


@pytest.mark.parametrize("key", [7, None])
def test_a_seed_in_mcmc(key):
    mcmc = MCMC(ebm.BlackJAXKernel(regression), num_warmup=1, num_samples=1, progress_bar=False)
    with pytest.raises(ebm.EnergyError, match=r"MCMC\.run needs a random key.*jax\.random\.key\("):
        mcmc.run(key, X[:, 0])


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), np.asarray(jax.random.PRNGKey(0)), jax.random.key(0, impl="rbg")])
def test_every_kind_of_key_is_taken(key):
    assert NORMAL.sample(key, (0,)).shape == (0, 2)


HOLDERS = {
    "DataFrame": lambda x: pd.DataFrame(x, columns=["a", "b"][: x.shape[1]]),
    "DataArray": lambda x: xr.DataArray(x, dims=["row", "column"]),
    "list": lambda x: x.tolist(),
}


class TestWhatHoldsAnArray:
    @pytest.mark.parametrize("holder", HOLDERS.values(), ids=HOLDERS)
    def test_it_is_the_array(self, holder):
        args, kwargs = as_arrays("fit", ((holder(X), 3), {"y": holder(X[:, :1])}))
        np.testing.assert_array_equal(args[0], X)
        np.testing.assert_array_equal(kwargs["y"], X[:, :1])
        assert isinstance(args[0], np.ndarray)
        assert args[1] == 3

    @pytest.mark.slow
    def test_every_door_takes_it(self):
        x, half = HOLDERS["DataFrame"](X), HOLDERS["list"](X[:20])
        result, expected = fit(x, held_out=(half,)), fit(X, held_out=(X[:20],))
        np.testing.assert_array_equal(result.losses, expected.losses)
        np.testing.assert_array_equal(result.held_out_losses, expected.held_out_losses)
        likelihood = lambda rows: ebm.log_likelihood(whole, PARAMS, rows, log_partition=LOG_Z)  # noqa: E731
        np.testing.assert_array_equal(likelihood(x).rows, likelihood(X).rows)
        assert str(ebm.training_report(ESTIMATED, PARAMS, x)) == str(ebm.training_report(ESTIMATED, PARAMS, X))
        assert ebm.standard_errors(KEY, ESTIMATED, PARAMS, x).errors["t"] > 0
        assert str(ebm.diagnose({"x": X[None]}, data=x)) == str(ebm.diagnose({"x": X[None]}, data=X))
        assert str(ebm.evaluate(KEY, {"normal": NORMAL, "model": (whole, PARAMS)}, x, measures="sm"))

    def test_arguments_of_a_sampled_model_and_of_log_partition(self):
        series = pd.Series(X[:, 0])
        draws = [short_chains(subject=regression, model_args=(x,)).samples["slope"] for x in (series, X[:, 0])]
        np.testing.assert_array_equal(*draws)

        def shifted(mean):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: (v - jnp.asarray(mean)[0]) ** 2))

        values = [ebm.log_partition(None, shifted, method="grid", model_args=(m,)).value for m in ([0.5], np.array([0.5]))]
        assert values[0] == values[1]

    def test_everything_else_stays_as_it_is(self):
        seen = []

        def curious(x, sizes, name, function, mixed):
            seen.append((sizes, name, function, mixed))
            whole(x)

        mixed = [X[0], "a"]
        fit(X, fn=lambda x: curious(x, (2, 3), "word", np.mean, mixed))
        assert seen[0] == ((2, 3), "word", np.mean, mixed)

    REFUSED = {
        "generator": (lambda: (row for row in X), r"which yields its rows only once.*batches=loader, data_size=num_rows"),
        "map": (lambda: map(np.sum, X), "a map, which yields its rows only once"),
        "table with words": (lambda: pd.DataFrame({"a": X[:, 0], "b": "word"}), r"dtype object.*to_numpy\(dtype=float\)"),
        "masked array": (lambda: np.ma.masked_less(X, 0.0), r"x\.filled\(np\.nan\)"),
    }

    @pytest.mark.parametrize("name", REFUSED)
    @pytest.mark.parametrize(
        "door",
        [
            fit,
            lambda x: fit(X, held_out=(x,)),
            lambda x: ebm.log_likelihood(NORMAL, None, x, log_partition=LOG_Z),
            lambda x: ebm.diagnose({"x": X[None]}, data=x),
            lambda x: ebm.Empirical(x),
            lambda x: ebm.mmd(KEY, X, x),
            lambda x: short_chains(subject=regression, model_args=(x,)),
        ],
        ids=["fit", "held-out", "log_likelihood", "diagnose", "Empirical", "mmd", "sample"],
    )
    def test_what_holds_none_is_refused(self, name, door):
        make, message = self.REFUSED[name]
        with pytest.raises((ebm.EnergyError, TypeError), match=message):
            door(make())


INSIDE = {
    "sample": lambda x: short_chains().samples["x"],
    "fit": lambda x: fit(x).params,
    "log_likelihood": lambda x: ebm.log_likelihood(NORMAL, None, x, log_partition=LOG_Z).mean,
    "diagnose": lambda x: ebm.diagnose(ESTIMATED, PARAMS, x).is_healthy,
    "training_report": lambda x: ebm.training_report(ESTIMATED, PARAMS, x).as_dict(),
    "standard_errors": lambda x: ebm.standard_errors(KEY, ESTIMATED, PARAMS, x).errors,
    "evaluate": lambda x: ebm.evaluate(KEY, {"normal": NORMAL}, x).as_dict(),
    "log_partition": lambda x: ebm.log_partition(None, NORMAL, method="grid").value,
}


@pytest.mark.parametrize("owner", INSIDE)
def test_inside_jit_a_door_explains_itself(owner):
    with pytest.raises(ebm.EnergyError, match=f"{owner} needs concrete values.*Call it outside"):
        jax.jit(INSIDE[owner])(X)


def test_draws_inside_jit():
    with pytest.raises(ebm.EnergyError, match="diagnose needs concrete values"):
        jax.jit(lambda x: ebm.diagnose({"x": x}).is_healthy)(X[None])


def test_a_density_under_vmap():
    with pytest.raises(ebm.EnergyError, match="batch_shape"):
        jax.vmap(lambda a: short_chains(subject=ebm.EnergyDistribution(lambda v: a * v**2)).samples["x"])(jnp.ones(2))
