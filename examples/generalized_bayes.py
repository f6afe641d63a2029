"""Generalised Bayes: posteriors from losses that need no log Z, and how wide they have to be.

Symptoms: a Boltzmann machine of the first six binary symptoms of attention deficit in 355 children. Under the
pseudolikelihood, which counts each coupling twice, the posterior is too narrow. ``numpyro_ebm.calibrate`` finds one weight
of the loss, or maps the draws to the mode and the curvature of the likelihood's own posterior, by data sets drawn from the
model. With 64 states the exact posterior is known, and both are compared with it. Couplings have Cauchy(0, 2.5) priors, and
the odds exp(bias) have beta-prime(1/2, 1/2) priors.

Galaxies: a kernel exponential family with 25 basis functions for the velocities of 82 galaxies, under the kernel Stein
discrepancy. Its posterior is a Gaussian, in closed form (``numpyro_ebm.gaussian_posterior``), under the weight of the loss
that ``calibrate`` finds. A share of the rows is then replaced by draws far from all others. A weight (1 + x^2)^(-1/2) of the
rows makes the posterior robust. The table shows how far the mean density moves: half the integral of the absolute difference
from that without contamination.

    python examples/generalized_bayes.py                  a few minutes
    python examples/generalized_bayes.py --samples 500    fewer draws by NUTS
    python examples/generalized_bayes.py --only galaxies  seconds
"""

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS
from tqdm import tqdm

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data"
NUM_ITEMS, NUM_BASIS = 6, 25
FITS = {"pseudolikelihood": "#D55E00", "one weight": "#E69F00", "calibrated": "#0B3C6F", "exact": "0.55"}
KERNELS = {"plain": None, "robust": lambda x: (1 + x**2) ** -0.5}
COLOURS = {"plain": "#D55E00", "robust": "#0B3C6F"}
GRID = np.linspace(-9, 9, 901)
K = np.arange(NUM_BASIS)
NORMS = np.array([math.factorial(k) for k in K], float) ** -0.5


class Fit(NamedTuple):
    """A posterior of the galaxies' density.

    Attributes:
        weight: the calibrated weight of the loss.
        mean: the density at the mean of the parameters, on the grid.
        draws: densities at draws of the parameters.
    """

    weight: float
    mean: np.ndarray
    draws: np.ndarray


def symptoms(x):
    """Observe the children: a Boltzmann machine of six symptoms."""
    couplings = numpyro.sample("couplings", dist.Cauchy(0, 2.5).expand([NUM_ITEMS * (NUM_ITEMS - 1) // 2]).to_event(1))
    share = numpyro.sample("share", dist.Beta(0.5, 0.5).expand([NUM_ITEMS]).to_event(1))
    machine = ebm.energies.BoltzmannMachine.from_pairs(couplings, jnp.log(share) - jnp.log1p(-share))
    with numpyro.plate("children", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)


def nuts(model, x: np.ndarray, num_samples: int) -> dict[str, Any]:
    """Return draws of a posterior."""
    options = {"num_chains": 2, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(NUTS(model), num_warmup=min(500, num_samples), num_samples=num_samples, **options)
    mcmc.run(jax.random.key(0), x)
    return mcmc.get_samples()


def fit_symptoms(num_samples: int, num_sets: int) -> tuple[list[str], dict[str, np.ndarray], ebm.Calibration]:
    """Return the pairs of symptoms, draws of their couplings by fit, and the calibration."""
    path = DATA / "adhd_cap.csv"
    names = path.read_text(encoding="utf-8").splitlines()[0].split(",")[1 : NUM_ITEMS + 1]
    x = np.genfromtxt(path, delimiter=",", skip_header=1, dtype=int)[:, 1 : NUM_ITEMS + 1]
    pairs = [f"{names[i]} - {names[j]}" for i, j in zip(*np.triu_indices(NUM_ITEMS, 1), strict=True)]
    estimated = ebm.estimate(symptoms, "pseudolikelihood")
    simulated = ebm.bayes.Simulated(exact_sampler="enumeration", num_sets=num_sets)
    found = ebm.calibrate(jax.random.key(1), estimated, x, method=ebm.bayes.Curvature(simulated))
    draws: dict[str, Any] = {}
    # A weight of 1 says that the loss is to count as it is.
    weights = {"pseudolikelihood": 1.0, "one weight": ebm.calibrate(jax.random.key(1), estimated, x).weight}
    for name, weight in tqdm(weights.items(), desc="symptoms", leave=False):
        draws[name] = nuts(ebm.estimate(symptoms, "pseudolikelihood", weight=weight), x, num_samples)
    draws["calibrated"] = found.adjust(draws["pseudolikelihood"])
    draws["exact"] = nuts(ebm.estimate(symptoms, "exact"), x, num_samples)
    return pairs, {name: np.asarray(each["couplings"]) for name, each in draws.items()}, found


def print_symptoms(pairs: list[str], draws: dict[str, np.ndarray], found: ebm.Calibration) -> None:
    """Print means and standard deviations of the couplings, and their ratios to the exact ones."""
    print("\nCouplings of six symptoms: posterior mean (standard deviation)")
    print(f"{'pair':>22} " + " ".join(f"{name:>18}" for name in draws))
    for i, pair in enumerate(pairs):
        cells = (f"{each[:, i].mean():.2f} ({each[:, i].std():.2f})" for each in draws.values())
        print(f"{pair:>22} " + " ".join(f"{cell:>18}" for cell in cells))
    for name in ("pseudolikelihood", "one weight", "calibrated"):
        ratio = draws[name].std(0) / draws["exact"].std(0)
        print(f"{name}: standard deviations {ratio.min():.2f} to {ratio.max():.2f} times the exact ones")
    print(found)


def statistics(x):
    """Return the basis functions at one velocity, standardised."""
    return NORMS * x**K * jnp.exp(-(x**2) / 2)


def galaxies(x):
    """Observe the velocities: an energy that is linear in its parameters, over the base N(0, 3^2)."""
    theta = numpyro.sample("theta", dist.Normal(0, 10 * (K + 1) ** -0.55).to_event(1))
    with numpyro.plate("galaxies", len(x)):
        energy = lambda x: -theta @ statistics(x)  # noqa: E731
        numpyro.sample("x", ebm.EnergyDistribution(energy, base=dist.Normal(0, 3)), obs=x)


def load_galaxies() -> tuple[np.ndarray, float, float]:
    """Return the standardised velocities, their mean and their standard deviation, in 1000 km/s."""
    v = np.genfromtxt(DATA / "galaxy.csv", skip_header=1) / 1000
    return (v - v.mean()) / v.std(ddof=1), v.mean(), v.std(ddof=1)


def contaminated(x: np.ndarray, share: float) -> np.ndarray:
    """Replace a share of the rows by draws around 5."""
    rng = np.random.default_rng(0)
    away = 5 + 0.1 * rng.normal(size=len(x))
    return np.where(rng.random(len(x)) < share, away, x)


def densities(theta: jax.Array) -> np.ndarray:
    """Return the densities on the grid, with log Z by the sum over it."""
    log_p = theta @ jax.vmap(statistics)(jnp.asarray(GRID)).T - GRID**2 / 18
    return np.asarray(jax.nn.softmax(log_p, axis=-1)) / (GRID[1] - GRID[0])


def fit_galaxies(x: np.ndarray, kernel: str, num_draws: int = 400) -> Fit:
    """Return the posterior under the calibrated weight, 1 at most, as in the paper."""
    options = {"bandwidth": 1.0, "statistic": "v", "row_weight": KERNELS[kernel]}
    weight = ebm.calibrate(jax.random.key(2), ebm.estimate(galaxies, "ksd", **options), x).weight
    posterior = ebm.gaussian_posterior(ebm.estimate(galaxies, "ksd", weight=min(1.0, weight), **options), x)
    draws = posterior.sample(jax.random.key(3), (num_draws,))["theta"]
    return Fit(min(1.0, weight), densities(posterior.mean["theta"]), densities(draws))


def moved(one: Fit, other: Fit) -> float:
    """Return half the integral of the absolute difference of the mean densities."""
    return 0.5 * float(np.abs(one.mean - other.mean).sum() * (GRID[1] - GRID[0]))


def print_galaxies(fits: dict[tuple[str, float], Fit], shares: list[float]) -> None:
    """Print by how much contamination moves the density."""
    print("\nGalaxies: weight of the loss, and how far the mean density moves (total variation)")
    print(f"{'contamination':>14} " + " ".join(f"{kernel + ' weight':>14} {kernel + ' moves':>13}" for kernel in KERNELS))
    for share in shares:
        cells = ""
        for kernel in KERNELS:
            fit = fits[kernel, share]
            cells += f" {fit.weight:14.2f} {moved(fit, fits[kernel, shares[0]]):13.3f}"
        print(f"{share:14.0%}{cells}")


def draw_symptoms(axis, pairs: list[str], draws: dict[str, np.ndarray]) -> None:
    """Draw intervals of two standard deviations for each coupling."""
    order = np.argsort(draws["exact"].mean(0))
    for k, (name, each) in enumerate(draws.items()):
        at = np.arange(len(pairs)) + 0.2 * (k - 1.5)
        style = {"fmt": "o", "ms": 3, "color": FITS[name], "elinewidth": 1.6, "label": name}
        axis.errorbar(each.mean(0)[order], at, xerr=2 * each.std(0)[order], **style)
    axis.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axis.set(yticks=range(len(pairs)), xlabel="coupling: mean and two standard deviations")
    axis.set_yticklabels([pairs[i] for i in order], fontsize=8)
    axis.set_title("Six symptoms: the width of the posterior", fontsize=10)
    axis.legend(fontsize=8, loc="lower right")


def draw_galaxies(axes, fits: dict[tuple[str, float], Fit], share: float) -> None:
    """Draw the density without contamination, and what contamination changes."""
    x, center, scale = load_galaxies()
    at = center + scale * GRID
    for kernel, colour in COLOURS.items():
        clean, other = (fits[kernel, which] for which in (0.0, share))
        low, high = np.quantile(clean.draws, [0.1, 0.9], axis=0) / scale
        axes[0].fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        axes[0].plot(at, clean.mean / scale, color=colour, linewidth=1.6, label=kernel)
        axes[1].plot(at, (other.mean - clean.mean) / scale, color=colour, linewidth=1.6, label=kernel)
    axes[0].plot(center + scale * x, np.full(len(x), -0.012), "|", color="0.2", markersize=7)
    axes[0].set(xlim=(0, 50), ylabel="density")
    axes[0].set_title("82 galaxies (ticks): density at the mean, and where 80 % of draws lie", fontsize=10)
    axes[0].legend(fontsize=8, loc="upper right", title="kernel", title_fontsize=8)
    replaced = np.setdiff1d(contaminated(x, share), x)
    axes[1].axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes[1].plot(center + scale * replaced, np.zeros(len(replaced)), "|", color="0.2", markersize=7)
    axes[1].set(xlim=(0, 50), xlabel="velocity, 1000 km/s", ylabel="change of the density")
    axes[1].set_title(f"What {share:.0%} of rows far away (ticks) change", fontsize=10)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000, help="draws of each of two chains by NUTS")
    parser.add_argument("--sets", type=int, default=400, help="data sets drawn for the calibration")
    parser.add_argument("--contamination", type=float, nargs="+", default=[0.1, 0.2], help="shares of replaced galaxies")
    parser.add_argument("--only", choices=("symptoms", "galaxies"), help="one of the two")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args(argv)
    if not all(0 < share < 1 for share in args.contamination):
        parser.error("--contamination takes shares between 0 and 1")
    args.out.mkdir(parents=True, exist_ok=True)
    figure = plt.figure(figsize=(6.5 if args.only else 12.5, 6.5), layout="constrained")
    grid = figure.add_gridspec(2, 1 if args.only else 2)
    result: dict[str, Any] = {}
    if args.only != "galaxies":
        pairs, draws, found = fit_symptoms(args.samples, args.sets)
        print_symptoms(pairs, draws, found)
        draw_symptoms(figure.add_subplot(grid[:, 0]), pairs, draws)
        result["symptoms"] = draws
    if args.only != "symptoms":
        x, shares = load_galaxies()[0], [0.0, *args.contamination]
        with jax.enable_x64(True):  # the basis functions are nearly dependent
            cases = [(kernel, share) for kernel in KERNELS for share in shares]
            bar = tqdm(cases, desc="galaxies", leave=False)
            fits = {case: fit_galaxies(contaminated(x, case[1]), case[0]) for case in bar}
        print_galaxies(fits, shares)
        draw_galaxies([figure.add_subplot(grid[i, -1]) for i in range(2)], fits, shares[-1])
        result["galaxies"] = fits
    figure.savefig(args.out / "generalized_bayes.png", dpi=110)
    plt.close(figure)
    print(f"Wrote generalized_bayes.png to {args.out}.")
    return result


if __name__ == "__main__":
    main()
