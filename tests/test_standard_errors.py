"""Sandwich standard errors against theory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import fit, precision_model, some_slow
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm._core import programs

KEY = jax.random.key(0)


def of_nce(t, nu, noise_sd):
    """Covariance of (t, c) times the number of rows, by quadrature: theorem 3 of Gutmann and Hyvarinen (2012)."""
    grid = np.linspace(-12, 12, 40_001)
    width = grid[1] - grid[0]
    density = lambda sd: np.exp(-0.5 * (grid / sd) ** 2) / (sd * np.sqrt(2 * np.pi))  # noqa: E731
    data, noise = density(t**-0.5), density(noise_sd)
    slopes = np.stack([-0.5 * grid**2, -np.ones_like(grid)])
    weights = width * data * nu * noise / (data + nu * noise)
    information = np.einsum("in,jn,n->ij", slopes, slopes, weights)
    mean = slopes @ weights
    inverse = np.linalg.inv(information)
    return inverse - (1 + 1 / nu) * np.outer(inverse @ mean, inverse @ mean)


@pytest.mark.parametrize("nu", some_slow([], [1, 5]))
@pytest.mark.usefixtures("x64")
def test_of_nce_are_those_of_its_theory(nu):
    n, t = 200_000, 4.0
    x = np.random.default_rng(0).normal(0, t**-0.5, n)
    model = ebm.estimate(precision_model, "nce", nu=nu, noise=dist.Normal(0, 0.8))
    truth = {"t": t, "x$log_normalizer": 0.5 * np.log(2 * np.pi / t)}
    result = ebm.standard_errors(KEY, model, truth, x)
    expected = of_nce(t, nu, 0.8) / n
    assert list(result.params) == ["t", "x$log_normalizer"]
    np.testing.assert_allclose(result.covariance, expected, rtol=0.03)
    np.testing.assert_allclose([*result.errors.values()], np.sqrt(np.diag(expected)), rtol=0.02)
    # Many draws in the place of one: what is left is the data's part, (E[a^2] - E[a]^2) for each row.
    many = ebm.standard_errors(KEY, model, truth, x[:20_000], num_draws=20).covariance * 20_000
    assert np.all(np.diag(many) < np.diag(expected) * n)
    alone = ebm.standard_errors(KEY, model, truth, x, names="x$log_normalizer")
    assert list(alone.errors) == ["x$log_normalizer"]
    assert alone.errors["x$log_normalizer"] < result.errors["x$log_normalizer"]


def test_of_score_matching_on_a_gaussian_are_those_of_maximum_likelihood():
    x = np.random.default_rng(0).normal(0, 0.5, 500)
    t = 1 / np.mean(x**2)
    kurtosis = np.mean(x**4) / np.mean(x**2) ** 2
    for model in (precision_model, numpyro.handlers.scale(precision_model, 7.0)):
        errors = ebm.standard_errors(KEY, ebm.estimate(model, "sm"), {"t": t}, x).errors
        np.testing.assert_allclose(errors["t"], t * np.sqrt((kurtosis - 1) / 500), rtol=1e-4)


def test_a_second_call_compiles_nothing():
    kept = []
    for seed, t in ((0, 4.0), (1, 5.0)):
        x = np.random.default_rng(seed).normal(0, 0.5, 50)
        ebm.standard_errors(KEY, ebm.estimate(precision_model, "sm"), {"t": t}, x)
        kept.append(set(programs._kept))
    assert kept[1] <= kept[0]


@pytest.mark.slow
def test_of_constrained_and_nested_parameters():
    def model(x):
        s = numpyro.param("s", 1.0, constraint=constraints.positive)
        loc = numpyro.param("net", {"loc": jnp.zeros(2)})["loc"]
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum((x - loc) ** 2) / s**2, (2,)), obs=x)

    x = np.random.default_rng(0).normal(0, 0.5, (4000, 2))
    scale = np.sqrt(np.mean((x - x.mean(axis=0)) ** 2))
    result = ebm.standard_errors(KEY, ebm.estimate(model, "sm"), {"s": scale, "net": {"loc": x.mean(axis=0)}}, x)
    np.testing.assert_allclose(result.errors["net"]["loc"], x.std(axis=0) / np.sqrt(4000), rtol=1e-3)
    np.testing.assert_allclose(result.errors["s"], 0.5 / np.sqrt(2 * 2 * 4000), rtol=0.05)


@pytest.mark.usefixtures("x64")
def test_of_a_mode_count_the_curvature_of_the_prior():
    """The loss of sm is 2 |x - m|^2: the mode is the mean shrunk by 4 n / (4 n + 1 / s^2), and so is its error."""
    num, scale = 40, 0.2
    x = np.random.default_rng(0).normal(0.5, 0.7, (num, 3))

    def model(x):
        with numpyro.plate("means", 3):  # a plate of parameters, not of rows
            m = numpyro.sample("m", dist.Normal(0, scale))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: jnp.sum((x - m) ** 2), (3,), normalized=True), obs=x)

    shrunk = 4 * num / (4 * num + 1 / scale**2)
    result = ebm.standard_errors(KEY, ebm.estimate(model, "sm"), {"m": shrunk * x.mean(axis=0)}, x)
    residuals = x - shrunk * x.mean(axis=0)
    expected = shrunk**2 * residuals.T @ residuals / num**2
    np.testing.assert_allclose(result.covariance, expected, rtol=1e-9)
    np.testing.assert_allclose(result.errors["m"], np.sqrt(np.diag(expected)), rtol=1e-9)


@pytest.mark.slow
def test_the_report_gives_log_z_with_its_error(gaussian_data):
    model = ebm.estimate(precision_model, "nce", nu=5, noise=dist.Normal(0, 0.8))
    params = fit(model, gaussian_data, steps=600)
    figures = ebm.training_report(model, params, gaussian_data).sites[0].figures
    assert figures["log_normalizer"] == params["x$log_normalizer"]
    expected = np.sqrt(of_nce(4.0, 5, 0.8)[1, 1] / 2000)
    np.testing.assert_allclose(figures["log_normalizer_se"], expected, rtol=0.1)
    assert abs(figures["log_normalizer"] - 0.5 * np.log(2 * np.pi / 4)) < 5 * expected


@pytest.mark.slow
def test_the_report_of_a_network_takes_the_energy_as_known(gaussian_data):
    def model(x):
        w = numpyro.param("w", 0.1 * jnp.arange(300.0))
        energy = lambda x: 2 * x**2 + 0.0 * jnp.sum(jnp.tanh(w * x))  # noqa: E731
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    wrapped = ebm.estimate(model, "nce", nu=5, noise=dist.Normal(0, 0.8))
    report = ebm.training_report(wrapped, {"w": np.zeros(300), "x$log_normalizer": 0.2264}, gaussian_data)
    assert "the energy's parameters taken as known" in str(report)
    known = ebm.estimate(precision_model, "nce", nu=5, noise=dist.Normal(0, 0.8))
    alone = ebm.training_report(known, {"t": 4.0, "x$log_normalizer": 0.2264}, gaussian_data).sites[0]
    assert "taken as known" not in str(alone)
    assert report.sites[0].figures["log_normalizer_se"] < 0.8 * alone.figures["log_normalizer_se"]


class TestRefusals:
    x = np.random.default_rng(0).normal(0, 0.5, 50)

    def refuse(self, message, model, values, error=ValueError, **options):
        with pytest.raises(error, match=message):
            ebm.standard_errors(KEY, model, values, self.x, **options)

    def test_what_has_no_sandwich(self):
        self.refuse("'cd' has no sandwich of its rows: only its gradient", ebm.estimate(precision_model, "cd"), {"t": 1.0})
        self.refuse(
            "'ksd' has no sandwich of its rows: its loss is of pairs", ebm.estimate(precision_model, "ksd"), {"t": 1.0}
        )
        self.refuse("as estimate returned it", precision_model, {"t": 1.0}, TypeError)

    def test_parameters_that_are_none(self):
        model = ebm.estimate(precision_model, "nce")
        values = {"t": 1.0, "x$log_normalizer": 0.0}
        self.refuse("no parameter 'x.log_normaliser'.*Did you mean", model, values, names=("x$log_normaliser",))
        self.refuse("have no value", model, {"t": 1.0})
        self.refuse("num_draws", model, {"t": 1.0}, num_draws=0)
        self.refuse("no parameters to give", model, values, names=())

    def test_no_minimum(self):
        def model(x):
            a, b = numpyro.param("a", 1.0), numpyro.param("b", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * (a + b) * x**2), obs=x)

        self.refuse("no curvature in some direction", ebm.estimate(model, "sm"), {"a": 1.0, "b": 1.0})

    def test_rows_that_are_not_all_or_none(self):
        def subsampled(x):
            return precision_model(x, batch_size=10)

        def one_event(x):
            t = numpyro.param("t", 1.0)
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), x.shape), obs=x)

        self.refuse("subsamples", ebm.estimate(subsampled, "sm"), {"t": 1.0})
        self.refuse("variance between rows", ebm.estimate(one_event, "sm"), {"t": 1.0})

    def test_latent_sites(self):
        def model(x, *, in_plate=False):
            m = numpyro.param("m", 0.0)
            prior = dist.LogNormal(0, 1)
            t = None if in_plate else numpyro.sample("t", prior)
            with numpyro.plate("rows", len(x)):
                t = numpyro.sample("t", prior) if in_plate else t
                energy = ebm.EnergyDistribution(lambda x, t: 0.5 * t * (x - m) ** 2, context=jnp.broadcast_to(t, x.shape))
                numpyro.sample("x", energy, obs=x)

        self.refuse(r"\['t'\] are latent", ebm.estimate(model, "sm"), {"m": 0.0})
        in_plate = ebm.estimate(partial(model, in_plate=True), "sm")
        self.refuse("'t' is in the plate of the rows", in_plate, {"t": np.ones(50), "m": 0.0})
