"""Compiled programs that are kept: they answer with what a function reads now, and serve all that compute the same."""

import collections
import functools
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from flax import nnx
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core import programs
from numpyro_ebm._core.digests import digest
from numpyro_ebm._core.programs import MOST_KEPT, call, compiled, trace

KEY = jax.random.key(0)
ROWS = jnp.array([1.0, 2.0])
SCALE = 0.5
HELPER = lambda x: 0.5 * x**2  # noqa: E731
SETTINGS = types.SimpleNamespace(scale=0.5)
LIST, DEQUE, DICT = [0.5], collections.deque([0.5]), {"scale": 0.5}
LARGE = np.full(2**20, 0.5)


class Settings:
    """A class attribute, and a method that reads it."""

    scale = 0.5

    def energy(self, x):
        """An energy."""
        return self.scale * x**2

    def __call__(self, x):
        """The same through a helper."""
        return self.energy(x)


class Numbered(nnx.Module):
    """A network whose submodule holds a number that is no parameter."""

    def __init__(self):
        self.inner = Settings()

    def __call__(self, x):
        """An energy."""
        return self.inner.energy(x)


def set_to(monkeypatch, name, value):
    monkeypatch.setattr(f"{__name__}.{name}", value)


@pytest.fixture(autouse=True)
def _values_as_they_were():
    yield
    LIST[0] = DEQUE[0] = LARGE[0] = 0.5


def put(values, new):
    values[0] = new


NUMBERED, SETTING = Numbered(), Settings()
CHANGES = {
    "global": (lambda x: SCALE * x**2, lambda m: set_to(m, "SCALE", 50.0)),
    "global array": (lambda x: SCALE * x**2, lambda m: set_to(m, "SCALE", jnp.asarray(50.0))),
    "helper": (lambda x: HELPER(x), lambda m: set_to(m, "HELPER", lambda x: 50 * x**2)),
    "partial": (functools.partial(lambda s, x: SCALE * s * x**2, 1.0), lambda m: set_to(m, "SCALE", 50.0)),
    "attribute": (lambda x: SETTINGS.scale * x**2, lambda m: m.setattr(SETTINGS, "scale", 50.0)),
    "class attribute": (lambda x: Settings.scale * x**2, lambda m: m.setattr(Settings, "scale", 50.0)),
    "method": (SETTING.energy, lambda m: m.setattr(SETTING, "scale", 50.0, raising=False)),
    "helper method": (SETTING, lambda m: m.setattr(Settings, "energy", lambda self, x: 50 * x**2)),
    "number of a submodule": (NUMBERED, lambda m: m.setattr(NUMBERED.inner, "scale", 50.0, raising=False)),
    "list": (lambda x: LIST[0] * x**2, lambda m: put(LIST, 50.0)),
    "deque": (lambda x: DEQUE[0] * x**2, lambda m: put(DEQUE, 50.0)),
    "dict": (lambda x: DICT["scale"] * x**2, lambda m: m.setitem(DICT, "scale", 50.0)),
    "name made at run time": (lambda x: globals()["SCA" + "LE"] * x**2, lambda m: set_to(m, "SCALE", 50.0)),
    "inside a condition": (lambda x: jnp.where(x > -9, LIST[0], 7.0) * x**2, lambda m: put(LIST, 50.0)),
    "inside a loop": (
        lambda x: jax.lax.fori_loop(0, 1, lambda i, y: y * LIST[0], x**2),
        lambda m: put(LIST, 50.0),
    ),
    "8 MiB array": (lambda x: LARGE[0] * x**2, lambda m: put(LARGE, 50.0)),
    "8 MiB array as a whole": (lambda x: jnp.max(jnp.asarray(LARGE)) * x**2, lambda m: put(LARGE, 50.0)),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_an_energy_reads_is_read_at_each_call(monkeypatch, kind):
    energy, change = CHANGES[kind]
    losses = lambda: ebm.sm_loss(ebm.EnergyDistribution(energy), ROWS).mean  # noqa: E731
    np.testing.assert_allclose(losses(), 5 * 0.5**2 - 1.0, rtol=1e-5)
    change(monkeypatch)
    np.testing.assert_allclose(losses(), 5 * 50.0**2 - 100.0, rtol=1e-5)


def test_a_module_that_was_trained_is_read():
    net, dense = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), eqx.nn.Linear(2, 1, key=KEY)

    def energy(x):
        return (net(x) + dense(x))[0]

    x = jnp.ones(2)
    before = compiled(energy, x)
    net.bias[...] = net.bias[...] + 1.0
    np.testing.assert_allclose(compiled(energy, x), before + 1.0, rtol=1e-6)
    num_kept = len(programs._kept)
    dense = eqx.tree_at(lambda d: d.bias, dense, dense.bias + 2.0)
    np.testing.assert_allclose(compiled(energy, x), before + 3.0, rtol=1e-6)
    assert len(programs._kept) == num_kept  # other arrays are no other program


@pytest.mark.slow
def test_every_front_door_reads_at_each_call():
    energy = CHANGES["list"][0]
    sampler = ebm.ChainSampler("mala", num_warmup=100, num_steps=20)
    d = ebm.EnergyDistribution(energy, sampler=sampler)
    leveled = ebm.EnergyDistribution(lambda x, sigma: x**2 / (1 / LIST[0] + 2 * sigma**2), context=jnp.asarray(0.01))
    annealed = ebm.AnnealedLangevin(ebm.geometric_sigmas(1.0, 0.01, 8), steps_per_sigma=30)
    flow = ebm.ProbabilityFlow(ebm.VE(0.01, 10.0))

    def model(x=None):
        numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    given = {"num_warmup": 50, "num_samples": 200, "num_chains": 2}

    def found():
        log_z = ebm.log_partition(None, d, method="grid")
        bounds = ebm.log_partition_bounds(KEY, d, num_levels=50, num_chains=50)
        return {
            "log Z": [log_z.value, ebm.log_partition(None, model, method="grid").value, bounds.lower.value],
            "deviation": [
                *(jnp.std(ebm.sample(KEY, each, "nuts", **given).samples["x"]) for each in (d, model)),
                jnp.std(d.sample(KEY, (400,))),
                jnp.std(annealed(KEY, leveled, (400,))),
                jnp.std(ebm.ReverseSDE(ebm.VE(0.01, 10.0), num_steps=200)(KEY, leveled, (400,))),
                jnp.std(flow(KEY, leveled, (400,))),
            ],
            "loss": [ebm.sm_loss(each, ROWS).mean for each in (d, (model, {}))],
            "likelihood": [
                ebm.log_likelihood(d, None, ROWS, log_partition=log_z).mean,
                jnp.mean(flow.log_prob(leveled, ROWS)),
            ],
            "ksd": [ebm.ksd_test(KEY, d, 3 * ROWS, bandwidth=1.0).statistic],
        }

    for scale in (0.5, 50.0):
        put(LIST, scale)
        values, log_z = found(), 0.5 * np.log(np.pi / scale)
        np.testing.assert_allclose(values["log Z"], log_z, atol=0.1)
        np.testing.assert_allclose(values["deviation"], (2 * scale) ** -0.5, rtol=0.25)
        np.testing.assert_allclose(values["loss"], 5 * scale**2 - 2 * scale, rtol=1e-5)
        np.testing.assert_allclose(values["likelihood"], -2.5 * scale - log_z, rtol=0.05)
    assert values["ksd"][0] > 1.0


def svi_that_reads():
    """The optimum of t is the mean square of the rows over LIST[0]."""

    def model(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * LIST[0] * x**2), obs=x)

    return SVI(ebm.estimate(model, "sm"), ebm.empty_guide, optax.sgd(1e-3), Trace_ELBO())


def test_fit_and_its_held_out_rows_read_at_each_call():
    svi = svi_that_reads()
    run = lambda: ebm.fit(KEY, svi, 2, ROWS, held_out=(ROWS[:1],), check_every=1, progress_bar=False)  # noqa: E731
    for scale in (0.5, 2.0):
        put(LIST, scale)
        result = run()
        # Score matching: sum of (t s x)^2 / 2 - t s at t = 1.
        np.testing.assert_allclose(result.losses[0], 2.5 * scale**2 - 2 * scale, rtol=1e-5)
        np.testing.assert_allclose(result.held_out_losses[0], 0.5 * scale**2 - scale, rtol=1e-5)
    num_kept = len(programs._kept)
    run()
    assert len(programs._kept) == num_kept


@pytest.mark.parametrize("number", [float, np.float32, jnp.asarray], ids=["float", "numpy", "array"])
def test_closures_of_one_shape_share_a_program(number):
    def energy_of(t):
        return lambda x: t * jax.nn.softplus(x) + 0.5 * x**2

    values, kept = [], []
    for t in (1.0, 2.0, 4.0):
        values.append(ebm.sm_loss(ebm.EnergyDistribution(energy_of(number(t))), ROWS))
        kept.append(len(programs._kept))
    assert kept[0] == kept[-1]
    assert len({each.mean for each in values}) == 3


def test_programs_are_bounded():
    for i in range(MOST_KEPT + 3):
        compiled(lambda x, i=i: jnp.ones(i + 1), ROWS)
    assert len(programs._kept) <= MOST_KEPT


def test_a_program_holds_what_was_read_when_it_was_traced():
    array = np.ones(2)
    program = trace(lambda x: jnp.sum(array * x), ROWS)
    array[0] = 100.0
    np.testing.assert_allclose(call(program, ROWS), 3.0)
    with pytest.raises(TypeError, match="float32"):
        program(ROWS.astype(int))


def custom_vjp_of(rule):
    @jax.custom_vjp
    def function(x):
        return x

    function.defvjp(lambda x: (x, None), lambda _, slope: (rule(slope),))
    return function


def custom_jvp_of(rule):
    @jax.custom_jvp
    def function(x):
        return x

    function.defjvp(lambda x, slope: (x[0], rule(slope[0])))
    return function


@pytest.mark.parametrize("make", [custom_vjp_of, custom_jvp_of])
def test_a_rule_of_the_user_is_part_of_the_key(make):
    function = make(lambda slope: LIST[0] * slope)
    slope = programs.jit(lambda program, x: jax.grad(program)(x))
    at = lambda: float(slope(trace(lambda x: jnp.sum(function(x)), jnp.ones(()), order=1), jnp.ones(())))  # noqa: E731
    assert at() == 0.5
    num_kept = len(programs._kept)
    assert at() == 0.5
    assert len(programs._kept) == num_kept
    put(LIST, 50.0)
    assert at() == 50.0
    arrays = make(lambda slope: jnp.asarray([1.0, 2.0])[:1] * slope)  # an array made in the rule
    assert compiled(jax.grad(lambda x: jnp.sum(arrays(x))), jnp.ones(1)) == 1.0


@pytest.mark.parametrize("make", [custom_vjp_of, custom_jvp_of])
def test_a_rule_that_reads_an_array(make):
    slope = programs.jit(lambda program, x: jax.grad(program)(x))
    for value in (2.0, 3.0):
        array = jnp.full((), value)
        function = make(lambda slope, array=array: array * slope)
        assert slope(trace(lambda x, f=function: f(x) * 1.0, jnp.ones(()), order=1), jnp.ones(())) == value


def test_front_doors_inside_transformations():
    def draw(t):
        sampler = ebm.ChainSampler("mala", num_warmup=20, num_steps=5)
        return ebm.EnergyDistribution(lambda x: t * x**2, sampler=sampler).sample(KEY, (3,))

    one = draw(jnp.asarray(2.0))
    np.testing.assert_allclose(jax.jit(draw)(2.0), one, rtol=1e-5)
    np.testing.assert_allclose(jax.vmap(draw)(jnp.array([2.0, 3.0]))[0], one, rtol=1e-5)
    loss = lambda t: compiled(lambda x: jnp.sum(t * x**2), ROWS)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(2.0), 5.0)


def test_a_function_without_arrays_or_of_keys_and_trees():
    assert compiled(lambda x: 0.0, ROWS) == 0.0
    tree = {"a": ROWS, "b": (KEY, None)}
    found = compiled(lambda t: {"key": t["b"][0], "normal": jax.random.normal(KEY, (2,)) * t["a"]}, tree)
    np.testing.assert_allclose(found["normal"], jax.random.normal(KEY, (2,)) * ROWS, rtol=1e-6)
    assert found["key"] == KEY


def test_a_digest_tells_what_a_program_computes():
    def of(function):
        program = programs.trace(function, ROWS)
        return digest(program.code.jaxpr, program.constants)

    one, other = jnp.asarray(1.5), jnp.asarray(2.5)
    first = of(lambda x: x * one - 3.0)
    assert first == of(lambda y: y * one - 3.0)
    assert len({first, of(lambda x: x * other - 3.0), of(lambda x: x * one - 4.0), of(lambda x: x + one - 3.0)}) == 4
