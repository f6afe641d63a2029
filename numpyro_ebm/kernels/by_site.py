"""A kernel for each site, in turn: for models with discrete and continuous latents, and for mixed events."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.members import Members
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import Array, ChainLogDensityFn, Position, PRNGKey, PyTree
from numpyro_ebm.kernels._base import AbstractKernel, TransitionInfo, info
from numpyro_ebm.kernels._moves import MOVES


class BySiteState(NamedTuple):
    """The position by site, and its log density."""

    position: Any
    logdensity: Any


def usual_kernels(
    are_discrete: Mapping[str, bool], continuous: str = "nuts", endless: Collection[str] = ()
) -> dict[str, str]:
    """Return the names of the usual kernels of sites.

    Args:
        are_discrete: by site, whether it is discrete.
        continuous: the name for the others.
        endless: the discrete sites without a largest value, which "lattice_walk" moves; "gibbs" moves the others.
    """
    discrete = {site: "lattice_walk" if site in endless else "gibbs" for site in are_discrete}
    return {site: discrete[site] if is_discrete else continuous for site, is_discrete in are_discrete.items()}


@record("groups", "members")
class BySite(AbstractKernel):
    r"""A kernel for each latent site of a model, or each member of a mixed event: they move in turn, each given all others.

    Sites that have the same name, or the same object, as their kernel move together. Each kernel leaves the conditional
    density of its sites invariant, so the transition leaves their joint density invariant. A warm-up adapts each kernel to
    its own acceptance. The state of a kernel is built anew at each transition, since the other sites have moved: this costs
    one more gradient of a kernel that takes them, and "ghmc" draws a new momentum.

    ``sample(..., kernel={...})``, ``BlackJAXKernel(model, {...})`` and ``estimate(..., kernel={...})`` take the mapping
    itself. For an event with discrete and continuous members (`Blocks`, or the sites that a factor joins) the sites are its
    members. An estimator adapts the step size of one kernel; sites with the same name of a kernel share it. The acceptance
    rate of the record is that of the only kernel whose step size adapts, and the mean over the kernels that reject if there
    are several or none.

    Args:
        kernels: for each site, a name or a kernel.

    Raises:
        EnergyError: for no kernels, an unknown name, and parallel tempering; at the first use for a mapping that has not
            exactly the latent sites of the model or the members of the event, for a kernel that does not fit its site, for a
            discrete kernel with gradients on a mixed event, and for a distribution of another event.

    Example:
        ``sample(rng_key, model, {"x": "nuts", "s": "gibbs"})``, or
        ``estimate(model, "cd", kernel={"x": "mala", "s": "gibbs"})``

    References:
        Geman and Geman, Stochastic relaxation, Gibbs distributions, and the Bayesian restoration of images (1984); Tierney,
        Markov chains for exploring posterior distributions (1994).
    """

    name: ClassVar[str] = "by_site"
    is_discrete: ClassVar[bool | None] = None  # pyright: ignore[reportIncompatibleVariableOverride]
    takes_gradients: ClassVar[bool] = False  # of its own: those of its kernels are theirs
    kernels: tuple[Any, ...]
    groups: tuple[tuple[str, ...], ...]
    members: Members | None

    def __init__(self, kernels: Mapping[str, Any]):
        if not kernels:
            raise EnergyError("BySite needs a kernel for each latent site. Write BySite({'x': 'nuts', 's': 'gibbs'}).")
        together: dict[Any, list[str]] = {}
        for site, kernel in kernels.items():
            together.setdefault(kernel if isinstance(kernel, str) else id(kernel), []).append(site)
        groups = tuple(tuple(sorted(sites)) for sites in together.values())
        object.__setattr__(self, "kernels", tuple(MOVES.resolve(kernels[sites[0]]) for sites in groups))
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "members", None)

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
    def target_acceptance(self) -> float | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The target acceptance of the only kernel with a step size, if it adapts; None otherwise."""
        each = [kernel for kernel in self.kernels if kernel.step_size is not None]
        return each[0].target_acceptance if len(each) == 1 else None

    @property
    def step_exponent(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The step exponent of the only kernel with a step size."""
        each = [kernel for kernel in self.kernels if kernel.step_size is not None]
        return each[0].step_exponent if len(each) == 1 else AbstractKernel.step_exponent

    def adapted(self, **settings: PyTree) -> "BySite":
        """Return the same with adapted settings of the only kernel with a step size."""
        return self.joined(tuple(k if k.step_size is None else k.adapted(**settings) for k in self.kernels))

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
        return rebuilt(type(self), {"kernels": kernels, "groups": self.groups, "members": self.members})

    def split(self, position: Position) -> list[Position]:
        """Return the sites of each kernel."""
        return [{site: position[site] for site in group} for group in self.groups]

    @property
    def continuous(self) -> Bool[np.ndarray, " d"] | None:
        """Which numbers of a mixed event are continuous; None for the latents of a model."""
        return None if self.members is None else self.members.is_continuous

    def as_positions(self, tree: PyTree) -> PyTree:
        """Cast each site to its kernel's type, and a mixed event to floating-point numbers."""
        return self._each("as_positions", tree) if isinstance(tree, Mapping) else jnp.asarray(tree, float)

    def as_draws(self, tree: PyTree) -> PyTree:
        """Return positions as draws of the target; those of a mixed event are its unconstrained vector."""
        return self._each("as_draws", tree) if isinstance(tree, Mapping) else tree

    def lift(self, position: Position) -> Position:
        """Return the members of a mixed event by name; the latents of a model are by name already."""
        return position if self.members is None else self.as_positions(self.members.split(cast(Array, position)))

    def lower(self, position: Position) -> Position:
        """Return the vector of a mixed event."""
        return position if self.members is None else self.members.join(cast(Mapping[str, Array], position))

    def bind(self, distribution: Any) -> Any:
        """Return the same with each kernel bound to its sites.

        Raises:
            EnergyError: for a distribution whose event has no members, and for kernels that do not fit the members.
        """
        pairs = zip(self.kernels, self.groups, strict=True)
        bound = self.joined(tuple(kernel.bind(distribution.part(group)) for kernel, group in pairs))
        members: Members | None = getattr(distribution, "members", None)
        if members is not None:
            self.check(members.kinds, "the members of the event", members.endless)
            self._check_gradients()
            object.__setattr__(bound, "members", members)
        return bound

    def check(self, are_discrete: Mapping[str, bool], whole: str, endless: Collection[str] = ()) -> None:
        """Check that the kernels are those of these sites, each on its kind of support.

        Args:
            are_discrete: by site, whether it is discrete.
            whole: what the sites are, for messages.
            endless: the discrete sites without a largest value.

        Raises:
            EnergyError: for a site without a kernel, a kernel of another site, and one that cannot move its site.
        """
        usual = usual_kernels(are_discrete, endless=endless)
        if self.sites != tuple(sorted(usual)):
            raise EnergyError(
                f"kernel= names the sites {list(self.sites)}, and {whole} are {sorted(usual)}. Name a kernel for each of "
                f"them: kernel={usual}."
            )
        for kernel, sites in zip(self.kernels, self.groups, strict=True):
            for site in sites:
                if kernel.is_discrete not in (are_discrete[site], None):
                    kind = "discrete" if are_discrete[site] else "continuous"
                    raise EnergyError(
                        f"The kernel '{kernel.name}' cannot move '{site}', which is {kind}. Write '{usual[site]}' for it."
                    )

    def init(self, rng_key: PRNGKey, position: Position, log_density: ChainLogDensityFn) -> PyTree:
        """Evaluate the log density at the position."""
        return BySiteState(position, log_density(self.lower(position)))

    def step(self, rng_key: PRNGKey, state: PyTree, log_density: ChainLogDensityFn) -> tuple[PyTree, TransitionInfo]:
        """Move the sites of each kernel given all others."""
        position, logdensity, details = dict(state.position), state.logdensity, []
        keys = jax.random.split(rng_key, (len(self.kernels), 2))
        for kernel, own, (key_init, key_step) in zip(self.kernels, self.split(position), keys, strict=True):

            def conditional(part, others=position):
                return log_density(self.lower({**others, **part}))

            moved, detail = kernel.step(key_step, kernel.init(key_init, own, conditional), conditional)
            position = {**position, **moved.position}
            logdensity = getattr(moved, "logdensity", None)
            details.append(detail)
        logdensity = log_density(self.lower(position)) if logdensity is None else logdensity
        return BySiteState(position, jnp.asarray(logdensity, state.logdensity.dtype)), self._combined(details)

    def _combined(self, details: list[TransitionInfo]) -> TransitionInfo:
        pairs = list(zip(self.kernels, details, strict=True))
        rejecting = [d for k, d in pairs if "acceptance_rate" in k.statistics]
        if self.target_acceptance is not None:  # what the step size adapts to
            rejecting = [d for k, d in pairs if k.step_size is not None]
        rates = [d.acceptance_rate for d in rejecting or details]
        whole = info(
            sum(rates) / len(rates),
            jnp.any(jnp.stack([d.is_divergent for d in details])),
            sum(d.num_gradients for d in details),
            is_nonfinite=jnp.any(jnp.stack([d.is_nonfinite for d in details])),
        )
        return whole._replace(parts=tuple(details))

    def _check_gradients(self) -> None:
        """Refuse gradients in the discrete members of a mixed event, which its energy gets as integers."""
        for kernel, sites in zip(self.kernels, self.groups, strict=True):
            if kernel.relaxes:
                raise EnergyError(
                    f"'{kernel.name}' takes gradients in the discrete members {list(sites)}, and an energy gets them as "
                    "integers in a mixed event. Write 'gibbs' or 'flips'."
                )

    def _each(self, method: str, tree: PyTree) -> PyTree:
        pairs = zip(self.kernels, self.split(tree), strict=True)
        return {site: leaf for kernel, own in pairs for site, leaf in getattr(kernel, method)(own).items()}
