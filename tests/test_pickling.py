"""What can be carried: copies, pickles and cloudpickles before and after use, and no tracer is left behind."""

import copy
import pickle
from types import SimpleNamespace

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from helpers import some_slow
from numpyro.infer import MCMC, SVI, Trace_ELBO

import numpyro_ebm as ebm

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (8, 2))
SHORT = {"num_warmup": 5, "num_samples": 5, "num_chains": 1}
BY_COPY = SimpleNamespace(dumps=copy.deepcopy, loads=lambda copied: copied)
CARRIERS = {"deepcopy": BY_COPY, "pickle": pickle, "cloudpickle": cloudpickle}


def quadratic(x):
    """A standard normal."""
    return 0.5 * jnp.sum(x**2)


def downhill(x):
    """The score of a standard normal."""
    return -x


def model(x=None):
    """Precision t."""
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", 8):
        numpyro.sample("x", ebm.EnergyDistribution(lambda z: 0.5 * t * jnp.sum(z**2), (2,)), obs=x)


def distribution():
    d = ebm.EnergyDistribution(quadratic, (2,))
    return d, lambda d: d.log_prob(X) + jnp.sum(ebm.sm_loss(d, X).mean) + len(jax.tree.leaves(d))


def score():
    return ebm.ScoreDistribution(downhill, (2,)), lambda d: ebm.sm_loss(d, X).mean


def estimator():
    denoising = ebm.DenoisingScoreMatching(sigma=0.1)

    def use(estimator):
        svi = SVI(ebm.estimate(model, estimator), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        return svi.run(KEY, 2, X, progress_bar=False).params["t"]

    return denoising, use


def handler():
    estimated = ebm.estimate(model, "sm")

    def use(estimated):
        with numpyro.handlers.seed(rng_seed=0):
            estimated(X)
        jax.jit(lambda x: numpyro.handlers.seed(estimated, 0)(x))(X)

    return estimated, use


def inference():
    svi = SVI(ebm.estimate(model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    return svi, lambda svi: svi.run(KEY, 3, X, progress_bar=False).params["t"]


def training():
    svi, _ = inference()
    return ebm.fit(KEY, svi, 3, X, progress_bar=False), lambda result: result.params["t"]


def chains():
    d = ebm.EnergyDistribution(quadratic, (2,))
    return ebm.sample(KEY, d, "mala", **SHORT), lambda draws: draws.get_samples()["x"]


def log_z():
    d = ebm.EnergyDistribution(quadratic, (2,))
    return ebm.log_partition(None, d, method="grid"), lambda found: found.value


def kernel():
    return ebm.MALA(step_size=0.1), lambda kernel: ebm.sample(
        KEY, ebm.EnergyDistribution(quadratic, (2,)), kernel, **SHORT
    ).samples["x"]


def markov_chain():
    mcmc = MCMC(ebm.BlackJAXKernel(model, "mala", params={"t": 2.0}), progress_bar=False, **SHORT)

    def use(mcmc):
        mcmc.run(KEY)
        return mcmc.get_samples()["x"]

    return mcmc, use


CASES = (distribution, score, estimator, handler, inference, training, chains, log_z, kernel, markov_chain)
BY_VALUE_ONLY = {inference: ("pickle",)}  # NumPy's, JAX's and Optax's closures


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.slow
def test_what_was_used_is_carried(case):
    thing, use = case()
    for is_used in (False, True):
        for name, carrier in CARRIERS.items():
            if name not in BY_VALUE_ONLY.get(case, ()):
                back = carrier.loads(carrier.dumps(thing))
                assert type(back) is type(thing)
        if not is_used:
            found = use(thing)
    if found is not None:
        np.testing.assert_allclose(use(back), found, rtol=1e-6)


@pytest.mark.parametrize("estimator", some_slow(["sm"], ["nce"]))
def test_no_tracer_is_left_behind(estimator):
    svi = SVI(ebm.estimate(model, estimator), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    state = svi.init(KEY, X)
    with jax.checking_leaks():
        jax.jit(svi.update)(state, X)


def test_an_energy_without_a_name_needs_cloudpickle():
    d = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
    with pytest.raises(TypeError, match=r"cloudpickle\.dumps"):
        pickle.dumps(d)
    with pytest.raises(TypeError, match=r"cloudpickle\.dumps"):
        pickle.dumps(ebm.estimate(lambda x: None, "sm"))
    for carrier in (BY_COPY, cloudpickle):
        np.testing.assert_allclose(carrier.loads(carrier.dumps(d)).log_prob(2.0), -2.0)
