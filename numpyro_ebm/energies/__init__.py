"""Ready-made energies, with named parameters, their event and their exact log Z."""

from numpyro_ebm._core.energies import AbstractEnergy as AbstractEnergy
from numpyro_ebm.energies.boltzmann_machine import BoltzmannMachine as BoltzmannMachine
from numpyro_ebm.energies.gaussian_rbm import GaussianRBM as GaussianRBM
from numpyro_ebm.energies.graph import Graph as Graph
from numpyro_ebm.energies.ising import Ising as Ising
from numpyro_ebm.energies.potts import GraphPotts as GraphPotts
from numpyro_ebm.energies.potts import Potts as Potts
from numpyro_ebm.energies.rbm import RBM as RBM
from numpyro_ebm.energies.rbm import JointRBM as JointRBM
