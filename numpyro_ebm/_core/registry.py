"""Construction of objects from names, with helpful errors."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from numpyro_ebm._core.errors import EnergyError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names and their classes.

    Args:
        kind: what the names denote ("estimator", "kernel"), for messages.
        base: abstract class whose instances are accepted, user-defined ones included.
        classes: maps each name to a frozen dataclass.
    """

    def __init__(self, kind: str, base: type[T], classes: Mapping[str, type[T]]):
        self.kind = kind
        self.base = base
        self.classes = dict(classes)

    def names(self) -> tuple[str, ...]:
        """Return the known names, sorted."""
        return tuple(sorted(self.classes))

    def resolve(self, spec: object, **options: Any) -> T:
        """Return an object of this kind, given its name and options or the object itself.

        Raises:
            EnergyError: for an unknown name; the message suggests the closest one.
            TypeError: for options that the class does not have, for options given together
                with an object, and for anything that is neither a name nor an object.
        """
        if isinstance(spec, str):
            return self._build(spec, options)
        if not isinstance(spec, self.base):
            raise TypeError(
                f"Expected {self.kind} as a name or an object, got {spec!r}. Known names: {', '.join(self.names())}."
            )
        if options:
            raise TypeError(
                f"Options {sorted(options)} were given together with a {type(spec).__name__} object. "
                f"Pass them to it: {type(spec).__name__}({', '.join(f'{k}=...' for k in options)})."
            )
        return spec

    def _build(self, name: str, options: dict[str, Any]) -> T:
        if name not in self.classes:
            raise EnergyError(f"Unknown {self.kind} '{name}'. {nearest(name, self.classes)}")
        cls = self.classes[name]
        known = [f.name for f in dataclasses.fields(cls) if f.init]  # pyright: ignore[reportArgumentType]
        for option in options:
            if option not in known:
                raise TypeError(f"The {self.kind} '{name}' has no option '{option}'. {nearest(option, known)}")
        return cls(**options)
