"""The handler `estimate`, and helpers that find the energy sites of a model."""

from numpyro_ebm.handlers._estimate import empty_guide as empty_guide
from numpyro_ebm.handlers._estimate import estimate as estimate
from numpyro_ebm.handlers._estimate import estimated_in as estimated_in
