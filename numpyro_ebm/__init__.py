"""Energy-based models for NumPyro: declare, train, sample and evaluate ``p(x) = exp(-E(x)) / Z`` with unknown Z.

`EnergyDistribution` declares an unnormalised energy at a ``numpyro.sample`` site, and `energy_factor` adds one to existing
sites. `estimate` makes the model trainable by NumPyro's SVI with a named estimator: "sm", "dsm", "nce", "cd", "pcd" or
another of `available_estimators`. `fit` trains it with checks and early stopping, `sample` and `BlackJAXKernel` draw from
it, `log_partition` estimates log Z, `diagnose` and `evaluate` assess the result, and ``numpyro_ebm.plots`` plots it.

Public names by topic (``help`` describes each):

* Declare: EnergyDistribution, energy_factor, ScoreDistribution, Empirical; the supports spins, one_hot, Blocks.
* Ready-made energies, in ``numpyro_ebm.energies``: Autologistic, BoltzmannMachine, DeepBoltzmannMachine,
    ExponentialGraphicalModel, GaussianGraphicalModel, GaussianRBM, GraphPotts, Ising, MixtureOfEnergies,
    PoissonGraphicalModel, Potts, ProductOfExperts, RBM, Tempered; ERGM for networks, with Dyads and its statistics Edges,
    EdgeCovariate, GWDegree, GWESP, KStars, Mutual, NodeCovariate, NodeMatch, Triangles.
* Train: estimate, empty_guide, available_estimators, alternate, fit, FitResult, RecordedChains, RecordedHealth,
    Rollback.
* Estimators, each with its options: AbstractEstimator, AdversarialContrastiveEstimation, AdversarialMaximumLikelihood,
    BregmanNoiseContrastiveEstimation, ConditionalNoiseContrastiveEstimation, ContrastiveDivergence, CooperativeLearning,
    DenoisingScoreMatching, DiffusionRecoveryLikelihood, DiscreteFisherDivergence, EnergyDiscrepancy, Exact, FDivergence,
    FiniteDifferenceScoreMatching, FlowContrastiveEstimation, GeneralizedScoreMatching, HigherOrderScoreMatching,
    ImprovedContrastiveDivergence, KernelSteinDiscrepancy, LearnedSteinDiscrepancy, MaximumLikelihood,
    MeanFieldContrastiveDivergence, MinimumProbabilityFlow, MinimumVelocity, MultigridContrastiveDivergence,
    MultiscaleDenoisingScoreMatching, NoiseContrastiveEstimation, PersistentContrastiveDivergence, Pseudolikelihood,
    RankingNoiseContrastiveEstimation, RatioMatching, RegularizedScoreMatching, Replay, ScoreMatching,
    ShiftedNoiseContrastiveEstimation, SlicedScoreMatching, TelescopingRatioEstimation, UnbiasedMaximumLikelihood,
    VarianceReducedSlicedScoreMatching; PositivePhase for hidden members and missing entries.
* Sample: sample, Draws, BlackJAXKernel, run_mcmc, available_kernels, ChainSampler, AnnealedLangevin, ReverseSDE,
    ProbabilityFlow.
* Kernels: GHMC, HMC, MALA, MCLMC, NUTS, AbstractKernel, AdjustedMCLMC, Barker, DynamicHMC, EllipticalSlice, Langevin,
    ParallelTempering, TransitionInfo; on discrete supports BlockGibbs, DMALA, DULA, Flips,
    Gibbs, GibbsWithGradients, LatticeWalk, SwendsenWang; BySite for both kinds of latents or members.
* Posteriors over parameters: ExchangeKernel, random_module, calibrate, Calibration, gaussian_posterior,
    GaussianPosterior; in ``numpyro_ebm.bayes`` AuxiliaryVariableKernel, NoisyLangevinKernel, PosteriorKernel, the proposals
    CrankNicolson, Differences, NoisyMALA, RandomWalk, the calibrations Bootstrap, Curvature, OpenFaced, Rescaling, Sandwich,
    with Simulated, and log_partition_grid, LogPartitionGrid, log_evidence, inclusion_probabilities, InclusionProbabilities.
* Noise levels: VE, VP, AbstractNoiseProcess, geometric_sigmas.
* log Z: log_partition, log_partition_bounds, available_partition_methods, AbstractPartition, AnnealedImportanceSampling,
    BridgeSampling, Enumeration, Grid, ImportanceSampling, LogPartition, LogPartitionBounds, NestedSampling,
    NoiseContrast, SequentialMonteCarlo.
* Diagnose: diagnose, Diagnosis, Finding, training_report, TrainingReport, NegativePhaseHealth, standard_errors,
    StandardErrors, split_rhat, FunctionRhat, nested_rhat, to_arviz.
* Evaluate on held-out rows: log_likelihood, LogLikelihood, C2ST, Evaluation, KSDTest, MMDTest, ModeWeights, SMLoss,
    classifier_two_sample_test, evaluate, ksd_test, mmd, mode_weights, sm_loss.
* Errors and warnings: CheckpointError, EnergyError, NonFiniteLossWarning, OverfittingWarning, TrainingStoppedWarning,
    UncalibratedPosteriorWarning, UnhealthyChainsWarning, UnhealthyChainsError, UnreliableLogPartitionWarning,
    UntrainedParametersWarning.

Example:
    >>> import jax, numpyro, optax
    >>> import numpyro_ebm as ebm
    >>> from numpyro.infer import SVI, Trace_ELBO
    >>> def model(x):
    ...     precision = numpyro.param("precision", 1.0)
    ...     with numpyro.plate("rows", len(x)):
    ...         numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * precision * x**2), obs=x)
    >>> svi = SVI(ebm.estimate(model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    >>> x = 0.5 * jax.random.normal(jax.random.key(0), (1000,))
    >>> params = svi.run(jax.random.key(1), 500, x, progress_bar=False).params  # precision: about 4
"""

from importlib.metadata import version as _version

from numpyro_ebm import energies as energies
from numpyro_ebm._core.errors import CheckpointError as CheckpointError
from numpyro_ebm._core.errors import EnergyError as EnergyError
from numpyro_ebm._core.errors import NonFiniteLossWarning as NonFiniteLossWarning
from numpyro_ebm._core.errors import OverfittingWarning as OverfittingWarning
from numpyro_ebm._core.errors import TrainingStoppedWarning as TrainingStoppedWarning
from numpyro_ebm._core.errors import UncalibratedPosteriorWarning as UncalibratedPosteriorWarning
from numpyro_ebm._core.errors import UnhealthyChainsError as UnhealthyChainsError
from numpyro_ebm._core.errors import UnhealthyChainsWarning as UnhealthyChainsWarning
from numpyro_ebm._core.errors import UnreliableLogPartitionWarning as UnreliableLogPartitionWarning
from numpyro_ebm._core.errors import UntrainedParametersWarning as UntrainedParametersWarning
from numpyro_ebm.bayes import Calibration as Calibration
from numpyro_ebm.bayes import ExchangeKernel as ExchangeKernel
from numpyro_ebm.bayes import GaussianPosterior as GaussianPosterior
from numpyro_ebm.bayes import calibrate as calibrate
from numpyro_ebm.bayes import gaussian_posterior as gaussian_posterior
from numpyro_ebm.diagnostics import Diagnosis as Diagnosis
from numpyro_ebm.diagnostics import Finding as Finding
from numpyro_ebm.diagnostics import FunctionRhat as FunctionRhat
from numpyro_ebm.diagnostics import StandardErrors as StandardErrors
from numpyro_ebm.diagnostics import TrainingReport as TrainingReport
from numpyro_ebm.diagnostics import diagnose as diagnose
from numpyro_ebm.diagnostics import nested_rhat as nested_rhat
from numpyro_ebm.diagnostics import split_rhat as split_rhat
from numpyro_ebm.diagnostics import standard_errors as standard_errors
from numpyro_ebm.diagnostics import to_arviz as to_arviz
from numpyro_ebm.diagnostics import training_report as training_report
from numpyro_ebm.distributions import Blocks as Blocks
from numpyro_ebm.distributions import Empirical as Empirical
from numpyro_ebm.distributions import EnergyDistribution as EnergyDistribution
from numpyro_ebm.distributions import ScoreDistribution as ScoreDistribution
from numpyro_ebm.distributions import energy_factor as energy_factor
from numpyro_ebm.distributions import one_hot as one_hot
from numpyro_ebm.distributions import spins as spins
from numpyro_ebm.estimators import AbstractEstimator as AbstractEstimator
from numpyro_ebm.estimators import AdversarialContrastiveEstimation as AdversarialContrastiveEstimation
from numpyro_ebm.estimators import AdversarialMaximumLikelihood as AdversarialMaximumLikelihood
from numpyro_ebm.estimators import BregmanNoiseContrastiveEstimation as BregmanNoiseContrastiveEstimation
from numpyro_ebm.estimators import ConditionalNoiseContrastiveEstimation as ConditionalNoiseContrastiveEstimation
from numpyro_ebm.estimators import ContrastiveDivergence as ContrastiveDivergence
from numpyro_ebm.estimators import CooperativeLearning as CooperativeLearning
from numpyro_ebm.estimators import DenoisingScoreMatching as DenoisingScoreMatching
from numpyro_ebm.estimators import DiffusionRecoveryLikelihood as DiffusionRecoveryLikelihood
from numpyro_ebm.estimators import DiscreteFisherDivergence as DiscreteFisherDivergence
from numpyro_ebm.estimators import EnergyDiscrepancy as EnergyDiscrepancy
from numpyro_ebm.estimators import Exact as Exact
from numpyro_ebm.estimators import FDivergence as FDivergence
from numpyro_ebm.estimators import FiniteDifferenceScoreMatching as FiniteDifferenceScoreMatching
from numpyro_ebm.estimators import FlowContrastiveEstimation as FlowContrastiveEstimation
from numpyro_ebm.estimators import GeneralizedScoreMatching as GeneralizedScoreMatching
from numpyro_ebm.estimators import HigherOrderScoreMatching as HigherOrderScoreMatching
from numpyro_ebm.estimators import ImprovedContrastiveDivergence as ImprovedContrastiveDivergence
from numpyro_ebm.estimators import KernelSteinDiscrepancy as KernelSteinDiscrepancy
from numpyro_ebm.estimators import LearnedSteinDiscrepancy as LearnedSteinDiscrepancy
from numpyro_ebm.estimators import MaximumLikelihood as MaximumLikelihood
from numpyro_ebm.estimators import MeanFieldContrastiveDivergence as MeanFieldContrastiveDivergence
from numpyro_ebm.estimators import MinimumProbabilityFlow as MinimumProbabilityFlow
from numpyro_ebm.estimators import MinimumVelocity as MinimumVelocity
from numpyro_ebm.estimators import MultigridContrastiveDivergence as MultigridContrastiveDivergence
from numpyro_ebm.estimators import MultiscaleDenoisingScoreMatching as MultiscaleDenoisingScoreMatching
from numpyro_ebm.estimators import NegativePhaseHealth as NegativePhaseHealth
from numpyro_ebm.estimators import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from numpyro_ebm.estimators import PersistentContrastiveDivergence as PersistentContrastiveDivergence
from numpyro_ebm.estimators import PositivePhase as PositivePhase
from numpyro_ebm.estimators import Pseudolikelihood as Pseudolikelihood
from numpyro_ebm.estimators import RankingNoiseContrastiveEstimation as RankingNoiseContrastiveEstimation
from numpyro_ebm.estimators import RatioMatching as RatioMatching
from numpyro_ebm.estimators import RegularizedScoreMatching as RegularizedScoreMatching
from numpyro_ebm.estimators import Replay as Replay
from numpyro_ebm.estimators import ScoreMatching as ScoreMatching
from numpyro_ebm.estimators import ShiftedNoiseContrastiveEstimation as ShiftedNoiseContrastiveEstimation
from numpyro_ebm.estimators import SlicedScoreMatching as SlicedScoreMatching
from numpyro_ebm.estimators import TelescopingRatioEstimation as TelescopingRatioEstimation
from numpyro_ebm.estimators import UnbiasedMaximumLikelihood as UnbiasedMaximumLikelihood
from numpyro_ebm.estimators import VarianceReducedSlicedScoreMatching as VarianceReducedSlicedScoreMatching
from numpyro_ebm.estimators import available_estimators as available_estimators
from numpyro_ebm.evaluation import C2ST as C2ST
from numpyro_ebm.evaluation import Evaluation as Evaluation
from numpyro_ebm.evaluation import KSDTest as KSDTest
from numpyro_ebm.evaluation import LogLikelihood as LogLikelihood
from numpyro_ebm.evaluation import MMDTest as MMDTest
from numpyro_ebm.evaluation import ModeWeights as ModeWeights
from numpyro_ebm.evaluation import SMLoss as SMLoss
from numpyro_ebm.evaluation import classifier_two_sample_test as classifier_two_sample_test
from numpyro_ebm.evaluation import evaluate as evaluate
from numpyro_ebm.evaluation import ksd_test as ksd_test
from numpyro_ebm.evaluation import log_likelihood as log_likelihood
from numpyro_ebm.evaluation import mmd as mmd
from numpyro_ebm.evaluation import mode_weights as mode_weights
from numpyro_ebm.evaluation import sm_loss as sm_loss
from numpyro_ebm.handlers import empty_guide as empty_guide
from numpyro_ebm.handlers import estimate as estimate
from numpyro_ebm.handlers import random_module as random_module
from numpyro_ebm.kernels import DMALA as DMALA
from numpyro_ebm.kernels import DULA as DULA
from numpyro_ebm.kernels import GHMC as GHMC
from numpyro_ebm.kernels import HMC as HMC
from numpyro_ebm.kernels import MALA as MALA
from numpyro_ebm.kernels import MCLMC as MCLMC
from numpyro_ebm.kernels import NUTS as NUTS
from numpyro_ebm.kernels import AbstractKernel as AbstractKernel
from numpyro_ebm.kernels import AdjustedMCLMC as AdjustedMCLMC
from numpyro_ebm.kernels import Barker as Barker
from numpyro_ebm.kernels import BlockGibbs as BlockGibbs
from numpyro_ebm.kernels import BySite as BySite
from numpyro_ebm.kernels import ChainSampler as ChainSampler
from numpyro_ebm.kernels import DynamicHMC as DynamicHMC
from numpyro_ebm.kernels import EllipticalSlice as EllipticalSlice
from numpyro_ebm.kernels import Flips as Flips
from numpyro_ebm.kernels import Gibbs as Gibbs
from numpyro_ebm.kernels import GibbsWithGradients as GibbsWithGradients
from numpyro_ebm.kernels import Langevin as Langevin
from numpyro_ebm.kernels import LatticeWalk as LatticeWalk
from numpyro_ebm.kernels import ParallelTempering as ParallelTempering
from numpyro_ebm.kernels import SwendsenWang as SwendsenWang
from numpyro_ebm.kernels import TransitionInfo as TransitionInfo
from numpyro_ebm.kernels import available_kernels as available_kernels
from numpyro_ebm.partition import AbstractPartition as AbstractPartition
from numpyro_ebm.partition import AnnealedImportanceSampling as AnnealedImportanceSampling
from numpyro_ebm.partition import BridgeSampling as BridgeSampling
from numpyro_ebm.partition import Enumeration as Enumeration
from numpyro_ebm.partition import Grid as Grid
from numpyro_ebm.partition import ImportanceSampling as ImportanceSampling
from numpyro_ebm.partition import LogPartition as LogPartition
from numpyro_ebm.partition import LogPartitionBounds as LogPartitionBounds
from numpyro_ebm.partition import NestedSampling as NestedSampling
from numpyro_ebm.partition import NoiseContrast as NoiseContrast
from numpyro_ebm.partition import SequentialMonteCarlo as SequentialMonteCarlo
from numpyro_ebm.partition import available_partition_methods as available_partition_methods
from numpyro_ebm.partition import log_partition as log_partition
from numpyro_ebm.partition import log_partition_bounds as log_partition_bounds
from numpyro_ebm.sampling import VE as VE
from numpyro_ebm.sampling import VP as VP
from numpyro_ebm.sampling import AbstractNoiseProcess as AbstractNoiseProcess
from numpyro_ebm.sampling import AnnealedLangevin as AnnealedLangevin
from numpyro_ebm.sampling import BlackJAXKernel as BlackJAXKernel
from numpyro_ebm.sampling import Draws as Draws
from numpyro_ebm.sampling import ProbabilityFlow as ProbabilityFlow
from numpyro_ebm.sampling import ReverseSDE as ReverseSDE
from numpyro_ebm.sampling import geometric_sigmas as geometric_sigmas
from numpyro_ebm.sampling import run_mcmc as run_mcmc
from numpyro_ebm.sampling import sample as sample
from numpyro_ebm.training import FitResult as FitResult
from numpyro_ebm.training import RecordedChains as RecordedChains
from numpyro_ebm.training import RecordedHealth as RecordedHealth
from numpyro_ebm.training import Rollback as Rollback
from numpyro_ebm.training import alternate as alternate
from numpyro_ebm.training import fit as fit

__version__ = _version("numpyro-ebm")

__all__ = [
    "spins",
    "one_hot",
    "Blocks",
    "DULA",
    "DMALA",
    "EnergyError",
    "NonFiniteLossWarning",
    "OverfittingWarning",
    "UncalibratedPosteriorWarning",
    "UnhealthyChainsError",
    "UnhealthyChainsWarning",
    "UnreliableLogPartitionWarning",
    "UntrainedParametersWarning",
    "RecordedChains",
    "RecordedHealth",
    "to_arviz",
    "Diagnosis",
    "Finding",
    "FunctionRhat",
    "diagnose",
    "nested_rhat",
    "split_rhat",
    "EnergyDistribution",
    "Empirical",
    "AbstractEstimator",
    "AdversarialContrastiveEstimation",
    "AdversarialMaximumLikelihood",
    "BregmanNoiseContrastiveEstimation",
    "ConditionalNoiseContrastiveEstimation",
    "ContrastiveDivergence",
    "CooperativeLearning",
    "DenoisingScoreMatching",
    "DiffusionRecoveryLikelihood",
    "DiscreteFisherDivergence",
    "EnergyDiscrepancy",
    "Exact",
    "Calibration",
    "CheckpointError",
    "ExchangeKernel",
    "GaussianPosterior",
    "calibrate",
    "gaussian_posterior",
    "FDivergence",
    "FiniteDifferenceScoreMatching",
    "Flips",
    "FlowContrastiveEstimation",
    "GeneralizedScoreMatching",
    "HigherOrderScoreMatching",
    "ImprovedContrastiveDivergence",
    "KernelSteinDiscrepancy",
    "LearnedSteinDiscrepancy",
    "MaximumLikelihood",
    "MeanFieldContrastiveDivergence",
    "MinimumProbabilityFlow",
    "MinimumVelocity",
    "MultigridContrastiveDivergence",
    "MultiscaleDenoisingScoreMatching",
    "NegativePhaseHealth",
    "NoiseContrastiveEstimation",
    "PersistentContrastiveDivergence",
    "PositivePhase",
    "Pseudolikelihood",
    "RankingNoiseContrastiveEstimation",
    "RatioMatching",
    "RegularizedScoreMatching",
    "Replay",
    "ScoreMatching",
    "ShiftedNoiseContrastiveEstimation",
    "SlicedScoreMatching",
    "TelescopingRatioEstimation",
    "UnbiasedMaximumLikelihood",
    "VarianceReducedSlicedScoreMatching",
    "available_estimators",
    "C2ST",
    "Evaluation",
    "KSDTest",
    "MMDTest",
    "ModeWeights",
    "SMLoss",
    "classifier_two_sample_test",
    "evaluate",
    "ksd_test",
    "mmd",
    "mode_weights",
    "sm_loss",
    "energy_factor",
    "empty_guide",
    "estimate",
    "GHMC",
    "HMC",
    "MALA",
    "MCLMC",
    "NUTS",
    "AbstractKernel",
    "AdjustedMCLMC",
    "Barker",
    "DynamicHMC",
    "EllipticalSlice",
    "Gibbs",
    "BlockGibbs",
    "BySite",
    "SwendsenWang",
    "GibbsWithGradients",
    "Langevin",
    "LatticeWalk",
    "ParallelTempering",
    "TransitionInfo",
    "available_kernels",
    "LogLikelihood",
    "log_likelihood",
    "BlackJAXKernel",
    "VE",
    "VP",
    "AbstractNoiseProcess",
    "geometric_sigmas",
    "alternate",
    "AbstractPartition",
    "AnnealedImportanceSampling",
    "BridgeSampling",
    "Enumeration",
    "Grid",
    "ImportanceSampling",
    "LogPartition",
    "LogPartitionBounds",
    "NestedSampling",
    "NoiseContrast",
    "SequentialMonteCarlo",
    "available_partition_methods",
    "log_partition",
    "log_partition_bounds",
    "TrainingReport",
    "TrainingStoppedWarning",
    "training_report",
    "AnnealedLangevin",
    "ChainSampler",
    "ProbabilityFlow",
    "ReverseSDE",
    "Rollback",
    "Draws",
    "random_module",
    "run_mcmc",
    "sample",
    "ScoreDistribution",
    "StandardErrors",
    "standard_errors",
    "FitResult",
    "fit",
]
