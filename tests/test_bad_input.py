"""One table of what a user can get wrong: each is a ValueError or TypeError that says where and what to write."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def quadratic(x):
    return 0.5 * jnp.sum(x**2)


def run(estimator="sm", x=X, energy=quadratic, event_shape=(3,), num_rows=None, options=None, **kwargs):
    """A model of one energy site "x" under `estimate`, run once."""

    def model(x):
        with numpyro.plate("rows", num_rows or (1 if x is None else len(x))):
            numpyro.sample("x", ebm.EnergyDistribution(energy, event_shape, **kwargs), obs=x)

    wrapped = ebm.estimate(model, estimator, **(options or {}))
    return numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace(x)


def train_without_data():
    """SVI on a model whose energy site has neither data nor a value of the guide's."""
    model = ebm.estimate(lambda: numpyro.sample("x", ebm.EnergyDistribution(quadratic, (3,))), "sm")
    SVI(model, ebm.empty_guide, optax.adam(0.1), Trace_ELBO()).init(jax.random.key(0))


def with_value(value, row=2):
    x = np.abs(X) + 0.1
    x[row, 1] = value
    return x


POSITIVE = {"support": constraints.positive, "energy": lambda x: jnp.sum(x)}
SIMPLEX = np.array([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]], np.float32)

# What went wrong: (call, error, words that the message holds).
CASES = {
    # Energy.
    "energy keeps a dimension": (
        lambda: run(energy=lambda x: x**2),
        ValueError,
        r"site 'x'.*returned shape \(3,\).*scalar",
    ),
    "energy of shape (2, 1)": (lambda: run(energy=lambda x: jnp.ones((2, 1))), ValueError, r"site 'x'.*\(2, 1\)"),
    "log_prob with that energy": (
        lambda: ebm.EnergyDistribution(lambda x: x**2, (3,)).log_prob(X),
        ValueError,
        r"returned shape \(3,\).*jnp.sum",
    ),
    "drawing with that energy": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(lambda x: x**2, (3,))),
        ValueError,
        r"returned shape \(3,\)",
    ),
    "energy is no function": (lambda: run(energy=3.0), TypeError, "callable energy"),
    # Declaration.
    "event_shape is a number": (lambda: run(event_shape=3), ValueError, r"event_shape=\(3,\)"),
    "context does not lead with the batch": (
        lambda: run(context=jnp.ones(4), batch_shape=(5,)),
        ValueError,
        "must lead with batch_shape",
    ),
    "base of another event": (lambda: run(base=dist.Normal(0, 1)), ValueError, r"base has event_shape \(\).*\.to_event"),
    "base of another support": (
        lambda: run(base=dist.Gamma(1.0, 1.0).expand([3]).to_event(1)),
        ValueError,
        "base.*support.*the energy has",
    ),
    "base is no distribution": (lambda: run(base=3.0), TypeError, "numpyro distribution"),
    "support of more dimensions than the event": (
        lambda: run(support=constraints.simplex, event_shape=(), x=X[:, 0]),
        ValueError,
        r"event_shape=\(n,\)",
    ),
    # Data.
    "data of another event": (lambda: run(x=np.ones((5, 4))), ValueError, r"site 'x'.*\(5, 4\).*event_shape=\(3,\)"),
    "data of too few dimensions": (lambda: run(x=np.ones(())[None], num_rows=1), ValueError, "site 'x'.*event_shape"),
    "data of another number of rows": (lambda: run(num_rows=4), ValueError, r"site 'x'.*rows \(4,\).*plate"),
    "data that would broadcast": (lambda: run(x=np.ones((5, 1))), ValueError, r"site 'x'.*\(5, 1\)"),
    "NaN without a mask": (lambda: run(x=with_value(np.nan)), ValueError, "site 'x'.*Row 2.*not finite.*mask"),
    "infinite": (lambda: run(x=with_value(np.inf, 4)), ValueError, "site 'x'.*Row 4.*not finite"),
    "outside the support": (lambda: run(x=with_value(-1.0), **POSITIVE), ValueError, "site 'x'.*Row 2.*outside"),
    "on the wall": (lambda: run(x=with_value(0.0), **POSITIVE), ValueError, "site 'x'.*Row 2"),
    "on the boundary of the simplex": (
        lambda: run(x=SIMPLEX, support=constraints.simplex, energy=lambda x: -jnp.sum(jnp.log(x))),
        ValueError,
        "site 'x'.*Row 1.*boundary",
    ),
    "complex data": (lambda: run(x=X.astype(complex)), TypeError, "real numbers"),
    "no data": (lambda: train_without_data(), ValueError, r"site 'x' is not observed.*obs=x"),
    "no data with NUTS": (lambda: ebm.sample(jax.random.key(0), lambda: None), ValueError, "no latent site"),
    "discrete support": (
        lambda: run(x=np.zeros((5, 3)), support=constraints.boolean),
        ValueError,
        "site 'x'.*discrete",
    ),
    "gradient kernel on a discrete support": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(quadratic, (3,), support=constraints.boolean), "mala"),
        ValueError,
        "'mala' cannot sample a discrete support.*Kernels that can",
    ),
    # Estimators.
    "unknown estimator": (lambda: run("dms"), ValueError, "Unknown estimator 'dms'. Did you mean 'dsm'"),
    "unknown option": (lambda: run("dsm", options={"sigmaa": 0.1}), TypeError, "'sigmaa'. Did you mean 'sigma'"),
    "option of another estimator": (lambda: run("cd", options={"step_size": 0.1}), TypeError, "no option 'step_size'"),
    "options beside an object": (
        lambda: run(ebm.ScoreMatching(), options={"sigma": 0.1}),
        TypeError,
        r"ScoreMatching\(sigma=",
    ),
    "options beside a dict": (lambda: run({"x": "sm"}, options={"sigma": 0.1}), TypeError, "dict of estimators"),
    "no model": (lambda: ebm.estimate("sm", "sm"), TypeError, r"estimate\(model, 'cd'\)"),
    "no estimator": (lambda: run(None), TypeError, "estimator as a name or an object"),
    "a class instead of an object": (lambda: run(ebm.ScoreMatching), TypeError, "name or an object"),
    "a site without estimator": (lambda: run({"y": "sm"}), ValueError, "energy site 'x'.*Known names: y"),
    "an estimator without site": (
        lambda: run({"x": "sm", "xx": "sm"}),
        ValueError,
        r"\['xx'\].*Did you mean 'x'|\['xx'\].*Known names: x",
    ),
    "sigma missing": (lambda: run("dsm"), ValueError, r"sigma=0.1"),
    "sigma zero": (lambda: run("dsm", options={"sigma": 0.0}), ValueError, "sigma > 0"),
    "sigma negative": (lambda: run("dsm", options={"sigma": [-1.0, 1.0, 1.0]}), ValueError, "sigma > 0"),
    "sigma NaN": (lambda: run("dsm", options={"sigma": np.nan}), ValueError, "sigma > 0"),
    "sigma of another shape": (lambda: run("dsm", options={"sigma": np.ones(2)}), ValueError, "site 'x'.*sigma has shape"),
    "no noise draws": (lambda: run("nce", options={"nu": 0}), ValueError, "nu >= 1"),
    "negative noise draws": (lambda: run("nce", options={"nu": -2}), ValueError, "nu >= 1"),
    "half a noise draw": (lambda: run("nce", options={"nu": 1.5}), ValueError, "whole number nu"),
    "noise of another event": (
        lambda: run("nce", options={"noise": dist.Normal(0, 1)}),
        ValueError,
        r"site 'x'.*noise has event shape \(\).*to_event",
    ),
    "noise with a batch shape": (
        lambda: run("nce", options={"noise": dist.Normal(np.zeros((4, 3)), 1).to_event(1)}),
        ValueError,
        r"site 'x'.*batch shape \(4,\).*rows \(5,\)",
    ),
    "noise of another support": (
        lambda: run("nce", options={"noise": dist.Gamma(1.0, 1.0).expand([3]).to_event(1)}),
        ValueError,
        "site 'x'.*noise.*support",
    ),
    "noise that cannot be at a datum": (
        lambda: run(
            "nce",
            x=np.full((4, 1), 0.5, np.float32) * [[1], [1], [5], [1]],
            event_shape=(1,),
            support=constraints.interval(0.0, 3.0),
            options={"noise": Truncated()},
        ),
        ValueError,
        "site 'x'.*row 2",
    ),
    "noise is no distribution": (lambda: run("nce", options={"noise": 3.0}), TypeError, "numpyro distribution"),
    "no projections": (lambda: run("ssm", options={"num_projections": 0}), ValueError, "num_projections >= 1"),
    "unknown projection": (lambda: run("ssm", options={"projection": "spheres"}), ValueError, "Did you mean 'sphere'"),
    "no steps": (lambda: run("cd", options={"num_steps": 0}), ValueError, "num_steps >= 1"),
    "half a step": (lambda: run("mle", options={"num_steps": 2.5}), ValueError, "whole number num_steps"),
    "no chains": (lambda: run("pcd", options={"num_chains": 0}), ValueError, "num_chains >= 1"),
    "start of another event": (
        lambda: run("mle", options={"start": dist.Normal(0, 1)}),
        ValueError,
        "site 'x'.*start has event shape",
    ),
    "start is no distribution": (lambda: run("pcd", options={"start": 1.0}), TypeError, "numpyro distribution"),
    "context under nce": (
        lambda: run("nce", energy=lambda x, c: c * quadratic(x), context=jnp.ones(5), batch_shape=(5,)),
        ValueError,
        "site 'x'.*context.*'cd'",
    ),
    # Kernels.
    "unknown kernel": (lambda: run("cd", options={"kernel": "hcm"}), ValueError, "Unknown kernel 'hcm'. Did you mean 'hmc'"),
    "kernel is a number": (lambda: run("cd", options={"kernel": 3}), TypeError, "kernel as a name or an object"),
    "step size zero": (lambda: ebm.MALA(step_size=0.0), ValueError, r"MALA needs step_size > 0"),
    "step size NaN": (lambda: ebm.Langevin(step_size=np.nan), ValueError, "step_size > 0"),
    "no integration steps": (lambda: ebm.HMC(num_integration_steps=0), ValueError, "num_integration_steps >= 1"),
    "mass matrix of another size": (
        lambda: run("cd", options={"kernel": ebm.HMC(inverse_mass_matrix=jnp.ones(2))}),
        ValueError,
        r"inverse_mass_matrix of shape \(3,\)",
    ),
    "no draws": (
        lambda: ebm.sample(jax.random.key(0), ebm.EnergyDistribution(quadratic, (3,)), num_samples=0),
        ValueError,
        "num_samples >= 1",
    ),
    "sampler that is no function": (lambda: run(sampler=3), TypeError, "callable sampler"),
    "kernel of a model that is none": (lambda: ebm.BlackJAXKernel(3), TypeError, "NumPyro model"),
    # ArviZ.
    "draws first": (lambda: ebm.to_arviz({"x": np.ones((100,))}), ValueError, r"\(chains, draws\)"),
    "chains and draws that differ": (
        lambda: ebm.to_arviz({"x": np.ones((2, 100)), "y": np.ones((100, 2))}),
        ValueError,
        "same",
    ),
    "nested": (lambda: ebm.to_arviz({"x": {"y": np.ones((2, 100))}}), ValueError, "flat dict"),
    "keys among the draws": (
        lambda: ebm.to_arviz({"x": jax.random.split(jax.random.key(0), (2, 3))}),
        ValueError,
        "random keys",
    ),
    "no draws at all": (lambda: ebm.to_arviz(3), TypeError, "needs an MCMC"),
}


class Truncated(dist.Distribution):
    """Uniform on (0, 1), declared on (0, 3): density zero at some data."""

    support = constraints.independent(constraints.interval(0.0, 3.0), 1)

    def __init__(self):
        super().__init__((), (1,))

    def log_prob(self, value):
        return jnp.where((value > 0) & (value < 1), 0.0, -jnp.inf)[..., 0]

    def sample(self, key, sample_shape=()):
        return jax.random.uniform(key, (*sample_shape, 1))


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    call, error, words = CASES[name]
    with pytest.raises(error, match=f"(?s){words}"):
        call()


def test_concrete_data_are_checked_inside_jit_too():
    with pytest.raises(ValueError, match="Row 2"):
        jax.jit(lambda t: run(x=with_value(np.nan))["x"]["fn"].log_prob(0) * t)(1.0)


def test_rows_that_are_not_known_yet_give_nan_and_not_a_number():
    def value(x):
        return run(x=x, **POSITIVE)["x"]["fn"].log_prob(x)

    values = jax.jit(value)(with_value(-1.0))
    assert np.isnan(values[2])
    assert np.isfinite(np.delete(values, 2)).all()
    with pytest.warns(ebm.UnhealthyChainsWarning, match="nonfinite"):
        values = jax.block_until_ready(jax.jit(lambda x: run("cd", x=x)["x"]["fn"].log_prob(x))(with_value(np.nan)))
    assert np.isnan(values[2])
