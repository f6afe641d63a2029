"""The estimators, and the table of their names."""

from numpyro_ebm._registry import Registry
from numpyro_ebm.estimators._base import AbstractEstimator as AbstractEstimator
from numpyro_ebm.estimators._base import Site as Site
from numpyro_ebm.estimators.cd import ContrastiveDivergence as ContrastiveDivergence
from numpyro_ebm.estimators.dsm import DenoisingScoreMatching as DenoisingScoreMatching
from numpyro_ebm.estimators.mle import MaximumLikelihood as MaximumLikelihood
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from numpyro_ebm.estimators.pcd import PersistentContrastiveDivergence as PersistentContrastiveDivergence
from numpyro_ebm.estimators.sm import ScoreMatching as ScoreMatching
from numpyro_ebm.estimators.ssm import SlicedScoreMatching as SlicedScoreMatching
from numpyro_ebm.estimators.unbiased import UnbiasedMaximumLikelihood as UnbiasedMaximumLikelihood

ESTIMATORS: Registry[AbstractEstimator] = Registry(
    "estimator",
    {
        cls.name: cls
        for cls in (
            ContrastiveDivergence,
            DenoisingScoreMatching,
            MaximumLikelihood,
            NoiseContrastiveEstimation,
            PersistentContrastiveDivergence,
            ScoreMatching,
            SlicedScoreMatching,
            UnbiasedMaximumLikelihood,
        )
    },
)


def available_estimators() -> tuple[str, ...]:
    """The names that `estimate` takes, sorted.

    Example:
        ``available_estimators()`` gives ``('cd', 'dsm', 'mle', 'nce', 'pcd', 'sm', 'ssm', 'unbiased')``.
    """
    return ESTIMATORS.names()
