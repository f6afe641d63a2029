"""`energy_factor`: one tilt, written as a factor on a site or with `base=`, is one model."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from helpers import check_moments, fit, surrogate
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density, potential_energy

import numpyro_ebm as ebm

X = np.random.default_rng(1).normal(0.3, 0.7, 60).astype(np.float32)
LOC = np.linspace(-1, 1, 60).astype(np.float32)


def tilt(t, x):
    return t * (x - 0.5) ** 2


def as_factor(x=None, covariate=None):
    """Normal site, tilted by a factor; a second factor and a covariate on demand."""
    t = numpyro.param("t", 0.7)
    with numpyro.plate("rows", 60):
        x = numpyro.sample("x", dist.Normal(0, 2), obs=x)
        if covariate is None:
            ebm.energy_factor("tilt", lambda x: tilt(t, x), x=x)
        else:
            ebm.energy_factor("half", lambda x: 0.5 * tilt(t, x), x=x)
            ebm.energy_factor("other", lambda x, loc: 0.5 * tilt(t, x) + t * loc * x, x=x, loc=covariate)


def as_base(x=None, covariate=None):
    """The same, with the Normal as base."""
    t = numpyro.param("t", 0.7)
    base = dist.Normal(0, 2)
    with numpyro.plate("rows", 60):
        if covariate is None:
            d = ebm.EnergyDistribution(lambda x: tilt(t, x), base=base)
        else:
            d = ebm.EnergyDistribution(
                lambda x, loc: tilt(t, x) + t * loc * x, base=base, context=covariate, batch_shape=(60,)
            )
        numpyro.sample("x", d, obs=x)


@pytest.mark.parametrize("covariate", [None, LOC], ids=["one factor", "two factors and a covariate"])
class TestSameAsBase:
    params = {"t": jnp.array(1.3)}

    def test_density(self, covariate):
        values = [log_density(m, (X, covariate), {}, self.params)[0] for m in (as_factor, as_base)]
        np.testing.assert_allclose(*values, rtol=1e-5)

    def test_potential(self, covariate):
        for m in (as_factor, as_base):
            fixed = handlers.substitute(m, self.params)
            energies = [potential_energy(fixed, (None, covariate), {}, {"x": X + s}) for s in (0.0, 0.1)]
            reference = [log_density(as_base, (X + s, covariate), {}, self.params)[0] for s in (0.0, 0.1)]
            np.testing.assert_allclose(energies[1] - energies[0], reference[0] - reference[1], rtol=1e-4)

    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("sm", {}),
            ("cd", {"num_steps": 3}),
            *(
                pytest.param(*each, marks=pytest.mark.slow)
                for each in (("dsm", {"sigma": 0.2}), ("ssm", {}), ("mle", {"num_steps": 3}))
            ),
        ],
    )
    def test_surrogate_and_gradient(self, name, options, covariate):
        # One site of randomness in each model: the same key gives the same noise.
        results = []
        for m in (as_factor, as_base):
            loss = lambda t, m=m: surrogate(ebm.estimate(m, name, **options), {"t": t}, X, covariate)  # noqa: E731
            results.append(jax.value_and_grad(loss)(1.3))
        np.testing.assert_allclose(*results, rtol=1e-3)

    def test_fit(self, covariate):
        fits = [fit(ebm.estimate(m, "sm"), X, covariate, steps=300)["t"] for m in (as_factor, as_base)]
        np.testing.assert_allclose(*fits, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pcd", "nce"])
def test_estimators_with_a_site_of_their_own(name):
    fits = [fit(ebm.estimate(m, name), X, steps=300) for m in (as_factor, as_base)]
    np.testing.assert_allclose(fits[0]["t"], fits[1]["t"], rtol=1e-3)
    if name == "nce":
        np.testing.assert_allclose(fits[0]["x$log_normalizer"], fits[1]["x$log_normalizer"], rtol=1e-3)


def test_no_base_where_the_site_is_improper():
    def model(x):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)):
            x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.real, (), ()), obs=x)
            ebm.energy_factor("e", lambda x: 0.5 * t * x**2, x=x)

    data = np.random.default_rng(0).normal(0, 0.5, 2000)
    np.testing.assert_allclose(fit(ebm.estimate(model, "sm"), data)["t"], 3.99528, rtol=1e-3)


@pytest.mark.slow
def test_nuts_and_blackjax_sample_the_tilted_density():
    # N(0, 2) times exp(-t (x - .5)^2), t = 1: precision 1/4 + 2, mean 1 / 2.25.
    model = handlers.substitute(lambda: as_factor(None), {"t": jnp.array(1.0)})
    for kernel in (NUTS(model), ebm.BlackJAXKernel(lambda: as_factor(None), "mala", params={"t": jnp.array(1.0)})):
        mcmc = MCMC(kernel, num_warmup=300, num_samples=1500, num_chains=2, chain_method="vectorized", progress_bar=False)
        mcmc.run(jax.random.key(0))
        check_moments(mcmc.get_samples(group_by_chain=True)["x"], 1 / 2.25, 1 / 2.25)


def test_outside_plates_the_energy_sees_the_arrays_whole():
    def model(x):
        x = numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1), obs=x)
        ebm.energy_factor("e", lambda x: jnp.sum(x[1:] * x[:-1]), x=x)

    x = jnp.array([1.0, 2.0, 3.0])
    own = dist.Normal(0, 1).log_prob(x).sum()
    np.testing.assert_allclose(log_density(model, (x,), {}, {})[0], own - 8.0, rtol=1e-6)


def test_plates_scale_and_subsample_it():
    def model(x):
        with numpyro.plate("rows", 60, subsample_size=6):
            batch = numpyro.subsample(x, event_dim=0)
            batch = numpyro.sample("x", dist.Normal(0, 1), obs=batch)
            ebm.energy_factor("e", lambda x: x, x=batch)

    index = jnp.arange(6)
    value = log_density(model, (X,), {}, {"rows": index})[0]
    np.testing.assert_allclose(value, 10 * (dist.Normal(0, 1).log_prob(X[:6]) - X[:6]).sum(), rtol=1e-5)


def test_masked_rows_take_no_part_nan_included():
    x = jnp.asarray(X).at[3].set(jnp.nan)
    keep = ~jnp.isnan(x)

    def value(t, estimator=None, x=x):
        masked = lambda x: handlers.mask(lambda: as_factor(x), mask=keep)()  # noqa: E731
        model = ebm.estimate(lambda x: as_masked(x, keep), estimator) if estimator else masked
        return surrogate(model, {"t": t}, x)

    reference = log_density(lambda x: as_masked(x, jnp.ones(60, bool)), (X,), {}, {"t": 1.0})[0]
    row = dist.Normal(0, 2).log_prob(X[3]) - tilt(1.0, X[3])
    np.testing.assert_allclose(value(1.0), reference - row, rtol=1e-5)
    grad = jax.grad(lambda t: value(t, "sm"))(1.0)
    assert jnp.isfinite(grad)
    other = jax.grad(lambda t: value(t, "sm", jnp.asarray(X).at[3].set(7.0)))(1.0)
    np.testing.assert_allclose(grad, other)


def test_a_mask_of_integers_is_one_of_booleans():
    fn = handlers.trace(handlers.substitute(as_factor, {"t": 1.0})).get_trace(X)["tilt"]["fn"]
    keep = np.arange(60) % 2
    masked, again = fn.mask(keep), fn.mask(keep == 1).mask(keep)
    assert masked.row_mask.dtype == again.row_mask.dtype == bool
    np.testing.assert_array_equal(masked.log_prob(None), np.where(keep, fn.log_prob(None), 0))


def as_masked(x, keep):
    with handlers.mask(mask=keep):
        as_factor(x)


class TestGuard:
    def latent(self, x=None, named=True):
        t = numpyro.sample("t", dist.Gamma(2, 1))
        x = numpyro.sample("x", dist.Normal(0, 2), obs=x)
        if named:
            ebm.energy_factor("e", lambda x, t: 0.5 * t * x**2, x=x, t=t)
        else:
            ebm.energy_factor("e", lambda x: 0.5 * t * x**2, x=x)

    def test_a_parameter_in_the_closure_is_refused(self):
        mcmc = MCMC(NUTS(lambda: self.latent(1.0, named=False)), num_warmup=5, num_samples=5, progress_bar=False)
        with pytest.raises(ValueError, match=r"site 'e'.*numpyro_ebm.estimate"):
            mcmc.run(jax.random.key(0))

    def test_a_parameter_passed_by_value_is_refused(self):
        def model(x):
            t = numpyro.param("t", 1.0)
            x = numpyro.sample("x", dist.Normal(0, 2), obs=x)
            ebm.energy_factor("e", lambda x, t: t * x**2, x=x, t=t)

        with pytest.raises(ValueError, match="site 'e'"):
            jax.grad(lambda t: log_density(model, (1.0,), {}, {"t": t})[0])(1.0)

    def test_named_latent_sites_are_part_of_the_event(self):
        # A joint density of x and t: its log Z is a constant.
        value = potential_energy(self.latent, (), {}, {"x": 1.0, "t": 0.0})
        grad = jax.grad(lambda z: potential_energy(self.latent, (), {}, z))({"x": 1.0, "t": 0.0})
        assert jnp.isfinite(value)
        # -d/dx log N(x; 0, 2) + t x at t = exp(0).
        np.testing.assert_allclose(grad["x"], 0.25 + 1.0, rtol=1e-6)


BAD = {
    "no value": (lambda x: ebm.energy_factor("e", lambda: 0.0), ValueError, "got no values"),
    "no energy": (lambda x: ebm.energy_factor("e", 3.0, x=x), TypeError, "numpyro.factor"),
    "shape": (lambda x: ebm.energy_factor("e", lambda x: jnp.ones(2), x=x), ValueError, r"site 'e'.*shape \(2,\)"),
    "plates": (lambda x: ebm.energy_factor("e", lambda w: w.sum(), w=jnp.ones(7)), ValueError, "does not lead"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_factors(name):
    statement, error, words = BAD[name]

    def model(x):
        with numpyro.plate("rows", 60):
            statement(numpyro.sample("x", dist.Normal(0, 2), obs=x))

    with pytest.raises(error, match=words):
        log_density(model, (X,), {}, {})


def changed(x):
    x = numpyro.sample("x", dist.Normal(0, 2), obs=x[0])
    ebm.energy_factor("e", lambda x: x**2, x=2 * x)


def other_plates(x):
    with numpyro.plate("rows", 60):
        x = numpyro.sample("x", dist.Normal(0, 2), obs=x)
    ebm.energy_factor("e", lambda x: jnp.sum(x**2), x=x)


def on_energy(x):
    with numpyro.plate("rows", 60):
        x = numpyro.sample("x", ebm.EnergyDistribution(lambda x: x**2), obs=x)
        ebm.energy_factor("e", lambda x: x**2, x=x)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (changed, "another value"),
        (other_plates, "same plates"),
        (on_energy, "into the EnergyDistribution"),
    ],
)
def test_what_estimate_refuses(model, words):
    with pytest.raises(ValueError, match=words):
        surrogate(ebm.estimate(model, "sm"), {}, X)
