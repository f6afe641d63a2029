"""What a training says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import precision_model
from numpyro.infer import SVI, Trace_ELBO
from scipy.stats import norm

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(0, 0.5, (400, 2))


def gaussian_model(x, mask=True):
    precision = numpyro.param("precision", jnp.array([[2.0, 0.5], [0.5, 3.0]]))
    with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * v @ precision @ v, (2,)), obs=x)


PRECISION = np.array([[4.0, 1.0], [1.0, 6.0]])


def trained(name, **options):
    model = ebm.estimate(precision_model, name, **options)
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    return model, svi.run(jax.random.key(0), 5, np.linspace(-1, 1, 16), progress_bar=False)


@pytest.mark.slow
def test_a_healthy_run():
    model, result = trained("replay", buffer_size=32, reinit_prob=0.0)
    report = ebm.training_report(model, result)
    (site,) = report.sites
    assert (site.site, site.estimator, site.conditions) == ("x", "replay", ())
    assert site.figures["num_updates"] == 6
    assert site.figures["age_mean"] == 6 * 20 / 2
    assert set(report.as_dict()["x"]) == {"site", "estimator", "figures", "conditions", "notes", "held"}
    assert "acceptance_rate" in str(report)
    assert str(ebm.training_report(model, result.state)) == str(report)


@pytest.mark.slow
def test_the_report_gives_no_verdict_that_diagnose_does_not():
    """A gap that diagnose may judge, and a condition that a warning spoke of and that went, in both."""
    from numpyro_ebm.diagnostics._training import check_result
    from numpyro_ebm.diagnostics.reports import site_report
    from numpyro_ebm.estimators.state import Carried

    model, result = trained("cd")
    entry = result.state.mutable_state["x$cd"]["state"]
    for held, reported in ((0, 0), (0, 1), (1, 1)):
        flags = {"conditions": jnp.full(len(entry.health.conditions), held, bool)}
        flags["reported"] = jnp.full_like(flags["conditions"], reported)
        state = entry._replace(health=entry.health._replace(energy_gap=jnp.asarray(1e3), **flags))
        text = str(site_report(Carried("x", "cd", state), model.estimators))
        mutable = {"x$cd": {**result.state.mutable_state["x$cd"], "state": state}}
        found = check_result(result._replace(state=result.state._replace(mutable_state=mutable)))
        (chains,) = [each for each in found if each.name == "x chains"]
        assert ("none of unbounded" in text) == (chains.status == "ok") == (not held)
        assert ("held earlier in the training" in text) == (reported > held)
        assert "unusual" not in text


@pytest.mark.slow
def test_settings_that_change_what_is_estimated_are_said():
    model, result = trained("mle", num_steps=2, energy_l2=0.25, temperature=2.0, kernel="langevin")
    text = str(ebm.training_report(model, result))
    for words in ("energy_l2=0.25", "temperature 2", "'langevin' never rejects", "2 transitions from its start"):
        assert words in text
    model, result = trained("pcd")
    assert ebm.training_report(model, result).sites[0].notes == ()


@pytest.mark.slow
def test_meeting_times_are_reported():
    model, result = trained("unbiased", burn_in=2, num_steps=4)
    figures = ebm.training_report(model, result).sites[0].figures
    assert figures["max_meeting_time"] >= figures["meeting_time"] >= 1


def test_conditions_are_in_words():
    def concave(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: -(x**2)), obs=x)

    model = ebm.estimate(concave, "cd")
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    with pytest.warns(ebm.UnhealthyChainsWarning, match="unbounded"):
        state = jax.block_until_ready(svi.init(jax.random.key(0), np.linspace(-1, 1, 16)))
    assert "unbounded: the energy falls without limit" in str(ebm.training_report(model, state))


def test_what_has_no_chains_asks_for_the_data():
    model, result = trained("sm")
    with pytest.raises(ValueError, match=r"no chains.*training_report\(model, result, x\)"):
        ebm.training_report(model, result)
    model, result = trained("fd_ssm")
    with pytest.raises(ValueError, match="no chains.*nothing to report"):
        ebm.training_report(model, result, X)
    with pytest.raises(TypeError, match="as estimate returned it"):
        ebm.training_report(precision_model, result)


@pytest.mark.parametrize(
    ("name", "options"), [("sm", {}), ("ssm", {}), ("ssm_vr", {}), ("regularized_sm", {"sigma": 0.1}), ("hsm", {})]
)
def test_score_matching_reports_the_score(name, options):
    model = ebm.estimate(gaussian_model, name, **options)
    report = ebm.training_report(model, {"precision": PRECISION}, X)
    (site,) = report.sites
    assert (site.site, site.estimator, site.conditions) == ("x", name, ())
    np.testing.assert_allclose(site.figures["score_norm"], np.sqrt(np.mean((X @ PRECISION) ** 2)), rtol=1e-5)
    # Probes have the off-diagonal part of the trace as noise: 2 v1 v2 of them, over 2 dimensions.
    assert abs(site.figures["trace_per_dim"] + 5.0) < 5 / np.sqrt(8 * len(X))
    assert "score_norm" in str(report)
    assert "chains" not in str(report)


def test_at_the_optimum_of_score_matching_the_two_agree():
    model = ebm.estimate(gaussian_model, "sm")
    optimum = np.linalg.inv(X.T @ X / len(X))
    figures = ebm.training_report(model, {"precision": optimum}, X).sites[0].figures
    noise = 5 * abs(optimum[0, 1]) / np.sqrt(8 * len(X))
    assert abs(figures["score_norm"] ** 2 + figures["trace_per_dim"]) < noise + 1e-4


def test_smoothing_of_dsm_is_beside_the_datas_spread():
    model = ebm.estimate(gaussian_model, "dsm", sigma=(0.1, 0.3))
    x = X * [1, 4]
    figures = ebm.training_report(model, {"precision": PRECISION}, x=x).sites[0].figures
    expected = np.array([0.1, 0.3]) / x.std(0)
    np.testing.assert_allclose([figures["smoothing_min"], figures["smoothing_max"]], sorted(expected), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("sm", {}), ("dsm", {"sigma": 0.2}), ("nce", {})])
def test_masked_rows_take_no_part(name, options):
    keep = np.arange(400) < 300
    model = ebm.estimate(gaussian_model, name, **options)
    params = {"precision": np.diag([4.0, 6.0]), "x$log_normalizer": 0.0}
    masked = ebm.training_report(model, params, np.where(keep[:, None], X, np.nan), mask=keep)
    whole = ebm.training_report(model, params, X[:300])
    for key, value in whole.sites[0].figures.items():
        np.testing.assert_allclose(masked.sites[0].figures[key], value, rtol=0.1 if name == "nce" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 1.0, 2.0, 30.0])
def test_nce_tells_how_far_noise_and_data_overlap(shift):
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * (x - numpyro.param("m", 0.0)) ** 2), obs=x)

    num = 4000
    x = shift + norm.ppf((np.arange(num) + 0.5) / num)
    estimated = ebm.estimate(model, "nce", noise=dist.Normal(0, 1), nu=2)
    params = {"m": shift, "x$log_normalizer": 0.5 * np.log(2 * np.pi)}
    figures = ebm.training_report(estimated, params, x).sites[0].figures
    overlap = 2 * norm.cdf(-shift / 2)
    assert abs(figures["overlap"] - overlap) < 5 / np.sqrt(num)
    if shift:  # without, all is a tie
        assert abs(figures["accuracy"] - (1 - overlap / 2)) < 5 * 0.25 / np.sqrt(num)
    # At the truth data and noise pull alike: each by the harmonic mean of the densities p and nu q.
    grid = np.linspace(-10, 40, 50_001)
    p, q = norm.pdf(grid, shift), 2 * norm.pdf(grid)
    pull = 2e-3 * np.sum(p * q / np.maximum(p + q, 1e-300))
    assert abs(figures["gradient_size"] - pull) < 5 * 0.5 / np.sqrt(num)


@pytest.mark.slow
def test_what_fit_returns_is_reported():
    model = ebm.estimate(gaussian_model, {"x": "ssm_vr"})
    svi = SVI(model, ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
    result = ebm.fit(jax.random.key(0), svi, 20, X, check_every=10, progress_bar=False)
    report = ebm.training_report(model, result, X)
    assert report.as_dict() == ebm.training_report(model, result.params, X).as_dict()
    with pytest.raises(ebm.EnergyError, match=r"unconstrained form.*svi.get_params\(state\)"):
        ebm.training_report(model, result.state, X)
    with pytest.raises(ebm.EnergyError, match=r"\['precision'\] have no value"):
        ebm.training_report(model, {}, X)
    model, result = trained("pcd")
    assert str(ebm.training_report(model, result)) == str(ebm.training_report(model, result.state))


def test_latent_sites_need_their_values():
    def bayesian(x):
        t = numpyro.sample("t", dist.Gamma(1.0, 1.0))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)

    model = ebm.estimate(bayesian, "sm")
    x = X[:, 0]
    with pytest.raises(ebm.EnergyError, match=r"\['t'\] are latent.*guide.median\(params\)"):
        ebm.training_report(model, {"t_auto_loc": 0.0}, x)
    figures = ebm.training_report(model, {"t": 4.0}, x).sites[0].figures
    expected = {"score_norm": 4 * np.sqrt(np.mean(x**2)), "trace_per_dim": -4}
    assert figures == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_chains_and_data_in_one_report():
    def model():
        s, t = numpyro.param("s", 4.0), numpyro.param("t", 4.0)
        with numpyro.plate("rows", len(X)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=X[:, 0])
            numpyro.sample("y", ebm.EnergyDistribution(lambda x: 0.5 * s * x**2), obs=X[:, 1])

    model = ebm.estimate(model, {"x": "pcd", "y": "sm"})
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    result = ebm.fit(jax.random.key(0), svi, 2, progress_bar=False)
    text, report = str(ebm.training_report(model, result)), ebm.training_report(model, result).as_dict()
    assert report["x"]["figures"].keys() >= {"acceptance_rate", "num_updates"}
    assert report["y"]["figures"].keys() == {"score_norm", "trace_per_dim"}
    both = svi.get_params(result.state) | result.state.mutable_state
    assert str(ebm.training_report(model, both)) == text


def test_parameters_of_the_estimator_need_values_as_well():
    model, x = ebm.estimate(precision_model, "nce"), np.linspace(-1.0, 1.0, 20)
    with pytest.raises(ebm.EnergyError, match=r"x\$log_normalizer.*no value"):
        ebm.training_report(model, {"t": 1.0}, x)
