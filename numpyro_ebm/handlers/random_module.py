"""`random_module`: a neural network whose parameters have priors, with the names of these checked."""

from collections.abc import Callable, Mapping
from typing import Any

import numpyro.distributions as dist
from numpyro import handlers
from numpyro.contrib import module as numpyro_module

from numpyro_ebm._core.errors import EnergyError, nearest

PRIMITIVES: dict[str, Callable] = {
    "flax.nnx": numpyro_module.random_nnx_module,
    "flax.linen": numpyro_module.random_flax_module,
    "equinox": numpyro_module.random_eqx_module,
}
"""NumPyro's function for the modules of each library."""


def random_module(name: str, module: Any, prior: Any, **options: Any) -> Callable:
    """Place priors over the parameters of a network, by NumPyro's function for its library.

    It is ``random_nnx_module``, ``random_flax_module`` or ``random_eqx_module`` of ``numpyro.contrib.module``. These ignore
    a prior for a parameter that the network does not have, so that the one that was meant stays a ``numpyro.param`` without
    prior; this function raises an error.

    Args:
        name: name of the network; the sites are ``"<name>/<parameter>"``.
        module: a module of ``flax.nnx``, ``flax.linen`` or ``equinox``.
        prior: a distribution for all parameters, a function ``(parameter, shape)`` that returns one, or a dict of
            distributions by parameter, such as ``{"layer.kernel": Normal(0, 1)}``. Parameters that a dict leaves out stay
            ``numpyro.param`` sites, which SVI trains, and to which MCMC needs values.
        **options: passed on, such as ``input_shape=(2,)`` for ``flax.linen``.

    Returns:
        The network, a function of an event that can serve as an energy.

    Raises:
        EnergyError: (a ValueError) for a prior of a parameter that the network does not have, with the ones that it has.
        TypeError: for a module of another library.

    Example:
        >>> def model(x):  # doctest: +SKIP
        ...     energy = random_module("net", network, dist.Normal(0, 1))
        ...     with numpyro.plate("rows", len(x)):
        ...         numpyro.sample("x", EnergyDistribution(energy, (2,)), obs=x)
        >>> mcmc = MCMC(NUTS(estimate(model, "sm")), num_warmup=500, num_samples=1000)  # doctest: +SKIP
    """
    primitive = _primitive(module)
    if isinstance(prior, Mapping):
        _check_names(name, primitive, module, prior, options)
        prior = dict(prior)
    return primitive(name, module, prior, **options)


def _primitive(module: Any) -> Callable:
    libraries = {base.__module__ for base in type(module).__mro__}
    for library, primitive in PRIMITIVES.items():
        if any(each == library or each.startswith(library + ".") for each in libraries):
            return primitive
    raise TypeError(f"random_module needs a module of {', '.join(PRIMITIVES)}; got {type(module).__name__}.")


def _check_names(name: str, primitive: Callable, module: Any, prior: Mapping[str, Any], options: dict[str, Any]) -> None:
    known: list[str] = []

    def record(parameter, shape):
        known.append(parameter)
        return dist.Normal()

    # NumPyro says which parameters there are by asking for the prior of each.
    with handlers.block(), handlers.seed(rng_seed=0):
        primitive(name, module, record, **options)
    unknown = [each for each in prior if each not in known]
    if unknown:
        raise EnergyError(
            f"random_module got priors for {unknown}, which are no parameters of the network '{name}'. "
            f"{nearest(unknown[0], known)}"
        )
