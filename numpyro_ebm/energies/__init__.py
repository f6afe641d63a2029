"""Ready-made energies, with named parameters, their event and their exact log Z."""

from numpyro_ebm._core.energies import AbstractEnergy as AbstractEnergy
from numpyro_ebm.energies.autologistic import Autologistic as Autologistic
from numpyro_ebm.energies.boltzmann_machine import BoltzmannMachine as BoltzmannMachine
from numpyro_ebm.energies.deep_boltzmann_machine import DeepBoltzmannMachine as DeepBoltzmannMachine
from numpyro_ebm.energies.exponential_graphical_model import ExponentialGraphicalModel as ExponentialGraphicalModel
from numpyro_ebm.energies.gaussian_graphical_model import GaussianGraphicalModel as GaussianGraphicalModel
from numpyro_ebm.energies.gaussian_rbm import GaussianRBM as GaussianRBM
from numpyro_ebm.energies.graph import Graph as Graph
from numpyro_ebm.energies.ising import Ising as Ising
from numpyro_ebm.energies.mixture_of_energies import MixtureOfEnergies as MixtureOfEnergies
from numpyro_ebm.energies.poisson_graphical_model import PoissonGraphicalModel as PoissonGraphicalModel
from numpyro_ebm.energies.potts import GraphPotts as GraphPotts
from numpyro_ebm.energies.potts import Potts as Potts
from numpyro_ebm.energies.product_of_experts import ProductOfExperts as ProductOfExperts
from numpyro_ebm.energies.rbm import RBM as RBM
from numpyro_ebm.energies.rbm import JointRBM as JointRBM
from numpyro_ebm.energies.tempered import Tempered as Tempered
