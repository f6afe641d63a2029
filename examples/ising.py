"""The Ising model on a square lattice: temperatures by three kernels, and couplings recovered from draws.

The first part goes through the couplings J of a periodic lattice without a field, and compares the energy per spin by
single-site Gibbs, block Gibbs and Swendsen-Wang with Onsager's exact value for the infinite lattice; near the critical
coupling log(1 + sqrt(2)) / 2 = 0.4407 single-site chains forget their start slowly, as the number of effective draws
shows. The second part draws rows of a small lattice whose edges have couplings of their own, and estimates the couplings
by pseudolikelihood, persistent contrastive divergence and maximum likelihood with the exact log Z. It prints two tables
and draws states, curves and couplings.

    python examples/ising.py                two minutes
    python examples/ising.py --quick        seconds, to check that it runs
"""

import argparse
import dataclasses
import time
from pathlib import Path

import arviz
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from scipy.special import ellipk
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.energies import Graph, Ising

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CRITICAL = np.log(1 + np.sqrt(2)) / 2
KERNELS = ("gibbs", "block_gibbs", "swendsen_wang")
METHODS = {
    "pseudolikelihood": {},
    "pcd": {"kernel": "block_gibbs", "num_steps": 1, "num_chains": 500},
    "exact": {},
}


def onsager(coupling: float) -> float:
    """Return the energy per spin of the infinite lattice without a field, divided by the coupling."""
    k = 2 * np.sinh(2 * coupling) / np.cosh(2 * coupling) ** 2
    return float(-(1 + 2 / np.pi * (2 * np.tanh(2 * coupling) ** 2 - 1) * ellipk(k**2)) / np.tanh(2 * coupling))


def sweep(args) -> tuple[list[dict], dict[float, np.ndarray]]:
    """Return the energy per spin at each coupling by each kernel, and a state of Swendsen-Wang at each coupling."""
    graph, rows, states = Graph.lattice(args.width, args.width, periodic=True), [], {}
    left, right = graph.edges.T
    with tqdm(total=len(args.couplings) * len(KERNELS), desc="couplings", unit="run", leave=False) as progress:
        for coupling in args.couplings:
            for kernel in KERNELS:
                counts = {"num_warmup": args.warmup, "num_samples": args.samples, "num_chains": 8}
                began = time.time()
                distribution = ebm.EnergyDistribution(Ising(graph, coupling))
                draws = ebm.sample(jax.random.key(args.seed), distribution, kernel, **counts)
                s = np.asarray(draws.samples["x"]).reshape(8, args.samples, -1)
                energy = -(s[..., left] * s[..., right]).sum(-1) / graph.num_nodes
                idata = ebm.to_arviz(dataclasses.replace(draws, samples={"energy": energy, "size": np.abs(s.mean(-1))}))
                rhat, ess = arviz.rhat(idata), arviz.ess(idata)
                rows.append(
                    {"coupling": coupling, "kernel": kernel, "energy": float(energy.mean()), "exact": onsager(coupling)}
                    | {"rhat": float(rhat["energy"]), "ess": float(ess["energy"]), "ess_size": float(ess["size"])}
                    | {"seconds": time.time() - began}
                )
                progress.update()
            states[coupling] = s[0, -1].reshape(args.width, args.width)
    return rows, states


def model(s, graph):
    """Declare the rows of spins, with a coupling for each edge and a field for each node."""
    couplings = numpyro.param("couplings", jnp.zeros(graph.num_edges))
    fields = numpyro.param("fields", jnp.zeros(graph.shape))
    with numpyro.plate("rows", len(s)):
        numpyro.sample("s", ebm.EnergyDistribution(Ising(graph, couplings, fields)), obs=s)


def recover(args) -> tuple[list[dict], np.ndarray, dict[str, np.ndarray]]:
    """Return how well each estimator recovers the couplings of a small lattice, the couplings, and the estimates."""
    graph, rng = Graph.lattice(5, 5), np.random.default_rng(args.seed)
    truth = rng.normal(0, 0.4, graph.num_edges)
    distribution = ebm.EnergyDistribution(Ising(graph, truth, 0.1))
    # Chains that are long enough to be independent draws: one row of each.
    s = ebm.sample(
        jax.random.key(args.seed), distribution, "block_gibbs", num_warmup=500, num_samples=1, num_chains=args.rows
    ).samples["x"][:, 0]
    rows, estimates = [], {}
    for name, options in tqdm(METHODS.items(), desc="estimators", unit="fit", leave=False):
        began = time.time()
        rate = optax.cosine_decay_schedule(0.02, args.steps, 0.01)
        svi = SVI(ebm.estimate(model, name, **options), ebm.empty_guide, optax.adam(rate), Trace_ELBO())
        params = svi.run(jax.random.key(1), args.steps, s, graph, progress_bar=False).params
        error = np.asarray(params["couplings"]) - truth
        estimates[name] = np.asarray(params["couplings"])
        rows.append({"method": name, "rmse": float(np.sqrt(np.mean(error**2))), "seconds": time.time() - began})
    return rows, truth, estimates


def draw(
    swept: list[dict], states: dict[float, np.ndarray], truth: np.ndarray, estimates: dict[str, np.ndarray], path: Path
) -> None:
    """Draw states below, near and above the critical coupling, the energy curve, and estimated against true couplings."""
    figure, axes = plt.subplots(1, 5, figsize=(17, 3.6), layout="constrained")
    couplings = sorted(states)
    middle = min(couplings, key=lambda coupling: abs(coupling - CRITICAL))
    for axis, coupling in zip(axes, (couplings[0], middle, couplings[-1]), strict=False):
        axis.imshow(states[coupling], cmap="gray", vmin=-1, vmax=1)
        axis.set(title=f"J = {coupling:.3f}", xticks=[], yticks=[])
    fine = np.linspace(couplings[0], couplings[-1], 200)
    axes[3].plot(fine, [onsager(coupling) for coupling in fine], "k-", label="exact, infinite lattice")
    for kernel, mark in zip(KERNELS, ("x", "+", "o"), strict=True):
        points = [(row["coupling"], row["energy"]) for row in swept if row["kernel"] == kernel]
        axes[3].plot(*zip(*points, strict=True), mark, fillstyle="none", label=kernel)
    axes[3].axvline(CRITICAL, color="0.7", linestyle=":")
    axes[3].set(xlabel="coupling J", ylabel="energy per spin / J", title="by temperature")
    axes[3].legend(fontsize=8)
    edge = 1.1 * np.abs(truth).max()
    axes[4].plot([-edge, edge], [-edge, edge], color="0.7")
    for (name, values), mark in zip(estimates.items(), ("x", "+", "o"), strict=True):
        axes[4].plot(truth, values, mark, fillstyle="none", label=name)
    axes[4].set(xlabel="true coupling", ylabel="estimate", title="5 x 5 lattice, a coupling per edge")
    axes[4].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Sample, estimate, print and draw; return the rows of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few draws on a small lattice, to check that the script runs")
    parser.add_argument("--couplings", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.44, 0.5, 0.6], help="values of J")
    parser.add_argument("--width", type=int, default=32, help="nodes along each side of the lattice")
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--samples", type=int, default=1000, help="draws of each of 8 chains")
    parser.add_argument("--rows", type=int, default=2000, help="rows from which couplings are estimated")
    parser.add_argument("--steps", type=int, default=1500, help="updates of each estimator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    if args.quick:
        args.couplings, args.width, args.warmup, args.samples, args.rows, args.steps = [0.2, 0.5], 8, 50, 100, 200, 200
    args.out.mkdir(parents=True, exist_ok=True)

    swept, states = sweep(args)
    print(f"Energy per spin over J on a periodic {args.width} x {args.width} lattice (critical J: {CRITICAL:.4f}):")
    print(
        f"{'J':>5} {'kernel':14} {'energy':>8} {'infinite':>8} {'R-hat':>6} {'draws of E':>11} {'of |m|':>7} {'seconds':>8}"
    )
    for row in swept:
        figures = f"{row['energy']:8.4f} {row['exact']:8.4f} {row['rhat']:6.3f} {row['ess']:11.0f} {row['ess_size']:7.0f}"
        print(f"{row['coupling']:5.2f} {row['kernel']:14} {figures} {row['seconds']:8.1f}")

    recovered, truth, estimates = recover(args)
    print(f"\nCouplings of the {len(truth)} edges of a 5 x 5 lattice from {args.rows} rows:")
    for row in recovered:
        print(f"{row['method']:17} root mean square error {row['rmse']:.4f}   seconds {row['seconds']:.1f}")
    draw(swept, states, truth, estimates, args.out / "ising.png")
    print(f"\nWrote {args.out / 'ising.png'}")
    return {"sweep": swept, "recovered": recovered}


if __name__ == "__main__":
    main()
