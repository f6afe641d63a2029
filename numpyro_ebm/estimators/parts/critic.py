"""A critic: a function of one event with parameters of its own, trained against the energy."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax.flatten_util import ravel_pytree
from numpyro import handlers

from numpyro_ebm._core import numpyro_stack
from numpyro_ebm._core.autodiff import reverse_gradient
from numpyro_ebm._core.errors import EnergyError
from numpyro_ebm._core.typing import Array, PRNGKey, PyTree
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.parts.generator import context_of

WIDTH = 64
"""Units of each of the two hidden layers of the built-in critic."""


@dataclasses.dataclass(frozen=True)
class Critic:
    """A critic's model, and its parameters.

    Attributes:
        model: ``model()`` returns a function of one event in unconstrained space, and of the row's context if there is one.
        params: values of the parameters, by the names of their sites.
        shape: shape of the function's value.
    """

    model: Callable[[], Callable[..., Any]]
    params: dict[str, PyTree]
    shape: tuple[int, ...]

    @classmethod
    def of(
        cls, model: Callable[[], Callable[..., Any]] | None, site: Site, rng_key: PRNGKey, shape: tuple[int, ...]
    ) -> "Critic":
        """Run the model once and return the critic; the surrounding handlers record its parameters.

        Args:
            model: a NumPyro model that returns the function, or None for the built-in network.
            site: the rows.
            rng_key: random key for initial parameters.
            shape: shape of the function's value.

        Raises:
            EnergyError: for a model that samples, keeps state or shares a parameter with the energy, and for a function that
                declares parameters or returns another shape.
            TypeError: if the model does not return a function.
        """
        model = _network(site, shape) if model is None else model
        declared = numpyro_stack.declared_params()
        only_params = handlers.block(hide_fn=lambda msg: msg["type"] != "param")
        with only_params, handlers.trace() as trace, handlers.seed(rng_seed=rng_key):
            function = model()
        _check(trace, function)
        check_not_shared("critic", trace, declared)
        critic = cls(model, {name: msg["value"] for name, msg in trace.items() if msg["type"] == "param"}, shape)
        critic._check_function(site)
        return critic

    def adversary(self) -> "Critic":
        """Return the same critic with its gradient reversed: it ascends where the energy descends."""
        return dataclasses.replace(self, params=reverse_gradient(self.params))

    def bounded(self) -> "Critic":
        """Return the same critic with spectral norms of at most 1 (see `bounded`)."""
        return dataclasses.replace(self, params={name: bounded(name, tree) for name, tree in self.params.items()})

    def function(self) -> Callable[..., Array]:
        """Return the critic as ``function(position, *context)`` of one event."""
        function = self._declared()
        return lambda *inputs: jnp.asarray(function(*inputs)).reshape(self.shape)

    def _declared(self) -> Callable[..., Any]:
        """Return the model's function for these parameters."""
        with handlers.block(), handlers.seed(rng_seed=0), handlers.substitute(data=self.params):
            return self.model()

    def _check_function(self, site: Site) -> None:
        """Check that the function declares no parameters and returns the right shape, and raise otherwise."""
        first = jax.tree.map(lambda leaf: leaf[0], (site.position, *context_of(site)))
        with handlers.block(), handlers.trace() as trace, handlers.seed(rng_seed=0):
            result = jax.eval_shape(self._declared(), *first)
        if trace:
            raise EnergyError(
                f"The critic declares {sorted(trace)} inside the function that it returns, where they would never be "
                "trained. Declare them first, w = numpyro.param(...), and then return lambda x: w @ x."
            )
        if result.shape != self.shape and (result.shape, self.shape) != ((1,), ()):
            raise EnergyError(
                f"The critic returned shape {result.shape} for one event of shape {first[0].shape} in unconstrained space; "
                f"it has to return shape {self.shape}. The library vectorises it over rows."
            )


def bounded(name: str, params: PyTree) -> PyTree:
    """Divide every matrix, vector and number by its largest singular value (its length, its size) if that exceeds 1.

    Args:
        name: name of the parameter's site, for messages.
        params: value of the parameter.

    Raises:
        EnergyError: for arrays of more than two dimensions.
    """

    def bound(leaf):
        if jnp.ndim(leaf) > 2:
            raise EnergyError(
                f"The critic's parameter '{name}' has an array of shape {jnp.shape(leaf)}, but only a matrix has a largest "
                "singular value. Write a critic of dense layers, or penalty='l2'."
            )
        # Clip inside the square root, whose derivative at 0 is infinite; shorter vectors are not divided anyway.
        size = jnp.linalg.norm(leaf, 2) if jnp.ndim(leaf) == 2 else jnp.sqrt(jnp.maximum(jnp.sum(leaf**2), 1.0))
        return leaf / jnp.maximum(size, 1.0)

    return jax.tree.map(bound, params)


def check_not_shared(role: str, params: Iterable[str], declared: set[str]) -> None:
    """Check that an adversary shares no parameter with the energy, and raise otherwise: both players would move it.

    Args:
        role: name of the adversary in messages.
        params: names of its parameters.
        declared: names of the parameters declared before it.

    Raises:
        EnergyError: with the shared names.
    """
    shared = sorted(declared.intersection(params))
    if shared:
        raise EnergyError(
            f"The {role} has parameters {shared}, and so has the model (or another site's {role}): one player would descend "
            f"in them and the other ascend. Give the {role}'s parameters other names, e.g. nnx_module('{role}', net)."
        )


def check_critic(owner: str, critic: object) -> None:
    """Check that a critic is None or a model, and raise otherwise.

    Raises:
        TypeError: with the line to write.
    """
    if critic is not None and not callable(critic):
        raise TypeError(
            f"{owner} needs a critic as a NumPyro model that returns a function of one event; got {type(critic).__name__}. "
            "Write critic=lambda: nnx_module('critic', net), or None for a built-in network."
        )


def _network(site: Site, shape: tuple[int, ...]) -> Callable[[], Callable[..., Array]]:
    """Return the built-in model: two hidden layers of SiLU units."""
    first = jax.tree.map(lambda leaf: leaf[0], (site.position, *context_of(site)))
    sizes = [ravel_pytree(first)[0].size, WIDTH, WIDTH, math.prod(shape)]

    def start(rng_key):
        keys = jax.random.split(rng_key, len(sizes) - 1)
        pairs = zip(keys, sizes[:-1], sizes[1:], strict=True)
        return [{"w": jax.random.normal(key, (n, m)) / math.sqrt(max(n, 1)), "b": jnp.zeros(m)} for key, n, m in pairs]

    def model():
        layers: Any = numpyro.param(f"{site.name}$critic", start)

        def function(*inputs):
            hidden = ravel_pytree(inputs)[0].astype(float)
            for layer in layers[:-1]:
                hidden = jax.nn.silu(hidden @ layer["w"] + layer["b"])
            return (hidden @ layers[-1]["w"] + layers[-1]["b"]).reshape(shape)

        return function

    return model


def _check(trace: Mapping[str, Any], function: object) -> None:
    for name, msg in trace.items():
        if msg["type"] == "sample":
            raise EnergyError(
                f"The critic samples '{name}', but it is trained by gradient ascent and may have parameters only. Write "
                "numpyro.param or nnx_module in it."
            )
        if msg["type"] == "mutable":
            raise EnergyError(
                f"The critic has a layer with state, '{name}' (batch norm, dropout, spectral norm), but it is called for "
                "one event at a time. Use a layer without state, such as layer norm."
            )
    if not callable(function):
        raise TypeError(
            f"The critic's model has to return a function of one event; it returned {type(function).__name__}. Write "
            "critic=lambda: nnx_module('critic', net)."
        )
