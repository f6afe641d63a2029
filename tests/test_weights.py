"""The weight of `estimate`: what it multiplies, what it leaves alone, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.infer.util import log_density, potential_energy

import numpyro_ebm as ebm
from numpyro_ebm.handlers import estimated_in

X = np.random.default_rng(0).normal(0, 0.5, 20)
MASK = np.arange(20) % 3 > 0


def model(x, y=None, mask=True, scale=1.0):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    if y is not None:
        numpyro.sample("y", dist.Normal(t, 1.0), obs=y)
    with numpyro.plate("rows", len(x)), numpyro.handlers.scale(scale=scale), numpyro.handlers.mask(mask=mask):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=x)


def value(handler, *args, **kwargs):
    return log_density(numpyro.handlers.seed(handler, 0), args, kwargs, {"t": 1.3})[0]


def test_it_multiplies_the_energy_sites_alone(x64):
    others = dist.Gamma(2.0, 1.0).log_prob(1.3) + dist.Normal(1.3, 1.0).log_prob(0.4)
    for kwargs in ({}, {"mask": MASK}, {"mask": MASK, "scale": 3.0}):
        plain = value(ebm.estimate(model, "sm"), X, 0.4, **kwargs) - others
        for weight in (0.7, jnp.array(0.7), {"x": 0.7}):
            weighted = value(ebm.estimate(model, "sm", weight=weight), X, 0.4, **kwargs) - others
            np.testing.assert_allclose(weighted, 0.7 * plain, rtol=1e-12)


def test_it_may_be_traced_and_differentiated(x64):
    of_weight = lambda weight: value(ebm.estimate(model, "sm", weight=weight), X)  # noqa: E731
    slope = jax.jit(jax.grad(of_weight))(0.7)
    np.testing.assert_allclose(slope, of_weight(1.0) - dist.Gamma(2.0, 1.0).log_prob(1.3), rtol=1e-12)


def test_a_joint_event_takes_that_of_a_member(x64):
    def joint(x, y):
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", dist.Normal(0, 1), obs=x)
            numpyro.sample("y", dist.Normal(0, 1), obs=y)
            ebm.energy_factor("f", lambda x, y: 0.3 * x * y, x=x, y=y)

    plain, weighted, named = (
        log_density(ebm.estimate(joint, "sm", weight=weight), (X, X), {}, {})[0]
        for weight in (None, {"y": 2.0}, {"x,y": 2.0})
    )
    np.testing.assert_allclose([weighted, named], 2 * plain, rtol=1e-12)
    with pytest.raises(ebm.EnergyError, match=r"weights for \['x', 'y'\]. Give one"):
        log_density(ebm.estimate(joint, "sm", weight={"x": 1.0, "y": 2.0}), (X, X), {}, {})


def test_a_gradient_estimator_follows_a_power_of_the_likelihood(x64):
    def slope(weight):
        of_t = lambda t: log_density(  # noqa: E731
            numpyro.handlers.seed(ebm.estimate(model, "cd", weight=weight), 0), (X,), {}, {"t": t}
        )[0]
        return jax.grad(of_t)(1.3) - jax.grad(dist.Gamma(2.0, 1.0).log_prob)(1.3)

    np.testing.assert_allclose(slope(0.5), 0.5 * slope(None), rtol=1e-10)


def test_who_gives_a_weight_is_not_warned():
    for weight in (0.5, 1.0):
        estimated = ebm.estimate(model, "sm", weight=weight)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(lambda t, e=estimated: potential_energy(e, (X,), {}, {"t": t}), 0.1)
            svi = SVI(estimated, AutoNormal(estimated), optax.sgd(0.1), Trace_ELBO())
            jax.eval_shape(lambda s=svi: s.update(s.init(jax.random.key(0), X), X))
    with pytest.warns(ebm.UncalibratedPosteriorWarning, match=r"weight=numpyro_ebm.calibrate\(...\).weight"):
        jax.eval_shape(lambda t: potential_energy(ebm.estimate(model, "sm"), (X,), {}, {"t": t}), 0.1)


@pytest.mark.parametrize("weight", [0.0, -1.0, np.nan, np.ones(2), "capped", {"x": 0.0}])
def test_what_is_no_weight_is_refused(weight):
    with pytest.raises(ebm.EnergyError, match="estimate needs .*weight"):
        ebm.estimate(model, "sm", weight=weight)


def test_a_weight_of_no_site_and_of_a_latent_energy_are_refused():
    with pytest.raises(ebm.EnergyError, match=r"weights for \['z'\].*Known names: .*x"):
        value(ebm.estimate(model, "sm", weight={"z": 1.0}), X)

    def prior(y):
        z = numpyro.sample("z", ebm.EnergyDistribution(lambda z: 0.5 * z**2))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ebm.EnergyError, match="site 'z'.*latent: a power of a prior"):
        log_density(numpyro.handlers.seed(ebm.estimate(prior, "sm", weight=0.5), 0), (0.3,), {}, {"z": 0.1})


def test_scopes_around_it_keep_it(x64):
    for weight in (0.5, {"x": 0.5}):
        scoped = numpyro.handlers.scope(ebm.estimate(model, "sm", weight=weight), prefix="a")
        inner = estimated_in(scoped)
        values = [log_density(each, (X,), {}, {"a/t": 1.3})[0] for each in (scoped, inner)]
        np.testing.assert_allclose(*values, rtol=1e-12)
