"""Classifier two-sample test; the only module that imports scikit-learn."""

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import ArrayLike, PRNGKey
from numpyro_ebm.evaluation._autocorrelation import warn_where_dependent
from numpyro_ebm.evaluation._subjects import as_vectors, check_same_events

if TYPE_CHECKING:
    from sklearn.base import BaseEstimator


class C2ST(NamedTuple):
    """Result of `classifier_two_sample_test`.

    Attributes:
        accuracy: fraction of held-out events that are classified correctly, 1/2 for equal distributions.
        standard_error: standard error of the accuracy.
        auc: area under the ROC curve of the held-out events, the probability that a draw scores higher than a row.
        p_value: probability of an accuracy as large if draws and rows had the same distribution.
        num_events: number of draws, and of rows, that took part.
    """

    accuracy: float
    standard_error: float
    auc: float
    p_value: float
    num_events: int


def classifier_two_sample_test(
    rng_key: PRNGKey,
    draws: ArrayLike,
    rows: ArrayLike,
    *,
    classifier: "BaseEstimator | None" = None,
    num_folds: int = 5,
    num_permutations: int = 0,
) -> C2ST:
    r"""Test whether a classifier can separate draws of a model from rows, on events that it was not trained on.

    The test uses as many draws as rows (a random part of the larger set). Each of ``num_folds`` parts is classified by a
    classifier trained on the others. The accuracy is 1/2 for equal distributions, and at most that of the Bayes classifier,
    ``1/2 + TV / 2`` with the total variation distance ``TV`` of the distributions: a weak classifier shows less.

    The classifiers of the ``K`` folds share most of their training events, so the ``2 n`` predictions vary more than a
    binomial distribution says (by a factor 1.4 in standard deviation for a linear classifier, five folds and equal
    distributions, which raised a level of 0.05 to 0.09). Their variance is taken as

    .. math:: \frac{a (1 - a)}{2 n} \Big( 1 + \frac{K}{K - 1} \Big)

    after Nadeau and Bengio, and the p-value is that of a normal distribution with ``a = 1/2``, which is conservative. With
    permutations it is exact for independent draws and rows, and the classifiers are trained again for each permutation.
    Draws of a chain have to be thinned to independent ones.

    Args:
        rng_key: random key of the folds, the permutations and the classifier's ``random_state``.
        draws: draws of the model, ``(m, ...)``.
        rows: held-out rows, ``(n, ...)``, not those of training.
        classifier: scikit-learn classifier (``fit``, ``predict_proba``); None for a neural network with two layers of 64
            units on standardised coordinates, with early stopping.
        num_folds: number of parts, at least 2.
        num_permutations: number of permutations of the labels; 0 for the normal distribution.

    Raises:
        EnergyError: (a ValueError) for fewer events than folds, and for events of different shapes or that are not finite.
        ImportError: without scikit-learn.

    Warns:
        UserWarning: for draws whose order shows that they come from a chain and are worth less than half as many
            independent ones.

    Example:
        ``classifier_two_sample_test(key, draws, x_test).accuracy``

    References:
        Lopez-Paz and Oquab, Revisiting classifier two-sample tests (2017); Nadeau and Bengio, Inference for the
        generalization error (2003); Kim, Ramdas, Singh and Wasserman, Classification accuracy as a proxy for two sample
        testing (2021).
    """
    check_key("classifier_two_sample_test", rng_key)
    check_count("classifier_two_sample_test", "num_folds", num_folds, 2)
    check_count("classifier_two_sample_test", "num_permutations", num_permutations, 0)
    classifier = _default() if classifier is None else classifier
    draws, rows = as_vectors("draws", draws), as_vectors("rows", rows)
    check_same_events(draws, rows)
    warn_where_dependent("classifier_two_sample_test", draws)
    num = min(len(draws), len(rows))
    if num < num_folds:
        raise EnergyError(f"{num} draws and as many rows do not fill {num_folds} folds. Write num_folds={max(2, num)}.")
    rng = np.random.default_rng(np.asarray(jax.random.bits(rng_key, (4,))))
    pooled = np.concatenate([np.asarray(x)[rng.permutation(len(x))[:num]] for x in (draws, rows)])
    labels = np.repeat([1, 0], num)
    accuracy, auc = _held_out(rng, classifier, pooled, labels, num_folds)
    if num_permutations:
        null = [_held_out(rng, classifier, pooled, rng.permutation(labels), num_folds)[0] for _ in range(num_permutations)]
        p_value = (1 + sum(each >= accuracy for each in null)) / (1 + num_permutations)
    else:
        p_value = 0.5 * math.erfc((accuracy - 0.5) / _error(0.5, num, num_folds) / math.sqrt(2))
    return C2ST(accuracy, _error(accuracy, num, num_folds), auc, p_value, num)


def _error(accuracy: float, num: int, num_folds: int) -> float:
    return math.sqrt(accuracy * (1 - accuracy) / (2 * num) * (1 + num_folds / (num_folds - 1)))


def _default() -> "BaseEstimator":
    _sklearn()
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), MLPClassifier((64, 64), early_stopping=True))


def _held_out(
    rng: np.random.Generator,
    classifier: "BaseEstimator",
    x: Float[np.ndarray, "events d"],
    labels: Int[np.ndarray, " events"],
    num_folds: int,
) -> tuple[float, float]:
    """Return accuracy and area under the ROC curve of the predictions for the held-out folds."""
    _sklearn()
    from scipy.stats import rankdata
    from sklearn.base import clone
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.model_selection import StratifiedKFold

    folds = StratifiedKFold(num_folds, shuffle=True, random_state=int(rng.integers(2**31)))
    seed, probability = int(rng.integers(2**31)), np.empty(len(x))
    for train, test in folds.split(x, labels):
        fitted: Any = clone(classifier)
        fitted.set_params(**{name: seed for name in fitted.get_params() if name.split("__")[-1] == "random_state"})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a classifier that has not converged is still valid
            fitted.fit(x[train], labels[train])
        probability[test] = fitted.predict_proba(x[test])[:, 1]
    ranks, num = rankdata(probability), int(labels.sum())
    auc = (ranks[labels == 1].sum() - num * (num + 1) / 2) / (num * (len(x) - num))
    right = np.where(probability == 0.5, 0.5, (probability > 0.5) == labels)
    return float(right.mean()), float(auc)


def _sklearn() -> None:
    try:
        import sklearn  # noqa: F401
    except ImportError as error:
        raise ImportError("classifier_two_sample_test needs scikit-learn: pip install 'numpyro-ebm[evaluation]'.") from error
