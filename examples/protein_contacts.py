"""Contacts in a protein from its sequences alone: a Potts model of the family PF13354 by pseudolikelihood.

The alignment has 7515 sequences (beta-lactamases) of 202 sites with 21 categories, a gap and 20 amino acids. Sites that
touch in the folded protein change together, so strong couplings of a Potts model predict contacts. The script fits the 9
million couplings by pseudolikelihood, ranks the pairs of sites by their contact scores (the corrected Frobenius norm of the
couplings in the zero-sum gauge, without the gap), and counts how many of the best pairs are closer than 8 Angstrom in the
structure. Beside it stand mutual information, mean-field DCA, and the distance along the chain.

Each sequence counts with weight 1 / (number of sequences that share 80 % of its sites), through NumPyro's `handlers.scale`.
The couplings have a Normal prior, a sample site whose mode the guide AutoDelta finds. A penalty p stands for the loss
``mean of - log pseudolikelihood + p * sum_(i<j) |J_ij|^2``.

    python examples/protein_contacts.py           all sequences: about five minutes on 2 cores, 3 GB
    python examples/protein_contacts.py --quick   500 sequences, 40 sites: seconds, to check that it runs
"""

import argparse
import gzip
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from numpyro.infer import SVI, Trace_ELBO, init_to_feasible
from numpyro.infer.autoguide import AutoDelta
from tqdm import tqdm

import numpyro_ebm as ebm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

FOLDER = Path(__file__).parent / "data"
CATEGORIES = "-ACDEFGHIKLMNPQRSTVWY"  # the gap is category 0
SIZE = len(CATEGORIES)
CONTACT = 8.0  # Angstrom
NEAREST, FAR = 4, 12  # pairs count only if they are further apart along the chain, where touching says something
FRACTIONS = (0.5, 1.0, 2.0)


class Family(NamedTuple):
    """An alignment with the distances of its sites.

    Attributes:
        x: categories ``(rows, L)``.
        weights: of the rows.
        distances: ``(L, L)`` in Angstrom, NaN where unknown.
    """

    x: np.ndarray
    weights: np.ndarray
    distances: np.ndarray

    @property
    def effective(self) -> float:
        """Effective number of rows, the sum of their weights."""
        return float(self.weights.sum())


class Pairs(NamedTuple):
    """Statistics of the weighted rows: frequencies ``(L, q)`` of sites and ``(L, q, L, q)`` of pairs of sites."""

    single: np.ndarray
    double: np.ndarray


def read_alignment(path: Path) -> np.ndarray:
    """Return the categories of a FASTA file of aligned sequences, one row each."""
    with gzip.open(path, "rt", encoding="ascii") as file:
        entries = file.read().split(">")[1:]
    sequences = ["".join(entry.split("\n")[1:]) for entry in entries]
    codes = np.zeros(256, np.int8)
    codes[np.frombuffer(CATEGORIES.encode(), np.uint8)] = np.arange(SIZE)
    return codes[np.array([np.frombuffer(sequence.encode(), np.uint8) for sequence in sequences])]


def read_distances(path: Path, num_sites: int) -> np.ndarray:
    """Return the distances of all pairs of sites."""
    table = np.load(path)
    left, right = table["i"] - 1, table["j"] - 1
    distances = np.full((num_sites, num_sites), np.nan)
    distances[left, right] = distances[right, left] = table["angstrom"]
    return distances


def one_hot(x: np.ndarray) -> np.ndarray:
    """Return indicators ``(rows, L q)``."""
    return np.eye(SIZE, dtype=np.float32)[x].reshape(len(x), -1)


def weights_of(x: np.ndarray, identity: float) -> np.ndarray:
    """Return 1 / (number of rows that agree in at least this share of the sites), a block of rows at a time."""
    indicators = one_hot(x)
    blocks = [indicators[start : start + 1000] @ indicators.T for start in range(0, len(x), 1000)]
    near = [(block > identity * x.shape[1] - 0.5).sum(axis=1) for block in blocks]
    return 1 / np.concatenate(near)


def load(args: argparse.Namespace) -> Family:
    """Load the family, or its first rows and sites."""
    x = read_alignment(args.sequences)
    distances = read_distances(args.distances, x.shape[1])
    x, distances = x[: args.rows, : args.sites], distances[: args.sites, : args.sites]
    return Family(x, weights_of(x, args.identity), distances)


def statistics(x: np.ndarray, weights: np.ndarray) -> Pairs:
    """Return the frequencies of categories, and of pairs of them."""
    indicators, share = one_hot(x), (weights / weights.sum()).astype(np.float32)
    shape = (x.shape[1], SIZE)
    double = (indicators * share[:, None]).T @ indicators
    return Pairs((share @ indicators).reshape(shape), double.reshape(*shape, *shape))


def smoothed(pairs: Pairs, pseudocount: float) -> Pairs:
    """Mix the frequencies with those of uniform, independent sites."""
    single = (1 - pseudocount) * pairs.single + pseudocount / SIZE
    double = (1 - pseudocount) * pairs.double + pseudocount / SIZE**2
    sites = np.arange(len(single))
    double[sites, :, sites] = single[:, :, None] * np.eye(SIZE)
    return Pairs(single, double)


def corrected(scores: np.ndarray) -> np.ndarray:
    """Return scores less the product of the means of their two sites (average product correction)."""
    scores = scores * (1 - np.eye(len(scores)))
    means = scores.sum(axis=1) / (len(scores) - 1)
    return scores - np.outer(means, means) / means.mean()


def mutual_information(pairs: Pairs) -> np.ndarray:
    """Return the corrected mutual information of all pairs of sites."""
    independent = pairs.single[:, :, None, None] * pairs.single
    is_seen = pairs.double > 0
    ratio = np.divide(pairs.double, independent, out=np.ones_like(pairs.double), where=is_seen)
    return corrected(np.einsum("iajb,iajb->ij", pairs.double, np.log(ratio)))


def mean_field(pairs: Pairs) -> np.ndarray:
    """Return the contact scores of mean-field DCA (Morcos et al. 2011): minus the inverse covariance as couplings."""
    pairs = smoothed(pairs, 0.5)
    covariance = pairs.double - pairs.single[:, :, None, None] * pairs.single
    num_sites = len(pairs.single)
    kept = covariance[:, 1:, :, 1:].reshape(num_sites * (SIZE - 1), -1)
    couplings = np.zeros_like(covariance)
    couplings[:, 1:, :, 1:] = -np.linalg.inv(kept).reshape(num_sites, SIZE - 1, num_sites, SIZE - 1)
    sites = np.arange(num_sites)
    couplings[sites, :, sites] = 0.0
    couplings = 0.5 * (couplings + couplings.transpose(2, 3, 0, 1))
    return np.asarray(ebm.energies.Potts(couplings).contact_scores(skipped=(0,)))


def make_model(family: Family, pairs: Pairs, penalty: float, batch_size: int) -> Callable:
    """Return the model of minibatches, with fields that start at those of independent sites."""
    num_sites = family.x.shape[1]
    shape = (num_sites, SIZE, num_sites, SIZE)
    # The energy takes the symmetric part (A + A^T) / 2 of the array A, so a pair i < j has two entries in it.
    prior = dist.Normal(0.0, 1 / np.sqrt(family.effective * penalty)).expand(shape).to_event(4)
    start = np.log(smoothed(pairs, 1 / family.effective).single)
    start = jnp.asarray(start - start.mean(axis=1, keepdims=True))

    def model(x, weights):
        couplings = numpyro.sample("couplings", prior)
        fields = numpyro.param("fields", start)
        energy = ebm.EnergyDistribution(ebm.energies.Potts(couplings, fields))
        with numpyro.plate("rows", len(x), subsample_size=min(batch_size, len(x))) as index:
            with numpyro.handlers.scale(scale=weights[index]):
                numpyro.sample("x", energy, obs=x[index])

    return model


def fit(family: Family, pairs: Pairs, args: argparse.Namespace) -> tuple[ebm.energies.Potts, float]:
    """Return the Potts model at the mode, by Adam on minibatches with a rate that goes down to 0, and the seconds."""
    start = time.time()
    estimated = ebm.estimate(make_model(family, pairs, args.penalty, args.batch), "pseudolikelihood")
    guide = AutoDelta(estimated, init_loc_fn=init_to_feasible)
    optimizer = optax.adam(optax.cosine_decay_schedule(args.rate, args.steps))
    svi = SVI(estimated, guide, optimizer, Trace_ELBO())
    rows = jnp.asarray(family.x, int), jnp.asarray(family.weights, float)
    result = ebm.fit(jax.random.key(args.seed), svi, args.steps, *rows, check_every=min(5, args.steps))
    couplings = guide.median(result.params)["couplings"]
    couplings = 0.5 * (couplings + couplings.transpose(2, 3, 0, 1))
    return ebm.energies.Potts(couplings, result.params["fields"]), time.time() - start


def ranking(scores: np.ndarray, distances: np.ndarray, nearest: int) -> np.ndarray:
    """Return the pairs of sites with a known distance, further apart than ``nearest`` along the chain, best first."""
    left, right = np.triu_indices(len(scores), nearest + 1)
    known = np.isfinite(distances[left, right])
    left, right = left[known], right[known]
    order = np.argsort(-scores[left, right], kind="stable")
    return np.stack([left[order], right[order]], axis=1)


def precision(scores: np.ndarray, distances: np.ndarray, nearest: int = NEAREST) -> list[float]:
    """Return the share of contacts among the best L / 2, L and 2 L pairs."""
    best = ranking(scores, distances, nearest)
    hits = distances[best[:, 0], best[:, 1]] < CONTACT
    return [float(hits[: int(fraction * len(scores))].mean()) for fraction in FRACTIONS]


def print_table(scores: dict[str, np.ndarray], family: Family, seconds: dict[str, float]) -> dict[str, list[float]]:
    """Print the precision of each method, and return it for pairs more than ``NEAREST`` sites apart."""
    num_sites = len(family.distances)
    everything = family.distances[np.triu_indices(num_sites, NEAREST + 1)]
    known = everything[np.isfinite(everything)]
    share = np.mean(known < CONTACT)
    print(f"\nShare of contacts (< {CONTACT:.0f} Angstrom) among the best pairs; among all pairs it is {share:.2f}.")
    print(f"{'':>22}   {f'|i - j| > {NEAREST}':^20}   {f'|i - j| > {FAR}':^20}")
    heads = "".join(f"{name:>7}" for name in ("L / 2", "L", "2 L"))
    print(f"{'method':>22}  {heads}  {heads} {'seconds':>9}")
    table = {}
    for name, each in scores.items():
        table[name] = precision(each, family.distances)
        near, far = (
            "".join(f"{v:7.3f}" for v in values) for values in (table[name], precision(each, family.distances, FAR))
        )
        print(f"{name:>22}  {near}  {far} " + (f"{seconds[name]:9.1f}" if name in seconds else f"{'-':>9}"))
    return table


def draw(path: Path, scores: np.ndarray, distances: np.ndarray) -> None:
    """Draw the contact map: contacts in grey, the best 2 L predictions above the diagonal."""
    figure, axis = plt.subplots(figsize=(7.5, 7), layout="constrained")
    num_sites = len(scores)
    axis.imshow(np.where(distances < CONTACT, 0.25, 0.0), cmap="Greys", vmin=0, vmax=1, origin="lower")
    best = ranking(scores, distances, NEAREST)[: 2 * num_sites]
    is_hit = distances[best[:, 0], best[:, 1]] < CONTACT
    styles = {True: ("o", "#0072B2", "contact"), False: ("x", "#D55E00", "no contact")}
    for hit, (marker, colour, word) in styles.items():
        chosen = best[is_hit == hit]
        axis.scatter(
            *chosen.T, s=14, marker=marker, color=colour, linewidths=1.2, label=f"predicted, {word} ({len(chosen)})"
        )
    axis.set(
        xlabel="site i", ylabel="site j", title=f"The {2 * num_sites} best pairs by pseudolikelihood; grey: the structure"
    )
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def predict(family: Family, args: argparse.Namespace) -> tuple[dict[str, np.ndarray], dict[str, float], ebm.energies.Potts]:
    """Return the scores of each method, seconds, and the fitted Potts model."""
    pairs = statistics(family.x, family.weights)
    sites = np.arange(len(family.distances))
    scores = {"distance along chain": -np.abs(np.subtract.outer(sites, sites)).astype(float)}
    seconds = {}
    for name, method in tqdm({"mutual information": mutual_information, "mean-field DCA": mean_field}.items(), leave=False):
        start = time.time()
        scores[name] = method(pairs)
        seconds[name] = time.time() - start
    potts, seconds["pseudolikelihood"] = fit(family, pairs, args)
    scores["pseudolikelihood"] = np.asarray(potts.contact_scores(skipped=(0,)))
    return scores, seconds, potts


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=Path, default=FOLDER / "PF13354_wo_ref_seqs.fasta.gz", help="aligned, fasta.gz")
    parser.add_argument("--distances", type=Path, default=FOLDER / "PF13354_distances.npz", help="arrays i, j, angstrom")
    parser.add_argument("--rows", type=int, default=None, help="use the first sequences only")
    parser.add_argument("--sites", type=int, default=None, help="use the first sites only")
    parser.add_argument("--identity", type=float, default=0.8, help="share of equal sites that makes neighbours")
    parser.add_argument("--penalty", type=float, default=0.01, help="p of the loss above")
    parser.add_argument("--steps", type=int, default=200, help="updates of Adam")
    parser.add_argument("--batch", type=int, default=500, help="sequences per update")
    parser.add_argument("--rate", type=float, default=0.01, help="learning rate at the start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    parser.add_argument("--quick", action="store_true", help="run for seconds, to check that everything works")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.quick:
        args.rows, args.sites, args.steps, args.batch = 500, 40, 40, 100

    family = load(args)
    rows, sites = family.x.shape
    print(f"{rows} sequences of {sites} sites; {family.effective:.0f} after the weights at {args.identity:.0%} identity.")
    scores, seconds, _ = predict(family, args)
    table = print_table(scores, family, seconds)
    draw(args.out / "protein_contacts.png", scores["pseudolikelihood"], family.distances)
    print(f"Wrote protein_contacts.png to {args.out}.")
    return table


if __name__ == "__main__":
    main()
