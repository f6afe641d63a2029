"""Table of the kernels that move a single position."""

from numpyro_ebm._core.registry import Registry
from numpyro_ebm.kernels._base import AbstractKernel
from numpyro_ebm.kernels.block_gibbs import BlockGibbs
from numpyro_ebm.kernels.flips import Flips
from numpyro_ebm.kernels.gibbs import Gibbs
from numpyro_ebm.kernels.hamiltonian import GHMC, HMC, NUTS, DynamicHMC
from numpyro_ebm.kernels.langevin import MALA, Barker, Langevin
from numpyro_ebm.kernels.lattice_walk import LatticeWalk
from numpyro_ebm.kernels.locally_balanced import DMALA, DULA, GibbsWithGradients
from numpyro_ebm.kernels.microcanonical import MCLMC, AdjustedMCLMC
from numpyro_ebm.kernels.slice import EllipticalSlice
from numpyro_ebm.kernels.swendsen_wang import SwendsenWang

MOVES: Registry[AbstractKernel] = Registry(
    "kernel",
    AbstractKernel,
    {
        kernel.name: kernel
        for kernel in (
            *(Langevin, MALA, Barker, HMC, DynamicHMC, GHMC, NUTS, MCLMC, AdjustedMCLMC, EllipticalSlice),
            *(Gibbs, BlockGibbs, SwendsenWang, Flips, LatticeWalk, GibbsWithGradients, DULA, DMALA),
        )
    },
)
