"""The trace of exact score matching: three ways to the same number, in bounded memory, and energies that have none."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from helpers import surrogate
from numpyro.distributions import constraints
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm._core.laplacian import beyond_forward_laplacian, count_operations

ROWS = np.asarray(jax.random.normal(jax.random.key(0), (6, 5)))
WEIGHT = jax.random.normal(jax.random.key(1), (5, 16)) / 2


def model_of(energy, shape=(5,), **options):
    def model(x):
        w = numpyro.param("w", WEIGHT)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: energy(x, w), shape, **options), obs=x)

    return model


def smooth(x, w):
    return jnp.sum(jax.nn.silu(x @ w)) + jax.scipy.special.logsumexp(x) + jnp.sum(jax.nn.softplus(x**2))


def gradient_of(model, *args, rows=ROWS, **options):
    return jax.value_and_grad(lambda w: surrogate(ebm.estimate(model, *args, **options), {"w": w}, rows))(WEIGHT)


class TestForward:
    @pytest.mark.parametrize(
        "options",
        [{}, {"base": dist.Normal(0, 2).expand([5]).to_event(1)}, {"support": constraints.positive}],
        ids=["plain", "base", "positive"],
    )
    def test_is_the_trace_by_columns(self, options):
        model = model_of(smooth, **options)
        rows = np.abs(ROWS) if "support" in options else ROWS

        values = (gradient_of(model, "sm", rows=rows, trace=trace) for trace in ("forward", "columns"))
        for forward, columns in zip(*values, strict=True):
            np.testing.assert_allclose(forward, columns, rtol=2e-4, atol=1e-4)

    @pytest.mark.parametrize(
        "energy",
        [
            lambda x, w: jnp.sum(jnp.cosh(w[0, 0] * x) + x**4),
            lambda x, w: jnp.sum(x * jnp.sin(w[:, 0] * x) / (1 + x**2)),
            lambda x, w: jnp.sum((x[1:] - w[1:, 0] * x[:-1]) ** 4 + x[1:] * x[:-1]) + jnp.exp(-jnp.sum(x**2)),
        ],
        ids=["sum", "product", "chain"],
    )
    @pytest.mark.parametrize(
        "options", [{}, {"base": dist.Normal(0, jnp.arange(1.0, 6)).to_event(1)}], ids=["plain", "base"]
    )
    def test_of_coordinates_that_hardly_meet(self, energy, options):
        model = model_of(energy, **options)
        values = (gradient_of(model, "sm", trace=trace) for trace in ("forward", "columns"))
        for forward, columns in zip(*values, strict=True):
            np.testing.assert_allclose(forward, columns, rtol=2e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("energy", "size"),
        [
            (lambda x, w: jnp.sum(jnp.cosh(w[0, 0] * x)), 100),
            (lambda x, w: jnp.sum(jax.nn.silu(x @ w)), 100),
            (lambda x, w: jnp.sum(jnp.cosh(w[0, 0] * x) + jnp.arctan(x)), 10),  # too small to be worth a count
        ],
        ids=["sparse", "net", "small"],
    )
    def test_auto_is_the_way_that_takes_less_arithmetic(self, energy, size):
        def operations(trace):
            model = ebm.estimate(model_of(energy, (size,)), "sm", trace=trace)
            value = lambda w: log_density(model, (jnp.ones((2, size)),), {}, {"w": w})[0]  # noqa: E731
            return count_operations(value, jnp.ones((size, 16)))

        forward, columns = operations("forward"), operations("columns")
        assert size < 64 or forward < columns
        assert operations("auto") == pytest.approx(forward if size < 64 else min(forward, columns), rel=0.05)

    def test_it_falls_back_and_says_so(self):
        def scanned(x, w):
            return jax.lax.scan(lambda c, row: (jnp.sin(c + row), None), jnp.sum(x**2), w[0])[0]

        model = model_of(scanned)
        with pytest.warns(UserWarning, match=r"site 'x'.*no rule for \['scan'\].*trace='columns'"):
            value = gradient_of(model, "sm")
        np.testing.assert_allclose(value[0], gradient_of(model, "sm", trace="columns")[0])
        with pytest.raises(ValueError, match=r"site 'x'.*no rule for \['scan'\]"):
            gradient_of(model, "sm", trace="forward")

    def test_a_function_with_the_name_of_another_is_not_taken_for_it(self):
        # folx goes by the name of what is jitted.
        @jax.jit
        def silu(x):
            return jnp.tanh(x) ** 3

        @jax.jit
        def softplus(x, sharpness=4.0):
            return jax.nn.softplus(sharpness * x) / sharpness

        for activation in (silu, softplus):
            model = model_of(lambda x, w, f=activation: jnp.sum(f(x @ w)))
            with pytest.warns(UserWarning, match=f"no rule for .*{activation.__name__}"):
                value = gradient_of(model, "sm")
            np.testing.assert_allclose(value[0], gradient_of(model, "sm", trace="columns")[0])

    def test_usual_networks_need_no_fallback(self):
        for activation in (jax.nn.silu, jax.nn.softplus, jax.nn.gelu, jnp.tanh, jax.nn.sigmoid, jax.nn.elu):
            net = nnx.Sequential(nnx.Linear(5, 8, rngs=nnx.Rngs(0)), activation, nnx.LayerNorm(8, rngs=nnx.Rngs(1)))
            assert not beyond_forward_laplacian(lambda x, net=net: jnp.sum(net(x) ** 2), ROWS[0])


class TestProbes:
    def test_are_averaged(self):
        # An isotropic Gaussian: with Rademacher probes every one of them gives the exact trace.
        model = model_of(lambda x, w: 0.5 * jnp.sum(x**2) * w[0, 0] ** 2)
        exact = gradient_of(model, "sm")
        for num in (1, 7):
            np.testing.assert_allclose(gradient_of(model, "sm", num_probes=num)[1], exact[1], rtol=1e-5)

    @pytest.mark.slow
    def test_are_those_of_ssm_vr(self):
        value, same = (
            gradient_of(model_of(smooth), name, projection="gaussian", **{option: 3})
            for name, option in (("sm", "num_probes"), ("ssm_vr", "num_projections"))
        )
        np.testing.assert_array_equal(value[1], same[1])

    def test_are_random_and_so_no_target_of_nuts(self):
        assert ebm.ScoreMatching().is_deterministic
        assert not ebm.ScoreMatching(num_probes=2).is_deterministic

    def test_bad_options(self):
        for options in ({"num_probes": 0}, {"trace": "exact"}, {"projection": "cube"}):
            with pytest.raises(ValueError, match="num_probes|trace|projection"):
                ebm.ScoreMatching(**options)


class TestMemory:
    @pytest.mark.parametrize("trace", ["forward", "columns"])
    def test_hessians_of_all_rows_never_stand_together(self, trace):
        # 64 Hessians of 784 x 784 take 157 MB in float32.
        rows = jnp.zeros((64, 784))
        model = model_of(lambda x, w: jnp.sum(jax.nn.silu(x @ w)) + jnp.sum(x**2), (784,))
        wrapped = ebm.estimate(model, "sm", trace=trace)
        loss = jax.grad(lambda w: surrogate(wrapped, {"w": w}, rows))
        compiled = jax.jit(loss).lower(jnp.ones((784, 256))).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 20e6

    @pytest.mark.slow
    def test_rows_in_chunks_are_rows_at_once(self, monkeypatch):
        whole = gradient_of(model_of(smooth), "sm")
        monkeypatch.setattr("numpyro_ebm.estimators.parts.second_order.ELEMENTS_AT_ONCE", 2 * 25)
        for ours, theirs in zip(gradient_of(model_of(smooth), "sm"), whole, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


PIECES = {
    "relu": lambda x, w: jnp.sum(jax.nn.relu(x @ w)),
    "leaky": lambda x, w: jnp.sum(jax.nn.leaky_relu(jax.nn.leaky_relu(x @ w) @ w.T)),
    "abs": lambda x, w: jnp.sum(jnp.abs(x @ w)),
    "max": lambda x, w: jnp.max(jnp.maximum(x @ w, 0.1)),
}
CURVED = {
    "squared": lambda x, w: jnp.sum(jax.nn.relu(x @ w) ** 2),
    "silu": lambda x, w: jax.nn.silu(jnp.sum(jax.nn.relu(x @ w))),
    "linear": lambda x, w: jnp.sum(x @ w),
}
FAMILY = {"sm": {"trace": "columns"}, "ssm": {}, "ssm_vr": {}, "regularized_sm": {"sigma": 0.1}, "hsm": {}}


@pytest.mark.filterwarnings("ignore:At site 'x'. the forward Laplacian")
class TestPiecewiseLinear:
    @pytest.mark.parametrize("energy", PIECES)
    def test_energies_are_warned_of(self, energy):
        base = dist.Normal(0, 1).expand([5]).to_event(1)
        with pytest.warns(UserWarning, match="site 'x'.*piecewise linear.*'sm' learns a flat energy.*softplus.*'dsm'"):
            gradient_of(model_of(PIECES[energy], base=base), "sm")

    @pytest.mark.parametrize("name", FAMILY)
    def test_by_every_member_that_takes_second_derivatives(self, name):
        with pytest.warns(UserWarning, match=f"'{name}' learns a flat energy"):
            gradient_of(model_of(PIECES["relu"]), name, **FAMILY[name])

    @pytest.mark.parametrize("energy", CURVED)
    def test_others_are_not(self, energy):
        gradient_of(model_of(CURVED[energy], base=dist.Normal(0, 1).expand([5]).to_event(1)), "sm", trace="columns")

    def test_nor_is_dsm(self):
        gradient_of(model_of(PIECES["relu"]), "dsm", sigma=0.3)

    def test_a_linear_energy_on_the_positive_line_bends_in_unconstrained_space(self):
        gradient_of(model_of(lambda x, w: jnp.sum(x) * w[0, 0], support=constraints.positive), "ssm", rows=np.abs(ROWS))
