"""NumPyro distributions under ``expand`` and ``to_event``."""

from numpyro.distributions import Distribution, ExpandedDistribution, ImproperUniform, Independent


def is_improper(base: Distribution) -> bool:
    """Return whether a distribution is the (improper) Lebesgue measure."""
    return isinstance(strip(base)[0], ImproperUniform)


def without_rows(base: Distribution) -> Distribution:
    """Return the base without a batch shape if it was only expanded over rows; else the base itself."""
    inner, reinterpreted = strip(base)
    if not base.batch_shape or len(inner.batch_shape) > reinterpreted:
        return base
    return inner.expand(base.event_shape[:reinterpreted]).to_event(reinterpreted)


def strip(base: Distribution) -> tuple[Distribution, int]:
    """Return the distribution inside ``expand`` and ``to_event``, and the number of dimensions that ``to_event`` took."""
    inner, reinterpreted = base, 0
    while isinstance(inner, ExpandedDistribution | Independent):
        reinterpreted += inner.reinterpreted_batch_ndims if isinstance(inner, Independent) else 0
        inner = inner.base_dist
    return inner, reinterpreted
