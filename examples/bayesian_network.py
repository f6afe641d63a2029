"""Which symptoms go together: the posterior of a network with edges that are in or out, exact and by pseudolikelihood.

A Boltzmann machine of binary symptoms of attention deficit in 355 children. The prior of each coupling is a mixture of a
spike, Normal(0, 0.1), and a slab, Cauchy(0, 2.5), each with weight one half, so that the posterior says of each pair of
symptoms how probable an edge is (``numpyro_ebm.bayes.inclusion_probabilities``). The odds exp(bias) have
beta-prime(1/2, 1/2) priors.

Three ways to draw from the posterior:

* exact: NUTS on the likelihood, with log Z as the sum over all states (up to 10 items);
* exchange: `ExchangeKernel`, which needs no log Z: the only one of the right posterior for more items;
* pseudolikelihood: NUTS on the pseudolikelihood, fast, and too narrow: it counts each coupling twice.

The first table has the posterior of each edge, the second the effective draws of the couplings per second (ESS of ArviZ),
with and without compilation and warm-up. The picture shows the edges whose inclusion probability is above one half.

Above 10 items the usual prior is the slab alone, as exchange moves slowly between many spikes and slabs. An edge is then a
coupling more than two standard deviations from 0. For all 18 items (171 latents) four chains of 5000 draws took 14 minutes
on two cores that also did other work. They gave 41 effective draws of the slowest coupling, 108 of the median one, and R-hat
up to 1.10, so the diagnosis asks for more. Of 153 pairs 38 had an edge, and 58 under the pseudolikelihood: its posterior is
too narrow.

    python examples/bayesian_network.py                            the first six items, some minutes
    python examples/bayesian_network.py --items 18 --samples 5000  all items, without spikes: half an hour
"""

import argparse
import itertools
import time
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import xarray
from numpyro.infer import MCMC, NUTS

import numpyro_ebm as ebm
from numpyro_ebm.bayes import inclusion_probabilities

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data" / "adhd_cap.csv"
MOST_EXACT = 10
"""Most items whose states are summed over."""
COLOURS = {True: "#0B3C6F", False: "#D55E00"}  # of positive and negative couplings: dark and lighter in grey


class Fit(NamedTuple):
    """A posterior.

    Attributes:
        mcmc: the run.
        couplings: draws, ``(chains, draws, pairs)``.
        inclusion: inclusion probabilities of the pairs.
        warmup_seconds: time of compilation and warm-up.
        seconds: time of the draws.
    """

    mcmc: MCMC
    couplings: np.ndarray
    inclusion: Any
    warmup_seconds: float
    seconds: float


def load(num_items: int) -> tuple[list[str], np.ndarray]:
    """Return the names of the first items, and one row of zeros and ones for each child."""
    names = DATA.read_text(encoding="utf-8").splitlines()[0].split(",")[1:]
    x = np.genfromtxt(DATA, delimiter=",", skip_header=1, dtype=int)[:, 1:]
    return names[:num_items], x[:, :num_items]


def model(x, has_spikes):
    """Observe the children: a Boltzmann machine, whose couplings are in a spike or a slab."""
    num_rows, num_items = x.shape
    prior = dist.Cauchy(0, 2.5)
    if has_spikes:
        half = dist.Categorical(probs=jnp.array([0.5, 0.5]))
        prior = dist.MixtureGeneral(half, [dist.Normal(0, 0.1), prior])
    couplings = numpyro.sample("couplings", prior.expand([num_items * (num_items - 1) // 2]).to_event(1))
    share = numpyro.sample("share", dist.Beta(0.5, 0.5).expand([num_items]).to_event(1))
    machine = ebm.energies.BoltzmannMachine.from_pairs(couplings, jnp.log(share) - jnp.log1p(-share))
    with numpyro.plate("children", num_rows):
        numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)


class Method(NamedTuple):
    """How a posterior is drawn.

    Attributes:
        kernel: the kernel.
        num_chains: number of chains.
        thinning: transitions for each draw that is kept.
    """

    kernel: Any
    num_chains: int
    thinning: int = 1


def methods(num_items: int, num_steps: int) -> dict[str, Method]:
    """Return the methods by name. A weight of 1 says that the pseudolikelihood is to count as it is."""
    estimated = {
        "exact": ebm.estimate(model, "exact"),
        "pseudolikelihood": ebm.estimate(model, "pseudolikelihood", weight=1.0),
    }
    nuts = {name: Method(NUTS(each, target_accept_prob=0.9), 4) for name, each in estimated.items()}
    if num_items > MOST_EXACT:
        options = {"num_steps": num_steps, "num_bridges": num_steps, "proposal": "crank_nicolson"}
        kernel = ebm.ExchangeKernel(model, "gibbs", **options)
        return {"exchange": Method(kernel, 4), "pseudolikelihood": nuts["pseudolikelihood"]}
    # Differences between twice as many chains as latents lead from spikes to slabs, where steps around one mode do not.
    kernel = ebm.ExchangeKernel(model, exact_sampler="enumeration", proposal="differences")
    population = Method(kernel, num_items * (num_items + 1), thinning=20)
    return {"exact": nuts["exact"], "exchange": population, "pseudolikelihood": nuts["pseudolikelihood"]}


def fit(method: Method, x: np.ndarray, has_spikes: bool, num_samples: int) -> Fit:
    """Draw from a posterior. Under its progress bar, NumPyro compiles one transition in the warm-up and uses it later."""
    kernel, num_chains, thinning = method
    counts: Any = {"num_warmup": thinning * min(500, num_samples), "num_samples": thinning * num_samples}
    mcmc = MCMC(kernel, **counts, thinning=thinning, num_chains=num_chains, chain_method="vectorized")
    seconds = []
    for run in (mcmc.warmup, mcmc.run):
        start = time.perf_counter()
        run(jax.random.key(0), x, has_spikes)
        jax.block_until_ready(mcmc.last_state.z)
        seconds.append(time.perf_counter() - start)
    draws: Any = mcmc.get_samples(group_by_chain=True)
    inclusion = inclusion_probabilities(model, draws, x, has_spikes) if has_spikes else None
    return Fit(mcmc, np.asarray(draws["couplings"]), inclusion, *seconds)


def statistics(couplings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ArviZ's effective sample size (bulk) and R-hat of each coupling."""
    data: Any = xarray.Dataset({"couplings": (("chain", "draw", "pair"), couplings)})
    return np.asarray(arviz.ess(data)["couplings"]), np.asarray(arviz.rhat(data)["couplings"])


def included(fit: Fit) -> np.ndarray:
    """Return which pairs have an edge: more probably than not, or two standard deviations from 0 without spikes."""
    if fit.inclusion is None:
        return np.abs(fit.couplings.mean((0, 1))) > 2 * fit.couplings.std((0, 1))
    return fit.inclusion.probabilities["couplings"] > 0.5


def print_edges(fits: dict[str, Fit], pairs: list[str]) -> None:
    """Print mean, standard deviation and inclusion probability of each edge, by method."""
    print("\nCouplings: posterior mean, standard deviation and inclusion probability")
    print(f"{'pair':>22} " + " ".join(f"{name:>22}" for name in fits))
    first = next(iter(fits.values()))
    for i in np.argsort(-np.abs(first.couplings.mean((0, 1)))):
        cells = []
        for each in fits.values():
            own = each.couplings[..., i]
            inclusion = "" if each.inclusion is None else f"{each.inclusion.probabilities['couplings'][i]:.3f}"
            cells.append(f"{own.mean():8.2f} {own.std():6.2f} {inclusion:>6}")
        print(f"{pairs[i]:>22} " + " ".join(cells))
    for name, each in fits.items():
        print(f"{name}: {included(each).sum()} edges of {len(pairs)}")


def print_speed(fits: dict[str, Fit]) -> None:
    """Print effective draws per second."""
    print("\nEffective draws of the couplings (bulk, by ArviZ)")
    head = "least ESS  median  R-hat  warm-up, s  draws, s  ESS/s of draws  ESS/s in all"
    print(f"{'method':>17} {'draws':>7} {head}")
    for name, each in fits.items():
        ess, rhat = statistics(each.couplings)
        middle, seconds = np.median(ess), each.seconds + each.warmup_seconds
        print(
            f"{name:>17} {each.couplings[..., 0].size:7d} {ess.min():9.0f} {middle:7.0f} {rhat.max():6.3f} "
            f"{each.warmup_seconds:11.1f} {each.seconds:9.1f} {middle / each.seconds:15.2f} {middle / seconds:13.2f}"
        )


def draw_network(axis, fit: Fit, names: list[str], title: str) -> None:
    """Draw symptoms on a circle: an edge is as wide as its mean, and as dark as it is probable."""
    angle = np.pi / 2 - 2 * np.pi * (np.arange(len(names)) + 0.5) / len(names)
    place = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    mean, is_in = fit.couplings.mean((0, 1)), included(fit)
    probability = np.ones(len(mean)) if fit.inclusion is None else fit.inclusion.probabilities["couplings"]
    for k, (i, j) in enumerate(itertools.combinations(range(len(names)), 2)):
        if is_in[k]:
            style = {"color": COLOURS[mean[k] > 0], "linestyle": "-" if mean[k] > 0 else ":"}
            axis.plot(
                *place[[i, j]].T, zorder=1, linewidth=3 * abs(mean[k]) + 0.5, alpha=float(probability[k]) ** 2, **style
            )
    axis.scatter(*place.T, s=350, c="0.85", edgecolors="black", zorder=2)
    for (x, y), name in zip(place, names, strict=True):
        side = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
        axis.text(1.13 * x, 1.15 * y, name, ha=side, va="center", fontsize=9)
    axis.set(xlim=(-1.45, 1.45), ylim=(-1.35, 1.35), aspect="equal")
    axis.set_title(title, fontsize=10, y=0.95)
    axis.axis("off")


def draw(path: Path, fits: dict[str, Fit], names: list[str]) -> None:
    """Draw the network of the right posterior beside that of the pseudoposterior."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes, (next(iter(fits)), "pseudolikelihood"), strict=True):
        draw_network(axis, fits[name], names, f"{name}: {included(fits[name]).sum()} edges")
    what = "inclusion probability above 1/2" if fits["exchange"].inclusion is not None else "two standard deviations from 0"
    figure.supxlabel(
        f"Edges: {what}. Width: mean of the coupling. Darker: more probable. Dotted: negative.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Fit]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=6, choices=range(3, 19), metavar="{3..18}", help="number of items")
    parser.add_argument("--prior", choices=("spikes", "slab"), help="'slab' is usual above 10 items, and 'spikes' below")
    parser.add_argument("--samples", type=int, default=1000, help="draws of each chain")
    parser.add_argument("--steps", type=int, default=20, help="sweeps of the auxiliary chains, above 10 items")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args(argv)
    has_spikes = args.items <= MOST_EXACT if args.prior is None else args.prior == "spikes"
    args.out.mkdir(parents=True, exist_ok=True)

    names, x = load(args.items)
    fits = {}
    for name, method in methods(args.items, args.steps).items():
        print(f"Drawing: {name}", flush=True)
        fits[name] = fit(method, x, has_spikes, args.samples)
    print_edges(fits, [f"{a} - {b}" for a, b in itertools.combinations(names, 2)])
    print_speed(fits)
    for name, each in fits.items():
        print(f"\nDiagnosis of {name}\n{ebm.diagnose(each.mcmc, min_ess=100)}")
    draw(args.out / "bayesian_network.png", fits, names)
    print(f"\nWrote bayesian_network.png to {args.out}.")
    return fits


if __name__ == "__main__":
    main()
