"""Score matching and its relatives, each against its theory."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import precision_model, some_slow, surrogate
from numpyro.distributions import constraints

import numpyro_ebm as ebm
from numpyro_ebm.estimators.parts.projections import directions

X3 = np.random.default_rng(0).multivariate_normal(np.zeros(3), [[2, 0.5, 0], [0.5, 1, 0.3], [0, 0.3, 0.7]], 400)


def rows(energy, name, x, *, support=constraints.real, key=0, **options):
    """The surrogate of each row, of a distribution of this energy."""

    def model(x):
        d = ebm.EnergyDistribution(energy, x.shape[1:], support=support)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", d, obs=x)

    def values(x):
        seeded = numpyro.handlers.seed(ebm.estimate(model, name, **options), key)
        return numpyro.handlers.trace(seeded).get_trace(x)["x"]["fn"].log_prob(x)

    return np.asarray(jax.jit(values)(x))


def slopes(energy, name, x, theta=1.0, **options):
    """Derivative in the parameter of the surrogate of each row."""
    values = lambda t: rows(lambda x: energy(t, x), name, x, **options)  # noqa: E731
    step = 1e-3
    return (values(theta + step) - values(theta - step)) / (2 * step)


def quadratic_optimum(model, x):
    """Where a surrogate that is quadratic in its one parameter t is largest."""
    slope = jax.grad(lambda t: surrogate(model, {"t": t}, x))
    return -slope(0.0) / (slope(1.0) - slope(0.0))


def rough(x):
    """An energy without symmetry, of four derivatives that matter."""
    return 0.25 * jnp.sum(x**4) + x[0] * x[1] + jnp.sin(x[2] * x[0]) + 0.5 * jnp.sum(x**2)


class TestDirections:
    @pytest.mark.parametrize("law", ["rademacher", "gaussian", "sphere"])
    def test_their_second_moment_is_the_identity(self, law):
        num = 40_000
        v = directions(jax.random.key(0), law, num // 4, jnp.zeros((4, 2, 2), jnp.float32))
        assert v.shape == (num // 4, 4, 2, 2)
        assert v.dtype == jnp.float32
        v = v.reshape(num, 2, 2)
        products = np.asarray(jnp.einsum("ni,nj->nij", v.reshape(num, 4), v.reshape(num, 4)))
        error = 5 * products.std(axis=0) / np.sqrt(num) + 1e-6
        np.testing.assert_array_less(np.abs(products.mean(axis=0) - np.eye(4)), error)
        if law != "gaussian":
            np.testing.assert_allclose(jnp.sum(v**2, (1, 2)), 4, rtol=1e-5)

    @pytest.mark.parametrize("name", ["ssm", "ssm_vr", "fd_ssm"])
    def test_what_is_no_law_or_no_count_is_refused(self, name):
        with pytest.raises(ValueError, match="Unknown projection 'rademaher'. Did you mean 'rademacher'"):
            ebm.estimate(precision_model, name, projection="rademaher")
        with pytest.raises(ValueError, match="whole number num_projections >= 1; got num_projections=0"):
            ebm.estimate(precision_model, name, num_projections=0)


@pytest.mark.usefixtures("x64")
class TestFiniteDifferences:
    options = {"num_projections": 3, "projection": "gaussian"}

    @pytest.mark.parametrize("support", [constraints.real, constraints.positive])
    def test_a_small_step_gives_sliced_score_matching(self, support):
        x = np.random.default_rng(0).uniform(0.3, 2, (20, 3))
        exact = rows(rough, "ssm", x, support=support, **self.options)
        errors = [
            np.abs(rows(rough, "fd_ssm", x, support=support, epsilon=step, **self.options) - exact).max()
            for step in (2e-3, 1e-3)
        ]
        assert errors[1] < 1e-4 * np.abs(exact).max()
        np.testing.assert_allclose(errors[0] / errors[1], 4, rtol=0.02)  # of order epsilon^2

    def test_any_step_is_exact_for_a_gaussian(self):
        energy = lambda x: 0.5 * x @ jnp.linalg.inv(jnp.cov(X3.T)) @ x + x[0]  # noqa: E731
        exact = rows(energy, "ssm", X3, **self.options)
        np.testing.assert_allclose(rows(energy, "fd_ssm", X3, epsilon=0.7, **self.options), exact, rtol=1e-10)

    def test_no_derivative_in_the_event_is_taken(self):
        @jax.custom_jvp
        def energy(x):
            return jnp.sum(x**2)

        @energy.defjvp
        def jvp(primals, tangents):
            raise AssertionError("differentiated")

        with pytest.raises(AssertionError, match="differentiated"):
            rows(energy, "ssm", X3[:3])
        assert np.isfinite(rows(energy, "fd_ssm", X3[:3])).all()

    @pytest.mark.parametrize("epsilon", [0.0, -0.1, float("nan"), [0.1, 0.1]])
    def test_what_is_no_step_is_refused(self, epsilon):
        with pytest.raises(ValueError, match="epsilon"):
            ebm.estimate(precision_model, "fd_ssm", epsilon=epsilon)


@pytest.mark.usefixtures("x64")
class TestRegularized:
    def test_the_optimum_on_a_gaussian_is_that_of_denoising(self, gaussian_data):
        model = ebm.estimate(precision_model, "regularized_sm", sigma=0.5)
        np.testing.assert_allclose(quadratic_optimum(model, gaussian_data), 1.9988, atol=5e-5)

    def test_the_optimum_of_a_full_precision(self):
        def model(x):
            k = numpyro.param("k", jnp.eye(3))
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ (k + k.T) @ x / 2, (3,)), obs=x)

        optimum = jnp.linalg.inv(X3.T @ X3 / 400 + 0.3**2 * np.eye(3))
        wrapped = ebm.estimate(model, "regularized_sm", sigma=0.3)
        grad = jax.grad(lambda k: surrogate(wrapped, {"k": k}, X3))(optimum)
        np.testing.assert_allclose(grad / 400, 0, atol=1e-12)

    @pytest.mark.parametrize("curvature", ["full", "diagonal"])
    def test_its_terms(self, curvature):
        k = np.array([[2.0, 0.6, 0.0], [0.6, 1.0, -0.2], [0.0, -0.2, 0.5]])
        penalty = np.sum(k**2 if curvature == "full" else np.diag(k) ** 2)
        loss = 0.5 * np.sum((X3 @ k) ** 2, axis=1) - np.trace(k) + 0.5 * 0.3**2 * penalty
        values = rows(lambda x: 0.5 * x @ k @ x, "regularized_sm", X3, sigma=0.3, curvature=curvature)
        np.testing.assert_allclose(values, -loss, rtol=1e-12)

    def test_it_is_score_matching_of_noisy_data_up_to_the_fourth_order(self):
        # At the truth of exp(-x^4), by quadrature over the data and over the noise.
        grid = np.linspace(-2.5, 2.5, 401)
        density = np.exp(-(grid**4)) / np.sum(np.exp(-(grid**4)))
        nodes, weights = np.polynomial.hermite_e.hermegauss(12)
        weights /= weights.sum()

        def error(sigma):
            noisy = rows(lambda x: x**4, "sm", (grid[:, None] + sigma * nodes).ravel()).reshape(401, 12) @ weights
            return density @ (noisy - rows(lambda x: x**4, "regularized_sm", grid, sigma=sigma))

        np.testing.assert_allclose(error(0.02) / error(0.01), 16, rtol=0.01)

    def test_what_is_no_noise_or_no_curvature_is_refused(self):
        for sigma in (None, 0.0, -1.0, np.array([0.1, 0.2])):
            with pytest.raises(ValueError, match="sigma"):
                ebm.estimate(precision_model, "regularized_sm", sigma=sigma)
        with pytest.raises(ValueError, match="Unknown curvature 'diag'. Did you mean 'diagonal'"):
            ebm.estimate(precision_model, "regularized_sm", sigma=0.1, curvature="diag")


@pytest.mark.usefixtures("x64")
class TestHigherOrder:
    def test_the_first_weight_alone_is_score_matching(self):
        exact = rows(rough, "sm", X3[:20])
        np.testing.assert_allclose(rows(rough, "hsm", X3[:20], weights=(2, 0)), 2 * exact, rtol=1e-12)

    @pytest.mark.slow
    def test_the_rule_of_order_four(self):
        # (Laplacian q) / q from q itself, and its Laplacian from its Hessian.
        def u(x):
            density = lambda x: jnp.exp(-rough(x))  # noqa: E731
            return jnp.trace(jax.hessian(density)(x)) / density(x)

        x = 0.5 * X3[:20]
        loss = jax.jit(jax.vmap(lambda x: 0.5 * u(x) ** 2 - jnp.trace(jax.hessian(u)(x))))(x)
        np.testing.assert_allclose(rows(rough, "hsm", x, weights=(0, 1)), -loss, rtol=1e-9)
        both = 0.5 * rows(rough, "sm", x) - 3 * loss
        np.testing.assert_allclose(rows(rough, "hsm", x, weights=[0.5, 3]), both, rtol=1e-9)

    def test_the_optimum_on_a_gaussian(self, gaussian_data):
        # u = t^2 x^2 - t: the loss is t^4 m4 / 2 - t^3 m2 - 3 t^2 / 2.
        m2, m4 = np.mean(gaussian_data**2), np.mean(gaussian_data**4)
        optimum = (3 * m2 + np.sqrt(9 * m2**2 + 24 * m4)) / (4 * m4)
        model = ebm.estimate(precision_model, "hsm", weights=(0, 1))
        slope = jax.grad(lambda t: surrogate(model, {"t": t}, gaussian_data))
        np.testing.assert_allclose(slope(optimum) / 2000, 0, atol=1e-10)
        assert slope(optimum - 0.1) > 0 > slope(optimum + 0.1)

    @pytest.mark.parametrize("weights", [(0, 0), (1, -1), (1,), 1.0, (1, float("inf")), ("a", 1)])
    def test_what_are_no_weights_is_refused(self, weights):
        with pytest.raises(ValueError, match="needs two weights >= 0, not both 0"):
            ebm.estimate(precision_model, "hsm", weights=weights)


# A tilt E = 3 x of the unit interval, by the inverse of its distribution function.
TILT = -np.log1p(-np.random.default_rng(14).random(4000) * (1 - np.exp(-3))) / 3


def tilt_model(x):
    t = numpyro.param("t", 0.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: t * x, support=constraints.unit_interval), obs=x)


@pytest.mark.usefixtures("x64")
class TestGeneralized:
    @pytest.mark.parametrize(
        ("options", "h"),
        [
            ({}, lambda x: (x**2 * (1 - x) ** 2, 2 * x * (1 - x) * (1 - 2 * x))),
            ({"weighting": "distance"}, lambda x: (np.minimum(x, 1 - x), np.where(x < 0.5, 1, -1))),
            (
                {"weighting": "capped", "cap": 0.2},
                lambda x: (np.minimum(np.minimum(x, 1 - x), 0.2), (x < 0.2) * 1 - (x > 0.8)),
            ),
            ({"weighting": lambda x: jnp.sin(jnp.pi * x)}, lambda x: (np.sin(np.pi * x), np.pi * np.cos(np.pi * x))),
        ],
    )
    def test_a_tilted_interval(self, options, h):
        # The loss is t^2 h / 2 - t h' a row.
        weight, slope = h(TILT)
        optimum = quadratic_optimum(ebm.estimate(tilt_model, "generalized_sm", **options), TILT)
        np.testing.assert_allclose(optimum, slope.mean() / weight.mean(), rtol=1e-10)
        spread = np.std(slope - 3 * weight) / weight.mean() / np.sqrt(4000)
        assert abs(optimum - 3) < 5 * spread
        if not options:
            np.testing.assert_allclose(optimum, 2.9180, atol=5e-5)

    def test_on_the_real_line_it_is_score_matching(self):
        np.testing.assert_allclose(rows(rough, "generalized_sm", X3), rows(rough, "sm", X3), rtol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("low", [-0.5, -np.inf])
    def test_the_square_is_score_matching_in_unconstrained_coordinates(self, low):
        # Up to a term free of parameters: on unit intervals and half lines of both directions.
        high = low + 1 if np.isfinite(low) else 0.5
        support = constraints.interval(low, high) if np.isfinite(low) else constraints.less_than(high)
        x = high - np.random.default_rng(0).uniform(0.05, 0.95, (30, 3))
        energy = lambda t, x: rough(t * x)  # noqa: E731
        results = [slopes(energy, name, x, support=support) for name in ("generalized_sm", "sm")]
        np.testing.assert_allclose(*results, rtol=1e-6, atol=1e-7)

    def test_a_function_is_the_weight_of_that_name(self):
        x = np.random.default_rng(0).exponential(1.0, (30, 3))
        values = [
            rows(rough, "generalized_sm", x, support=constraints.positive, **options)
            for options in ({"weighting": lambda x: jnp.minimum(x, 0.7)}, {"weighting": "capped", "cap": 0.7})
        ]
        np.testing.assert_allclose(*values, rtol=1e-12)

    @pytest.mark.slow
    @pytest.mark.parametrize("weight", some_slow(["square"], [lambda x: jnp.log1p(x)]))
    def test_a_non_negative_gaussian(self, weight):
        truth = jnp.array([1.0, 0.4, 2.0])  # K11, K12, K22

        def model(x):
            k = numpyro.param("k", truth)
            d = ebm.EnergyDistribution(
                lambda x: 0.5 * (k[0] * x[0] ** 2 + k[2] * x[1] ** 2) + k[1] * x[0] * x[1],
                (2,),
                support=constraints.positive,
            )
            numpyro.sample("x", d, obs=x)

        cov = np.linalg.inv(np.array([[1.0, 0.4], [0.4, 2.0]]))
        x = np.random.default_rng(0).multivariate_normal([0, 0], cov, 40_000)
        x = x[(x > 0).all(axis=1)]
        wrapped = ebm.estimate(model, "generalized_sm", weighting=weight)
        loss = lambda k, x: -surrogate(wrapped, {"k": k}, x) / len(x)  # noqa: E731
        hessian = jax.hessian(loss)(truth, x)
        step = jnp.linalg.solve(hessian, jax.grad(loss)(truth, x))  # to the optimum: the loss is quadratic
        np.testing.assert_allclose(jax.grad(loss)(truth - step, x), 0, atol=1e-12)
        gradients = jax.vmap(lambda row: jax.grad(loss)(truth, row[None]))(x)
        inverse = jnp.linalg.inv(hessian)
        error = jnp.sqrt(jnp.diag(inverse @ jnp.cov(gradients.T) @ inverse) / len(x))
        np.testing.assert_array_less(np.abs(step), 5 * error)
        np.testing.assert_array_less(error, 0.1)

    @pytest.mark.slow
    def test_a_joint_event_of_blocks(self):
        rng = np.random.default_rng(0)
        data = {"x": rng.exponential(1.0, 30), "y": rng.normal(size=(30, 2)), "z": rng.uniform(0.1, 0.9, 30)}

        def model(x, y, z):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", 30):
                x = numpyro.sample("x", dist.Exponential(1.0), obs=x)
                y = numpyro.sample("y", dist.Normal(0, 1).expand([2]).to_event(1), obs=y)
                z = numpyro.sample("z", dist.Beta(2.0, 3.0), obs=z)
                energy = lambda x, y, z: t * (x * y[0] ** 2 + z * x + y[1] * z) + x**2  # noqa: E731
                ebm.energy_factor("phi", energy, x=x, y=y, z=z)

        results = [
            jax.grad(lambda t, est=est: surrogate(ebm.estimate(model, est), {"t": t}, *data.values()))(0.7)
            for est in ("generalized_sm", ebm.ScoreMatching(trace="columns"))
        ]
        np.testing.assert_allclose(*results, rtol=1e-10)

    @pytest.mark.parametrize(
        "options",
        [{"weighting": "distance"}, {"weighting": jnp.sqrt}, {"weighting": "capped", "cap": 0.5}],
    )
    def test_a_real_coordinate_beside_a_bounded_one_has_weight_one(self, options):
        # sqrt(y) is not even defined where y < 0.
        rng = np.random.default_rng(0)
        x, y = rng.exponential(1.0, 30), rng.normal(size=30)

        def model(x, y):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", 30):
                x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), ()), obs=x)
                y = numpyro.sample("y", dist.ImproperUniform(constraints.real, (), ()), obs=y)
                ebm.energy_factor("phi", lambda x, y: t * x * y + x + y**2, x=x, y=y)

        weights = {"distance": (x, np.ones(30)), "capped": (np.minimum(x, 0.5), x < 0.5)}
        h, slope = weights.get(options["weighting"], (np.sqrt(x), 0.5 / np.sqrt(x)))
        sx, sy = -0.7 * y - 1, -0.7 * x - 2 * y
        loss = np.sum(0.5 * h * sx**2 + slope * sx + 0.5 * sy**2 - 2)
        wrapped = ebm.estimate(model, "generalized_sm", **options)
        value, gradient = jax.value_and_grad(lambda t: surrogate(wrapped, {"t": t}, x, y))(0.7)
        np.testing.assert_allclose(value, -loss, rtol=1e-10)
        np.testing.assert_allclose(gradient, np.sum(h * sx * y + slope * y + sy * x), rtol=1e-10)

    @pytest.mark.parametrize(("weight", "limit"), [("square", (3 - 1) ** 2 / 2 + (3 - 1)), ("distance", np.inf)])
    def test_a_row_on_an_end_counts_by_its_limit(self, weight, limit):
        # E = 2 x - (a - 1) log x: score (a - 1) / x - 2, whose product with the weight stays finite under x^2 alone.
        x = np.array([[0.0], [0.7], [2.0], [0.0], [1.3]])
        gamma = lambda x: jnp.sum(2 * x - 2 * jnp.log(x))  # noqa: E731
        losses = -rows(gamma, "generalized_sm", x, support=constraints.nonnegative, weighting=weight)
        inside = x[:, 0] > 0
        at = x[inside, 0]
        score, slope = 2 / at - 2, -2 / at**2
        h, dh = (at**2, 2 * at) if weight == "square" else (at, 1.0)
        np.testing.assert_allclose(losses[inside], 0.5 * h * score**2 + h * slope + dh * score, rtol=1e-10)
        if np.isfinite(limit):
            np.testing.assert_allclose(losses[~inside], limit, rtol=1e-4)
        # A finite score t: h = 0 and h' = 1 on the end itself under "distance", h' = 0 under "square".
        losses = -rows(lambda x: 2 * jnp.sum(x), "generalized_sm", x, support=constraints.nonnegative, weighting=weight)
        np.testing.assert_allclose(losses[~inside], -2.0 if weight == "distance" else 0.0, atol=1e-4)

    def test_both_ends_of_an_interval_in_float32(self):
        x = np.array([[5.0], [6.0], [5.3]], np.float32)
        with jax.enable_x64(False):
            support = constraints.interval(5, 6)
            values = rows(lambda x: 3 * jnp.sum(x), "generalized_sm", x, support=support, weighting="distance")
        np.testing.assert_allclose(-values, [-3.0, 3.0, 0.5 * 0.3 * 9 - 3], rtol=1e-3)

    def test_bounds_of_each_coordinate(self):
        low, high = np.array([0.0, 1.0]), np.array([1.0, 3.0])
        x = low + (high - low) * np.random.default_rng(0).uniform(0.1, 0.9, (30, 2))
        t = np.array([0.5, -2.0])
        h, slope = (x - low) ** 2 * (high - x) ** 2, 2 * (x - low) * (high - x) * (low + high - 2 * x)
        values = rows(lambda x: x @ t, "generalized_sm", x, support=constraints.interval(low, high))
        np.testing.assert_allclose(values, -np.sum(0.5 * h * t**2 - slope * t, axis=1), rtol=1e-10)

    @pytest.mark.parametrize(
        ("support", "weight", "message"),
        [
            (constraints.unit_interval, jnp.ones_like, "weight is 1 at 0, an end of the support: .* boundary term"),
            (constraints.positive, lambda x: 1 / (1 + x), "weight is 1 at 0, an end"),
            (constraints.unit_interval, lambda x: x, "weight is 1 at 1, an end"),
            (constraints.unit_interval, lambda x: x * (x - 1), "weight is not finite and positive inside"),
            (constraints.positive, jnp.zeros_like, "weight is not finite and positive inside"),
            (constraints.positive, lambda x: x[None], r"weight returned shape \(1,\)"),
            (constraints.real, lambda x: x**2, "has none.*'sm'"),
            (constraints.simplex, "square", "lines, half lines and intervals; the support .* none of these.*'sm'"),
            (constraints.ordered_vector, "distance", "unconstrained coordinates"),
        ],
    )
    def test_what_is_no_weight_or_no_interval_is_refused(self, support, weight, message):
        x = np.array([[0.2, 0.3, 0.5]])
        with pytest.raises(ValueError, match=f"site 'x'.*{message}"):
            rows(jnp.sum, "generalized_sm", x, support=support, weighting=weight)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weighting": "squared"}, "Did you mean 'square'"),
            ({"weighting": 1.0}, "name or a function.* constant weight is refused"),
            ({"weighting": [1.0]}, "name or a function"),
            ({"weighting": "capped"}, "needs a cap"),
            ({"cap": 1.0}, "others take none"),
            ({"weighting": "capped", "cap": 0.0}, "cap > 0"),
        ],
    )
    def test_what_are_no_options_is_refused(self, options, message):
        with pytest.raises(ValueError, match=message):
            ebm.estimate(precision_model, "generalized_sm", **options)
