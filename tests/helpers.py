"""What several test files use."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from blackjax.diagnostics import effective_sample_size
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm.kernels import chains


def some_slow(fast, slow):
    """Parameters of which those in ``slow`` are left to `make test-all`."""
    return [*fast, *(pytest.param(value, marks=pytest.mark.slow) for value in slow)]


def precision_model(x=None, *, num_rows=None, batch_size=None, start=1.0):
    """E = t x^2 / 2 with t a parameter, in a plate (subsampled on demand)."""
    t = numpyro.param("t", start)
    rows = num_rows or (1 if x is None else len(x))
    with numpyro.plate("rows", rows, subsample_size=batch_size):
        batch = x if x is None or batch_size is None else numpyro.subsample(x, event_dim=0)
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * t * x**2), obs=batch)


def vector_model(x=None):
    """A diagonal Gaussian over a base, plate of rows: event of shape (2,)."""
    t = numpyro.param("t", jnp.ones(2))
    with numpyro.plate("rows", len(x)):
        base = dist.Normal(0, 3).expand([2]).to_event(1)
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(t * x**2), (2,), base=base), obs=x)


def positive_model(x):
    """Two coupled coordinates, on the positive line, so that the Jacobian counts."""
    t = numpyro.param("t", jnp.ones(3))
    energy = lambda x: t[0] * jnp.sum(x) + t[1] * jnp.prod(x) - t[2] * jnp.sum(jnp.log(x))  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (2,), support=constraints.positive), obs=x)


POSITIVE = np.random.default_rng(0).gamma(3.0, 0.5, (400, 2))
AT = np.array([1.5, 0.3, 2.0])


def rows_of(name, model=positive_model, x=POSITIVE, t=AT, key=0, **options):
    """Values of the surrogate per row and their gradients in t."""
    wrapped = ebm.estimate(model, name, **options)

    @jax.jit
    def both(t, key):
        def values(t):
            seeded = numpyro.handlers.substitute(numpyro.handlers.seed(wrapped, key), {"t": t})
            return numpyro.handlers.trace(seeded).get_trace(x)["x"]["fn"].log_prob(x)

        return values(t), jax.jacfwd(values)(t)

    return both(jnp.asarray(t), jax.random.key(key))


def surrogate(model, params, *args, key=0, **kwargs):
    """Log joint of a model under `estimate`, as a function of its parameters."""
    rng_key = jax.random.key(key) if isinstance(key, int) else key

    @jax.jit
    def value(rng_key, params):
        return log_density(numpyro.handlers.seed(model, rng_key), args, kwargs, params)[0]

    return value(rng_key, params)


def fit(model, *args, steps=900, rate=0.1, key=0, **kwargs):
    """Parameters after SVI with a decaying Adam."""
    optimiser = optax.adam(optax.exponential_decay(rate, steps // 3, 0.1))
    svi = SVI(model, ebm.empty_guide, optimiser, Trace_ELBO())

    @jax.jit  # svi.run would initialise op by op, which compiles for longer
    def run(rng_key):
        update = lambda state, _: svi.update(state, *args, **kwargs)  # noqa: E731
        return svi.get_params(jax.lax.scan(update, svi.init(rng_key, *args, **kwargs), None, length=steps)[0])

    return run(jax.random.key(key))


def check_moments(draws, mean, variance, *, min_ess=200):
    """Draws ``(chains, draws, ...)``: an ESS gate, then mean and variance within 5 standard errors."""
    draws = np.asarray(draws, float)
    for values, truth in ((draws, mean), ((draws - mean) ** 2, variance)):
        ess = np.asarray(effective_sample_size(jnp.asarray(values)))
        assert np.all(ess > min_ess), f"effective sample size {ess}"
        error = np.abs(values.mean((0, 1)) - truth)
        bound = 5 * values.std((0, 1)) / np.sqrt(ess)
        assert np.all(error < bound), f"error {error} against {bound}"


def advanced(kernel, d, start, num_steps, **options):
    """Chains from given events, as events."""
    kernel = kernel.bind(d)
    ended = chains.advance(jax.random.key(0), kernel, d.target(kernel), start, num_steps=num_steps, **options)
    return kernel.as_draws(ended.positions)


def shares(draws, states):
    """How often each state is drawn."""
    same = (np.asarray(draws).reshape(len(draws), 1, -1) == states.reshape(1, len(states), -1)).all(-1)
    assert (same.sum(1) == 1).all()
    return same.mean(0)


def check_against_grid(draws, grid, log_p):
    """Draws of one number against its unnormalised log density on a fine grid: an ESS gate, then 5 standard errors."""
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean, sd = p @ grid, np.sqrt(p @ grid**2 - (p @ grid) ** 2)
    ess = numpyro.diagnostics.effective_sample_size(np.asarray(draws)[None])
    assert ess > 300
    assert abs(draws.mean() - mean) < 5 * sd / np.sqrt(ess)
    np.testing.assert_allclose(draws.std(), sd, rtol=5 / np.sqrt(2 * ess))
