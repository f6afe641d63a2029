"""Plots of energies, draws, training and log Z; matplotlib is imported by the first plot."""

from numpyro_ebm.plots.annealing import plot_annealing as plot_annealing
from numpyro_ebm.plots.calibration import log_ratios as log_ratios
from numpyro_ebm.plots.calibration import plot_calibration as plot_calibration
from numpyro_ebm.plots.chains import plot_rank as plot_rank
from numpyro_ebm.plots.chains import plot_trace as plot_trace
from numpyro_ebm.plots.energy import plot_energy as plot_energy
from numpyro_ebm.plots.images import plot_images as plot_images
from numpyro_ebm.plots.marginals import plot_marginals as plot_marginals
from numpyro_ebm.plots.noise_levels import plot_noise_levels as plot_noise_levels
from numpyro_ebm.plots.pairs import plot_pairs as plot_pairs
from numpyro_ebm.plots.training import plot_training as plot_training
