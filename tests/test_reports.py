"""What a training says of itself."""

import jax
import numpy as np
import optax
import pytest
from helpers import precision_model
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm


def trained(name, **options):
    model = ebm.estimate(precision_model, name, **options)
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    return model, svi.run(jax.random.key(0), 5, np.linspace(-1, 1, 16), progress_bar=False)


def test_a_healthy_run():
    model, result = trained("replay", buffer_size=32, reinit_prob=0.0)
    report = ebm.training_report(model, result)
    (site,) = report.sites
    assert (site.site, site.estimator, site.conditions) == ("x", "replay", ())
    assert site.figures["num_updates"] == 6
    assert site.figures["age_mean"] == 6 * 20 / 2
    assert set(report.as_dict()["x"]) == {"site", "estimator", "figures", "conditions", "notes"}
    assert "acceptance_rate" in str(report)
    assert str(ebm.training_report(model, result.state)) == str(report)


def test_settings_that_change_what_is_estimated_are_said():
    model, result = trained("mle", num_steps=2, energy_l2=0.25, temperature=2.0, kernel="langevin")
    text = str(ebm.training_report(model, result))
    for words in ("energy_l2=0.25", "temperature 2", "'langevin' never rejects", "2 transitions from its start"):
        assert words in text
    model, result = trained("pcd")
    assert ebm.training_report(model, result).sites[0].notes == ()


def test_meeting_times_are_reported():
    model, result = trained("unbiased", burn_in=2, num_steps=4)
    figures = ebm.training_report(model, result).sites[0].figures
    assert figures["max_meeting_time"] >= figures["meeting_time"] >= 1


def test_conditions_are_in_words():
    def concave(x):
        import numpyro

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: -(x**2)), obs=x)

    model = ebm.estimate(concave, "cd")
    svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    with pytest.warns(ebm.UnhealthyChainsWarning, match="unbounded"):
        state = jax.block_until_ready(svi.init(jax.random.key(0), np.linspace(-1, 1, 16)))
    assert "unbounded: the energy falls without limit" in str(ebm.training_report(model, state))


def test_what_has_no_chains_has_no_report():
    model, result = trained("sm")
    with pytest.raises(ValueError, match="no chains"):
        ebm.training_report(model, result)
    with pytest.raises(TypeError, match="as estimate returned it"):
        ebm.training_report(precision_model, result)
