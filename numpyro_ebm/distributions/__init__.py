"""Distributions that declare an energy or a score, and the layout of their data in rows."""

from numpyro_ebm._core.discrete import one_hot as one_hot
from numpyro_ebm._core.discrete import spins as spins
from numpyro_ebm.distributions.blocks import Blocks as Blocks
from numpyro_ebm.distributions.empirical import Empirical as Empirical
from numpyro_ebm.distributions.energy import EnergyDistribution as EnergyDistribution
from numpyro_ebm.distributions.factor import EnergyFactor as EnergyFactor
from numpyro_ebm.distributions.factor import energy_factor as energy_factor
from numpyro_ebm.distributions.score import ScoreDistribution as ScoreDistribution
