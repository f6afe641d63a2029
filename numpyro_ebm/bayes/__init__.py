"""Posteriors over the parameters of energies: exchange, generalised posteriors, surrogates of log Z, evidence."""

from numpyro_ebm.bayes._calibrate import Calibration as Calibration
from numpyro_ebm.bayes._calibrate import calibrate as calibrate
from numpyro_ebm.bayes._gaussian import GaussianPosterior as GaussianPosterior
from numpyro_ebm.bayes._gaussian import gaussian_posterior as gaussian_posterior
from numpyro_ebm.bayes.bootstrap import Bootstrap as Bootstrap
from numpyro_ebm.bayes.calibration import AbstractCalibration as AbstractCalibration
from numpyro_ebm.bayes.calibration import Adjustment as Adjustment
from numpyro_ebm.bayes.calibration import CalibrationProblem as CalibrationProblem
from numpyro_ebm.bayes.curvature import Curvature as Curvature
from numpyro_ebm.bayes.evidence import log_evidence as log_evidence
from numpyro_ebm.bayes.exact_samplers import coupling_from_the_past as coupling_from_the_past
from numpyro_ebm.bayes.exact_samplers import enumeration as enumeration
from numpyro_ebm.bayes.exchange import ExchangeKernel as ExchangeKernel
from numpyro_ebm.bayes.inclusion import InclusionProbabilities as InclusionProbabilities
from numpyro_ebm.bayes.inclusion import inclusion_probabilities as inclusion_probabilities
from numpyro_ebm.bayes.log_partition_grid import LogPartitionGrid as LogPartitionGrid
from numpyro_ebm.bayes.log_partition_grid import log_partition_grid as log_partition_grid
from numpyro_ebm.bayes.open_faced import OpenFaced as OpenFaced
from numpyro_ebm.bayes.proposals import AbstractProposal as AbstractProposal
from numpyro_ebm.bayes.proposals import CrankNicolson as CrankNicolson
from numpyro_ebm.bayes.proposals import Differences as Differences
from numpyro_ebm.bayes.proposals import NoisyMALA as NoisyMALA
from numpyro_ebm.bayes.proposals import RandomWalk as RandomWalk
from numpyro_ebm.bayes.rescaling import Rescaling as Rescaling
from numpyro_ebm.bayes.sandwich import Sandwich as Sandwich
from numpyro_ebm.bayes.simulated import Simulated as Simulated
