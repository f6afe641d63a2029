"""JAX's stricter modes: everything runs under them, and NaN stands for nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from energy_cases import ENERGIES
from estimator_cases import OTHERS, continuous_options
from helpers import vector_model
from numpyro.distributions import constraints
from numpyro.infer import MCMC, SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.kernels.names import KERNELS

MODES = {
    "checking leaks": lambda: jax.checking_leaks(),
    "debug nans": lambda: jax.debug_nans(True),
    "disable jit": lambda: jax.disable_jit(True),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "strict dtype promotion": lambda: jax.numpy_dtype_promotion("strict"),
}
FAST = {
    "checking leaks": ["cd"],
    "debug nans": ["sm", "pcd", "elliptical_slice"],
    "disable jit": ["sm", "mala"],
    "no rank promotion": ["conditional_nce", "mala"],
    "strict dtype promotion": ["sm", "gibbs"],
}
"""What is tried under each mode in the fast tests."""

# Adam of Optax 0.2 does not run under strict promotion of types: plain descent does.
OPTIMIZER = optax.sgd(0.01)

ROWS = np.random.default_rng(0).normal(0, 1, (6, 2)).astype(np.float32)
IMAGES = np.random.default_rng(0).normal(0, 1, (6, 2, 2)).astype(np.float32)
UNITS = IMAGES[:, 0] > 0
LEVELS = {"sigmas": (0.8, 0.3, 0.1)}


def images(x):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * jnp.sum(x**2), x.shape[1:]), obs=x)


def units(x):
    t = numpyro.param("t", 0.0)
    with numpyro.plate("rows", len(x)):
        d = ebm.EnergyDistribution(lambda x: -t * jnp.sum(x.astype(float)), x.shape[1:], support=constraints.boolean)
        numpyro.sample("x", d, obs=x)


def levels(x):
    t = numpyro.param("t", 1.0)
    energy = lambda x, sigma: 0.5 * jnp.sum(x**2) / (1 / t + sigma**2)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (2,), context=jnp.asarray(0.1)), obs=x)


MORE_ROWS = np.random.default_rng(0).normal(0, 1, (50, 2)).astype(np.float32)
FEW = {
    "ais": {
        "betas": np.linspace(0, 1, 4),
        "num_chains": 10,
        "kernel": "mala",
        "start": dist.Normal(0, 2).expand([2]).to_event(1),
    },
    "bridge": {"draws": MORE_ROWS},
    "enumerate": {},
    "grid": {"num_points": 31},
    "importance": {"num_samples": 100, "data": MORE_ROWS},
    "nce": {"data": MORE_ROWS},
    "nested": {"num_live": 20, "num_steps": 2, "num_delete": 10, "tolerance": 1.0, "data": MORE_ROWS},
    "smc": {"num_particles": 20, "num_steps": 2, "data": MORE_ROWS},
}
"""Options of log Z that take few steps: without jit each is one of Python's."""

CASES = {name: (vector_model, options, ROWS) for name, options in continuous_options(shape=(2,)).items()}
CASES |= {
    "diffusion_recovery": (levels, {"sigmas": (0.1, 0.3, 0.8)}, ROWS),
    "discrete_fisher": (units, {}, UNITS),
    "exact": (units, {}, UNITS),
    "mean_field_cd": (units, {}, UNITS),
    "multigrid_cd": (images, {"factors": (2, 1)}, IMAGES),
    "multiscale_dsm": (levels, LEVELS, ROWS),
    "pseudolikelihood": (units, {}, UNITS),
    "ratio_matching": (units, {}, UNITS),
    "tre": (levels, {"sigmas": (0.1, 0.3, 0.8)}, ROWS),
}


def under_modes(names):
    """Every name under every mode, all but a handful of them slow."""
    return [
        pytest.param(mode, name, marks=() if name in FAST[mode] else pytest.mark.slow) for mode in MODES for name in names
    ]


def test_every_estimator_is_here():
    assert set(CASES) == set(ebm.available_estimators())
    assert set(OTHERS) <= set(CASES)


@pytest.mark.parametrize(("mode", "name"), under_modes(CASES))
@pytest.mark.filterwarnings("ignore:At site 'x'")
def test_estimators(mode, name):
    model, options, x = CASES[name]
    with MODES[mode]():
        svi = SVI(ebm.estimate(model, name, **options), ebm.empty_guide, OPTIMIZER, Trace_ELBO())
        state, loss = svi.update(jax.jit(svi.init)(jax.random.key(0), x), x)
    assert np.isfinite(loss)


def target_of(kernel):
    """A density that the kernel can sample."""
    if kernel in ("block_gibbs", "swendsen_wang"):
        ising = ebm.energies.Ising(np.array([[0, 1]]), 0.3)
        return ebm.EnergyDistribution(ising, (2,), support=ebm.spins)
    if kernel == "elliptical_slice":
        return ebm.EnergyDistribution(lambda x: 0.1 * jnp.sum(x), (2,), base=dist.Normal(0, 1).expand([2]).to_event(1))
    discrete = constraints.nonnegative_integer if kernel == "lattice_walk" else constraints.boolean
    support = discrete if KERNELS.classes[kernel].is_discrete is True else constraints.real
    return ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x.astype(float) ** 2), (2,), support=support)


@pytest.mark.parametrize(("mode", "name"), under_modes(ebm.available_kernels()))
def test_kernels(mode, name):
    d = target_of(name)
    with MODES[mode]():
        draws = ebm.sample(jax.random.key(0), d, name, num_warmup=2, num_samples=2, num_chains=2)
    assert all(np.isfinite(value).all() for value in (*draws.samples.values(), *draws.stats.values()))


@pytest.mark.parametrize(("mode", "name"), under_modes(ebm.available_partition_methods()))
@pytest.mark.filterwarnings("ignore::numpyro_ebm.UnreliableLogPartitionWarning")
def test_log_z(mode, name):
    is_discrete = name == "enumerate"
    d = ebm.EnergyDistribution(
        lambda x: 0.5 * jnp.sum(x.astype(float) ** 2), (2,), support=constraints.boolean if is_discrete else constraints.real
    )
    with MODES[mode]():
        value = ebm.log_partition(jax.random.key(0), d, method=name, **FEW[name]).value
    assert np.isfinite(value)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_training_and_its_reports(mode):
    with MODES[mode]():
        svi = SVI(ebm.estimate(vector_model, "cd"), ebm.empty_guide, OPTIMIZER, Trace_ELBO())
        result = ebm.fit(jax.random.key(0), svi, 2, ROWS, progress_bar=False)
        report = str(ebm.training_report(svi.model, result, ROWS))
    assert "energy_gap" in report
    assert "swap_rate" not in report


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", ["langevin", "elliptical slice", "barker"])
def test_in_mcmc(mode, kernel):
    chosen = ebm.EllipticalSlice(mean=0.0, covariance=1.0) if kernel == "elliptical slice" else kernel
    with MODES[mode]():
        mcmc = MCMC(
            ebm.BlackJAXKernel(lambda: numpyro.sample("x", dist.Normal(0, 1)), chosen),
            num_warmup=2,
            num_samples=3,
            progress_bar=False,
        )
        mcmc.run(jax.random.key(0), extra_fields=("energy", "swap_rate"))
    stats = ebm.to_arviz(mcmc).sample_stats
    assert not {"energy", "swap_rate"} & set(stats.data_vars)
    assert ("step_size" in stats) == (kernel != "elliptical slice")


@pytest.mark.parametrize("mode", ["no rank promotion", "strict dtype promotion"])
@pytest.mark.parametrize("name", ENERGIES)
def test_ready_made_energies(mode, name):
    energy = ENERGIES[name]
    d = ebm.EnergyDistribution(energy, energy.event_shape, support=energy.support)
    events = d.reference_sample(jax.random.key(0), (3,))
    with MODES[mode]():
        assert np.isfinite(jax.jit(d.log_prob)(events)).all()
        if getattr(energy, "has_bonds", False):
            jax.block_until_ready(energy.bonds)
