"""Tables of the proposals of `ExchangeKernel` and of the methods of `calibrate`."""

from numpyro_ebm._core.registry import Registry
from numpyro_ebm.bayes.bootstrap import Bootstrap
from numpyro_ebm.bayes.calibration import AbstractCalibration
from numpyro_ebm.bayes.curvature import Curvature
from numpyro_ebm.bayes.open_faced import OpenFaced
from numpyro_ebm.bayes.proposals import AbstractProposal, CrankNicolson, Differences, NoisyMALA, RandomWalk
from numpyro_ebm.bayes.rescaling import Rescaling
from numpyro_ebm.bayes.sandwich import Sandwich

PROPOSALS: Registry[AbstractProposal] = Registry(
    "proposal", AbstractProposal, {cls.name: cls for cls in (RandomWalk, CrankNicolson, Differences, NoisyMALA)}
)

CALIBRATIONS: Registry[AbstractCalibration] = Registry(
    "method of calibration",
    AbstractCalibration,
    {cls.name: cls for cls in (Bootstrap, Curvature, OpenFaced, Rescaling, Sandwich)},
)
