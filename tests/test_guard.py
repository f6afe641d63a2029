"""Log Z that is not a constant of the model is refused under every inference; where it is one, nothing is in the way.

Most cases trace the log density as NumPyro does and compute nothing of it.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer import (
    AIES,
    ESS,
    HMC,
    MCMC,
    NUTS,
    SA,
    SVI,
    DiscreteHMCGibbs,
    HMCGibbs,
    MixedHMC,
    RenyiELBO,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from numpyro.infer.autoguide import AutoDAIS, AutoDelta, AutoLaplaceApproximation, AutoNormal
from numpyro.infer.util import log_density, potential_energy

import numpyro_ebm as ebm
from numpyro_ebm.distributions.dependencies import EVENT, SOURCE, TERM, flows, mark

X = np.random.default_rng(0).normal(0, 0.5, 20).astype(np.float32)
KEY = jax.random.key(0)
HALVES = jnp.array([0.5, 0.5])


def energy(fn=lambda v: 0.5 * v**2, **options):
    return ebm.EnergyDistribution(fn, **options)


def precision(x):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy(lambda v: 0.5 * t * v**2), obs=x)


def factored(x):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    with numpyro.plate("rows", len(x)):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()), obs=x)
        ebm.energy_factor("e", lambda x: 0.5 * t * x**2, x=x)


def chosen(x):
    k = numpyro.sample("k", dist.Bernoulli(0.5))
    numpyro.sample("m", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", energy(lambda v: 0.5 * jnp.array([1.0, 4.0])[k] * v**2), obs=x)


def base_of_latent(x):
    t = numpyro.sample("t", dist.HalfNormal(1.0))
    numpyro.sample("x", energy(base=dist.Normal(0.0, t)).expand([len(x)]), obs=x)


def factor_on_base_of_latent(x):
    t = numpyro.sample("t", dist.HalfNormal(1.0))
    x = numpyro.sample("x", dist.Normal(0.0, t).expand([len(x)]).to_event(1), obs=x)
    ebm.energy_factor("e", lambda x: jnp.sum(x**4), x=x)


def latent_context(x):
    z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([len(x)]).to_event(1))
    numpyro.sample("x", energy(lambda v, z: 0.5 * jnp.exp(z) * v**2, context=z, batch_shape=(len(x),)), obs=x)


def energy_given_energy():
    t = numpyro.sample("t", energy())
    numpyro.sample("u", energy(lambda v: 0.5 * jnp.exp(t) * v**2))


def in_scan(x):
    t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
    scan(lambda c, v: (numpyro.sample("x", energy(lambda v: 0.5 * t * (v - c) ** 2), obs=v), None), 0.0, x)


SHIFTED = {
    "observed": (precision, (X,), {"t": 0.1}),
    "factor": (factored, (X,), {"t": 0.1}),
    "base": (base_of_latent, (X,), {"t": 0.1}),
    "base of a factor": (factor_on_base_of_latent, (X,), {"t": 0.1}),
    "context": (latent_context, (X,), {"z": X}),
    "latent energies": (energy_given_energy, (), {"t": 0.1, "u": 0.2}),
    "scan": (in_scan, (X,), {"t": 0.1}),
}


def mixture(x, component=None, parts=HALVES, scale=3.0):
    inlier = energy() if component is None else component
    numpyro.sample("x", dist.MixtureGeneral(dist.Categorical(parts), [inlier, dist.Normal(0.0, scale)]), obs=x)


def weights(x, component=None):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    with numpyro.plate("rows", len(x)):
        mixture(x, component, jnp.stack([w, 1 - w]))


def other_component(x):
    w = numpyro.sample("w", dist.HalfNormal(1.0))
    with numpyro.plate("rows", len(x)):
        mixture(x, scale=w)


def same_family(x):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    parts = energy(lambda v, c: 0.5 * (v - c) ** 2, context=jnp.array([-1.0, 1.0]), batch_shape=(2,))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(jnp.stack([w, 1 - w])), parts), obs=x)


def zero_inflated(x):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    counts = energy(lambda k: 0.3 * k, support=constraints.integer_interval(0, 30))
    numpyro.sample("x", dist.ZeroInflatedDistribution(counts, gate=w).expand([20]), obs=jnp.arange(20) % 3)


def power(x):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    with numpyro.plate("rows", len(x)), handlers.scale(scale=w):
        numpyro.sample("x", energy(), obs=x)


def times(x):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    numpyro.factor("x", w * energy().log_prob(x).sum())


def masked_by_latent(x):
    w = numpyro.sample("w", dist.Beta(1.0, 1.0))
    with numpyro.plate("rows", len(x)), handlers.mask(mask=x > w):
        numpyro.sample("x", energy(), obs=x)


WEIGHTED = [weights, other_component, same_family, zero_inflated, power, times, masked_by_latent]


def trace_potential(model, args, latents):
    return jax.eval_shape(lambda z: potential_energy(model, args, {}, z), jax.tree.map(jnp.asarray, latents))


@pytest.mark.parametrize("case", SHIFTED)
def test_log_z_that_moves_with_a_latent_is_refused(case):
    model, args, latents = SHIFTED[case]
    moved = "z" if "z" in latents else "t"
    with pytest.raises(ebm.EnergyError, match=rf"^At site '.'.*log Z depends on the latent '{moved}'.*estimate\(model"):
        trace_potential(model, args, latents)


@pytest.mark.parametrize("model", WEIGHTED)
def test_log_z_that_counts_by_a_latent_weight_is_refused(model):
    with pytest.raises(ebm.EnergyError, match=r"^At site 'x'.*weight that depends on the latent 'w'.*normalized=True"):
        trace_potential(model, (X,), {"w": 0.1})


def test_a_latent_mixture_of_an_energy_is_refused():
    with pytest.raises(ebm.EnergyError, match="weight that depends on the latent 'x'"):
        trace_potential(lambda: mixture(None), (), {"x": 0.1})


MANY = {"num_chains": 4, "chain_method": "vectorized"}
KERNELS = {
    "SA": (SA, precision, {}),
    "AIES": (AIES, precision, MANY),
    "ESS": (ESS, factored, MANY),
    "NUTS": (NUTS, precision, {}),
    "DiscreteHMCGibbs": (lambda model: DiscreteHMCGibbs(NUTS(model)), chosen, {}),
    "MixedHMC": (lambda model: MixedHMC(HMC(model)), chosen, {}),
}


@pytest.mark.parametrize("name", KERNELS)
def test_under_every_kernel(name):
    kernel, model, options = KERNELS[name]
    mcmc = MCMC(kernel(model), num_warmup=2, num_samples=2, progress_bar=False, **options)
    with pytest.raises(ebm.EnergyError, match="log Z depends on the latent"):
        mcmc.run(KEY, X)


ELBOS = [Trace_ELBO(), Trace_ELBO(num_particles=2), TraceMeanField_ELBO(), RenyiELBO(), TraceGraph_ELBO()]


def positive_guide(*_):
    numpyro.sample("t", dist.Gamma(numpyro.param("a", 1.0, constraint=constraints.positive), 1.0))


def coin_guide(*_):
    numpyro.sample("k", dist.Bernoulli(numpyro.param("a", 0.5, constraint=constraints.unit_interval)))
    numpyro.sample("m", dist.Normal(0.0, 1.0))


def trained(x):
    a = numpyro.param("a", 1.0)
    numpyro.sample("t", dist.Gamma(1.0, 1.0))
    numpyro.sample("x", energy(lambda v: a * v**2).expand([len(x)]).to_event(1), obs=x)


def energy_prior(x):
    t = numpyro.sample("t", energy(lambda v: v - jnp.log(v), support=constraints.positive))
    numpyro.sample("x", dist.Normal(t, 1.0).expand([len(x)]).to_event(1), obs=x)


def trace_loss(elbo, model, guide):
    return jax.eval_shape(lambda key, a: elbo.loss(key, {"a": a}, model, guide, X), KEY, 0.5)


class TestElbos:
    """No derivative is taken: what is refused is the dependency."""

    @pytest.mark.parametrize("elbo", ELBOS, ids=lambda e: f"{type(e).__name__}{e.num_particles}")
    def test_latents_and_parameters(self, elbo):
        for model, words in ((precision, "the latent 't'"), (trained, "the parameter 'a'")):
            with pytest.raises(ebm.EnergyError, match=f"^At site 'x'.*log Z depends on {words}"):
                trace_loss(elbo, model, positive_guide)
        trace_loss(elbo, energy_prior, positive_guide)

    def test_a_discrete_latent_that_chooses_the_energy(self):
        with pytest.raises(ebm.EnergyError, match="log Z depends on the latent 'k'"):
            trace_loss(TraceGraph_ELBO(), chosen, coin_guide)


def event_of_others(y):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    p = numpyro.param("p", 2.0)
    z = numpyro.sample("z", energy(lambda z: p * z**2))
    numpyro.sample("y", dist.Normal(s * z, 1.0), obs=y)


def residual(x):
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    with numpyro.plate("rows", 40, subsample_size=20), handlers.scale(scale=2.0), handlers.mask(mask=x > 0):
        numpyro.sample("x", energy(), obs=x - s)


def fixed_beside_latents(x):
    s = numpyro.sample("s", dist.Normal(0.0, 1.0))
    p = numpyro.param("p", 1.0)
    mixture(x[0], energy(lambda v: p * v**2))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(s, 1.0), obs=x)


def joint(x):
    s = numpyro.sample("s", dist.Normal(0.0, 1.0), obs=x[0])
    z = numpyro.sample("z", dist.Normal(s, 1.0))
    ebm.energy_factor("e", lambda s, z: (s * z) ** 2, s=s, z=z)


def tilted_latent(x):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    z = numpyro.sample("z", dist.Normal(0.0, s))
    ebm.energy_factor("e", lambda z: z**4, z=z)


def transformed(x):
    s = numpyro.sample("s", dist.HalfNormal(1.0))
    scaled = dist.TransformedDistribution(energy(), dist.transforms.AffineTransform(0.0, s))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", scaled, obs=x)


def nested_energy(x):
    z = numpyro.sample("z", energy(lambda v: -energy(lambda y: y**2 * jnp.exp(v)).log_prob(1.0) + v**2))
    numpyro.sample("x", dist.Normal(z, 1.0).expand([len(x)]).to_event(1), obs=x)


def normalized_weights(x):
    weights(x, energy(lambda v: 0.5 * v**2 + 0.5 * jnp.log(2 * jnp.pi), normalized=True))


ALLOWED = {
    "other sites depend on the event": (event_of_others, (0.3,), {"s": 0.1, "z": 0.2}),
    "a residual, in plates, scaled, masked": (residual, (X,), {"s": 0.1}),
    "fixed energies, a mixture, beside latents": (fixed_beside_latents, (X,), {"s": 0.1}),
    "a joint event, half of it observed": (joint, (X,), {"z": 0.1}),
    "a tilt of a latent with a latent scale": (tilted_latent, (X,), {"s": 0.1, "z": 0.2}),
    "a transform with a latent scale": (transformed, (X,), {"s": 0.1}),
    "an energy made of another's log density": (nested_energy, (X,), {"z": 0.1}),
    "a normalised component": (normalized_weights, (X,), {"w": 0.1}),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_a_constant_log_z_is_none_of_its_business(case):
    model, args, latents = ALLOWED[case]
    trace_potential(handlers.seed(model, 0), args, latents)


def test_a_normalised_component_has_the_log_density_of_its_twin():
    values = [
        log_density(model, (X,), {}, {"w": 0.3})[0]
        for model in (normalized_weights, lambda x: weights(x, dist.Normal(0.0, 1.0)))
    ]
    np.testing.assert_allclose(*values, rtol=1e-6)


def test_fixed_values_by_hand_and_second_derivatives():
    def model(y):
        p = numpyro.param("p", 1.0)
        z = numpyro.sample("z", energy(lambda z: 0.5 * p * z**2))
        numpyro.sample("y", dist.Normal(z, 1.0), obs=y)

    value = log_density(model, (0.0,), {}, {"p": 3.0, "z": 2.0})[0]
    np.testing.assert_allclose(value, -6.0 + dist.Normal(2.0, 1.0).log_prob(0.0), rtol=1e-6)
    fixed = handlers.substitute(model, {"p": 3.0})
    hessian = jax.jit(jax.vmap(jax.hessian(lambda z: potential_energy(fixed, (0.0,), {}, {"z": z}))))
    np.testing.assert_allclose(hessian(jnp.arange(2.0)), 4.0)


@pytest.mark.slow
def test_a_function_of_the_users_may_move_what_log_z_depends_on():
    def model():
        s = numpyro.sample("s", dist.Gamma(1.0, 1.0))
        numpyro.sample("z", energy(lambda v: s * v**2))

    gibbs = HMCGibbs(NUTS(model), lambda rng_key, gibbs_sites, hmc_sites: {"s": jnp.asarray(2.0)}, ["s"])
    mcmc = MCMC(gibbs, num_warmup=200, num_samples=2000, progress_bar=False)
    mcmc.run(KEY)
    np.testing.assert_allclose(mcmc.get_samples()["z"].var(), 0.25, rtol=0.25)


class TestUnderEstimate:
    @pytest.mark.parametrize("model", [weights, other_component, same_family, zero_inflated], ids=lambda m: m.__name__)
    def test_containers_are_no_ordinary_sites(self, model):
        estimated = handlers.seed(ebm.estimate(model, "sm"), 0)
        with pytest.raises(ebm.EnergyError, match=r"^At site 'x'.*(Mixture|ZeroInflated).*holds an EnergyDistribution"):
            handlers.trace(estimated).get_trace(X)

    def test_normalised_components_are(self):
        handlers.trace(handlers.seed(ebm.estimate(normalized_weights, "sm"), 0)).get_trace(X)

    def test_twice(self):
        once = ebm.estimate(precision, "dsm", sigma=0.1)
        for wrapped in (once, handlers.scale(once, scale=2.0)):
            with pytest.raises(ebm.EnergyError, match="estimated already.*one estimate"):
                ebm.estimate(wrapped, "sm")
        with pytest.raises(ebm.EnergyError, match="^At site 'x'.*estimated already"):
            handlers.trace(handlers.seed(ebm.estimate(lambda x: once(x), "sm"), 0)).get_trace(X)

    @pytest.mark.parametrize("guide", [AutoNormal, AutoDelta])
    def test_a_guide_of_the_model_without_it(self, guide):
        svi = SVI(ebm.estimate(precision, "pcd"), guide(precision), optax.adam(0.1), Trace_ELBO())
        name = guide.__name__
        with pytest.raises(ebm.EnergyError, match=rf"^At site 'x'.*{name} was built.*Write {name}\(estimate\(model"):
            svi.init(KEY, X)


def init(name, guide, loss, **options):
    model = ebm.estimate(precision, name, **options)
    return jax.eval_shape(lambda key: SVI(model, guide(model), optax.adam(0.1), loss).init(key, X), KEY)


def update(name, guide, loss, **options):
    model = ebm.estimate(precision, name, **options)
    svi = SVI(model, guide(model), optax.adam(0.1), loss)
    return jax.eval_shape(lambda key: svi.update(svi.init(key, X), X), KEY)


class TestWhatTakesTheValueOfASurrogate:
    @pytest.mark.parametrize(
        ("guide", "loss"),
        [
            (AutoLaplaceApproximation, Trace_ELBO()),
            (AutoDAIS, Trace_ELBO()),
            (AutoNormal, RenyiELBO()),
            (AutoNormal, TraceGraph_ELBO()),
        ],
        ids=["laplace", "dais", "renyi", "graph"],
    )
    def test_needs_one_that_means_something(self, guide, loss):
        name = type(loss).__name__ if guide is AutoNormal else guide.__name__
        with pytest.raises(ebm.EnergyError, match=rf"^At site 'x'.*target of {name}.*only its gradient.*AutoNormal"):
            init("minimum_velocity", guide, loss)
        if not isinstance(loss, TraceGraph_ELBO):  # noise of mean 0 does no harm there
            with pytest.raises(ebm.EnergyError, match=rf"'dsm'.*target of {name}.*nois"):
                init("dsm", guide, loss, sigma=0.2)

    def test_the_width_of_a_generalised_posterior_is_said_to_be_arbitrary(self):
        with pytest.warns(ebm.UncalibratedPosteriorWarning, match=r"'sm'.*unit of the data.*AutoLaplace.*'pcd'"):
            init("sm", AutoLaplaceApproximation, Trace_ELBO())
        with pytest.warns(ebm.UncalibratedPosteriorWarning, match="NUTS or HMC takes"):
            trace_potential(ebm.estimate(precision, "sm"), (X,), {"t": 0.1})

        for loss in (Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO()):
            with pytest.warns(ebm.UncalibratedPosteriorWarning, match="'dsm'.*The guide takes.*AutoDelta"):
                update("dsm", AutoNormal, loss, sigma=0.2)

    def test_a_point_and_the_gradient_of_the_likelihood_have_none(self):
        update("sm", AutoDelta, Trace_ELBO())
        update("minimum_velocity", AutoNormal, TraceMeanField_ELBO())
        update("pcd", AutoNormal, Trace_ELBO())


class TestUntrainedParameters:
    def model(self, y):
        m = numpyro.param("m", 0.0)
        z = numpyro.sample("z", energy(lambda z: 0.5 * (z - m) ** 2))
        numpyro.sample("y", dist.Normal(z, 10.0), obs=y)

    @pytest.mark.parametrize("kernel", [NUTS, SA])
    def test_are_named(self, kernel):
        with pytest.warns(ebm.UntrainedParametersWarning, match=r"^At site 'z'.*\['m'\].*BlackJAXKernel.*substitute"):
            kernel(self.model).init(KEY, 2, None, (0.0,), {})

    def test_trained_ones_are_not(self):
        inside = lambda y: handlers.substitute(self.model, {"m": 5.0})(y)  # noqa: E731
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for model in (handlers.substitute(self.model, {"m": 5.0}), inside):
                NUTS(model).init(KEY, 2, None, (0.0,), {})
            ebm.BlackJAXKernel(self.model, "nuts", params={"m": 5.0}).init(KEY, 2, None, (0.0,), {})


def source(value, name="s"):
    return mark(value, SOURCE, name)


def term(value):
    return mark(value, TERM)


U = jnp.arange(3.0)
PROGRAMS = {
    "sum": (lambda s: source(s) + term(U).sum(), "", ""),
    "shift": (lambda s: term(source(s) * U).sum(), "s", ""),
    "event": (lambda s: term(mark(source(s), EVENT) * U).sum(), "", ""),
    "event and more": (lambda s: term(mark(source(s), EVENT) * source(s)), "s", ""),
    "weight": (lambda s: source(s) * term(U), "", "s"),
    "quotient": (lambda s: term(U) / source(s), "", "s"),
    "constant weight": (lambda s: source(s) + 3.0 * term(U) / 2.0, "", ""),
    "choice": (lambda s: jnp.where(source(s) > 0, term(U), 0.0), "", "s"),
    "constant choice": (lambda s: jnp.where(U > 0, term(U), source(s)), "", ""),
    "logsumexp": (lambda s: jnp.logaddexp(term(U), source(s)), "", "s"),
    "constant logsumexp": (lambda s: jnp.logaddexp(term(U), U) + source(s), "", ""),
    "index": (lambda s: term(U)[source(s).astype(int)], "", "s"),
    "matrix": (lambda s: jnp.dot(term(U), source(s) * U), "", "s"),
    "jit": (lambda s: jax.jit(lambda a: a * term(U))(source(s)), "", "s"),
    "checkpoint": (lambda s: jax.checkpoint(lambda a: a + term(U))(source(s)), "", ""),
    "vmap": (lambda s: jax.vmap(lambda a: source(s) + term(a))(U), "", ""),
    "derivative": (lambda s: jax.jvp(lambda a: source(a) * term(U), (s,), (1.0,))[0], "", "s"),
    "scan sum": (lambda s: jax.lax.scan(lambda c, u: (c + term(u), source(s)), 0.0, U)[0], "", ""),
    "scan power": (lambda s: jax.lax.scan(lambda c, u: (c * source(s) + term(u), c), 0.0, U)[0], "", "s"),
    "while": (
        lambda s: jax.lax.while_loop(lambda c: c[0] < source(s), lambda c: (c[0] + 1, c[1] + term(c[0])), (s, s)),
        "s",
        "s",
    ),
    "cond": (lambda s: jax.lax.cond(source(s) > 0, lambda: term(U), lambda: U), "", "s"),
    "constant cond": (lambda s: jax.lax.cond(s > 0, lambda: term(U) + source(s), lambda: U), "", ""),
    "energy in energy": (lambda s: term(mark(term(source(s) * U), TERM, "inner") + U), "s", ""),
    "event in event": (lambda s: term(mark(mark(source(s), EVENT) * U, TERM, "inner") + U), "", ""),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_flows(name):
    program, shifts, weights_ = PROGRAMS[name]
    found = flows(jax.make_jaxpr(program)(2.0))
    assert any(flow.has_term for flow in found)
    assert frozenset().union(*(flow.shifts for flow in found)) == frozenset(shifts)
    assert frozenset().union(*(flow.weights for flow in found)) == frozenset(weights_)


def test_marks_change_nothing():
    x = jnp.arange(1.0, 4.0)
    fn = jax.jit(lambda x: mark(jnp.sin(mark(x, EVENT)), TERM).sum())
    np.testing.assert_allclose(jax.vmap(jax.grad(fn))(x[None])[0], jnp.cos(x), rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(fn)(x), -jnp.diag(jnp.sin(x)), rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(fn, (x,), (x,))[1], (x * jnp.cos(x)).sum(), rtol=1e-6)
