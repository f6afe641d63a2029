"""Rows: what plates, scan, vmap, masks and narrow types make of them, and data that are no rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from estimator_cases import OTHERS, continuous_options
from helpers import precision_model, rows_of, some_slow, surrogate
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 2)).astype(np.float32)
Y = RNG.normal(size=5).astype(np.float32)
N = 5


def misfit(y, x):
    """An energy that broadcasts: of a whole context it takes the mean, without an error."""
    return 2 * jnp.mean((y - x) ** 2)


RIGHT = -2 * np.mean((Y[:, None] - X) ** 2, axis=1)


def joint(model, *args):
    return float(log_density(model, args, {}, {})[0])


def in_plate(distribution, y=Y, size=N):
    def model():
        with numpyro.plate("rows", size):
            numpyro.sample("y", distribution(), obs=y)

    return model


def of_context(context=X, energy=misfit, **options):
    return ebm.EnergyDistribution(energy, context=context, **options)


class TestContext:
    def test_the_plate_gives_each_row_its_own(self):
        np.testing.assert_allclose(joint(in_plate(of_context)), RIGHT.sum(), rtol=1e-6)
        outside = of_context()  # made before the plate is entered
        np.testing.assert_allclose(joint(in_plate(lambda: outside)), RIGHT.sum(), rtol=1e-6)

    def test_it_does_so_under_estimate(self):
        def model(x, y):
            w = numpyro.param("w", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("y", ebm.EnergyDistribution(lambda y, x: jnp.mean((y - w * x) ** 2), context=x), obs=y)

        told = lambda x, y: model(x, y)  # noqa: E731
        x = X[:, :1]
        gradient = jax.grad(lambda w: surrogate(ebm.estimate(told, "sm"), {"w": w}, x, Y))(1.0)
        # Score matching of (y - w x)^2: 2 (y - w x)^2 - 2 per row.
        np.testing.assert_allclose(gradient, np.sum(4 * (Y - x[:, 0]) * x[:, 0]), rtol=1e-5)

    def test_plates_within_plates_and_scalars_beside_rows(self):
        def model(context):
            with numpyro.plate("a", 3, dim=-2), numpyro.plate("b", N, dim=-1):
                energy = lambda y, c: c["t"] * jnp.sum((y - c["x"]) ** 2)  # noqa: E731
                numpyro.sample("y", of_context(context, energy), obs=jnp.broadcast_to(Y, (3, N)))

        x = RNG.normal(size=(3, N, 2)).astype(np.float32)
        right = -0.5 * np.sum((Y[:, None] - x) ** 2)
        np.testing.assert_allclose(joint(model, {"x": x, "t": 0.5}), right, rtol=1e-5)
        right = -0.5 * np.sum((Y[:, None] - x[:1]) ** 2) * 3
        np.testing.assert_allclose(joint(model, {"x": x[:1], "t": 0.5}), right, rtol=1e-5)

    def test_a_context_that_all_rows_share(self):
        shared = jnp.array([0.3, -1.0, 2.0])
        right = -2 * np.sum(np.mean((Y[:, None] - np.asarray(shared)) ** 2, axis=1))
        for own in (
            functools.partial(of_context, shared, batch_shape=()),
            lambda: of_context(None, lambda y: misfit(y, shared)),
        ):
            np.testing.assert_allclose(joint(in_plate(own)), right, rtol=1e-6)
            np.testing.assert_allclose(np.sum(own().log_prob(Y)), right, rtol=1e-6)
        same_size = functools.partial(of_context, X[:, 0], batch_shape=())
        np.testing.assert_allclose(
            joint(in_plate(same_size)), -2 * np.sum(np.mean((Y[:, None] - X[:, 0]) ** 2, axis=1)), rtol=1e-6
        )
        level = functools.partial(of_context, 0.3)
        np.testing.assert_allclose(joint(in_plate(level)), -2 * np.sum((Y - 0.3) ** 2), rtol=1e-6)

    @pytest.mark.parametrize(
        ("model", "words"),
        [
            (
                in_plate(functools.partial(of_context, jnp.ones(3))),
                r"\(3,\).*plates of shape \(5,\).*batch_shape",
            ),
            (lambda: numpyro.sample("y", of_context(), obs=Y), r"no plate says.*batch_shape=\(5,\)\).*batch_shape=\(\)"),
        ],
        ids=["no row of the plate", "no plate"],
    )
    @pytest.mark.parametrize("wrap", [lambda m: m, lambda m: ebm.estimate(m, "sm")], ids=["raw", "estimate"])
    def test_what_may_be_either_is_refused(self, model, words, wrap):
        with pytest.raises(ebm.EnergyError, match=words):
            joint(wrap(model))

    def test_base_per_row_and_context_for_all(self):
        base = dist.Normal(jnp.asarray(Y), 1.0)
        d = of_context(jnp.array([0.3, -1.0, 2.0]), base=base, batch_shape=())
        right = base.log_prob(0.1) - misfit(0.1, jnp.array([0.3, -1.0, 2.0]))
        np.testing.assert_allclose(d.log_prob(jnp.full(N, 0.1)), right, rtol=1e-6)
        with pytest.raises(ebm.EnergyError, match="whether each row"):
            of_context(base=base)


class TestColumns:
    """Data (N, 1) of a scalar event."""

    MODELS = {
        "plate": in_plate(lambda: ebm.EnergyDistribution(lambda y: 0.5 * y**2), Y[:, None]),
        "context": lambda: numpyro.sample("y", of_context(batch_shape=(N,)), obs=Y[:, None]),
        "context in a plate": in_plate(of_context, Y[:, None]),
        "neither": lambda: numpyro.sample("y", ebm.EnergyDistribution(lambda y: 0.5 * y**2), obs=Y[:, None]),
    }

    @pytest.mark.parametrize("name", list(MODELS))
    @pytest.mark.parametrize("wrap", [lambda m: m, lambda m: ebm.estimate(m, "sm")], ids=["raw", "estimate"])
    def test_are_refused(self, name, wrap):
        with pytest.raises(ebm.EnergyError, match=r"site 'y'.*\(5, 1\) are a column.*shape \(5,\).*event_shape=\(1,\)"):
            joint(wrap(self.MODELS[name]))

    def test_standard_errors_and_likelihoods_refuse_them(self):
        t = {"t": jnp.asarray(1.0)}
        with pytest.raises(ebm.EnergyError, match="column"):
            ebm.standard_errors(jax.random.key(0), ebm.estimate(precision_model, "sm"), t, Y[:, None])
        d = ebm.EnergyDistribution(lambda y: 0.5 * y**2)
        with pytest.raises(ebm.EnergyError, match="column"):
            ebm.log_likelihood(d, None, Y[:, None], log_partition=0.5 * np.log(2 * np.pi))

    def test_members_of_a_joint_event_too(self):
        def model():
            with numpyro.plate("rows", N):
                x = numpyro.sample("x", dist.Normal(0, 1), obs=Y[:, None])
                y = numpyro.sample("y", dist.Normal(0, 1), obs=Y)
                ebm.energy_factor("pair", lambda x, y: jnp.sum(x * y), x=x, y=y)

        with pytest.raises(ebm.EnergyError, match="column"):
            joint(ebm.estimate(model, "sm"))

    def test_events_of_one_element_and_draws_broadcast_as_in_numpyro(self):
        vectors = in_plate(lambda: ebm.EnergyDistribution(lambda y: 0.5 * jnp.sum(y**2), (1,)), Y[:, None])
        np.testing.assert_allclose(joint(vectors), -0.5 * np.sum(Y**2), rtol=1e-6)
        d = of_context(batch_shape=(N,))
        grid = np.linspace(-1, 1, 7)[:, None]
        assert d.log_prob(grid).shape == (7, N)  # one value against every row, where no model says that it is data
        assert d.log_prob(np.ones((4, N))).shape == (4, N)
        one_of_two = in_plate(lambda: ebm.EnergyDistribution(lambda y: 0.5 * y**2), Y[:, None], 1)
        np.testing.assert_allclose(joint(one_of_two), -0.5 * np.sum(Y**2), rtol=1e-6)


SERIES = RNG.normal(size=(6, 2)).astype(np.float32)
FALL = -0.5 * np.sum((SERIES[1:] - 0.5 * SERIES[:-1]) ** 2)


def step(v, c):
    return 0.5 * jnp.sum((v - 0.5 * c) ** 2)


# Name: the distribution of one step given the last, all with the density of `FALL` up to a constant.
STEPS = {
    "context": lambda c: ebm.EnergyDistribution(step, (2,), context=c),
    "pytree context": lambda c: ebm.EnergyDistribution(lambda v, c: step(v, c["c"][0]), (2,), context={"c": (c,)}),
    "closure": lambda c: ebm.EnergyDistribution(lambda v: step(v, c), (2,)),
    "closure and context": lambda c: ebm.EnergyDistribution(lambda v, k: k * step(v, c), (2,), context=jnp.asarray(1.0)),
    "partial": lambda c: ebm.EnergyDistribution(functools.partial(lambda c, v: step(v, c), c), (2,)),
    "masked": lambda c: ebm.EnergyDistribution(step, (2,), context=c).mask(jnp.asarray(True)),  # noqa: FBT003
}
BASES = {
    "expanded": lambda c: dist.Normal(0.5 * c, 1.0).to_event(1),
    "shared": lambda c: dist.Normal(0.0, 1.0).expand([2]).to_event(1),
    "multivariate": lambda c: dist.MultivariateNormal(0.5 * c, jnp.eye(2)),
}


def scanned(of_step, series=SERIES):
    def model(series):
        scan(lambda c, v: (numpyro.sample("x", of_step(c), obs=v), None), series[0], series[1:])

    return functools.partial(model, series)


class TestScanAndVmap:
    @pytest.mark.parametrize("name", list(STEPS))
    def test_each_step_has_its_own(self, name):
        np.testing.assert_allclose(joint(scanned(STEPS[name])), FALL, rtol=1e-6)
        stacked = jax.vmap(STEPS[name])(SERIES[:-1])
        inner = getattr(stacked, "base_dist", stacked)
        assert inner.batch_shape == (5,)
        np.testing.assert_allclose(np.sum(stacked.log_prob(SERIES[1:])), FALL, rtol=1e-6)

    @pytest.mark.parametrize("name", list(BASES))
    def test_each_step_has_its_own_base(self, name):
        of_step = lambda c: ebm.EnergyDistribution(lambda v: 0.1 * jnp.sum(v**2), (2,), base=BASES[name](c))  # noqa: E731
        tilt = 0.1 * np.sum(SERIES[1:] ** 2)
        right = sum(float(BASES[name](c).log_prob(v)) for c, v in zip(SERIES[:-1], SERIES[1:], strict=True)) - tilt
        np.testing.assert_allclose(joint(scanned(of_step)), right, rtol=1e-5)
        stacked = jax.vmap(of_step)(SERIES[:-1])
        assert stacked.batch_shape == stacked.base.batch_shape == (5,)
        np.testing.assert_allclose(np.sum(stacked.log_prob(SERIES[1:])), right, rtol=1e-5)
        assert stacked.reference_sample(jax.random.key(0), (3,)).shape == (3, 5, 2)

    @pytest.mark.parametrize("name", ["context", "closure", "partial"])
    def test_plates_inside_of_scan(self, name):
        """Four series at once: in the plate each row has its own context, or all share what a closure holds."""
        series = RNG.normal(size=(6, 4, 2)).astype(np.float32)

        def body(c, v):
            with numpyro.plate("series", 4):
                d = STEPS[name](c if name == "context" else c[0])
                return numpyro.sample("x", d, obs=v), None

        last = series[:-1] if name == "context" else series[:-1, :1]
        right = -0.5 * np.sum((series[1:] - 0.5 * last) ** 2)
        np.testing.assert_allclose(joint(lambda: scan(body, series[0], series[1:])), right, rtol=1e-5)

    def test_compiled_and_in_the_support(self):
        def of_step(c):
            return ebm.EnergyDistribution(
                lambda v, c: c * jnp.sum(v), (2,), context=c, support=constraints.interval(0.0, 1.0)
            )

        values, rates = np.full((5, 2), 0.25, np.float32), np.arange(5, dtype=np.float32)

        def model(rates):
            scan(lambda _, at: (None, numpyro.sample("x", of_step(at[0]), obs=at[1])), None, (rates, values))

        value = jax.jit(lambda rates: log_density(model, (rates,), {}, {})[0])(rates)
        np.testing.assert_allclose(value, -0.5 * rates.sum(), rtol=1e-6)

    @pytest.mark.parametrize("name", ["context", "closure", "partial"])
    def test_estimate_trains_through_scan(self, name):
        def model(w, x):
            scan(lambda c, v: (numpyro.sample("x", STEPS[name](w * c), obs=v), None), x[0], x[1:])

        estimated = ebm.estimate(model, "sm")
        value, slope = jax.value_and_grad(lambda w: log_density(estimated, (w, SERIES), {}, {})[0])(1.0)
        residual = SERIES[1:] - 0.5 * SERIES[:-1]
        np.testing.assert_allclose(value, -(0.5 * np.sum(residual**2) - 2 * 5), rtol=1e-5)
        np.testing.assert_allclose(slope, np.sum(residual * 0.5 * SERIES[:-1]), rtol=1e-5)

    def test_a_stack_is_cut_again(self):
        stacked = jax.vmap(STEPS["context"])(SERIES[:-1])
        values = jax.vmap(lambda d, v: d.log_prob(v))(stacked, SERIES[1:])
        np.testing.assert_allclose(values.sum(), FALL, rtol=1e-6)
        third = jax.tree.map(lambda leaf: leaf[2], stacked)
        assert third.batch_shape == ()
        np.testing.assert_allclose(third.log_prob(SERIES[3]), -step(SERIES[3], SERIES[2]), rtol=1e-6)

    def test_a_factor_in_scan(self):
        def model(series):
            def body(c, v):
                v = numpyro.sample("x", dist.ImproperUniform(constraints.real_vector, (), (2,)), obs=v)
                ebm.energy_factor("pair", lambda x, c: step(x, c), x=v, c=c)
                return v, None

            scan(body, series[0], series[1:])

        np.testing.assert_allclose(joint(model, SERIES), FALL, rtol=1e-6)
        with pytest.raises(ebm.EnergyError, match="are inside scan"):
            jax.jit(lambda x: log_density(ebm.estimate(model, "sm"), (x,), {}, {})[0])(SERIES)

    def test_a_closure_is_not_traced_for_another_kind_of_value(self):
        stacked = jax.vmap(lambda c: ebm.EnergyDistribution(lambda v: c * v, support=constraints.boolean))(jnp.ones(2))
        with pytest.raises(ebm.EnergyError, match="context=values"):
            stacked.evaluate_energy(jnp.asarray(0.5), jax.tree.map(lambda leaf: leaf[0], stacked.context))


class TestNarrowIntegers:
    ORDINAL = np.array([[9, 0, 5, 3]])

    @pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.float32])
    def test_energies_do_not_wrap_round(self, dtype):
        d = ebm.EnergyDistribution(
            lambda x: jnp.sum(jnp.abs(x[1:] - x[:-1])), (4,), support=constraints.integer_interval(0, 9)
        )
        np.testing.assert_allclose(d.log_prob(self.ORDINAL.astype(dtype)), [-16.0])
        product = ebm.EnergyDistribution(lambda x: 1e-3 * jnp.prod(x), (2,), support=constraints.integer_interval(0, 100))
        np.testing.assert_allclose(product.log_prob(np.array([50, 60], dtype)), -3.0, rtol=1e-6)
        counts = ebm.EnergyDistribution(lambda n: 0.0 * n, base=dist.Poisson(200.0), support=constraints.nonnegative_integer)
        np.testing.assert_allclose(
            counts.log_prob(np.array([100], dtype)), dist.Poisson(200.0).log_prob(np.array([100])), rtol=1e-6
        )

    def test_neither_do_those_of_factors_and_contexts(self):
        x, c = np.array([[50, 60], [9, 7]], np.uint8), np.array([200, 100], np.uint8)

        def model():
            with numpyro.plate("rows", 2):
                v = numpyro.sample("x", dist.DiscreteUniform(0, 100).expand([2]).to_event(1), obs=x)
                ebm.energy_factor("phi", lambda x, c: jnp.prod(x) + (c + c), x=v, c=c)

        right = -np.sum(x.astype(int).prod(axis=1) + 2 * c.astype(int)) - 4 * np.log(101)
        np.testing.assert_allclose(joint(model), right, rtol=1e-6)
        d = ebm.EnergyDistribution(lambda y, c: y * (c + c), context=c, batch_shape=(2,))
        np.testing.assert_allclose(d.log_prob(np.ones(2)), [-400, -200])

    def test_booleans_are_numbers(self):
        units = RNG.random((40, 3)) < 0.6
        d = ebm.EnergyDistribution(lambda x: jnp.sum(jnp.abs(x[1:] - x[:-1])), (3,), support=constraints.boolean)
        np.testing.assert_allclose(d.log_prob(units), d.log_prob(units.astype(np.int32)))

        def model():
            with numpyro.plate("rows", 40):
                numpyro.sample("x", d, obs=units)

        assert np.isfinite(surrogate(ebm.estimate(model, "mpf"), {}))


class TestMaskedRows:
    KEEP = np.arange(50) % 10 == 0

    @pytest.mark.parametrize(
        ("name", "options"),
        [("pcd", {"start": "data", "num_chains": 40}), ("replay", {"start": "data", "buffer_size": 40})],
    )
    def test_are_no_starts(self, name, options):
        """Chains start from the rows that take part, from all of them about as often."""
        x = np.where(self.KEEP, np.arange(50.0), np.nan).astype(np.float32)

        def model(x):
            with numpyro.plate("rows", 50), numpyro.handlers.mask(mask=self.KEEP):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * v**2), obs=x)

        with numpyro.handlers.seed(rng_seed=0):
            ((estimator, site),) = ebm.estimate(model, name, **options).sites(x)
        values, counts = np.unique(np.asarray(estimator.init(jax.random.key(1), site).pool.position), return_counts=True)
        np.testing.assert_array_equal(values, np.flatnonzero(self.KEEP))
        assert counts.min() >= 4  # of 8

    @pytest.mark.parametrize("name", some_slow(["cd"], ["mle", "pcd", "replay"]))
    def test_missing_contexts_and_bases_reach_no_chain(self, name):
        k = np.where(self.KEEP, 1.0 + np.arange(50), np.nan).astype(np.float32)
        x = np.where(self.KEEP, 0.1 * np.arange(50), np.nan).astype(np.float32)

        def model(t):
            with numpyro.plate("rows", 50), numpyro.handlers.mask(mask=self.KEEP):
                base = dist.Normal(jnp.asarray(k), 1.0, validate_args=False)
                numpyro.sample("x", ebm.EnergyDistribution(lambda v, k: t * k * v, context=k, base=base), obs=x)

        estimated = ebm.estimate(model, name, num_steps=2)
        value, slope = jax.value_and_grad(
            lambda t: log_density(numpyro.handlers.seed(estimated, jax.random.key(0)), (t,), {}, {})[0]
        )(0.1)
        assert np.isfinite(value)
        assert np.isfinite(slope)


class TestNoRows:
    """An empty filter is refused at the front, by every estimator alike, as NumPyro refuses an empty plate."""

    OPTIONS = continuous_options("x") | {name: other.options for name, other in OTHERS.items()}

    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_is_said(self, name):
        options = self.OPTIONS[name]

        def model(x):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * v**2), obs=x)

        def plated(x):
            with numpyro.plate("rows", 1):
                model(x)

        for each in (model, plated):
            with pytest.raises(ebm.EnergyError, match=r"site 'x'.*\(0,\) hold no rows.*filter"):
                joint(numpyro.handlers.seed(ebm.estimate(each, name, **options), 0), Y[:0])

    def test_an_event_without_elements(self):
        with pytest.raises(ebm.EnergyError, match="event without elements"):
            ebm.EnergyDistribution(lambda v: jnp.sum(v), (0,))
        assert ebm.EnergyDistribution(lambda v: jnp.sum(v), (2,)).log_prob(np.ones((0, 2))).shape == (0,)


class TestObsMask:
    KEEP = jnp.asarray(np.arange(50) % 4 != 0)
    X = RNG.normal(0, 0.5, 50).astype(np.float32)

    def model(self, x):
        t = numpyro.param("t", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", 50):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x, obs_mask=self.KEEP)

    def test_without_a_guide_for_the_missing_the_message_says_what_to_write(self):
        svi = SVI(ebm.estimate(self.model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        with pytest.raises(ebm.EnergyError, match=r"'x_unobserved'.*obs_mask.*handlers.mask\(mask=obs_mask\).*AutoNormal"):
            svi.init(jax.random.key(0), self.X)

    @pytest.mark.slow
    def test_a_guide_imputes_the_missing(self):
        x = jnp.where(self.KEEP, self.X, jnp.nan)
        estimated = ebm.estimate(self.model, "sm")
        svi = SVI(estimated, AutoNormal(estimated), optax.adam(0.1), Trace_ELBO())
        state = jax.jit(svi.init)(jax.random.key(0), x)
        state, loss = jax.jit(svi.update)(state, x)
        assert np.isfinite(loss)
        params = svi.get_params(state)
        assert params["x_unobserved_auto_loc"].shape == (50,)
        assert all(np.all(np.isfinite(value)) for value in params.values())


class TestScope:
    X = RNG.normal(0, 0.5, 100).astype(np.float32)

    @staticmethod
    def inside(x=X):
        with numpyro.handlers.scope(prefix="a"), numpyro.handlers.scope(prefix="b", divider="."):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

    SLOW = tuple(pytest.param(*each, marks=pytest.mark.slow) for each in (("pcd", ""), ("nce", ""), ("nce", "o/")))

    @pytest.mark.slow
    @pytest.mark.parametrize(("name", "outer"), [("pcd", "o/"), *SLOW])
    def test_names_states_and_reports(self, name, outer):
        estimated = ebm.estimate(self.inside, {"a/b.x": name})
        model = numpyro.handlers.scope(estimated, prefix="o") if outer else estimated
        svi = SVI(model, ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
        records = {"record_chains": 3} if name == "pcd" else {}
        result = ebm.fit(jax.random.key(0), svi, 20, self.X, progress_bar=False, **records)
        site = f"{outer}a/b.x"
        if name == "pcd":
            assert set(result.params) == {f"{outer}a/b.t"}
            assert set(result.state.mutable_state) == {f"{site}$pcd"}
            assert set(result.chains.samples) == set(result.chains.energies) == {site}
        else:
            assert set(result.params) == {f"{outer}a/b.t", f"{site}$log_normalizer"}
        report = ebm.training_report(model, result, self.X)
        assert [each.site for each in report.sites] == [site]
        found = [finding.name for finding in ebm.diagnose(model, result, self.X).findings]
        assert any(name.startswith(f"{site} ") for name in found)
        assert not any(name.startswith(("a/", "x")) and not name.startswith(site) for name in found)

    def test_learned_log_z_is_named_once(self):
        svi = SVI(ebm.estimate(self.inside, "nce"), ebm.empty_guide, optax.adam(0.05), Trace_ELBO())
        params = svi.get_params(jax.jit(svi.init)(jax.random.key(0), self.X))
        assert set(params) == {"a/b.t", "a/b.x$log_normalizer"}

    def test_is_the_same_as_without(self):
        named = surrogate(ebm.estimate(self.inside, "sm"), {"a/b.t": 2.0}, self.X)
        np.testing.assert_allclose(named, rows_of("sm", precision_model, self.X, 2.0)[0].sum(), rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("outside", [False, True], ids=["both inside", "site outside"])
    def test_factors_know_their_sites(self, outside):
        def model():
            if outside:
                v = numpyro.sample("x", dist.Normal(0.0, 1.0))
            with numpyro.handlers.scope(prefix="a"):
                v = v if outside else numpyro.sample("x", dist.Normal(0.0, 1.0))
                ebm.energy_factor("phi", lambda x: 1.5 * x**2, x=v)

        name = "x" if outside else "a/x"
        slope = jax.grad(lambda v: log_density(model, (), {}, {name: v})[0])(0.7)
        np.testing.assert_allclose(slope, -4 * 0.7, rtol=1e-6)
        if not outside:
            log_z = ebm.log_partition(None, model, method="grid", low=-8.0, high=8.0)
            np.testing.assert_allclose(log_z.value, -0.5 * np.log(4), atol=1e-3)

    def test_joint_events(self):
        def model(x, y):
            with numpyro.handlers.scope(prefix="a"), numpyro.plate("rows", 100):
                x = numpyro.sample("x", dist.Normal(0, 1), obs=x)
                y = numpyro.sample("y", dist.Normal(0, 1), obs=y)
                ebm.energy_factor("pair", lambda x, y: 0.5 * (x - y) ** 2, x=x, y=y)

        def plain(x, y):
            with numpyro.plate("rows", 100):
                x = numpyro.sample("x", dist.Normal(0, 1), obs=x)
                y = numpyro.sample("y", dist.Normal(0, 1), obs=y)
                ebm.energy_factor("pair", lambda x, y: 0.5 * (x - y) ** 2, x=x, y=y)

        values = [surrogate(ebm.estimate(m, "sm"), {}, self.X, self.X[::-1]) for m in (model, plain)]
        np.testing.assert_allclose(*values, rtol=1e-6)

    @pytest.mark.slow
    def test_a_latent_energy_of_a_scoped_guide(self):
        def model(x):
            with numpyro.handlers.scope(prefix="a"):
                z = numpyro.sample("z", ebm.EnergyDistribution(lambda z: 0.5 * z**2))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

        scoped = numpyro.handlers.scope(ebm.estimate(model, "mle", num_steps=2), prefix="o")
        svi = SVI(scoped, AutoNormal(scoped), optax.adam(0.1), Trace_ELBO())
        state = jax.jit(svi.init)(jax.random.key(0), 0.5)
        assert set(svi.get_params(state)) == {"o/a/z_auto_loc", "o/a/z_auto_scale"}
        assert set(state.mutable_state) == {"o/a/z$mle"}


class TestMeshes:
    @staticmethod
    def value(kind, name="sm"):
        mesh = jax.make_mesh((1,), ("rows",), axis_types=(kind,))
        x = jax.device_put(TestScope.X, NamedSharding(mesh, PartitionSpec("rows")))
        estimated = numpyro.handlers.seed(ebm.estimate(precision_model, name), 0)
        return log_density(estimated, (x,), {}, {"t": 1.0})[0]

    def test_explicit_axes_are_refused_and_automatic_ones_work(self):
        with pytest.raises(ebm.EnergyError, match=r"explicit axes.*make_mesh\(\(1,\), \('rows',\), axis_types=.*Auto"):
            self.value(AxisType.Explicit)
        right = log_density(ebm.estimate(precision_model, "sm"), (TestScope.X,), {}, {"t": 1.0})[0]
        np.testing.assert_allclose(self.value(AxisType.Auto), right, rtol=1e-5)
