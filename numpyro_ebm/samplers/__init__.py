"""How a distribution draws: chains at its own noise level, or down the noise levels of a model conditioned on them."""

from numpyro_ebm.samplers._layout import check_start as check_start
from numpyro_ebm.samplers._layout import draw_start as draw_start
from numpyro_ebm.samplers._layout import rows_local as rows_local
from numpyro_ebm.samplers._layout import starts_of as starts_of
from numpyro_ebm.samplers.annealed_langevin import AnnealedLangevin as AnnealedLangevin
from numpyro_ebm.samplers.chain import ChainSampler as ChainSampler
from numpyro_ebm.samplers.probability_flow import ProbabilityFlow as ProbabilityFlow
from numpyro_ebm.samplers.reverse_sde import ReverseSDE as ReverseSDE
