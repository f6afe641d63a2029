"""Eight Gaussians on a circle: contrastive divergence, persistent chains, a replay buffer and short runs compared.

The density is known, and in two dimensions a grid gives log Z, so each trained energy is compared with the truth: by the
Kullback-Leibler divergence from the data distribution, and by the weights of the eight modes, which are all 1/8. The script
prints a table and each estimator's report of its own training, and draws data, learned densities, chains and energy gaps.

    python examples/mixture2d.py                    the whole table, a few minutes
    python examples/mixture2d.py --quick            seconds, to check that it runs
    python examples/mixture2d.py --methods pcd      one estimator only
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.kernels import chains

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ANGLES = jnp.arange(8) * jnp.pi / 4
CENTRES = jnp.stack([jnp.cos(ANGLES), jnp.sin(ANGLES)], axis=1)
SD = 0.15
TRUTH = dist.MixtureSameFamily(dist.Categorical(jnp.full(8, 1 / 8)), dist.Normal(CENTRES, SD).to_event(1))
BASE = dist.Normal(0, 1).expand([2]).to_event(1)
GRID_SIZE, GRID_EDGE = 400, 2.5
EDGE = jnp.linspace(-GRID_EDGE, GRID_EDGE, GRID_SIZE)
GRID = jnp.stack(jnp.meshgrid(EDGE, EDGE), axis=-1).reshape(-1, 2)
CELL = float((EDGE[1] - EDGE[0]) ** 2)

METHODS = {
    "cd": {"num_steps": 10, "kernel": ebm.MALA(0.01)},
    "pcd": {"num_steps": 10, "kernel": ebm.MALA(0.01), "num_chains": 2000},
    "replay": {"num_steps": 10, "kernel": ebm.MALA(0.01), "buffer_size": 5000, "reinit_prob": 0.01},
    "mle": {"num_steps": 10, "kernel": ebm.MALA(0.01), "adapt_step_size": False},
}


class Trained(NamedTuple):
    """A trained energy: parameters, ends of its chains, energy gap at each update, the estimator's report, seconds."""

    params: dict
    chains: np.ndarray
    gap: np.ndarray
    report: ebm.TrainingReport
    seconds: float


class Energy(nnx.Module):
    """A network with two layers of 64 silu units."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(2, 64, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x):
        """Return the energy of one point, of shape (1,)."""
        return self.last(nnx.silu(self.second(nnx.silu(self.first(x)))))


NET = Energy(nnx.Rngs(0))


def model(x, batch_size):
    net = nnx_module("net", NET)
    with numpyro.plate("rows", len(x), subsample_size=batch_size):
        energy = ebm.EnergyDistribution(net, event_shape=(2,), base=BASE)
        numpyro.sample("x", energy, obs=numpyro.subsample(x, event_dim=1))


@jax.jit
def log_density(params, x):
    """Return the unnormalised log density of points."""
    with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
        return ebm.EnergyDistribution(nnx_module("net", NET), event_shape=(2,), base=BASE).log_prob(x)


def train(name: str, x: jax.Array, args: argparse.Namespace) -> Trained:
    """Train by SVI with Adam, whose learning rate decays so that the energy settles."""
    estimated = ebm.estimate(model, name, **METHODS[name])
    rate = optax.cosine_decay_schedule(3e-3, args.steps, 0.01)
    svi = SVI(estimated, ebm.empty_guide, optax.adam(rate), Trace_ELBO())

    @jax.jit
    def chunk(state):
        def step(state, _):
            state, _ = svi.update(state, x, args.batch)
            return state, state.mutable_state[f"x${name}"]["state"].health.energy_gap

        return jax.lax.scan(step, state, None, length=args.chunk)

    start = time.time()
    state = svi.init(jax.random.key(args.seed), x, args.batch)
    gaps = []
    for _ in tqdm(range(args.steps // args.chunk), desc=f"{name:>6}", unit="chunk", leave=False):
        state, gap = chunk(state)
        gaps.append(np.asarray(gap))
    params = {"net$params": svi.get_params(state)["net$params"]}
    report = ebm.training_report(estimated, state)
    return Trained(params, negatives(name, params, state, x, args), np.concatenate(gaps), report, time.time() - start)


def negatives(name: str, params, state, x, args) -> np.ndarray:
    """Return the persistent chains, or else the ends of the chains of one more update."""
    kept = state.mutable_state[f"x${name}"]["state"]
    if kept.pool is not None:
        return np.asarray(kept.pool.position)[:2000]
    start = x[:2000] if name == "cd" else BASE.sample(jax.random.key(7), (2000,))
    kernel = METHODS[name]["kernel"].adapted(step_size=kept.health.step_size)
    run = jax.jit(
        lambda key, start: chains.advance(
            key, kernel, lambda z, _: log_density(params, z), start, num_steps=METHODS[name]["num_steps"]
        )[0]
    )
    return np.asarray(run(jax.random.key(8), start))


def compare(params) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the divergence from the truth, the mass nearest to each centre, and the log density on the grid."""
    values = log_density(params, GRID)
    log_p = values - jax.nn.logsumexp(values) - jnp.log(CELL)
    log_truth = TRUTH.log_prob(GRID)
    divergence = jnp.sum(jnp.exp(log_truth) * (log_truth - log_p)) * CELL
    nearest = jnp.argmin(jnp.sum((GRID[:, None] - CENTRES) ** 2, axis=-1), axis=1)
    weights = jnp.zeros(8).at[nearest].add(jnp.exp(log_p)) * CELL
    return float(divergence), np.asarray(weights), np.asarray(log_p)


def summarise(name: str, fit: Trained) -> dict:
    divergence, weights, log_p = compare(fit.params)
    nearest = np.argmin(((fit.chains[:, None] - np.asarray(CENTRES)) ** 2).sum(-1), axis=1)
    distance = np.sqrt(((fit.chains - np.asarray(CENTRES)[nearest]) ** 2).mean())
    return {
        "method": name,
        "kl": divergence,
        "weights": weights,
        "weight_error": np.abs(weights - 1 / 8).max(),
        "chain_sd": distance,
        "gap": fit.gap[-len(fit.gap) // 10 :].mean(),
        "acceptance": fit.report.sites[0].figures["acceptance_rate"],
        "step_size": fit.report.sites[0].figures["step_size"],
        "seconds": fit.seconds,
        "log_p": log_p,
    }


def print_table(rows: list[dict]) -> None:
    print("\nCompared with the truth: eight modes of weight .125 and standard deviation .15 on the unit circle.")
    print(
        f"{'method':>8} {'KL':>8} {'weight err':>11} {'chain sd':>9} {'E gap':>8} {'accept':>7} {'step':>8} {'seconds':>8}"
    )
    for row in rows:
        print(
            f"{row['method']:>8} {row['kl']:8.4f} {row['weight_error']:11.4f} {row['chain_sd']:9.3f} {row['gap']:8.3f} "
            f"{row['acceptance']:7.2f} {row['step_size']:8.4f} {row['seconds']:8.1f}"
        )
    print(
        "KL: nats from the data distribution to the learned density (log Z on a 400 x 400 grid); weight err: largest error\n"
        "of a mode's weight; chain sd: spread of the chains' ends around the nearest centre (.15 for the data); E gap:\n"
        "mean energy of data minus that of negatives over the last tenth of training (0 for a model that fits its chains)."
    )


def draw_picture(path: Path, fits: dict[str, Trained], rows: list[dict], x: np.ndarray, *, is_quick: bool) -> None:
    """Draw density, chains and energy gap, one column per estimator after a column of the truth and the data."""
    figure, axes = plt.subplots(3, len(rows) + 1, figsize=(3 * (len(rows) + 1), 8.2), layout="constrained")
    extent = (-GRID_EDGE, GRID_EDGE, -GRID_EDGE, GRID_EDGE)
    truth = np.exp(np.asarray(TRUTH.log_prob(GRID))).reshape(GRID_SIZE, GRID_SIZE)
    show = {"origin": "lower", "extent": extent, "cmap": "cividis", "vmin": 0, "vmax": truth.max()}
    densities = [("truth", truth)] + [
        (f"{row['method']}: KL {row['kl']:.3f}", np.exp(row["log_p"]).reshape(GRID_SIZE, GRID_SIZE)) for row in rows
    ]
    for axis, (title, density) in zip(axes[0], densities, strict=True):
        axis.imshow(density, **show)
        axis.set_title(title)
    points = [("data", x[:2000])] + [("chains", fit.chains) for fit in fits.values()]
    for axis, (title, values) in zip(axes[1], points, strict=True):
        axis.scatter(*values.T, s=1.5, color="0.2")
        axis.set(title=title, xlim=extent[:2], ylim=extent[2:], aspect="equal")
    for axis in axes[:2].flat:
        axis.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2])
    axes[2, 0].axis("off")
    window = max(1, len(next(iter(fits.values())).gap) // 100)
    for axis, fit in zip(axes[2, 1:], fits.values(), strict=True):
        smooth = np.convolve(fit.gap, np.ones(window) / window, mode="valid")
        axis.plot(smooth, color="C0", lw=1)
        axis.axhline(0, color="k", lw=0.8, ls="--")
        axis.set(title="energy gap (data - chains)", xlabel="update", ylim=(-0.4, 0.4))
    if is_quick:
        figure.text(0.5, 0.5, "untrained (--quick)", ha="center", va="center", rotation=20, fontsize=36, alpha=0.35)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--rows", type=int, default=20_000, help="data points")
    parser.add_argument("--steps", type=int, default=4000, help="updates")
    parser.add_argument("--batch", type=int, default=500, help="rows per update")
    parser.add_argument("--chunk", type=int, default=100, help="updates per compiled call")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for mixture2d.png")
    parser.add_argument("--quick", action="store_true", help="run for seconds, to check that everything works")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.rows, args.steps, args.batch, args.chunk = 2000, 40, 100, 20

    x = TRUTH.sample(jax.random.key(args.seed + 100), (args.rows,))
    fits = {name: train(name, x, args) for name in args.methods}
    rows = [summarise(name, fit) for name, fit in fits.items()]
    print_table(rows)
    print()
    for fit in fits.values():
        print(fit.report)
    draw_picture(args.out / "mixture2d.png", fits, rows, np.asarray(x), is_quick=args.quick)
    print(f"Wrote {args.out / 'mixture2d.png'}.")
    return rows


if __name__ == "__main__":
    main()
