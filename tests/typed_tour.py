"""Runs the public surface on valid inputs while beartype checks every annotation of the package; test_types.py starts it.

The hook of jaxtyping has to be in place before the package is imported, and the other tests pass wrong types on purpose, so
this runs in a process of its own.
"""

import sys
import warnings

from jaxtyping import install_import_hook

hook = install_import_hook("numpyro_ebm", "typed_checker.check")

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from estimator_cases import CASES, continuous_options
from helpers import vector_model
from numpyro.infer import MCMC, SVI, Trace_ELBO

import numpyro_ebm as ebm

hook.uninstall()

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(size=(24, 2)).astype(np.float32)
PARAMS = {"t": np.ones(2, np.float32)}


def target():
    return ebm.EnergyDistribution(lambda x: 0.5 * (x @ x), (2,), base=dist.Normal(0, 2).expand([2]).to_event(1))


def estimators():
    for name in CASES:
        model = ebm.estimate(vector_model, name, **continuous_options("x", (2,))[name])
        svi = SVI(model, ebm.empty_guide, optax.sgd(1e-3), Trace_ELBO())
        state, _ = jax.jit(svi.update)(svi.init(KEY, ROWS), ROWS)
        jax.block_until_ready(state)


def kernels():
    for name in ("langevin", "mala", "barker", "hmc", "nuts", "ghmc", "mclmc", "parallel_tempering"):
        kernel = name
        ebm.sample(KEY, target(), kernel, num_warmup=5, num_samples=5, num_chains=2)
    units = ebm.EnergyDistribution(lambda x: 0.1 * x.sum(), (3,), support=dist.constraints.boolean)
    ebm.sample(KEY, units, "gibbs", num_warmup=2, num_samples=5, num_chains=2)

    def model():
        numpyro.sample("x", target())

    mcmc = MCMC(ebm.BlackJAXKernel(model, "mala"), num_warmup=5, num_samples=20, progress_bar=False)
    mcmc.run(KEY)
    ebm.to_arviz(mcmc)


def log_partitions():
    data = np.asarray(target().base.sample(KEY, (40,)))
    for method, options in {
        "ais": {"num_levels": 5, "num_chains": 8},
        "smc": {"num_particles": 50},
        "importance": {"data": data},
        "bridge": {"draws": data},
        "nce": {"data": data},
        "grid": {"num_points": 31},
    }.items():
        ebm.log_partition(KEY, target(), method=method, **options)
    ebm.log_partition_bounds(KEY, target(), num_levels=5, num_chains=8)


def training():
    svi = SVI(ebm.estimate(vector_model, "pcd"), ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    result = ebm.fit(KEY, svi, 8, ROWS, check_every=4, record_chains=3, progress_bar=False)
    str(ebm.training_report(svi.model, result, ROWS))
    str(ebm.diagnose(svi.model, result, ROWS))
    ebm.to_arviz(result)
    objective = ebm.estimate(vector_model, "sm")
    svi = SVI(objective, ebm.empty_guide, optax.adam(1e-2), Trace_ELBO())
    ebm.fit(KEY, svi, 8, ROWS, held_out=(ROWS[:12],), check_every=4, progress_bar=False)
    ebm.standard_errors(KEY, objective, PARAMS, ROWS)


def evaluation():
    models = {"energy": (vector_model, PARAMS), "normal": dist.Normal(0, 1).expand([2]).to_event(1)}
    str(ebm.evaluate(KEY, models, ROWS, num_draws=40, log_partition="grid", measures=("log_likelihood", "sm", "ksd", "mmd")))
    log_z = ebm.log_partition(None, vector_model, method="grid", params=PARAMS, model_args=(ROWS,))
    ebm.log_likelihood(vector_model, PARAMS, ROWS, log_partition=log_z)


def figures():
    import matplotlib

    matplotlib.use("Agg")
    from numpyro_ebm import plots

    plots.plot_energy(target())
    plots.plot_pairs(ROWS + 0.1, ROWS)
    plots.plot_marginals(ROWS + 0.1, ROWS)


TOUR = {each.__name__: each for each in (estimators, kernels, log_partitions, training, evaluation, figures)}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    TOUR[sys.argv[1]]()
    print("done")
