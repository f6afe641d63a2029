"""Multigrid contrastive divergence on Gaussian fields.

Averages over f x f of independent pixels N(0, 1/t) have precision t f^2, and with a shared E = t |x|^2 / 2 the density of a
coarse grid is that too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import fit, surrogate
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

import numpyro_ebm as ebm
from numpyro_ebm import MultigridContrastiveDivergence
from numpyro_ebm.distributions.site import Site
from numpyro_ebm.estimators.multigrid_cd import average, repeat_to

# About a quarter of a period at precisions from 1 to 4: three such transitions forget where they began.
EXACT = {"num_steps": 3, "kernel": ebm.HMC(step_size=0.33, num_integration_steps=3, jitter=0.0), "adapt_step_size": False}
SIDES = (1, 2, 4)
FIELDS = np.random.default_rng(0).normal(0, 0.7, (500, 4, 4)).astype(np.float32)
ROUGH = FIELDS + np.random.default_rng(1).normal(0, 0.5, (500, 1, 1)).astype(np.float32)


def shared_model(x):
    t = numpyro.param("t", 1.0)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda y: 0.5 * t * jnp.sum(y**2), x.shape[1:]), obs=x)


def separate_model(x):
    precisions = {(side, side): numpyro.param(f"t{side}", 1.0) for side in SIDES}
    energy = lambda y: 0.5 * precisions[y.shape] * jnp.sum(y**2)  # noqa: E731
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(energy, (4, 4)), obs=x)


def maximum_likelihood(x):
    """Precision of each grid, coarse to fine, and the one that serves all."""
    squares = [np.mean(np.sum(np.asarray(average(x, 4 // side)) ** 2, axis=(1, 2))) for side in SIDES]
    pixels = [side**2 for side in SIDES]
    scaled = sum((4 // side) ** 2 * square for side, square in zip(SIDES, squares, strict=True))
    return [n / square for n, square in zip(pixels, squares, strict=True)], sum(pixels) / scaled


def test_averages_and_repetitions_are_exact():
    image = jnp.arange(16.0).reshape(1, 4, 4)
    np.testing.assert_array_equal(average(image, 2)[0], [[2.5, 4.5], [10.5, 12.5]])
    np.testing.assert_array_equal(average(image, 4)[0], [[7.5]])
    np.testing.assert_array_equal(repeat_to(jnp.array([[[1.0, 2.0]]]), (1, 2, 4))[0], [[1, 1, 2, 2], [1, 1, 2, 2]])
    colours = jax.random.normal(jax.random.key(0), (3, 2, 4, 5))
    np.testing.assert_allclose(average(repeat_to(colours, (3, 6, 12, 5)), 3), colours, rtol=1e-6)
    np.testing.assert_allclose(average(colours, 2)[1, 0, 1], np.mean(colours[1, :, 2:], axis=(0, 1)), rtol=1e-6)


@pytest.mark.slow
def test_one_grid_is_cd():
    x = FIELDS[:5]
    options = {"num_steps": 2, "energy_l2": 0.1}
    ours = ebm.estimate(shared_model, "multigrid_cd", factors=(1,), **options)
    results = [
        jax.value_and_grad(lambda t, wrapped=wrapped: surrogate(wrapped, {"t": t}, x))(1.5)
        for wrapped in (ours, ebm.estimate(shared_model, "cd", **options))
    ]
    np.testing.assert_array_equal(*results)


@pytest.mark.slow
def test_each_grid_recovers_its_own_precision():
    # Maximum likelihood is 4.18, 3.06 and 1.43 (within 1.1 % here): the pixels share a part, so they are not as 16, 4 and 1.
    wrapped = ebm.estimate(separate_model, "multigrid_cd", **EXACT, shared=False)
    params = fit(wrapped, ROUGH, steps=300, rate=0.2)
    truth, _ = maximum_likelihood(ROUGH)
    np.testing.assert_allclose([params[f"t{side}"] for side in SIDES], truth, rtol=0.04)


def test_independent_pixels_have_precision_t_times_the_square_of_the_factor():
    truth, together = maximum_likelihood(FIELDS)
    np.testing.assert_allclose(truth, np.array([16, 4, 1]) / 0.49, rtol=5 * np.sqrt(2 / 500))
    np.testing.assert_allclose(together, 1 / 0.49, rtol=5 * np.sqrt(2 / 500 / 21))


@pytest.mark.slow
def test_a_shared_energy_recovers_the_precision_that_serves_all_grids():
    # Maximum likelihood over all grids together (within 2.6 % here), which is neither that of the pixels nor of their mean.
    params = fit(ebm.estimate(shared_model, "multigrid_cd", **EXACT), ROUGH, steps=500)
    each, together = maximum_likelihood(ROUGH)
    assert not any(abs(together / (t * (side / 4) ** 2) - 1) < 0.1 for t, side in zip(each, SIDES, strict=True))
    np.testing.assert_allclose(params["t"], together, rtol=0.04)


@pytest.mark.slow
def test_a_coarse_density_is_that_of_repeated_pixels_with_context_and_base():
    # Rows of their own context and base; three channels.
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    loc = jnp.array([0.5, -1.0])
    base = dist.Normal(loc[:, None, None, None], 2.0).expand([2, 4, 4, 3]).to_event(3)
    d = ebm.EnergyDistribution(
        lambda x, k: k * jnp.sum(x**4), (4, 4, 3), context=jnp.array([1.0, 2.0]), batch_shape=(2,), base=base
    )
    site = Site("x", d, (2,), x, d.rows(x, (2,)).local, None)
    one, two, full = MultigridContrastiveDivergence().grids(site)
    assert [grid.name for grid in (one, two, full)] == ["x[1x1]", "x[2x2]", "x"]
    assert full is site
    for grid, side in ((one, 1), (two, 2)):
        assert grid.value.shape == (2, side, side, 3)
        values = jax.vmap(grid.log_density)(grid.position, grid.local)
        repeated = repeat_to(average(x, 4 // side), x.shape)
        expected = -jnp.array([1.0, 2.0]) * jnp.sum(repeated**4, axis=(1, 2, 3)) + base.log_prob(repeated)
        np.testing.assert_allclose(values, expected, rtol=1e-5)
    wrapped = ebm.estimate(lambda x: numpyro.sample("x", d, obs=x), "multigrid_cd", num_steps=1, factors=(2, 1))
    assert np.isfinite(surrogate(wrapped, {}, x))


@pytest.mark.slow
def test_a_separate_energy_gets_each_grid_and_its_row_of_the_context():
    seen = set()

    def energy(y, k):
        seen.add((y.shape, k.shape))
        return k[0] * jnp.sum(y**2)

    def model(x):
        d = ebm.EnergyDistribution(energy, (4, 2, 3), context=jnp.ones((3, 5)), batch_shape=(3,))
        numpyro.sample("x", d, obs=x)

    wrapped = ebm.estimate(model, "multigrid_cd", factors=(2, 1), shared=False, num_steps=1)
    assert np.isfinite(surrogate(wrapped, {}, np.ones((3, 4, 2, 3))))
    assert seen == {((2, 1, 3), (5,)), ((4, 2, 3), (5,))}


@pytest.mark.slow
def test_one_trace_and_the_state_of_every_grid():
    traces = []

    def model(x):
        t = numpyro.param("t", 1.0)

        def energy(y):
            traces.append(y.shape)
            return 0.5 * t * jnp.sum(y**2)

        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(energy, (4, 4)), obs=x)

    wrapped = ebm.estimate(model, "multigrid_cd", num_steps=2, factors=(2, 1))
    svi = SVI(wrapped, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
    state = jax.jit(svi.init)(jax.random.key(0), FIELDS[:40])
    shapes = jax.tree.map(jnp.shape, state)
    update = jax.jit(svi.update)
    state, _ = update(state, FIELDS[:40])
    count = len(traces)
    for _ in range(9):
        state, loss = update(state, FIELDS[:40])
    assert len(traces) == count
    assert jax.tree.map(jnp.shape, state) == shapes
    assert np.isfinite(loss)
    everyone = state.mutable_state["x$multigrid_cd"]["state"].grids
    assert [grid.num_updates for grid in everyone] == [11] * 2  # svi.init makes the first
    assert all(0 < grid.health.acceptance_rate <= 1 for grid in everyone)
    assert len({float(grid.health.step_size) for grid in everyone}) == 2


REFUSED_OPTIONS = {
    "fine to coarse": ({"factors": (1, 2, 4)}, r"coarse to fine.*got \(1, 2, 4\).*factors=\(4, 2, 1\)"),
    "no finest grid": ({"factors": (4, 2)}, "the last one 1"),
    "no multiples": ({"factors": (6, 4, 1)}, "each a multiple of the next"),
    "the same twice": ({"factors": (2, 2, 1)}, "each a multiple of the next"),
    "no factors": ({"factors": ()}, "needs factors"),
    "a number": ({"factors": 4}, "needs factors"),
    "fractions": ({"factors": (1.5, 1)}, "needs factors"),
}


@pytest.mark.parametrize("case", REFUSED_OPTIONS)
def test_refused_options(case):
    options, words = REFUSED_OPTIONS[case]
    with pytest.raises(ebm.EnergyError, match=words):
        MultigridContrastiveDivergence(**options)


BASE = dist.Normal(0, 1).expand([4, 4]).to_event(2)
REFUSED_MODELS = {
    "a vector": ((16,), {}, {}, r"needs images.*got \(16,\)"),
    "a video": ((4, 4, 4, 4), {}, {}, "needs images"),
    "sides that do not divide": ((4, 6), {}, {}, r"multiples of 4.*got \(4, 6\)"),
    "a positive support": ((4, 4), {"support": constraints.positive}, {}, "real numbers.*logit"),
    "a base for separate energies": ((4, 4), {"base": BASE}, {"shared": False}, "shared=False each grid.*leave out base"),
    "a penalty on a base": ((4, 4), {"base": BASE}, {"energy_l2": 0.1}, "energy_l2=0"),
}


@pytest.mark.parametrize("case", REFUSED_MODELS)
def test_refused_models(case):
    shape, settings, options, words = REFUSED_MODELS[case]

    def model(x):
        numpyro.sample("x", ebm.EnergyDistribution(lambda x: jnp.sum(x**2), shape, **settings).expand([3]), obs=x)

    with pytest.raises(ebm.EnergyError, match=f"site 'x'.*({words})"):
        surrogate(ebm.estimate(model, "multigrid_cd", **options), {}, np.ones((3, *shape)))


@pytest.mark.slow
def test_masked_rows_take_no_part():
    def model(x, mask):
        t = numpyro.param("t", 1.0)
        with numpyro.plate("rows", len(x)), numpyro.handlers.mask(mask=mask):
            numpyro.sample("x", ebm.EnergyDistribution(lambda y: 0.5 * t * jnp.sum(y**2), (2, 2)), obs=x)

    wrapped = numpyro.handlers.seed(ebm.estimate(model, "multigrid_cd", factors=(2, 1), num_steps=1), 0)
    value = jax.jit(jax.value_and_grad(lambda t, x, mask: log_density(wrapped, (x, mask), {}, {"t": t})[0]))
    mask = np.arange(5) != 2
    results = [value(2.0, np.where(mask[:, None, None], FIELDS[:5, :2, :2], fill), mask) for fill in (np.nan, 9.0)]
    assert np.isfinite(results).all()
    assert results[0] == results[1]
    assert value(2.0, np.full((5, 2, 2), np.nan), np.zeros(5, bool)) == (0, 0)
