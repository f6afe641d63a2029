"""`estimate`: the handler that replaces an intractable log likelihood by an estimator's surrogate."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpyro
from numpyro.primitives import Messenger

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.errors import EnergyError, at_site, nearest, warn_uncalibrated
from numpyro_ebm._core.jax_modes import in_own_modes
from numpyro_ebm._core.pytrees import check_pickles
from numpyro_ebm._core.typing import Array, RowValues
from numpyro_ebm._core.wrappers import is_improper
from numpyro_ebm.distributions.factor import EnergyFactor
from numpyro_ebm.distributions.rows import Plate, Unwrapped, check_holds_no_energy, lay_out, unwrap
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.distributions.surrogates import FrozenEnergy, Surrogate
from numpyro_ebm.estimators import AbstractEstimator
from numpyro_ebm.estimators.names import ESTIMATORS
from numpyro_ebm.handlers._emit import emit, kept
from numpyro_ebm.handlers._hidden import Roles, placeholder_of, roles_of
from numpyro_ebm.handlers._joint import FactoredSites, JointSite, Message
from numpyro_ebm.handlers._run import gradient_in_value, nan_where_lacking, only_here, run, unchanged
from numpyro_ebm.handlers._uses import check_not_latent, check_not_subsampled, check_value_means_something
from numpyro_ebm.handlers._weights import Weight, checked, weight_of, weighted
from numpyro_ebm.handlers.energy_sites import TWICE, EnergySite, energy_sites


class estimate(Messenger):  # noqa: N801 (a handler, named as NumPyro names its own)
    r"""Make a model trainable: at each energy site an estimator's surrogate replaces the intractable log likelihood.

    The result is a NumPyro model with the same arguments, for SVI with any guide and, if the estimator is a deterministic
    objective, for NUTS (a generalised posterior). Plates, subsampling, scales and masks act on the surrogate row by row;
    all other sites are unchanged.

    Sites that an `energy_factor` names are energy sites too, with their own distributions as the base. Sites that factors
    connect form one joint event, named by the site names joined by commas in the order of the model ("x,y"); a dict of
    estimators may use that name or any one member's. Its surrogate is the auxiliary site ``"<name>$surrogate"``.

    A latent energy site (an energy prior), or a joint event with some latent members, takes its value ``z`` from the guide
    and contributes

    .. math:: \log\tilde p(z; \bar\theta) + s(\bar z; \theta) - \overline{\log\tilde p(z; \bar\theta)}

    where ``s`` is the surrogate and a bar stops the gradient: the unnormalised log density trains the guide, and the
    estimator, at the guide's draws, trains the parameters. With "mle", "pcd" and similar estimators this is the gradient of
    the evidence lower bound (variational EM) as far as the chains have converged; other estimators fit their own criterion
    to the guide's draws, whose optimum may differ for hidden members of a joint event. Without a guide the site draws from
    the energy.

    Members of a joint event that neither data nor a guide give a value, and entries that are NaN, are missing: "cd", "pcd",
    "replay" and "mle" draw them given the rest of their row under the option `PositivePhase`, and "exact" sums over them.
    The model sees a placeholder in place of a hidden member, so no other density may depend on it.

    Args:
        fn: a NumPyro model.
        estimator: a name of `available_estimators`, an estimator object, or a dict from site names to either.
        weight: a positive number by which the surrogates of the observed energy sites are multiplied, or a dict of them by
            site; None for 1. Priors and other likelihoods keep theirs. An objective then gives the generalised posterior
            ``prior x exp(-weight x loss)``, whose weight `calibrate` finds; a "gradient" estimator, that of a power of the
            likelihood. It multiplies the scale of plates and `numpyro.handlers.scale`.
        **options: the estimator's options, when it is a name.

    Raises:
        EnergyError: (a ValueError) for an unknown estimator; and when the model runs, naming the site, for data that do not
            fit the energy or its support; rows that lack elements, where the estimator takes none; an energy site with
            neither data nor a value from the guide; a hidden member that another density depends on; an unnormalised
            energy inside another distribution; a model that is estimated already; a "gradient" or random estimator under an
            inference that uses the value or the Hessian of its surrogate (NUTS/HMC, ``AutoLaplaceApproximation``,
            ``AutoDAIS``, ``RenyiELBO``; a "gradient" one under ``TraceGraph_ELBO``); a latent energy site under NUTS/HMC or
            an ELBO other than ``Trace_ELBO`` and ``TraceMeanField_ELBO``; subsampling under NUTS/HMC; a persistent
            estimator under an ELBO that would lose its chains; no random key; factors that do not fit their sites; two
            estimators for one joint event; a weight that is not positive, or of a latent energy.
        TypeError: for an unknown option, or something that is not an estimator.

    Warns:
        UncalibratedPosteriorWarning: when the model runs, if an objective is the target of NUTS, HMC or a Laplace guide, or
            is trained with a guide that gives latents a width: that width is arbitrary. With a ``weight`` there is no
            warning, as it says what the scale of the loss is to be, and none where the loss is minus a log likelihood
            ("exact"; "nce" and "ranking_nce" with a fixed noise set).

    Example:
        >>> svi = SVI(estimate(model, "dsm", sigma=0.1), empty_guide, optax.adam(1e-3), Trace_ELBO())  # doctest: +SKIP

    References:
        Song and Kingma, How to train your energy-based models (2021); Pang et al., Learning latent space energy-based prior
        model (2020); Bissiri, Holmes and Walker, A general framework for updating belief distributions (2016).
    """

    fn: Callable[..., Any]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        fn: Callable,
        estimator: str | AbstractEstimator | Mapping[str, str | AbstractEstimator],
        *,
        weight: Weight = None,
        **options: Any,
    ):
        if not callable(fn):
            raise TypeError(f"estimate needs a NumPyro model; got {type(fn).__name__}. Write estimate(model, 'cd').")
        _check_not_estimated(fn)
        if isinstance(estimator, Mapping):
            if options:
                raise TypeError(f"Options {sorted(options)} came with a dict of estimators. Write them into its objects.")
            self._estimators: dict[str, AbstractEstimator] | AbstractEstimator = {
                site: ESTIMATORS.resolve(spec) for site, spec in estimator.items()
            }
        else:
            self._estimators = ESTIMATORS.resolve(estimator, **options)
        self._weight = checked(weight)
        self._forget()
        super().__init__(fn)

    def sites(self, *args: Any, **kwargs: Any) -> list[tuple[AbstractEstimator, Site]]:
        """Return each energy site's estimator and the `Site` that it gets when the model runs; no surrogate is computed.

        Parameters and values of latent sites come from the enclosing handlers, as in a run of the model.

        Example:
            ``with handlers.substitute(data=params): pairs = estimated.sites(x)``
        """
        found, _ = energy_sites(self.fn, {}, args, kwargs)
        return list(self.lay_out(found).values())

    def lay_out(self, found: Mapping[str, EnergySite]) -> dict[str, tuple[AbstractEstimator, Site]]:
        """Return the estimator and the rows of each energy site in one run of the model, by name.

        Raises:
            EnergyError: for a site without an estimator, and for an estimator or a weight without a site.
        """
        chosen = {n: self._estimator_of(n, site.members).bind(site.unwrapped.distribution) for n, site in found.items()}
        self._check_all_seen({name for site in found.values() for name in (site.name, *site.members)})
        return {name: (each, self._laid_out(found[name], each)) for name, each in chosen.items()}

    @staticmethod
    def _laid_out(found: EnergySite, estimator: AbstractEstimator) -> Site:
        may_lack = estimator.may_lack(found.unwrapped.distribution)
        return found.lay_out(may_touch_ends=estimator.takes_ends, may_lack=may_lack)

    @property
    def estimators(self) -> Any:
        """The estimator, or a dict of them by site. Read only: compiled functions would not see a change."""
        return self._estimators

    @property
    def weight(self) -> Any:
        """The weight, or a dict of them by site; None where none was given."""
        return self._weight

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Reduce like any object, after a check that pickle finds the model.

        Raises:
            TypeError: for a lambda or a local function, with what to write.
        """
        check_pickles("estimate handler", [self.fn])
        return super().__reduce_ex__(protocol)

    def __enter__(self):
        self._forget()
        return super().__enter__()

    def __exit__(
        self, exc_type: type[BaseException] | None, exc_value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The record of a run may hold tracers and objects that cannot be pickled.
        self._forget()
        super().__exit__(exc_type, exc_value, traceback)

    def _forget(self) -> None:
        """Reset the record of a run of the model; a handler may be entered many times."""
        self._plates: dict[str, Plate] = {}
        self._seen: set[str] = set()
        self._latents: dict[str, tuple[Unwrapped, dict[str, Any]]] = {}
        self._objectives: list[str] = []
        self._factored = FactoredSites()
        self._holders: list[dict[str, Any]] = []
        self._roles = Roles()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, then add the surrogates that are known only at its end: of latent energies and of factors."""
        with self:
            if any(each.takes_missing for each in self._all):
                self._roles = roles_of(self.fn, args, kwargs, self._is_given, self._takes_missing)
            result = self.fn(*args, **kwargs)
            for name in self._seen | set(self._latents):
                self._factored.check_not_named(name)
            for name, (unwrapped, message) in self._latents.items():
                values = self._surrogate(name, unwrapped, message["value"], message)
                emit(f"{name}$surrogate", values - message["fn"].log_prob(message["value"]), message)
            joints = self._factored.joints()
            for joint in joints:
                self._emit_joint(joint)
            self._check_all_seen(self._seen)
            # Only known at the end: which latents of the guide are energies themselves, such as missing rows.
            energies = {*self._latents, *(name for joint in joints for name in joint.names)}
            if self._objectives and numpyro_stack.guide_has_width(self, energies):
                warn_uncalibrated(self._objectives[0], "The guide")
        return result

    def process_message(self, msg: Message) -> None:
        """Replace an energy site's distribution by its surrogate; record factors and sites without a value yet."""
        if msg["type"] != "sample":
            return
        name, fn = msg["name"], msg["fn"]
        if isinstance(fn, EnergyFactor):
            self._factored.add_factor(msg)
            msg["fn"] = Surrogate(jnp.zeros(fn.batch_shape), fn.event_shape, fn.support)
            return
        if isinstance(fn, Surrogate | FrozenEnergy) and not name.endswith("$surrogate"):
            raise EnergyError(f"At site '{name}': {TWICE}")
        unwrapped = unwrap(fn)
        if unwrapped is None:
            with at_site(name):
                check_holds_no_energy(fn)
            self._add_factored(msg)
        elif msg["is_observed"]:
            msg["fn"] = Surrogate(self._surrogate(name, unwrapped, msg["value"], msg), fn.event_shape, fn.support)
        else:
            with at_site(name):
                numpyro_stack.check_latent(name, self)
            msg["fn"] = FrozenEnergy(fn)
            self._latents[name] = unwrapped, kept(msg)

    def _add_factored(self, msg: Message) -> None:
        """Record a site that factors may name; if its rows may lack elements, its own log probability is that of none."""
        name, fn = msg["name"], msg["fn"]
        has_value = msg["value"] is not None or name in self._roles.hidden or self._is_given(name)
        if is_improper(fn) and not has_value:  # of which nothing can be drawn
            raise EnergyError(numpyro_stack.NO_VALUE.format(name=name))
        is_hidden = name in self._roles.hidden
        is_held = is_hidden or name in self._roles.observed
        if is_hidden:  # drawn by the estimator, so that the guide need not have it
            msg["value"], msg["is_observed"] = placeholder_of(fn), True
        self._factored.add_site(msg, is_hidden=is_hidden, is_held=is_held)
        if is_held:
            msg["fn"] = Surrogate(jnp.zeros(fn.batch_shape), fn.event_shape, fn.support)

    def _is_given(self, name: str) -> bool:
        return numpyro_stack.is_given(name, self)

    def _takes_missing(self, name: str, members: Sequence[str]) -> bool:
        return self._estimator_of(name, members).takes_missing

    @property
    def _all(self) -> list[AbstractEstimator]:
        """All estimators."""
        return [self._estimators] if isinstance(self._estimators, AbstractEstimator) else list(self._estimators.values())

    def postprocess_message(self, msg: Message) -> None:
        """Record values, plates, and the state of network layers, which an energy must not change."""
        if msg["type"] == "plate":
            self._plates[numpyro_stack.name_at(self, msg)] = Plate(msg.get("rows", msg["value"]), msg["args"][0])
        if msg["type"] == "sample":
            name = numpyro_stack.name_at(self, msg)
            self._factored.add_value(name, msg)
            if name in self._latents:
                self._latents[name][1].update(value=msg["value"], is_observed=msg["is_observed"])
        if msg["type"] == "mutable" and isinstance(msg["value"], dict):
            self._holders.append(msg["value"])

    def _emit_joint(self, joint: JointSite) -> None:
        """Replace the members' own log probabilities, which the model already counts, by the surrogate."""
        with at_site(joint.name):
            for member in joint.members:
                if not member.message["is_observed"]:
                    numpyro_stack.check_latent(member.name, self)
            message = {**joint.message, "is_observed": joint.is_observed}
            log_factor = self._surrogate(joint.name, joint.unwrapped, joint.value, message, joint.names)
        emit(f"{joint.name}$surrogate", log_factor - joint.own_log_prob(), message)

    @in_own_modes
    def _surrogate(self, name: str, unwrapped: Unwrapped, value: object, msg: Message, members: Sequence[str] = ()) -> Array:
        """Return the site's surrogate, in the batch shape of its log probability."""
        with at_site(name), numpyro_stack.outside_scopes(self):
            self._seen |= {name, *members}
            estimator = self._estimator_of(name, members).bind(unwrapped.distribution)
            weight = weight_of(self._weight, name, members)
            self._check_context(name, estimator, unwrapped, msg, is_weighted=weight is not None)
            plates = {frame.dim: self._plates[frame.name] for frame in msg["cond_indep_stack"] if frame.name in self._plates}
            may = {"may_touch_ends": estimator.takes_ends, "may_lack": estimator.may_lack(unwrapped.distribution)}
            site = lay_out(name, unwrapped, value, plates, **may)
            self._check_missing(site, msg)
            # A latent value comes from the guide: only the log density may pass it a gradient, not the estimator.
            given = site if msg["is_observed"] else dataclasses.replace(site, value=jax.lax.stop_gradient(site.value))
            values = self._run(estimator, given, site)
            values = weighted(weight, nan_where_lacking(site, values), is_observed=msg["is_observed"])
        values = values if site.mask is None else jnp.where(site.mask, values, 0.0)
        values = values.reshape(site.batch_shape)
        return jnp.sum(values, axis=tuple(range(-unwrapped.event_dims, 0))) if unwrapped.event_dims else values

    def _run(self, estimator: AbstractEstimator, given: Site, site: Site) -> RowValues:
        estimator.check_mixed(given)  # whatever an estimator's own check does
        estimator.check(given)
        with numpyro_stack.outside_rows(self):
            latents = {name: numpyro.sample(name, prior) for name, prior in estimator.latents(given).items()}
        with unchanged(list(self._holders)), only_here(latents):
            values = run(estimator, given)
            return values if given is site else values + gradient_in_value(site)

    def _check_missing(self, site: Site, msg: Message) -> None:
        """Refuse rows that may lack elements where a guide gives others: its gradient would be at the placeholders."""
        if site.missing is not None and not msg["is_observed"]:
            raise EnergyError(
                "The guide gives a value, and entries that are NaN are to be drawn: the guide's gradient would need both at "
                "once. Give the missing entries a site of the guide as well, or write estimate(model, ...) without "
                "positive_phase."
            )

    def _estimator_of(self, name: str, members: Sequence[str]) -> AbstractEstimator:
        if isinstance(self._estimators, AbstractEstimator):
            return self._estimators
        given = [key for key in dict.fromkeys((name, *members)) if key in self._estimators]
        if not given:
            raise EnergyError(
                f"No estimator is given for the energy site '{name}'. Write estimate(model, {{'{name}': 'cd', ...}}). "
                f"{nearest(name, self._estimators)}"
            )
        if len(given) > 1:
            raise EnergyError(
                f"Factors join {list(members)} to one event, '{name}', but estimate got estimators for {given}. Give one: "
                f"estimate(model, {{'{name}': 'cd', ...}})."
            )
        return self._estimators[given[0]]

    def _check_context(
        self, name: str, estimator: AbstractEstimator, unwrapped: Unwrapped, msg: Message, *, is_weighted: bool
    ) -> None:
        if estimator.is_persistent:
            numpyro_stack.check_carries_state(estimator.name)
        is_scaled = is_weighted or estimator.is_likelihood
        if estimator.role == "objective" and msg["is_observed"] and not is_scaled:
            self._objectives.append(estimator.name)
        user = numpyro_stack.user_of_value()
        if user is None:
            return
        if not msg["is_observed"]:
            check_not_latent(name, user)
        check_value_means_something(estimator, unwrapped, user, is_weighted=is_weighted)
        if user == numpyro_stack.SAMPLER:
            check_not_subsampled(msg["cond_indep_stack"], self._plates)

    def _check_all_seen(self, seen: set[str]) -> None:
        for what, given in (("estimators", self._estimators), ("weights", self._weight)):
            unknown = sorted(set(given) - seen) if isinstance(given, Mapping) else []
            if unknown:
                raise EnergyError(
                    f"estimate got {what} for {unknown}, which are not energy sites of this model. "
                    f"{nearest(unknown[0], seen)}"
                )


def _check_not_estimated(fn: object) -> None:
    """Refuse a model that is the result of `estimate`, possibly under other handlers."""
    while isinstance(fn, Messenger):
        if isinstance(fn, estimate):
            raise EnergyError(TWICE)
        fn = fn.fn


def estimated_in(model: object) -> estimate | None:
    """Return the handler `estimate` in a model, which may be under other handlers; None if there is none.

    Scopes around it are moved inside, so that its sites have the names that they have in the whole model.
    """
    scopes = []
    while model is not None and not isinstance(model, estimate):
        scopes += [model] if isinstance(model, numpyro.handlers.scope) else []
        model = getattr(model, "fn", None) or getattr(model, "func", None)
    if model is None or not scopes:
        return model
    fn: Any = model.fn
    for each in reversed(scopes):
        fn = numpyro.handlers.scope(fn, each.prefix, each.divider, hide_types=each.hide_types)
    prefix = numpyro_stack.scope_prefix(scopes)
    estimators, weight = (
        {prefix + name: each for name, each in given.items()} if isinstance(given, Mapping) else given
        for given in (model.estimators, model.weight)
    )
    return estimate(fn, estimators, weight=weight)


def empty_guide(*args: Any, **kwargs: Any) -> None:
    """Guide without sites, for models whose unknowns are all ``numpyro.param``.

    Example:
        ``SVI(estimate(model, "sm"), empty_guide, optax.adam(1e-3), Trace_ELBO())``
    """
