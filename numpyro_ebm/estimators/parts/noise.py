"""Shared by the estimators that classify data against noise: each row's noise, its draws, and log ratios to it."""

import dataclasses
import warnings
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Bool, Float, Shaped

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.autodiff import freeze
from numpyro_ebm._core.concrete import eager, is_concrete
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.known import freeze_tree
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, RowValues
from numpyro_ebm.distributions.empirical import Empirical
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.supports import check_same_support
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.fitted_marginals import FittedMarginals, fit_marginals
from numpyro_ebm.estimators.parts.fitted_noise import FittedNoise, fit_noise
from numpyro_ebm.estimators.parts.generator import Generator, context_of

Fitted = Literal["gaussian", "mixture", "marginals"]

NUM_TYPICAL = 1000
"""Fewest noise draws in the check for overlap: fewer would warn by chance, more would miss noise that hardly overlaps."""
WIDER = "Write wider noise, e.g. noise=numpyro.distributions.Normal(mean, 2 * sd)."
NEARER = (
    "Write noise around the data, noise='gaussian' (fitted to the batch) or numpyro.distributions.Normal(data.mean(0), "
    "data.std(0)).to_event(1)."
)


class LogRatios(NamedTuple):
    """Log ratios of unnormalised model density to noise density, ``log w = log p~ - log q``.

    Attributes:
        data: at the rows, ``(num_rows,)``.
        noise: at each row's noise draws, ``(nu, num_rows)``.
        is_inside: ``(nu, num_rows)``, which draws count: a draw rounded to the edge of the support has no density there.
        learning: ``(num_rows,)``, zeros whose gradient fits a noise model's parameters to the data.
    """

    data: Float[Array, " rows"]
    noise: Float[Array, "nu rows"]
    is_inside: Bool[Array, "nu rows"]
    learning: Float[Array, " rows"]


class Noise(NamedTuple):
    """A site's noise: draws ``(num, num_rows, *event_shape)``, and log densities, each under its row's distribution."""

    sample: Callable[[PRNGKey, int], Shaped[Array, "num rows *event"]]
    log_prob: Callable[[Shaped[Array, "num rows *event"]], Float[Array, "num rows"]]


@dataclasses.dataclass(frozen=True)
class NoiseEstimator(AbstractEstimator):
    """An estimator that compares each row with ``nu`` draws of noise, new ones each time or those of ``noise_seed``."""

    role = "objective"
    nu: int = 1
    noise: Any = None
    noise_seed: int | None = dataclasses.field(default=None, kw_only=True)

    @property
    def is_deterministic(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise set is fixed."""
        return self.noise_seed is not None

    @property
    def holds_noise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise set is fixed."""
        return self.noise_seed is not None

    def __post_init__(self):
        check_count(type(self).__name__, "nu", self.nu)
        if isinstance(self.noise, str) and self.noise not in get_args(Fitted):
            raise EnergyError(f"Unknown noise '{self.noise}'. {nearest(self.noise, get_args(Fitted))}")
        is_known = self.noise is None or isinstance(self.noise, str | dist.Distribution) or callable(self.noise)
        if not is_known or isinstance(self.noise, type):
            came = f"the class {self.noise.__name__}" if isinstance(self.noise, type) else type(self.noise).__name__
            raise TypeError(
                f"{type(self).__name__} needs noise as a numpyro distribution, e.g. Normal(0, 1), 'gaussian', 'mixture', "
                f"'marginals' or a NumPyro model of one event; got {came}."
            )
        if self.noise_seed is not None:
            self._check_can_be_fixed()

    def check(self, site: Site) -> None:
        """Check that the noise fits the site, and warn of noise from which nothing can be learned."""
        super().check(site)
        if self.noise_seed is not None:
            self._check_stays(site)
        noise = self.noise if self.noise is not None else site.distribution.reference
        if not isinstance(noise, dist.Distribution):
            return
        if self.noise is not None:  # the reference fits by construction
            _check_fits(noise, site)
        if isinstance(noise, Empirical):
            self._is_relative(site)
        elif is_concrete(site.value, site.mask, noise):
            with eager():
                _check_overlap(_of_distribution(noise, site), site)

    def log_ratios(self, rng_key: PRNGKey | None, site: Site) -> LogRatios:
        """Return the log ratios of model to noise at the rows and at the noise draws, fresh or fixed by ``noise_seed``."""
        key = self._key(rng_key, site)
        noise, learning = self.resolve(key, site)
        draws = noise.sample(key, self.nu).astype(site.value.dtype)
        inside = jax.vmap(jax.vmap(site.distribution.is_inside))(draws)
        takes_part = inside if site.mask is None else inside & site.mask
        wide = (...,) + (None,) * (site.value.ndim - 1)
        events = jnp.concatenate([site.value[None], jnp.where(takes_part[wide], draws, site.value)])
        ratios = self._ratios(noise, events, site)
        return LogRatios(ratios[0], ratios[1:], inside, learning)

    def _key(self, rng_key: PRNGKey | None, site: Site) -> PRNGKey:
        """Return the key of the noise: a fixed noise set has its own at each site, and needs no other."""
        if self.noise_seed is None:
            return rng_key  # pyright: ignore[reportReturnType]
        name = numpyro_stack.name_in_model(site.name)
        return jax.random.fold_in(jax.random.key(self.noise_seed), zlib.crc32(name.encode()))

    def _ratios(
        self, noise: Noise, events: Shaped[Array, "num {site.num_rows} *event"], site: Site
    ) -> Float[Array, "num {site.num_rows}"]:
        if self._is_relative(site):
            return site.over_draws(site.distribution.log_ratio_to_base, events)
        at_noise = noise.log_prob(events)
        at_noise = at_noise if site.mask is None else jnp.where(site.mask, at_noise, 0.0)
        _check_positive_density(at_noise[0], site)
        return site.over_draws(site.distribution.log_density, events) - at_noise

    def _check_can_be_fixed(self) -> None:
        check_count(type(self).__name__, "noise_seed", self.noise_seed, minimum=0)
        if not (self.noise is None or isinstance(self.noise, str | dist.Distribution)):
            raise EnergyError(
                f"{type(self).__name__} got a noise_seed with noise that is a NumPyro model, whose parameters are trained: "
                "the noise would not stay the same. Write estimate(model, 'nce', noise=..., noise_seed=0) with a "
                "distribution, 'gaussian', 'mixture' or 'marginals'."
            )

    def _check_stays(self, site: Site) -> None:
        """Refuse a base that may depend on the latents as fixed noise, and rows that are a subsample."""
        base = site.distribution.base if self.noise is None else None
        if base is not None and freeze_tree((base, site.local and site.local[1])) is None:
            raise EnergyError(
                "The noise is the base of the energy, and the base is computed from latents, parameters or arguments of the "
                "model: noise_seed needs noise that stays the same. Write it as a distribution, or noise='gaussian'."
            )
        if site.num_total not in (0, site.num_rows):
            raise EnergyError(
                f"noise_seed fixes {self.nu} noise draws for each row, and the plate has {site.num_rows} of "
                f"{site.num_total} rows: all subsamples would be compared with the same few draws. Write the plate without "
                "subsample_size, or leave noise_seed out for new draws at each update."
            )

    def _is_relative(self, site: Site) -> bool:
        """Return whether the noise is a base whose density is not known but cancels."""
        if isinstance(self.noise, Empirical):
            raise EnergyError(
                "Empirical rows have no known density, so they can be the noise only if they are also the base. Write "
                f"EnergyDistribution(..., base=Empirical(rows)) and estimate(model, '{self.name}') without noise."
            )
        return self.noise is None and isinstance(site.distribution.base, Empirical)

    def resolve(self, rng_key: PRNGKey, site: Site) -> tuple[Noise, RowValues]:
        """Return the noise, and the term that fits its parameters to the data (`LogRatios.learning`)."""
        return noise_of(self.noise, jax.random.fold_in(rng_key, 1), site)


def noise_of(
    noise: Fitted | dist.Distribution | Callable[..., Any] | None, rng_key: PRNGKey, site: Site
) -> tuple[Noise, RowValues]:
    """Return the noise that the user names, and the term that fits its parameters to the data.

    No gradient flows through the noise, even where its parameters belong to the model (its base).
    """
    still = jnp.zeros(site.num_rows, jnp.result_type(float, site.value.dtype))
    if isinstance(noise, str):
        return _still(_of_fitted(_fitted(noise, rng_key, site), site)), still
    if noise is None or isinstance(noise, dist.Distribution):
        return _still(_of_distribution(noise if noise is not None else site.distribution.reference, site)), still
    return _of_model(Generator.of(noise, site, rng_key, "noise", latents=False), site)


def _fitted(noise: str, rng_key: PRNGKey, site: Site) -> FittedNoise | FittedMarginals:
    if noise == "marginals":
        return fit_marginals(site)
    if site.distribution.is_discrete:
        raise EnergyError(
            f"noise='{noise}' is continuous; the support is {site.distribution.support}. Write noise='marginals', or leave "
            "noise out for the uniform distribution."
        )
    return fit_noise(rng_key, site.position, site.mask, noise)


def _of_distribution(noise: dist.Distribution, site: Site) -> Noise:
    rows, event_shape = site.batch_shape, site.distribution.event_shape
    if noise.batch_shape == ():
        return Noise(lambda key, num: noise.sample(key, (num, site.num_rows)), noise.log_prob)  # pyright: ignore
    wide = noise.expand(rows)
    flat = lambda values, event: values.reshape(-1, site.num_rows, *event)  # noqa: E731
    return Noise(
        lambda key, num: flat(wide.sample(key, (num,)), event_shape),
        lambda events: flat(wide.log_prob(events.reshape(-1, *rows, *event_shape)), ()),
    )


def _of_fitted(fitted: FittedNoise | FittedMarginals, site: Site) -> Noise:
    over_all = lambda function: jax.vmap(jax.vmap(function))  # noqa: E731

    def log_prob(events):
        positions = over_all(site.distribution.unconstrain)(events)
        return fitted.log_prob(positions) - over_all(site.distribution.log_jacobian)(positions)

    def sample(rng_key, num):
        positions = fitted.sample(rng_key, num).reshape(num, *site.position.shape)
        return over_all(site.distribution.constrain)(positions)

    return Noise(sample, log_prob)


def _of_model(model: Generator, site: Site) -> tuple[Noise, RowValues]:
    """Return a model's noise, and the term that fits its parameters to the data by maximum likelihood."""
    own = log_prob_of_model(model, site, site.value[None])[0]
    own = own if site.mask is None else jnp.where(site.mask, own, 0.0)
    return _still(noise_of_model(model.frozen(), site)), own - jax.lax.stop_gradient(own)


def noise_of_model(model: Generator, site: Site) -> Noise:
    """Return draws and log densities as functions of the model's parameters."""
    return Noise(
        lambda key, num: jax.vmap(lambda k: model.rdraw(k, site)[site.name])(jax.random.split(key, num)),
        lambda events: log_prob_of_model(model, site, events),
    )


def log_prob_of_model(
    model: Generator, site: Site, events: Shaped[Array, "num {site.num_rows} *event"]
) -> Float[Array, "num {site.num_rows}"]:
    """Return the log densities of events ``(num, num_rows, *event_shape)``."""
    log_prob = jax.vmap(lambda event, context: model.log_density({site.name: event}, context))
    return jax.vmap(lambda events: log_prob(events, context_of(site)))(events)


def _still(noise: Noise) -> Noise:
    """Return the same noise without gradients in its parameters; gradients in the events remain."""
    return Noise(
        lambda key, num: jax.lax.stop_gradient(noise.sample(key, num)),
        lambda events: freeze(noise.log_prob, events)(events),
    )


def _check_fits(noise: dist.Distribution, site: Site) -> None:
    try:
        fits = jnp.broadcast_shapes(noise.batch_shape, site.batch_shape) == site.batch_shape
    except ValueError:
        fits = False
    if noise.event_shape != site.distribution.event_shape or not fits:
        raise EnergyError(
            f"The noise has event shape {noise.event_shape} and batch shape {noise.batch_shape}; the energy has event shape "
            f"{site.distribution.event_shape} in rows {site.batch_shape}. Write noise={type(noise).__name__}(...)"
            ".to_event(1), one distribution for all rows or one per row; under a subsampling plate, write a NumPyro model "
            "noise(context)."
        )
    check_same_support("noise", noise, site.distribution.support)


def _check_positive_density(at_data: RowValues | Float[np.ndarray, " {site.num_rows}"], site: Site) -> None:
    if not is_concrete(at_data):
        return
    outside = np.flatnonzero(~np.isfinite(np.asarray(at_data)))
    if outside.size:
        raise EnergyError(
            f"The noise has log density {at_data[outside[0]]} at row {outside[0]}: its density has to be positive at "
            f"all data. {WIDER}"
        )


def _check_overlap(noise: Noise, site: Site) -> None:
    keep = np.ones(site.num_rows, bool) if site.mask is None else np.asarray(site.mask)
    at_data = np.where(keep, np.asarray(noise.log_prob(site.value[None]))[0], 0.0)
    _check_positive_density(at_data, site)
    # If the noise density at every row is below that at all noise draws, the classes separate.
    num = -(-NUM_TYPICAL // max(site.num_rows, 1))
    typical = np.asarray(noise.log_prob(noise.sample(jax.random.key(0), num)))[:, keep]
    if keep.any() and at_data[keep].max() < typical.min():
        warnings.warn(
            f"At site '{site.name}': the noise does not overlap the data (largest noise log density at the data "
            f"{at_data[keep].max():.3g}, smallest of {typical.size} noise draws {typical.min():.3g}): nothing will be "
            f"learned. {NEARER}",
            stacklevel=2,
        )
