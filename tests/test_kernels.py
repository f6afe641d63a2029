"""Kernels: one table, the same invariants; adaptation equals BlackJAX's."""

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check_moments

import numpyro_ebm as ebm
from numpyro_ebm import chains
from numpyro_ebm.kernels import adaptation, resolve_kernel

KERNELS = {
    "langevin": ebm.Langevin(step_size=0.01),
    "mala": ebm.MALA(),
    "hmc": ebm.HMC(num_integration_steps=3),
    "nuts": ebm.NUTS(),
}
ADJUSTED = ["mala", "hmc", "nuts"]
SCALES = jnp.array([0.5, 1.0, 2.0])
MEANS = jnp.array([1.0, -2.0, 0.0])


def gaussian(z, local=None):
    return -0.5 * jnp.sum(((z - MEANS) / SCALES) ** 2)


@pytest.fixture(params=KERNELS, ids=list(KERNELS))
def kernel(request):
    return KERNELS[request.param]


def test_the_table_holds_every_kernel():
    assert set(KERNELS) == set(ebm.available_kernels())


@pytest.mark.parametrize("name", ADJUSTED)
def test_an_adjusted_kernel_draws_from_its_target(name):
    # HMC with a fixed number of steps comes back to where it was on a Gaussian, at the step sizes its warm-up likes.
    kernel, num_warmup = (ebm.HMC(0.3, 4), 0) if name == "hmc" else (KERNELS[name], 500)
    run = chains.run(jax.random.key(1), kernel, gaussian, jnp.zeros((4, 3)), num_warmup=num_warmup, num_samples=4000)
    check_moments(run.positions, np.asarray(MEANS), np.asarray(SCALES) ** 2)


def test_mala_is_adapted_to_its_optimal_acceptance():
    target = lambda z, _: -0.5 * jnp.sum(z**2)  # noqa: E731
    run = chains.run(jax.random.key(1), ebm.MALA(), target, jnp.zeros((4, 10)), num_warmup=1000, num_samples=2000)
    np.testing.assert_allclose(run.info.acceptance_rate.mean(), 0.574, atol=0.03)


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


def test_moves_follow_the_stated_convention():
    # On a flat target with step h the move has standard deviation sqrt(2h).
    key, start = jax.random.key(0), jnp.zeros((20_000, 1))
    for kernel in (ebm.Langevin(step_size=0.5), ebm.MALA(step_size=0.5)):
        moved, health = chains.advance(key, kernel, lambda z, _: 0.0 * jnp.sum(z), start, num_steps=1)
        np.testing.assert_allclose(moved.std(), 1.0, atol=5 / np.sqrt(2 * 20_000))
        np.testing.assert_allclose(health.acceptance_rate, 1.0)


def test_one_record_for_all(kernel, rng_key):
    state = kernel.init(jax.random.key(0), jnp.zeros(3), gaussian)
    state, info = jax.jit(lambda k, s: kernel.step(k, s, gaussian))(rng_key, state)
    assert isinstance(info, ebm.TransitionInfo)
    assert [leaf.dtype for leaf in info] == [jnp.float32, bool, jnp.int32, jnp.float32, jnp.int32, bool, jnp.float32]
    assert int(info.num_gradients) >= 1
    assert set(kernel.statistics) <= set(info._fields)
    assert ("energy" in kernel.statistics) == bool(jnp.isfinite(info.energy))
    assert state.position.shape == (3,)


def test_a_kernel_is_a_pytree_of_its_settings(kernel):
    doubled = jax.jit(lambda k: jax.tree.map(lambda leaf: 2 * leaf, k))(kernel)
    assert type(doubled) is type(kernel)
    np.testing.assert_allclose(doubled.step_size, 2 * kernel.step_size)


def test_pytree_positions(kernel, rng_key):
    start = {"a": jnp.zeros((5,)), "b": jnp.ones((5, 2))}
    target = lambda z, _: -0.5 * (z["a"] ** 2 + jnp.sum(z["b"] ** 2))  # noqa: E731
    run = chains.run(rng_key, kernel, target, start, num_warmup=30, num_samples=7)
    assert jax.tree.map(jnp.shape, run.positions) == {"a": (5, 7), "b": (5, 7, 2)}


def test_a_start_in_integers_or_half_precision(rng_key):
    kernel = ebm.MALA()
    for start in (jnp.zeros((2, 3), jnp.int8), jnp.zeros((2, 3), jnp.bfloat16), np.zeros((2, 3))):
        moved, _ = chains.advance(rng_key, kernel, gaussian, start, num_steps=2)
        assert moved.dtype == jnp.float32


def test_chains_are_scored_anew():
    # Chains at equilibrium of one density, moved under another, reach the other.
    start = 3.0 * jax.random.normal(jax.random.key(0), (4000, 1))
    moved, _ = chains.advance(
        jax.random.key(1), ebm.NUTS(0.3), lambda z, t: -0.5 * t * jnp.sum(z**2), start, jnp.full(4000, 4.0), num_steps=30
    )
    np.testing.assert_allclose(moved.var(), 0.25, atol=5 * 0.25 * np.sqrt(2 / 4000))


def test_each_chain_has_its_own_local():
    precision = jnp.repeat(jnp.array([1.0, 25.0]), 2000)
    moved, _ = chains.advance(
        jax.random.key(1),
        ebm.NUTS(step_size=0.2),
        lambda z, t: -0.5 * t * z**2,
        jnp.zeros(4000),
        precision,
        num_steps=10,
    )
    np.testing.assert_allclose(moved[:2000].var(), 1.0, atol=5 * np.sqrt(2 / 2000))
    np.testing.assert_allclose(moved[2000:].var(), 0.04, atol=5 * 0.04 * np.sqrt(2 / 2000))


def test_a_wall_of_nan_is_not_entered(rng_key):
    half_normal = lambda z, _: jnp.where(z > 0, -0.5 * z**2, jnp.nan)  # noqa: E731
    for name in ADJUSTED:
        moved, _ = chains.advance(rng_key, KERNELS[name], half_normal, jnp.ones(50), num_steps=20)
        assert bool(jnp.all(moved > 0))


def test_langevin_that_runs_away_says_so(rng_key):
    moved, health = chains.advance(
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

    def test_the_mass_matrix_learns_the_scales(self):
        run = chains.run(jax.random.key(0), ebm.NUTS(), gaussian, jnp.zeros((4, 3)), num_warmup=1000, num_samples=1)
        np.testing.assert_allclose(run.kernel.inverse_mass_matrix.mean(0), SCALES**2, rtol=0.25)

    def test_langevin_keeps_its_step_and_no_warmup_keeps_all(self):
        for kernel in KERNELS.values():
            run = chains.run(jax.random.key(0), kernel, gaussian, jnp.zeros((2, 3)), num_warmup=0, num_samples=2)
            np.testing.assert_allclose(run.kernel.step_size, kernel.step_size)
        run = chains.run(jax.random.key(0), ebm.Langevin(0.02), gaussian, jnp.zeros((2, 3)), num_warmup=50, num_samples=2)
        np.testing.assert_allclose(run.kernel.step_size, 0.02)

    def test_a_dense_mass_matrix_stays_dense(self):
        kernel = ebm.NUTS(inverse_mass_matrix=jnp.eye(3))
        run = chains.run(jax.random.key(0), kernel, gaussian, jnp.zeros((2, 3)), num_warmup=100, num_samples=2)
        assert run.kernel.inverse_mass_matrix.shape == (2, 3, 3)


def test_resolve():
    assert resolve_kernel("mala") == ebm.MALA()
    assert resolve_kernel(ebm.HMC(0.3)).step_size == 0.3
