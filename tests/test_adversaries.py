"""Estimators with an adversary: what the best one would teach, and that it is found."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from helpers import precision_model, some_slow, surrogate
from numpyro import handlers
from numpyro.contrib.module import flax_module, nnx_module
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.estimators.parts.critic import bounded

MLE = 3.99528
X = np.random.default_rng(0).multivariate_normal([0.5, -1.0], [[1.0, 0.4], [0.4, 0.8]], 300)
MIXTURE = dist.MixtureSameFamily(dist.Categorical(np.array([0.3, 0.7])), dist.Normal(np.array([-1.0, 0.8]), 0.5))
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
    @pytest.mark.slow
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
        t = jnp.array([0.8, -0.4])
        score = lambda x, t: -(t[0] * x**3 + t[1] * x)  # noqa: E731

        def model(x):
            t = numpyro.param("t", jnp.zeros(2))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: t[0] * x**4 / 4 + t[1] * x**2 / 2), obs=x)

        def critic():
            scale = numpyro.param("scale", 1.0)
            return lambda x: scale * (score(x, t) - jax.grad(MIXTURE.log_prob)(x)) / (2 * weight)

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

    @pytest.mark.slow
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
    @pytest.mark.slow
    def test_in_turns(self, gaussian_data):
        params = in_turns(ebm.estimate(precision_model, "lsd", critic=line), 3, gaussian_data, adversary="critic")
        np.testing.assert_allclose(params["t"], MLE, atol=1e-3)

    def test_in_turns_with_a_lipschitz_critic(self, gaussian_data):
        # Adam lets the critic's norm grow until it turns too slowly: plain gradient ascent.
        model, ascent = ebm.estimate(precision_model, "lsd", critic=line, penalty="spectral"), optax.sgd(1e-3)
        params = in_turns(model, 5, gaussian_data, adversary="critic", optimizer=ascent)
        np.testing.assert_allclose(params["t"], MLE, atol=0.05)

    @pytest.mark.slow
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

    @pytest.mark.slow
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

    def test_players_share_no_parameters(self):
        def tied():
            k = numpyro.param("k", jnp.eye(2))
            return lambda x: k @ x

        def proposal():
            numpyro.sample("x", dist.MultivariateNormal(numpyro.param("b", jnp.zeros(2)), jnp.eye(2)))

        for name, options, role in (
            ("lsd", {"critic": tied}, "critic"),
            ("adversarial", {"proposal": proposal}, "proposal"),
        ):
            svi = SVI(ebm.estimate(quadratic, name, **options), ebm.empty_guide, optax.sgd(0.1), Trace_ELBO())
            with pytest.raises(ValueError, match=rf"site 'x': The {role} has parameters \['[kb]'\], and so has the model"):
                svi.init(jax.random.key(0), X)

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


def normal(scale=1.0):
    def proposal():
        numpyro.sample("x", dist.Normal(0.0, jnp.exp(numpyro.param("log_scale", jnp.log(scale)))))

    return proposal


def hidden(dim=1, w=2.0, noise=0.5):
    """x = w z + noise z': of variance w^2 + noise^2, a multiple of (1, ..., 1) beside the identity."""

    def proposal():
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        x = dist.Normal(numpyro.param("w", w) * z, noise)
        numpyro.sample("x", x if dim == 0 else x.expand([dim]).to_event(1))

    return proposal


def encoder(dim=1, noise=0.5):
    """The posterior of that z; its parameter is w where it is right."""

    def inference(x):
        w = numpyro.param("v", 2.0)
        precision = 1 + max(dim, 1) * w**2 / noise**2
        numpyro.sample("z", dist.Normal(w * jnp.sum(x) / noise**2 / precision, precision**-0.5))

    return inference


def marginal(dim, w=2.0, noise=0.5):
    """The law of that x."""
    return dist.MultivariateNormal(jnp.zeros(dim), w**2 * jnp.ones((dim, dim)) + noise**2 * jnp.eye(dim))


def correlated(dim):
    def proposal():
        numpyro.sample("x", marginal(dim))

    return proposal


def values_of(model, x, params=None, key=0):
    seeded = handlers.seed(handlers.substitute(model, data=params or {}), key)
    return jax.jit(lambda x: handlers.trace(seeded).get_trace(x)["x"]["fn"].log_prob(x))(x)


def energy_model(energy, event_shape=(), **options):
    def model(x):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, event_shape, **options), obs=x)

    return model


class TestTheBoundOnLogZ:
    @pytest.mark.parametrize("dim", [1, 3])
    @pytest.mark.parametrize(
        ("options", "bias"),
        [
            (lambda dim: {"proposal": correlated(dim)}, 0.0),
            # Smoothed over the neighbour's distance, of groups of 250: about 0.02 in one dimension, 0.1 in three.
            (lambda dim: {"proposal": correlated(dim), "entropy": "nearest_neighbor"}, 0.12),
            (lambda dim: {"proposal": hidden(dim), "entropy": "nearest_neighbor"}, 0.12),
            (lambda dim: {"proposal": hidden(dim), "entropy": "bound", "inference": encoder(dim)}, 0.0),
        ],
        ids=["exact", "neighbours", "neighbours-latent", "bound"],
    )
    def test_entropies_of_a_gaussian(self, dim, options, bias):
        # With an energy of 0 the value of a row is minus the entropy.
        model = ebm.estimate(energy_model(lambda x: 0.0 * jnp.sum(x), (dim,)), "adversarial", **options(dim))
        values = -np.asarray(values_of(model, np.zeros((2000, dim), np.float32)))
        assert abs(values.mean() - marginal(dim).entropy()) < 5 * values.std() / np.sqrt(2000) + bias
        assert values.std() > 0

    @pytest.mark.slow
    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        "options",
        [{"proposal": correlated(3)}, {"proposal": hidden(3), "entropy": "bound", "inference": encoder(3)}],
        ids=["exact", "bound"],
    )
    def test_where_the_proposal_is_the_model_there_is_no_noise(self, options):
        # The value is the log likelihood, each gradient that passes through a draw is 0, each weight is Z.
        model = energy_model(lambda x: 1.5 - marginal(3).log_prob(x), (3,))
        x = np.asarray(np.random.default_rng(0).normal(size=(50, 3)))
        estimated = ebm.estimate(model, "adversarial", **options)
        np.testing.assert_allclose(values_of(estimated, x), marginal(3).log_prob(x), rtol=1e-9)
        figures = ebm.training_report(estimated, {"w": 2.0, "v": 2.0}, x).sites[0].figures
        for name, truth in (("log_normalizer", -1.5), ("log_normalizer_bound", -1.5), ("ess", 1.0)):
            np.testing.assert_allclose(figures[name], truth, rtol=1e-9)
        if "inference" in options:
            gradient = jax.grad(lambda w: surrogate(estimated, {"w": w, "v": 2.0}, x))(2.0)
            np.testing.assert_allclose(gradient, 0, atol=1e-9)

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"proposal": normal()}, "log_scale"),
            ({"proposal": hidden(0), "entropy": "bound", "inference": encoder(0)}, "w"),
            ({"proposal": normal(), "entropy": "nearest_neighbor"}, "log_scale"),
        ],
        ids=["exact", "bound", "neighbours"],
    )
    def test_who_goes_where(self, options, name, gaussian_data):
        # At precision t and variance v the bound is -t v / 2 + log(v) / 2: ascended by the proposal, and by the energy
        # log p~(x) - log p~(y).
        x, t = gaussian_data, 2.5
        of = {"log_scale": lambda s: jnp.exp(2 * s), "w": lambda w: w**2 + 0.25}[name]
        at = {"log_scale": -0.3, "w": 0.6}[name]
        model = ebm.estimate(precision_model, "adversarial", **options)

        def gradients(key):
            others = {"v": 0.6} if name == "w" else {}
            loss = lambda p: surrogate(model, {**p, **others}, x, key=key) / len(x)  # noqa: E731
            return jax.grad(loss)({"t": t, name: at})

        grads = jax.lax.map(gradients, jax.random.split(jax.random.key(0), 100))
        bound = lambda p: -0.5 * t * of(p) + 0.5 * jnp.log(of(p))  # noqa: E731
        exact = {"t": -0.5 * np.mean(x**2) + 0.5 * of(at), name: jax.grad(bound)(at)}
        for key, value in exact.items():
            error = np.std(grads[key]) / 10
            # The neighbours' estimate is smoothed: 2 % of the entropy's part here.
            bias = 0.02 if options.get("entropy") == "nearest_neighbor" else 0.0
            assert abs(np.mean(grads[key]) - value) < 5 * error + bias
            assert 5 * error + bias < 0.3 * abs(value)

    def test_the_inference_model_ascends(self, gaussian_data):
        options = {"proposal": hidden(0), "entropy": "bound", "inference": encoder(0)}
        model = ebm.estimate(precision_model, "adversarial", **options)
        gradient = jax.grad(lambda v: surrogate(model, {"t": 2.0, "w": 0.6, "v": v}, gaussian_data))
        assert gradient(0.3) > 0
        assert gradient(1.2) < 0

    def test_supports_bases_and_contexts(self):
        k = jnp.linspace(-1, 1, 4)
        tilted = energy_model(lambda x: 1.5 * x**2, base=dist.Normal(0, 1))  # precision 4
        positive = energy_model(lambda x: 2.0 * x, support=dist.constraints.positive)
        rows = energy_model(lambda x, k: 0.5 * jnp.exp(k) * x**2, context=k, batch_shape=(4,))

        def exponential():
            numpyro.sample("x", dist.Exponential(2.0))

        def each(k):
            numpyro.sample("x", dist.Normal(0.0, jnp.exp(-0.5 * k)))

        x = np.array([0.3, 0.1, 0.5, 0.2], np.float32)
        cases = (
            (tilted, normal(0.5), dist.Normal(0, 0.5).log_prob(x)),
            # In unconstrained space, log x.
            (positive, exponential, dist.Exponential(2.0).log_prob(x) + jnp.log(x)),
            (rows, each, dist.Normal(0.0, jnp.exp(-0.5 * k)).log_prob(x)),
        )
        for model, proposal, log_prob in cases:
            values = values_of(ebm.estimate(model, "adversarial", proposal=proposal), x)
            np.testing.assert_allclose(values, log_prob, rtol=1e-4)
        report = ebm.training_report(
            ebm.estimate(tilted, "adversarial", proposal=normal()), {"log_scale": -0.6}, x.repeat(500)
        )
        figures = report.sites[0].figures
        assert abs(figures["log_normalizer"] + np.log(2)) < 5 * figures["log_normalizer_se"]
        assert figures["log_normalizer_bound"] < -np.log(2)
        # v = 0.3012, precision 4: E w^2 / (E w)^2 = 4 v / sqrt(8 v - 1) for weights exp(-(4 - 1/v) y^2 / 2).
        v = np.exp(-1.2)
        np.testing.assert_allclose(figures["ess"], np.sqrt(8 * v - 1) / (4 * v), rtol=0.02)

    def test_a_draw_on_the_wall_of_the_support_does_no_harm(self):
        def proposal():
            numpyro.sample("x", dist.LogNormal(numpyro.param("m", -200.0), 1.0))  # exp(-200) is 0 in float32

        model = ebm.estimate(
            energy_model(lambda x: x - jnp.log(x), support=dist.constraints.positive), "adversarial", proposal=proposal
        )
        x = np.array([0.5, 2.0], np.float32)
        value, gradient = jax.value_and_grad(lambda m: surrogate(model, {"m": m}, x))(-200.0)
        assert np.isfinite(value)
        assert gradient == 0

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "adversary"),
        [
            ({"proposal": normal()}, "log_scale"),
            ({"proposal": hidden(0, 0.3, 0.2), "entropy": "bound", "inference": encoder(0, 0.2)}, ("w", "v")),
        ],
        ids=["exact", "bound"],
    )
    def test_in_turns(self, options, adversary, gaussian_data):
        params = in_turns(ebm.estimate(precision_model, "adversarial", **options), 3, gaussian_data, adversary=adversary)
        np.testing.assert_allclose(params["t"], MLE, atol=0.1)
        scale = jnp.exp(params["log_scale"]) if "log_scale" in params else jnp.sqrt(params["w"] ** 2 + 0.04)
        np.testing.assert_allclose(scale, 0.5, atol=0.01)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({}, ValueError, "needs a proposal"),
            ({"proposal": 3.0}, TypeError, "proposal needs a NumPyro model; got float"),
            ({"proposal": normal(), "entropy": "exactly"}, ValueError, "Unknown entropy 'exactly'. Did you mean 'exact'"),
            ({"proposal": hidden(0), "entropy": "bound"}, ValueError, "inference=None. Write entropy='bound', inference"),
            ({"proposal": normal(), "inference": normal()}, ValueError, "entropy='exact' and inference=one"),
            ({"proposal": normal(), "num_neighbors": 2}, ValueError, "num_neighbors goes with entropy='nearest_neighbor'"),
            ({"proposal": hidden(0)}, ValueError, r"site 'x': The proposal has latents \['z'\].*'nearest_neighbor'"),
            ({"proposal": hidden(0), "entropy": "bound", "inference": lambda x: None}, ValueError, r"\{\}.*\{'z': \(\)\}"),
            ({"proposal": correlated(2)}, ValueError, r"site 'x'.*shape \(2,\); one event has shape \(\)"),
            (
                {"proposal": lambda: numpyro.sample("x", MIXTURE)},
                ValueError,
                "draws 'x' from a MixtureSameFamily, whose draws are no differentiable function.*has_rsample is False",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, error, message, gaussian_data):
        with pytest.raises(error, match=message):
            surrogate(ebm.estimate(precision_model, "adversarial", **options), {"t": 1.0}, gaussian_data[:8])

    def test_neighbours_need_one_density_and_two_rows(self):
        options = {"proposal": normal(), "entropy": "nearest_neighbor"}
        with pytest.raises(ValueError, match=r"site 'x'.*this batch has 1 row"):
            values_of(ebm.estimate(energy_model(lambda x: x**2), "adversarial", **options), np.zeros(1))
        model = energy_model(lambda x, k: k * x**2, context=jnp.ones(3), batch_shape=(3,))
        with pytest.raises(ValueError, match=r"site 'x'.*share one proposal"):
            values_of(ebm.estimate(model, "adversarial", **options), np.zeros(3))


def precision_ratio(t):
    """The best critic where data of precision 4 meet a model of precision t: log p_data + log Z."""
    return lambda: lambda x: dist.Normal(0, 0.5).log_prob(x) + 0.5 * jnp.log(2 * jnp.pi / t)


GENERATORS = {
    "kl": lambda u: u * np.log(u),
    "reverse_kl": lambda u: -np.log(u),
    "jensen_shannon": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "squared_hellinger": lambda u: (np.sqrt(u) - 1) ** 2,
    "pearson": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (1 - u) ** 2 / u,
}


@pytest.mark.usefixtures("x64")
class TestFDivergences:
    NUM = 400_000
    # Where the quantiles are: means over them are integrals, without noise.
    QUANTILES = np.asarray(dist.Normal(0, 1).icdf((np.arange(NUM) + 0.5) / NUM))

    def bound(self, divergence, t, critic, model_precision):
        """Mean over the data of precision 4, with model samples at a fixed precision."""
        estimator = ebm.FDivergence(divergence=divergence)
        estimated = ebm.estimate(precision_model, estimator)
        with handlers.seed(rng_seed=0), handlers.substitute(data={"t": t}):
            site = estimated.sites(self.QUANTILES / 2)[0][1]
        return jnp.mean(estimator.bound(site, jnp.asarray(self.QUANTILES / np.sqrt(model_precision)), critic()))

    @staticmethod
    def exact(divergence, t):
        """D_f by quadrature."""
        x = np.linspace(-6, 6, 40_001)
        p, q = (np.sqrt(v / (2 * np.pi)) * np.exp(-0.5 * v * x**2) for v in (4.0, t))
        return np.sum(q * GENERATORS[divergence](p / q)) * (x[1] - x[0])

    @pytest.mark.parametrize("divergence", GENERATORS)
    @pytest.mark.parametrize("t", [3.5, 4.5])
    def test_the_best_critic_gives_the_divergence_and_its_derivative(self, divergence, t):
        value, gradient = jax.value_and_grad(lambda v: self.bound(divergence, v, precision_ratio(t), t))(t)
        h = 1e-4
        slope = (self.exact(divergence, t + h) - self.exact(divergence, t - h)) / (2 * h)
        np.testing.assert_allclose(value, self.exact(divergence, t), rtol=2e-3)
        np.testing.assert_allclose(gradient, slope, rtol=2e-3)

    @pytest.mark.parametrize("divergence", some_slow(["kl"], [name for name in GENERATORS if name != "kl"]))
    def test_at_the_truth_nothing_moves_and_no_critic_is_better(self, divergence):
        def bound(v, c):
            return self.bound(divergence, v, lambda: lambda x: precision_ratio(4.0)()(x) + c @ x ** jnp.arange(3), 4.0)

        gradient = jax.grad(bound, (0, 1))(4.0, jnp.zeros(3))
        np.testing.assert_allclose(gradient[0], 0, atol=1e-12)
        np.testing.assert_allclose(gradient[1], 0, atol=1e-12)
        assert jnp.all(jnp.linalg.eigvalsh(jax.hessian(lambda c: bound(4.0, c))(jnp.zeros(3))) < 0)

    def test_kl_is_the_likelihood_whatever_the_critic(self, gaussian_data):
        estimator = ebm.FDivergence(divergence="kl")
        with handlers.seed(rng_seed=0), handlers.substitute(data={"t": 2.0}):
            site = ebm.estimate(precision_model, estimator).sites(gaussian_data[:50])[0][1]
        negatives = jax.random.normal(jax.random.key(0), (60,))

        def ours(t, critic):
            moved = dataclasses.replace(site, distribution=ebm.EnergyDistribution(lambda x: 0.5 * t * x**2))
            return jnp.sum(estimator.bound(moved, negatives, critic))

        exact = 0.5 * np.sum(np.asarray(site.value) ** 2) - 50 * 0.5 * np.mean(negatives**2)
        for critic in (lambda x: 0.0, lambda x: jnp.sin(3 * x) - 1):
            np.testing.assert_allclose(jax.grad(ours)(2.0, critic), exact, rtol=1e-9)

    @pytest.mark.slow
    def test_a_constant_in_the_energy_does_not_move(self):
        def model(x):
            b = numpyro.param("b", 0.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * x**2 + b), obs=x)

        for divergence in ("jensen_shannon", "pearson"):
            estimated = ebm.estimate(model, "f_ebm", divergence=divergence, kernel=ebm.MALA(0.1))
            gradient = jax.grad(lambda b, m=estimated: surrogate(m, {"b": b}, np.ones(8)))(0.3)
            np.testing.assert_allclose(gradient, 0, atol=1e-9)


class TestTrainingByFDivergences:
    @pytest.mark.slow
    @pytest.mark.parametrize("divergence", ["reverse_kl", "jensen_shannon", "squared_hellinger"])
    def test_in_turns(self, divergence, gaussian_data):
        def critic():
            c = numpyro.param("critic", jnp.zeros(2))
            return lambda x: c[0] + c[1] * x**2

        model = ebm.estimate(precision_model, "f_ebm", divergence=divergence, critic=critic, num_steps=5)
        params = in_turns(model, 3, gaussian_data, adversary="critic")
        np.testing.assert_allclose(params["t"], MLE, atol=0.15)
        # log p_data + log Z, where both constants are those of precision 4.
        np.testing.assert_allclose(params["critic"], [0.0, -2.0], atol=0.1)

    @pytest.mark.slow
    def test_a_misspecified_model_tells_them_apart(self):
        # Most data near 0, the rest wide: the best Gaussian of mean 0 is wide by KL and narrow by its reverse.
        rng = np.random.default_rng(0)
        x = rng.normal(0, np.where(rng.random(2000) < 0.7, 0.3, 1.5))

        def log_data(x):
            narrow, wide = dist.Normal(0, 0.3).log_prob(x), dist.Normal(0, 1.5).log_prob(x)
            return jnp.logaddexp(np.log(0.7) + narrow, np.log(0.3) + wide)

        grid, precisions = np.linspace(-9, 9, 4001), np.linspace(0.5, 12, 400)[:, None]
        p = np.exp(np.asarray(log_data(grid)))
        q = np.sqrt(precisions / (2 * np.pi)) * np.exp(-0.5 * precisions * grid**2) + 1e-300
        kl, reverse = (
            precisions[np.argmin(np.sum(q * GENERATORS[name](p / q), axis=1)), 0] for name in ("kl", "reverse_kl")
        )
        assert reverse > 2 * kl

        def critic():
            shift = numpyro.param("critic", 0.0)
            return lambda x: log_data(x) + shift

        model = ebm.estimate(precision_model, "f_ebm", divergence="reverse_kl", critic=critic, num_steps=5)
        params = in_turns(model, 2, x, adversary="critic", steps=2000)
        np.testing.assert_allclose(params["t"], reverse, rtol=0.05)
        np.testing.assert_allclose(params["critic"], 0.5 * np.log(2 * np.pi / params["t"]), atol=0.05)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"divergence": "hellinger"}, ValueError, "Unknown divergence 'hellinger'. Did you mean 'squared_hellinger'"),
            ({"num_chains": 1}, ValueError, "num_chains >= 2"),
            ({"energy_l2": 0.1}, ValueError, "no penalty on energies; got energy_l2=0.1"),
            ({"critic": 1.0}, TypeError, "needs a critic as a NumPyro model"),
            (
                {"critic": lambda: lambda x: jnp.ones(2)},
                ValueError,
                r"site 'x': The critic returned shape \(2,\).*shape \(\)",
            ),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, error, message, gaussian_data):
        with pytest.raises(error, match=message):
            surrogate(ebm.estimate(precision_model, "f_ebm", **options), {"t": 1.0}, gaussian_data[:8])

    def test_one_row_and_rows_of_their_own_are_refused(self):
        with pytest.raises(ValueError, match=r"site 'x'.*this batch has 1"):
            values_of(ebm.estimate(energy_model(lambda x: x**2), "f_ebm"), np.zeros(1))
        model = energy_model(lambda x, k: k * x**2, context=jnp.ones(3), batch_shape=(3,))
        with pytest.raises(ValueError, match=r"site 'x'.*chains that share one density"):
            values_of(ebm.estimate(model, "f_ebm"), np.zeros(3))
