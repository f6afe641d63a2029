"""The registry of estimators; a new estimator adds its class here."""

from numpyro_ebm._core.registry import Registry
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.adversarial import AdversarialMaximumLikelihood
from numpyro_ebm.estimators.adversarial_nce import AdversarialContrastiveEstimation
from numpyro_ebm.estimators.bregman_nce import BregmanNoiseContrastiveEstimation
from numpyro_ebm.estimators.cd import ContrastiveDivergence
from numpyro_ebm.estimators.conditional_nce import ConditionalNoiseContrastiveEstimation
from numpyro_ebm.estimators.cooperative import CooperativeLearning
from numpyro_ebm.estimators.diffusion_recovery import DiffusionRecoveryLikelihood
from numpyro_ebm.estimators.discrete_fisher import DiscreteFisherDivergence
from numpyro_ebm.estimators.dsm import DenoisingScoreMatching
from numpyro_ebm.estimators.energy_discrepancy import EnergyDiscrepancy
from numpyro_ebm.estimators.exact import Exact
from numpyro_ebm.estimators.f_ebm import FDivergence
from numpyro_ebm.estimators.fd_ssm import FiniteDifferenceScoreMatching
from numpyro_ebm.estimators.flow_nce import FlowContrastiveEstimation
from numpyro_ebm.estimators.generalized_sm import GeneralizedScoreMatching
from numpyro_ebm.estimators.hsm import HigherOrderScoreMatching
from numpyro_ebm.estimators.improved_cd import ImprovedContrastiveDivergence
from numpyro_ebm.estimators.ksd import KernelSteinDiscrepancy
from numpyro_ebm.estimators.lsd import LearnedSteinDiscrepancy
from numpyro_ebm.estimators.mean_field_cd import MeanFieldContrastiveDivergence
from numpyro_ebm.estimators.minimum_velocity import MinimumVelocity
from numpyro_ebm.estimators.mle import MaximumLikelihood
from numpyro_ebm.estimators.mpf import MinimumProbabilityFlow
from numpyro_ebm.estimators.multigrid_cd import MultigridContrastiveDivergence
from numpyro_ebm.estimators.multiscale_dsm import MultiscaleDenoisingScoreMatching
from numpyro_ebm.estimators.nce import NoiseContrastiveEstimation
from numpyro_ebm.estimators.pcd import PersistentContrastiveDivergence
from numpyro_ebm.estimators.pseudolikelihood import Pseudolikelihood
from numpyro_ebm.estimators.ranking_nce import RankingNoiseContrastiveEstimation
from numpyro_ebm.estimators.ratio_matching import RatioMatching
from numpyro_ebm.estimators.regularized_sm import RegularizedScoreMatching
from numpyro_ebm.estimators.replay import Replay
from numpyro_ebm.estimators.shifted_nce import ShiftedNoiseContrastiveEstimation
from numpyro_ebm.estimators.sm import ScoreMatching
from numpyro_ebm.estimators.ssm import SlicedScoreMatching
from numpyro_ebm.estimators.ssm_vr import VarianceReducedSlicedScoreMatching
from numpyro_ebm.estimators.tre import TelescopingRatioEstimation
from numpyro_ebm.estimators.unbiased import UnbiasedMaximumLikelihood

ESTIMATORS: Registry[AbstractEstimator] = Registry(
    "estimator",
    AbstractEstimator,
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
            DiscreteFisherDivergence,
            EnergyDiscrepancy,
            Exact,
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
            Pseudolikelihood,
            RankingNoiseContrastiveEstimation,
            RatioMatching,
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
    """Return the names that `estimate` takes, sorted.

    Example:
        ``available_estimators()`` gives ``('adversarial', 'adversarial_nce', 'bregman_nce', 'cd', 'conditional_nce',
        'cooperative', 'diffusion_recovery', 'discrete_fisher', 'dsm', 'energy_discrepancy', 'exact', 'f_ebm', 'fd_ssm',
        'flow_nce', 'generalized_sm', 'hsm', 'improved_cd', 'ksd', 'lsd', 'mean_field_cd', 'minimum_velocity', 'mle', 'mpf',
        'multigrid_cd', 'multiscale_dsm', 'nce', 'pcd', 'pseudolikelihood', 'ranking_nce', 'ratio_matching',
        'regularized_sm', 'replay', 'shifted_nce', 'sm', 'ssm', 'ssm_vr', 'tre', 'unbiased')``.
    """
    return ESTIMATORS.names()
