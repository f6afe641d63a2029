"""`Empirical`: a base that is known only through its rows."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.typing import ArrayLike
from jaxtyping import Float
from numpyro.distributions import constraints

from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.inputs import as_arrays
from numpyro_ebm._core.typing import Array, PRNGKey


class Empirical(dist.Distribution):
    r"""Rows as a base, for density ratios: draws are rows, and the density is not known.

    An energy over this base models a ratio, :math:`\exp(-E(x)) / Z = p(x) / p_0(x)`, where ``p_0`` is the distribution of
    the rows. The contrastive estimators whose noise is the base ("nce", "ranking_nce", "bregman_nce" without ``noise``)
    classify the data against the rows; they need only draws, since the density cancels. Everything else that needs the
    density raises.

    Args:
        rows: array of shape ``(num_rows, *event_shape)``.
        support: the constraint of one element, or of one event.

    Raises:
        EnergyError: if there are no rows, or rows that are not finite or not inside the support.

    Example:
        ::

            ratio = EnergyDistribution(net, (11,), base=Empirical(white))
            with numpyro.plate("rows", len(red)):
                numpyro.sample("x", ratio, obs=red)
            # Under estimate(model, "nce"), -net(x) - log Z becomes the log ratio of red's density to white's.

    References:
        Gutmann and Hyvarinen, Noise-contrastive estimation of unnormalized statistical models (2012); Sugiyama, Suzuki and
        Kanamori, Density ratio estimation in machine learning (2012).
    """

    arg_constraints = {}
    pytree_data_fields = ("rows", "_support")

    def __init__(
        self, rows: object, support: constraints.Constraint = constraints.real, *, validate_args: bool | None = None
    ):
        self.rows = jnp.asarray(as_arrays("Empirical", rows), float)
        if self.rows.ndim == 0 or len(self.rows) == 0:
            raise EnergyError(f"Empirical needs rows, of shape (num_rows, *event_shape); got shape {self.rows.shape}.")
        extra = self.rows.ndim - 1 - support.event_dim
        self._support = constraints.independent(support, extra) if extra > 0 else support
        _check_inside(self.rows, self._support)
        super().__init__((), self.rows.shape[1:], validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """The constraint of one event."""
        return self._support  # pyright: ignore[reportReturnType]

    def sample(self, key: PRNGKey | None, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw rows with replacement.

        Args:
            key: random key.
            sample_shape: shape of independent draws.

        Raises:
            EnergyError: without a key.
        """
        if key is None:
            raise EnergyError("Empirical.sample needs a random key. Inside a model, write numpyro.handlers.seed(model, 0).")
        return self.rows[jax.random.randint(key, sample_shape, 0, len(self.rows))]

    def log_prob(self, value: ArrayLike, intermediates: list[Any] | None = None) -> NoReturn:
        """Raise, because the density is not known.

        Raises:
            EnergyError: always.
        """
        raise EnergyError(
            "The density of Empirical rows is not known. It cancels in 'nce', 'ranking_nce' and 'bregman_nce' without "
            "noise=..., where the rows are base and noise: estimate(model, 'nce'). For values, fit a density to the rows."
        )


def _check_inside(rows: Float[Array, " rows *event"], support: constraints.Constraint) -> None:
    """Refuse concrete rows that cannot be noise: draws outside the support are not counted, which would bias log Z."""
    if not is_concrete(rows):
        return
    with eager(rows):
        inside = support(rows) & jnp.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        if not support.is_discrete:
            positions = dist.biject_to(support).inv(rows)
            inside &= jnp.isfinite(positions).reshape(len(rows), -1).all(axis=1)
        bad = np.flatnonzero(~np.asarray(inside))
    if bad.size:
        row = int(bad[0])
        raise EnergyError(
            f"Row {row} of Empirical is {rows[row]} ({bad.size} such rows): it must be finite, inside the support "
            f"{support} and off its boundary. Leave such rows out, or write Empirical(rows, support)."
        )
