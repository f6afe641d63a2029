"""Trainings on simulated devices: `python sharded_run.py OUT [PROCESS PORT]`, the latter for one of two processes.

OUT gets the losses and parameters of each case, and what lies where.
"""

import os
import sys

DEVICES = 8 if len(sys.argv) == 2 else 4
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"

import shutil

import jax

if DEVICES == 4:  # before blackjax, whose import starts the devices
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[3]}", num_processes=2, process_id=int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from jax.sharding import Mesh
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm

X = np.random.default_rng(0).normal(0, 0.5, (500, 4)).astype(np.float32)
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


def kept(result):
    return {"losses": result.losses, **{name: np.asarray(value) for name, value in result.params.items()}}


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
    result = run("pcd", 8)
    pool = result.state.mutable_state["x$pcd"]["state"].pool.position
    parts = [np.asarray(each.data) for each in pool.addressable_shards]
    split = run("pcd", two).state.optim_state[1][0]["w"].addressable_shards
    yield "lies", {"chains": np.stack(parts), "w": np.array([each.data.shape for each in split])}
    run("pcd", 8, 20, checkpoint=folder)
    for where, sharding in (("one", None), ("two", 2)):
        shutil.copytree(folder, f"{folder} {where}")
        yield f"goes on, {where}", kept(run("pcd", sharding, checkpoint=f"{folder} {where}"))


def main(out, process=None, port=None):
    if process is None:
        found = {f"{case}, {name}": value for case, values in cases(f"{out} run") for name, value in values.items()}
    else:
        folder = f"{os.path.dirname(out)}/shared"  # one folder for both processes
        run("pcd", 8, 20, checkpoint=folder, record_chains=2)
        result = run("pcd", 8, checkpoint=folder, record_chains=2)
        found = kept(result) | {"chains": result.chains.samples["x"]}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
