"""`to_arviz` under ArviZ 0.23 and 1.x."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from helpers import precision_model
from numpyro.infer import MCMC, NUTS

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


@pytest.mark.parametrize("kind", ["mcmc", "draws"])
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
