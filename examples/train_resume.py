"""Train through a crash: batches from a file, moving averages, and a run that goes on where it was killed.

Handwritten digits (those of scikit-learn, 8 x 8 binary pixels) are mapped from a file and read by the batch. A restricted
Boltzmann machine with 12 hidden units, whose log Z is a sum over 2^12 states, is trained by persistent contrastive
divergence. The script starts the training as a process of its own and kills it (SIGKILL) at some moment after the first
checkpoints. Then it goes on from the folder of checkpoints, and trains once more without interruption: both results are the
same, bit for bit. It prints a table and draws the learning curve, filters and chains.

    python examples/train_resume.py                 about two minutes
    python examples/train_resume.py --steps 300     seconds, to check that it runs
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from numpyro.infer import SVI, Trace_ELBO
from sklearn.datasets import load_digits

import numpyro_ebm as ebm
from numpyro_ebm.energies import RBM

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NUM_HIDDEN = 12


def load() -> tuple[np.ndarray, np.ndarray]:
    """Return 1437 digits to train on and 360 held out, as zeros and ones."""
    x = (load_digits().data >= 8).astype(np.int8)
    order = np.random.default_rng(0).permutation(len(x))
    return x[order[:1437]], x[order[1437:]]


def rates() -> np.ndarray:
    """Return how often each pixel is black."""
    return np.clip(load()[0].mean(0), 0.01, 0.99)


def machine(weights, visible, hidden) -> RBM:
    """Return a centred machine: its units count from their mean at the start."""
    return RBM(weights, visible, hidden, rates(), 0.5)


def model(x=None):
    """Declare the digits of a batch as draws of a machine."""
    weights = numpyro.param("weights", lambda key: 0.01 * jax.random.normal(key, (64, NUM_HIDDEN)))
    visible = numpyro.param("visible", jnp.log(rates() / (1 - rates())))
    hidden = numpyro.param("hidden", jnp.zeros(NUM_HIDDEN))
    with numpyro.plate("rows", 1 if x is None else len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(machine(weights, visible, hidden)), obs=x)


@jax.jit
def loss(params, rows) -> jax.Array:
    """Return minus the mean log-likelihood of rows, in nats, with the exact log Z."""
    energy = machine(params["weights"], params["visible"], params["hidden"])
    return jnp.mean(jax.vmap(energy)(rows)) + energy.log_partition()


def train(args: argparse.Namespace, folder: Path, checkpoint: Path | None, *, tells: bool = False) -> ebm.FitResult:
    """Train from the file of digits; a folder with checkpoints goes on from the last."""
    rows, held_out = np.load(folder / "digits.npy", mmap_mode="r"), load()[1]
    # A step of the mean over rows, as the machines of the literature take it: SVI's loss is the sum.
    schedule = optax.linear_schedule(0.2 / len(rows), 0.0, args.steps)
    estimated = ebm.estimate(model, "pcd", num_steps=1, num_chains=100, kernel="block_gibbs")
    svi = SVI(estimated, ebm.empty_guide, optax.sgd(schedule), Trace_ELBO())
    return ebm.fit(
        jax.random.key(args.seed),
        svi,
        args.steps,
        batches=rows,
        batch_size=100,
        held_out=lambda params: loss(params, held_out),
        check_every=args.check_every,
        ema=args.ema,
        checkpoint=checkpoint,
        callback=(lambda figures: print(int(figures["step"]), flush=True)) if tells else None,
        progress_bar=not tells,
    )


def train_and_kill(args: argparse.Namespace, folder: Path) -> int:
    """Train in a process of its own, kill it a while after its second check, and return the last checkpoint's step."""
    command = [sys.executable, __file__, "--child", str(folder), "--steps", str(args.steps), "--seed", str(args.seed)]
    command += ["--check-every", str(args.check_every), "--ema", str(args.ema)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        for _ in range(2):
            child.stdout.readline()
        time.sleep(np.random.default_rng(args.seed).uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
    steps = [each.name.removeprefix("ebm_step_") for each in (folder / "run").iterdir()]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def same_bits(first: ebm.FitResult, second: ebm.FitResult) -> bool:
    """Return whether parameters, state of the optimiser, chains and losses of two results are equal."""
    trees = [(each.params, each.state.optim_state, each.state.mutable_state, each.losses) for each in (first, second)]
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, trees), strict=True))


def draw_picture(path: Path, result: ebm.FitResult, killed_at: int) -> None:
    """Draw the held-out log-likelihood, the filters and the chains at the end."""
    figure = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.2, 1, 1])
    axis = left.subplots()
    axis.plot(result.check_steps, -result.held_out_losses, color="black", label="held-out digits")
    axis.axvline(killed_at, color="black", ls=":", label=f"killed after step {killed_at}")
    axis.set(xlabel="updates", ylabel="log-likelihood (nats per digit)", ylim=(-26, None))
    axis.legend(loc="lower right")
    pool = result.state.mutable_state["x$pcd"]["state"].pool.position
    for part, title, images in (
        (middle, "filters", np.asarray(result.params["weights"]).T.reshape(-1, 8, 8)),
        (right, "chains at the end", np.asarray(pool)[:12].reshape(-1, 8, 8)),
    ):
        part.suptitle(title)
        for image, axis in zip(images, part.subplots(3, 4).flat, strict=True):
            axis.imshow(image, cmap="gray")
            axis.axis("off")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, ebm.FitResult]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000, help="number of updates")
    parser.add_argument("--check-every", type=int, default=100, help="updates between checks, each with a checkpoint")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the moving average of the parameters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--child", type=Path, help="used by the script itself: train in this folder, to be killed")
    args = parser.parse_args(argv)
    if args.child is not None:
        return {"child": train(args, args.child, args.child / "run", tells=True)}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.save(folder / "digits.npy", load()[0])
        killed_at = train_and_kill(args, folder)
        print(f"The process was killed; its last checkpoint is of step {killed_at}.")
        results = {"went on": train(args, folder, folder / "run"), "uninterrupted": train(args, folder, None)}
    held_out = load()[1]
    print(f"\n{'run':>14} {'updates':>8} {'best step':>10} {'averages':>9} {'last':>9}")
    for name, result in results.items():
        last = result.state.optim_state[1][0]
        figures = f"{-result.held_out_losses.min():9.3f} {-loss(last, held_out):9.3f}"
        print(f"{name:>14} {len(result.losses):8d} {result.best_step:10d} {figures}")
    print("averages, last: log-likelihood of held-out digits, nats, of the best averages and of the last parameters.")
    print(f"The two results are equal, bit for bit: {same_bits(*results.values())}.")
    draw_picture(args.out / "train_resume.png", results["went on"], killed_at)
    print(f"Wrote train_resume.png to {args.out}.")
    return results


if __name__ == "__main__":
    main()
