"""`to_arviz` under ArviZ 0.23 and 1.x."""

from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
import xarray
from helpers import precision_model, some_slow
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO

import numpyro_ebm as ebm

PARAMS = {"t": jnp.array(4.0)}


def variables(data, group):
    return set(data[group].data_vars)


def groups_of(data):
    names = data.groups() if callable(getattr(data, "groups", None)) else data.groups
    return {name.strip("/") for name in names} - {""}


@pytest.fixture(scope="module")
def mcmc():
    mcmc = MCMC(
        ebm.BlackJAXKernel(lambda: precision_model(num_rows=3), "nuts", params=PARAMS),
        num_warmup=100,
        num_samples=100,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    return mcmc


@pytest.fixture(scope="module")
def draws():
    return ebm.sample(
        jax.random.key(0), lambda: precision_model(num_rows=3), "nuts", params=PARAMS, num_warmup=100, num_samples=100
    )


@pytest.mark.parametrize("kind", some_slow(["mcmc"], ["draws"]))
def test_groups_shapes_and_statistics(kind, request):
    data = ebm.to_arviz(request.getfixturevalue(kind))
    assert groups_of(data) == {"posterior", "sample_stats"}
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": 100, "x_dim_0": 3}
    expected = {"acceptance_rate", "diverging", "energy", "n_steps", "nonfinite", "step_size", "tree_depth"}
    assert variables(data, "sample_stats") == expected | ({"lp"} if kind == "mcmc" else set())
    assert data["sample_stats"]["diverging"].dtype == bool
    assert float(arviz.rhat(data)["x"].max()) < 1.1
    assert float(arviz.ess(data)["x"].min()) > 50


@pytest.mark.parametrize("kernel", ["langevin", "mala", "hmc"])
def test_only_statistics_that_mean_something(kernel):
    draws = ebm.sample(jax.random.key(0), ebm.EnergyDistribution(lambda x: x**2), kernel, num_warmup=10, num_samples=10)
    names = variables(ebm.to_arviz(draws), "sample_stats")
    assert ("energy" in names) == (kernel == "hmc")
    assert ("acceptance_rate" in names) == (kernel != "langevin")
    assert "tree_depth" not in names


@pytest.mark.slow
def test_numpyro_kernels_and_observed_energy_sites_have_no_log_likelihood():
    def model(x):
        z = numpyro.sample("z", numpyro.distributions.Normal(0, 1))
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2), obs=x)
        numpyro.sample("y", numpyro.distributions.Normal(z, 1), obs=0.3)

    run = MCMC(NUTS(model), num_warmup=10, num_samples=20, num_chains=1, progress_bar=False)
    run.run(jax.random.key(0), 1.0)
    data = ebm.to_arviz(run, observed_data={"y": np.array([0.3])})
    assert groups_of(data) == {"posterior", "sample_stats", "observed_data"}
    with pytest.raises(Exception, match="log.likelihood"):
        arviz.loo(data)


def test_dims_coords_and_other_groups(draws):
    predictive = np.zeros((400, 2), np.float32)
    data = ebm.to_arviz(
        draws,
        posterior_predictive={"y": predictive},
        prior={"x": np.zeros((7, 3))},
        observed_data={"x": np.zeros(3)},
        dims={"x": ["row"]},
        coords={"row": ["a", "b", "c"]},
    )
    assert list(data["posterior"]["x"].coords["row"].values) == ["a", "b", "c"]
    assert data["posterior_predictive"]["y"].shape == (4, 100, 2)
    assert data["prior"]["x"].shape == (1, 7, 3)
    assert data["observed_data"]["x"].dims == ("row",)


def test_netcdf_round_trip(tmp_path, mcmc):
    data = ebm.to_arviz(mcmc)
    path = tmp_path / "draws.nc"
    data.to_netcdf(path)
    back = arviz.from_netcdf(path)
    np.testing.assert_array_equal(back["posterior"]["x"].values, data["posterior"]["x"].values)
    assert variables(back, "sample_stats") == variables(data, "sample_stats")


def test_half_precision_is_widened(tmp_path):
    data = ebm.to_arviz({"x": jnp.ones((2, 5), jnp.bfloat16)})
    assert data["posterior"]["x"].dtype == np.float32
    data.to_netcdf(tmp_path / "half.nc")


def test_an_mcmc_that_has_not_run():
    with pytest.raises(ValueError, match="no draws yet"):
        ebm.to_arviz(MCMC(ebm.BlackJAXKernel(precision_model), num_warmup=1, num_samples=1))


def test_predictive_draws_of_another_length(draws):
    with pytest.raises(ValueError, match="posterior_predictive"):
        ebm.to_arviz(draws, posterior_predictive={"y": np.zeros((3, 2))})


class LogZ(NamedTuple):
    value: Any
    standard_error: Any
    bound: str | None = None


@pytest.fixture(scope="module")
def likelihoods():
    """Of 20 rows under N(mean, 1 / t), with and without log Z, and log Z per draw."""
    rng = np.random.default_rng(0)
    x, t, mean = rng.normal(0, 1, 20), rng.gamma(100, 0.01, (4, 50)), rng.normal(0, 0.1, (4, 50))
    unnormalised = -0.5 * t[..., None] * (x - mean[..., None]) ** 2
    log_z = 0.5 * np.log(2 * np.pi / t)
    exact = numpyro.distributions.Normal(mean[..., None], t[..., None] ** -0.5).log_prob(x)
    return {"t": t, "mean": mean}, unnormalised, log_z, np.asarray(exact)


class TestLogLikelihood:
    def test_loo_is_that_of_the_normalised_model(self, likelihoods):
        samples, values, log_z, exact = likelihoods
        known = ebm.to_arviz(samples, log_likelihood={"x": exact}, log_partition={"x": None})
        for value, shape in (
            (log_z, values.shape),
            (log_z.reshape(-1), (200, 20)),
            (log_z[..., None] + np.zeros(20), values.shape),
        ):
            ours = ebm.to_arviz(
                samples,
                log_likelihood={"x": values.reshape(shape)},
                log_partition={"x": LogZ(value, np.full(value.shape, 0.01))},
            )
            np.testing.assert_allclose(ours["log_likelihood"]["x"].values, exact, rtol=1e-4, atol=1e-5)
            first, second = (arviz.loo(data) for data in (ours, known))
            for name in ("elpd", "elpd_loo"):  # as ArviZ 1 and 0.23 call it
                if hasattr(first, name):
                    np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-5)
        assert not [key for key in known["log_likelihood"].attrs if key.startswith("x_")]

    def test_the_error_of_log_z_is_noted(self, tmp_path, likelihoods):
        samples, values, log_z, _ = likelihoods
        for bound, words in (("lower", "optimistic"), ("upper", "pessimistic"), (None, "all 20 rows share")):
            data = ebm.to_arviz(
                samples, log_likelihood={"x": values}, log_partition={"x": LogZ(log_z, np.full((4, 50), 0.03), bound)}
            )
            data.to_netcdf(tmp_path / f"{bound}.nc")
            attrs = arviz.from_netcdf(tmp_path / f"{bound}.nc")["log_likelihood"].attrs
            assert attrs["x_log_partition_standard_error"] == 0.03
            assert attrs["x_log_partition_bound"] == str(bound).lower()
            assert words in attrs["x_note"]
            assert ("bound" in attrs["x_note"]) == (bound is not None)

    def test_one_log_z_where_the_energy_is_one(self):
        values = np.broadcast_to(-0.5 * np.arange(3.0) ** 2, (2, 5, 3))
        log_z = np.array([1.0, 2.0, 3.0])
        for value in (log_z[0], log_z):
            log_partition = {"x": LogZ(value, 0 * value)}
            data = ebm.to_arviz({"z": np.ones((2, 5))}, log_likelihood={"x": values}, log_partition=log_partition)
            np.testing.assert_allclose(data["log_likelihood"]["x"].values, values - value)
            assert "share" not in data["log_likelihood"].attrs["x_note"]

    @pytest.mark.parametrize(
        ("log_partition", "words"),
        [
            ({}, r"\['x'\] came without log Z.*normalised site write \{'x': None\}"),
            ({"x": None, "y": None}, r"\['y'\], which log_likelihood does not have"),
            ({"x": LogZ(1.0, 0.1)}, r"'x': the energy differs from draw to draw.*shape \(4, 50\)"),
            ({"x": LogZ(np.ones(20), np.ones(20))}, "differs from draw to draw"),
            ({"x": LogZ(np.ones(4), np.ones(4))}, r"shape \(4,\); it needs one value per draw, \(4, 50\)"),
            ({"x": LogZ(np.ones((4, 50)), 0.1)}, "its standard error"),
            ({"x": LogZ(np.full((4, 50), np.nan), np.ones((4, 50)))}, "200 of 200 values of log Z are not finite"),
        ],
    )
    def test_log_z_that_does_not_fit(self, likelihoods, log_partition, words):
        samples, values, *_ = likelihoods
        with pytest.raises(ebm.EnergyError, match=words):
            ebm.to_arviz(samples, log_likelihood={"x": values}, log_partition=log_partition)

    def test_what_may_be_per_row_or_per_draw(self, likelihoods):
        values = np.zeros((4, 5, 20))
        with pytest.raises(ebm.EnergyError, match="per draw or one per row"):
            ebm.to_arviz(
                {"x": np.ones((4, 5))}, log_likelihood={"x": values}, log_partition={"x": LogZ(np.ones(20), np.ones(20))}
            )
        with pytest.raises(TypeError, match="needs a value and a standard_error"):
            ebm.to_arviz({"x": np.ones((4, 5))}, log_likelihood={"x": values}, log_partition={"x": 1.0})


@pytest.fixture(scope="module")
def trained():
    svi = SVI(ebm.estimate(precision_model, "pcd"), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    x = np.random.default_rng(0).normal(0, 0.5, 64)
    return ebm.fit(jax.random.key(0), svi, 120, x, check_every=2, record_chains=8, progress_bar=False)


class TestTraining:
    @pytest.mark.slow
    def test_the_chains_are_a_group_of_their_own(self, trained, draws, tmp_path):
        assert groups_of(ebm.to_arviz(trained)) == {"training", "training_stats"}
        data = ebm.to_arviz(draws, training=trained)
        assert groups_of(data) == {"posterior", "sample_stats", "training", "training_stats"}
        data.to_netcdf(tmp_path / "training.nc")
        back = arviz.from_netcdf(tmp_path / "training.nc")
        chains = arviz.convert_to_dataset(back, group="training")
        assert chains["x"].dims == chains["x_energy"].dims == ("chain", "draw")
        np.testing.assert_array_equal(chains["draw"], 2 * np.arange(1, 61))
        assert float(arviz.rhat(chains)["x"]) < 1.2
        assert 40 < float(arviz.ess(chains)["x_energy"]) < 2000
        arviz.plot_rank(chains)
        assert arviz.summary(data, group="training").shape[0] == 2
        assert back["training_stats"]["loss"].dims == ("update",)
        np.testing.assert_allclose(back["training_stats"]["loss"].values, trained.losses, rtol=1e-6)

    def test_held_out_losses_have_their_steps(self):
        svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        x = np.random.default_rng(0).normal(0, 0.5, 20)
        result = ebm.fit(jax.random.key(0), svi, 4, x, check_every=2, held_out=(x,), progress_bar=False)
        data = ebm.to_arviz(result)
        assert groups_of(data) == {"training_stats"}
        np.testing.assert_array_equal(data["training_stats"]["held_out_loss"]["check"], [0, 2, 4])

    @pytest.mark.slow
    def test_refusals(self, trained):
        with pytest.raises(TypeError, match="two results of fit"):
            ebm.to_arviz(trained, training=trained)
        with pytest.raises(TypeError, match="what fit returned; got dict"):
            ebm.to_arviz({"x": np.ones((2, 5))}, training={})
        with pytest.raises(ebm.EnergyError, match="needs draws, and there are none"):
            ebm.to_arviz(trained, posterior_predictive={"x": np.ones(5)})


@pytest.mark.slow
def test_zarr_round_trip(tmp_path, mcmc, trained):
    pytest.importorskip("zarr")
    data = ebm.to_arviz(
        mcmc, training=trained, log_likelihood={"x": np.zeros((4, 100, 3))}, log_partition={"x": LogZ(0.0, 0.1)}
    )
    # ArviZ 0.23 has no zarr 3 of its own, and says to go by DataTree.
    tree = data.to_datatree() if hasattr(data, "to_datatree") else data
    tree.to_zarr(tmp_path / "draws.zarr", consolidated=False)
    with xarray.open_datatree(tmp_path / "draws.zarr", engine="zarr", consolidated=False) as opened:
        back = arviz.InferenceData.from_datatree(opened) if hasattr(data, "to_datatree") else opened
        assert groups_of(back) == groups_of(data)
        np.testing.assert_array_equal(back["posterior"]["x"].values, data["posterior"]["x"].values)
        assert back["sample_stats"]["diverging"].dtype == bool
        assert back["log_likelihood"].attrs["x_note"] == data["log_likelihood"].attrs["x_note"]


def test_prior_predictive_draws():
    data = ebm.to_arviz({"x": np.zeros((2, 5))}, prior={"t": np.ones(7)}, prior_predictive={"x": np.ones((7, 3))})
    assert data["prior_predictive"]["x"].shape == (1, 7, 3)
    assert data["prior"]["t"].shape == (1, 7)
