"""A restricted Boltzmann machine of handwritten digits: contrastive divergence, persistent chains and centring compared.

The digits are those of scikit-learn, 8 x 8 pixels, black where the grey level is 8 or more. With 12 hidden units log Z is
a sum over 2^12 states, so each machine has an exact likelihood on held-out digits, and annealed importance sampling is
compared with the exact log Z. The script trains by "cd" with one and ten steps and by "pcd". Then it trains a machine
with and without offsets on the digits and on their negatives (1 - x): a centred machine learns both alike. It prints a
table, ArviZ figures of how block Gibbs and single-site Gibbs mix, and draws filters, chains and learning curves.

    python examples/rbm_digits.py              about ten minutes
    python examples/rbm_digits.py --quick      a minute, to check that it runs
"""

import argparse
import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import arviz
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

METHODS = {
    "cd-1": ("cd", {"num_steps": 1}),
    "cd-10": ("cd", {"num_steps": 10}),
    "pcd-1": ("pcd", {"num_steps": 1, "num_chains": 100}),
}


class Trained(NamedTuple):
    """A trained machine, its held-out log-likelihood at each check, and the seconds of its training."""

    energy: RBM
    curve: np.ndarray
    seconds: float


def load(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 1437 digits to train on and 360 held out, as zeros and ones."""
    x = (load_digits().data >= 8).astype(int)
    order = np.random.default_rng(seed).permutation(len(x))
    return x[order[:1437]], x[order[1437:]]


def machine(start: RBM) -> RBM:
    """Return the machine whose parameters are trained, from where they start; its offsets stay."""
    weights = numpyro.param("weights", start.weights)
    visible = numpyro.param("visible_biases", start.visible_biases)
    hidden = numpyro.param("hidden_biases", start.hidden_biases)
    return RBM(weights, visible, hidden, start.visible_offsets, start.hidden_offsets)


def model(x, start, batch):
    """Declare the digits as draws of a machine."""
    energy = machine(start)
    with numpyro.plate("rows", len(x), subsample_size=batch):
        numpyro.sample("x", ebm.EnergyDistribution(energy), obs=numpyro.subsample(x, event_dim=1))


def start_at(x: np.ndarray, num_hidden: int) -> RBM:
    """Return a machine with small weights, and with biases that give the rates of the pixels."""
    rates = np.clip(x.mean(0), 0.01, 0.99)
    return RBM(small_weights(x, num_hidden), np.log(rates / (1 - rates)))


def small_weights(x: np.ndarray, num_hidden: int) -> np.ndarray:
    """Return normal weights with a standard deviation of 0.01."""
    return 0.01 * np.random.default_rng(1).normal(size=(x.shape[1], num_hidden))


@jax.jit
def mean_log_likelihood(energy: RBM, x: jax.Array) -> jax.Array:
    """Return the mean log-likelihood of rows, in nats, with the exact log Z."""
    return -jnp.mean(jax.vmap(energy)(x)) - energy.log_partition()


def train(name: str, options: dict, start: RBM, x: np.ndarray, held_out: np.ndarray, args, label: str) -> Trained:
    """Train by SVI with plain gradient steps, whose rate falls linearly to 0."""
    estimated = ebm.estimate(model, name, kernel="block_gibbs", **options)
    rows = jnp.asarray(x)
    updates = args.epochs * (len(x) // args.batch)
    # A step of the mean over rows, as the machines of the literature take it: SVI's loss is the sum.
    rate = optax.linear_schedule(args.rate / len(x), 0.0, updates)
    svi = SVI(estimated, ebm.empty_guide, optax.sgd(rate), Trace_ELBO())

    @jax.jit
    def chunk(state):
        return jax.lax.scan(
            lambda s, _: (svi.update(s, rows, start, args.batch)[0], None), state, None, updates // args.checks
        )[0]

    began, curve = time.time(), []
    state = svi.init(jax.random.key(args.seed), rows, start, args.batch)
    for _ in tqdm(range(args.checks), desc=label, unit="check", leave=False):
        state = chunk(state)
        energy = trained_machine(svi.get_params(state), start)
        curve.append(mean_log_likelihood(energy, held_out))
    return Trained(energy, np.asarray(curve), time.time() - began)


def trained_machine(params: dict, start: RBM) -> RBM:
    """Return the machine with trained parameters."""
    return numpyro.handlers.substitute(partial(machine, start), params)()


def independent(x: np.ndarray, held_out: np.ndarray) -> float:
    """Return the mean log-likelihood of pixels that are independent."""
    rates = np.clip(x.mean(0), 1e-3, 1 - 1e-3)
    return float(np.mean(held_out @ np.log(rates) + (1 - held_out) @ np.log(1 - rates)))


def mixing(energy: RBM, args) -> tuple[list[dict], np.ndarray]:
    """Return how the number of black pixels mixes under block and single-site Gibbs, and the ends of the block chains."""
    rows, digits = [], np.zeros(0)
    for kernel in ("block_gibbs", "gibbs"):
        counts = {"num_warmup": args.warmup, "num_samples": args.samples, "num_chains": 16}
        began = time.time()
        draws = ebm.sample(jax.random.key(7), ebm.EnergyDistribution(energy), kernel, **counts)
        x = np.asarray(draws.samples["x"])
        idata = ebm.to_arviz(dataclasses.replace(draws, samples={"black": x.sum(-1)}))
        rhat, ess = (float(f(idata)["black"]) for f in (arviz.rhat, arviz.ess))
        rows.append({"kernel": kernel, "rhat": rhat, "ess": ess, "seconds": time.time() - began})
        digits = digits if digits.size else x[:, -1]
    return rows, digits


def centring(x: np.ndarray, held_out: np.ndarray, args) -> list[dict]:
    """Return the held-out log-likelihood on the digits and on their negatives, with and without offsets.

    The visible biases start at 0, since the rates of the pixels would centre the machine in part.
    """
    rows, (method, options) = [], METHODS["pcd-1"]
    for centered in (True, False):
        found = []
        for flipped in (False, True):
            data, test = (1 - part if flipped else part for part in (x, held_out))
            label = f"{'centred' if centered else 'uncentred'}, {'1 - x' if flipped else 'x'}"
            offsets = (data.mean(0), 0.5) if centered else (None, None)
            start = RBM(small_weights(data, args.hidden), 0.0, 0.0, *offsets)
            found.append(train(method, options, start, data, test, args, label).curve[-1])
        rows.append({"machine": "centred" if centered else "uncentred", "x": found[0], "1 - x": found[1]})
    return rows


def draw(trained: dict[str, Trained], digits: np.ndarray, path: Path) -> None:
    """Draw the filters and samples of the last machine, and the learning curves of all."""
    energy = list(trained.values())[-1].energy
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    filters = np.asarray(energy.weights).T
    edge = np.abs(filters).max()
    axes[0].imshow(tiled(filters, 4), cmap="RdBu_r", vmin=-edge, vmax=edge)
    axes[0].set_title("weights of the hidden units")
    axes[1].imshow(tiled(digits, 4), cmap="gray_r", vmin=0, vmax=1)
    axes[1].set_title("ends of 16 chains of block Gibbs")
    for axis in axes[:2]:
        axis.set_axis_off()
    for (name, each), style in zip(trained.items(), ("-", "--", ":", "-."), strict=False):
        axes[2].plot(np.linspace(0, 1, len(each.curve) + 1)[1:], each.curve, style, label=name)
    axes[2].set(xlabel="share of the training", ylabel="held-out log-likelihood (nats)", title="exact log Z at each check")
    axes[2].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def tiled(images: np.ndarray, columns: int) -> np.ndarray:
    """Return images of 8 x 8 pixels in one array, with a blank line between them."""
    padded = np.pad(
        images.reshape(-1, columns, 8, 8).astype(float), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=np.nan
    )
    return padded.transpose(0, 2, 1, 3).reshape(-1, columns * 9)


def main(argv: list[str] | None = None) -> dict[str, list[dict]]:
    """Train, compare, print and draw; return the rows of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few epochs and draws, to check that the script runs")
    parser.add_argument("--epochs", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=100, help="rows per update")
    parser.add_argument("--rate", type=float, default=0.2, help="first learning rate, per mean over rows")
    parser.add_argument("--hidden", type=int, default=12, help="hidden units; log Z sums 2 ** hidden states")
    parser.add_argument("--checks", type=int, default=25, help="checks of the held-out likelihood")
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--samples", type=int, default=2000, help="draws of each chain when mixing is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.checks, args.warmup, args.samples = 15, 3, 20, 50
    args.out.mkdir(parents=True, exist_ok=True)
    x, held_out = load(args.seed)

    trained, rows = {}, []
    for label, (name, options) in METHODS.items():
        each = train(name, options, start_at(x, args.hidden), x, held_out, args, label)
        trained[label] = each
        found = ebm.log_partition(
            jax.random.key(3), ebm.EnergyDistribution(each.energy.joint()), method="ais", kernel="block_gibbs"
        )
        exact = float(each.energy.log_partition())
        train_value = float(mean_log_likelihood(each.energy, x))
        rows.append(
            {"method": label, "train": train_value, "held_out": float(each.curve[-1]), "log_z": exact}
            | {"ais": float(found.value), "ais_se": float(found.standard_error), "seconds": each.seconds}
        )
    print(f"Mean log-likelihood in nats; independent pixels reach {independent(x, held_out):.2f} on held-out digits.")
    print(f"{'method':8} {'train':>8} {'held out':>9} {'log Z':>8} {'by AIS':>16} {'seconds':>8}")
    for row in rows:
        by_ais = f"{row['ais']:.2f} +- {row['ais_se']:.2f}"
        figures = f"{row['train']:8.2f} {row['held_out']:9.2f} {row['log_z']:8.2f} {by_ais:>16} {row['seconds']:8.0f}"
        print(f"{row['method']:8} {figures}")

    print("\nHeld-out log-likelihood of pcd-1 on the digits (x) and on their negatives (1 - x):")
    centred = centring(x, held_out, args)
    for row in centred:
        difference = abs(row["x"] - row["1 - x"])
        print(f"{row['machine']:10} x {row['x']:7.2f}   1 - x {row['1 - x']:7.2f}   difference {difference:.2f}")

    mixed, digits = mixing(trained["pcd-1"].energy, args)
    print("\nMixing of the number of black pixels, 16 chains:")
    for row in mixed:
        print(
            f"{row['kernel']:12} R-hat {row['rhat']:.3f}   effective draws {row['ess']:6.0f}   seconds {row['seconds']:.1f}"
        )
    draw(trained, digits, args.out / "rbm_digits.png")
    print(f"\nWrote {args.out / 'rbm_digits.png'}")
    return {"trained": rows, "centring": centred, "mixing": mixed}


if __name__ == "__main__":
    main()
