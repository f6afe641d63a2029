"""The handler `estimate`, helpers that find the energy sites of a model, and networks with priors."""

from numpyro_ebm.handlers._estimate import empty_guide as empty_guide
from numpyro_ebm.handlers._estimate import estimate as estimate
from numpyro_ebm.handlers._estimate import estimated_in as estimated_in
from numpyro_ebm.handlers.random_module import random_module as random_module
