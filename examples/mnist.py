"""A convolutional energy of handwritten digits: replay, moving averages, two-sided bounds, and digits told from noise.

The images are MNIST's, 14 x 14 binary pixels, 9000 to train on and 1000 held out. The energy is a small convolutional
network (flax nnx) on top of independent pixels, ``p(x) = base(x) exp(-net(x)) / Z``. It is trained by maximum likelihood
with a replay buffer, whose chains move by discrete Langevin proposals, and a moving average of its weights is evaluated.
Annealed importance sampling from the independent pixels to the energy and back bounds log Z from both sides, and with it the
likelihood of the held-out digits. The energy also tells digits from images whose pixels are permuted, each by a permutation
of its own. The script prints a table, and draws digits, chains, the two sets of log densities and the training.

    python examples/mnist.py              about 15 minutes on two cores
    python examples/mnist.py --quick      a minute, to check that it runs
"""

import argparse
import time
from functools import cache, partial
from pathlib import Path

import jax
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from flax import nnx
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from sklearn.metrics import roc_auc_score

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data" / "mnist14_t10k_binary.npz"
SIDE = 14


@cache
def load() -> tuple[np.ndarray, np.ndarray]:
    """Return 9000 digits to train on and 1000 held out, as rows of zeros and ones."""
    x = np.unpackbits(np.load(DATA)["x"], axis=1)[:, : SIDE**2].astype(np.int32)
    return x[:9000], x[9000:]


class Net(nnx.Module):
    """Two convolutions with stride 2 and two dense layers; the value is the energy over that of independent pixels."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, width, (4, 4), strides=2, rngs=rngs)
        self.second = nnx.Conv(width, 2 * width, (4, 4), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(32 * width, 64, rngs=rngs)
        self.out = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the energy of one image."""
        image = 2.0 * x.reshape(SIDE, SIDE, 1) - 1.0
        features = nnx.swish(self.second(nnx.swish(self.first(image))))
        return self.out(nnx.swish(self.hidden(features.ravel())))[0]


def pixels() -> dist.Distribution:
    """Return independent pixels with the rates of the digits."""
    return dist.Bernoulli(np.clip(load()[0].mean(0), 0.01, 0.99)).to_event(1)


def model(net: Net, x=None):
    """Declare the digits of a batch as draws of the energy."""
    energy = nnx_module("net", net)
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample(
            "x", ebm.EnergyDistribution(energy, (SIDE**2,), support=dist.constraints.boolean, base=pixels()), obs=x
        )


def train(declared, rows: np.ndarray, args: argparse.Namespace) -> ebm.FitResult:
    """Train by replay, with a moving average of the weights."""
    estimated = ebm.estimate(
        declared,
        "replay",
        kernel="dmala",
        num_steps=args.moves,
        buffer_size=args.buffer,
        reinit_prob=args.reinit,
        start="base",
    )
    schedule = optax.warmup_cosine_decay_schedule(0.0, args.rate, args.steps // 20, args.steps, args.rate / 100)
    svi = SVI(estimated, ebm.empty_guide, optax.adam(schedule), Trace_ELBO())
    return ebm.fit(
        jax.random.key(args.seed),
        svi,
        args.steps,
        batches=rows,
        batch_size=100,
        ema=args.ema,
        check_every=max(1, args.steps // 60),
    )


def chains_of(result: ebm.FitResult, num: int) -> np.ndarray:
    """Return the events of the chains that have moved longest without a restart."""
    pool = result.state.mutable_state["x$replay"]["state"].pool
    return np.asarray(pool.position)[np.argsort(-np.asarray(pool.age))[:num]]


def log_density(declared, result: ebm.FitResult, x: np.ndarray) -> np.ndarray:
    """Return the log density of each image up to log Z."""
    with numpyro.handlers.seed(rng_seed=0), numpyro.handlers.substitute(data=result.params):
        site = numpyro.handlers.trace(declared).get_trace(x)["x"]
    return np.asarray(site["fn"].log_prob(x))


def permuted(x: np.ndarray, seed: int) -> np.ndarray:
    """Return images whose pixels are permuted, each by a permutation of its own."""
    return np.random.default_rng(seed).permuted(x, axis=1)


def draw_picture(path: Path, rows: np.ndarray, chains: np.ndarray, scores: dict, result: ebm.FitResult) -> None:
    """Draw digits, chains, histograms of the log densities, and what the training recorded."""
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for part, title, images in zip(top.subfigures(1, 2), ("digits", "chains"), (rows, chains), strict=True):
        part.suptitle(title)
        grid = np.pad(images[:50].reshape(5, 10, SIDE, SIDE), ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=1)
        axis = part.subplots()
        axis.imshow(grid.transpose(0, 2, 1, 3).reshape(5 * (SIDE + 2), -1), cmap="gray")
        axis.axis("off")
    left, middle, right = bottom.subplots(1, 3)
    bins = np.histogram_bin_edges(np.concatenate(list(scores.values())), 80)
    for name, values in scores.items():
        left.hist(values, bins=bins, alpha=0.6, label=name)
    left.set(xlabel="log density up to log Z (nats)", ylabel="images")
    left.legend()
    for axis, name, label in (
        (middle, "energy_gap", "energy of digits minus that of chains (nats)"),
        (right, "acceptance_rate", "acceptance rate of the chains"),
    ):
        axis.plot(result.history["step"], result.history[f"{name}/x"], color="black")
        axis.set(xlabel="updates", ylabel=label)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000, help="number of updates")
    parser.add_argument("--moves", type=int, default=20, help="transitions of the chains per update")
    parser.add_argument("--buffer", type=int, default=5000, help="chains in the buffer")
    parser.add_argument("--reinit", type=float, default=0.01, help="probability that a chain restarts")
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the moving average of the weights")
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--levels", type=int, default=300, help="levels of the bounds of log Z, a Gibbs sweep each")
    parser.add_argument("--chains", type=int, default=100, help="chains of the bounds of log Z")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="few updates and levels, to check that the script runs")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps, args.moves, args.width, args.levels, args.chains, args.buffer = 40, 5, 4, 10, 5, 200
    args.out.mkdir(parents=True, exist_ok=True)
    rows, held_out = load()
    declared = partial(model, Net(args.width, nnx.Rngs(args.seed)))
    start = time.perf_counter()
    result = train(declared, rows, args)
    print(f"{result}\n{time.perf_counter() - start:.0f} seconds of training.")
    chains = chains_of(result, max(50, args.chains))
    start = time.perf_counter()
    bounds = ebm.log_partition_bounds(
        jax.random.key(args.seed + 1),
        declared,
        params=result,
        draws=chains[: args.chains],
        num_chains=args.chains,
        num_levels=args.levels,
    )
    print(f"{bounds}\n{time.perf_counter() - start:.0f} seconds for the bounds of log Z.")
    noise = permuted(held_out, args.seed)
    scores = {name: log_density(declared, result, x) for name, x in (("digits", held_out), ("permuted", noise))}
    alone = [np.asarray(pixels().log_prob(x)) for x in (held_out, noise)]
    found = figures(scores, alone, bounds)
    print(f"\n{'':>20} {'log-likelihood of held-out digits':>36} {'AUROC against permuted':>24}")
    print(f"{'independent pixels':>20} {found['pixels']:36.2f} {found['auroc_pixels']:24.4f}")
    both = f"{found['lower']:.2f} to {found['upper']:.2f}"
    print(f"{'energy':>20} {both:>36} {found['auroc']:24.4f}")
    print("log-likelihood: nats per digit; from the upper and the lower bound of log Z, each with its error at level 0.95.")
    draw_picture(args.out / "mnist.png", rows, chains, scores, result)
    print(f"Wrote mnist.png to {args.out}.")
    return found


def figures(scores: dict[str, np.ndarray], alone: list[np.ndarray], bounds: ebm.LogPartitionBounds) -> dict[str, float]:
    """Return mean log-likelihoods, and how well the two log densities tell digits from permuted ones (1 is best)."""
    least, most = map(float, bounds.interval)
    is_digit = np.repeat([1, 0], [len(each) for each in scores.values()])
    mean = scores["digits"].mean()
    return {
        "lower": float(mean - most),
        "upper": float(mean - least),
        "pixels": float(alone[0].mean()),
        "auroc": roc_auc_score(is_digit, np.concatenate(list(scores.values()))),
        "auroc_pixels": roc_auc_score(is_digit, np.concatenate(alone)),
    }


if __name__ == "__main__":
    main()
