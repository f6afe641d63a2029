"""Trainings on simulated devices: `python sharded_run.py OUT [PROCESS PORT]`, the latter for one of two processes.

OUT gets the losses and parameters of each case, and what lies where.
"""

import os
import re
import sys

DEVICES = 8 if len(sys.argv) == 2 else 4
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import shutil
import warnings

import jax

jax.config.update("jax_enable_x64", True)  # so that no rounding makes a chain accept or reject
if DEVICES == 4:  # before blackjax, whose import starts the devices
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro.infer import MCMC, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

import numpyro_ebm as ebm
from numpyro_ebm.estimators.parts.slots import Listed, draw_slots

X = np.random.default_rng(0).normal(0, 0.5, (500, 4))
OPTIONS = {
    "pcd": {"num_chains": 256, "num_steps": 3},
    "replay": {"buffer_size": 256, "num_steps": 3},
    "cd": {"num_steps": 3},
    "sm": {},
    "nce": {"nu": 4},
}


def model(x):
    t, w = numpyro.param("t", jnp.ones(4)), numpyro.param("w", lambda key: jax.random.normal(key, (4, 16)))
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(lambda v: 0.5 * jnp.sum(t * v**2) + jnp.sum(jnp.tanh(v @ w)), (4,))
        numpyro.sample("x", energy, obs=x)


def run(name, sharding, num_steps=40, *args, **options):
    svi = SVI(ebm.estimate(model, name, **OPTIONS[name]), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    options = {"check_every": 20, "ema": 0.9, "progress_bar": False} | options
    data = {} if args else {"batches": X, "batch_size": 64}  # batches of 64, and one of 52
    return ebm.fit(jax.random.key(0), svi, num_steps, *args, sharding=sharding, **data, **options)


def of_contexts(x, context):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        energy = lambda v, c: 0.5 * t * jnp.sum((v - c) ** 2)  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, (4,), context=context), obs=x)


def of_latents(x):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(X), subsample_size=len(x)):
        z = numpyro.sample("z", numpyro.distributions.Normal(0, 1))
        numpyro.sample("x", ebm.EnergyDistribution(lambda v, c: 0.5 * t * jnp.sum((v - c) ** 2), (4,), context=z), obs=x)


def other_runs(sharding):
    """Yield trainings with a context for each row, by chains of rows and from a buffer, and with a latent for each row."""
    options = {"batch_size": 64, "check_every": 20, "progress_bar": False, "sharding": sharding}
    for name in ("pcd", "replay"):
        own = {"num_steps": 2} | ({"buffer_size": 256} if name == "replay" else {})
        svi = SVI(ebm.estimate(of_contexts, name, **own), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        context = np.linspace(-1, 1, 496)
        yield f"contexts {name}", ebm.fit(jax.random.key(0), svi, 40, batches=(X[:496], context), **options)
    estimated = ebm.estimate(of_latents, "cd", num_steps=2)
    svi = SVI(estimated, AutoNormal(estimated), optax.adam(0.01), Trace_ELBO())
    yield "latents", ebm.fit(jax.random.key(0), svi, 40, batches=X, **options)


def kept(result):
    return {"losses": result.losses, **{name: np.asarray(value) for name, value in result.params.items()}}


def of_rows():
    """The energies of two rows, each with a context of its own."""
    context = jnp.array([0.0, 0.5])
    return ebm.EnergyDistribution(
        lambda v, c: jnp.sum((v - c) ** 2) + jnp.cos(v[0]), (3,), context=context, batch_shape=(2,)
    )


KERNELS = {"mala": ebm.MALA, "nuts": ebm.NUTS, "dynamic_hmc": ebm.DynamicHMC}


def drawn(kernel, sharding):
    """Draws without warm-up, whose step sizes would amplify rounding errors."""
    kernel = KERNELS[kernel](step_size=0.3)
    options = {"num_warmup": 0, "num_samples": 30, "num_chains": 8}
    found = ebm.sample(jax.random.key(0), of_rows(), kernel, sharding=sharding, **options)
    return {"draws": found.samples["x"], "rates": found.stats["acceptance_rate"]}


def drawn_from_a_model(sharding):
    def priors():
        numpyro.sample("a", numpyro.distributions.HalfNormal().expand([2]).to_event(1))

    found = ebm.sample(jax.random.key(1), priors, "mala", num_warmup=50, num_samples=30, num_chains=8, sharding=sharding)
    return {"draws": found.samples["a"], "rates": found.stats["step_size"]}


def by_mcmc(chain_method):
    """Chains of NumPyro's MCMC, of which "parallel" runs one on each device."""
    kernel = ebm.BlackJAXKernel(lambda: numpyro.sample("a", numpyro.distributions.Normal().expand([2])), "mala")
    mcmc = MCMC(kernel, num_warmup=50, num_samples=30, num_chains=8, chain_method=chain_method, progress_bar=False)
    mcmc.run(jax.random.key(2))
    draws = mcmc.get_samples(group_by_chain=True)["a"]
    return {"draws": draws, "devices": len(draws.sharding.device_set)}


LOG_Z = {
    "ais": {"num_chains": 80, "num_levels": 100, "kernel": "mala"},
    "smc": {"num_particles": 160, "kernel": "mala"},
    "importance": {"num_samples": 800, "data": np.random.default_rng(1).normal(0.3, 0.7, (200, 2, 3))},
}


def log_z(method, sharding):
    found = ebm.log_partition(jax.random.key(3), of_rows(), method=method, sharding=sharding, **LOG_Z[method])
    return {"value": found.value, "error": found.standard_error}


def bounds(sharding):
    options = LOG_Z["ais"] | {"num_levels": 50}
    found = ebm.log_partition_bounds(jax.random.key(4), of_rows(), sharding=sharding, **options)
    return {"value": found.upper.value, "error": found.lower.standard_error}


def chains_that_stay():
    """Chains taken from a pool on eight devices and put back, and the operations that send data between devices."""
    pool = np.random.default_rng(2).normal(size=(640, 3))
    split = NamedSharding(Mesh(np.array(jax.devices()), ("rows",)), PartitionSpec("rows"))

    def move(slots, pool):
        moved = jax.lax.with_sharding_constraint(slots.take(pool) + 10, split)
        return jax.lax.with_sharding_constraint(slots.put(pool, moved), split)

    def in_blocks(pool):
        return move(draw_slots(jax.random.key(5), 640, 48), pool)

    def by_a_list(pool):
        return move(Listed(7 * jnp.arange(48)), pool)

    found = {"one": jax.jit(in_blocks)(pool)}
    for name, function in (("eight", in_blocks), ("list", by_a_list)):
        program = jax.jit(function).lower(jax.device_put(pool, split)).compile()
        sent = re.findall(r"(?:all-|reduce-scatter|collective-)[\w-]*\(", program.as_text())
        found |= {name: program(jax.device_put(pool, split)), f"{name} sent": len(sent)}
    return found


def drawn_cases():
    for where, sharding in (("one", None), ("eight", 8)):
        for kernel in ("mala", "nuts", "dynamic_hmc"):
            yield f"{kernel}, {where}", drawn(kernel, sharding)
        yield f"a model, {where}", drawn_from_a_model(sharding)
        for method in LOG_Z:
            yield f"{method}, {where}", log_z(method, sharding)
        yield f"bounds, {where}", bounds(sharding)
    for chain_method in ("sequential", "parallel"):
        yield chain_method, by_mcmc(chain_method)


def cases(folder):
    """Yield the name of each case and what it found."""
    two = Mesh(np.array(jax.devices()).reshape(4, 2), ("rows", "columns"))
    for name in OPTIONS:
        for where, sharding in (("one", None), ("eight", 8), ("two axes", two)):
            if where != "two axes" or name == "pcd":
                yield f"{name}, {where}", kept(run(name, sharding))
    whole = X[:496]
    for where, sharding in (("one", None), ("eight", 8)):
        yield f"all rows, {where}", kept(run("sm", sharding, 40, whole))
        held_out = run("sm", sharding, held_out=(X[:100],))
        yield f"held out, {where}", {"losses": held_out.losses, "held_out": held_out.held_out_losses}
        for name, result in other_runs(sharding):
            yield f"{name}, {where}", kept(result)
    result = run("pcd", 8)
    pool = result.state.mutable_state["x$pcd"]["state"].pool.position
    parts = [np.asarray(each.data) for each in pool.addressable_shards]
    split = run("pcd", two).state.optim_state[1][0]["w"].addressable_shards
    yield "lies", {"chains": np.stack(parts), "w": np.array([each.data.shape for each in split])}
    run("pcd", 8, 20, checkpoint=folder)
    for where, sharding in (("one", None), ("two", 2)):
        shutil.copytree(folder, f"{folder} {where}")
        yield f"goes on, {where}", kept(run("pcd", sharding, checkpoint=f"{folder} {where}"))
    yield from moved(f"{folder} moved")
    yield "used", used()
    yield "slots", chains_that_stay()
    yield from drawn_cases()


def moved(folder):
    """Yield trainings of which each goes on with another number of devices, next to one without interruption."""
    for name, own in (("sm", {}), ("dsm", {"sigma": 0.3}), ("cd", {"num_steps": 2}), ("ssm", {})):
        svi = SVI(ebm.estimate(model, name, **own), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        options = {"batches": X, "batch_size": 64, "check_every": 5, "progress_bar": False}
        yield f"{name}, uninterrupted", kept(ebm.fit(jax.random.key(0), svi, 10, **options))
        for where, devices in (("one to eight", (None, 8)), ("eight to one", (8, None)), ("eight to two", (8, 2))):
            options["checkpoint"] = f"{folder} {name} {where}"
            for num_steps, sharding in zip((5, 10), devices, strict=True):
                result = ebm.fit(jax.random.key(0), svi, num_steps, sharding=sharding, **options)
            yield f"{name}, {where}", kept(result)


def used():
    """What was trained on eight devices, used on others; and log Z on two of them while a training runs there."""

    def bare(x=None):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", 1 if x is None else len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

    def log_z(params, devices):
        options = {"num_levels": 10, "num_chains": 8, "kernel": "mala"}
        with warnings.catch_warnings(action="ignore"):  # of few chains
            return ebm.log_partition(jax.random.key(1), bare, params=params, sharding=devices, **options).value

    svi = SVI(ebm.estimate(bare, "cd"), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    options = {"batches": X[:, 0], "batch_size": 64, "progress_bar": False}
    result = ebm.fit(jax.random.key(0), svi, 10, sharding=8, **options)
    found = {f"log Z {each}": log_z(result.params, each) for each in (None, 8, 4)}
    own = {"num_warmup": 0, "num_samples": 5, "num_chains": 8}
    draw = lambda each: result.sample(jax.random.key(2), ebm.MALA(step_size=0.3), sharding=each, **own)  # noqa: E731
    found |= {f"draws {each}": draw(each).samples["x"] for each in (None, 8, 4)}
    watched = ebm.fit(jax.random.key(0), svi, 4, sharding=2, held_out=lambda params: log_z(params, 2), **options)
    return found | {"watched": watched.held_out_losses}


def main(out, process=None, port=None):
    if process is None:
        found = {f"{case}, {name}": value for case, values in cases(f"{out} run") for name, value in values.items()}
    else:
        folder = f"{os.path.dirname(out)}/shared"  # one folder for both processes
        run("pcd", 8, 20, checkpoint=folder, record_chains=2)
        result = run("pcd", 8, checkpoint=folder, record_chains=2)
        found = kept(result) | {"chains": result.chains.samples["x"]} | drawn("mala", 8) | log_z("ais", 8)
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
