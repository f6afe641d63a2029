"""The estimators, and the table of their names."""

from numpyro_ebm._registry import Registry
from numpyro_ebm.estimators._base import AbstractEstimator as AbstractEstimator
from numpyro_ebm.estimators._base import Site as Site
from numpyro_ebm.estimators._health import CONDITIONS as CONDITIONS
from numpyro_ebm.estimators._health import NegativePhaseHealth as NegativePhaseHealth
from numpyro_ebm.estimators._health import in_words as in_words
from numpyro_ebm.estimators.adversarial import AdversarialMaximumLikelihood as AdversarialMaximumLikelihood
from numpyro_ebm.estimators.adversarial_nce import AdversarialContrastiveEstimation as AdversarialContrastiveEstimation
from numpyro_ebm.estimators.bregman_nce import BregmanNoiseContrastiveEstimation as BregmanNoiseContrastiveEstimation
from numpyro_ebm.estimators.cd import ContrastiveDivergence as ContrastiveDivergence
from numpyro_ebm.estimators.conditional_nce import (
    ConditionalNoiseContrastiveEstimation as ConditionalNoiseContrastiveEstimation,
)
from numpyro_ebm.estimators.cooperative import CooperativeLearning as CooperativeLearning
from numpyro_ebm.estimators.diffusion_recovery import DiffusionRecoveryLikelihood as DiffusionRecoveryLikelihood
from numpyro_ebm.estimators.dsm import DenoisingScoreMatching as DenoisingScoreMatching
from numpyro_ebm.estimators.energy_discrepancy import EnergyDiscrepancy as EnergyDiscrepancy
from numpyro_ebm.estimators.f_ebm import FDivergence as FDivergence
from numpyro_ebm.estimators.fd_ssm import FiniteDifferenceScoreMatching as FiniteDifferenceScoreMatching
from numpyro_ebm.estimators.flow_nce import FlowContrastiveEstimation as FlowContrastiveEstimation
from numpyro_ebm.estimators.generalized_sm import GeneralizedScoreMatching as GeneralizedScoreMatching
from numpyro_ebm.estimators.hsm import HigherOrderScoreMatching as HigherOrderScoreMatching
from numpyro_ebm.estimators.improved_cd import ImprovedContrastiveDivergence as ImprovedContrastiveDivergence
from numpyro_ebm.estimators.ksd import KernelSteinDiscrepancy as KernelSteinDiscrepancy
from numpyro_ebm.estimators.lsd import LearnedSteinDiscrepancy as LearnedSteinDiscrepancy
from numpyro_ebm.estimators.mean_field_cd import MeanFieldContrastiveDivergence as MeanFieldContrastiveDivergence
from numpyro_ebm.estimators.minimum_velocity import MinimumVelocity as MinimumVelocity
from numpyro_ebm.estimators.mle import MaximumLikelihood as MaximumLikelihood
from numpyro_ebm.estimators.mpf import MinimumProbabilityFlow as MinimumProbabilityFlow
from numpyro_ebm.estimators.multigrid_cd import MultigridContrastiveDivergence as MultigridContrastiveDivergence
from numpyro_ebm.estimators.multiscale_dsm import MultiscaleDenoisingScoreMatching as MultiscaleDenoisingScoreMatching
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from numpyro_ebm.estimators.pcd import PersistentContrastiveDivergence as PersistentContrastiveDivergence
from numpyro_ebm.estimators.ranking_nce import RankingNoiseContrastiveEstimation as RankingNoiseContrastiveEstimation
from numpyro_ebm.estimators.regularized_sm import RegularizedScoreMatching as RegularizedScoreMatching
from numpyro_ebm.estimators.replay import Replay as Replay
from numpyro_ebm.estimators.shifted_nce import ShiftedNoiseContrastiveEstimation as ShiftedNoiseContrastiveEstimation
from numpyro_ebm.estimators.sm import ScoreMatching as ScoreMatching
from numpyro_ebm.estimators.ssm import SlicedScoreMatching as SlicedScoreMatching
from numpyro_ebm.estimators.ssm_vr import VarianceReducedSlicedScoreMatching as VarianceReducedSlicedScoreMatching
from numpyro_ebm.estimators.tre import TelescopingRatioEstimation as TelescopingRatioEstimation
from numpyro_ebm.estimators.unbiased import UnbiasedMaximumLikelihood as UnbiasedMaximumLikelihood

ESTIMATORS: Registry[AbstractEstimator] = Registry(
    "estimator",
    {
        cls.name: cls
        for cls in (
            AdversarialContrastiveEstimation,
            AdversarialMaximumLikelihood,
            BregmanNoiseContrastiveEstimation,
            ConditionalNoiseContrastiveEstimation,
            ContrastiveDivergence,
            CooperativeLearning,
            DenoisingScoreMatching,
            DiffusionRecoveryLikelihood,
            EnergyDiscrepancy,
            FDivergence,
            FiniteDifferenceScoreMatching,
            FlowContrastiveEstimation,
            GeneralizedScoreMatching,
            HigherOrderScoreMatching,
            ImprovedContrastiveDivergence,
            KernelSteinDiscrepancy,
            LearnedSteinDiscrepancy,
            MaximumLikelihood,
            MeanFieldContrastiveDivergence,
            MinimumProbabilityFlow,
            MinimumVelocity,
            MultigridContrastiveDivergence,
            MultiscaleDenoisingScoreMatching,
            NoiseContrastiveEstimation,
            PersistentContrastiveDivergence,
            RankingNoiseContrastiveEstimation,
            RegularizedScoreMatching,
            Replay,
            ScoreMatching,
            ShiftedNoiseContrastiveEstimation,
            SlicedScoreMatching,
            TelescopingRatioEstimation,
            UnbiasedMaximumLikelihood,
            VarianceReducedSlicedScoreMatching,
        )
    },
)


def available_estimators() -> tuple[str, ...]:
    """The names that `estimate` takes, sorted.

    Example:
        ``available_estimators()`` gives ``('adversarial', 'adversarial_nce', 'bregman_nce', 'cd', 'conditional_nce',
        'cooperative', 'diffusion_recovery', 'dsm', 'energy_discrepancy', 'f_ebm', 'fd_ssm', 'flow_nce', 'generalized_sm',
        'hsm', 'improved_cd', 'ksd', 'lsd', 'mean_field_cd', 'minimum_velocity', 'mle', 'mpf', 'multigrid_cd',
        'multiscale_dsm', 'nce', 'pcd', 'ranking_nce', 'regularized_sm', 'replay', 'shifted_nce', 'sm', 'ssm', 'ssm_vr',
        'tre', 'unbiased')``.
    """
    return ESTIMATORS.names()
