"""Posteriors over the parameters of energies."""

from numpyro_ebm.bayes.exchange import ExchangeKernel as ExchangeKernel
from numpyro_ebm.bayes.proposals import Differences as Differences
from numpyro_ebm.bayes.proposals import NoisyMALA as NoisyMALA
from numpyro_ebm.bayes.proposals import RandomWalk as RandomWalk
