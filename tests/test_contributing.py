"""The worked example of CONTRIBUTING.md is an estimator like the others."""

import re
from pathlib import Path

import jax
import numpy as np
import numpyro
import pytest
from helpers import fit, precision_model

import numpyro_ebm as ebm
from numpyro_ebm.estimators.names import ESTIMATORS

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def example():
    names = {}
    exec(CODE, names)  # noqa: S102
    return names["AntitheticScoreMatching"]


def test_it_is_forty_lines():
    assert CODE[CODE.index("@dataclasses") :].count("\n") <= 40


def test_it_recovers_the_precision_of_the_smoothed_data(example, gaussian_data):
    params = fit(ebm.estimate(precision_model, example(sigma=0.2)), gaussian_data)
    np.testing.assert_allclose(params["t"], 1 / (np.mean(gaussian_data**2) + 0.04), atol=0.1)


def test_a_line_in_the_table_gives_it_a_name(example, gaussian_data, monkeypatch):
    monkeypatch.setitem(ESTIMATORS.classes, "antithetic_dsm", example)
    assert "antithetic_dsm" in ebm.available_estimators()
    by_name = ebm.estimate(precision_model, "antithetic_dsm", sigma=0.2)
    seeded = [numpyro.handlers.seed(m, jax.random.key(0)) for m in (by_name, ebm.estimate(precision_model, example(0.2)))]
    traces = [numpyro.handlers.trace(model).get_trace(gaussian_data[:5]) for model in seeded]
    values = [trace["x"]["fn"].log_prob(gaussian_data[:5]) for trace in traces]
    np.testing.assert_array_equal(*values)


def test_its_options_are_checked(example):
    with pytest.raises(ValueError, match="needs sigma > 0"):
        example(sigma=-1.0)
