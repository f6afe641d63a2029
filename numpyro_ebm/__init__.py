from importlib.metadata import version as _version

from numpyro_ebm._errors import EnergyError as EnergyError
from numpyro_ebm._errors import UnhealthyChainsWarning as UnhealthyChainsWarning
from numpyro_ebm.arviz import to_arviz as to_arviz
from numpyro_ebm.distributions import EnergyDistribution as EnergyDistribution
from numpyro_ebm.estimators import AbstractEstimator as AbstractEstimator
from numpyro_ebm.estimators import ContrastiveDivergence as ContrastiveDivergence
from numpyro_ebm.estimators import DenoisingScoreMatching as DenoisingScoreMatching
from numpyro_ebm.estimators import ImprovedContrastiveDivergence as ImprovedContrastiveDivergence
from numpyro_ebm.estimators import MaximumLikelihood as MaximumLikelihood
from numpyro_ebm.estimators import NegativePhaseHealth as NegativePhaseHealth
from numpyro_ebm.estimators import NoiseContrastiveEstimation as NoiseContrastiveEstimation
from numpyro_ebm.estimators import PersistentContrastiveDivergence as PersistentContrastiveDivergence
from numpyro_ebm.estimators import Replay as Replay
from numpyro_ebm.estimators import ScoreMatching as ScoreMatching
from numpyro_ebm.estimators import SlicedScoreMatching as SlicedScoreMatching
from numpyro_ebm.estimators import available_estimators as available_estimators
from numpyro_ebm.factors import energy_factor as energy_factor
from numpyro_ebm.handlers import empty_guide as empty_guide
from numpyro_ebm.handlers import estimate as estimate
from numpyro_ebm.kernels import HMC as HMC
from numpyro_ebm.kernels import MALA as MALA
from numpyro_ebm.kernels import NUTS as NUTS
from numpyro_ebm.kernels import AbstractKernel as AbstractKernel
from numpyro_ebm.kernels import Langevin as Langevin
from numpyro_ebm.kernels import TransitionInfo as TransitionInfo
from numpyro_ebm.kernels import available_kernels as available_kernels
from numpyro_ebm.mcmc import BlackJAXKernel as BlackJAXKernel
from numpyro_ebm.samplers import ChainSampler as ChainSampler
from numpyro_ebm.sampling import Draws as Draws
from numpyro_ebm.sampling import sample as sample

__version__ = _version("numpyro-ebm")
