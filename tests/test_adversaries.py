"""Estimators with an adversary: what the best one would teach, and that it is found."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from helpers import precision_model, surrogate
from numpyro import handlers
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.estimators._critic import bounded

MLE = 3.99528
X = np.random.default_rng(0).multivariate_normal([0.5, -1.0], [[1.0, 0.4], [0.4, 0.8]], 300)
QUADRATIC = {"k": jnp.array([[1.5, -0.3], [-0.3, 0.9]]), "b": jnp.array([0.2, 0.1])}


def quadratic(x):
    k, b = numpyro.param("k", jnp.eye(2)), numpyro.param("b", jnp.zeros(2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x @ k @ x - b @ x, (2,)), obs=x)


def linear():
    """The best critic of a Gaussian for Gaussian data is linear."""
    a, c = numpyro.param("a", jnp.zeros((2, 2))), numpyro.param("c", jnp.zeros(2))
    return lambda x: a @ x + c


def line():
    """The same in one dimension."""
    a = numpyro.param("critic", jnp.zeros(2))
    return lambda x: a[0] * x + a[1]


def random_line():
    w = numpyro.sample("w", dist.Normal(0, 1))
    return lambda x: w * x


def in_turns(model, num_steps, *args, adversary, optimizer=None, rate=0.1, steps=600):
    """Parameters where the energy takes ``steps`` steps, and the adversary as many for each as it is given."""
    decay = lambda steps: optax.exponential_decay(rate, steps // 3, 0.1)  # noqa: E731
    optimizer = optimizer or optax.adam(decay(steps * num_steps))
    optimizer = ebm.alternate(optax.adam(decay(steps)), optimizer, adversary=adversary, num_adversary_steps=num_steps)
    svi = SVI(model, ebm.empty_guide, optimizer, Trace_ELBO())

    @jax.jit
    def run(rng_key):
        update = lambda state, _: svi.update(state, *args)  # noqa: E731
        return svi.get_params(jax.lax.scan(update, svi.init(rng_key, *args), None, length=steps * num_steps)[0])

    return run(jax.random.key(0))


@pytest.mark.usefixtures("x64")
class TestTheBestCriticOfTheSteinDiscrepancy:
    def test_a_linear_one_gives_the_gradient_of_score_matching(self):
        # On the rows themselves: the maximum over a and c is a linear system, solved by one Newton step.
        lsd = ebm.estimate(quadratic, "lsd", critic=linear, num_projections=None)

        def value(critic):
            flat = {"a": critic[:4].reshape(2, 2), "c": critic[4:]}
            return surrogate(lsd, {**QUADRATIC, **flat}, X)

        # Its derivatives are reversed, and twice reversed right: minus the loss of the energy is a minimum over the critic.
        best = jnp.linalg.solve(jax.hessian(value)(jnp.zeros(6)), jax.grad(value)(jnp.zeros(6)))
        np.testing.assert_allclose(jax.grad(value)(best), 0, atol=1e-9)
        critic = {"a": best[:4].reshape(2, 2), "c": best[4:]}
        ours = jax.grad(lambda params: surrogate(lsd, {**params, **critic}, X))(QUADRATIC)
        exact = jax.grad(lambda params: surrogate(ebm.estimate(quadratic, "sm"), params, X))(QUADRATIC)
        for name in QUADRATIC:
            np.testing.assert_allclose(ours[name], exact[name], rtol=1e-9)
        # And the value of the game is half the Fisher divergence from the Gaussian fitted to the rows.
        s = lambda x, k, b: b - k @ x  # noqa: E731
        k = jnp.linalg.inv(jnp.cov(X.T, bias=True))
        gap = jax.vmap(lambda x: s(x, **QUADRATIC) - s(x, k, k @ X.mean(0)))(X)
        np.testing.assert_allclose(-value(best), 0.5 * jnp.sum(gap**2), rtol=1e-9)

    @pytest.mark.parametrize("weight", [0.5, 2.0])
    def test_the_difference_of_scores_is_the_best_and_gives_that_gradient(self, weight):
        # Data from a mixture, model x^4 and x^2: a row's gradients differ by what is zero on average (by parts).
        rng = np.random.default_rng(0)
        x = rng.normal(np.where(rng.random(20_000) < 0.3, -1.0, 0.8), 0.5)
        mixture = dist.MixtureSameFamily(dist.Categorical(jnp.array([0.3, 0.7])), dist.Normal(jnp.array([-1.0, 0.8]), 0.5))
        t = jnp.array([0.8, -0.4])
        score = lambda x, t: -(t[0] * x**3 + t[1] * x)  # noqa: E731

        def model(x):
            t = numpyro.param("t", jnp.zeros(2))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: t[0] * x**4 / 4 + t[1] * x**2 / 2), obs=x)

        def critic():
            scale = numpyro.param("scale", 1.0)
            return lambda x: scale * (score(x, t) - jax.grad(mixture.log_prob)(x)) / (2 * weight)

        def gradients(name, **options):
            estimated = ebm.estimate(model, name, **options)

            def values(params):
                seeded = handlers.seed(handlers.substitute(estimated, data=params), 0)
                site = handlers.trace(seeded).get_trace(x)["x"]
                return site["fn"].log_prob(x)

            return jax.jit(jax.jacfwd(values))({"t": t, "scale": jnp.ones(())})

        lsd = gradients("lsd", critic=critic, num_projections=None, penalty_weight=weight)
        difference = 2 * weight * lsd["t"] - gradients("sm")["t"]
        assert np.all(abs(difference.mean(0)) < 5 * difference.std(0) / np.sqrt(len(x)))
        assert np.all(abs(lsd["t"].mean(0)) > 20 * lsd["t"].std(0) / np.sqrt(len(x)) / np.sqrt(20))
        assert abs(lsd["scale"].mean()) < 5 * lsd["scale"].std() / np.sqrt(len(x))  # no critic along it is better

    def test_probes_give_the_exact_trace_on_average(self):
        x = np.tile(X[:1], (20_000, 1))
        params = {**QUADRATIC, "a": jnp.array([[0.5, 1.0], [2.0, -0.3]]), "c": jnp.ones(2)}

        def values(**options):
            model = handlers.substitute(ebm.estimate(quadratic, "lsd", critic=linear, **options), data=params)
            return handlers.trace(handlers.seed(model, 0)).get_trace(x)["x"]["fn"].log_prob(x)

        exact = values(num_projections=None)
        for projection in ("rademacher", "gaussian"):
            probed = np.asarray(values(num_projections=2, projection=projection))
            assert abs(np.mean(probed - exact)) < 5 * probed.std() / np.sqrt(len(x))
            # The probes' variance: (a + a^T) off the diagonal for signs, over two of them.
            if projection == "rademacher":
                np.testing.assert_allclose(probed.std() ** 2, 3.0**2 / 2, rtol=0.05)


class TestTheSteinDiscrepancy:
    def test_in_turns(self, gaussian_data):
        params = in_turns(ebm.estimate(precision_model, "lsd", critic=line), 3, gaussian_data, adversary="critic")
        np.testing.assert_allclose(params["t"], MLE, atol=1e-3)

    def test_in_turns_with_a_lipschitz_critic(self, gaussian_data):
        # Adam lets the critic's norm grow until it turns too slowly: plain gradient ascent.
        model, ascent = ebm.estimate(precision_model, "lsd", critic=line, penalty="spectral"), optax.sgd(1e-3)
        params = in_turns(model, 5, gaussian_data, adversary="critic", optimizer=ascent)
        np.testing.assert_allclose(params["t"], MLE, atol=0.05)

    def test_a_kink_that_stays_where_it_is(self):
        # Laplace: the score is a sign without a second derivative. By the critic a g both come to rest at a = 0.
        x = np.random.default_rng(0).laplace(0, 0.8, 4000)

        def model(x):
            t = numpyro.param("t", 0.5)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: t * jnp.abs(x)), obs=x)

        def critic():
            a = numpyro.param("critic", 0.0)
            return lambda x: a * jnp.tanh(2 * x)

        params = in_turns(ebm.estimate(model, "lsd", critic=critic), 3, x, adversary="critic")
        best = np.mean(2 / np.cosh(2 * x) ** 2) / np.mean(np.tanh(2 * np.abs(x)))
        np.testing.assert_allclose(params["t"], best, atol=1e-3)
        np.testing.assert_allclose(best, 1 / np.mean(np.abs(x)), atol=0.05)

    def test_a_kink_that_moves_is_not_felt(self):
        # |x - t|: the score's derivative in t is zero at every row, that of its expectation is not.
        def model(x):
            t = numpyro.param("t", 0.3)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: jnp.abs(x - t)), obs=x)

        x = np.random.default_rng(0).laplace(0, 1, 100)
        estimated = ebm.estimate(model, "lsd", critic=line)
        assert jax.grad(lambda t: surrogate(estimated, {"t": t, "critic": jnp.array([0.4, 0.2])}, x))(0.3) == 0

    def test_a_score_without_an_energy(self, gaussian_data):
        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.ScoreDistribution(lambda x: -t * x), obs=x)

        x = gaussian_data[:50]
        grads = [
            jax.grad(lambda t, m=m: surrogate(ebm.estimate(m, "lsd"), {"t": t}, x))(2.0) for m in (model, precision_model)
        ]
        np.testing.assert_allclose(grads[0], grads[1], rtol=1e-5)
        assert grads[0] != 0

    def test_the_critic_sees_each_rows_context(self):
        k = np.array([-1.0, 0.5, 2.0], np.float32)

        def model(x):
            d = ebm.EnergyDistribution(lambda x, k: 0.5 * jnp.exp(k) * x**2, context=jnp.asarray(k), batch_shape=(3,))
            with numpyro.plate("rows", 3):
                numpyro.sample("x", d, obs=x)

        x = np.array([0.3, -0.2, 1.0], np.float32)
        estimated = ebm.estimate(model, "lsd", critic=lambda: lambda x, k: k * x, num_projections=None)
        values = handlers.trace(handlers.seed(estimated, 0)).get_trace(x)["x"]["fn"].log_prob(x)
        np.testing.assert_allclose(values, -(-np.exp(k) * x * k * x + k - 0.5 * (k * x) ** 2), rtol=1e-5)

    def test_the_report_finds_fault_with_a_wrong_model_alone(self):
        x = np.random.default_rng(1).normal(0, 0.5, 4000)
        model = ebm.estimate(precision_model, "lsd", critic=line)
        for t, is_right in ((4.0, True), (5.0, False)):
            figures = ebm.training_report(model, {"t": t, "critic": np.array([-0.7, 0.0])}, x).sites[0].figures
            np.testing.assert_allclose(figures["stein"], 0.7 * (t * np.mean(x**2) - 1), atol=1e-3)
            assert (abs(figures["stein"]) < 5 * figures["stein_error"]) == is_right
            np.testing.assert_allclose(figures["critic_norm"], 0.7 * np.sqrt(np.mean(x**2)), rtol=1e-4)


class TestCritics:
    def test_spectral_bounds_every_array(self):
        rng = np.random.default_rng(0)
        tree = {"w": rng.normal(size=(3, 5)), "b": 0.1 * np.ones(4), "v": np.ones(4), "z": np.zeros((2, 2)), "s": -3.0}
        ours = bounded("critic", tree)
        np.testing.assert_allclose(ours["w"], tree["w"] / np.linalg.svd(tree["w"])[1][0], rtol=1e-5)
        np.testing.assert_allclose(ours["v"], tree["v"] / 2, rtol=1e-6)
        for name in "bz":
            np.testing.assert_allclose(ours[name], tree[name], rtol=1e-6)
        assert ours["s"] == -1
        gradient = jax.grad(lambda z: jnp.sum(bounded("critic", {"z": z, "b": z[0]})["b"]))(jnp.zeros((2, 2)))
        np.testing.assert_allclose(gradient, [[1, 1], [0, 0]])

    def test_spectral_is_what_the_estimator_uses(self):
        a = jnp.array([[3.0, 1.0], [0.0, 2.0]])
        options = {"critic": linear, "num_projections": None, "penalty": "spectral"}
        values = [
            surrogate(ebm.estimate(quadratic, "lsd", **options), {**QUADRATIC, "a": a_, "c": jnp.ones(2) / 2}, X)
            for a_ in (a, a / jnp.linalg.norm(a, 2))
        ]
        np.testing.assert_allclose(values[0], values[1], rtol=1e-5)
        f = lambda x: a @ x / jnp.linalg.norm(a, 2) + 0.5  # noqa: E731
        score = QUADRATIC["b"] - X @ QUADRATIC["k"]
        stein = np.sum(score * jax.vmap(f)(X)) + len(X) * jnp.trace(a) / jnp.linalg.norm(a, 2)
        np.testing.assert_allclose(values[0], -stein, rtol=1e-4)

    def test_spectral_needs_matrices(self):
        def critic():
            kernel = numpyro.param("kernel", jnp.ones((1, 2, 2)))
            return lambda x: kernel[0] @ x

        with pytest.raises(ValueError, match=r"site 'x'.*'kernel' has an array of shape \(1, 2, 2\).*penalty='l2'"):
            surrogate(ebm.estimate(quadratic, "lsd", critic=critic, penalty="spectral"), QUADRATIC, X)

    def test_modules_are_critics(self):
        module = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
        for critic in (
            lambda: nnx_module("critic", module),
            lambda: flax_module("critic", linen.Dense(2), input_shape=(2,)),
        ):
            svi = SVI(ebm.estimate(quadratic, "lsd", critic=critic), ebm.empty_guide, optax.sgd(1e-4), Trace_ELBO())
            state = svi.init(jax.random.key(0), X)
            before = svi.get_params(state)
            after = svi.get_params(jax.jit(svi.update)(state, X)[0])
            assert set(before) == {"k", "b", "critic$params"}
            moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), before, after)
            assert all(jax.tree.leaves(moved))

    @pytest.mark.parametrize(
        ("critic", "error", "message"),
        [
            (3.0, TypeError, r"critic=lambda: nnx_module\('critic', net\)"),
            (lambda: 3.0, TypeError, "has to return a function of one event; it returned float"),
            (lambda: lambda x: x[:1], ValueError, r"site 'x': The critic returned shape \(1,\).*return shape \(2,\)"),
            (
                lambda: lambda x: numpyro.param("a", 1.0) * x,
                ValueError,
                r"declares \['a'\] inside.*return lambda",
            ),
            (random_line, ValueError, "The critic samples 'w'"),
            (lambda: nnx_module("c", nnx.BatchNorm(2, rngs=nnx.Rngs(0))), ValueError, r"layer with state, 'c\$state'"),
        ],
    )
    def test_what_is_no_critic_is_refused(self, critic, error, message):
        with pytest.raises(error, match=message):
            surrogate(ebm.estimate(quadratic, "lsd", critic=critic), QUADRATIC, X)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_projections": 0}, "num_projections >= 1"),
            ({"projection": "signs"}, "Unknown projection 'signs'"),
            ({"penalty": "l1"}, "Unknown penalty 'l1'. Did you mean 'l2'"),
            ({"penalty_weight": 0.0}, "penalty_weight > 0"),
        ],
    )
    def test_options_are_checked(self, options, message):
        with pytest.raises(ValueError, match=message):
            ebm.LearnedSteinDiscrepancy(**options)
