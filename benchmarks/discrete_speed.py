"""Speed of discrete kernels and of RBM training, beside peers that are installed and loops written by hand.

* ``gibbs``: a sweep of single-site Gibbs over a fully visible Boltzmann machine of 200 units, beside a sweep by hand that
  keeps all local fields and updates them with a rank-one change at each unit.
* ``ising``: block Gibbs on a 100 x 100 lattice and on the Pegasus(14) graph with 256 chains, in spin updates per second,
  beside ``thrml`` (JAX). Pegasus needs ``dwave_networkx``.
* ``rbm``: updates of persistent contrastive divergence of an RBM of 784 x 500 units with 500 rows and 500 chains, by SGD in
  NumPyro's SVI, beside ``rbms`` (PyTorch) with the same number of Gibbs steps.

Every figure is the best of ``--repeats`` runs; "first" is the first call, with compilation. Peers that cannot be imported
are left out and named. Run it on a quiet machine.

    python benchmarks/discrete_speed.py
    python benchmarks/discrete_speed.py ising --chains 32 --repeats 2
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM, BoltzmannMachine, Graph, Ising
from numpyro_ebm.kernels import chains


def timed(run: Callable[[int], Any], repeats: int) -> tuple[float, float]:
    """Return the seconds of the first call and the least of the others; ``run`` takes the number of the call."""
    seconds = []
    for call in range(repeats + 1):
        began = time.perf_counter()
        jax.block_until_ready(run(call))
        seconds.append(time.perf_counter() - began)
    return seconds[0], min(seconds[1:])


def report(task: str, who: str, unit: str, amount: float, seconds: tuple[float, float]) -> dict:
    """Print a line of the table, and return it."""
    row = {"task": task, "who": who, "unit": unit, "rate": amount / seconds[1], "first": seconds[0]}
    print(f"{task:28} {who:14} {row['rate']:12.4g} {unit:22} first call {row['first']:6.1f} s", flush=True)
    return row


def has(package: str) -> bool:
    """Return whether a peer is installed, and say so if it is not."""
    found = importlib.util.find_spec(package) is not None
    if not found:
        print(f"({package} is not installed)")
    return found


def ours(energy: Any, kernel: Any, num_chains: int, num_steps: int) -> Callable[[int], Any]:
    """Return a function that runs transitions of our kernel from random states."""
    distribution = ebm.EnergyDistribution(energy)
    bound = kernel.bind(distribution)
    start = distribution.reference_sample(jax.random.key(0), (num_chains,))

    @jax.jit
    def run(key):
        return chains.advance(key, bound, distribution.target(bound), start, num_steps=num_steps).positions

    return lambda call: run(jax.random.key(call))


def gibbs(args) -> list[dict]:
    """Compare sweeps of single-site Gibbs."""
    size, steps = args.units, 20
    rng = np.random.default_rng(0)
    matrix = rng.normal(0, 0.1, (size, size))
    matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T
    biases = rng.normal(0, 0.1, size)
    weights, fields = jnp.asarray(matrix, float), jnp.asarray(biases, float)

    @jax.jit
    def by_hand(key, x):
        def unit(carry, inputs):
            x, local = carry
            i, uniform = inputs
            new = (uniform < jax.nn.sigmoid(local[i])).astype(float)
            return (x.at[i].set(new), local + weights[i][:, None] * (new - x[i])), None

        def sweep(carry, key):
            return jax.lax.scan(unit, carry, (jnp.arange(size), jax.random.uniform(key, (size, args.chains))))[0], None

        return jax.lax.scan(sweep, (x, weights @ x + fields[:, None]), jax.random.split(key, steps))[0][0]

    start = jax.random.bernoulli(jax.random.key(0), shape=(size, args.chains)).astype(float)
    task, count = f"gibbs, {size} units", steps * args.chains
    run = ours(BoltzmannMachine(matrix, biases), ebm.Gibbs(), args.chains, steps)
    return [
        report(task, "numpyro_ebm", "sweeps of a chain / s", count, timed(run, args.repeats)),
        report(
            task,
            "by hand",
            "sweeps of a chain / s",
            count,
            timed(lambda call: by_hand(jax.random.key(call), start), args.repeats),
        ),
    ]


def thrml_run(graph: Graph, coupling: float, num_chains: int, num_steps: int) -> Callable[[int], Any]:
    """Return a function that runs sweeps of thrml over the same blocks of the same graph."""
    from thrml.block_management import Block
    from thrml.block_sampling import _run_blocks
    from thrml.models.ising import IsingEBM, IsingSamplingProgram, hinton_init
    from thrml.pgm import SpinNode

    nodes = [SpinNode() for _ in range(graph.num_nodes)]
    edges = [(nodes[a], nodes[b]) for a, b in graph.edges.tolist()]
    model = IsingEBM(nodes, edges, jnp.zeros(len(nodes)), jnp.full(len(edges), coupling), jnp.array(1.0))
    blocks = [Block([nodes[i] for i in block]) for block in graph.blocks]
    program = IsingSamplingProgram(model, blocks, [])
    start = hinton_init(jax.random.key(0), model, blocks, (num_chains,))

    @jax.jit
    def run(key):
        def one(key, state):
            return _run_blocks(key, program, state, [], num_steps, [None] * len(blocks))[0]

        return jax.vmap(one)(jax.random.split(key, num_chains), start)

    return lambda call: run(jax.random.key(call))


def ising(args) -> list[dict]:
    """Compare block Gibbs on two graphs."""
    graphs = {f"lattice {args.width} x {args.width}": Graph.lattice(args.width, args.width)}
    if has("dwave_networkx"):
        import dwave_networkx
        import networkx

        pegasus = networkx.convert_node_labels_to_integers(dwave_networkx.pegasus_graph(args.pegasus))
        graphs[f"pegasus({args.pegasus})"] = Graph(list(pegasus.edges), pegasus.number_of_nodes())
    rows, steps, with_thrml = [], 5, has("thrml")
    for name, graph in graphs.items():
        count = steps * args.chains * graph.num_nodes
        task = f"block Gibbs, {name}"
        run = ours(Ising(graph, 0.1), ebm.BlockGibbs(), args.chains, steps)
        rows.append(report(task, "numpyro_ebm", "spins / s", count, timed(run, args.repeats)))
        if with_thrml:
            run = thrml_run(graph, 0.1, args.chains, steps)
            rows.append(report(task, "thrml", "spins / s", count, timed(run, args.repeats)))
    return rows


def rbm(args) -> list[dict]:
    """Compare updates of persistent contrastive divergence."""
    visible, hidden, rows, steps = args.visible, args.hidden, args.rows, 20
    x = np.random.default_rng(0).random((rows, visible)) < 0.2

    def model(x):
        energy = RBM(
            numpyro.param("weights", 0.01 * jax.random.normal(jax.random.key(1), (visible, hidden))),
            numpyro.param("visible", jnp.zeros(visible)),
            numpyro.param("hidden", jnp.zeros(hidden)),
        )
        with numpyro.plate("rows", rows):
            numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

    estimated = ebm.estimate(model, "pcd", kernel="block_gibbs", num_steps=args.gibbs_steps, num_chains=args.chains)
    svi = SVI(estimated, ebm.empty_guide, optax.sgd(0.01 / rows), Trace_ELBO())
    data = jnp.asarray(x, int)
    state = svi.init(jax.random.key(0), data)

    @jax.jit
    def updates(state):
        return jax.lax.scan(lambda s, _: (svi.update(s, data)[0], None), state, None, steps)[0]

    task = f"pcd-{args.gibbs_steps}, RBM {visible} x {hidden}"
    lines = [report(task, "numpyro_ebm", "updates / s", steps, timed(lambda _: updates(state), args.repeats))]
    if has("rbms") and has("torch"):
        run = rbms_run(x, hidden, args.chains, args.gibbs_steps, steps)
        lines.append(report(task, "rbms", "updates / s", steps, timed(run, args.repeats)))
    return lines


def rbms_run(x: np.ndarray, num_hidden: int, num_chains: int, gibbs_steps: int, num_updates: int) -> Callable[[int], Any]:
    """Return a function that runs updates of rbms on the same rows."""
    import torch
    from rbms.bernoulli_bernoulli.classes import BBRBM
    from rbms.training.pcd import fit_batch_pcd

    data = torch.tensor(x, dtype=torch.float32)
    machine = BBRBM(
        weight_matrix=0.01 * torch.randn(x.shape[1], num_hidden),
        vbias=torch.zeros(x.shape[1]),
        hbias=torch.zeros(num_hidden),
    )
    optimizer = torch.optim.SGD(machine.parameters(), lr=0.01, maximize=True)
    optimizer.zero_grad(set_to_none=False)
    for parameter in machine.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = torch.ones(len(x))
    state = {"chains": machine.init_chains(num_chains)}

    def run(_):
        with torch.no_grad():
            for _ in range(num_updates):
                optimizer.zero_grad(set_to_none=False)
                state["chains"], _ = fit_batch_pcd(
                    (data, weights), state["chains"], machine, gibbs_steps, 1.0, centered=False
                )
                optimizer.step()

    return run


TASKS = {"gibbs": gibbs, "ising": ising, "rbm": rbm}


def main(argv: list[str] | None = None) -> list[dict]:
    """Run the tasks, and return the rows of the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=[], help="all of them by default")
    parser.add_argument("--chains", type=int, default=None, help="chains; 64 for gibbs, 256 for ising, 500 for rbm")
    parser.add_argument("--units", type=int, default=200, help="units of the Boltzmann machine")
    parser.add_argument("--width", type=int, default=100, help="width of the lattice")
    parser.add_argument("--pegasus", type=int, default=14, help="size of the Pegasus graph")
    parser.add_argument("--visible", type=int, default=784)
    parser.add_argument("--hidden", type=int, default=500)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--gibbs-steps", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    usual, rows = {"gibbs": 64, "ising": 256, "rbm": 500}, []
    for task in args.tasks or TASKS:
        own = argparse.Namespace(**{**vars(args), "chains": args.chains or usual[task]})
        rows += TASKS[task](own)
    return rows


if __name__ == "__main__":
    main()
