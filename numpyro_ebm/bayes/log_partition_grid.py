"""A surrogate of log Z: values and slopes on a grid of parameters, with cubics between them."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Shaped

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.energies import AbstractEnergy, summable
from numpyro_ebm._core.errors import EnergyError, UnreliableLogPartitionWarning, nearest
from numpyro_ebm._core.numpyro_stack import is_in_model, rows_of_plates
from numpyro_ebm._core.pytrees import check_pickles
from numpyro_ebm._core.records import record
from numpyro_ebm._core.typing import Array, ArrayLike, PRNGKey, PyTree, Scalar
from numpyro_ebm.bayes._hermite import Axis, derivatives, interpolate, largest_of_cell, leave_out_errors
from numpyro_ebm.distributions.energy import EnergyDistribution
from numpyro_ebm.partition import AbstractPartition, Enumeration
from numpyro_ebm.partition.family import with_slopes
from numpyro_ebm.partition.names import METHODS

OWNER = "log_partition_grid"
MOST_DIMENSIONS = 3
"""Parameters of the largest grid; the number of nodes grows as its power."""
FEWEST_NODES = 5
"""Along each axis: every second one of them are three, enough for differences of second order at the ends."""
MOST_TERMS = 2**20
"""Terms of a known log Z up to which it is summed by default."""
GAIN = 4.0
"""Share of the error of a grid of twice the spacing: 16 for smooth log Z, and less where it bends within one cell."""
LARGEST_ERROR = 0.2
"""Error of a log likelihood, in nats, from which on the posterior may change by a visible share of its width."""
ROUNDING = 1e-4
"""Distance beyond an edge, in spacings, that counts as rounding: priors that end there draw such values."""
STEEPEST = 8 / 27
"""Largest sum of the weights of two slopes of 1 in a cubic, at the middle of a cell of width 1: 1/8 each, 4/27 at most."""

EnergyOf: TypeAlias = Callable[..., AbstractEnergy | EnergyDistribution]
"""``energy_of(J=..., h=...)`` returns the energy at one set of parameters, a scalar each."""


@record("energy_of", "axes", "method", eq=False)
class LogPartitionGrid:
    r"""Log Z as a smooth function of one to three parameters, made by `log_partition_grid`.

    Called with the parameters by name, it returns log Z in nats, differentiable, under ``jit`` and ``vmap``. Between the
    nodes of a regular grid it is a product of cubics in each parameter that agree with log Z and its slopes at the nodes,
    so that the value and the gradient are continuous. The likelihood of ``n`` rows contains ``n log Z``, and ``n`` times
    its error.

    Beyond the grid log Z is infinite, so that the density is 0 there, and a posterior is that of the prior restricted to
    the grid. Outside of a model, values that are known and lie beyond the grid raise.

    Attributes:
        energy_of: the function that returns the energy.
        axes: the nodes along each parameter, by name.
        method: name of the method that evaluated the nodes.
        table: derivatives at the nodes, of order 0 and 1 along each axis.
        standard_error: standard error of log Z at the nodes, in nats; rounding for an exact method.
        slope_error: standard errors of the slopes, one array per parameter; 0 for an exact method.
        interpolation_error: bound on the error around each node, in nats: a quarter of that of a grid without every second
            node along each axis, which is known at the nodes left out. Cubics gain a factor of 16, less where log Z bends
            within one cell.

    Example:
        See `log_partition_grid`.
    """

    energy_of: EnergyOf
    axes: tuple[tuple[str, Axis], ...]
    method: str
    table: Float[Array, "..."]
    standard_error: Float[Array, "*nodes"]
    slope_error: dict[str, Float[Array, "*nodes"]]
    interpolation_error: Float[Array, "*nodes"]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters."""
        return tuple(name for name, _ in self.axes)

    @property
    def values(self) -> Float[Array, "*nodes"]:
        """Log Z at the nodes."""
        return self.table[(0,) * len(self.axes)]

    @property
    def errors(self) -> Float[Array, "*nodes"]:
        """Bound on the error around each node: that of the interpolation and the standard errors of values and slopes."""
        slopes = sum(axis.step * self.slope_error[name] for name, axis in self.axes)
        return self.interpolation_error + self.standard_error + STEEPEST * slopes

    def __call__(self, **theta: ArrayLike) -> Float[Array, "*batch"]:
        """Return log Z at parameters of any shapes that broadcast; infinite outside of the grid.

        Raises:
            EnergyError: for unknown or missing names and, outside of a model, for known values beyond the grid.
        """
        return self._at_points(lambda axes, point: interpolate(axes, self.table, point), theta)

    def error(self, **theta: ArrayLike) -> Float[Array, "*batch"]:
        """Return a bound on the error of log Z near parameters, in nats; infinite outside of the grid.

        A posterior is right if ``num_rows * log_z.error(**posterior.get_samples())`` is far below 1 for its draws.

        Raises:
            EnergyError: as the call.
        """
        errors = self.errors
        return self._at_points(lambda axes, point: largest_of_cell(axes, errors, point), theta)

    def distribution(self, **theta: ArrayLike) -> EnergyDistribution:
        """Return the normalised distribution ``exp(-E(x; theta) - log Z(theta))``, for any NumPyro inference.

        In a plate, parameters of the plate's shape give each row its own. Draws are those of the energy's own sampler.

        Raises:
            EnergyError: as the call.

        Warns:
            UnreliableLogPartitionWarning: if the median error of the grid times the number of rows of the enclosing plates
                exceeds 0.2 nats. See `error` for that near the posterior.
        """
        columns = self._columns(theta)
        self._check_error(rows_of_plates())
        shape = jnp.broadcast_shapes(*(jnp.shape(each) for each in columns.values()))
        if not shape:
            energy = distribution_of(self.energy_of, columns)
            normalized = functools.partial(_normalized, energy, self(**columns))
            return _normalized_like(energy, normalized, sampler=functools.partial(_sample_of, energy))
        rows = {name: jnp.broadcast_to(each, shape) for name, each in columns.items()}
        first = distribution_of(self.energy_of, {name: each.reshape(-1)[0] for name, each in rows.items()})
        normalized = functools.partial(_normalized_row, self.energy_of)
        return _normalized_like(first, normalized, sampler=first.sampler, context=(rows, self(**rows)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by value, and the function by name.

        Raises:
            TypeError: for a lambda or a local function, with what to write.
        """
        check_pickles("LogPartitionGrid", [self.energy_of])
        return super().__reduce_ex__(protocol)

    def __repr__(self) -> str:
        """Return the axes and the errors as a table."""
        lines = [f"log Z by '{self.method}' on a grid"]
        for name, axis in self.axes:
            lines.append(f"  {name:12} {axis.low:>8.4g} to {axis.high:<8.4g} {axis.num} nodes")
        middle, largest = float(jnp.median(self.errors)), float(jnp.max(self.errors))
        lines.append(f"  error        {middle:>8.2g} nats in the median, {largest:.2g} at most")
        return "\n".join(lines)

    def _at_points(self, evaluate: Callable[[tuple[Axis, ...], Array], Scalar], theta: Mapping[str, ArrayLike]) -> Array:
        """Evaluate a function of a point inside the grid at parameters that broadcast; infinite outside of the grid."""
        columns = jnp.broadcast_arrays(*self._columns(theta).values())
        axes = tuple(axis for _, axis in self.axes)
        low, high, step = (jnp.asarray([getattr(axis, end) for axis in axes]) for end in ("low", "high", "step"))

        def at(point):
            is_inside = jnp.all((point >= low - ROUNDING * step) & (point <= high + ROUNDING * step))
            return jnp.where(is_inside, evaluate(axes, jnp.clip(point, low, high)), jnp.inf)

        points = jnp.stack([column.reshape(-1) for column in columns], axis=-1)
        return jax.vmap(at)(points).reshape(columns[0].shape)

    def _columns(self, theta: Mapping[str, ArrayLike]) -> dict[str, Float[Array, "..."]]:
        """Return the parameters as arrays in the order of the axes, after a check of names and of known values."""
        for name in theta:
            if name not in self.names:
                raise EnergyError(f"The grid of log Z has no parameter '{name}'. {nearest(name, self.names)}")
        missing = [name for name in self.names if name not in theta]
        if missing:
            raise EnergyError(f"The grid of log Z needs {', '.join(self.names)}; {missing} have no value.")
        for name, axis in self.axes:
            _check_inside(name, axis, theta[name])
        return {name: jnp.asarray(theta[name], float) for name in self.names}

    def _check_error(self, num_rows: int) -> None:
        if not is_concrete(self.interpolation_error, self.standard_error, self.slope_error):
            return
        with eager(self.interpolation_error):
            error, interpolation = float(jnp.median(self.errors)), float(jnp.median(self.interpolation_error))
        if num_rows * error <= LARGEST_ERROR:
            return
        cause = "a finer grid" if 2 * interpolation > error else "more chains or levels of the method"
        warnings.warn(
            f"The grid of log Z has a median error of {error:.2g} nats, and the likelihood of {num_rows} rows contains it "
            f"{num_rows} times: more than {LARGEST_ERROR} nats in all, which may change the posterior. Use {cause}, or a "
            "grid that is closer around the posterior.",
            UnreliableLogPartitionWarning,
            stacklevel=3,
        )


def log_partition_grid(
    rng_key: PRNGKey | None,
    energy_of: EnergyOf,
    grid: Mapping[str, tuple[float, float, int]],
    *,
    method: str | AbstractPartition | None = None,
    **options: Any,
) -> LogPartitionGrid:
    r"""Evaluate log Z and its slopes on a grid of one to three parameters, for a surrogate between the nodes.

    The posterior of an energy's parameters needs log Z at each of them. Computed once on a grid, it is then as cheap as any
    other term of a NumPyro model, and stock NUTS runs on it. The slopes are

    .. math:: \partial_\theta \log Z(\theta) = -E_{p(x; \theta)}[\partial_\theta E(x; \theta)]

    The error of the interpolation falls with the fourth power of the spacing, and is estimated (see `LogPartitionGrid`).
    Put the grid where the posterior is: a wide grid wastes nodes, and the edges cut the prior off.

    Args:
        rng_key: random key; None is enough for an exact method.
        energy_of: ``energy_of(J=..., h=...)``, which returns an `EnergyDistribution` or a ready-made energy, with the same
            event and support at all parameters.
        grid: for each parameter its lowest and its highest node and their number, odd and at least 5.
        method: a method of `log_partition`, by name or as an object: "enumerate" and "grid" are exact; "ais", "smc" and
            "importance" end with draws over which the slopes are means. None for "enumerate" if the energy knows its log Z
            (in at most 2**20 terms), and for "ais" otherwise.
        **options: the method's options, if it is a name.

    Returns:
        `LogPartitionGrid`.

    Raises:
        EnergyError: (a ValueError) for a grid of another form, a method that has neither slopes nor draws, an energy with
            one log Z per row, and where log Z is not finite, naming the node.
        TypeError: for an ``energy_of`` that returns something else.

    Warns:
        UnreliableLogPartitionWarning: as `log_partition`, and if the median error of the grid exceeds 0.2 nats.

    Example:
        >>> from numpyro_ebm.energies import Graph, Ising
        >>> def energy(J, h):
        ...     return Ising(Graph.lattice(3, 3), J, h)
        >>> log_z = log_partition_grid(None, energy, {"J": (-0.2, 1.0, 13), "h": (-0.6, 0.6, 13)})
        >>> def model(s):
        ...     J = numpyro.sample("J", dist.Uniform(-0.2, 1.0))
        ...     h = numpyro.sample("h", dist.Uniform(-0.6, 0.6))
        ...     with numpyro.plate("rows", len(s)):
        ...         numpyro.sample("s", log_z.distribution(J=J, h=h), obs=s)

    References:
        Bazahica, Avalos-Pacheco, Moores and Roininen, Efficient amortized Bayesian inference for Markov random fields via
        gradient-informed grid selection (2026); Gelman and Meng, Simulating normalizing constants: from importance
        sampling to bridge sampling to path sampling (1998).
    """
    axes = _axes_of(grid)
    mesh = jnp.meshgrid(*(axis.nodes for axis in axes.values()), indexing="ij")
    points = {name: each.reshape(-1) for name, each in zip(axes, mesh, strict=True)}
    place = lambda index: " at " + ", ".join(f"{name} = {float(each[index]):.4g}" for name, each in points.items())  # noqa: E731
    family = lambda point: distribution_of(energy_of, point)  # noqa: E731
    chosen = _method_of(method, options, family({name: each[0] for name, each in points.items()}))
    found = with_slopes(OWNER, rng_key, chosen, family, points, place)
    values, errors = (leaf.reshape(mesh[0].shape) for leaf in found.log_z[:2])
    slopes, slope_errors = ({k: v.reshape(values.shape) for k, v in each.items()} for each in found[1:])
    made = _surrogate(energy_of, axes, chosen.name, values, slopes, errors, slope_errors)
    made._check_error(1)
    return made


def distribution_of(energy_of: EnergyOf, point: Mapping[str, Scalar]) -> EnergyDistribution:
    """Return the energy at a point as a distribution.

    Raises:
        TypeError: if the function returns something else.
    """
    energy = energy_of(**point)
    if isinstance(energy, AbstractEnergy):
        return EnergyDistribution(energy)
    if isinstance(energy, EnergyDistribution):
        return energy
    raise TypeError(
        f"{OWNER} needs a function of {', '.join(point)} that returns an EnergyDistribution or a ready-made energy; it "
        f"returned {type(energy).__name__}. Write lambda {', '.join(point)}: numpyro_ebm.EnergyDistribution(energy, "
        "event_shape)."
    )


def _surrogate(energy_of, axes: dict[str, Axis], method: str, values, slopes, errors, slope_errors) -> LogPartitionGrid:
    along = jnp.stack([slopes[name] for name in axes])
    nodes = tuple(axes.values())
    interpolation = leave_out_errors(nodes, values, along) / GAIN
    table = derivatives(nodes, values, along)
    return LogPartitionGrid(energy_of, tuple(axes.items()), method, table, errors, slope_errors, interpolation)  # pyright: ignore[reportCallIssue]


def _axes_of(grid: object) -> dict[str, Axis]:
    write = "Write {'J': (-0.2, 1.0, 13)}: the lowest node, the highest one and their number, odd and at least 5."
    if not isinstance(grid, Mapping) or not 1 <= len(grid) <= MOST_DIMENSIONS:
        raise EnergyError(f"{OWNER} needs a grid of one to three parameters by name; got {grid!r}. {write}")
    axes = {}
    for name, given in grid.items():
        numbers = np.asarray(given, object)
        if numbers.shape != (3,) or not all(np.isscalar(each) and np.isfinite(each) for each in given):
            raise EnergyError(f"{OWNER} got {given!r} for '{name}'. {write}")
        low, high, num = float(given[0]), float(given[1]), given[2]
        if not low < high or int(num) != num or num < FEWEST_NODES or num % 2 == 0:
            raise EnergyError(f"{OWNER} got {given!r} for '{name}'. {write}")
        axes[name] = Axis(low, (high - low) / (int(num) - 1), int(num))
    return axes


def _method_of(
    method: str | AbstractPartition | None, options: dict[str, Any], energy: EnergyDistribution
) -> AbstractPartition:
    if method is not None:
        return METHODS.resolve(method, **options)
    known = summable(energy.ready_energy)
    is_few = known is not None and known.num_terms is not None and known.num_terms <= MOST_TERMS
    return METHODS.resolve(Enumeration.name if is_few else "ais", **options)


def _check_inside(name: str, axis: Axis, value: ArrayLike) -> None:
    if is_in_model() or not is_concrete(value):  # a model is also run at draws of the prior, to find its sites
        return
    values, reach = np.asarray(value, float), ROUNDING * axis.step
    outside = values[~((values >= axis.low - reach) & (values <= axis.high + reach))]
    if outside.size:
        low, high = min(axis.low, float(outside.min())), max(axis.high, float(outside.max()))
        raise EnergyError(
            f"{name} = {outside.flat[0]:.4g} lies outside of the grid of log Z, {axis.low:.4g} to {axis.high:.4g}. Make the "
            f"grid wider, {{'{name}': ({low:.4g}, {high:.4g}, {axis.num + 4})}}, or give {name} a prior inside it."
        )


def _normalized(distribution: EnergyDistribution, log_z: Scalar, event: Shaped[Array, "*event"]) -> Scalar:
    """Return the energy of an event plus log Z; the base of the distribution, if there is one, is part of the energy."""
    local = jax.tree.map(lambda leaf: leaf[0], distribution.rows(event, ()).local)
    return log_z - distribution.log_density(event, local)


def _normalized_row(energy_of: EnergyOf, event: Shaped[Array, "*event"], context: PyTree) -> Scalar:
    """Return the energy of an event plus log Z, given the parameters and log Z of its row."""
    theta, log_z = context
    return _normalized(distribution_of(energy_of, theta), log_z, event)


def _sample_of(like: EnergyDistribution, rng_key: PRNGKey, distribution: Any, sample_shape: tuple[int, ...]) -> Array:
    """Draw from an equal distribution, whose sampler knows the structure of the energy."""
    return like.expand(distribution.batch_shape).sample(rng_key, sample_shape)


def _normalized_like(
    like: EnergyDistribution, energy: Callable[..., Scalar], *, sampler: Callable[..., Array], context: PyTree = None
) -> EnergyDistribution:
    batch_shape = () if context is None else jnp.shape(context[1])
    options = {"context": context, "batch_shape": batch_shape, "support": like.support, "sampler": sampler}
    return EnergyDistribution(energy, like.event_shape, normalized=True, **options)
