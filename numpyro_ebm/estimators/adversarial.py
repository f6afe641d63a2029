"""Adversarial maximum likelihood: a trained sampler bounds log Z."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float
from numpyro import handlers
from numpyro.infer.util import log_density

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.autodiff import reverse_gradient
from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree, RowValues, Scalar
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators._base import AbstractEstimator
from numpyro_ebm.estimators.parts.critic import check_not_shared
from numpyro_ebm.estimators.parts.entropies import neighbor_entropies
from numpyro_ebm.estimators.parts.figures import mean_over_rows
from numpyro_ebm.estimators.parts.generator import Generator, context_of

Entropy = Literal["exact", "nearest_neighbor", "bound"]
DRAWS = 8
"""Proposal draws per row in `figures`; more draws lower the standard error of log Z at proportional cost."""


class Bound(NamedTuple):
    r"""Estimates of log Z from one draw per row.

    Attributes:
        log_density: unnormalised log density of the draw.
        entropy: the draw's estimate of the proposal's entropy; for "exact" and "bound", ``exp(log_density + entropy)`` is
            an unbiased estimate of Z.
        is_inside: which draws count: a draw rounded to the boundary of the support has no density there.
    """

    log_density: Float[Array, "*draws rows"]
    entropy: Float[Array, "*draws rows"]
    is_inside: Bool[Array, "*draws rows"]


@dataclasses.dataclass(frozen=True)
class AdversarialMaximumLikelihood(AbstractEstimator):
    r"""Maximum likelihood with log Z from its variational dual, which a sampler learns to maximise.

    For any normalised ``q`` of entropy ``H``, and ``log p~ = log base - E``,

    .. math:: \log Z = \max_q E_q[\log\tilde p(y)] + H(q)

    attained where ``q`` is the model itself. ``proposal`` is ``q``: it ascends the right-hand side through its own draws
    (reparameterisation), and the energy ascends ``log p~(x) - log p~(y)``. One SVI trains both, with the gradient of the
    proposal's parameters reversed; `alternate` gives the proposal its own optimiser and number of steps. There are no
    chains. The value of a row is its log density (in unconstrained space) minus the bound on log Z. It overstates the log
    likelihood by ``KL(q || p)``, so it is not an objective. Where the proposal has too little mass, because it lags behind
    or cannot follow the energy (leaving out a mode costs it little), the energy is wrong.

    The entropy of the proposal is estimated by

    - "exact": ``-log q(y)``, for a proposal without latents (a flow, a Gaussian). Its derivative passes through the draw
      only, so that the gradient has no variance where ``q`` is the model.
    - "nearest_neighbor": the estimate of Kozachenko and Leonenko over the batch's draws (groups of at most 256, both points
      of a pair differentiated), for any proposal. It smooths over the distance to the neighbour: it is consistent in large
      groups and few dimensions, and too rough in many. Rows with a context of their own have no neighbours.
    - "bound": ``H >= E[-log q(z) - log q(y | z) + log r(z | y)]`` with ``inference`` as ``r``, learned alongside by the
      same ascent. It is tight where ``r`` is the posterior of the latents ``z``, and at most the entropy elsewhere.

    Args:
        proposal: NumPyro model of one event, ``proposal()``, or ``proposal(context)`` where rows have a context. It samples
            the site of the energy's name, in its support, and before it any latents that ``entropy`` allows, all from
            distributions with ``has_rsample``. Its ``numpyro.param`` sites have other names than the model's.
        entropy: "exact", "nearest_neighbor" or "bound".
        inference: for "bound", a NumPyro model ``inference(event)`` (or ``inference(event, context)``) that samples the
            proposal's latents under the same names.
        num_neighbors: for "nearest_neighbor", the index of the neighbour whose distance counts; None for the nearest in
            three dimensions and more, and the square root of the group's size in fewer.

    Raises:
        EnergyError: for no proposal, or one that does not sample the site, gives it another shape or support, has draws
            that cannot be differentiated, or has latents under "exact"; for an unknown entropy or options of another one;
            for an inference model of other latents; under "nearest_neighbor", for rows with a context or a base of their
            own and for a batch of one row.
        TypeError: for a proposal or inference model that is not callable.

    Example:
        ::

            def proposal():
                scale = numpyro.param("q_scale", 1.0, constraint=constraints.positive)
                numpyro.sample("x", dist.Normal(0.0, scale).expand([2]).to_event(1))

            optimizer = ebm.alternate(optax.adam(1e-3), optax.adam(1e-3), adversary="q_", num_adversary_steps=5)
            svi = SVI(estimate(model, "adversarial", proposal=proposal), empty_guide, optimizer, Trace_ELBO())

    References:
        Kim and Bengio, Deep directed generative models with energy-based probability estimation (2016); Dai et al.,
        Exponential family estimation via adversarial dynamics embedding (2019); Grathwohl et al., No MCMC for me: amortized
        sampling for fast and stable training of energy-based models (2021); Roeder, Wu and Duvenaud, Sticking the landing
        (2017); Agakov and Barber, An auxiliary variational method (2004), for the bound.
    """

    name = "adversarial"
    role = "gradient"
    proposal: Callable[..., Any] | None = None
    entropy: Entropy = "exact"
    inference: Callable[..., Any] | None = None
    num_neighbors: int | None = None

    def __post_init__(self):
        owner = type(self).__name__
        if self.proposal is None:
            raise EnergyError(f"{owner} needs a proposal. Write estimate(model, 'adversarial', proposal=sampler).")
        for role, model in (("proposal", self.proposal), ("inference", self.inference)):
            if model is not None and not callable(model):
                raise TypeError(f"{role} needs a NumPyro model; got {type(model).__name__}.")
        if self.entropy not in get_args(Entropy):
            raise EnergyError(f"Unknown entropy '{self.entropy}'. {nearest(str(self.entropy), get_args(Entropy))}")
        if (self.inference is not None) != (self.entropy == "bound"):
            raise EnergyError(
                f"entropy='bound', and no other, needs an inference model of the proposal's latents; got "
                f"entropy='{self.entropy}' and inference={'one' if self.inference else None}. Write entropy='bound', "
                "inference=encoder."
            )
        if self.num_neighbors is not None:
            check_count(owner, "num_neighbors", self.num_neighbors)
            if self.entropy != "nearest_neighbor":
                raise EnergyError(
                    f"num_neighbors goes with entropy='nearest_neighbor'; got entropy='{self.entropy}'. Leave it out."
                )

    def check(self, site: Site) -> None:
        """Raise where "nearest_neighbor" has rows of different densities, or one row."""
        super().check(site)
        if self.entropy != "nearest_neighbor":
            return
        self.refuse_local(site, "the entropy is estimated from the draws of all rows, which have to share one proposal.")
        if site.num_rows < 2:
            raise EnergyError(
                f"entropy='nearest_neighbor' measures the distances between the draws of a batch, and this batch has "
                f"{site.num_rows} row. Write a larger batch, or entropy='exact' or 'bound'."
            )

    def surrogate(self, rng_key: PRNGKey, site: Site, state: PyTree) -> tuple[RowValues, PyTree]:
        """Return the log density of each row minus the estimate of log Z, with the proposal's derivatives reversed."""
        players = self._players(rng_key, site)
        bound = self._bound(rng_key, site, *players)
        log_density = jax.vmap(site.log_density)(site.position, site.local)
        return log_density - jnp.where(bound.is_inside, bound.log_density + bound.entropy, 0.0), state

    def figures(self, rng_key: PRNGKey, site: Site) -> dict[str, Scalar]:
        """Return ``log_normalizer_bound`` and, where all rows share one Z and weights are known, estimates of log Z.

        The weights ``p~ / q`` of eight draws per row (under "bound", with ``r``) give ``log_normalizer``, which is log Z as
        the log of their mean, its standard error ``log_normalizer_se`` (delta method), and ``ess``, their effective sample
        size as a fraction, 1 where the proposal is the model. All three miss regions that the proposal does not reach.
        """
        players = self._players(rng_key, site)
        keys = jax.random.split(jax.random.fold_in(rng_key, 2), DRAWS)
        bound = jax.lax.map(lambda key: self._bound(key, site, *players), keys)
        mask = bound.is_inside if site.mask is None else bound.is_inside & site.mask
        log_weights, mask = (bound.log_density + bound.entropy).reshape(-1), mask.reshape(-1)
        figures = {"log_normalizer_bound": mean_over_rows(log_weights, mask)}
        if site.local is not None or self.entropy == "nearest_neighbor":
            return figures
        num, log_weights = jnp.sum(mask), jnp.where(mask, log_weights, -jnp.inf)
        log_mean = jax.nn.logsumexp(log_weights) - jnp.log(num)
        ess = jnp.exp(2 * log_mean - jax.nn.logsumexp(2 * log_weights) + jnp.log(num))
        error = jnp.sqrt(jnp.maximum(1 / ess - 1, 0.0) / num)
        return {**figures, "log_normalizer": log_mean, "log_normalizer_se": error, "ess": ess}

    def _players(self, rng_key: PRNGKey, site: Site) -> tuple[Generator, "Inference | None"]:
        """Return the proposal and the inference model with their current parameters."""
        key_proposal, key_inference = jax.random.split(jax.random.fold_in(rng_key, 1))
        declared = numpyro_stack.declared_params()
        proposal = Generator.of(self.proposal, site, key_proposal, is_differentiated=True)
        check_not_shared("proposal", proposal.params, declared)
        draws = proposal.draw(key_proposal, site)
        latents = {name: draw[0] for name, draw in draws.items() if name != site.name}
        if self.entropy == "exact" and latents:
            raise EnergyError(
                f"The proposal has latents {sorted(latents)}, so its density of '{site.name}' alone is unknown. Write "
                "entropy='nearest_neighbor', or entropy='bound' with an inference model of these latents; or a proposal "
                f"that samples '{site.name}' and nothing else."
            )
        if self.inference is None:
            return proposal, None
        inference = Inference.of(self.inference, site, key_inference, latents)
        check_not_shared("inference", inference.params, declared)
        return proposal, inference

    def _bound(self, rng_key: PRNGKey, site: Site, proposal: Generator, inference: "Inference | None") -> Bound:
        draws = proposal.adversary().rdraw(rng_key, site)
        events = draws[site.name].astype(site.value.dtype)
        unconstrain = jax.vmap(site.distribution.unconstrain)
        is_inside = jax.vmap(site.distribution.is_inside)(jax.lax.stop_gradient(events))
        wide = (...,) + (None,) * (events.ndim - 1)
        events = jnp.where(is_inside[wide], events, site.value)
        positions = unconstrain(events)
        if self.entropy == "nearest_neighbor":
            entropy = neighbor_entropies(positions.reshape(site.num_rows, -1), is_inside, self.num_neighbors)
        else:
            context, draws = context_of(site), {**draws, site.name: events}
            # The derivative with the draws held fixed has mean zero and only adds noise, so it is left out.
            log_q = jax.vmap(proposal.frozen().log_density)(draws, context)
            entropy = -log_q - jax.vmap(site.distribution.log_jacobian)(positions)
            if inference is not None:
                latents = {name: draw for name, draw in draws.items() if name != site.name}
                entropy += jax.vmap(inference.adversary().log_density)(latents, (events, *context))
        return Bound(jax.vmap(site.log_density)(positions, site.local), entropy, is_inside)


@dataclasses.dataclass(frozen=True)
class Inference:
    """A NumPyro model of the proposal's latents given an event, with its parameters."""

    model: Callable[..., Any]
    params: dict[str, PyTree]

    @classmethod
    def of(cls, model: Callable[..., Any], site: Site, rng_key: PRNGKey, latents: dict[str, Array]) -> "Inference":
        """Build the model with its parameters' values, which the surrounding handlers see.

        Raises:
            EnergyError: where the model samples other sites than these latents, or gives them other shapes.
        """
        first = jax.tree.map(lambda leaf: leaf[0], (site.value, *context_of(site)))
        only_params = handlers.block(hide_fn=lambda msg: msg["type"] != "param")
        with only_params, handlers.trace() as trace, handlers.seed(rng_seed=rng_key):
            model(*first)
        shapes = {name: jnp.shape(msg["value"]) for name, msg in trace.items() if msg["type"] == "sample"}
        wanted = {name: jnp.shape(value) for name, value in latents.items()}
        if shapes != wanted:
            raise EnergyError(
                f"The inference model samples {shapes}, but the proposal's latents are {wanted} (names and shapes). Write "
                "the same sites in the inference model."
            )
        return cls(model, {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"})

    def adversary(self) -> "Inference":
        """Return the same model with the derivatives of its parameters times -1."""
        return Inference(self.model, reverse_gradient(self.params))

    def log_density(self, latents: dict[str, Array], inputs: tuple[PyTree, ...]) -> Scalar:
        """Return the log density of one row's latents, given its event (and context)."""
        with handlers.block():
            return jnp.asarray(log_density(handlers.substitute(self.model, data=self.params), inputs, {}, latents)[0])
