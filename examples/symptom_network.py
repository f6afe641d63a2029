"""A network of symptoms: a Boltzmann machine of 18 binary symptoms of attention deficit and hyperactivity in 355 children.

The couplings say which symptoms go together given all the others (a positive coupling) and which exclude each other (a
negative one). The network is fitted twice: by exact maximum likelihood, with log Z as the sum over all 2^18 states, and by
pseudolikelihood, which needs no log Z. With few enough items, the first can judge the second: the table shows the mean
negative log likelihood (NLL) of both fits under their exact log Z, beside that of independent symptoms.

Couplings have a Normal prior, written as a NumPyro sample site, and the guide AutoDelta finds their mode. A penalty p stands
for the loss ``mean NLL + p / 2 * (sum of squared couplings)``, each pair once, so over n rows the prior has the standard
deviation ``1 / sqrt(n p)``. Without a penalty the prior is flat. The biases are free. Standard errors are those of
``numpyro_ebm.standard_errors`` (sandwich). Everything runs in double precision.

    python examples/symptom_network.py                        18 items, a few minutes
    python examples/symptom_network.py --items 6 --penalty 0  the first six items, without a prior: seconds
    python examples/symptom_network.py --no-errors            without standard errors, which take most of the time
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
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, init_to_feasible
from numpyro.infer.autoguide import AutoDelta
from tqdm import tqdm

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

DATA = Path(__file__).parent / "data" / "adhd_cap.csv"
METHODS = ("exact", "pseudolikelihood")
NUM_INATTENTION = 9  # the first items; the others are of hyperactivity and impulsivity
COLOURS = {True: "#0B3C6F", False: "#D55E00"}  # of positive and negative couplings: dark and lighter in grey


class Network(NamedTuple):
    """A fitted network.

    Attributes:
        values: couplings (one per pair) and biases.
        errors: their standard errors in the same form; None if they were not asked for.
        nll: mean negative log likelihood of the rows, under the exact log Z.
        seconds: time of the fit, compilation included.
    """

    values: dict[str, np.ndarray]
    errors: dict[str, np.ndarray] | None
    nll: float
    seconds: float


def load(num_items: int) -> tuple[list[str], np.ndarray]:
    """Return the names of the first items, and one row of zeros and ones for each child."""
    names = DATA.read_text(encoding="utf-8").splitlines()[0].split(",")[1:]
    x = np.genfromtxt(DATA, delimiter=",", skip_header=1, dtype=int)[:, 1:]
    return names[:num_items], x[:, :num_items]


def model(x, prior):
    """Observe the children: a Boltzmann machine with a prior on the coupling of each pair of symptoms."""
    num_rows, num_items = x.shape
    num_pairs = num_items * (num_items - 1) // 2
    couplings = numpyro.sample("couplings", prior.expand([num_pairs]).to_event(1))
    biases = numpyro.param("biases", jnp.zeros(num_items))
    machine = ebm.energies.BoltzmannMachine.from_pairs(couplings, biases)
    with numpyro.plate("children", num_rows):
        numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)


def prior_of(penalty: float, num_rows: int) -> dist.Distribution:
    """Return the prior of one coupling that stands for a penalty on the mean loss."""
    if penalty == 0:
        return dist.ImproperUniform(constraints.real, (), ())
    return dist.Normal(0.0, 1 / np.sqrt(num_rows * penalty))


def exact_nll(values: dict[str, np.ndarray], x: np.ndarray) -> float:
    """Return the mean negative log likelihood, with log Z by the sum over all states."""
    machine = ebm.EnergyDistribution(ebm.energies.BoltzmannMachine.from_pairs(values["couplings"], values["biases"]))
    log_z = ebm.log_partition(None, machine, method="enumerate")
    return -ebm.log_likelihood(machine, None, x, log_partition=log_z).mean


def independent_nll(x: np.ndarray) -> float:
    """Return the mean negative log likelihood of independent symptoms."""
    share = x.mean(axis=0)
    return -np.sum(share * np.log(share) + (1 - share) * np.log1p(-share))


def fit(method: str, x: np.ndarray, penalty: float, *, with_errors: bool) -> Network:
    """Find the mode by BFGS (`numpyro.optim.Minimize`): both losses are convex, and smooth."""
    start = time.time()
    prior = prior_of(penalty, len(x))
    estimated = ebm.estimate(model, method)
    guide = AutoDelta(estimated, init_loc_fn=init_to_feasible)
    svi = SVI(estimated, guide, numpyro.optim.Minimize(), Trace_ELBO())
    state = svi.init(jax.random.key(0), x, prior)
    state, _ = jax.jit(lambda state: svi.update(state, x, prior))(state)
    params = svi.get_params(state)
    values = {"couplings": guide.median(params)["couplings"], "biases": params["biases"]}
    values = {name: np.asarray(value) for name, value in values.items()}
    seconds = time.time() - start
    errors = None
    if with_errors:
        errors = ebm.standard_errors(jax.random.key(1), estimated, values, x, prior).errors
        errors = {name: np.asarray(error) for name, error in errors.items()}
    return Network(values, errors, exact_nll(values, x), seconds)


def print_fits(networks: dict[str, Network], x: np.ndarray) -> None:
    """Print the likelihood of each fit."""
    print(f"\nMean NLL of {len(x)} children, nats (exact log Z over 2^{x.shape[1]} states; lower is better)")
    print(f"{'fit':>18} {'NLL':>9} {'seconds':>8}")
    print(f"{'independent':>18} {independent_nll(x):9.5f} {'-':>8}")
    for name, each in networks.items():
        print(f"{name:>18} {each.nll:9.5f} {each.seconds:8.1f}")


def print_edges(networks: dict[str, Network], names: list[str], num_edges: int) -> None:
    """Print the strongest couplings of the exact fit, beside those by pseudolikelihood."""
    left, right = np.triu_indices(len(names), 1)
    strongest = np.argsort(-np.abs(networks["exact"].values["couplings"]))[:num_edges]
    print("\nThe strongest couplings of the exact fit (positive: the two symptoms go together), with standard errors")
    print(f"{'pair of symptoms':>22} {'exact':>8} {'se':>6} {'pseudolik.':>11} {'se':>6}")
    for pair in strongest:
        line = f"{names[left[pair]] + ' - ' + names[right[pair]]:>22}"
        for name, width in zip(METHODS, (8, 11), strict=True):
            each = networks[name]
            error = "-" if each.errors is None else f"{each.errors['couplings'][pair]:.2f}"
            line += f" {each.values['couplings'][pair]:{width}.2f} {error:>6}"
        print(line)
    print_agreement(networks, len(left))


def print_agreement(networks: dict[str, Network], num_pairs: int) -> None:
    """Print how many couplings are clear of 0 in each fit, and in both."""
    exact, pseudo = (networks[name] for name in METHODS)
    correlation = np.corrcoef(exact.values["couplings"], pseudo.values["couplings"])[0, 1]
    print(f"Correlation of the couplings of the two fits: {correlation:.3f}.")
    if exact.errors is not None and pseudo.errors is not None:
        clear = [is_clear(each) for each in (exact, pseudo)]
        print(
            f"Couplings more than two standard errors from 0, of {num_pairs}: {clear[0].sum()} in the exact fit, "
            f"{clear[1].sum()} by pseudolikelihood, {(clear[0] & clear[1]).sum()} in both."
        )


def is_clear(network: Network) -> np.ndarray:
    """Return which couplings are more than two standard errors from 0, or more than 0.5 where there are no errors."""
    bound = 0.5 if network.errors is None else 2 * network.errors["couplings"]
    return np.abs(network.values["couplings"]) > bound


def draw_network(axis, network: Network, names: list[str], share: np.ndarray, title: str) -> None:
    """Draw symptoms on a circle, joined by the couplings that are clear of 0."""
    angle = np.pi / 2 - 2 * np.pi * (np.arange(len(names)) + 0.5) / len(names)
    place = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    couplings = network.values["couplings"]
    edges = list(zip(*np.triu_indices(len(names), 1), couplings, is_clear(network), strict=True))
    for i, j, coupling, clear in sorted(edges, key=lambda edge: -edge[2]):  # negative ones last, as they are thin
        if clear:
            style = {"color": COLOURS[coupling > 0], "linestyle": "-" if coupling > 0 else ":"}
            axis.plot(*place[[i, j]].T, zorder=1, linewidth=3 * abs(coupling) ** 1.5 + 0.5, **style)
    fill = np.where(np.arange(len(names)) < NUM_INATTENTION, "0.35", "0.85")
    axis.scatter(*place.T, s=80 + 900 * share, c=fill, edgecolors="black", zorder=2)
    for (x, y), name in zip(place, names, strict=True):
        side = "center" if abs(x) < 0.3 else "left" if x > 0 else "right"
        axis.text(1.13 * x, 1.15 * y, name, ha=side, va="center", fontsize=9)
    axis.set(xlim=(-1.45, 1.45), ylim=(-1.35, 1.35), aspect="equal")
    axis.set_title(title, fontsize=10)
    axis.axis("off")


def draw_agreement(axis, networks: dict[str, Network]) -> None:
    """Draw the couplings of the two fits against each other, with their standard errors."""
    exact, pseudo = (networks[name] for name in METHODS)
    errors = [None if each.errors is None else each.errors["couplings"] for each in (pseudo, exact)]
    at = (exact.values["couplings"], pseudo.values["couplings"])
    axis.errorbar(*at, yerr=errors[0], xerr=errors[1], fmt="o", ms=3, color="0.15", ecolor="0.75", elinewidth=0.8)
    axis.axline((0, 0), slope=1, color="0.4", linewidth=0.8, linestyle="--")
    axis.set(xlabel="coupling by exact maximum likelihood", ylabel="coupling by pseudolikelihood")
    axis.set_title(f"The two fits, pair by pair{'' if exact.errors is None else ' (one standard error)'}", fontsize=10)


def draw(path: Path, networks: dict[str, Network], names: list[str], x: np.ndarray) -> None:
    """Draw the exact network, and the agreement of the two fits."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 6), layout="constrained")
    bound = "0.5" if networks["exact"].errors is None else "two standard errors"
    draw_network(axes[0], networks["exact"], names, x.mean(axis=0), f"Couplings above {bound} (exact fit)")
    draw_agreement(axes[1], networks)
    figure.supxlabel(
        "Width: size of the coupling. Solid and dark: go together; dotted: exclude each other. Discs: inattention dark, "
        "hyperactivity light; area: share of children.",
        fontsize=9,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, Network]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=18, choices=range(3, 19), metavar="{3..18}", help="number of items")
    parser.add_argument("--penalty", type=float, default=0.01, help="p of the loss above; 0 for a flat prior")
    parser.add_argument("--edges", type=int, default=15, help="number of couplings in the table")
    parser.add_argument("--no-errors", action="store_true", help="leave out the standard errors")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    args = parser.parse_args(argv)
    if args.penalty < 0:
        parser.error("--penalty is at least 0")
    args.out.mkdir(parents=True, exist_ok=True)

    names, x = load(args.items)
    with jax.enable_x64(True):
        bar = tqdm(METHODS, desc="fit", leave=False)
        networks = {name: fit(name, x, args.penalty, with_errors=not args.no_errors) for name in bar}
    print_fits(networks, x)
    print_edges(networks, names, args.edges)
    draw(args.out / "symptom_network.png", networks, names, x)
    print(f"Wrote symptom_network.png to {args.out}.")
    return networks


if __name__ == "__main__":
    main()
