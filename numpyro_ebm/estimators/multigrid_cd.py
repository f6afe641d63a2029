"""Multigrid contrastive divergence."""

import dataclasses
import numbers
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from numpyro_ebm._core.concrete import is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.cd import ContrastiveDivergence
from numpyro_ebm.estimators.parts.starts import Start
from numpyro_ebm.estimators.state import ChainState


class MultigridState(NamedTuple):
    """State of `MultigridContrastiveDivergence`.

    Attributes:
        grids: state of each grid, from coarse to fine.
    """

    grids: tuple[ChainState, ...]

    @property
    def chains(self) -> ChainState:
        """State of the finest grid."""
        return self.grids[-1]

    def figures(self) -> dict[str, Any]:
        """Return the numbers of the finest grid for reports."""
        return self.chains.figures()


@dataclasses.dataclass(frozen=True)
class MultigridContrastiveDivergence(ContrastiveDivergence):
    r"""Multigrid contrastive divergence (Gao et al.): chains on images, from coarse grids to fine ones.

    A row of event shape ``(H, W)`` or ``(H, W, C)`` is averaged over blocks of ``f x f`` pixels for each factor ``f``. On
    the coarsest grid a chain of ``num_steps`` transitions starts at the averaged row. On each finer grid it starts at the
    end of the chain on the grid before, with every pixel repeated over its block. The surrogate of a row is the sum of the
    contrasts of all grids:

    .. math:: \sum_f \bigl( -E_f(x_f) + E_f(x_f') \bigr)

    with no gradient through the ends ``x_f'``. The coarse grids move mass between modes that are far apart on the fine
    grid, where a chain from the row would not leave its mode. Each grid has the bias of "cd". The ends of the coarse chains
    are smoother than the data, so the fine chains need steps to add the missing detail.

    With ``shared=True`` there is one energy (and base): the density of a coarse grid is that of its events with every pixel
    repeated, ``E_f(y) = E(repeat(y))``. The parameters then serve all grids at once, and fit the finest one only as far as
    one set of parameters can do both. With ``shared=False`` each grid has its own energy, as in the paper: the energy is
    called with events of each grid's shape and chooses its parameters by that shape.

    State, in the mutable site ``"<site>$multigrid_cd"``: `MultigridState`. Step sizes adapt on each grid separately.
    Messages about the health of a coarse grid name it, as in ``x[2x2]``.

    Args:
        num_steps: transitions per grid, row and update.
        kernel: a name or a kernel, whose step size the training starts from on every grid; None for "mala".
        adapt_step_size: see `ContrastiveDivergence`, as for ``step_size_schedule``, ``temperature``, ``energy_l2``,
            ``on_unhealthy`` and ``scale``; all apply to every grid.
        factors: side of the blocks, coarse to fine, each a multiple of the next and the last one 1; ``(1,)`` is "cd". The
            paper's grids 1, 4, 16, 64 of images of 64 pixels are ``(64, 16, 4, 1)``.
        shared: whether one energy serves all grids.

    Raises:
        EnergyError: for other factors, a support other than the real line, an event that is not an image or whose sides the
            first factor does not divide, a base with ``shared=False``, ``energy_l2`` with a base; and where
            `ContrastiveDivergence` raises.

    Warns:
        UnhealthyChainsWarning: see ``on_unhealthy``.

    Example:
        ``estimate(model, "multigrid_cd", factors=(4, 2, 1), shared=False)`` with
        ``EnergyDistribution(lambda y: nets[y.shape](y), (8, 8))`` and networks for ``(2, 2)``, ``(4, 4)`` and ``(8, 8)``

    References:
        Gao, Lu, Zhou, Zhu and Wu, Learning generative ConvNets via multi-grid modeling and sampling (2018).
    """

    name = "multigrid_cd"
    takes_discrete = False
    takes_mixed = False
    positive_phase: ClassVar[None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    num_steps: int = 10
    factors: tuple[int, ...] = (4, 2, 1)
    shared: bool = True

    def __post_init__(self):
        super().__post_init__()
        factors = tuple(self.factors) if isinstance(self.factors, tuple | list) else ()
        counts = all(isinstance(f, numbers.Integral) and not isinstance(f, bool) and f >= 1 for f in factors)
        steps = zip(factors, factors[1:], strict=False)
        if not (factors and counts and factors[-1] == 1 and all(f > g and f % g == 0 for f, g in steps)):
            raise EnergyError(
                f"{type(self).__name__} needs factors from coarse to fine, each a multiple of the next and the last one 1; "
                f"got {self.factors!r}. Write factors=(4, 2, 1)."
            )
        object.__setattr__(self, "factors", tuple(int(f) for f in factors))

    def check(self, site: Site) -> None:
        """Refuse events that are not images, and options that a coarse grid cannot have."""
        super().check(site)
        shape, distribution = site.distribution.event_shape, site.distribution
        if not distribution._is_real:
            raise EnergyError(
                f"The estimator '{self.name}' averages pixels, which must be real numbers; the support is "
                f"{distribution.support}. Transform the data (e.g. by a logit) and leave out support."
            )
        if len(shape) not in (2, 3) or 0 in shape or any(side % self.factors[0] for side in shape[:2]):
            raise EnergyError(
                f"The estimator '{self.name}' needs images, event_shape=(H, W) or (H, W, C) with H and W multiples of "
                f"{self.factors[0]}, the first of factors={self.factors}; got {shape}. Pad them, or write other factors."
            )
        if distribution.base is None or len(self.factors) == 1:
            return
        if not self.shared:
            raise EnergyError(
                f"With shared=False each grid has a density of its own, and the base {type(distribution.base).__name__} "
                "applies to the finest only. Write its density into the energy of each grid, e.g. 0.5 * jnp.sum(y**2), and "
                "leave out base."
            )
        if not (is_concrete(self.energy_l2) and self.energy_l2 == 0):
            raise EnergyError(
                "energy_l2 is a penalty on the energy, and on a coarse grid the base is part of that. Write energy_l2=0, or "
                "put the base into the energy."
            )

    def notes(self):
        """Note what one energy for all grids is fitted to."""
        one = f"one energy is fitted to the averages over blocks of {self.factors[:-1]} pixels as well as to the data"
        return (*super().notes(), *((one,) if self.shared and len(self.factors) > 1 else ()))

    def init(self, rng_key: PRNGKey, site: Site) -> PyTree:
        """Return the initial state of each grid."""
        own = [super(MultigridContrastiveDivergence, self).init(rng_key, grid) for grid in self.grids(site)]
        return MultigridState(tuple(own))

    def surrogate(self, rng_key: PRNGKey, site: Site, state: MultigridState) -> tuple[RowValues, MultigridState]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the sum over grids of each row's contrast."""
        keys = jax.random.split(rng_key, len(self.factors)) if len(self.factors) > 1 else [rng_key]
        values, negatives, states = jnp.zeros(()), None, []
        for key, grid, own in zip(keys, self.grids(site), state.grids, strict=True):
            kernel = self.tuned(grid, own)
            position = grid.position if negatives is None else repeat_to(negatives, grid.position.shape)
            start = Start(kernel.lift_all(position), grid.local)
            negatives, own = self.update(jax.random.split(key)[1], grid, own, kernel, start)
            values = values + self.contrast(grid, negatives, grid.local, paired=True)
            states.append(own)
        return values, MultigridState(tuple(states))

    def grids(self, site: Site) -> list[Site]:
        """Return the site on each grid, coarse to fine; the last one is the site itself."""
        return [self._coarse(site, factor) for factor in self.factors[:-1]] + [site]

    def _coarse(self, site: Site, factor: int) -> Site:
        value, full, local = average(site.value, factor), site.distribution, site.local
        shape = value.shape[1:]
        settings: dict[str, Any] = {"context": full.context, "batch_shape": full.batch_shape}
        energy = full.energy
        if self.shared:
            # The context of the coarse density is the row's context together with the parameters of its base.
            settings = {} if local is None else {"context": local, "batch_shape": (site.num_rows,)}
            local = None if local is None else (local, None)

            def energy(event, row=None):
                return -full.log_density(repeat_to(event[None], (1, *full.event_shape))[0], row)

        distribution = EnergyDistribution(energy, shape, **settings)
        name = f"{site.name}[{shape[0]}x{shape[1]}]"
        return dataclasses.replace(site, name=name, distribution=distribution, value=value, local=local)


def average(
    images: Float[Array, "rows height width *channels"], factor: int
) -> Float[Array, "rows height//{factor} width//{factor} *channels"]:
    """Average ``(rows, H, W, ...)`` over blocks of pixels, to ``(rows, H / factor, W / factor, ...)``."""
    rows, height, width, *channels = images.shape
    blocks = images.reshape(rows, height // factor, factor, width // factor, factor, *channels)
    return jnp.mean(blocks, axis=(2, 4))


def repeat_to(
    images: Float[Array, "rows height width *channels"], shape: tuple[int, ...]
) -> Float[Array, "rows {shape[1]} {shape[2]} *channels"]:
    """Repeat every pixel over its block, up to ``shape``; `average` is the inverse."""
    factor = shape[1] // images.shape[1]
    return jnp.repeat(jnp.repeat(images, factor, axis=1), factor, axis=2)
