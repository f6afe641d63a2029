"""Kernels by site, for models with discrete and continuous latents: against sums over the discrete ones, and refusals."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.diagnostics import effective_sample_size
from numpyro.infer import MCMC

import numpyro_ebm as ebm

KEY = jax.random.key(0)


def chain(s):
    """The energy of three spins in a row."""
    return -0.5 * (s[0] * s[1] + s[1] * s[2])


def model(y=None):
    """Spins and a coin that shift a normal, whose exponential is seen with noise."""
    s = numpyro.sample("s", ebm.EnergyDistribution(chain, (3,), support=ebm.spins))
    k = numpyro.sample("k", dist.Bernoulli(0.3))
    z = numpyro.sample("z", dist.Normal(0.7 * s.sum() + k, 1.0))
    w = numpyro.sample("w", dist.LogNormal(z, 0.5))
    numpyro.deterministic("shifted", z + 1.0)
    numpyro.sample("y", dist.Normal(jnp.log(w), 0.5), obs=y)


def truth(y=1.0):
    """Means of the latents: given spins and coin, everything else is normal."""
    total, sums = 0.0, np.zeros(3)
    for s, k in itertools.product(itertools.product((-1, 1), repeat=3), (0, 1)):
        mean = 0.7 * sum(s) + k
        weight = np.exp(-chain(s) + np.log((0.7, 0.3)[k]) - 0.5 * (y - mean) ** 2 / 1.5)
        total, sums = total + weight, sums + weight * np.array([np.mean(s), k, mean + (y - mean) / 1.5])
    return dict(zip(("s", "k", "z"), sums / total, strict=True))


def check(samples):
    """Means within 5 standard errors, by the effective sample size."""
    for name, mean in truth().items():
        draws = np.asarray(samples[name], float)
        draws = draws.mean(-1) if name == "s" else draws
        ess = float(effective_sample_size(jnp.asarray(draws)))
        assert ess > 200
        assert abs(draws.mean() - mean) < 5 * draws.std() / np.sqrt(ess)


CHOICES = {
    "the default": None,
    "two kernels": {"s": "gibbs", "k": "gibbs", "z": "nuts", "w": "nuts"},
    "one for each": {"s": "flips", "k": "gibbs", "z": "mala", "w": "barker"},
    "with gradients": {"s": "gwg", "k": "gibbs", "z": "nuts", "w": "nuts"},
}


@pytest.mark.slow
@pytest.mark.parametrize("how", CHOICES)
def test_sample_moves_all_latents(how):
    draws = ebm.sample(KEY, model, CHOICES[how], model_kwargs={"y": 1.0}, num_samples=2000)
    check(draws.samples)
    assert draws.samples["s"].dtype == draws.samples["k"].dtype == jnp.int32
    np.testing.assert_allclose(draws.samples["shifted"], draws.samples["z"] + 1.0)


@pytest.mark.slow
def test_mcmc_adapts_each_kernel_by_itself():
    kernel = ebm.BlackJAXKernel(model, CHOICES["one for each"])
    mcmc = MCMC(kernel, num_warmup=1000, num_samples=4000, num_chains=2, chain_method="vectorized", progress_bar=False)
    mcmc.run(KEY, y=1.0, extra_fields=kernel.default_fields[1:])
    check(mcmc.get_samples(group_by_chain=True))
    adapted = mcmc.last_state.warmup.kernel
    steps = {k.name: np.asarray(k.step_size) for k in adapted.kernels if k.step_size is not None}
    assert np.all(steps["mala"] != ebm.MALA().step_size)
    assert np.all(steps["barker"] != ebm.Barker().step_size)
    # Three flips, the other value of the coin, and a gradient each of mala and barker.
    assert np.all(mcmc.get_extra_fields()["num_steps"] == 3 + 1 + 1 + 1)


def tiny():
    numpyro.sample("s", ebm.EnergyDistribution(chain, (3,), support=ebm.spins))
    numpyro.sample("z", dist.Normal())


def test_sites_of_one_name_move_together():
    kernel = ebm.BySite({"a": "nuts", "b": "gibbs", "c": "nuts", "d": ebm.NUTS()})
    assert kernel.groups == (("a", "c"), ("b",), ("d",))
    assert [own.name for own in kernel.kernels] == ["nuts", "gibbs", "nuts"]
    assert kernel.sites == ("a", "b", "c", "d")
    assert kernel.step_size is None
    assert ebm.BySite({"a": "mala", "b": "gibbs"}).step_size == ebm.MALA().step_size


def scored():
    t = numpyro.sample("t", dist.Normal())
    numpyro.sample("k", dist.Bernoulli(0.3))
    numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * jnp.exp(t) * x**2), obs=1.0)


def of_sample(kernel, fn=tiny):
    return lambda: ebm.sample(KEY, fn, kernel, num_warmup=1, num_samples=1)


def of_mcmc(kernel, fn=tiny):
    return lambda: MCMC(ebm.BlackJAXKernel(fn, kernel), num_warmup=1, num_samples=1, progress_bar=False).run(KEY)


MISSING = r"names the sites \['z'\].*latents of the model are \['s', 'z'\].*\{'s': 'gibbs', 'z': 'nuts'\}"
REFUSED = {
    "a site without a kernel": (of_sample({"z": "nuts"}), MISSING),
    "the same in MCMC": (of_mcmc({"z": "nuts"}), MISSING),
    "a site that is none": (of_sample({"z": "nuts", "s": "gibbs", "y": "nuts"}), r"\['s', 'y', 'z'\]"),
    "a continuous kernel of spins": (
        of_sample({"z": "nuts", "s": "nuts"}),
        "'nuts' cannot move 's', which is discrete.*'gibbs'",
    ),
    "a discrete kernel of a normal": (
        of_sample({"z": "gibbs", "s": "gibbs"}),
        "'gibbs' cannot move 'z', which is continuous.*'nuts'",
    ),
    "an unknown kernel": (of_sample({"z": "nut", "s": "gibbs"}), "Unknown kernel 'nut'"),
    "tempering": (of_sample({"z": "parallel_tempering", "s": "gibbs"}), "parallel_tempering"),
    "nothing": (of_sample({}), "a kernel for each latent site"),
    "a distribution": (
        lambda: ebm.sample(KEY, ebm.EnergyDistribution(lambda x: x**2), {"x": "nuts"}),
        "EnergyDistribution is one event",
    ),
    "an estimator": (
        lambda: numpyro.handlers.seed(ebm.estimate(observed, "cd", kernel={"x": "mala"}), 0)(jnp.ones(4)),
        "is one event",
    ),
    "an observed energy": (of_sample({"t": "elliptical_slice", "k": "gibbs"}, scored), "'x' is known only up to log Z"),
}


def observed(x):
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: x**2), obs=x)


@pytest.mark.parametrize("how", REFUSED)
def test_what_does_not_fit_is_refused(how):
    call, words = REFUSED[how]
    with pytest.raises(ebm.EnergyError, match=words):
        call()
