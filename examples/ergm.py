"""Marriages among 16 families of Renaissance Florence: random graph models, their posteriors, and how well they fit.

An exponential-family random graph model (ERGM) weighs networks by their statistics, E(y) = -sum_k theta_k s_k(y), and its
log Z is a sum over 2^120 networks. Three models are compared:

* stars: the numbers of marriages and of pairs of marriages of one family (``kstar(2)``);
* wealth: the number of marriages, and the wealth of both families summed over the marriages (``nodecov``). The marriages
  are independent, and log Z is known: the posterior is also found by NUTS on the exact likelihood, to compare with;
* partners: the same with families that have a marriage partner in common (``gwesp``).

The exchange algorithm (`ExchangeKernel`) draws from each posterior. The table shows its mean and standard deviation beside
the maximum pseudolikelihood. The picture shows the goodness of fit: networks that follow the posterior, against the observed
one, by the degrees, the partners that married families share, and the distances between families.

    python examples/ergm.py                  all three models, some minutes
    python examples/ergm.py --models wealth  one model
    python examples/ergm.py --quick          short chains, to check that it runs
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.distributions import constraints
from numpyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, init_to_feasible
from numpyro.infer.autoguide import AutoDelta
from scipy.sparse.csgraph import shortest_path
from tqdm import tqdm

import numpyro_ebm as ebm
from numpyro_ebm.energies import ERGM, GWESP, Dyads, Edges, KStars, NodeCovariate

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data"
FAMILIES = np.genfromtxt(DATA / "flomarriage.csv", delimiter=",", dtype=int)
WEALTH = np.genfromtxt(DATA / "flomarriage_wealth.csv")  # thousands of lire
DYADS = Dyads(len(FAMILIES))
MODELS = {
    "stars": {"edges": Edges(), "2-stars": KStars(2)},
    "wealth": {"edges": Edges(), "wealth": NodeCovariate(WEALTH)},
    "partners": {"edges": Edges(), "wealth": NodeCovariate(WEALTH), "gwesp(0.5)": GWESP(0.5)},
}
NUM_CHAINS = 16


class Fit(NamedTuple):
    """A fitted model.

    Attributes:
        draws: the posterior by exchange, ``(chains, draws, statistics)``.
        exact: the posterior by NUTS on the exact likelihood, in the same form; None where log Z is not known.
        pseudo: the maximum pseudolikelihood, ``(statistics,)``.
        networks: adjacency matrices that follow the posterior, ``(networks, families, families)``.
    """

    draws: np.ndarray
    exact: np.ndarray | None
    pseudo: np.ndarray
    networks: np.ndarray


def model(statistics, prior, y=None, num_sweeps=200):
    """Observe one network, or draw one by Gibbs sampling."""
    theta = numpyro.sample("theta", prior.expand([len(statistics)]).to_event(1))
    sampler = ebm.ChainSampler("gibbs", num_warmup=0, num_steps=num_sweeps)
    numpyro.sample("y", ebm.EnergyDistribution(ERGM(DYADS, statistics, theta), sampler=sampler), obs=y)


def maximum_pseudolikelihood(statistics: list, y: jax.Array) -> np.ndarray:
    """Find the maximum of the pseudolikelihood, without a prior and in double precision.

    Each step is a run of BFGS, which starts again without a metric where the search along a line has ended before.
    """
    flat = dist.ImproperUniform(constraints.real, (), ())
    estimated = ebm.estimate(model, "pseudolikelihood")
    guide = AutoDelta(estimated, init_loc_fn=init_to_feasible)
    svi = SVI(estimated, guide, numpyro.optim.Minimize(), Trace_ELBO())
    with jax.enable_x64(True):
        params = svi.run(jax.random.key(0), 20, statistics, flat, y, progress_bar=False).params
        return np.asarray(guide.median(params)["theta"])


def posterior(kernel: Any, statistics: list, prior: dist.Distribution, y: jax.Array, args: argparse.Namespace) -> np.ndarray:
    """Draw from the posterior."""
    counts = {"num_warmup": args.warmup, "num_samples": args.samples, "num_chains": NUM_CHAINS}
    mcmc = MCMC(kernel, **counts, chain_method="vectorized", progress_bar=not args.no_bar)
    mcmc.run(jax.random.key(1), statistics, prior, y)
    return np.asarray(mcmc.get_samples(group_by_chain=True)["theta"])


def fit(statistics: list, y: jax.Array, args: argparse.Namespace) -> Fit:
    """Fit one model, and draw networks that follow its posterior."""
    prior, known = dist.Normal(0.0, args.prior_sd), ERGM(DYADS, statistics, np.zeros(len(statistics)))
    inner = "gibbs" if known.blocks is None else "block_gibbs"
    draws = posterior(ebm.ExchangeKernel(model, inner, num_steps=args.steps), statistics, prior, y, args)
    exact = None
    if known.num_terms is not None:
        exact = posterior(NUTS(ebm.estimate(model, "exact")), statistics, prior, y, args)
    some = draws.reshape(-1, len(statistics))[:: max(1, draws[..., 0].size // args.networks)][: args.networks]
    drawn = Predictive(model, {"theta": some})(jax.random.key(2), statistics, prior)["y"]
    return Fit(draws, exact, maximum_pseudolikelihood(statistics, y), np.asarray(DYADS.to_adjacency(drawn)))


def print_fit(name: str, fitted: Fit) -> None:
    """Print the posterior beside the maximum pseudolikelihood."""
    print(f"\nModel '{name}': posterior by exchange, and maximum pseudolikelihood")
    ess, rhat = (function(fitted.draws) for function in (effective_sample_size, split_gelman_rubin))
    head = f"{'statistic':>12} {'mean':>9} {'sd':>8} {'ess':>6} {'r_hat':>6} {'pseudolik.':>11}"
    print(head if fitted.exact is None else f"{head} {'exact mean':>11} {'exact sd':>9}")
    for k, statistic in enumerate(MODELS[name]):
        own = fitted.draws[..., k]
        line = f"{statistic:>12} {own.mean():9.4f} {own.std():8.4f} {ess[k]:6.0f} {rhat[k]:6.3f} {fitted.pseudo[k]:11.4f}"
        exact = None if fitted.exact is None else fitted.exact[..., k]
        print(line if exact is None else f"{line} {exact.mean():11.4f} {exact.std():9.4f}")


def degrees(y: np.ndarray) -> np.ndarray:
    """Return the share of families with each number of marriages."""
    return np.bincount(y.sum(1), minlength=len(y))[: len(y)] / len(y)


def shared_partners(y: np.ndarray) -> np.ndarray:
    """Return the share of marriages whose two families have each number of partners in common."""
    shared = (y @ y)[np.triu(y) == 1]
    return np.bincount(shared, minlength=len(y))[: len(y)] / max(1, len(shared))


def distances(y: np.ndarray) -> np.ndarray:
    """Return the share of pairs of families at each distance; the last entry is for those without a path."""
    steps = shortest_path(y, unweighted=True)[np.triu_indices(len(y), 1)]
    return np.bincount(np.where(np.isinf(steps), len(y), steps).astype(int), minlength=len(y) + 1) / len(steps)


MEASURES = {  # name, function, how many of its entries are drawn, and the first of them
    "marriages of a family": (degrees, range(10)),
    "partners that married families share": (shared_partners, range(6)),
    "distance between families": (distances, (*range(1, 10), len(FAMILIES))),
}


def draw_measure(axis, networks: np.ndarray, measure, entries) -> None:
    """Draw a measure of many networks as boxes, and that of the observed one as a line."""
    drawn, observed = np.array([measure(y) for y in networks])[:, entries], measure(FAMILIES)[list(entries)]
    style = {"color": "0.35", "linewidth": 0.9}
    box = axis.boxplot(drawn, positions=range(len(entries)), whis=(5, 95), showfliers=False, widths=0.6, patch_artist=True)
    for part in ("boxes", "whiskers", "caps", "medians"):
        plt.setp(box[part], **style)
    plt.setp(box["boxes"], facecolor="0.88")
    place = np.arange(len(entries))
    is_number = np.array(entries) < len(FAMILIES)  # "none" is no distance, and the line does not lead there
    line = {"color": "#0B3C6F", "markersize": 4, "linewidth": 1.6, "zorder": 3}
    for part in (is_number, ~is_number):
        axis.plot(place[part], observed[part], "o-", **line)
    labels = ["none" if entry == len(FAMILIES) else str(entry) for entry in entries]
    axis.set_xticks(range(len(entries)), labels)


def draw(path: Path, fits: dict[str, Fit]) -> None:
    """Draw the goodness of fit of each model."""
    figure, axes = plt.subplots(len(fits), 3, figsize=(12, 1 + 2.7 * len(fits)), layout="constrained", squeeze=False)
    for row, (name, fitted) in zip(axes, fits.items(), strict=True):
        for axis, (words, (measure, entries)) in zip(row, MEASURES.items(), strict=True):
            draw_measure(axis, fitted.networks, measure, entries)
            axis.set_xlabel(words, fontsize=9)
        row[0].set_ylabel(f"{name}: share", fontsize=10)
    figure.suptitle(
        f"Boxes: {len(fitted.networks)} networks that follow the posterior (quartiles; whiskers 5 to 95 %). Line: observed.",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Fit]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="the models to fit")
    parser.add_argument("--prior-sd", type=float, default=10.0, help="standard deviation of the prior of a coefficient")
    parser.add_argument("--warmup", type=int, default=500, help="transitions of a chain before the draws")
    parser.add_argument("--samples", type=int, default=1000, help="draws of each of the 16 chains")
    parser.add_argument("--steps", type=int, default=30, help="sweeps of the inner chains of the exchange algorithm")
    parser.add_argument("--networks", type=int, default=300, help="number of networks drawn for the goodness of fit")
    parser.add_argument("--no-bar", action="store_true", help="no progress bars")
    parser.add_argument("--quick", action="store_true", help="short chains")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args(argv)
    if args.quick:
        args.warmup, args.samples, args.steps, args.networks, args.no_bar = 50, 100, 10, 20, True
    if args.prior_sd <= 0:
        parser.error("--prior-sd is above 0")
    args.out.mkdir(parents=True, exist_ok=True)

    y = DYADS.from_adjacency(FAMILIES)
    bar = tqdm(args.models, desc="models", leave=False, disable=args.no_bar)
    fits = {name: fit(list(MODELS[name].values()), y, args) for name in bar}
    for name, each in fits.items():
        print_fit(name, each)
    draw(args.out / "ergm.png", fits)
    print(f"\nWrote ergm.png to {args.out}.")
    return fits


if __name__ == "__main__":
    main()
