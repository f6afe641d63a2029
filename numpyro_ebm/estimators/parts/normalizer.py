"""The log normaliser of the contrastive estimators: a parameter, a latent with a prior, or 0."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Bool, Float

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.typing import Array
from numpyro_ebm.distributions.rows import unwrap
from numpyro_ebm.distributions.site import Site

LogNormalizer = Literal["learned", "fixed"]
WRITE_PRIOR = "Write log_normalizer=numpyro.distributions.Normal(0, 10), a prior of log Z, which is then a latent"


def learned_normalizer(
    site: Site,
    choice: LogNormalizer | dist.Distribution | None,
    at_data: Float[Array, "*shape {site.num_rows}"],
    at_noise: Float[Array, "*shape {site.num_rows}"],
) -> Float[Array, "*shape"]:
    """Return ``log Z``: one parameter of the site, one latent if the choice is a prior, or 0 if the energy contains it.

    The parameter starts at the value at which the classifier cannot tell the first batch from its noise: half way between
    the medians of the log ratios at both. From 0 it would have to move some units per dimension at the optimiser's rate,
    while the classifier is saturated and the energy's parameters move in its place.

    Args:
        site: the rows.
        choice: the user's choice, or None.
        at_data: log ratios of unnormalised densities at the rows, ``(*shape, num_rows)``, where ``shape`` is that of the
            parameter.
        at_noise: the same at what each row is compared with, of the same shape.

    Raises:
        EnergyError: if the rows have a context or a base of their own and nothing is chosen; and for a parameter under an
            inference that does not train it, or whose width would not include it.
    """
    if choice is None and site.rows_differ:
        raise EnergyError(
            "Each row has a context or a base of its own, so log Z is a function of the row, and one number cannot "
            "replace it. Write estimate(model, 'ranking_nce') or estimate(model, 'cd'), which do not need log Z; "
            "or add a term b(context) to the energy that can become log Z and write log_normalizer='fixed'; or, only "
            "if log Z is the same for every row (a context that shifts the density), log_normalizer='learned'."
        )
    if choice == "fixed":
        return jnp.zeros(at_data.shape[:-1])
    if isinstance(choice, dist.Distribution):
        latent: Any = numpyro.sample(name_of(site), choice)
        return latent
    user = numpyro_stack.user_of_value()
    if user == numpyro_stack.SAMPLER or user in numpyro_stack.POSTERIOR_GUIDES:
        raise EnergyError(
            f"Under log_normalizer='learned' log Z is a numpyro.param, which {user} takes as known. {WRITE_PRIOR} like the "
            "others, or log_normalizer='fixed' for an energy that contains it."
        )

    def start(_):
        middle = jnp.mean(_median(jnp.stack([at_data, at_noise]), site.mask), axis=0)
        return jax.lax.stop_gradient(jnp.where(jnp.isfinite(middle), middle, 0.0)).astype(float)

    value: Any = numpyro.param(name_of(site), start)
    return value


def name_of(site: Site) -> str:
    """Return the name of a site's log normaliser."""
    return f"{site.name}$log_normalizer"


def _median(values: Float[Array, "*batch rows"], mask: Bool[Array, " rows"] | None) -> Float[Array, "*batch"]:
    """Return the median, on the last axis, of the rows that take part; infinite if there are none, and never NaN."""
    takes_part = jnp.ones(values.shape[-1], bool) if mask is None else mask
    ordered = jnp.sort(jnp.where(takes_part, values, jnp.inf), axis=-1)
    last = jnp.maximum(jnp.sum(takes_part) - 1, 0)
    return (ordered[..., last // 2] + ordered[..., (last + 1) // 2]) / 2


def check_normalizer(owner: str, choice: object, *, takes_prior: bool = True) -> None:
    """Check that a choice of `learned_normalizer` is known, or a prior of one real number.

    Raises:
        EnergyError: with the known choices, and for a prior of another shape, or of discrete numbers.
        TypeError: for a distribution's class.
    """
    if choice is None or (isinstance(choice, str) and choice in get_args(LogNormalizer)):
        return
    if isinstance(choice, type):
        raise TypeError(f"{owner} got the class {choice.__name__} as log_normalizer. {WRITE_PRIOR}.")
    if not (isinstance(choice, dist.Distribution) and takes_prior):
        told = f" {WRITE_PRIOR}." if takes_prior else ""
        raise EnergyError(f"{owner} has no log_normalizer {choice!r}. {nearest(str(choice), get_args(LogNormalizer))}{told}")
    if choice.batch_shape or choice.event_shape:
        raise EnergyError(
            f"log Z is one number for all rows, and the prior log_normalizer={type(choice).__name__} has batch shape "
            f"{choice.batch_shape} and event shape {choice.event_shape}. {WRITE_PRIOR}."
        )
    if choice.support is None or choice.support.is_discrete or unwrap(choice) is not None:
        raise EnergyError(
            f"log Z is a real number, and the prior log_normalizer={type(choice).__name__} is no normalised density of one "
            f"(its support is {choice.support}). {WRITE_PRIOR}."
        )
