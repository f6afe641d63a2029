"""Sampling from distributions and models: by MCMC, or from noise down a sequence of noise levels."""

from numpyro_ebm.sampling._sample import Draws as Draws
from numpyro_ebm.sampling._sample import sample as sample
from numpyro_ebm.sampling.annealed_langevin import AnnealedLangevin as AnnealedLangevin
from numpyro_ebm.sampling.blackjax_kernel import BlackJAXKernel as BlackJAXKernel
from numpyro_ebm.sampling.noise import VE as VE
from numpyro_ebm.sampling.noise import VP as VP
from numpyro_ebm.sampling.noise import AbstractNoiseProcess as AbstractNoiseProcess
from numpyro_ebm.sampling.noise import geometric_sigmas as geometric_sigmas
from numpyro_ebm.sampling.probability_flow import ProbabilityFlow as ProbabilityFlow
from numpyro_ebm.sampling.reverse_sde import ReverseSDE as ReverseSDE
from numpyro_ebm.sampling.saved_mcmc import run_mcmc as run_mcmc
