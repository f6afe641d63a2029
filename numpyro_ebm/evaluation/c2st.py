"""Classifier two-sample test: the only door to scikit-learn."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import check_key
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import PRNGKey
from numpyro_ebm.evaluation._autocorrelation import warn_where_dependent
from numpyro_ebm.evaluation._subjects import as_vectors, check_same_events


class C2ST(NamedTuple):
    """What `classifier_two_sample_test` returns.

    Attributes:
        accuracy: share of held-out events told right, 1/2 where the laws are equal.
        standard_error: of it.
        auc: area under the ROC curve of the held-out events, the chance that a draw is thought more of a draw than a row is.
        p_value: chance of an accuracy as large if draws and rows had one law.
        num_events: events of each kind that took part.
    """

    accuracy: float
    standard_error: float
    auc: float
    p_value: float
    num_events: int


def classifier_two_sample_test(
    rng_key: PRNGKey,
    draws: Any,
    rows: Any,
    *,
    classifier: Any = None,
    num_folds: int = 5,
    num_permutations: int = 0,
) -> C2ST:
    r"""How well a classifier tells draws of a model from rows, on events that it was not trained on.

    As many draws as rows take part (some of the larger set, at random). Each of ``num_folds`` parts is classified by what
    was trained on the others. Accuracy is 1/2 where the laws are equal, and at most that of the better guess,
    ``1/2 + TV / 2`` with the total variation distance ``TV`` of the laws: a weak classifier shows less.

    The classifiers of the ``K`` folds share most of their events, so that ``2 n`` guesses vary more than a binomial law says
    (by 1.4 in standard deviation for a linear classifier and five folds where the laws are equal, which took a level of 0.05
    to 0.09). Their variance is taken as

    .. math:: \frac{a (1 - a)}{2 n} \Big( 1 + \frac{K}{K - 1} \Big)

    after Nadeau and Bengio, and the p-value is the normal law's with ``a = 1/2``: cautious rather than bold. With
    permutations it is exact for independent draws and rows, the classifiers being trained anew under each. Draws of a chain
    have to be thinned to independent ones.

    Args:
        rng_key: random key: folds, permutations, and the classifier's ``random_state``.
        draws: draws of the model, ``(m, ...)``.
        rows: held-out rows, ``(n, ...)``, not those of training.
        classifier: of scikit-learn (``fit``, ``predict_proba``); None for a neural network with two layers of 64 units on
            standardised coordinates, stopped early.
        num_folds: parts, at least 2.
        num_permutations: permutations of who is a draw; 0 for the normal law.

    Raises:
        EnergyError: (a ValueError) for fewer events than folds, events of different shapes or not finite.
        ImportError: without scikit-learn.

    Warns:
        UserWarning: for draws whose order shows that they are those of a chain, worth less than half of independent ones.

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
        raise EnergyError(f"{num} events of a kind do not fill {num_folds} folds. Write num_folds={max(2, num)}.")
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


def _default() -> Any:
    _sklearn()
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), MLPClassifier((64, 64), early_stopping=True))


def _held_out(
    rng: np.random.Generator, classifier: Any, x: np.ndarray, labels: np.ndarray, num_folds: int
) -> tuple[float, float]:
    """Accuracy and area under the curve of what each fold's classifier says of the fold."""
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
            warnings.simplefilter("ignore", ConvergenceWarning)  # a classifier that could be better is a valid one
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
