"""Contrastive divergence."""

import dataclasses

from numpyro_ebm.estimators._base import Site
from numpyro_ebm.estimators._chains import ChainEstimator


@dataclasses.dataclass(frozen=True)
class ContrastiveDivergence(ChainEstimator):
    r"""Contrastive divergence (Hinton): a chain of k steps from each data row.

    The gradient of the surrogate of a row ``x`` is ``-grad E(x) + grad E(x')``, with ``x'`` the row moved by
    ``num_steps`` transitions, through which no gradient flows. Cheap and of low variance; biased, for chains as short as
    these have not left the data: modes away from them are never seen. As the step size goes to 0, one step of MALA,
    divided by the step, is score matching. The value is an energy gap and means nothing as an objective.

    Args:
        num_steps: transitions per row and update.
        kernel: a name or a kernel, its step size fixed during training.

    Raises:
        EnergyError: for fewer than one step or an unknown kernel.

    Example:
        ``estimate(model, "cd", num_steps=10, kernel=ebm.Langevin(step_size=0.01))``

    References:
        Hinton, Training products of experts by minimizing contrastive divergence (2002); Hyvarinen (2007).
    """

    name = "cd"

    def surrogate(self, rng_key, site: Site, state):
        """Energy gap between each row and its negative."""
        negatives, _ = self.negatives(rng_key, site, site.position, site.local)
        return self.contrast(site, negatives), state
