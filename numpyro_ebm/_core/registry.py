"""From a name to an object: sugar for the classes, with errors that help."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from numpyro_ebm._core.errors import EnergyError, nearest

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names and the classes they stand for.

    Args:
        kind: what the names are ("estimator", "kernel"); used in messages.
        base: the abstract class whose objects count, a user's own among them.
        classes: name to frozen dataclass.
    """

    def __init__(self, kind: str, base: type[T], classes: Mapping[str, type[T]]):
        self.kind = kind
        self.base = base
        self.classes = dict(classes)

    def names(self) -> tuple[str, ...]:
        """The known names, sorted."""
        return tuple(sorted(self.classes))

    def resolve(self, spec: Any, **options: Any) -> T:
        """An object of this kind, from a name with options or from the object itself.

        Raises:
            EnergyError: for a name that is not known; the nearest one is offered.
            TypeError: for options that the class does not have, for options beside an
                object, and for something that is neither name nor object.
        """
        if isinstance(spec, str):
            return self._build(spec, options)
        if not isinstance(spec, self.base):
            raise TypeError(
                f"Expected {self.kind} as a name or an object, got {spec!r}. Known names: {', '.join(self.names())}."
            )
        if options:
            raise TypeError(
                f"Options {sorted(options)} came beside a {type(spec).__name__} object. "
                f"Write them into it: {type(spec).__name__}({', '.join(f'{k}=...' for k in options)})."
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
