"""Values that a function reads beside its arguments: compiled code that is kept must not hold old ones."""

import functools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from flax import nnx
from numpyro_ebm._reads import reads

import numpyro_ebm as ebm

SCALE = 0.5
HELPER = lambda x: x  # noqa: E731
SETTINGS = types.SimpleNamespace(scale=0.5)


class Settings:
    """Values by class attributes."""

    scale = 0.5


def energy(x):
    """A function that reads a global."""
    return SCALE * x**2


def change(monkeypatch, name, value):
    monkeypatch.setattr(f"{__name__}.{name}", value)


@pytest.mark.parametrize(
    ("function", "name", "value"),
    [
        (energy, "SCALE", 2.0),
        (lambda x: energy(x), "SCALE", 2.0),
        (jax.jit(energy), "SCALE", 2.0),
        (functools.partial(energy), "SCALE", 2.0),
        (lambda x: jax.vmap(lambda z: SCALE * z)(x), "SCALE", jnp.asarray(2.0)),
        (lambda x: HELPER(x), "HELPER", lambda x: 2 * x),
        (lambda x: SETTINGS.scale * x, "SETTINGS.scale", 2.0),
        (lambda x: Settings.scale * x, "Settings.scale", 2.0),
        (ebm.estimate(energy, "dsm", sigma=0.1), "SCALE", 2.0),
        (numpyro.handlers.seed(energy, 0), "SCALE", 2.0),
    ],
)
def test_another_global_is_seen(monkeypatch, function, name, value):
    before = reads(function)
    assert reads(function) == before
    assert hash(reads(function)) == hash(before)
    change(monkeypatch, name, value)
    assert reads(function) != before


def test_what_a_closure_holds_is_seen():
    weights, layers, seen = np.ones(2), [jnp.ones(2)], []

    def function(x):
        seen.append(1)
        return x @ weights + x @ layers[0]

    before = reads(function)
    function(jnp.ones(2))
    assert reads(function) == before  # a record is no parameter
    weights[0] = 2.0
    after = reads(function)
    assert after != before
    layers[0] = jnp.zeros(2)
    assert reads(function) != after


def test_a_module_that_was_trained_is_seen():
    net = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    dense = eqx.nn.Linear(2, 1, key=jax.random.key(0))

    def function(x):
        return net(x) + dense(x)

    before = reads(function)
    assert reads(function) == before
    net.bias[...] = jnp.ones(1)
    after = reads(function)
    assert after != before
    dense = eqx.tree_at(lambda d: d.bias, dense, jnp.ones(1))
    assert reads(function) != after


@pytest.mark.slow
def test_code_that_is_kept_sees_another_global(monkeypatch):
    def model(x=None):
        numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    d, x = ebm.EnergyDistribution(energy), jnp.array([1.0, 2.0])
    given = {"num_warmup": 20, "num_samples": 200, "num_chains": 1}
    found = []
    for scale in (0.5, 50.0):
        change(monkeypatch, "SCALE", scale)
        log_z = [float(ebm.log_partition(None, each, method="grid").value) for each in (d, model)]
        draws = [ebm.sample(jax.random.key(0), each, "nuts", **given).samples["x"] for each in (d, model)]
        found.append([*log_z, ebm.sm_loss(d, x).mean, *(float(jnp.std(each)) for each in draws)])
        np.testing.assert_allclose(ebm.sm_loss((model, {}), x).mean, found[-1][2])
        np.testing.assert_allclose(log_z, 0.5 * np.log(np.pi / scale), atol=1e-5)
    low, high = np.array(found)
    np.testing.assert_allclose(high[2], 100.0**2 * 2.5 / 2 - 100.0)
    np.testing.assert_allclose(high[3:], 0.1, atol=0.03)
    assert np.all(low[3:] > 0.5)
