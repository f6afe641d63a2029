"""Red wine: declare one energy, train it by seven estimators, sample it with NUTS, diagnose it with ArviZ.

The NumPyro model of the 11 chemical measurements of 1599 red wines (whitened, as in the score matching literature) is a
small neural energy over a Gaussian base. Only the estimator's name changes from run to run. For each estimator the script
prints how well the trained density does on held-out rows, beside a Gaussian and a Gaussian mixture, and whether its chains
mix. It writes an ArviZ file and pictures.

    python examples/wine.py                     the whole table, about six minutes
    python examples/wine.py --quick             seconds, to check that it runs
    python examples/wine.py --methods cd dsm    some estimators only
"""

import argparse
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import arviz
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
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm import plots

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data" / "winequality-red.csv"
DIM = 11
COMPONENTS = [f"PC{i + 1}" for i in range(DIM)]
BATCH = 256
BASE = dist.Normal(0, 1).expand([DIM]).to_event(1)
WIDE = dist.Normal(0, 2).expand([DIM]).to_event(1)  # reaches modes of the model away from the data
MALA = ebm.MALA(step_size=0.05)
ROUGHLY = ebm.AnnealedImportanceSampling(
    num_levels=100, num_chains=512, kernel=ebm.HMC(step_size=0.2, num_integration_steps=3), start=WIDE
)
METHODS = {
    "sm": {},
    "ssm_vr": {"num_projections": 4},
    "dsm": {"sigma": 0.3},
    "nce": {"nu": 10},
    # A fixed number of leapfrog steps may resonate at an adapted step size, so the step size is fixed here.
    "mle": {
        "num_steps": 10,
        "kernel": ebm.HMC(step_size=0.15, num_integration_steps=5),
        "adapt_step_size": False,
        "start": WIDE,
    },
    "cd": {"num_steps": 10, "kernel": MALA},
    "pcd": {"num_steps": 10, "kernel": MALA, "num_chains": 4 * BATCH},
}


class Splits(NamedTuple):
    """Training, validation and test rows."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


class Fit(NamedTuple):
    """A trained model: parameters at the best validation log-likelihood, the curve of that log-likelihood, seconds."""

    params: dict
    curve: list[tuple[int, float]]
    seconds: float


class Energy(nnx.Module):
    """A network with two layers of 100 softplus units."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(DIM, 100, rngs=rngs)
        self.second = nnx.Linear(100, 100, rngs=rngs)
        self.last = nnx.Linear(100, 1, rngs=rngs)

    def __call__(self, x):
        """Return the energy of one wine, of shape (1,)."""
        return self.last(nnx.softplus(self.second(nnx.softplus(self.first(x)))))


NET = Energy(nnx.Rngs(0))


def model(x=None):
    """Observe the rows of a data set in batches, or draw one wine if there are no data."""
    net = nnx_module("net", NET)
    energy = ebm.EnergyDistribution(net, event_shape=(DIM,), base=BASE)
    if x is None:
        numpyro.sample("x", energy)
        return
    with numpyro.plate("rows", len(x), subsample_size=min(BATCH, len(x))):
        numpyro.sample("x", energy, obs=numpyro.subsample(x, event_dim=1))


def load(seed: int) -> Splits:
    """Load the data: dequantise, shuffle, whiten, add a little noise, split 1296 / 144 / 159 (Wenliang et al. 2019)."""
    rng = np.random.default_rng(seed)
    x = np.genfromtxt(DATA, delimiter=";", skip_header=1)[:, :DIM]
    gaps = np.array([np.median(np.diff(np.unique(column))) for column in x.T])
    x = x + rng.uniform(-1, 1, x.shape) * gaps
    x = rng.permutation(x)
    x = x - x.mean(0)
    _, scale, axes = np.linalg.svd(x, full_matrices=False)
    x = x @ axes.T / scale * np.sqrt(len(x)) + 0.05 * rng.normal(size=x.shape)
    x = x.astype(np.float32)
    num_test = len(x) // 10
    num_valid = (len(x) - num_test) // 10
    return Splits(x[: -num_test - num_valid], x[-num_test - num_valid : -num_test], x[-num_test:])


def validate(params, splits: Splits) -> float:
    """Return a rough log-likelihood of the validation rows: exact score matching overfits within a few hundred steps."""
    with warnings.catch_warnings():
        # Ignore warnings of few effective draws: parameters with an unreliable log Z are not the best ones either.
        warnings.simplefilter("ignore", ebm.UnreliableLogPartitionWarning)
        log_z = ebm.log_partition(jax.random.key(1), model, params=params, method=ROUGHLY)
    return ebm.log_likelihood(model, params, splits.valid, log_partition=log_z).mean


def train(name: str, options: dict, splits: Splits, args: argparse.Namespace) -> Fit:
    """Train by SVI, and keep the moving averages of the parameters with the best validation log-likelihood."""
    schedule = optax.cosine_decay_schedule(3e-3, args.steps)
    svi = SVI(ebm.estimate(model, name, **options), ebm.empty_guide, optax.adamw(schedule), Trace_ELBO())
    start = time.time()
    result = ebm.fit(
        jax.random.key(args.seed),
        svi,
        args.steps,
        splits.train,
        held_out=lambda params: -validate(params, splits),
        check_every=args.chunk,
        patience=args.patience // args.chunk,
        ema=args.ema,
    )
    curve = list(zip(result.check_steps, -result.held_out_losses, strict=True))
    return Fit({"net$params": result.params["net$params"]}, curve, time.time() - start)


def log_partition(params, draws: jax.Array, seed: int, num: int) -> ebm.LogPartition:
    """Estimate log Z by importance sampling from a mixture fitted to the model's own draws."""
    method = ebm.ImportanceSampling(num_samples=num, data=draws[:: max(1, len(draws) // 4000)])
    return ebm.log_partition(jax.random.key(seed), model, params=params, method=method)


def report(name: str, fit: Fit, splits: Splits, args: argparse.Namespace) -> dict:
    """Return one row of the table, with the draws that it is computed from."""
    start = time.time()
    draws = ebm.sample(
        jax.random.key(args.seed + 1),
        model,
        ebm.NUTS(max_num_doublings=6),
        params=fit.params,
        num_warmup=args.warmup,
        num_samples=args.samples,
    )
    idata = ebm.to_arviz(
        draws,
        observed_data={"x_test": splits.test},
        dims={"x": ["component"], "x_test": ["row", "component"]},
        coords={"component": COMPONENTS},
    )
    flat = draws.get_samples()["x"]
    log_z = log_partition(fit.params, flat, args.seed, args.proposals)
    likelihood = ebm.log_likelihood(model, fit.params, splits.test, log_partition=log_z)
    return {
        "method": name,
        "sm_loss": ebm.sm_loss((model, fit.params), splits.test).mean,
        "likelihood": likelihood,
        "ll": likelihood.mean,
        "ll_se": likelihood.standard_error,
        "log_z_se": float(log_z.standard_error),
        "is_ess": float(log_z.ess) / args.proposals,
        "rhat": float(arviz.rhat(idata)["x"].max()),
        "ess": float(arviz.ess(idata)["x"].min()),
        "gap": ebm.log_likelihood(model, fit.params, flat, log_partition=log_z).mean - likelihood.mean,
        "train": fit.seconds,
        "evaluate": time.time() - start,
        "idata": idata,
        "draws": np.asarray(draws.samples["x"]),
    }


def baselines(splits: Splits, seed: int, sizes=(2, 4, 6, 8, 12, 16)) -> list[dict]:
    """Evaluate a Gaussian, and a mixture whose number of components the validation rows choose."""
    mixtures = [GaussianMixture(k, random_state=seed, reg_covar=1e-3).fit(splits.train) for k in sizes]
    chosen = max(mixtures, key=lambda m: m.score(splits.valid))
    rows = []
    for name, m in (("gaussian", GaussianMixture(1).fit(splits.train)), (f"mixture of {chosen.n_components}", chosen)):
        components = dist.MultivariateNormal(jnp.asarray(m.means_), precision_matrix=jnp.asarray(m.precisions_))
        density = dist.MixtureSameFamily(dist.Categorical(jnp.asarray(m.weights_)), components)
        evaluation = ebm.evaluate(jax.random.key(0), {name: density}, splits.test, measures=("log_likelihood", "sm"))
        figures = evaluation.results[name]
        likelihood = figures["log_likelihood"]
        rows.append(
            {
                "method": name,
                "sm_loss": figures["sm"].mean,
                "likelihood": likelihood,
                "ll": likelihood.mean,
                "ll_se": likelihood.standard_error,
            }
        )
    return rows


def compare(rows: list[dict]) -> None:
    """Add to each row of the table the method's gain over the mixture, paired by data row."""
    mixture = next(row for row in rows if row["method"].startswith("mixture"))
    for row in rows:
        row["gain"] = None if row is mixture else row["likelihood"].difference(mixture["likelihood"])


def print_table(rows: list[dict]) -> None:
    print("\nHeld-out rows (test), nats per row; SM loss: lower is better; log-likelihood: higher is better.")
    print(
        f"{'method':>14} {'SM loss':>8} {'log-lik':>8} {'se':>6} {'gain':>6} {'se':>5} {'se logZ':>8} {'IS ESS':>7} "
        f"{'R-hat':>6} {'ESS':>6} {'E gap':>7} {'train s':>8} {'eval s':>7}"
    )
    for row in rows:
        gain = row["gain"]
        line = f"{row['method']:>14} {row['sm_loss']:8.2f} {row['ll']:8.2f} {row['ll_se']:6.2f}"
        line += f" {'-':>6} {'-':>5}" if gain is None else f" {gain.mean:+6.2f} {gain.standard_error:5.2f}"
        if "rhat" in row:
            line += (
                f" {row['log_z_se']:8.3f} {row['is_ess']:7.1%} {row['rhat']:6.3f} {row['ess']:6.0f} {row['gap']:7.2f}"
                f" {row['train']:8.1f} {row['evaluate']:7.1f}"
            )
        print(line)
    print(
        "se: standard error over test rows and of log Z; gain: nats per row over the mixture, paired by row, which makes\n"
        "its se smaller; se logZ: of log Z alone; IS ESS: effective share of the proposals for log Z; R-hat (largest) and\n"
        "ESS (smallest): over the 11 coordinates of 4 NUTS chains; E gap: mean energy of the test rows minus that of the\n"
        "draws (0 for a perfect model)."
    )


def mark_untrained(figure) -> None:
    """Mark a picture of a ``--quick`` run as showing an untrained model."""
    figure.text(0.5, 0.5, "untrained (--quick)", ha="center", va="center", rotation=20, fontsize=36, alpha=0.35)


def draw_pictures(folder: Path, fits: dict[str, Fit], best: dict, splits: Splits, *, is_quick: bool) -> None:
    """Draw training curves, marginals of data against draws, and ranks of the chains."""
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.1, 1.6])
    axis = top.subplots()
    for (name, fit), style in zip(fits.items(), ["-", "--", "-.", ":", "-", "--", "-."], strict=False):
        steps, values = np.array(fit.curve).T
        axis.plot(steps, values, style, label=name)
    values = np.array([value for fit in fits.values() for _, value in fit.curve])
    # Show the best part of every curve; cut the first steps from an untrained network, which are far below.
    lowest = min(np.quantile([value for _, value in fit.curve], 0.2) for fit in fits.values())
    axis.set(xlabel="training step", ylabel="nats per row", ylim=(lowest - 0.5, values.max() + 0.5))
    axis.set_title("Log-likelihood of the validation rows during training (higher is better)")
    axis.legend(ncols=7, loc="lower right", fontsize=8)
    *axes, last = bottom.subplots(2, 6).flat
    last.remove()
    plots.plot_marginals(np.concatenate(splits), best["draws"], axes, names=COMPONENTS)
    bottom.suptitle(f"Marginals of the whitened data and of the draws ({best['method']})", fontsize=11)
    ranks = plots.plot_rank(best["idata"], coords={"component": COMPONENTS[:4]})[0].figure
    if is_quick:
        mark_untrained(figure)
        mark_untrained(ranks)
    figure.savefig(folder / "wine.png", dpi=110)
    ranks.savefig(folder / "wine_ranks.png", dpi=80)
    plt.close("all")


def check_netcdf() -> None:
    """Exit before the training if a package needed to write netCDF is missing."""
    if any(find_spec(name) is None for name in ("h5netcdf", "h5py")):
        raise SystemExit("This script writes netCDF with h5netcdf and h5py. Run pip install 'h5netcdf[h5py]' first.")


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=2400, help="maximum number of training steps")
    parser.add_argument("--chunk", type=int, default=100, help="steps between two checks of the validation rows")
    parser.add_argument("--patience", type=int, default=600, help="steps without improvement before stopping")
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the moving average of the parameters")
    parser.add_argument("--warmup", type=int, default=300, help="NUTS warm-up steps per chain")
    parser.add_argument("--samples", type=int, default=1000, help="NUTS draws per chain")
    parser.add_argument("--proposals", type=int, default=50_000, help="importance samples for log Z")
    parser.add_argument("--seed", type=int, default=2019)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for wine.nc and the pictures")
    parser.add_argument("--quick", action="store_true", help="run for seconds, to check that everything works")
    args = parser.parse_args(argv)
    check_netcdf()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.steps, args.chunk, args.warmup, args.samples, args.proposals = 40, 20, 60, 60, 2000

    splits = load(args.seed)
    print(f"Red wine: {len(splits.train)} training, {len(splits.valid)} validation, {len(splits.test)} test rows of {DIM}.")
    fits = {name: train(name, METHODS[name], splits, args) for name in args.methods}
    rows = [report(name, fit, splits, args) for name, fit in tqdm(fits.items(), desc="sample", leave=False)]
    table = baselines(splits, args.seed, **({"sizes": (4,)} if args.quick else {})) + rows
    compare(table)
    print_table(table)

    best = max(rows, key=lambda row: row["ll"])
    best["idata"].to_netcdf(args.out / "wine.nc")
    draw_pictures(args.out, fits, best, splits, is_quick=args.quick)
    print(f"Wrote wine.nc (draws of {best['method']}), wine.png and wine_ranks.png to {args.out}.")
    return rows


if __name__ == "__main__":
    main()
