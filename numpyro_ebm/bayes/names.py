"""Table of the proposals of `ExchangeKernel`."""

from numpyro_ebm._core.registry import Registry
from numpyro_ebm.bayes.proposals import AbstractProposal, CrankNicolson, Differences, NoisyMALA, RandomWalk

PROPOSALS: Registry[AbstractProposal] = Registry(
    "proposal", AbstractProposal, {cls.name: cls for cls in (RandomWalk, CrankNicolson, Differences, NoisyMALA)}
)
