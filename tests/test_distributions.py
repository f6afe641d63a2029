"""`EnergyDistribution`: shapes, guard, pytree, draws, data types."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import some_slow
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from numpyro.infer.util import log_density

import numpyro_ebm as ebm


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def scaled(x, t):
    return 0.5 * t * jnp.sum(x**2)


THETA = jnp.array([1.0, 2.0, 3.0])


def batched(**kwargs):
    return ebm.EnergyDistribution(scaled, (2,), context=THETA, batch_shape=(3,), **kwargs)


class TestShapes:
    def test_batch_and_event(self):
        d = batched()
        x = jnp.ones((3, 2))
        np.testing.assert_allclose(d.log_prob(x), [-1, -2, -3])
        assert d.expand((4, 3)).log_prob(jnp.ones((4, 3, 2))).shape == (4, 3)
        np.testing.assert_allclose(d.to_event(1).log_prob(x), -6)
        np.testing.assert_allclose(d.mask(jnp.array([True, False, True])).log_prob(x), [-1, 0, -3])

    def test_rows_are_rows_where_the_plate_has_the_size_of_the_event(self):
        x = jnp.array([[1.0, 0, 0], [0, 0, 0], [2, 0, 0]])
        d = ebm.EnergyDistribution(quadratic, (3,))
        np.testing.assert_allclose(d.log_prob(x), [-0.5, 0, -2])
        with numpyro.plate("rows", 3):
            pass
        joint, _ = log_density(plated, (d, x), {}, {})
        np.testing.assert_allclose(joint, -2.5)

    @pytest.mark.parametrize("num_rows", [1, 5])
    def test_an_energy_that_sums_over_all_it_gets_sees_one_row_at_a_time(self, num_rows):
        d = ebm.EnergyDistribution(lambda v: 0.5 * (v**2).sum(), (3,))
        joint, _ = log_density(plated, (d, jnp.ones((num_rows, 3))), {}, {})
        np.testing.assert_allclose(joint, -1.5 * num_rows)

    def test_shape_one_is_squeezed(self):
        d = ebm.EnergyDistribution(lambda v: 0.5 * (v**2).sum(-1, keepdims=True), (3,))
        np.testing.assert_allclose(d.log_prob(jnp.ones((5, 3))), jnp.full(5, -1.5))

    def test_sample_shape_broadcasts_against_the_batch(self):
        x = jnp.ones((7, 3, 2))
        np.testing.assert_allclose(batched().log_prob(x), jnp.broadcast_to(-THETA, (7, 3)))

    def test_double_plate(self):
        def model(x):
            with numpyro.plate("a", 4, dim=-2), numpyro.plate("b", 3, dim=-1):
                numpyro.sample("x", batched(), obs=x)

        np.testing.assert_allclose(log_density(model, (jnp.ones((4, 3, 2)),), {}, {})[0], -24)

    def test_a_pytree_context(self):
        context = {"a": THETA, "b": (jnp.ones((3, 2)),)}
        d = ebm.EnergyDistribution(lambda x, c: c["a"] * jnp.sum(c["b"][0] * x), (2,), context=context, batch_shape=(3,))
        np.testing.assert_allclose(d.log_prob(jnp.ones((3, 2))), -2 * THETA)


def plated(d, x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", d, obs=x)


class TestPytree:
    def test_jit_and_vmap_over_the_distribution(self):
        x = jnp.ones((3, 2))
        np.testing.assert_allclose(jax.jit(lambda d: d.log_prob(x))(batched()), [-1, -2, -3])

        def of_theta(t):
            return ebm.EnergyDistribution(functools.partial(lambda t, x: scaled(x, t), t), (2,)).log_prob(x[0])

        np.testing.assert_allclose(jax.vmap(of_theta)(THETA), [-1, -2, -3])
        stacked = jax.vmap(lambda t: ebm.EnergyDistribution(functools.partial(lambda t, x: scaled(x, t), t), (2,)))(THETA)
        np.testing.assert_allclose(jax.vmap(lambda d, x: d.log_prob(x))(stacked, x), [-1, -2, -3])

    def test_a_partial_gives_its_arrays_and_traces_once(self):
        traces = []

        def energy(t, x):
            traces.append(1)
            return 0.5 * t * x**2

        call = jax.jit(lambda d, x: d.log_prob(x))
        for t in (1.0, 2.0, 3.0):
            value = call(ebm.EnergyDistribution(functools.partial(energy, jnp.array(t))), 2.0)
            np.testing.assert_allclose(value, -2 * t)
        first = len(traces)
        call(ebm.EnergyDistribution(functools.partial(energy, jnp.array(4.0))), 2.0)
        assert len(traces) == first

    @pytest.mark.parametrize("wrap", ["none", "expand", "mask", "to_event"])
    def test_everything_survives_a_round_trip(self, wrap):
        base = dist.Normal(0, 2).expand([2]).to_event(1)
        d = batched(base=base, sampler=ebm.ChainSampler("mala", num_warmup=5))
        d = {
            "none": d,
            "expand": d.expand((4, 3)),
            "mask": d.mask(jnp.array([True, False, True])),
            "to_event": d.to_event(1),
        }[wrap]
        x = jnp.ones((3, 2))
        back = jax.tree.unflatten(*reversed(jax.tree.flatten(d)))
        np.testing.assert_allclose(back.log_prob(x), d.log_prob(x))
        assert back.support.event_dim == d.support.event_dim
        assert back.shape() == d.shape()


class TestBase:
    def test_the_base_tilts(self):
        base = dist.Normal(1.0, 2.0)
        d = ebm.EnergyDistribution(lambda x: 0.3 * x, base=base)
        x = jnp.linspace(-1, 1, 5)
        np.testing.assert_allclose(d.log_prob(x), base.log_prob(x) - 0.3 * x, rtol=1e-6)

    @pytest.mark.parametrize(
        "base",
        [
            dist.Normal(THETA[:, None], 1.0).expand([3, 2]).to_event(1),
            dist.Normal(jnp.arange(6.0).reshape(3, 2), 1.0).to_event(1),
            dist.MultivariateNormal(jnp.arange(6.0).reshape(3, 2), jnp.eye(2)),
            dist.MultivariateNormal(jnp.arange(2.0), jnp.eye(2)).expand([3]),
            dist.Normal(0, 1).expand([2]).to_event(1),
        ],
        ids=["expanded", "per row", "multivariate", "multivariate shared", "shared"],
    )
    def test_each_row_has_its_own_base(self, base):
        d = ebm.EnergyDistribution(quadratic, (2,), base=base, sampler=ebm.ChainSampler("mala", num_warmup=10))
        x = jax.random.normal(jax.random.key(0), (3, 2))
        np.testing.assert_allclose(d.log_prob(x), base.log_prob(x) - 0.5 * jnp.sum(x**2, -1), rtol=1e-5)
        assert d.sample(jax.random.key(1), (4,)).shape == (4, *d.batch_shape, 2)

    def test_draws_of_rows_with_their_own_base(self):
        base = dist.Normal(jnp.array([-5.0, 5.0]), 1.0)
        sampler = ebm.ChainSampler("mala")
        draws = ebm.EnergyDistribution(lambda x: 0.0 * x, base=base, sampler=sampler).sample(jax.random.key(0), (500,))
        np.testing.assert_allclose(draws.mean(0), [-5, 5], atol=5 / np.sqrt(500))


class TestGuard:
    def gamma_precision(self, x, *, normalized=False, log_z=False):
        t = numpyro.sample("t", dist.Gamma(2.0, 1.0))

        def energy(x):
            return 0.5 * t * x**2 - (0.5 * jnp.log(t) if log_z else 0.0)

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, normalized=normalized), obs=x)

    def test_nuts_over_a_parameter_is_refused_and_told_what_to_write(self):
        x = np.random.default_rng(0).normal(0, 0.5, 200).astype(np.float32)
        mcmc = MCMC(NUTS(self.gamma_precision), num_warmup=10, num_samples=10, progress_bar=False)
        with pytest.raises(ValueError, match=r"site 'x'.*numpyro_ebm.estimate\(model"):
            mcmc.run(jax.random.key(0), x)

    def test_svi_over_a_parameter_is_refused(self):
        def model(x):
            t = numpyro.param("t", 1.0)
            plated(ebm.EnergyDistribution(lambda x: t * x**2), x)

        svi = SVI(model, ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        with pytest.raises(ValueError, match="log Z"):
            svi.run(jax.random.key(0), 2, jnp.ones(3), progress_bar=False)

    def test_with_log_z_inside_the_exact_posterior_comes_out(self):
        x = np.random.default_rng(0).normal(0, 0.5, 200).astype(np.float32)
        model = functools.partial(self.gamma_precision, normalized=True, log_z=True)
        mcmc = MCMC(NUTS(model), num_warmup=300, num_samples=2000, progress_bar=False)
        mcmc.run(jax.random.key(0), x)
        draws = mcmc.get_samples()["t"]
        # Gamma(102, 1 + S/2): mean 4.2319, sd 0.4190.
        assert abs(draws.mean() - 4.2319) < 0.05
        assert abs(draws.std() - 0.4190) < 0.04

    def test_nuts_over_the_event_with_fixed_parameters_is_allowed(self):
        def model():
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 2.0 * x**2))

        mcmc = MCMC(NUTS(model), num_warmup=200, num_samples=1000, progress_bar=False)
        mcmc.run(jax.random.key(0))
        assert abs(mcmc.get_samples()["x"].var() - 0.25) < 0.06

    @pytest.mark.parametrize("through", ["context", "base"])
    def test_context_and_base_move_log_z_too(self, through):
        def value(t):
            if through == "context":
                d = ebm.EnergyDistribution(scaled, (2,), context=t * THETA, batch_shape=(3,))
            else:
                d = ebm.EnergyDistribution(quadratic, (2,), base=dist.Normal(t, 1.0).expand([2]).to_event(1))
            return d.log_prob(jnp.ones((3, 2))).sum()

        assert jnp.isfinite(value(1.0))
        with pytest.raises(ValueError, match="log Z"):
            jax.grad(value)(1.0)


class TestSample:
    @pytest.mark.slow
    def test_variance_of_a_gaussian_from_the_default_sampler(self):
        draws = ebm.EnergyDistribution(lambda x: 2.0 * x**2).sample(jax.random.key(1), (4000,))
        assert abs(draws.var() - 0.25) < 0.02
        assert abs(draws.mean()) < 5 * 0.5 / np.sqrt(4000)

    def test_predictive(self):
        def model():
            with numpyro.plate("rows", 5):
                numpyro.sample("x", ebm.EnergyDistribution(quadratic, (3,), sampler=ebm.ChainSampler("mala")))

        draws = Predictive(model, num_samples=7)(jax.random.key(0))["x"]
        assert draws.shape == (7, 5, 3)
        assert len(np.unique(np.asarray(draws))) == 105

    def test_empty_and_scalar_shapes(self):
        d = ebm.EnergyDistribution(quadratic, (3,), sampler=ebm.ChainSampler("mala", num_warmup=10, num_steps=1))
        assert d.sample(jax.random.key(0)).shape == (3,)
        assert d.sample(jax.random.key(0), (0,)).shape == (0, 3)

    def test_expand_gives_independent_chains(self):
        d = ebm.EnergyDistribution(quadratic, (1,), sampler=ebm.ChainSampler("mala", num_warmup=20, num_steps=1))
        assert len(np.unique(np.asarray(d.expand((6,)).sample(jax.random.key(0))))) == 6

    def test_no_key_is_an_error(self):
        with pytest.raises(ValueError, match="seed"):
            ebm.EnergyDistribution(quadratic, (3,)).sample(None)

    def test_own_sampler(self):
        d = ebm.EnergyDistribution(quadratic, (3,), sampler=lambda key, d, shape: jnp.full(d.shape(shape), 7.0))
        assert (d.sample(jax.random.key(0), (2,)) == 7).all()

    @pytest.mark.parametrize(
        ("support", "energy", "event_shape", "mean"),
        [
            (constraints.positive, lambda x: 3.0 * x, (), 1 / 3),
            (constraints.unit_interval, lambda x: -jnp.log(x) - 2 * jnp.log1p(-x), (), 2 / 5),
            (constraints.interval(1.0, 3.0), lambda x: 0.0 * x, (), 2.0),
            (
                constraints.simplex,
                lambda x: -jnp.sum((jnp.array([2.0, 3.0, 5.0]) - 1) * jnp.log(x)),
                (3,),
                np.array([0.2, 0.3, 0.5]),
            ),
        ],
        ids=["exponential", "beta", "uniform", "dirichlet"],
    )
    def test_constrained_supports(self, support, energy, event_shape, mean):
        sampler = ebm.ChainSampler("mala", num_warmup=300, num_steps=100)
        d = ebm.EnergyDistribution(energy, event_shape, support=support, sampler=sampler)
        draws = d.sample(jax.random.key(3), (1500,))
        assert bool(jnp.all(support(draws)))
        error = jnp.abs(draws.mean(0) - mean)
        assert bool(jnp.all(error < 5 * draws.std(0) / np.sqrt(1500)))
        if event_shape:
            np.testing.assert_allclose(draws.sum(-1), 1, atol=1e-6)


class TestStarts:
    """Draws come from where the density is, or none come."""

    NUM = 12
    NOWHERE = ebm.EnergyDistribution(lambda x: jnp.inf + jnp.sum(x), (2,))

    def independent_sets(self):
        """Of a path: no two neighbours are both 1, which most draws of the uniform law break."""
        energy = lambda x: jnp.where(jnp.any(x[1:] * x[:-1] > 0), jnp.inf, 0.0)  # noqa: E731
        return ebm.EnergyDistribution(energy, (self.NUM,), support=constraints.boolean)

    @pytest.mark.slow
    def test_no_draw_is_impossible(self):
        states = np.array(list(itertools.product((0, 1), repeat=self.NUM)))
        truth = states[np.all(states[:, 1:] * states[:, :-1] == 0, axis=1)].sum(1)
        x = Predictive(lambda: numpyro.sample("x", self.independent_sets()), num_samples=1000)(jax.random.key(0))["x"]
        assert not np.any(x[:, 1:] * x[:, :-1])
        assert abs(x.sum(1).mean() - truth.mean()) < 5 * truth.std() / np.sqrt(1000)

    @pytest.mark.slow
    def test_a_density_behind_a_wall_is_found(self):
        wall = ebm.EnergyDistribution(lambda x: jnp.where(x > 3, x, jnp.inf))  # 3 + Exponential(1)
        y = wall.sample(jax.random.key(0), (500,))
        assert y.min() > 3
        assert abs(y.mean() - 4) < 5 / np.sqrt(500)

    @pytest.mark.slow
    def test_each_row_looks_for_its_own(self):
        energy = lambda x, c: jnp.where(x > c, x, jnp.inf)  # noqa: E731
        d = ebm.EnergyDistribution(energy, context=jnp.array([0.0, 4.0, 30.0]), batch_shape=(3,))
        assert bool(jnp.all(d.sample(jax.random.key(0), (20,)) > d.context))

    def test_where_there_is_none_draws_are_refused(self):
        with pytest.raises(ebm.EnergyError, match="starts where the log density or its gradient is not finite"):
            self.NOWHERE.sample(jax.random.key(0), (3,))

    @pytest.mark.parametrize("draw", some_slow(["jit"], ["predictive"]))
    def test_inside_a_compiled_program_they_are_refused_too(self, draw):
        def predictive():
            return Predictive(lambda: numpyro.sample("x", self.NOWHERE), num_samples=3)(jax.random.key(0))

        run = predictive if draw == "predictive" else lambda: jax.jit(self.NOWHERE.sample)(jax.random.key(0))
        with pytest.raises(jax.errors.JaxRuntimeError, match="starts where the log density"):
            jax.block_until_ready(run())

    def test_a_gradient_that_is_nan_is_refused(self):
        i = jnp.triu_indices(4, 1)

        def pairs(q):  # the distances of points from themselves have no gradient
            q = q.reshape(4, 3)
            r = jnp.linalg.norm(q[:, None] - q[None], axis=-1)[i]
            return jnp.sum(0.5 * (r - 1.0) ** 2) + 0.5 * jnp.sum(q**2)

        d = ebm.EnergyDistribution(pairs, (12,))
        with pytest.raises(ebm.EnergyError, match="gradient is not finite"):
            d.sample(jax.random.key(0), (4,))
        with pytest.raises(ebm.EnergyError, match="gradient is not finite"):
            ebm.sample(jax.random.key(0), d, num_warmup=5, num_samples=5)


class TestTypes:
    def test_integer_data_are_cast_once(self):
        z = (np.random.default_rng(18).beta(2, 5, (500, 4)) * 255).round().astype(np.uint8)
        np.testing.assert_allclose(z.mean(0) / 255, [0.28184, 0.27364, 0.28700, 0.28202], atol=1e-5)
        d = ebm.EnergyDistribution(lambda x: jnp.sum((x - 100) ** 2), (4,))
        np.testing.assert_array_equal(d.log_prob(z), d.log_prob(z.astype(np.float32)))
        eights = ebm.EnergyDistribution(lambda x: jnp.sum(x**2), (2,)).log_prob(np.array([100, 100], np.int8))
        np.testing.assert_allclose(eights, -20000)

    def test_complex_and_text_are_refused(self):
        with pytest.raises(TypeError, match="real numbers"):
            ebm.EnergyDistribution(quadratic, (2,)).log_prob(jnp.ones(2, complex))

    @pytest.mark.parametrize("data", [np.float32, np.float64])
    @pytest.mark.parametrize("parameters", [np.float32, np.float64])
    @pytest.mark.usefixtures("x64")
    def test_mixed_precision_under_x64(self, data, parameters):
        t = jnp.asarray(4.0, parameters)
        d = ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), (3,))
        assert d.log_prob(np.ones((2, 3), data)).dtype == jnp.float64

    @pytest.mark.parametrize("kernel", some_slow(["mala", "hmc"], ["langevin", "nuts"]))
    @pytest.mark.usefixtures("x64")
    def test_draws_under_x64_are_double_whatever_the_parameters_are(self, kernel):
        t = jnp.asarray(4.0, jnp.float32)
        d = ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), (3,))
        draws = ebm.sample(jax.random.key(0), d, kernel, num_warmup=20, num_samples=5, num_chains=2)
        assert draws.samples["x"].dtype == jnp.float64

    def test_float64_becomes_float32_without_a_warning(self):
        assert ebm.EnergyDistribution(quadratic, (3,)).log_prob(np.ones((2, 3))).dtype == jnp.float32

    def test_typed_and_raw_keys_give_the_same_draws(self):
        d = ebm.EnergyDistribution(quadratic, (3,), sampler=ebm.ChainSampler("mala", num_warmup=20))
        np.testing.assert_array_equal(d.sample(jax.random.key(5), (3,)), d.sample(jax.random.PRNGKey(5), (3,)))

    def test_outside_the_support_the_density_is_zero(self):
        d = ebm.EnergyDistribution(lambda x: x, support=constraints.positive)
        np.testing.assert_array_equal(d.log_prob(jnp.array([-1.0, 2.0])), [-jnp.inf, -2.0])

    def test_a_discrete_support_has_a_log_prob_and_no_gradient_kernel(self):
        d = ebm.EnergyDistribution(lambda x: jnp.sum(x), (4,), support=constraints.boolean)
        np.testing.assert_allclose(d.log_prob(jnp.array([1, 0, 1, 1])), -3)
        with pytest.raises(ValueError, match="discrete"):
            ebm.sample(jax.random.key(0), d, "nuts")
