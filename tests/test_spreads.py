"""Spreads told from rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from helpers import some_slow
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.spreads import eps_of, or_one, spread


@pytest.mark.parametrize("xp", [np, jnp])
@pytest.mark.parametrize("value", [0.0, 0.48, 0.3, -1e30, 1e-30])
def test_equal_numbers_have_no_spread(xp, value):
    columns = xp.stack([xp.full(601, value, xp.float32), xp.linspace(0, 1, 601, dtype=xp.float32)], axis=1)
    got = spread(columns)
    assert isinstance(got, type(columns))
    assert got[0] == 0
    np.testing.assert_allclose(got[1], np.std(np.linspace(0, 1, 601)), rtol=1e-6)
    assert or_one(got)[0] == 1


def test_rounding_is_no_spread_and_small_spreads_are():
    rng = np.random.default_rng(0)
    ulps = np.float32(0.48) * (1 + rng.integers(-1, 2, 500) * np.finfo(np.float32).eps).astype(np.float32)
    assert np.std(ulps.astype(float)) > 0
    assert spread(ulps) == 0
    assert spread(ulps.astype(float), eps=eps_of(ulps)) == 0
    small = (1.0 + 1e-4 * rng.normal(size=500)).astype(np.float32)
    np.testing.assert_allclose(spread(small), np.std(small.astype(float)), rtol=1e-5)


def test_what_does_not_count_has_no_part():
    values = jnp.array([[jnp.nan, 1.0], [2.0, 5.0], [4.0, jnp.inf], [jnp.inf, 3.0]])
    where = jnp.array([[False, True], [True, True], [True, False], [False, True]])
    np.testing.assert_allclose(spread(values, where), [1.0, np.std([1, 5, 3])], rtol=1e-6)
    np.testing.assert_array_equal(spread(values, jnp.zeros((4, 1), bool)), 0.0)


def test_no_place_is_looked_up_among_constants():
    # XLA computes an argmax over constants when it compiles: 26 seconds for a million of them.
    program = lambda *args: str(jax.make_jaxpr(spread)(*args))  # noqa: E731
    values = jnp.ones((5, 3))
    assert "argmax" not in program(values)
    assert re.search(r"i32\[1\] = argmax", program(values, jnp.ones((5, 1), bool)))


@pytest.mark.parametrize("constant", some_slow([0.48], [5.0, 0.3]))
@pytest.mark.slow
def test_a_constant_column_is_no_scale(constant):
    # The moves of minimum_velocity are a share of the narrowest column's spread, which rounding made 3e-7.
    b = jnp.asarray(np.random.default_rng(0).normal(0, 0.5, 600), jnp.float32)
    x = jnp.stack([b, jnp.full(600, constant)], axis=1)

    def model(x):
        t = numpyro.param("t", 1.0)
        energy = lambda v: 0.5 * t * v[0] ** 2 + 0.5 * (v[1] - constant) ** 2  # noqa: E731
        with numpyro.plate("rows", 600):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (2,)), obs=x)

    estimated = ebm.estimate(model, "minimum_velocity")
    svi = SVI(estimated, ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
    result = svi.run(jax.random.key(0), 300, x, progress_bar=False)
    assert result.params["t"] == pytest.approx(float(1 / jnp.mean(b**2)), rel=0.05)
