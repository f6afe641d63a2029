"""Red wine against white wine as a ratio of densities, and red wine's density by an energy and a flow that compete.

The first part learns log p_red(x) - log p_white(x) of the 11 chemical measurements in two ways. "nce" trains one energy with
the white rows as base and noise (`Empirical`), so that the classifier of red against white is the ratio itself. "tre" trains
one energy per colour, conditioned on the noise level, and bridges each to a Gaussian over a ladder of levels; the difference
of the two at the smallest level is the log ratio. Logistic regression, which is linear, and the ratio of two Gaussian
mixtures serve as baselines. The script prints how well each method classifies held-out wines, and the most telling wines.

The second part trains a normalising flow (flowjax) by maximum likelihood and an energy by "nce" on whitened red wines, then
both against each other by "flow_nce". It prints their held-out log-likelihoods beside those of a Gaussian and a mixture.

    python examples/density_ratio.py            a few minutes
    python examples/density_ratio.py --quick    seconds, to check that it runs
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import optax
from flax import nnx
from flowjax.distributions import StandardNormal
from flowjax.experimental.numpyro import register_params, sample
from flowjax.flows import coupling_flow
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

import numpyro_ebm as ebm

sys.path.insert(0, str(Path(__file__).parent))
import wine  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data"
DIM = 11
BATCH = 256
SIGMAS = ebm.geometric_sigmas(3.0, 0.2, 6)
SHOWN = ("volatile acidity", "residual sugar", "chlorides", "total sulfur dioxide", "density", "alcohol")


class Colour(NamedTuple):
    """Standardised training, validation and test rows of one colour, and the test rows as measured."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    measured: np.ndarray


class Net(nnx.Module):
    """A network with two layers of softplus units. Its initial output is zero."""

    def __init__(self, rngs: nnx.Rngs, num_inputs: int = DIM, width: int = 64):
        self.first = nnx.Linear(num_inputs, width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x):
        """Return the output for one event, of shape (1,)."""
        return self.last(nnx.softplus(self.second(nnx.softplus(self.first(x)))))


RATIO_NET = Net(nnx.Rngs(0))
FLOW = coupling_flow(jax.random.key(0), base_dist=StandardNormal((DIM,)), flow_layers=4, nn_width=32)
LEVEL_NETS = {"red": Net(nnx.Rngs(1), DIM + 1), "white": Net(nnx.Rngs(2), DIM + 1)}


def load(seed: int) -> tuple[Colour, Colour, list[str]]:
    """Load both colours, split 80 / 10 / 10, and standardise the columns with equal weight for each colour."""
    names = (DATA / "winequality-white.csv").read_text().splitlines()[0].replace('"', "").split(";")[:DIM]
    raw = {c: np.genfromtxt(DATA / f"winequality-{c}.csv", delimiter=";", skip_header=1)[:, :DIM] for c in ("red", "white")}
    centre = np.mean([rows.mean(axis=0) for rows in raw.values()], axis=0)
    scale = np.sqrt(np.mean([np.mean((rows - centre) ** 2, axis=0) for rows in raw.values()], axis=0))
    rng = np.random.default_rng(seed)
    colours = []
    for rows in raw.values():
        rows = np.unique(rows, axis=0)  # the same wine must not be in two splits
        rows = rng.permutation(rows)
        standard, tenth = ((rows - centre) / scale).astype(np.float32), len(rows) // 10
        colours.append(Colour(standard[2 * tenth :], standard[tenth : 2 * tenth], standard[:tenth], rows[:tenth]))
    return colours[0], colours[1], names


def run(estimated, num_steps, seed, *args, held_out):
    """Train by `fit` with AdamW and a decaying learning rate, and stop early by the held-out rows."""
    svi = SVI(
        estimated, ebm.empty_guide, optax.adamw(optax.cosine_decay_schedule(1e-3, num_steps), weight_decay=0.3), Trace_ELBO()
    )
    return ebm.fit(jax.random.key(seed), svi, num_steps, *args, held_out=held_out, patience=10)


def rows_of(name, energy, x):
    """Declare a site that observes the rows in batches."""
    with numpyro.plate(f"{name} rows", len(x), subsample_size=min(BATCH, len(x))):
        numpyro.sample(name, energy, obs=numpyro.subsample(x, event_dim=1))


def ratio_by_nce(red: Colour, white: Colour, args: argparse.Namespace):
    """Train by "nce". Return the log ratio as a function of rows, and the training report."""

    def model(x, others):
        ratio = ebm.EnergyDistribution(nnx_module("net", RATIO_NET), (DIM,), base=ebm.Empirical(others))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ratio, obs=x)

    estimated = ebm.estimate(model, "nce", nu=4)
    result = run(estimated, args.steps, args.seed, red.train, white.train, held_out=(red.valid, white.valid))
    report = ebm.training_report(estimated, result, red.test, white.test)
    net = nnx.merge(nnx.graphdef(RATIO_NET), result.params["net$params"])
    constant = result.params["x$log_normalizer"]
    return jax.jit(lambda x: -jax.vmap(net)(x)[:, 0] - constant), report


def level_energy(net):
    """Return the energy of a Gaussian of variance 1 + sigma^2 plus a network's correction."""

    def energy(x, sigma):
        scale = jnp.sqrt(1 + sigma**2)
        return 0.5 * jnp.sum((x / scale) ** 2) + net(jnp.append(x / scale, jnp.log(sigma)))[0]

    return energy


def ratio_by_tre(red: Colour, white: Colour, args: argparse.Namespace):
    """Train by "tre". Return the log ratio at the smallest noise level as a function of rows."""
    smallest = jnp.min(SIGMAS)

    def model(red, white):
        for name, x in (("red", red), ("white", white)):
            energy = level_energy(nnx_module(f"{name} net", LEVEL_NETS[name]))
            rows_of(name, ebm.EnergyDistribution(energy, (DIM,), context=smallest), x)

    estimated = ebm.estimate(model, "tre", sigmas=SIGMAS)
    result = run(estimated, args.steps, args.seed, red.train, white.train, held_out=(red.valid, white.valid))

    def log_density(name, x):
        net = nnx.merge(nnx.graphdef(LEVEL_NETS[name]), result.params[f"{name} net$params"])
        return -jax.vmap(level_energy(net), (0, None))(x, smallest) - result.params[f"{name}$log_normalizer"][0]

    return jax.jit(lambda x: log_density("red", x) - log_density("white", x))


def ratio_baselines(red: Colour, white: Colour, seed: int) -> dict:
    """Return the log ratios of two mixtures and of a linear classifier, the latter without its prior odds."""
    red_mixture, white_mixture = (
        max(
            (GaussianMixture(k, random_state=seed, reg_covar=1e-3).fit(colour.train) for k in (2, 4, 8, 12)),
            key=lambda m: m.score(colour.valid),
        )
        for colour in (red, white)
    )
    x = np.concatenate([red.train, white.train])
    linear = LogisticRegression(C=10.0, max_iter=1000).fit(x, np.arange(len(x)) < len(red.train))
    odds = np.log(len(red.train) / len(white.train))
    return {
        "logistic regression": lambda x: linear.decision_function(x) - odds,
        "two mixtures": lambda x: red_mixture.score_samples(x) - white_mixture.score_samples(x),
    }


def judge(name: str, ratio, red: Colour, white: Colour) -> dict:
    """Measure how well a log ratio classifies held-out wines, with both colours equally frequent."""
    at_red, at_white = np.asarray(ratio(red.test), float), np.asarray(ratio(white.test), float)
    losses = np.logaddexp(0, -at_red), np.logaddexp(0, at_white)
    labels = np.repeat([1, 0], [len(at_red), len(at_white)])
    return {
        "method": name,
        "log_loss": np.mean([loss.mean() for loss in losses]),
        "log_loss_se": 0.5 * np.sqrt(sum(loss.var() / len(loss) for loss in losses)),
        "errors": np.mean([(at_red < 0).mean(), (at_white > 0).mean()]),
        "auc": roc_auc_score(labels, np.concatenate([at_red, at_white])),
        "mean_red": at_red.mean(),
        "mean_white": at_white.mean(),
        "at_red": at_red,
        "at_white": at_white,
    }


def print_ratios(rows: list[dict]) -> None:
    print("\nLog ratio of red's density over white's, on held-out wines (both colours equally frequent):")
    print(f"{'method':>20} {'log loss':>9} {'se':>6} {'errors':>7} {'AUC':>7} {'mean, red':>10} {'mean, white':>12}")
    for row in rows:
        print(
            f"{row['method']:>20} {row['log_loss']:9.4f} {row['log_loss_se']:6.4f} {row['errors']:7.2%} {row['auc']:7.4f}"
            f" {row['mean_red']:10.2f} {row['mean_white']:12.2f}"
        )
    print("mean, red: an estimate of KL(red || white); mean, white: of minus KL(white || red).")


def print_telling(row: dict, red: Colour, white: Colour, names: list[str]) -> None:
    """Print the wines classified most confidently, and those that look most like the other colour."""
    columns = [names.index(name) for name in SHOWN]
    print(f"\nThe most telling held-out wines by {row['method']}:")
    print(f"{'':>26} {'log ratio':>9} " + " ".join(f"{name:>20}" for name in SHOWN))
    groups = [
        ("red, surely", np.argsort(-row["at_red"])[:3], row["at_red"], red.measured),
        ("red, looks white", np.argsort(row["at_red"])[:3], row["at_red"], red.measured),
        ("white, looks red", np.argsort(-row["at_white"])[:3], row["at_white"], white.measured),
        ("white, surely", np.argsort(row["at_white"])[:3], row["at_white"], white.measured),
    ]
    for label, chosen, values, measured in groups:
        for i in chosen:
            print(f"{label:>26} {values[i]:9.2f} " + " ".join(f"{measured[i, c]:20.4g}" for c in columns))
    for label, measured in (("median red", red.measured), ("median white", white.measured)):
        print(f"{label:>26} {'':>9} " + " ".join(f"{np.median(measured[:, c]):20.4g}" for c in columns))


def noise():
    """Declare the flow as a NumPyro model of one wine."""
    sample("x", register_params("flow", FLOW))


def flow_model(x):
    """Declare the flow as a model of the rows."""
    with numpyro.plate("rows", len(x), subsample_size=min(BATCH, len(x))):
        sample("x", register_params("flow", FLOW), obs=numpyro.subsample(x, event_dim=1))


def flow_log_prob(params: dict, x: np.ndarray) -> np.ndarray:
    """Return the log-likelihood of each row under the flow."""
    with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
        return np.asarray(register_params("flow", FLOW).log_prob(x), float)


def energy_summary(params: dict, x: np.ndarray, args: argparse.Namespace) -> dict:
    """Return the log-likelihood of rows under the energy, and log Z by importance sampling as in `wine.py`."""
    net = {"net$params": params["net$params"]}
    draws = ebm.sample(
        jax.random.key(args.seed + 1),
        wine.model,
        ebm.NUTS(max_num_doublings=6),
        params=net,
        num_warmup=args.warmup,
        num_samples=args.samples,
    )
    log_z = wine.log_partition(net, draws.get_samples()["x"], args.seed, args.proposals)
    likelihood = ebm.log_likelihood(wine.model, net, x, log_partition=log_z)
    return {
        "ll": likelihood.mean,
        "ll_se": likelihood.standard_error,
        "log_z": float(log_z.value),
        "log_z_se": float(log_z.standard_error),
        "ess": float(log_z.ess) / args.proposals,
        "learned": float(params["x$log_normalizer"]),
    }


def train(name, model, rate, validate, splits: wine.Splits, args: argparse.Namespace, params: dict | None = None) -> dict:
    """Train in chunks of steps, and return the parameters with the best validation log-likelihood."""
    svi = SVI(model, ebm.empty_guide, optax.adamw(rate), Trace_ELBO())
    best, state = (-np.inf, 0, {}), None
    bar = tqdm(range(args.chunk, args.flow_steps + 1, args.chunk), desc=name, unit="chunk", leave=False)
    for done in bar:
        result = ebm.fit(
            jax.random.key(args.seed),
            svi,
            args.chunk,
            splits.train,
            init_state=state,
            init_params=params if state is None else None,
            progress_bar=False,
        )
        state, value = result.state, float(validate(result.params))
        bar.set_postfix_str(f"validation log-likelihood {value:.2f}")
        if value > best[0]:
            best = (value, done, result.params)
        if done - best[1] >= args.patience:
            break
    return best[2]


def summaries(flow_by: str, energy_by: str, params: dict, splits: wine.Splits, args: argparse.Namespace) -> list[dict]:
    """Return the mean log-likelihood of the test rows and its standard error, for the flow and the energy."""
    of_flow = flow_log_prob(params, splits.test)
    return [
        {"method": f"flow by {flow_by}", "ll": of_flow.mean(), "ll_se": of_flow.std() / np.sqrt(len(of_flow))},
        {"method": f"energy by {energy_by}"} | energy_summary(params, splits.test, args),
    ]


def densities(args: argparse.Namespace) -> list[dict]:
    """Return log-likelihoods of red wine: a Gaussian, a mixture, and the flow and energy after each kind of training."""
    splits = wine.load(args.seed)
    rows = wine.baselines(splits, args.seed, **({"sizes": (4,)} if args.quick else {}))
    of_flow = lambda params: flow_log_prob(params, splits.valid).mean()  # noqa: E731
    of_energy = lambda params: wine.validate({"net$params": params["net$params"]}, splits)  # noqa: E731
    params = train("flow", flow_model, 1e-3, of_flow, splits, args)
    params |= train("nce", ebm.estimate(wine.model, "nce", nu=10), 1e-3, of_energy, splits, args)
    rows += summaries("likelihood", "nce", params, splits, args)
    against = ebm.estimate(wine.model, "flow_nce", noise=noise, nu=4)
    params = train("flow_nce", against, 2e-4, of_energy, splits, args, params)
    rows += summaries("flow_nce", "flow_nce", params, splits, args)
    return rows


def print_densities(rows: list[dict]) -> None:
    print("\nLog-likelihood of held-out red wines (whitened), nats per row:")
    print(f"{'method':>20} {'log-lik':>8} {'se':>6} {'log Z':>8} {'se':>6} {'IS ESS':>7} {'learned log Z':>14}")
    for row in rows:
        line = f"{row['method']:>20} {row['ll']:8.2f} {row['ll_se']:6.2f}"
        if "ess" in row:
            line += f" {row['log_z']:8.3f} {row['log_z_se']:6.3f} {row['ess']:7.1%} {row['learned']:14.3f}"
        print(line)
    print(
        "log Z: by importance sampling around the model's own draws; IS ESS: effective share of the proposals. If the\n"
        "learned log Z is below it, the model has mass where the noise has few draws, and the classifier does not see it."
    )


def draw_picture(path: Path, rows: list[dict], *, is_quick: bool) -> None:
    """Draw histograms of both colours' log ratios, one panel per method."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), layout="constrained", sharey=True)
    for axis, row in zip(axes.flat, rows, strict=True):
        low, high = np.quantile(np.concatenate([row["at_red"], row["at_white"]]), [0.005, 0.995])
        bins = np.linspace(low, high, 50)
        axis.hist(row["at_white"].clip(low, high), bins, density=True, color="0.75", label="white")
        axis.hist(row["at_red"].clip(low, high), bins, density=True, histtype="step", color="C3", lw=1.8, label="red")
        axis.axvline(0, color="k", lw=0.8, ls="--")
        axis.set(title=f"{row['method']}: errors {row['errors']:.2%}", xlabel="log ratio, red over white")
    axes[0, 0].set_ylabel("density of wines")
    axes[1, 0].set_ylabel("density of wines")
    axes[0, 0].legend(frameon=False)
    if is_quick:
        wine.mark_untrained(figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> tuple[list[dict], list[dict]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="maximum number of training steps of a ratio")
    parser.add_argument("--flow-steps", type=int, default=1600, help="maximum number of training steps of flow and energy")
    parser.add_argument("--chunk", type=int, default=50, help="of these, steps between two checks of the validation rows")
    parser.add_argument("--patience", type=int, default=400, help="of these, steps without improvement before stopping")
    parser.add_argument("--warmup", type=int, default=300, help="NUTS warm-up steps per chain")
    parser.add_argument("--samples", type=int, default=1000, help="NUTS draws per chain")
    parser.add_argument("--proposals", type=int, default=50_000, help="importance samples for log Z")
    parser.add_argument("--seed", type=int, default=2019)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for density_ratio.png")
    parser.add_argument("--quick", action="store_true", help="run for seconds, to check that everything works")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.steps, args.flow_steps, args.chunk = 300, 40, 20
        args.warmup, args.samples, args.proposals = 60, 60, 2000

    red, white, names = load(args.seed)
    print(f"Training rows: {len(red.train)} red, {len(white.train)} white; test: {len(red.test)} and {len(white.test)}.")
    by_nce, report = ratio_by_nce(red, white, args)
    ratios = ratio_baselines(red, white, args.seed) | {"nce": by_nce, "tre": ratio_by_tre(red, white, args)}
    table = [judge(name, ratio, red, white) for name, ratio in ratios.items()]
    print_ratios(table)
    print(report)
    print_telling(table[2], red, white, names)
    rows = densities(args)
    print_densities(rows)
    draw_picture(args.out / "density_ratio.png", table, is_quick=args.quick)
    print(f"Wrote {args.out / 'density_ratio.png'}.")
    return table, rows


if __name__ == "__main__":
    main()
