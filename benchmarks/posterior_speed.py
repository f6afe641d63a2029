"""Effective draws per second of the posterior of a network: exchange beside NUTS.

The model is that of ``examples/bayesian_network.py``: six binary symptoms of 355 children, a Cauchy prior of each coupling,
21 latents. Exchange draws the auxiliary data from the table of all 64 states, or by Gibbs chains that start at the data, as
for any number of items. NUTS draws from the exact posterior, with log Z as a sum over the states, and from that of the
pseudolikelihood, which is another one: its standard deviations are about 0.7 times the right ones. All run side by side in
one process, one after the other, with the effective sample size of ArviZ (bulk). Run it on a quiet machine.

    python benchmarks/posterior_speed.py
    python benchmarks/posterior_speed.py --items 10 --samples 500
"""

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import numpyro_ebm as ebm


def example() -> Any:
    """Return the example as a module."""
    path = Path(__file__).parents[1] / "examples" / "bayesian_network.py"
    spec: Any = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Print the table, and return the fits by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6, choices=range(3, 11), metavar="{3..10}")
    parser.add_argument("--samples", type=int, default=2000, help="draws of each of four chains")
    parser.add_argument("--steps", type=int, default=20, help="sweeps of a Gibbs chain, and bridges")
    args = parser.parse_args(argv)
    network = example()
    _, x = network.load(args.items)
    steps = {"num_steps": args.steps, "num_bridges": args.steps}
    chains = ebm.ExchangeKernel(network.model, "gibbs", proposal="crank_nicolson", **steps)
    table = ebm.ExchangeKernel(network.model, exact_sampler="enumeration", proposal="crank_nicolson")
    usual = network.methods(args.items, args.steps)
    methods = {
        "exchange, table": network.Method(table, 4, thinning=5),
        "exchange, chains": network.Method(chains, 4),
        "exact": usual["exact"],
        "pseudolikelihood": usual["pseudolikelihood"],
    }
    fits = {name: network.fit(method, x, False, args.samples) for name, method in methods.items()}
    network.print_speed(fits)
    return fits


if __name__ == "__main__":
    main()
