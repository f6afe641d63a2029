"""Posteriors over the parameters of energies: the exchange algorithm and its proposals, surrogates of log Z, evidence."""

from numpyro_ebm.bayes.evidence import log_evidence as log_evidence
from numpyro_ebm.bayes.exact_samplers import coupling_from_the_past as coupling_from_the_past
from numpyro_ebm.bayes.exact_samplers import enumeration as enumeration
from numpyro_ebm.bayes.exchange import ExchangeKernel as ExchangeKernel
from numpyro_ebm.bayes.log_partition_grid import LogPartitionGrid as LogPartitionGrid
from numpyro_ebm.bayes.log_partition_grid import log_partition_grid as log_partition_grid
from numpyro_ebm.bayes.proposals import AbstractProposal as AbstractProposal
from numpyro_ebm.bayes.proposals import CrankNicolson as CrankNicolson
from numpyro_ebm.bayes.proposals import Differences as Differences
from numpyro_ebm.bayes.proposals import NoisyMALA as NoisyMALA
from numpyro_ebm.bayes.proposals import RandomWalk as RandomWalk
