"""Energies of latent sites: the guide's value moves by the log density, the parameters by the estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from estimator_cases import continuous_options
from helpers import some_slow
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal
from numpyro.infer.util import log_density

import numpyro_ebm as ebm

NOISE = 0.5
X = (np.random.default_rng(0).normal(0, np.sqrt(2.25 + NOISE), 400)).astype(np.float32)
BEST = 1 / (np.mean(X**2) - NOISE)  # marginally x ~ N(0, 1 / t + NOISE)
SAMPLER = ebm.ChainSampler(ebm.HMC(0.5, 3), num_warmup=50, num_steps=10)
OPTIONS = continuous_options("z")


def precision():
    return numpyro.param("t", 1.0, constraint=constraints.positive)


def observe(z, x):
    numpyro.sample("x", dist.Normal(z, np.sqrt(NOISE)), obs=x)


def energy_prior(x=None, num_rows=400):
    t = precision()
    with numpyro.plate("rows", num_rows):
        observe(numpyro.sample("z", ebm.EnergyDistribution(lambda z: 0.5 * t * z**2, sampler=SAMPLER)), x)


def tilted_prior(x):
    """The same, the base taking the precision 0.1 of it."""
    t = precision()
    with numpyro.plate("rows", len(x)):
        base = dist.Normal(0, np.sqrt(10))
        observe(numpyro.sample("z", ebm.EnergyDistribution(lambda z: 0.5 * (t - 0.1) * z**2, base=base)), x)


def factored_prior(x):
    """The same by a factor on a Normal site."""
    t = precision()
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.Normal(0, np.sqrt(10)))
        ebm.energy_factor("tilt", lambda z: 0.5 * (t - 0.1) * z**2, z=z)
        observe(z, x)


def joint_prior(x):
    """The same as one joint event of x and z, of which z is hidden: E = t z^2 / 2 + (x - z)^2 / (2 NOISE)."""
    t = precision()
    with numpyro.plate("rows", len(x)):
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), ()))
        x = numpyro.sample("x", dist.Normal(0, np.sqrt(NOISE)), obs=x)
        ebm.energy_factor("prior", lambda z: 0.5 * t * z**2, z=z)
        ebm.energy_factor("pair", lambda x, z: (0.5 * z**2 - x * z) / NOISE, x=x, z=z)


def normal_prior(x):
    t = precision()
    with numpyro.plate("rows", len(x)):
        observe(numpyro.sample("z", dist.Normal(0, 1 / jnp.sqrt(t))), x)


def guide(x):
    a = numpyro.param("a", 0.5)
    scale = numpyro.param("scale", 0.7, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("z", dist.Normal(a * x, scale))


def train(model, guide=guide, steps=1200, loss=None, x=X, rate=0.05):
    optimiser = optax.adam(optax.exponential_decay(rate, steps // 3, 0.2))
    svi = SVI(model, guide, optimiser, loss or Trace_ELBO())
    return svi.run(jax.random.key(0), steps, x, progress_bar=False)


def gradient(model, loss=None, guide=guide):
    """Gradient of the loss in every parameter, at t = 0.7 and the guide's start."""
    loss = loss or Trace_ELBO()
    params = {"t": 0.7, "a": 0.5, "scale": 0.7}
    svi = SVI(model, guide, optax.adam(0.1), loss)
    extra = svi.init(jax.random.key(0), X).mutable_state or {}

    @jax.jit
    def value(params):
        return loss.loss_with_mutable_state(jax.random.key(1), {**params, **extra}, model, guide, X)["loss"]

    return jax.grad(value)(params)


MODELS = {"energy": energy_prior, "base": tilted_prior, "factor": factored_prior, "joint": joint_prior}


class TestGradients:
    @pytest.mark.slow
    @pytest.mark.parametrize("kind", some_slow(["base"], ["energy", "factor", "joint"]))
    def test_the_guides_is_that_of_the_exact_prior(self, kind):
        exact = gradient(normal_prior)
        for name in ("sm", "cd"):
            got = gradient(ebm.estimate(MODELS[kind], name))
            np.testing.assert_allclose([got["a"], got["scale"]], [exact["a"], exact["scale"]], rtol=1e-5)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow(["pcd"], [n for n in OPTIONS if n not in ("sm", "cd", "pcd")]))
    def test_under_every_estimator(self, name):
        exact, got = gradient(normal_prior), gradient(ebm.estimate(energy_prior, name, **OPTIONS[name]))
        np.testing.assert_allclose([got["a"], got["scale"]], [exact["a"], exact["scale"]], rtol=1e-5)
        assert np.isfinite(got["t"])
        assert got["t"] != 0

    def test_the_parameters_is_that_of_the_estimator_at_the_guides_draws(self):
        # Score matching in t at draws z: minus the loss is t - t^2 z^2 / 2 per row.
        draws = handlers.trace(handlers.seed(lambda: guide(X), jax.random.split(jax.random.key(1))[1])).get_trace()
        z = np.asarray(draws["z"]["value"])
        got = gradient(ebm.estimate(energy_prior, "sm"))["t"]
        np.testing.assert_allclose(got, -np.sum(1 - 0.7 * z**2), rtol=1e-4)

    @pytest.mark.slow
    def test_mean_field_elbo(self):
        # No closed KL is known for an energy: the mean-field ELBO draws, as the other does.
        for kind in ("energy", "factor"):
            model = ebm.estimate(MODELS[kind], "sm")
            plain, mean_field = gradient(model), gradient(model, TraceMeanField_ELBO())
            np.testing.assert_allclose(plain["t"], mean_field["t"], rtol=1e-5)
            if kind == "energy":
                np.testing.assert_allclose(plain["a"], mean_field["a"], rtol=1e-5)


class TestFit:
    @pytest.mark.parametrize(
        ("name", "options", "tolerance"),
        [
            ("sm", {}, 0.03),
            pytest.param("cd", {"num_steps": 5, "kernel": ebm.MALA(0.5)}, 0.08, marks=pytest.mark.slow),
            pytest.param("pcd", {"num_steps": 5, "kernel": ebm.MALA(0.5), "num_chains": 2000}, 0.08, marks=pytest.mark.slow),
            pytest.param("nce", {"nu": 20, "noise": dist.Normal(0, 2)}, 0.08, marks=pytest.mark.slow),
        ],
    )
    def test_maximum_marginal_likelihood(self, name, options, tolerance):
        params = train(ebm.estimate(energy_prior, name, **options)).params
        np.testing.assert_allclose(params["t"], BEST, rtol=tolerance)
        # The posterior of z: mean x / (1 + NOISE t), variance NOISE / (1 + NOISE t).
        np.testing.assert_allclose(params["a"], 1 / (1 + NOISE * BEST), rtol=0.03)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["base", "factor", "joint"])
    def test_other_ways_to_write_it(self, kind):
        # With a hidden member the likelihood's own gradient is needed: score matching of the pair ends elsewhere.
        options = {"num_steps": 30, "kernel": ebm.HMC(0.4, 3)}
        model = ebm.estimate(MODELS[kind], "mle", **options) if kind == "joint" else ebm.estimate(MODELS[kind], "sm")
        params = train(model).params
        np.testing.assert_allclose(params["t"], BEST, rtol=0.08 if kind == "joint" else 0.03)
        np.testing.assert_allclose(params["a"], 1 / (1 + NOISE * params["t"]), rtol=0.03)

    @pytest.mark.slow
    @pytest.mark.parametrize("auto", [AutoNormal, AutoDelta])
    def test_autoguides(self, auto):
        x = X[:20]
        model = ebm.estimate(fixed_prior, "pcd")
        autoguide = auto(model)
        params = train(model, autoguide, 900, x=x).params
        # t = 0.8 does not move; the mean of the Gaussian posterior is its mode.
        np.testing.assert_allclose(autoguide.median(params)["z"], x / (1 + NOISE * 0.8), atol=0.1)

    @pytest.mark.slow
    def test_persistent_chains_and_trace(self):
        model = ebm.estimate(energy_prior, "pcd", num_chains=50)
        svi = SVI(model, guide, optax.adam(0.05), Trace_ELBO())
        state = svi.init(jax.random.key(0), X)
        first = state.mutable_state["z$pcd"]["state"]
        state, loss = jax.jit(svi.update)(state, X)
        assert np.isfinite(loss)
        chains = state.mutable_state["z$pcd"]["state"]
        assert chains.pool.position.shape == (50,)
        assert int(chains.num_updates) == int(first.num_updates) + 1


def fixed_prior(x):
    with numpyro.plate("rows", len(x)):
        observe(numpyro.sample("z", ebm.EnergyDistribution(lambda z: 0.4 * z**2)), x)


class TestRows:
    @pytest.mark.slow
    def test_scale_masks_and_subsampling(self):
        keep = jnp.arange(6) != 2

        def model(z_only):
            t = numpyro.param("t", 0.7)
            d = ebm.EnergyDistribution(lambda z: 0.5 * t * z**2)
            with numpyro.plate("rows", 12, subsample_size=6):
                numpyro.sample("z", d if z_only == "plain" else d.mask(keep))

        z = jnp.arange(6.0).at[2].set(jnp.nan)

        def value(t, z, kind="masked"):
            seeded = handlers.seed(ebm.estimate(lambda: model(kind), "sm"), 0)
            return log_density(seeded, (), {}, {"t": t, "z": z, "rows": jnp.arange(6)})[0]

        kept = z[keep]
        got, gradient = jax.value_and_grad(value, argnums=(0, 1))(0.7, z)
        np.testing.assert_allclose(got, 2 * jnp.sum(0.7 - 0.5 * (0.7 * kept) ** 2), rtol=1e-5)
        np.testing.assert_allclose(gradient[0], 2 * jnp.sum(1 - 0.7 * kept**2), rtol=1e-5)
        np.testing.assert_allclose(gradient[1], jnp.where(keep, -2 * 0.7 * jnp.arange(6.0), 0.0), rtol=1e-5)

    def test_given_by_condition_it_is_data(self):
        conditioned = handlers.condition(ebm.estimate(energy_prior, "sm"), {"z": X})
        observed = ebm.estimate(lambda: handlers.condition(energy_prior, {"z": X})(X), "sm")
        values = [
            log_density(handlers.seed(m, 0), args, {}, {"t": 0.7})[0] for m, args in ((conditioned, (X,)), (observed, ()))
        ]
        np.testing.assert_allclose(*values, rtol=1e-5)

    def test_without_a_guide_it_draws_from_the_energy(self):
        draws = Predictive(ebm.estimate(energy_prior, "sm"), params={"t": jnp.array(4.0)}, num_samples=500)(
            jax.random.key(0), num_rows=4
        )
        assert draws["z"].shape == (500, 4)
        np.testing.assert_allclose(draws["z"].var(), 0.25, atol=5 * 0.25 * np.sqrt(2 / 2000))
        np.testing.assert_allclose(draws["x"].var(), 0.25 + NOISE, atol=5 * 0.75 * np.sqrt(2 / 2000))


class TestRefusals:
    @pytest.mark.parametrize("name", ["sm", "cd"])
    def test_nuts_on_it(self, name):
        mcmc = MCMC(NUTS(ebm.estimate(energy_prior, name)), num_warmup=5, num_samples=5, progress_bar=False)
        with pytest.raises(ValueError, match=r"site 'z' is latent.*without estimate.*params"):
            mcmc.run(jax.random.key(0), X)

    def test_nuts_on_a_hidden_member(self):
        mcmc = MCMC(NUTS(ebm.estimate(joint_prior, "sm")), num_warmup=5, num_samples=5, progress_bar=False)
        with pytest.raises(ValueError, match=r"site 'z,x' is latent"):
            mcmc.run(jax.random.key(0), X)

    @pytest.mark.parametrize("kind", ["energy", "factor"])
    def test_a_guide_without_it(self, kind):
        svi = SVI(ebm.estimate(MODELS[kind], "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        with pytest.raises(ValueError, match="'z' is not observed, and the guide has no value"):
            svi.init(jax.random.key(0), X)

    @pytest.mark.parametrize("loss", [RenyiELBO(), TraceGraph_ELBO()], ids=["renyi", "graph"])
    @pytest.mark.parametrize("kind", ["energy", "joint"])
    def test_losses_that_weigh_by_values(self, loss, kind):
        svi = SVI(ebm.estimate(MODELS[kind], "sm"), guide, optax.adam(0.1), loss)
        with pytest.raises(ValueError, match=f"'z' is latent.*{type(loss).__name__}.*Trace_ELBO"):
            svi.init(jax.random.key(0), X)

    @pytest.mark.slow
    def test_particles_with_chains(self):
        svi = SVI(ebm.estimate(energy_prior, "pcd"), guide, optax.adam(0.1), Trace_ELBO(num_particles=2))
        state = svi.init(jax.random.key(0), X)
        with pytest.raises(ValueError, match="num_particles=1"):
            svi.update(state, X)

    @pytest.mark.slow
    def test_two_particles_without_chains(self):
        svi = SVI(ebm.estimate(energy_prior, "sm"), guide, optax.adam(0.1), Trace_ELBO(num_particles=2))
        state = svi.init(jax.random.key(0), X)
        assert np.isfinite(svi.update(state, X)[1])

    def test_parameters_under_the_unhandled_model(self):
        svi = SVI(energy_prior, guide, optax.adam(0.1), Trace_ELBO())
        state = svi.init(jax.random.key(0), X)
        with pytest.raises(ValueError, match="site 'z'.*numpyro_ebm.estimate"):
            svi.update(state, X)
