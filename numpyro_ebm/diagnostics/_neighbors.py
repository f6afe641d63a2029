"""Comparison of two samples by their nearest neighbours."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, Shaped

from numpyro_ebm._core.spreads import or_one, spread

NUM_NEIGHBORS = 5
"""Neighbours per point, as Naeem et al. (2020) use for coverage."""
NUM_PERMUTATIONS = 300
"""Permutations for the standard deviations, which this many give to about 4 %."""


class Neighbors(NamedTuple):
    """Statistics of two samples, each with its mean and standard deviation if both have the same distribution.

    Attributes:
        same: fraction of neighbours that belong to a point's own sample.
        nearest: the same fraction for the single nearest neighbour.
        missed: fraction of data points without a draw among their nearest neighbours.
        alone: fraction of draws without a data point among their nearest neighbours.
    """

    same: "Statistic"
    nearest: "Statistic"
    missed: "Statistic"
    alone: "Statistic"


class Statistic(NamedTuple):
    """A statistic, with its mean and standard deviation under the null hypothesis.

    Attributes:
        value: observed value.
        mean: expected value.
        sd: standard deviation over permutations of the labels.
    """

    value: float
    mean: float
    sd: float

    @property
    def z(self) -> float:
        """Number of standard deviations above the mean."""
        return (self.value - self.mean) / self.sd if self.sd > 0 else 0.0


def neighbors(
    data: Shaped[np.ndarray, "rows d"], draws: Shaped[np.ndarray, "draws d"], num_neighbors: int = NUM_NEIGHBORS
) -> Neighbors:
    r"""Compare two samples by the k nearest neighbours of each point among all others.

    - ``same`` (Schilling; Henze): has mean :math:`\sum_i n_i (n_i - 1) / (N (N - 1))`, and is larger for distributions that
      differ.
    - ``nearest``: the same for k = 1; smaller where points of one sample lie on points of the other.
    - ``missed`` (one minus the coverage of Naeem et al.): no draw is nearer to a data point than its k-th nearest data
      point, so all its k nearest neighbours are data. For equal distributions this has probability
      :math:`\prod_{j=1}^{k} (n - j) / (N - j)`. A mode without draws is missed, wherever it is.
    - ``alone``: the same for draws, which finds draws in places without data.

    The means are exact; the standard deviations come from permutations of the labels with a fixed seed.

    Args:
        data: ``(n, d)``.
        draws: ``(m, d)``, nearly independent.
        num_neighbors: k.

    References:
        Schilling, Multivariate two-sample tests based on nearest neighbors (1986); Henze, A multivariate two-sample test
        based on the number of nearest neighbor type coincidences (1988); Naeem, Oh, Uh, Choi and Yoo, Reliable fidelity and
        diversity metrics for generative models (2020).
    """
    points = np.concatenate([data, draws])
    points = (points - data.mean(axis=0)) / or_one(spread(data))
    squares = np.sum(points**2, axis=1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    np.fill_diagonal(distances, np.inf)
    near = np.argpartition(distances, (0, num_neighbors), axis=1)[:, :num_neighbors]  # the nearest first
    is_data = np.arange(len(points)) < len(data)
    rng = np.random.default_rng(0)
    null = np.array([_fractions(near, rng.permutation(is_data)) for _ in range(NUM_PERMUTATIONS)])
    sizes = len(data), len(draws)
    total = sum(sizes)
    same = sum(n * (n - 1) for n in sizes) / (total * (total - 1))
    alone = [np.prod([(n - j) / (total - j) for j in range(1, num_neighbors + 1)]) for n in sizes]
    means = (same, same, *alone)
    values = _fractions(near, is_data)
    return Neighbors(*(Statistic(float(v), float(m), float(s)) for v, m, s in zip(values, means, spread(null), strict=True)))


def _fractions(near: Int[np.ndarray, "points k"], is_data: Bool[np.ndarray, " points"]) -> tuple[float, float, float, float]:
    agree = is_data[near] == is_data[:, None]
    alone = agree.all(axis=1)
    return float(agree.mean()), float(agree[:, 0].mean()), float(alone[is_data].mean()), float(alone[~is_data].mean())
