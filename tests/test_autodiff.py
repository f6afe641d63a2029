"""The guard and the cut, by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_ebm._core.autodiff import freeze, guard
from numpyro_ebm._core.pytrees import assemble, dismantle


def guarded(t):
    return lambda x: guard(lambda v: jnp.sum(jnp.sin(t * v)), x, "no derivative in t")


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: lambda t: jax.vmap(f)(jnp.stack([t, t])).sum(),
    "scan": lambda f: lambda t: jax.lax.scan(lambda c, _: (c + f(t), None), 0.0, None, length=2)[0],
    "checkpoint": jax.checkpoint,
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_a_parameter_derivative_raises_under_every_transformation(wrap):
    inner = wrap(lambda t: guarded(t)(jnp.arange(3.0)))
    for derivative in (jax.grad(inner), jax.jacfwd(inner), jax.jit(jax.grad(inner)), jax.value_and_grad(inner)):
        with pytest.raises(ValueError, match="no derivative in t"):
            derivative(2.0)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
def test_values_and_derivatives_in_x_pass(wrap):
    x = jnp.arange(1.0, 4.0)
    fn, plain = wrap(guarded(2.0)), lambda x: jnp.sum(jnp.sin(2.0 * x))
    np.testing.assert_allclose(fn(x), plain(x), rtol=1e-6)
    np.testing.assert_allclose(jax.grad(fn)(x), jax.grad(plain)(x), rtol=1e-6)
    np.testing.assert_allclose(jax.hessian(fn)(x), jax.hessian(plain)(x), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.grad(fn)))(x), jax.hessian(plain)(x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(fn))(x[None])[0], jax.grad(plain)(x), rtol=1e-6)


def test_parameters_may_be_tracers_that_nobody_differentiates():
    x = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(lambda t: jax.grad(guarded(t))(x))(2.0), 2 * jnp.cos(2 * x), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda t: guarded(t)(x))(jnp.array([2.0]))[0], jnp.sin(2 * x).sum(), rtol=1e-6)


def test_a_score_may_be_differentiated_in_parameters():
    # A derivative in x is free of log Z: hand-written score matching keeps working.
    loss = lambda t: jnp.sum(jax.grad(guarded(t))(jnp.ones(2)) ** 2)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(0.5), jax.grad(lambda t: 2 * (t * jnp.cos(t)) ** 2)(0.5), rtol=1e-5)


def test_freeze_cuts_parameters_before_a_while_loop():
    def loop(t):
        frozen = freeze(lambda x: t * x, 1.0)
        return jax.lax.while_loop(lambda c: c < 10.0, lambda c: c + frozen(c), 1.0) + t

    assert jax.grad(loop)(1.0) == 1.0


def test_callables_come_back_whole():
    import functools

    def energy(weights, x, *, scale):
        return scale * jnp.sum(weights["w"] * x)

    partial = functools.partial(energy, {"w": jnp.arange(3.0)}, scale=2.0)
    arrays, structure = dismantle(partial)
    assert len(arrays) == 1
    assert hash(structure) == hash(dismantle(partial)[1])
    assert assemble([jnp.ones(3)], structure)(jnp.ones(3)) == 6.0
    assert dismantle(energy)[0] == []
    assert assemble(*dismantle(energy)) is energy
