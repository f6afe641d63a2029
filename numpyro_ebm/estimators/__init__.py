"""The estimators, and the table of their names."""

from numpyro_ebm._registry import Registry
from numpyro_ebm.estimators._base import AbstractEstimator as AbstractEstimator
from numpyro_ebm.estimators._base import Site as Site
from numpyro_ebm.estimators._health import NegativePhaseHealth as NegativePhaseHealth
from numpyro_ebm.estimators.cd import ContrastiveDivergence as ContrastiveDivergence
from numpyro_ebm.estimators.dsm import DenoisingScoreMatching as DenoisingScoreMatching
from numpyro_ebm.estimators.improved_cd import ImprovedContrastiveDivergence as ImprovedContrastiveDivergence
from numpyro_ebm.estimators.mle import MaximumLikelihood as MaximumLikelihood
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from numpyro_ebm.estimators.pcd import PersistentContrastiveDivergence as PersistentContrastiveDivergence
from numpyro_ebm.estimators.replay import Replay as Replay
from numpyro_ebm.estimators.sm import ScoreMatching as ScoreMatching
from numpyro_ebm.estimators.ssm import SlicedScoreMatching as SlicedScoreMatching

ESTIMATORS: Registry[AbstractEstimator] = Registry(
    "estimator",
    {
        cls.name: cls
        for cls in (
            ContrastiveDivergence,
            DenoisingScoreMatching,
            ImprovedContrastiveDivergence,
            MaximumLikelihood,
            NoiseContrastiveEstimation,
            PersistentContrastiveDivergence,
            Replay,
            ScoreMatching,
            SlicedScoreMatching,
        )
    },
)


def available_estimators() -> tuple[str, ...]:
    """The names that `estimate` takes, sorted.

    Example:
        ``available_estimators()`` gives ``('cd', 'dsm', 'improved_cd', 'mle', 'nce', 'pcd', 'replay', 'sm', 'ssm')``.
    """
    return ESTIMATORS.names()
