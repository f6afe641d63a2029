"""Kernels: one table, the same invariants; adaptation equals BlackJAX's."""

import dataclasses
import functools

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from blackjax.diagnostics import effective_sample_size, potential_scale_reduction
from helpers import check_moments, some_slow
from numpyro.infer import MCMC

import numpyro_ebm as ebm
from numpyro_ebm.kernels import adaptation, chains
from numpyro_ebm.kernels.averaging import averaging_of, next_averaging
from numpyro_ebm.kernels.langevin import barker_takes_mass_matrix
from numpyro_ebm.kernels.microcanonical import GRADIENTS_PER_STEP
from numpyro_ebm.kernels.names import KERNELS as NAMED
from numpyro_ebm.kernels.names import resolve_kernel

KERNELS = {
    "langevin": ebm.Langevin(step_size=0.01),
    "mala": ebm.MALA(),
    "barker": ebm.Barker(),
    "hmc": ebm.HMC(num_integration_steps=3),
    "dynamic_hmc": ebm.DynamicHMC(num_integration_steps=5),
    "ghmc": ebm.GHMC(),
    "nuts": ebm.NUTS(),
    "mclmc": ebm.MCLMC(step_size=0.3),
    "adjusted_mclmc": ebm.AdjustedMCLMC(),
    "elliptical_slice": ebm.EllipticalSlice(mean=0.0, covariance=3.0),
    "parallel_tempering": ebm.ParallelTempering("mala", temperatures=(1.0, 2.0, 4.0)),
}
UNADJUSTED = ["langevin", "mclmc"]
ADJUSTED = [name for name in KERNELS if name not in UNADJUSTED]
QUICK = ["mala", "dynamic_hmc", "elliptical_slice"]
ADAPTED = [name for name, kernel in KERNELS.items() if kernel.target_acceptance is not None]
MASS = [name for name in ADAPTED if KERNELS[name].adapts_mass_matrix]
FEW = ["mala", "barker", "ghmc"]
SCALES = jnp.array([0.5, 1.0, 2.0])
MEANS = jnp.array([1.0, -2.0, 0.0])


def gaussian(z, local=None):
    return -0.5 * jnp.sum(((z - MEANS) / SCALES) ** 2)


def standard(z, local=None):
    return -0.5 * jnp.sum(z**2)


def correlated(z):
    """Correlation 0.6 between the first two coordinates."""
    first, second, third = (z - MEANS) / SCALES
    return -0.5 * ((first**2 - 1.2 * first * second + second**2) / (1 - 0.6**2) + third**2)


def bent(z):
    """A normal, one bent by its square, and a logistic."""
    return -0.5 * z[0] ** 2 - 0.5 * (z[1] - 0.5 * (z[0] ** 2 - 1)) ** 2 - z[2] - 2 * jnp.logaddexp(0.0, -z[2])


def walled(z):
    """A half normal with NaN beyond its wall, and two normals."""
    return jnp.where(z[0] > 0, -0.5 * jnp.sum(z**2), jnp.nan)


TARGETS = {  # each with its means and variances
    "correlated": (correlated, np.asarray(MEANS), np.asarray(SCALES) ** 2),
    "bent": (bent, np.zeros(3), np.array([1.0, 1.5, np.pi**2 / 3])),
    "walled": (walled, np.array([np.sqrt(2 / np.pi), 0, 0]), np.array([1 - 2 / np.pi, 1, 1])),
}
NUM_CHAINS = 6


@functools.cache
def run_on_all_targets(name):
    """Chains of all targets in one program, so that each kernel compiles once; draws and records by target."""
    kernel = KERNELS[name]
    which = jnp.repeat(jnp.arange(len(TARGETS)), NUM_CHAINS)
    log_density = lambda z, i: jnp.stack([target(z) for target, _, _ in TARGETS.values()])[i]  # noqa: E731
    starts = jnp.tile(jnp.array([1.0, 0.0, 0.0]), (len(which), 1))
    run = chains.run(jax.random.key(1), kernel, log_density, starts, which, num_warmup=500, num_samples=2500)
    by_target = lambda leaf, i: leaf[i * NUM_CHAINS : (i + 1) * NUM_CHAINS]  # noqa: E731
    return {
        target: jax.tree.map(lambda leaf, i=i: by_target(leaf, i), (run.positions, run.info))
        for i, target in enumerate(TARGETS)
    }


@pytest.fixture(params=KERNELS, ids=list(KERNELS))
def kernel(request):
    return KERNELS[request.param]


def test_the_table_holds_every_kernel():
    continuous = {name for name, cls in NAMED.classes.items() if cls.is_discrete is not True}
    # The discrete ones are in test_discrete_kernels.py, block_gibbs, which moves on both, in test_block_kernels.py.
    assert set(KERNELS) | {"block_gibbs"} == continuous
    assert all(kernel.name == name for name, kernel in KERNELS.items())


class TestTargets:
    @pytest.mark.parametrize("target", some_slow(["bent"], ["correlated"]))
    @pytest.mark.parametrize("name", some_slow(QUICK, [name for name in ADJUSTED if name not in QUICK]))
    def test_an_adjusted_kernel_leaves_its_target_invariant(self, name, target):
        draws, info = run_on_all_targets(name)[target]
        check_moments(draws, *TARGETS[target][1:])
        # On the bent target a step near the limit of stability may run off to infinity.
        assert target == "bent" or not info.is_nonfinite.any()

    @pytest.mark.parametrize("name", some_slow(QUICK, [name for name in ADJUSTED if name not in QUICK]))
    def test_a_wall_of_nan_is_counted_and_not_entered(self, name):
        # The moments also say that a chain goes on after it has met the wall.
        draws, info = run_on_all_targets(name)["walled"]
        check_moments(draws, *TARGETS["walled"][1:])
        assert bool((draws[..., 0] > 0).all())
        assert 0.001 < float(info.is_nonfinite.mean()) < 0.9

    @pytest.mark.slow
    def test_mclmc_turns_back_at_a_wall(self):
        draws, info = run_on_all_targets("mclmc")["walled"]
        assert bool((draws[..., 0] > 0).all())
        assert 0.001 < float(info.is_nonfinite.mean()) < 0.5
        np.testing.assert_array_equal(info.is_divergent, info.is_nonfinite)

    def test_langevin_goes_through_a_wall_and_says_so(self):
        draws, info = run_on_all_targets("langevin")["walled"]
        assert bool((draws[..., 0] < 0).any())
        assert bool((info.is_nonfinite.any(axis=1)).all())

    def test_one_record_for_all(self, kernel):
        if kernel.name in (*QUICK, *UNADJUSTED):
            info = run_on_all_targets(kernel.name)["correlated"][1]
        else:  # few draws have the same record, and cost less
            target, options = lambda z, _: correlated(z), {"num_warmup": 0, "num_samples": 50}
            run = lambda starts: chains.run(jax.random.key(1), kernel, target, starts, **options).info  # noqa: E731
            info = jax.jit(run)(jnp.zeros((3, 3)))
        assert isinstance(info, ebm.TransitionInfo)
        assert info.parts is None
        types = [jnp.float32, bool, jnp.int32, jnp.float32, jnp.int32, bool, jnp.float32, None]
        assert all(leaf is None or leaf.dtype == dtype for leaf, dtype in zip(info, types, strict=True))
        assert int(info.num_gradients.min()) >= 1
        assert set(kernel.statistics) <= set(info._fields)
        for name in ("energy", "swap_rate"):
            value = getattr(info, name)
            assert bool(jnp.isfinite(value).all()) if name in kernel.statistics else value is None
        assert ("tree_depth" in kernel.statistics) == bool(info.tree_depth.any())
        assert ("acceptance_rate" in kernel.statistics) == bool(info.acceptance_rate.min() < 1)
        assert bool((info.acceptance_rate >= 0).all() & (info.acceptance_rate <= 1 + 1e-5).all())


@pytest.mark.parametrize("name", some_slow(FEW, [name for name in ADAPTED if name not in FEW]))
def test_the_step_adapts_to_its_target_acceptance(name):
    # All windows fast: the mass matrix stays, and dual averaging has a thousand steps. It steers the mean acceptance under
    # the steps that it tries; under their average, which it ends with, the acceptance is near that.
    kernel, num_warmup, stages = KERNELS[name], 1000, jnp.zeros((1000, 2), jnp.int32)
    target = lambda z: -0.5 * jnp.sum((z / jnp.linspace(0.5, 2.0, 25)) ** 2)  # noqa: E731

    def step(carry, inputs):
        state, warmup = carry
        i, key = inputs
        state, info = warmup.kernel.step(key, state, target)
        return (state, adaptation.update_at(stages, i, warmup, state.position, info)), info.acceptance_rate

    @jax.jit
    @jax.vmap
    def acceptance(key):
        position = kernel.lift(jnp.zeros(25))
        carry = (kernel.init(key, position, target), adaptation.start(kernel, position))
        keys = jax.random.split(jax.random.fold_in(key, 1), num_warmup + 500)
        return jax.lax.scan(step, carry, (jnp.arange(len(keys)), keys))[1]

    rate = acceptance(jax.random.split(jax.random.key(0), 8))
    np.testing.assert_allclose(rate[:, :num_warmup].mean(), kernel.target_acceptance, atol=0.02)
    np.testing.assert_allclose(rate[:, num_warmup:].mean(), kernel.target_acceptance, atol=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("step_size", [0.05, 0.25])
def test_langevin_has_the_bias_that_theory_says(step_size):
    # x' = (1 - h) x + sqrt(2h) z on a standard normal: variance 1 / (1 - h / 2).
    run = chains.run(
        jax.random.key(2),
        ebm.Langevin(step_size=step_size),
        lambda z, _: -0.5 * jnp.sum(z**2),
        jnp.zeros((20, 1)),
        num_warmup=200,
        num_samples=4000,
    )
    check_moments(run.positions, 0.0, 1 / (1 - step_size / 2))


@pytest.mark.slow
def test_the_bias_of_mclmc_falls_with_its_step():
    start = jax.random.normal(jax.random.key(1), (200, 4))

    @jax.jit
    def squares(step_size):
        kernel = ebm.MCLMC().adapted(step_size=step_size)
        target = lambda z, _: -0.5 * jnp.sum(z**2)  # noqa: E731
        return chains.run(jax.random.key(0), kernel, target, start, num_warmup=0, num_samples=1000).positions ** 2

    bias, error = {}, {}
    for step_size in (2.0, 4.0):
        values = np.asarray(squares(step_size).mean((1, 2)))
        bias[step_size], error[step_size] = values.mean() - 1, values.std() / np.sqrt(len(values))
    assert bias[4.0] < -5 * error[4.0]
    assert bias[2.0] < -5 * error[2.0]
    assert abs(bias[2.0]) + 5 * error[2.0] < abs(bias[4.0]) / 4


@pytest.mark.slow
def test_a_random_number_of_steps_cures_the_resonance_of_hmc():
    # Of this step five leapfrog steps are half a period of a standard normal: x goes to -x, and x^2 nowhere.
    step_size, start = 2 * np.sin(np.pi / 10), 0.5 + jnp.arange(4.0)[:, None]
    draw = functools.partial(chains.run, log_density=standard, positions=start, num_warmup=0, num_samples=3000)
    stuck = draw(jax.random.key(0), ebm.HMC(step_size, 5, jitter=0.0))
    np.testing.assert_allclose(stuck.positions**2, jnp.broadcast_to(start[:, None] ** 2, (4, 3000, 1)), rtol=0.02)
    for kernel, fewest in ((ebm.DynamicHMC(step_size, 5), 1), (ebm.HMC(step_size, 5), 3)):
        run = draw(jax.random.key(0), kernel)
        check_moments(run.positions, 0.0, 1.0, min_ess=1000)
        counts = np.bincount(np.asarray(run.info.num_gradients).ravel(), minlength=6) / 12_000
        expected = np.where(np.arange(6) < fewest, 0.0, 1 / (6 - fewest))
        np.testing.assert_allclose(counts, expected, atol=5 * np.sqrt(0.25 / 12_000))


@pytest.mark.slow
def test_hmc_as_a_newcomer_types_it_mixes():
    # A trajectory of a fixed length: R-hat 1.083 and 371 effective draws of 4000.
    energy = ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (3,))
    draws = ebm.sample(jax.random.key(0), energy, "hmc").samples["x"]
    assert potential_scale_reduction(draws).max() < 1.01
    check_moments(draws, 0.0, 1.0, min_ess=700)


@pytest.mark.slow
def test_an_adapted_step_resonates_too():
    worst = {}
    for kernel in (ebm.HMC(num_integration_steps=5, jitter=0.0), ebm.DynamicHMC(num_integration_steps=5)):

        @jax.jit
        def squares(key, kernel=kernel):
            return chains.run(key, kernel, standard, jnp.zeros((4, 2)), num_warmup=500, num_samples=2000).positions ** 2

        # Whether a step resonates is an accident of its warm-up, so the worst of several.
        worst[kernel.name] = min(float(effective_sample_size(squares(jax.random.key(i))).min()) for i in range(4))
    assert worst["dynamic_hmc"] > 10 * worst["hmc"]


class TestMoves:
    def test_follow_the_stated_convention(self):
        # On a flat target with step h the move has standard deviation sqrt(2h).
        key, start = jax.random.key(0), jnp.zeros((20_000, 1))
        for kernel in (ebm.Langevin(step_size=0.5), ebm.MALA(step_size=0.5)):
            moved, health, *_ = chains.advance(key, kernel, lambda z, _: 0.0 * jnp.sum(z), start, num_steps=1)
            np.testing.assert_allclose(moved.std(), 1.0, atol=5 / np.sqrt(2 * 20_000))
            np.testing.assert_allclose(health.acceptance_rate, 1.0)

    def test_barkers_mass_matrix_is_inverted_upstream(self):
        # Fails once BlackJAX mends it: then Barker.step no longer inverts, and barker_takes_mass_matrix may go.
        assert barker_takes_mass_matrix()

    @pytest.mark.parametrize("matrix", [jnp.array([4.0, 0.25]), jnp.array([[1.0, 0.8], [0.8, 2.0]])], ids=["diag", "dense"])
    def test_of_barker_have_the_covariance_of_the_inverse_mass_matrix(self, matrix):
        kernel = ebm.Barker(step_size=0.5, inverse_mass_matrix=matrix)
        moved, *_ = chains.advance(
            jax.random.key(0), kernel, lambda z, _: 0.0 * jnp.sum(z), jnp.zeros((20_000, 2)), num_steps=1
        )
        covariance = 0.25 * (jnp.diag(matrix) if matrix.ndim == 1 else matrix)
        largest = float(jnp.diagonal(covariance).max())
        np.testing.assert_allclose(np.cov(moved.T), covariance, atol=5 * largest * np.sqrt(2 / 20_000))

    @pytest.mark.parametrize("matrix", [jnp.array([4.0, 0.25]), jnp.array([[1.0, 0.8], [0.8, 2.0]])], ids=["diag", "dense"])
    def test_of_ghmc_start_with_the_momentum_of_its_mass_matrix(self, matrix):
        kernel = ebm.GHMC(inverse_mass_matrix=matrix)
        init = lambda key: kernel.init(key, jnp.zeros(2), lambda z: -0.5 * jnp.sum(z**2)).momentum  # noqa: E731
        momenta = jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 20_000))
        mass = np.linalg.inv(np.diag(matrix) if matrix.ndim == 1 else matrix)
        np.testing.assert_allclose(np.cov(momenta.T), mass, atol=5 * mass.max() * np.sqrt(2 / 20_000))

    def test_of_mala_are_blackjax_s(self):
        kernel, start = ebm.MALA(step_size=0.4), {"a": jnp.ones(2), "b": jnp.zeros(())}
        target = lambda z: correlated(jnp.append(z["a"], z["b"]))  # noqa: E731
        theirs = blackjax.mala(target, kernel.step_size)
        ours = functools.partial(kernel.step, log_density=target)

        def draws(step):
            def body(state, key):
                state, info = step(key, state)
                return state, (state, info.acceptance_rate)

            keys = jax.random.split(jax.random.key(5), 200)
            return jax.jit(lambda: jax.lax.scan(body, theirs.init(start), keys))()[1]

        a, b = draws(ours), draws(theirs.step)
        assert 0.3 < float(a[1].mean()) < 0.9
        jax.tree.map(np.testing.assert_array_equal, a, b)

    @pytest.mark.usefixtures("x64")
    @pytest.mark.parametrize(
        "covariance",
        some_slow([jnp.array([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])], [jnp.array([0.5, 2.0, 1.0])]),
        ids=["dense", "diag"],
    )
    def test_of_elliptical_slice_are_blackjax_s(self, covariance):
        kernel = ebm.EllipticalSlice(mean=MEANS, covariance=covariance)
        full = covariance if covariance.ndim == 2 else jnp.diag(covariance)
        target = lambda z: jax.scipy.stats.multivariate_normal.logpdf(z, MEANS, full) - jnp.sum(z**4) / 8  # noqa: E731
        theirs = blackjax.elliptical_slice(
            lambda z: -jnp.sum(z**4) / 8, mean=MEANS.astype(float), cov=covariance.astype(float)
        )

        def draws(step, state):
            def body(state, key):
                state, _ = step(key, state)
                return state, state.position

            return jax.jit(lambda: jax.lax.scan(body, state, jax.random.split(jax.random.key(5), 100)))()[1]

        start = jnp.zeros(3)
        ours = draws(functools.partial(kernel.step, log_density=target), kernel.init(jax.random.key(0), start, target))
        np.testing.assert_allclose(ours, draws(theirs.step, theirs.init(start)), rtol=1e-9)

    def test_of_mclmc_cost_two_gradients(self):
        calls = []

        def target(z):
            calls.append(1)
            return -0.5 * jnp.sum(z**2)

        kernel = ebm.MCLMC()
        state = jax.eval_shape(lambda key: kernel.init(key, jnp.zeros(2), target), jax.random.key(0))
        calls.clear()
        jax.eval_shape(lambda key, state: kernel.step(key, state, target), jax.random.key(1), state)
        assert len(calls) == GRADIENTS_PER_STEP


def test_what_is_not_finite_is_seen_and_not_entered(kernel):
    # A density that is 0 where the chain starts, and one of these everywhere else.
    elsewhere = jnp.array([jnp.nan, -jnp.inf, jnp.inf, 0.0])
    start = jnp.array([0.3, 0.7])

    def two_steps(value):
        target = lambda z: jnp.where(jnp.sum((z - start) ** 2) < 1e-10, 0.0, value)  # noqa: E731
        step = lambda state, key: kernel.step(key, state, target)  # noqa: E731
        state = kernel.init(jax.random.key(0), kernel.lift(start), target)
        state, info = jax.lax.scan(step, state, jax.random.split(jax.random.key(1), 2))
        return kernel.lower(state.position), info.is_nonfinite.any(), info.acceptance_rate

    positions, is_nonfinite, acceptance = jax.jit(jax.vmap(two_steps))(elsewhere)
    np.testing.assert_array_equal(is_nonfinite, [True, True, True, False])
    assert not bool(jnp.isnan(acceptance).any())
    if kernel.name != "langevin":
        np.testing.assert_allclose(positions[:2], jnp.stack([start, start]), atol=1e-5)
    assert not np.allclose(positions[3], start, atol=1e-3)


def test_elliptical_slice_ends_on_a_flat_top():
    # Where rounding hides the height, no point is above it: BlackJAX's loop does not end.
    target = lambda z: jnp.where(jnp.sum(z**2) < 1e-30, 1e9, -jnp.sum(z**2))  # noqa: E731
    kernel = KERNELS["elliptical_slice"]
    state = kernel.init(jax.random.key(0), jnp.zeros(2), target)
    state, info = jax.jit(lambda state: kernel.step(jax.random.key(1), state, target))(state)
    np.testing.assert_array_equal(state.position, jnp.zeros(2))
    assert int(info.num_gradients) == 100


def test_a_kernel_is_a_pytree_of_its_settings(kernel):
    doubled = jax.jit(lambda k: jax.tree.map(lambda leaf: 2 * leaf, k))(kernel)
    assert type(doubled) is type(kernel)
    if kernel.name == "elliptical_slice":
        np.testing.assert_allclose(doubled.covariance, 2 * kernel.covariance)
        assert doubled.step_size is None
    else:
        np.testing.assert_allclose(doubled.step_size, 2 * kernel.step_size)


@pytest.mark.parametrize("is_double", some_slow([True], [False]))
def test_pytree_positions_in_single_and_double_precision(kernel, is_double):
    with jax.enable_x64(is_double):
        start = {"a": jnp.zeros((5,)), "b": jnp.ones((5, 2))}
        target = lambda z, _: -0.5 * (z["a"] ** 2 + jnp.sum(z["b"] ** 2))  # noqa: E731
        run = functools.partial(chains.run, log_density=target, positions=start, num_warmup=30, num_samples=7)
        traced = jax.eval_shape(lambda key: run(key, kernel), jax.random.key(0))
    assert jax.tree.map(jnp.shape, traced.positions) == {"a": (5, 7), "b": (5, 7, 2)}
    expected = jnp.float64 if is_double else jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((traced.positions, traced.kernel))} == {jnp.dtype(expected)}


IN_MCMC = {  # with one that has no step size and moves replicas
    "tempered slice": ebm.ParallelTempering(KERNELS["elliptical_slice"], temperatures=(1.0, 2.0)),
    **{name: KERNELS[name] for name in ("barker", "dynamic_hmc", "ghmc", "mclmc", "adjusted_mclmc", "parallel_tempering")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", some_slow(["barker"], [name for name in IN_MCMC if name != "barker"]))
def test_in_numpyro_mcmc(name):
    # Two latent sites: positions are dicts.
    def model():
        x = numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * jnp.sum(x**2), (2,)))
        numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
        numpyro.deterministic("first", x[0])

    kernel = IN_MCMC[name]
    mcmc = MCMC(
        ebm.BlackJAXKernel(model, kernel),
        num_warmup=300,
        num_samples=1500,
        num_chains=4,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(0))
    draws = mcmc.get_samples(group_by_chain=True)
    check_moments(draws["x"], 0.0, 1.0)
    check_moments(jnp.log(draws["scale"]), 0.0, 1.0)
    np.testing.assert_array_equal(draws["first"], draws["x"][..., 0])
    fields = mcmc.get_extra_fields()
    assert ("step_size" in fields) == (kernel.step_size is not None)
    assert ("swap_rate" in fields) == (kernel.name == "parallel_tempering")
    assert not fields["is_nonfinite"].any()
    assert (mcmc.last_state.step_size is None) == (kernel.step_size is None)


@pytest.mark.slow
def test_a_start_in_integers_or_half_precision(rng_key):
    kernel = ebm.MALA()
    for start in (jnp.zeros((2, 3), jnp.int8), jnp.zeros((2, 3), jnp.bfloat16), np.zeros((2, 3))):
        moved, *_ = chains.advance(rng_key, kernel, gaussian, start, num_steps=2)
        assert moved.dtype == jnp.float32


@pytest.mark.slow
def test_chains_are_scored_anew():
    # Chains at equilibrium of one density, moved under another, reach the other.
    start = 3.0 * jax.random.normal(jax.random.key(0), (4000, 1))
    moved, *_ = chains.advance(
        jax.random.key(1), ebm.NUTS(0.3), lambda z, t: -0.5 * t * jnp.sum(z**2), start, jnp.full(4000, 4.0), num_steps=30
    )
    np.testing.assert_allclose(moved.var(), 0.25, atol=5 * 0.25 * np.sqrt(2 / 4000))


@pytest.mark.slow
def test_each_chain_has_its_own_local():
    precision = jnp.repeat(jnp.array([1.0, 25.0]), 2000)
    moved, *_ = chains.advance(
        jax.random.key(1),
        ebm.NUTS(step_size=0.2),
        lambda z, t: -0.5 * t * z**2,
        jnp.zeros(4000),
        precision,
        num_steps=10,
    )
    np.testing.assert_allclose(moved[:2000].var(), 1.0, atol=5 * np.sqrt(2 / 2000))
    np.testing.assert_allclose(moved[2000:].var(), 0.04, atol=5 * 0.04 * np.sqrt(2 / 2000))


def test_langevin_that_runs_away_says_so(rng_key):
    moved, health, *_ = chains.advance(
        rng_key, ebm.Langevin(step_size=0.5), lambda z, _: 0.25 * jnp.sum(z**4), jnp.full((3, 1), 5.0), num_steps=30
    )
    assert not bool(jnp.isfinite(moved).all())
    assert float(health.divergence_rate) > 0


class TestAdaptation:
    # In double precision: the two programs round differently, and HMC is chaotic.
    @pytest.mark.parametrize("name", ["hmc", "nuts"])
    @pytest.mark.usefixtures("x64")
    def test_equals_blackjax_window_adaptation(self, name):
        kernel, start, num_warmup = KERNELS[name], jnp.zeros(3), 150
        kernel = ebm.HMC(num_integration_steps=3, jitter=0.0) if name == "hmc" else kernel
        extra = {"num_integration_steps": 3} if name == "hmc" else {}
        algorithm = getattr(blackjax, name)
        reference = blackjax.window_adaptation(
            algorithm,
            gaussian,
            initial_step_size=kernel.step_size,
            target_acceptance_rate=kernel.target_acceptance,
            **extra,
        )
        key = jax.random.key(3)
        (state, parameters), _ = reference.run(key, start, num_warmup)
        stages = adaptation.schedule(kernel, num_warmup)

        def step(carry, inputs):
            state, warmup = carry
            i, key = inputs
            state, info = warmup.kernel.step(key, state, gaussian)
            return (state, adaptation.update_at(stages, i, warmup, state.position, info)), None

        carry = (kernel.init(jax.random.key(0), start, gaussian), adaptation.start(kernel, start))
        (ours, warmup), _ = jax.lax.scan(step, carry, (jnp.arange(num_warmup), jax.random.split(key, num_warmup)))
        np.testing.assert_allclose(warmup.kernel.step_size, parameters["step_size"], rtol=1e-6)
        np.testing.assert_allclose(warmup.kernel.inverse_mass_matrix, parameters["inverse_mass_matrix"], rtol=1e-6)
        np.testing.assert_allclose(ours.position, state.position, rtol=1e-6)

    def test_the_step_size_stays_finite(self):
        """Where every step is accepted, as on spins that do not depend on each other, the longest is as good as any."""
        energy = ebm.EnergyDistribution(lambda x: 0.1 * jnp.sum(x), (4,), support=ebm.spins)
        drawn = ebm.sample(jax.random.key(0), energy, "dmala", num_warmup=3000, num_samples=10, num_chains=1)
        assert 1 < float(jnp.max(drawn.stats["step_size"])) <= adaptation.LONGEST * 1.001

    @pytest.mark.parametrize(("rate", "bound"), [(1.0, adaptation.LONGEST), (0.0, adaptation.SHORTEST)])
    def test_the_step_size_has_bounds(self, rate, bound):
        averaging = averaging_of(ebm.MALA())
        averaging = jax.lax.fori_loop(0, 3000, lambda _, each: next_averaging(each, ebm.MALA(), rate), averaging)
        np.testing.assert_allclose(jnp.exp(averaging.log_step_size), bound, rtol=1e-4)
        assert adaptation.SHORTEST * 0.999 < jnp.exp(averaging.log_step_size_avg) < adaptation.LONGEST * 1.001

    @pytest.mark.slow
    def test_the_mass_matrix_learns_the_scales(self):
        run = chains.run(jax.random.key(0), ebm.NUTS(), gaussian, jnp.zeros((4, 3)), num_warmup=1000, num_samples=1)
        np.testing.assert_allclose(run.kernel.inverse_mass_matrix.mean(0), SCALES**2, rtol=0.25)

    @pytest.mark.slow
    def test_under_tempering_it_learns_those_of_temperature_1(self):
        kernel = ebm.ParallelTempering(ebm.Barker(), temperatures=(1.0, 4.0))
        run = chains.run(jax.random.key(0), kernel, gaussian, jnp.zeros((4, 3)), num_warmup=2000, num_samples=1)
        np.testing.assert_allclose(run.kernel.inverse_mass_matrix.mean(0), SCALES**2, rtol=0.25)

    def test_no_warmup_keeps_all(self, kernel):
        assert adaptation.schedule(kernel, 0).shape == (0, 2)
        started = adaptation.start(kernel, kernel.lift(jnp.zeros(3))).kernel
        assert type(started) is type(kernel)
        jax.tree.map(
            np.testing.assert_allclose, started.adapted(inverse_mass_matrix=None), kernel
        ) if kernel.name in MASS else (jax.tree.map(np.testing.assert_allclose, started, kernel))

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["langevin", "mclmc", "elliptical_slice"])
    def test_what_does_not_adapt_keeps_its_settings(self, name):
        warmup = adaptation.start(KERNELS[name], jnp.zeros(3))
        record = run_on_all_targets(name)["correlated"][1]
        updated = adaptation.update(warmup, jnp.zeros(2), jnp.ones(3), jax.tree.map(lambda leaf: leaf[0, 0], record))
        jax.tree.map(np.testing.assert_array_equal, adaptation.finish(updated), warmup.kernel)

    @pytest.mark.slow
    def test_a_dense_mass_matrix_stays_dense(self):
        kernel = ebm.NUTS(inverse_mass_matrix=jnp.eye(3))
        run = chains.run(jax.random.key(0), kernel, gaussian, jnp.zeros((2, 3)), num_warmup=100, num_samples=2)
        assert run.kernel.inverse_mass_matrix.shape == (2, 3, 3)


class TestBadInput:
    def test_settings(self):
        for make, words in (
            (lambda: ebm.GHMC(alpha=1.5), "alpha=1.5"),
            (lambda: ebm.GHMC(delta=-0.1), "delta=-0.1"),
            (lambda: ebm.GHMC(alpha=0.0), "alpha > 0"),
            (lambda: ebm.HMC(jitter=1.5), "0 <= jitter <= 1; got 1.5"),
            (lambda: ebm.MCLMC(L=-1.0), "L > 0"),
            (lambda: ebm.DynamicHMC(num_integration_steps=0), "DynamicHMC needs a whole number"),
            (lambda: ebm.AdjustedMCLMC(num_integration_steps=1.5), "AdjustedMCLMC needs a whole number"),
            (lambda: ebm.Barker(step_size=0.0), "step_size > 0"),
            (lambda: ebm.EllipticalSlice(mean=0.0), "mean and covariance, or neither"),
        ):
            with pytest.raises(ebm.EnergyError, match=words):
                make()

    @pytest.mark.parametrize("name", ["mclmc", "adjusted_mclmc"])
    def test_microcanonical_kernels_need_two_coordinates(self, name):
        with pytest.raises(ebm.EnergyError, match="two coordinates or more.*'nuts'"):
            ebm.sample(jax.random.key(0), ebm.EnergyDistribution(lambda x: x**2), name, num_samples=2)

    @pytest.mark.parametrize("cls", [ebm.MCLMC, ebm.AdjustedMCLMC])
    def test_microcanonical_kernels_take_no_dense_mass_matrix(self, cls):
        with pytest.raises(ebm.EnergyError, match=r"inverse_mass_matrix of shape \(3, 3\).*by coordinate\.$"):
            cls(inverse_mass_matrix=jnp.eye(3))

    @pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("elliptical_slice", "parallel_tempering")])
    def test_what_no_kernel_can_use(self, name):
        cls = type(KERNELS[name])
        fields = {field.name for field in dataclasses.fields(cls)}
        for step_size in (0.0, -1.0, jnp.nan, jnp.inf, None, "small"):
            with pytest.raises(ebm.EnergyError, match=rf"{cls.__name__} needs (a )?step_size"):
                cls(step_size=step_size)
        matrices = (0.0 * jnp.ones(3), -jnp.ones(3), jnp.array([1.0, jnp.nan]), jnp.array(2.0), jnp.ones((2, 2, 2)))
        indefinite, skew = jnp.array([[1.0, 2.0], [2.0, 1.0]]), jnp.array([[1.0, 0.5], [0.1, 1.0]])
        dense = (indefinite, skew, jnp.zeros((2, 2)), jnp.ones((2, 3)))
        for matrix in (*matrices, *dense) if "inverse_mass_matrix" in fields else ():
            with pytest.raises(ebm.EnergyError, match=f"{cls.__name__} .*inverse_mass_matrix"):
                cls(inverse_mass_matrix=matrix)

    @pytest.mark.parametrize(
        "settings",
        [
            {"mean": 0.0, "covariance": 0.0},
            {"mean": 0.0, "covariance": -1.0},
            {"mean": jnp.zeros(2), "covariance": jnp.array([1.0, -1.0])},
            {"mean": jnp.zeros(2), "covariance": jnp.array([[1.0, 2.0], [2.0, 1.0]])},
            {"mean": jnp.zeros(2), "covariance": jnp.full((2, 2), jnp.nan)},
            {"mean": jnp.array([0.0, jnp.nan]), "covariance": 1.0},
        ],
    )
    def test_a_covariance_that_is_none(self, settings):
        with pytest.raises(ebm.EnergyError, match="EllipticalSlice needs"):
            ebm.EllipticalSlice(**settings)

    @pytest.mark.parametrize("values", [jnp.array([1, 0]), jnp.array([1, 1]), jnp.ones((2, 2)), jnp.array([0])])
    def test_values_that_are_none(self, values):
        with pytest.raises(ebm.EnergyError, match="increasing order, two or more"):
            ebm.Gibbs(values=values)

    @pytest.mark.parametrize(
        "temperatures", [(1.0,), (2.0, 4.0), (1.0, 4.0, 2.0), (1.0, np.inf), (1.0, np.nan), 1.0, ((1.0, 2.0),)]
    )
    def test_temperatures(self, temperatures):
        with pytest.raises(ebm.EnergyError, match="two temperatures or more, from 1 upwards"):
            ebm.ParallelTempering("mala", temperatures=temperatures)

    def test_what_is_tempered(self):
        with pytest.raises(ebm.EnergyError, match="Unknown kernel 'malla'.*'mala'"):
            ebm.ParallelTempering("malla")
        with pytest.raises(ebm.EnergyError, match="cannot temper itself"):
            ebm.ParallelTempering(ebm.ParallelTempering())


class TestEllipticalSlice:
    bases = {
        "normal": (dist.Normal(1.0, 2.0).expand([3]).to_event(1), [1.0] * 3, [4.0] * 3),
        "normals": (dist.Normal(jnp.arange(3.0), jnp.array([1.0, 2.0, 3.0])).to_event(1), [0, 1, 2], [1, 4, 9]),
        "expanded over rows": (dist.Normal(jnp.arange(3.0), 1.0).to_event(1).expand([4]), [0, 1, 2], [1, 1, 1]),
        "multivariate": (
            dist.MultivariateNormal(jnp.ones(2), jnp.array([[2.0, 1.0], [1.0, 2.0]])),
            [1, 1],
            [[2, 1], [1, 2]],
        ),
        "blocks": (
            dist.MultivariateNormal(jnp.array([1.0, 2.0]), jnp.array([[2.0, 1.0], [1.0, 2.0]])).expand([2]).to_event(1),
            [1, 2, 1, 2],
            [[2, 1, 0, 0], [1, 2, 0, 0], [0, 0, 2, 1], [0, 0, 1, 2]],
        ),
        "scalar": (dist.Normal(1.0, 2.0), [1.0], [4.0]),
    }

    @pytest.mark.parametrize("name", bases)
    def test_takes_the_gaussian_from_the_base(self, name):
        base, mean, covariance = self.bases[name]
        bound = ebm.EllipticalSlice().bind(ebm.EnergyDistribution(jnp.sum, base.event_shape, base=base))
        np.testing.assert_allclose(bound.mean, mean)
        np.testing.assert_allclose(bound.covariance, covariance, rtol=1e-6)

    @pytest.mark.slow
    def test_draws_under_rows_of_context(self):
        d = ebm.EnergyDistribution(
            lambda x, t: 0.5 * t * jnp.sum(x**2),
            (2,),
            context=jnp.array([1.0, 3.0]),
            batch_shape=(2,),
            base=dist.Normal(1.0, 1.0).expand([2]).to_event(1),
        )
        draws = ebm.sample(jax.random.key(0), d, "elliptical_slice", num_warmup=0, num_samples=2000)
        assert "step_size" not in draws.stats
        for row, t in enumerate((1.0, 3.0)):
            check_moments(draws.samples["x"][:, :, row], 1 / (1 + t), 1 / (1 + t))

    @pytest.mark.slow
    def test_in_a_chain_sampler_under_tempering(self):
        sampler = ebm.ChainSampler(ebm.ParallelTempering("elliptical_slice", temperatures=(1.0, 2.0)), num_warmup=0)
        d = ebm.EnergyDistribution(lambda x: 0.5 * x**2, base=dist.Normal(1.0, 1.0), sampler=sampler)
        draws = d.sample(jax.random.key(0), (4000,))
        np.testing.assert_allclose(draws.mean(), 0.5, atol=5 * np.sqrt(0.5 / 4000))
        np.testing.assert_allclose(draws.var(), 0.5, atol=5 * 0.5 * np.sqrt(2 / 4000))

    @pytest.mark.parametrize(
        ("base", "words"),
        [
            (None, "the base is missing"),
            (dist.StudentT(3.0), "the base is StudentT"),
            (dist.Normal(jnp.arange(4.0), 1.0), r"the same for all rows; the base has batch shape \(4,\)"),
        ],
    )
    def test_refuses_without_a_gaussian_base(self, base, words):
        d = ebm.EnergyDistribution(lambda x: x**2, base=base)
        with pytest.raises(ebm.EnergyError, match=rf"Gaussian base or EllipticalSlice\(mean=.*{words}"):
            ebm.sample(jax.random.key(0), d, "elliptical_slice")

    def test_refuses_a_model_and_shapes_that_do_not_fit(self):
        model = lambda: numpyro.sample("x", dist.Normal(0, 1).expand([2]).to_event(1))  # noqa: E731
        with pytest.raises(ebm.EnergyError, match=r"EllipticalSlice\(mean=.*a model has no base"):
            ebm.sample(jax.random.key(0), model, "elliptical_slice")
        mcmc = MCMC(ebm.BlackJAXKernel(model, "elliptical_slice"), num_warmup=1, num_samples=1, progress_bar=False)
        with pytest.raises(ebm.EnergyError, match="a model has no base"):
            mcmc.run(jax.random.key(0))
        with pytest.raises(ebm.EnergyError, match=r"covariance of shape \(2,\) or \(2, 2\).*got shapes \(\) and \(3,\)"):
            ebm.sample(jax.random.key(0), model, ebm.EllipticalSlice(0.0, jnp.ones(3)))


@pytest.mark.parametrize("num_chains", [1, 2])
@pytest.mark.parametrize("batch_shape", [(), (1,), (2,), (2, 1)])
def test_statistics_have_the_rows_after_the_draws(num_chains, batch_shape):
    scale = jnp.exp(jnp.arange(float(np.prod(batch_shape)))).reshape(batch_shape)
    d = ebm.EnergyDistribution(lambda x, s: 0.5 * jnp.sum((x / s) ** 2), (2,), context=scale, batch_shape=batch_shape)
    run = ebm.sample(jax.random.key(0), d, "mala", num_warmup=30, num_samples=3, num_chains=num_chains)
    assert {value.shape for value in run.stats.values()} == {(num_chains, 3, *batch_shape)}
    np.testing.assert_array_equal(run.stats["step_size"][:, 0].reshape(-1), run.kernel.step_size)


class TestParallelTempering:
    @staticmethod
    def two_modes(x):
        """Weights 0.2 and 0.8, 16 standard deviations apart."""
        modes = jnp.stack([jnp.log(0.2) - 0.5 * ((x + 4) / 0.5) ** 2, jnp.log(0.8) - 0.5 * ((x - 4) / 0.5) ** 2])
        return -jax.nn.logsumexp(modes)

    @pytest.mark.slow
    def test_finds_the_weights_of_two_modes(self):
        # The base only says where chains start; it is all but flat.
        d = ebm.EnergyDistribution(self.two_modes)
        kernel = ebm.ParallelTempering("mala", temperatures=(1.0, 2.5, 6.0, 15.0, 40.0))
        draws = ebm.sample(jax.random.key(0), d, kernel, num_warmup=500, num_samples=5000)
        is_right = (draws.samples["x"] > 0).astype(float)
        ess = float(effective_sample_size(is_right))
        assert ess > 200
        np.testing.assert_allclose(is_right.mean(), 0.8, atol=5 * np.sqrt(0.16 / ess))
        assert bool((is_right.mean(1) > 0.2).all() & (is_right.mean(1) < 1).all())
        distance = jnp.abs(jnp.abs(draws.samples["x"]) - 4)
        np.testing.assert_allclose((distance**2).mean(), 0.25, atol=0.02)
        assert 0.2 < float(draws.stats["swap_rate"].mean()) < 0.9
        assert draws.stats["step_size"].shape == (4, 5000)

    @pytest.mark.slow
    def test_without_it_a_chain_stays_where_it_starts(self):
        d = ebm.EnergyDistribution(self.two_modes)
        draws = ebm.sample(jax.random.key(0), d, "mala", num_warmup=200, num_samples=1000)
        weights = (draws.samples["x"] > 0).mean(axis=1)
        assert set(np.asarray(weights).tolist()) <= {0.0, 1.0}

    @pytest.mark.parametrize("name", some_slow(["ghmc", "langevin"], ["mala"]))
    def test_the_states_are_those_of_a_fresh_scoring(self, name):
        kernel = ebm.ParallelTempering(KERNELS[name], temperatures=(1.0, 3.0, 5.0))
        start = 3 * jax.random.normal(jax.random.key(3), (3, 3))

        @jax.jit
        def steps(key):
            def body(state, key):
                new, info = kernel.step(key, state, correlated)
                return new, (new, kernel.init(key, new.position, correlated), info.swap_rate)

            state = kernel.init(key, start, correlated)
            return jax.lax.scan(body, state, jax.random.split(key, 20))[1]

        ours, fresh, swap_rate = steps(jax.random.key(0))
        assert 0.05 < float(swap_rate.mean()) < 0.999
        np.testing.assert_allclose(ours.logdensity, fresh.logdensity, rtol=1e-4)
        for field in {"logdensity", "logdensity_grad", "position"} & set(ours.replicas._fields):
            np.testing.assert_allclose(getattr(ours.replicas, field), getattr(fresh.replicas, field), rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(ours.parity[1:], 1 - ours.parity[:-1])

    def test_equal_temperatures_always_swap(self):
        # A step too small to see: what moves are the swaps, even pairs and odd ones in turn.
        kernel = ebm.ParallelTempering(ebm.MALA(1e-12), temperatures=(1.0,) * 4)
        start = jnp.arange(4.0)[:, None]
        target = lambda z: -0.5 * jnp.sum(z**2)  # noqa: E731
        step = jax.jit(functools.partial(kernel.step, log_density=target))
        state = jax.jit(lambda: kernel.init(jax.random.key(0), start, target))()._replace(parity=jnp.array(0))
        state, info = step(jax.random.key(1), state)
        np.testing.assert_allclose(state.position[:, 0], [1, 0, 3, 2], atol=1e-4)
        assert float(info.swap_rate) == 1.0
        state, info = step(jax.random.key(2), state)
        np.testing.assert_allclose(state.position[:, 0], [1, 3, 0, 2], atol=1e-4)
        assert float(info.swap_rate) == 1.0
        assert int(info.num_gradients) == 4

    def test_a_swap_is_accepted_as_metropolis_says(self):
        # log alpha = (1 - 1/3) (log p(2) - log p(1)) = -1.
        kernel = ebm.ParallelTempering(ebm.MALA(1e-12), temperatures=(1.0, 3.0))
        target = lambda z: -0.5 * jnp.sum(z**2)  # noqa: E731
        start = jnp.array([[1.0], [2.0]])

        @jax.jit
        @jax.vmap
        def transition(key):
            return kernel.step(key, kernel.init(key, start, target), target)

        moved, info = transition(jax.random.split(jax.random.key(1), 20_000))
        np.testing.assert_allclose(info.swap_rate, np.exp(-1.0), rtol=1e-3)
        swapped = np.asarray(moved.position[:, 0, 0] > 1.5)
        np.testing.assert_allclose(swapped.mean(), np.exp(-1.0), atol=5 * np.sqrt(0.25 / 20_000))

    def test_a_lone_transition_swaps_any_pair(self):
        kernel = ebm.ParallelTempering(temperatures=(1.0, 2.0, 4.0))
        init = lambda key: kernel.init(key, kernel.lift(jnp.zeros(3)), gaussian).parity  # noqa: E731
        assert set(np.asarray(jax.jit(jax.vmap(init))(jax.random.split(jax.random.key(0), 20))).tolist()) == {0, 1}

    def test_lift_and_lower(self):
        kernel = ebm.ParallelTempering("nuts", temperatures=(1, 2))
        assert kernel.kernel == ebm.NUTS()
        assert kernel.temperatures == (1.0, 2.0)
        assert kernel.statistics == (*ebm.NUTS.statistics, "swap_rate")
        position = {"a": jnp.ones(()), "b": jnp.arange(3.0)}
        lifted = kernel.lift(position)
        assert jax.tree.map(jnp.shape, lifted) == {"a": (2,), "b": (2, 3)}
        jax.tree.map(np.testing.assert_array_equal, kernel.lower(lifted), position)


def test_resolve():
    assert resolve_kernel("mala") == ebm.MALA()
    assert resolve_kernel(ebm.HMC(0.3)).step_size == 0.3
    assert resolve_kernel("dynamic_hmc") == ebm.DynamicHMC() != ebm.HMC()
    assert resolve_kernel("parallel_tempering") == ebm.ParallelTempering(ebm.MALA())
    with pytest.raises(ebm.EnergyError, match="cannot sample a discrete support. Kernels that can: .*gibbs"):
        resolve_kernel("barker", is_discrete=True)
