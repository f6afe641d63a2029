"""Frozen dataclasses that are pytrees: settings of kernels, parameters of energies."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax

K = TypeVar("K", bound=type)


@dataclass_transform(frozen_default=True)
def record(*static: str, eq: bool = True):
    """Make a class a frozen dataclass and a pytree whose ``static`` fields are part of its structure.

    Args:
        *static: names of these fields.
        eq: whether objects are compared by their fields; False for fields that are arrays.
    """

    def wrap(cls: K) -> K:
        """Freeze and register the class."""
        cls = dataclasses.dataclass(frozen=True, eq=eq)(cls)
        data = [f.name for f in dataclasses.fields(cls) if f.name not in static]

        def flatten(whole):
            return [getattr(whole, name) for name in data], tuple(getattr(whole, name) for name in static)

        def unflatten(settings, leaves):
            # Not through __init__: fields may be adapted values or placeholders, which are not validated.
            return rebuilt(cls, dict(zip((*data, *static), (*leaves, *settings), strict=True)))

        jax.tree_util.register_pytree_node(cls, flatten, unflatten)
        return cls

    return wrap


def rebuilt(cls: type, settings: dict[str, Any]) -> Any:
    """Return an object with these fields, without validation."""
    made = object.__new__(cls)
    for name, value in settings.items():
        object.__setattr__(made, name, value)
    return made
