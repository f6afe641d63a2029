"""Ready-made energies of which some elements are held at given values, so that kernels draw the others by what is known."""

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Shaped

from numpyro_ebm._core.discrete import OneHot
from numpyro_ebm._core.energies import AbstractEnergy, of_row
from numpyro_ebm._core.records import rebuilt, record
from numpyro_ebm._core.typing import Array, Scalar


@record(eq=False)
class ClampedEnergy(AbstractEnergy):
    r"""A ready-made energy with the elements outside ``free`` held: its conditionals are those of the free elements.

    A held element has equal conditionals of all its values, and no value that is drawn for it reaches the energy.

    Args:
        energy: a ready-made energy that knows the conditionals of its elements.
        held: one event, with the values of the held elements; None before `given`.
        free: the shape of an event, which elements are free; None before `given`.
    """

    takes_context: ClassVar[bool] = True
    energy: Any
    held: Any = None
    free: Any = None

    @classmethod
    def of(cls, energy: AbstractEnergy) -> Any:
        """Return an energy whose rows hold elements of their own, see `given`."""
        return rebuilt(cls, {"energy": energy, "held": None, "free": None})

    @property
    def described(self) -> str:
        """The energy's name, and that elements are held."""
        return f"{self.energy.described} with elements that are held"

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one event."""
        return self.energy.event_shape

    @property
    def support(self) -> Any:
        """The constraint of one element."""
        return self.energy.support

    @property
    def is_differentiable(self) -> bool:
        """Whether the energy has a gradient in the event."""
        return self.energy.is_differentiable

    @property
    def blocks(self) -> tuple[np.ndarray, ...] | None:
        """The blocks of the energy: elements that are independent given the others stay so where some are held."""
        return self.energy.blocks

    def given(self, context: Any) -> "ClampedEnergy":
        """Return the energy of one row, given ``(local, held, free)`` with the row's own context and base parameters."""
        local, held, free = context
        return rebuilt(ClampedEnergy, {"energy": of_row(self.energy, local), "held": held, "free": free})

    def __call__(self, event: Shaped[Array, "*event"]) -> Scalar:
        """Return the energy of the event with the held elements in place of its own."""
        return self.energy(self.filled(event))

    def conditional_logits(
        self, event: Shaped[Array, "*event"], index: Int[Array | np.ndarray, "..."] | None = None
    ) -> Float[Array, "... values"]:
        """Return the log probabilities of the values of free elements, and zeros for held ones."""
        logits = self.energy.conditional_logits(self.filled(event), index)
        each = self.free.reshape(-1, logits.shape[-1])[:, 0] if isinstance(self.support, OneHot) else self.free.reshape(-1)
        free = each if index is None else each[index]
        return jnp.where(free[..., None], logits, 0.0)

    def filled(self, event: Shaped[Array, "*event"]) -> Shaped[Array, "*event"]:
        """Return the event with the held elements in place of its own."""
        return jnp.where(self.free, event, self.held.astype(event.dtype))
