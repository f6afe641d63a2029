"""NumPyro distributions under ``expand`` and ``to_event``."""

from numpyro.distributions import Distribution, ExpandedDistribution, ImproperUniform, Independent


def is_improper(base: Distribution) -> bool:
    """Whether a distribution is Lebesgue measure."""
    return isinstance(strip(base)[0], ImproperUniform)


def without_rows(base: Distribution) -> Distribution:
    """The same base without a batch shape, where it was only expanded over rows; else itself."""
    inner, reinterpreted = strip(base)
    if not base.batch_shape or len(inner.batch_shape) > reinterpreted:
        return base
    return inner.expand(base.event_shape[:reinterpreted]).to_event(reinterpreted)


def strip(base: Distribution) -> tuple[Distribution, int]:
    """What is inside expand and to_event, and how many dimensions the latter took."""
    inner, reinterpreted = base, 0
    while isinstance(inner, ExpandedDistribution | Independent):
        reinterpreted += inner.reinterpreted_batch_ndims if isinstance(inner, Independent) else 0
        inner = inner.base_dist
    return inner, reinterpreted
