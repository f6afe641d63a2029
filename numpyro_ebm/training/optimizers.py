"""An optimiser for two players: the adversary moves at every update, the other parameters less often."""

from collections.abc import Sequence
from typing import Any, Literal

import optax

from numpyro_ebm._core.errors import EnergyError, nearest
from numpyro_ebm._core.options import check_count

Player = Literal["adversary", "rest"]


def alternate(
    optimizer: optax.GradientTransformation,
    adversary_optimizer: optax.GradientTransformation,
    *,
    adversary: str | Sequence[str],
    num_adversary_steps: int = 5,
) -> optax.GradientTransformationExtraArgs:
    """Return an optimiser for the min-max estimators ("lsd", "adversarial", "f_ebm"), which also train an adversary.

    The adversary's parameters move at every update by their own optimiser. All others move only at each
    ``num_adversary_steps``-th update (the 5th, the 10th, ...), after the adversary has adapted to them. Their optimiser sees
    the gradients of those updates alone, and its schedules count only them: ``svi.run(key, 5000, x)`` gives the energy 1000
    steps.

    The estimator already reverses the adversary's gradient, so both optimisers descend. One optimiser for all, such as
    ``SVI(..., optax.adam(1e-3), ...)``, also works (simultaneous gradient descent and ascent), but it does not ensure that
    the adversary keeps up: the loss may oscillate, which smaller steps or more steps of the adversary damp.

    Args:
        optimizer: optimiser of all parameters but the adversary's, including a guide's.
        adversary_optimizer: optimiser of the adversary's parameters.
        adversary: names of the adversary's ``numpyro.param`` sites, or prefixes of them: ``"x$critic"`` (the built-in critic
            of the site x), ``"critic"`` for all of ``nnx_module("critic", ...)``.
        num_adversary_steps: updates of the adversary per update of the rest; 1 moves both at every update.

    Raises:
        EnergyError: for a count below 1, no name, and in ``svi.init`` for a name that no parameter has or begins with.
        TypeError: for an optimiser that is not from optax, and for parameters that are not a dict by site name.

    Example:
        ::

            optimizer = ebm.alternate(optax.adam(1e-3), optax.adam(1e-3), adversary="x$critic", num_adversary_steps=5)
            svi = SVI(ebm.estimate(model, "lsd"), ebm.empty_guide, optimizer, Trace_ELBO())

    References:
        Grathwohl et al., Learning the Stein discrepancy for training and evaluating energy-based models without sampling
        (2020), who take five steps of the critic for one of the energy.
    """
    names = (adversary,) if isinstance(adversary, str) else tuple(adversary)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise EnergyError(
            f"alternate needs the names of the adversary's parameters; got {adversary!r}. Write adversary='x$critic'."
        )
    check_count("alternate", "num_adversary_steps", num_adversary_steps)
    for each in (optimizer, adversary_optimizer):
        _check_is_optax(each)
    waiting = optax.conditionally_mask(optimizer, _every(num_adversary_steps))
    players: Any = {"adversary": adversary_optimizer, "rest": waiting if num_adversary_steps > 1 else optimizer}
    return optax.partition(players, lambda params: _players(params, names))


def _every(num: int) -> Any:
    return lambda step: (step + 1) % num == 0


def _players(params: object, names: tuple[str, ...]) -> dict[str, Player]:
    """Return which player each parameter belongs to."""
    if not isinstance(params, dict):
        raise TypeError(
            f"alternate needs a dict of parameters by the names of their sites, as in SVI; got {type(params).__name__}. "
            "Write SVI(model, guide, ebm.alternate(...), Trace_ELBO())."
        )
    for name in names:
        if not any(site.startswith(name) for site in params):
            raise EnergyError(
                f"alternate got '{name}' as an adversary's parameter, but no parameter has that name or begins with it. "
                f"{nearest(name, params)}"
            )
    return {site: "adversary" if site.startswith(names) else "rest" for site in params}


def _check_is_optax(optimizer: object) -> None:
    if not (isinstance(optimizer, tuple) and hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise TypeError(f"alternate needs optimisers from optax; got {type(optimizer).__name__}. Write optax.adam(1e-3).")
