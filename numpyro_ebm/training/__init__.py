"""Training by SVI: batches, held-out checks, checkpoints, many devices, recorded chains and alternating optimisers."""

from numpyro_ebm.training._fit import fit as fit
from numpyro_ebm.training.optimizers import alternate as alternate
from numpyro_ebm.training.recording import RecordedChains as RecordedChains
from numpyro_ebm.training.recording import RecordedHealth as RecordedHealth
from numpyro_ebm.training.results import FitResult as FitResult
from numpyro_ebm.training.results import Rollback as Rollback
