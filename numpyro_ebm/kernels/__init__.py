"""Transition kernels, and the chains that use them."""

from numpyro_ebm.kernels._base import AbstractKernel as AbstractKernel
from numpyro_ebm.kernels._base import TransitionInfo as TransitionInfo
from numpyro_ebm.kernels.block_gibbs import BlockGibbs as BlockGibbs
from numpyro_ebm.kernels.by_site import BySite as BySite
from numpyro_ebm.kernels.chain_sampler import ChainSampler as ChainSampler
from numpyro_ebm.kernels.flips import Flips as Flips
from numpyro_ebm.kernels.gibbs import Gibbs as Gibbs
from numpyro_ebm.kernels.hamiltonian import GHMC as GHMC
from numpyro_ebm.kernels.hamiltonian import HMC as HMC
from numpyro_ebm.kernels.hamiltonian import NUTS as NUTS
from numpyro_ebm.kernels.hamiltonian import DynamicHMC as DynamicHMC
from numpyro_ebm.kernels.langevin import MALA as MALA
from numpyro_ebm.kernels.langevin import Barker as Barker
from numpyro_ebm.kernels.langevin import Langevin as Langevin
from numpyro_ebm.kernels.lattice_walk import LatticeWalk as LatticeWalk
from numpyro_ebm.kernels.locally_balanced import DMALA as DMALA
from numpyro_ebm.kernels.locally_balanced import DULA as DULA
from numpyro_ebm.kernels.locally_balanced import GibbsWithGradients as GibbsWithGradients
from numpyro_ebm.kernels.microcanonical import MCLMC as MCLMC
from numpyro_ebm.kernels.microcanonical import AdjustedMCLMC as AdjustedMCLMC
from numpyro_ebm.kernels.names import available_kernels as available_kernels
from numpyro_ebm.kernels.slice import EllipticalSlice as EllipticalSlice
from numpyro_ebm.kernels.swendsen_wang import SwendsenWang as SwendsenWang
from numpyro_ebm.kernels.tempering import ParallelTempering as ParallelTempering
