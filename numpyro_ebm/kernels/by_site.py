"""A kernel for each latent site of a model, in turn: for models with discrete and continuous latents."""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info
from numpyro_ebm.kernels._moves import MOVES


class BySiteState(NamedTuple):
    """The position by site, and its log density."""

    position: Any
    logdensity: Any


@record("groups")
class BySite(AbstractKernel):
    r"""A kernel for each latent site of a model: a transition moves the sites in turn, each given all others.

    Sites that have the same name, or the same object, as their kernel move together. Each kernel leaves the conditional
    density of its sites invariant, so the transition leaves their joint density invariant. A warm-up adapts each kernel to
    its own acceptance. The state of a kernel is built anew at each transition, since the other sites have moved: this costs
    one more gradient of a kernel that takes them, and "ghmc" draws a new momentum.

    ``sample(..., kernel={...})`` and ``BlackJAXKernel(model, {...})`` take the mapping itself. The acceptance rate of the
    record is the mean over the kernels that reject.

    Args:
        kernels: for each latent site of the model, a name or a kernel.

    Raises:
        EnergyError: for no kernels, an unknown name, and parallel tempering; at the first use for a mapping that has not
            exactly the latent sites of the model, for a kernel that does not fit its site, and for a distribution.

    Example:
        ``sample(rng_key, model, {"x": "nuts", "s": "gibbs"})``

    References:
        Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (1984); Tierney,
        Markov chains for exploring posterior distributions (1994).
    """

    name: ClassVar[str] = "by_site"
    is_discrete: ClassVar[bool | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    kernels: tuple[Any, ...]
    groups: tuple[tuple[str, ...], ...]

    def __init__(self, kernels: Mapping[str, Any]):
        if not kernels:
            raise EnergyError("BySite needs a kernel for each latent site. Write BySite({'x': 'nuts', 's': 'gibbs'}).")
        together: dict[Any, list[str]] = {}
        for site, kernel in kernels.items():
            together.setdefault(kernel if isinstance(kernel, str) else id(kernel), []).append(site)
        groups = tuple(tuple(sorted(sites)) for sites in together.values())
        object.__setattr__(self, "kernels", tuple(MOVES.resolve(kernels[sites[0]]) for sites in groups))
        object.__setattr__(self, "groups", groups)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites of all kernels."""
        return tuple(sorted(site for group in self.groups for site in group))

    @property
    def step_size(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The step size, if only one of the kernels has one; None otherwise."""
        each = [kernel.step_size for kernel in self.kernels if kernel.step_size is not None]
        return each[0] if len(each) == 1 else None

    @property
    def is_exact(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether every kernel is exact."""
        return all(kernel.is_exact for kernel in self.kernels)

    @property
    def adapts_mass_matrix(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether a warm-up adapts a mass matrix of any kernel."""
        return any(kernel.adapts_mass_matrix for kernel in self.kernels)

    @property
    def statistics(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The figures that are meaningful for one of the kernels and can be combined."""
        of_any = {name for kernel in self.kernels for name in kernel.statistics}
        return tuple(n for n in ("acceptance_rate", "is_divergent", "num_gradients", "is_nonfinite") if n in of_any)

    @property
    def parts(self) -> tuple[Any, ...]:
        """The kernels."""
        return self.kernels

    def joined(self, kernels: tuple[Any, ...]) -> "BySite":
        """Return the same with these kernels in place of its own."""
        return rebuilt(type(self), {"kernels": kernels, "groups": self.groups})

    def split(self, position: Position) -> list[Position]:
        """Return the sites of each kernel."""
        return [{site: position[site] for site in group} for group in self.groups]

    def as_positions(self, tree: PyTree) -> PyTree:
        """Cast each site to its kernel's type."""
        return self._each("as_positions", tree)

    def as_draws(self, tree: PyTree) -> PyTree:
        """Return positions as draws of the target."""
        return self._each("as_draws", tree)

    def bind(self, distribution: Any) -> Any:
        """Return the same with each kernel bound to its sites.

        Raises:
            EnergyError: for a distribution, which has no sites.
        """
        if not hasattr(distribution, "part"):
            raise EnergyError(
                f"A kernel by site is for the latents of a NumPyro model; {type(distribution).__name__} is one event. Write "
                "kernel='nuts', or kernel='gibbs' for a discrete support."
            )
        pairs = zip(self.kernels, self.groups, strict=True)
        return self.joined(tuple(kernel.bind(distribution.part(group)) for kernel, group in pairs))

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return BySiteState(position, log_density(position))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Move the sites of each kernel given all others."""
        position, logdensity, details = dict(state.position), state.logdensity, []
        keys = jax.random.split(rng_key, (len(self.kernels), 2))
        for kernel, own, (key_init, key_step) in zip(self.kernels, self.split(position), keys, strict=True):

            def conditional(part, others=position):
                return log_density({**others, **part})

            moved, detail = kernel.step(key_step, kernel.init(key_init, own, conditional), conditional)
            position = {**position, **moved.position}
            logdensity = getattr(moved, "logdensity", None)
            details.append(detail)
        logdensity = log_density(position) if logdensity is None else logdensity
        return BySiteState(position, jnp.asarray(logdensity, state.logdensity.dtype)), self._combined(details)

    def _combined(self, details: list[TransitionInfo]) -> TransitionInfo:
        rejecting = [d for k, d in zip(self.kernels, details, strict=True) if "acceptance_rate" in k.statistics]
        rates = [d.acceptance_rate for d in rejecting or details]
        whole = info(
            sum(rates) / len(rates),
            jnp.any(jnp.stack([d.is_divergent for d in details])),
            sum(d.num_gradients for d in details),
            is_nonfinite=jnp.any(jnp.stack([d.is_nonfinite for d in details])),
        )
        return whole._replace(parts=tuple(details))

    def _each(self, method: str, tree: PyTree) -> PyTree:
        pairs = zip(self.kernels, self.split(tree), strict=True)
        return {site: leaf for kernel, own in pairs for site, leaf in getattr(kernel, method)(own).items()}
