"""Factors that name several sites: one joint event, for every estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from estimator_cases import continuous_options
from helpers import check_moments, fit, some_slow, surrogate
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC
from scipy.optimize import brentq
from scipy.special import digamma

import numpyro_ebm as ebm
from numpyro_ebm.distributions.blocks import Product

ROOT = np.array([[1.3, 0.4, -0.5, 0.2], [0.0, 1.1, 0.6, -0.3], [0.0, 0.0, 0.9, 0.5], [0.0, 0.0, 0.0, 1.2]])
PRECISION = ROOT.T @ ROOT
X = np.random.default_rng(0).normal(size=(60, 4)) @ np.linalg.inv(ROOT).T
OPTIONS = continuous_options("x,y", (2,)) | {"exact": {"low": -20.0, "high": 20.0}}  # the base is wider than a few rows


def improper(*shape, support=constraints.real):
    return dist.ImproperUniform(support, (), shape)


def quadratic(k, v):
    return 0.5 * v @ k @ v


def as_factors(x, observed="abc"):
    """Three sites of event shapes (), (2,) and (1, 1), joined by pairs, in a plate where there are rows."""
    k = numpyro.param("k", jnp.eye(4))
    k = 0.5 * (k + k.T)

    def data(name, value):
        return value if name in observed else None

    def body():
        a = numpyro.sample("a", improper(), obs=data("a", x[..., 0]))
        b = numpyro.sample("b", improper(2), obs=data("b", x[..., 1:3]))
        c = numpyro.sample("c", improper(1, 1), obs=data("c", x[..., 3, None, None]))
        ebm.energy_factor("aa", lambda a: 0.5 * k[0, 0] * a**2, a=a)
        ebm.energy_factor("ab", lambda a, b: a * k[0, 1:3] @ b + quadratic(k[1:3, 1:3], b), a=a, b=b)
        ebm.energy_factor("bc", lambda c, b: 0.5 * k[3, 3] * c[0, 0] ** 2 + c[0, 0] * k[3, 1:3] @ b, b=b, c=c)
        ebm.energy_factor("ca", lambda a, c: k[0, 3] * a * c[0, 0], c=c, a=a)

    if x.ndim == 1:
        body()
    else:
        with numpyro.plate("rows", len(x)):
            body()


def as_one(x):
    """The same as one event of four numbers."""
    k = numpyro.param("k", jnp.eye(4))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("v", ebm.EnergyDistribution(lambda v: quadratic(k, v), (4,)), obs=x)


def gradient_of(model, name, params, *args, **options):
    return jax.value_and_grad(lambda p: surrogate(ebm.estimate(model, name, **options), p, *args))(params)


@pytest.mark.usefixtures("x64")
class TestSameAsOneEvent:
    @pytest.mark.parametrize("name", some_slow(["sm", "cd", "nce"], ["dsm", "ssm", "mle", "pcd"]))
    def test_value_and_gradient(self, name):
        # The same key gives both the same noise: the joint event is laid out as the stacked one.
        params = {"k": jnp.asarray(PRECISION)}
        results = [gradient_of(m, name, params, X, **OPTIONS[name]) for m in (as_factors, as_one)]
        np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
        np.testing.assert_allclose(*(g["k"] + g["k"].T for _, g in results), rtol=1e-6, atol=1e-6)

    def test_score_matching_is_maximum_likelihood(self):
        best = np.linalg.inv(X.T @ X / len(X))
        gradient = gradient_of(as_factors, "sm", {"k": jnp.asarray(best)}, X)[1]["k"]
        np.testing.assert_allclose(gradient, 0, atol=1e-6)

    def test_fit(self):
        k = fit(ebm.estimate(as_factors, "sm"), X, steps=400)["k"]
        np.testing.assert_allclose(0.5 * (k + k.T), np.linalg.inv(X.T @ X / len(X)), rtol=1e-3, atol=1e-3)

    @pytest.mark.slow
    def test_the_first_site_gives_the_order_and_the_name(self):
        trace = handlers.trace(handlers.seed(ebm.estimate(as_factors, "pcd"), 0)).get_trace(X)
        assert trace["a,b,c$pcd"]["value"]["state"].pool.position.shape == (60, 4)
        assert trace["a,b,c$surrogate"]["fn"].batch_shape == (60,)


class TestImputation:
    """What is not observed is drawn given what is."""

    @pytest.mark.slow
    def test_any_member_given_the_others(self):
        # NUTS on the factors, b observed: (a, c) given b is Gaussian of precision K_oo.
        out, given, value = [0, 3], [1, 2], np.array([0.7, -1.1])
        cov = np.linalg.inv(PRECISION[np.ix_(out, out)])
        mean = -cov @ PRECISION[np.ix_(out, given)] @ value
        x = jnp.array([0.0, *value, 0.0])
        params = {"k": jnp.asarray(PRECISION)}
        draws = ebm.sample(
            jax.random.key(0), as_factors, params=params, num_warmup=300, num_chains=2, model_args=(x, "b")
        ).samples
        got = np.stack([draws["a"], draws["c"][..., 0, 0]], -1)
        check_moments(got, mean, np.diag(cov))

    @pytest.mark.slow
    def test_rows_of_a_plate(self):
        kernel = ebm.BlackJAXKernel(as_factors, "nuts", params={"k": jnp.asarray(PRECISION)})
        mcmc = MCMC(kernel, num_warmup=300, num_samples=1500, num_chains=2, chain_method="vectorized", progress_bar=False)
        mcmc.run(jax.random.key(0), jnp.asarray(X[:5], jnp.float32), "ac")
        cov = np.linalg.inv(PRECISION[1:3, 1:3])
        mean = -X[:5, [0, 3]] @ PRECISION[np.ix_([0, 3], [1, 2])] @ cov
        check_moments(mcmc.get_samples(group_by_chain=True)["b"], mean, np.broadcast_to(np.diag(cov), (5, 2)))


@pytest.mark.slow
class TestChainOfTwenty:
    """x0 ... x19, each tied to the next: precision t I + s T, T the neighbours."""

    neighbours = np.eye(20, k=1) + np.eye(20, k=-1)
    precision = 2.0 * np.eye(20) - 0.8 * neighbours
    x = np.random.default_rng(1).multivariate_normal(np.zeros(20), np.linalg.inv(precision), 50)

    @staticmethod
    def model(x=None):
        t, s = numpyro.param("t", 1.0), numpyro.param("s", 0.0)

        def pair(**values):
            left, right = values.values()
            return s * left * right + 0.5 * t * right**2

        def body(sites):
            for i in range(20):
                sites[f"x{i}"] = numpyro.sample(f"x{i}", improper(), obs=None if x is None else x[:, i])
            ebm.energy_factor("first", lambda x0: 0.5 * t * x0**2, x0=sites["x0"])
            for i in range(1, 20):
                ebm.energy_factor(f"pair{i}", pair, **{name: sites[name] for name in (f"x{i - 1}", f"x{i}")})

        if x is None:
            body({})
        else:
            with numpyro.plate("rows", len(x)):
                body({})

    @pytest.mark.slow
    def test_fit(self):
        # The loss is quadratic in (t, s): |(t I + s T) x|^2 / 2 - 20 t.
        parts = np.stack([self.x, self.x @ self.neighbours])
        best = np.linalg.solve(np.einsum("ind,jnd->ij", parts, parts) / 50, [20.0, 0.0])
        params = fit(ebm.estimate(self.model, "sm"), self.x.astype(np.float32), steps=300)
        np.testing.assert_allclose([params["t"], params["s"]], best, rtol=1e-3)

    @pytest.mark.slow
    def test_sample(self):
        params = {"t": 2.0, "s": -0.8}
        draws = ebm.sample(jax.random.key(0), self.model, params=params, num_warmup=200, num_samples=600, num_chains=2)
        values = np.stack([draws.samples[f"x{i}"] for i in range(20)], -1)
        check_moments(values, np.zeros(20), np.diag(np.linalg.inv(self.precision)))


@pytest.mark.usefixtures("x64")
class TestSupports:
    """x > 0 and y real, p(x, y) ~ exp(-t x y^2 / 2 - s x + k log x)."""

    rng = np.random.default_rng(2)
    x = rng.gamma(2.5, 1 / 1.5, 200)
    y = rng.normal(0, 1 / np.sqrt(2.0 * x))

    @staticmethod
    def model(x=None, y=None):
        t, s, k = numpyro.param("theta", jnp.ones(3))
        with numpyro.plate("rows", 1 if x is None else len(x)):
            y = numpyro.sample("y", improper(), obs=y)
            x = numpyro.sample("x", improper(support=constraints.positive), obs=x)
            ebm.energy_factor("pair", lambda x, y: 0.5 * t * x * y**2, x=x, y=y)
            ebm.energy_factor("own", lambda x: s * x - k * jnp.log(x), x=x)

    def test_score_matching_in_unconstrained_space(self):
        # log density of (u = log x, y): -t e^u y^2 / 2 - s e^u + (k + 1) u; its score is linear in (t, s, k).
        x, y = self.x, self.y
        zero, one = np.zeros_like(x), np.ones_like(x)
        score_u, score_y = np.stack([-0.5 * x * y**2, -x, one]), np.stack([-x * y, zero, zero])
        trace = np.stack([-0.5 * x * y**2 - x, -x, zero])
        matrix = (score_u @ score_u.T + score_y @ score_y.T) / len(x)
        best = np.linalg.solve(matrix, -(score_u.mean(1) + trace.mean(1)))
        value, gradient = gradient_of(self.model, "sm", {"theta": jnp.asarray(best)}, x, y)
        np.testing.assert_allclose(gradient["theta"], 0, atol=1e-8 * len(x))
        theta_score = best @ score_u + 1, best @ score_y
        loss = 0.5 * (theta_score[0] ** 2 + theta_score[1] ** 2) + best @ trace
        np.testing.assert_allclose(value, -loss.sum(), rtol=1e-9)

    def test_the_fault_is_named(self):
        x = self.x.copy()
        x[7] = -1.0
        with pytest.raises(ValueError, match=r"site 'y,x'.*Row 7.*outside the support.*x: "):
            surrogate(ebm.estimate(self.model, "cd"), {}, x, self.y)

    @pytest.mark.slow
    def test_chains_are_those_of_the_joint_density(self):
        # t = 2, s = 1.5, k = 2: y given x of precision 2 x, x a Gamma(2.5, 1.5); the gradient is model minus data.
        rng = np.random.default_rng(3)
        x = rng.gamma(2.5, 1 / 1.5, 2000)
        y = rng.normal(0, 1 / np.sqrt(2 * x))
        statistics = np.stack([0.5 * x * y**2, x, -np.log(x)])
        options = {"num_steps": 30, "kernel": ebm.HMC(step_size=0.1, num_integration_steps=15), "adapt_step_size": False}
        gradient = gradient_of(self.model, "mle", {"theta": jnp.array([2.0, 1.5, 2.0])}, x, y, **options)[1]["theta"]
        expected = np.array([0.25, 2.5 / 1.5, np.log(1.5) - digamma(2.5)])
        bound = 5 * statistics.std(1) / np.sqrt(2000)
        assert np.all(np.abs(gradient / 2000 + statistics.mean(1) - expected) < bound)

    @pytest.mark.slow
    def test_nuts_on_both(self):
        draws = ebm.sample(jax.random.key(0), self.model, params={"theta": jnp.array([2.0, 1.5, 2.0])}, num_chains=2)
        check_moments(draws.samples["x"][..., 0], 2.5 / 1.5, 2.5 / 1.5**2)

    @pytest.mark.slow
    def test_transform_of_blocks(self):
        parts = {
            "real": dist.Normal(0, 1).expand([2, 2]).to_event(2),
            "positive": dist.Gamma(2.0, 1.0),
            "simplex": dist.Dirichlet(jnp.ones(3)),
            "interval": dist.Uniform(-1.0, 2.0).expand([2]).to_event(1),
        }
        product = Product(list(parts), list(parts.values()))
        transform = dist.biject_to(product.support)
        x = jax.random.normal(jax.random.key(0), (5, *transform.inverse_shape(product.event_shape)))
        y = transform(x)
        assert x.shape[1:] == (9,)
        assert y.shape[1:] == transform.forward_shape((9,)) == product.event_shape == (10,)
        np.testing.assert_allclose(transform.inv(y), x, rtol=1e-8)
        assert product.support(y).shape == (5,)
        assert product.support(y).all()
        assert not product.support(y.at[3, 4].set(-1.0))[3]
        assert product.support(product.support.feasible_like(y)).all()
        # Without the last coordinate of the simplex the map is square.
        square = lambda x: jnp.delete(transform(x), 7)  # noqa: E731
        expected = [jnp.linalg.slogdet(jax.jacfwd(square)(row))[1] for row in x]
        np.testing.assert_allclose(transform.log_abs_det_jacobian(x, y), expected, rtol=1e-8)
        draws = product.expand((4,)).sample(jax.random.key(1), (3,))
        assert draws.shape == (3, 4, 10)
        assert product.support(draws).all()
        blocks = (y[:, :4].reshape(5, 2, 2), y[:, 4], y[:, 5:8], y[:, 8:])
        own = sum(d.log_prob(v) for d, v in zip(parts.values(), blocks, strict=True))
        np.testing.assert_allclose(product.log_prob(y), own)


@pytest.mark.usefixtures("x64")
class TestBases:
    """The members' own distributions are the base."""

    loc = np.linspace(-1, 1, 60)

    def model(self, x, kind):
        t = numpyro.param("t", 0.5)
        plain = "improper" if kind == "none" else "normal"
        with numpyro.plate("rows", 60):
            wide = {"normal": dist.Normal(self.loc, 2.0), "improper": improper()}
            a = numpyro.sample("a", wide[plain], obs=x[:, 0])
            b = numpyro.sample(
                "b", dist.Normal(0, 1).expand([2]).to_event(1) if kind == "all" else improper(2), obs=x[:, 1:3]
            )
            ebm.energy_factor("ab", lambda a, b: t * a**2 * b[0] ** 2, a=a, b=b)
            if kind == "none":
                ebm.energy_factor("own", lambda a, loc: 0.125 * (a - loc) ** 2, a=a, loc=self.loc)
            if kind != "all":
                ebm.energy_factor("rest", lambda b: 0.5 * jnp.sum(b**2), b=b)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["sm"], ["cd"]))
    def test_all_some_and_none_proper(self, name):
        results = [
            gradient_of(lambda x, kind=kind: self.model(x, kind), name, {"t": 0.7}, X) for kind in ("all", "some", "none")
        ]
        # cd's values differ by the chains' start only in the constant that a normalised base has, which cancels.
        np.testing.assert_allclose([r[1]["t"] for r in results], results[0][1]["t"], rtol=1e-9)
        np.testing.assert_allclose([r[0] for r in results], results[0][0], rtol=1e-9)

    @pytest.mark.slow
    def test_noise_and_starts_come_from_the_product(self):
        def model(x):
            t = numpyro.param("t", 0.5)
            with numpyro.plate("rows", 60):
                a = numpyro.sample("a", dist.Normal(0, 2), obs=x[:, 0])
                b = numpyro.sample("b", dist.Gamma(2, 1), obs=jnp.abs(x[:, 1]))
                ebm.energy_factor("ab", lambda a, b: t * a**2 * b, a=a, b=b)

        for name in ("nce", "mle"):
            value, gradient = gradient_of(model, name, {"t": 0.7}, X)
            assert np.isfinite([value, gradient["t"]]).all()
            assert gradient["t"] != 0


class TestComponents:
    @staticmethod
    def model(x, apart=True):
        t, s = numpyro.param("t", 1.0), numpyro.param("s", 1.0)
        with numpyro.plate("rows", len(x)):
            a, b, c, d = (numpyro.sample(n, improper(), obs=x[:, i]) for i, n in enumerate("abcd"))
            ebm.energy_factor("ad", lambda a, d: 0.5 * t * (a**2 + d**2) + 0.3 * a * d, a=a, d=d)
            ebm.energy_factor("cb", lambda c, b: 0.5 * s * (b**2 + c**2) - 0.2 * c * b, c=c, b=b)
            if not apart:
                ebm.energy_factor("bd", lambda b, d: 0.0 * b * d, b=b, d=d)

    @pytest.mark.slow
    def test_factors_that_share_no_site_are_two_energies(self):
        params = {"t": 1.2, "s": 0.7}
        model = ebm.estimate(self.model, {"a,d": "pcd", "c": "sm"})
        trace = handlers.trace(handlers.seed(model, 0)).get_trace(X)
        assert [n for n in trace if n.endswith("$surrogate")] == ["a,d$surrogate", "b,c$surrogate"]
        assert trace["a,d$pcd"]["value"]["state"].pool.position.shape == (60, 2)
        apart, joined = (
            surrogate(ebm.estimate(lambda x, apart=apart: self.model(x, apart), "sm"), params, X) for apart in (True, False)
        )
        np.testing.assert_allclose(apart, joined, rtol=1e-5)

    @pytest.mark.parametrize(
        ("estimators", "words"),
        [
            ({"a": "sm", "d": "cd", "b": "sm"}, r"estimators for \['a', 'd'\].*'a,d'"),
            ({"a,d": "sm", "d": "sm", "b": "sm"}, r"estimators for \['a,d', 'd'\]"),
            ({"a": "sm"}, "energy site 'b,c'"),
            ({"a": "sm", "b": "sm", "d,a": "sm"}, r"\['d,a'\].*a,d"),
        ],
    )
    def test_one_estimator_for_each(self, estimators, words):
        with pytest.raises(ValueError, match=words):
            surrogate(ebm.estimate(self.model, estimators), {}, X)


def pair(x, y, **settings):
    """Two sites and a factor, with what the settings change."""
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        with handlers.mask(mask=settings.get("mask_x", True)):
            x = numpyro.sample("x", dist.Normal(0, 2), obs=x)
        with handlers.mask(mask=settings.get("mask_y", True)):
            y = numpyro.sample("y", improper(), obs=y)
        ebm.energy_factor("xy", lambda x, y: 0.5 * y**2 + t * x * y, x=x, y=y)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", some_slow(["sm", "cd"], [n for n in OPTIONS if n not in ("sm", "cd")]))
def test_rows_masked_at_one_member_take_no_part(name):
    x, y = X[:8, 0].copy(), X[:8, 1].copy()
    mask_x, mask_y = np.arange(8) != 2, np.arange(8) % 4 != 3
    keep = mask_x & mask_y

    def result(fill, subset=slice(None)):
        left, right = np.where(mask_x, x, fill)[subset], np.where(mask_y, y, fill)[subset]
        masks = {"mask_x": jnp.asarray(mask_x[subset]), "mask_y": jnp.asarray(mask_y[subset])}
        return gradient_of(lambda x, y: pair(x, y, **masks), name, {"t": 0.3}, left, right, **OPTIONS[name])

    (value, gradient), (other_value, other) = result(np.nan), result(7.0)
    assert np.isfinite([value, gradient["t"]]).all()
    np.testing.assert_allclose([value, gradient["t"]], [other_value, other["t"]], rtol=1e-9)
    if name == "sm":
        alone = result(np.nan, keep)
        np.testing.assert_allclose([value, gradient["t"]], [alone[0], alone[1]["t"]], rtol=1e-9)


@pytest.mark.parametrize("name", some_slow(["sm"], [n for n in OPTIONS if n != "sm"]))
def test_every_estimator(name):
    model = ebm.estimate(pair, name, **OPTIONS[name])

    @jax.jit
    def values(t, x, y):
        seeded = handlers.substitute(handlers.seed(model, 0), {"t": t})
        site = handlers.trace(seeded).get_trace(x, y)["x,y$surrogate"]
        return site["fn"].log_prob(site["value"])

    x = jnp.asarray(X, jnp.float32)
    assert values(0.3, x[:, 0], x[:, 1]).shape == (60,)
    assert np.isfinite(values(0.3, x[:, 0], x[:, 1])).all()
    gradient = jax.grad(lambda t: jnp.sum(values(t, x[:, 0], x[:, 1])))(0.3)
    assert np.isfinite(gradient)
    assert gradient != 0


def test_a_covariate_of_each_row_and_one_of_all():
    # E = exp(k w) (x^2 + y^2) / 2; score matching in k: mean of w e^{2kw} r^2 - 2 w e^{kw} is 0.
    w = np.linspace(-1, 1, 60).astype(np.float32)
    r2 = X[:, 0] ** 2 + X[:, 1] ** 2

    def model(x):
        k = numpyro.param("k", 0.1)
        with numpyro.plate("rows", 60):
            x, y = numpyro.sample("x", improper(), obs=x[:, 0]), numpyro.sample("y", improper(), obs=x[:, 1])
            ebm.energy_factor("xy", lambda x, y, w, k: 0.5 * jnp.exp(k * w) * (x**2 + y**2), x=x, y=y, w=w, k=k)

    best = brentq(lambda k: np.mean(w * np.exp(2 * k * w) * r2 - 2 * w * np.exp(k * w)), -3, 3)
    np.testing.assert_allclose(fit(ebm.estimate(model, "sm"), X.astype(np.float32), steps=300)["k"], best, atol=1e-3)


def test_a_scalar_that_all_rows_share_is_no_context():
    def model(x):
        t = numpyro.param("t", 0.1)
        with numpyro.plate("rows", 60):
            x, y = numpyro.sample("x", improper(), obs=x[:, 0]), numpyro.sample("y", improper(), obs=x[:, 1])
            ebm.energy_factor("xy", lambda x, y, t: 0.5 * t * (x**2 + y**2), x=x, y=y, t=t)

    assert np.isfinite(surrogate(ebm.estimate(model, "nce"), {"t": 1.0}, X))


def test_outside_plates_and_of_numbers_without_arrays():
    def model():
        x = numpyro.sample("x", dist.Normal(0, 2), obs=1.0)
        y = numpyro.sample("y", dist.Normal(0, 2), obs=0.5)
        ebm.energy_factor("e", lambda x, y: x * y, x=x, y=y)

    # Score (-x/4 - y, -y/4 - x) = (-.75, -1.125), trace -1/2.
    np.testing.assert_allclose(surrogate(ebm.estimate(model, "sm"), {}), 0.5 - 0.5 * (0.75**2 + 1.125**2), rtol=1e-6)


@pytest.mark.slow
def test_rows_that_plates_subsample():
    def model(x, whole):
        with numpyro.plate("rows", 60, subsample_size=60 if whole else 6):
            batch = numpyro.subsample(x, event_dim=1)
            x = numpyro.sample("x", improper(), obs=batch[:, 0])
            y = numpyro.sample("y", improper(), obs=batch[:, 1])
            ebm.energy_factor("xy", lambda x, y: 0.5 * (x**2 + y**2) + 0.3 * x * y, x=x, y=y)

    value = lambda whole, **params: surrogate(ebm.estimate(model, "sm"), params, X, whole)  # noqa: E731
    parts = [value(False, rows=jnp.arange(6) + 6 * i) for i in range(10)]
    np.testing.assert_allclose(np.mean(parts), value(True), rtol=1e-5)


def changed(x):
    with numpyro.plate("rows", 60):
        x, y = numpyro.sample("x", improper(), obs=x[:, 0]), numpyro.sample("y", improper(), obs=x[:, 1])
        ebm.energy_factor("e", lambda x, y: x * y, x=x, y=2 * y)


def other_plates(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", improper(), obs=x[:, 0])
    with numpyro.plate("others", 60):
        b = numpyro.sample("y", improper(), obs=x[:, 1])
        ebm.energy_factor("e", lambda x, y: x * y, x=a, y=b)


def other_rows(x):
    y = numpyro.sample("y", improper(), obs=0.3)
    with numpyro.plate("rows", 60):
        x = numpyro.sample("x", improper(), obs=x[:, 0])
        ebm.energy_factor("e", lambda x, y: x * y, x=x, y=y)


def other_scale(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", improper(), obs=x[:, 0])
        with handlers.scale(scale=2.0):
            b = numpyro.sample("y", improper(), obs=x[:, 1])
        ebm.energy_factor("e", lambda x, y: x * y, x=a, y=b)


def discrete(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", improper(), obs=x[:, 0])
        b = numpyro.sample("y", dist.Bernoulli(0.5), obs=x[:, 1] > 0)
        ebm.energy_factor("e", lambda x, y: x * y, x=a, y=b)


def no_site(x):
    ebm.energy_factor("e", lambda x: jnp.sum(x), x=x)


def other_data(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", improper(), obs=x[:, 0])
        b = numpyro.sample("y", improper(2), obs=x[:, :1])
        ebm.energy_factor("e", lambda x, y: x * y.sum(), x=a, y=b)


def on_an_energy(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", ebm.EnergyDistribution(lambda x: x**2), obs=x[:, 0])
        b = numpyro.sample("y", improper(), obs=x[:, 1])
        ebm.energy_factor("e", lambda x, y: x * y, x=a, y=b)


def row_supports(x):
    with numpyro.plate("rows", 60):
        a = numpyro.sample("x", dist.Uniform(-9 * jnp.ones(60), 9.0), obs=x[:, 0])
        b = numpyro.sample("y", improper(), obs=x[:, 1])
        ebm.energy_factor("e", lambda x, y: x * y, x=a, y=b)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed, "factor 'e' got another value for 'y'"),
        (other_plates, r"factor 'e' is in plates \['others'\].*'x' in \['rows'\].*same plates"),
        (other_rows, "'y' in .*close over it"),
        (other_scale, "factor 'e' and its site 'y' are scaled differently"),
        (discrete, r"site 'x,y': The members \['y'\].*are discrete"),
        (no_site, "factor 'e' names no sample site"),
        (other_data, r"site 'x,y'.*'y' do not match"),
        (on_an_energy, "into the EnergyDistribution"),
        (row_supports, "share one support"),
    ],
)
def test_what_estimate_refuses(model, words):
    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(model, "sm"), {}, X)
