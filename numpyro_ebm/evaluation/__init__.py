"""Measures of how well a model fits held-out rows, and `evaluate`, which compares models by them."""

from numpyro_ebm.evaluation._table import Difference as Difference
from numpyro_ebm.evaluation._table import Evaluation as Evaluation
from numpyro_ebm.evaluation.c2st import C2ST as C2ST
from numpyro_ebm.evaluation.c2st import classifier_two_sample_test as classifier_two_sample_test
from numpyro_ebm.evaluation.compare import evaluate as evaluate
from numpyro_ebm.evaluation.kernel_two_sample import MMDTest as MMDTest
from numpyro_ebm.evaluation.kernel_two_sample import mmd as mmd
from numpyro_ebm.evaluation.ksd import KSDTest as KSDTest
from numpyro_ebm.evaluation.ksd import ksd_test as ksd_test
from numpyro_ebm.evaluation.likelihood import LogLikelihood as LogLikelihood
from numpyro_ebm.evaluation.likelihood import log_likelihood as log_likelihood
from numpyro_ebm.evaluation.modes import ModeWeights as ModeWeights
from numpyro_ebm.evaluation.modes import mode_weights as mode_weights
from numpyro_ebm.evaluation.sm import SMLoss as SMLoss
from numpyro_ebm.evaluation.sm import sm_loss as sm_loss
