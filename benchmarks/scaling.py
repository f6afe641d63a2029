"""Training on 1, 2, 4 and 8 devices: seconds, memory, and how much is sent between devices in each update.

A network of two layers is trained by persistent contrastive divergence with ``fit(..., sharding=n)``, for each number of
simulated CPU devices in a process of its own. All devices share the cores of this machine, so that the seconds show the cost
of splitting and no gain. What is sent does not depend on that: it is read from the compiled program, as the sizes of the
results of its all-reduce, all-gather, reduce-scatter, all-to-all and collective-permute operations.

    python benchmarks/scaling.py                 a few minutes
    python benchmarks/scaling.py --steps 20      a minute, to check that it runs

What it means at 1000 devices. With parameters on every device an update sends two gradients, that of the rows and that of
the chains (all-reduce: twice the size of the parameters, whatever the number of devices), and some numbers about the chains.
Rows and chains stay where they are, and Langevin steps send nothing. A ring moves 2 (n - 1) / n times what is reduced over
each link: for 10 million parameters 160 MB, 1.6 ms at 100 GB/s. An update of 20 Langevin steps of 32 chains per device costs
about 20 * 32 * 6 * 1e7 = 4e10 floating-point operations, .4 ms at 1e14 per second. So the number of rows and of steps per
device decides whether the links or the arithmetic are the bound, as in any data-parallel training, and chains add little to
what is sent.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = {"f64": 8, "s64": 8, "u64": 8, "f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1, "pred": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def run(num_devices: int, args: argparse.Namespace) -> dict[str, float]:
    """Train on some devices, in this process."""
    import time

    import jax
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import optax
    from numpyro.infer import SVI, Trace_ELBO

    import numpyro_ebm as ebm

    def model(x):
        first = numpyro.param("first", lambda key: jax.random.normal(key, (args.dim, args.units)) / args.dim**0.5)
        second = numpyro.param("second", lambda key: jax.random.normal(key, (args.units, args.units)) / args.units**0.5)
        last = numpyro.param("last", jnp.zeros(args.units))
        net = lambda x: jax.nn.silu(jax.nn.silu(x @ first) @ second) @ last  # noqa: E731
        with numpyro.plate("rows", len(x)):
            energy = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2) + net(x), (args.dim,))
            numpyro.sample("x", energy, obs=x)

    x = np.random.default_rng(0).normal(size=(8 * args.batch, args.dim)).astype(np.float32)
    estimated = ebm.estimate(model, "pcd", num_steps=10, num_chains=args.batch, kernel="langevin")
    svi = SVI(estimated, ebm.empty_guide, optax.adam(1e-3), Trace_ELBO())
    options = {"batches": x, "batch_size": args.batch, "check_every": args.steps, "progress_bar": False}
    first = ebm.fit(jax.random.key(0), svi, args.steps, sharding=num_devices, **options)
    began = time.perf_counter()
    again = ebm.fit(jax.random.key(0), svi, 2 * args.steps, sharding=num_devices, **options)
    seconds = time.perf_counter() - began
    del first
    return {
        "steps per second": again.history["steps_per_second"][-1],
        "seconds": seconds,
        "memory (MB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "loss": float(again.losses[-1]),
        "parameters (kB)": sum(leaf.nbytes for leaf in jax.tree.leaves(again.params)) / 1e3,
    }


def sent(folder: Path) -> dict[str, float]:
    """Return the kilobytes of the results of each kind of collective operation in the loop over updates.

    The loop is that of the program with most collective operations; all of them are inside it.
    """
    found = [_sizes(each.read_text()) for each in folder.glob("*after_optimizations.txt")]
    return max(found, key=lambda sizes: sum(sizes.values()), default=dict.fromkeys(COLLECTIVES, 0.0))


def _sizes(program: str) -> dict[str, float]:
    sizes = dict.fromkeys(COLLECTIVES, 0.0)
    for line in program.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            sizes[match[2]] += sum(_bytes(*each) for each in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])) / 1e3
    return sizes


def _bytes(kind: str, shape: str) -> int:
    size = WIDTHS.get(kind, 0)
    for each in filter(None, shape.split(",")):
        size *= int(each)
    return size


def measured(num_devices: int, args: argparse.Namespace) -> dict[str, float]:
    """Run a process with so many devices, and read what it printed and the programs that it compiled."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_force_host_platform_device_count={num_devices} --xla_dump_to={folder} --xla_dump_hlo_as_text"
        command = [sys.executable, __file__, "--child", str(num_devices), "--dim", str(args.dim)]
        command += ["--units", str(args.units), "--batch", str(args.batch), "--steps", str(args.steps)]
        environment = os.environ | {"XLA_FLAGS": flags, "NPROC": "32"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        figures = dict(line.split(": ") for line in done.stdout.splitlines())
        return {name: float(value) for name, value in figures.items()} | sent(Path(folder))


def main(argv: list[str] | None = None) -> dict[int, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--dim", type=int, default=64, help="dimensions of an event")
    parser.add_argument("--units", type=int, default=256, help="units of each layer")
    parser.add_argument("--batch", type=int, default=512, help="rows and chains of an update, on all devices together")
    parser.add_argument("--steps", type=int, default=100, help="updates that are timed, after as many")
    parser.add_argument("--child", type=int, help="used by the script itself: the number of devices of this process")
    args = parser.parse_args(argv)
    if args.child is not None:
        for name, value in run(args.child, args).items():
            print(f"{name}: {value}")
        return {}
    table = {num: measured(num, args) for num in args.devices}
    names = ["steps per second", "memory (MB)", "loss", "parameters (kB)", *COLLECTIVES]
    print(f"{'devices':>8}" + "".join(f"{name:>20}" for name in names))
    for num, figures in table.items():
        print(f"{num:8d}" + "".join(f"{figures[name]:20.5g}" for name in names))
    print("loss: of the last update. all-reduce and so on: kilobytes of the results of these operations in one update.")
    return table


if __name__ == "__main__":
    main()
