"""Second derivatives of a log density, under the name that the estimators know."""

from numpyro_ebm._derivatives import over_coordinates as over_coordinates
