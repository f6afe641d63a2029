"""The negative phase: how chains are started, tuned, tempered and watched."""

import re
import warnings
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from helpers import fit, precision_model, some_slow, vector_model
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm.estimators import CONDITIONS
from numpyro_ebm.kernels import chains

MLE = 3.99528
ROWS = np.random.default_rng(0).normal(size=(64,)).astype(np.float32)


def site_model(energy, event_shape=(), **settings):
    """A model of one energy whose parameters are fixed at 1 times the param ``scale``."""

    def model(x):
        scale = numpyro.param("scale", 1.0)
        with numpyro.plate("rows", len(x)):
            d = ebm.EnergyDistribution(lambda x: scale * energy(x), event_shape, **settings)
            numpyro.sample("x", d, obs=x)

    return model


AT_REST = optax.sgd(0.0)


def train(model, name, x, updates, *, optimiser=AT_REST, key=0, **options):
    """State of the estimator after some updates; the energy stays as it is unless an optimiser moves it."""
    svi = SVI(ebm.estimate(model, name, **options), ebm.empty_guide, optimiser, Trace_ELBO())

    @jax.jit
    def run(rng_key):
        return jax.lax.scan(lambda s, _: svi.update(s, x), svi.init(rng_key, x), None, length=updates)[0]

    state = run(jax.random.key(key))
    jax.effects_barrier()
    return jax.block_until_ready(state).mutable_state[f"x${name}"]["state"]


def reported(state, name):
    return bool(state.health.reported[list(CONDITIONS).index(name)])


@contextmanager
def told(pattern):
    """The warnings of unhealthy chains, of which one matches."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        messages = []
        yield messages
    assert {w.category for w in caught} <= {ebm.UnhealthyChainsWarning}
    messages.extend(str(w.message) for w in caught)
    assert any(re.search(pattern, message) for message in messages), messages


class TestUnhealthyEnergies:
    @pytest.mark.parametrize(
        ("energy", "options"),
        [
            (lambda x: -0.5 * x**2, {}),
            (lambda x: -jnp.abs(x), {}),
            pytest.param(lambda x: 0.3 * x, {}, marks=pytest.mark.slow),
            pytest.param(lambda x: -x, {"support": constraints.positive}, marks=pytest.mark.slow),
        ],
        ids=["concave", "cone", "slope", "positive"],
    )
    def test_an_energy_unbounded_below_is_reported(self, energy, options):
        x = np.abs(ROWS) + 0.1
        with told(r"site 'x', estimator 'pcd': unbounded: .*base="):
            state = train(site_model(energy, **options), "pcd", x, 3, kernel=ebm.Langevin(0.1), num_steps=2)
        assert reported(state, "unbounded")

    def test_it_raises_where_asked_to(self):
        model = site_model(lambda x: -0.5 * x**2)
        with pytest.raises(RuntimeError, match=r"site 'x', estimator 'cd': unbounded"):
            train(model, "cd", ROWS, 3, on_unhealthy="raise")

    def test_a_warning_comes_once(self):
        with told("unbounded") as messages:
            train(site_model(lambda x: -jnp.abs(x)), "cd", ROWS, 30)
        assert len([message for message in messages if "unbounded" in message]) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("centre", [0.0, 30.0])
    @pytest.mark.parametrize("name", some_slow(["pcd"], ["mle", "cd", "replay"]))
    def test_a_proper_quadratic_is_never_flagged(self, name, centre):
        # Model sd from 1/30 to 1000 times the data's, near them and far away. A warning is an error here.
        for scale in (1e-6, 1e3):
            model = site_model(lambda x, s=scale: 0.5 * s * (x - centre) ** 2)
            state = train(model, name, ROWS, 60, num_steps=3, kernel="mala" if name == "pcd" else ebm.HMC())
            assert not np.any(state.health.reported)

    @pytest.mark.slow
    def test_a_runaway_chain_is_reported_and_reset(self):
        # A concave energy inside a wall too far away to matter: the density exists, and its chains run.
        model = site_model(lambda x: jnp.where(jnp.abs(x) < 1e8, -0.5 * x**2, 1e20))
        options = {"kernel": ebm.Langevin(0.5), "num_steps": 5}
        with told("runaway: chains are"):
            state = train(model, "pcd", ROWS, 12, **options)
        assert np.abs(state.pool.position).max() > 1e5
        with told("runaway"):
            state = train(model, "pcd", ROWS, 12, on_unhealthy="reset", **options)
        assert np.abs(state.pool.position).max() < 1e6
        assert state.pool.age.min() < 12 * 5

    @pytest.mark.slow
    def test_an_energy_that_runs_away_from_its_chains_is_reported(self):
        # Precisions exp(t k) of each row's own: chains that begin anew, in five steps far from theirs, push t up for ever.
        k = jnp.linspace(-1, 1, 400)
        y = jnp.exp(-0.4 * k) * jax.random.normal(jax.random.key(0), (400,))

        def model(y):
            t = numpyro.param("t", 2.5)
            d = ebm.EnergyDistribution(lambda y, k: 0.5 * jnp.exp(t * k) * y**2, context=k, batch_shape=(400,))
            with numpyro.plate("rows", 400):
                numpyro.sample("x", d, obs=y)

        options = {"num_steps": 1, "buffer_size": 1000, "reinit_prob": 0.5}
        with told(r"estimator 'replay': gap: the energies of data and chains have grown -1\S+ nats apart.*start='data'"):
            state = train(model, "replay", y, 300, optimiser=optax.adam(0.1), **options)
        assert reported(state, "gap")
        state = train(model, "replay", y, 300, optimiser=optax.adam(0.1), start="data", **options)
        assert not reported(state, "gap")

    @pytest.mark.slow
    def test_non_finite_proposals_are_counted(self):
        model = site_model(lambda x: jnp.where(jnp.abs(x) < 3, 0.5 * x**2, jnp.nan))
        state = train(model, "cd", ROWS, 3, kernel=ebm.HMC(1.5, 2), adapt_step_size=False)
        assert 0 < float(state.health.nonfinite_rate) < 0.5
        with told("nonfinite: the log density"):
            train(model, "cd", ROWS, 3, kernel=ebm.HMC(10.0, 3), adapt_step_size=False)

    @pytest.mark.slow
    def test_collapse_and_frozen_chains_are_reported(self):
        model = site_model(lambda x: 0.5 * x**2)
        with told("collapse: the acceptance"):
            state = train(model, "pcd", ROWS, 25, kernel=ebm.MALA(1e5), adapt_step_size=False)
        assert reported(state, "frozen")
        with told("frozen: chains move"):
            state = train(model, "pcd", ROWS, 25, kernel=ebm.Langevin(1e-13))
        assert not reported(state, "collapse")

    @pytest.mark.slow
    def test_lost_chains_of_cd_begin_at_their_rows(self):
        model = site_model(lambda x: jnp.where(jnp.abs(x) < 1.0, 0.5 * x**2, jnp.nan))
        x = 0.3 * ROWS
        options = {"kernel": ebm.Langevin(0.5), "num_steps": 3, "on_unhealthy": "reset"}
        svi = SVI(ebm.estimate(model, "cd", **options), ebm.empty_guide, optax.sgd(0.0), Trace_ELBO())
        with told("nonfinite"):
            _, loss = jax.block_until_ready(svi.update(svi.init(jax.random.key(0), x), x))
        assert np.isfinite(loss)


class TestStepSizes:
    @pytest.mark.slow
    @pytest.mark.parametrize("kernel", some_slow(["mala"], ["nuts", "hmc"]))
    def test_the_acceptance_goes_to_its_target(self, kernel):
        model = site_model(lambda x: 0.5 * jnp.sum(x**2 * jnp.array([1.0, 4.0, 0.25])), (3,))
        x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
        state = train(model, "pcd", x, 150, kernel=kernel, num_steps=2)
        target = {"mala": 0.574, "hmc": 0.65, "nuts": 0.8}[kernel]
        np.testing.assert_allclose(state.health.mean_acceptance, target, atol=0.05)

    def test_it_starts_at_the_kernels_own_step(self):
        state = train(site_model(lambda x: 0.5 * x**2), "cd", ROWS, 0, kernel=ebm.MALA(0.037))
        np.testing.assert_allclose(state.health.step_size, 0.037, rtol=1e-6)

    def test_a_flat_energy_does_not_send_it_off(self):
        # Ten standard deviations of the data a move at most: sqrt(2 step) <= sqrt(2) 10 sd.
        state = train(site_model(lambda x: 0.0 * x), "pcd", ROWS, 100)
        assert float(state.health.step_size) <= (10 * ROWS.std()) ** 2 * 1.0001

    def test_a_schedule_is_followed(self):
        schedule = optax.exponential_decay(0.2, 10, 0.5)
        state = train(site_model(lambda x: 0.5 * x**2), "cd", ROWS, 10, step_size_schedule=schedule)
        np.testing.assert_allclose(state.health.step_size, 0.1, rtol=1e-6)
        assert state.averaging is None

    def test_without_adaptation_it_stays(self):
        state = train(site_model(lambda x: 0.5 * x**2), "cd", ROWS, 10, kernel=ebm.MALA(0.01), adapt_step_size=False)
        np.testing.assert_allclose(state.health.step_size, 0.01, rtol=1e-6)

    @pytest.mark.slow
    @pytest.mark.parametrize("model", [precision_model, vector_model])
    def test_steps_of_two_runs_are_those_of_one(self, model):
        x = ROWS if model is precision_model else ROWS.reshape(-1, 2)
        svi = SVI(ebm.estimate(model, "pcd"), ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        whole = svi.run(jax.random.key(0), 20, x, progress_bar=False).state
        half = svi.run(jax.random.key(0), 10, x, progress_bar=False).state
        half = svi.run(jax.random.key(9), 10, x, init_state=half, progress_bar=False).state
        assert jax.tree.all(jax.tree.map(partial(np.array_equal, equal_nan=True), whole.mutable_state, half.mutable_state))


SCALES = jnp.array([1.0, 1000.0])
COLUMNS = np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32) * np.asarray(SCALES)


def columns_model(x):
    """Independent columns of sd 1 and 1000, whose log precisions are 2 a, in units of these."""
    a = numpyro.param("a", jnp.full(2, -0.5))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * jnp.sum(jnp.exp(2 * a) * (v / SCALES) ** 2), (2,)), obs=x)


UNITS = {
    "pcd": {"num_steps": 3},
    "cd": {"num_steps": 3},
    "replay": {},
    "mle": {"num_steps": 20},
    "improved_cd": {},
    "f_ebm": {"num_steps": 3, "divergence": "kl", "critic": lambda: lambda x: 0.0},
    "pcd tempered": {"num_steps": 3, "kernel": ebm.ParallelTempering("mala", temperatures=(1.0, 2.0))},
    "pcd by hmc": {"num_steps": 3, "kernel": "hmc"},
    "pcd of a fixed step": {"num_steps": 3, "kernel": ebm.MALA(0.3), "adapt_step_size": False, "scale": "data"},
    "ksd": {},
    "minimum_velocity": {},
    "conditional_nce": {},
    "energy_discrepancy": {},
    "mpf": {"num_draws": 4},
}


class TestScales:
    @pytest.mark.parametrize("case", some_slow(["pcd"], [name for name in UNITS if name != "pcd"]))
    def test_the_units_of_a_column_do_not_matter(self, case):
        name, options = case.partition(" ")[0], UNITS[case]
        right = -np.log(np.sqrt(np.mean((COLUMNS / np.asarray(SCALES)) ** 2, axis=0)))
        model = ebm.estimate(columns_model, name, **options)
        a = fit(model, COLUMNS, steps=400, rate=0.05)["a"]
        np.testing.assert_allclose(a, right, atol=0.12)

    @pytest.mark.slow
    def test_a_coordinate_that_stands_still_is_named(self):
        # A fixed step keeps its meaning: of 0.01, it moves by 0.14, or 0.00014 standard deviations of the second column.
        options = {"kernel": ebm.Langevin(0.01)}
        with told(
            r"frozen: chains move by 0\.0001\d* standard deviations of the data per update in coordinate 1, .*scale='d"
        ):
            state = train(columns_model, "cd", COLUMNS, 25, **options)
        assert state.log_scale is None
        state = train(columns_model, "cd", COLUMNS, 25, scale="data", **options)
        # The model is wider than the data, whose spread is the scale.
        np.testing.assert_allclose(state.health.mean_moves, np.sqrt(0.02), rtol=0.1)
        state = train(columns_model, "cd", COLUMNS, 25, scale=SCALES, **options)
        np.testing.assert_allclose(state.health.mean_moves, np.sqrt(0.02), rtol=0.1)

    @pytest.mark.parametrize(
        "options",
        [{"scale": None}, {"adapt_step_size": False}, {"kernel": "langevin"}, {"step_size_schedule": lambda i: 0.1}],
        ids=lambda options: next(iter(options)),
    )
    def test_a_fixed_step_has_no_scale(self, options):
        (estimator, site), *_ = ebm.estimate(columns_model, "cd", **options).sites(COLUMNS)
        assert estimator._scales(site) is False

    @pytest.mark.slow
    def test_the_scale_is_the_width_of_a_mode(self):
        # Two modes 20 apart, of sd 0.5 in both coordinates: the spread of the first column is no length to move by.
        energy = lambda x: 2 * (jnp.minimum((x[0] - 10) ** 2, (x[0] + 10) ** 2) + x[1] ** 2)  # noqa: E731
        x = 0.5 * np.random.default_rng(0).normal(size=(300, 2)).astype(np.float32)
        x[:150, 0] -= 10
        x[150:, 0] += 10
        state = train(site_model(energy, (2,)), "pcd", x, 40)
        np.testing.assert_allclose(np.exp(state.log_scale), 0.5, rtol=0.15)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"scale": "rows"}, "Unknown scale='rows'"),
            ({"scale": -1.0}, "scale > 0"),
            ({"scale": np.ones(3)}, r"scale has shape \(3,\), the event has \(2,\)"),
            ({"scale": "data", "kernel": "elliptical_slice"}, "has no step size"),
        ],
    )
    def test_scales_that_are_none(self, options, message):
        with pytest.raises(ValueError, match=message):
            train(columns_model, "cd", COLUMNS, 0, **options)


WIDTHS = jnp.exp(-2.0 * jnp.linspace(-1, 1, 200))


def widths_model(x):
    """Rows of sd from 0.14 to 7.4, times a scale."""
    t = numpyro.param("t", 1.0)
    d = ebm.EnergyDistribution(lambda y, w: 0.5 * (y / w) ** 2 * t, context=WIDTHS, batch_shape=(200,))
    with numpyro.plate("rows", 200):
        numpyro.sample("x", d, obs=x)


class TestRowsOfDifferentScale:
    OF_ROWS = np.asarray(WIDTHS) * np.random.default_rng(0).normal(size=200).astype(np.float32)

    @pytest.mark.parametrize("name", some_slow(["pcd"], ["replay"]))
    def test_each_chain_has_a_step_of_its_own(self, name):
        options, size = ({"buffer_size": 2000}, 2000) if name == "replay" else ({}, 200)
        state = train(widths_model, name, self.OF_ROWS, 150, num_steps=5, **options)
        widths = np.asarray(WIDTHS) if name == "pcd" else np.asarray(state.pool.local[0])
        assert state.pool.log_factor.shape == (size,)
        # The step is a squared length: its log factor goes with that of the width.
        slope = np.polyfit(np.log(widths), state.pool.log_factor, 1)[0]
        assert 0.7 < slope < 1.3
        z = np.asarray(state.pool.position) / widths
        for part in (z[widths < 0.5], z[widths > 2.0]):
            assert abs(np.mean(part**2) - 1) < 5 * np.sqrt(2 / len(part))
        assert not np.any(state.health.reported)

    @pytest.mark.parametrize("name", some_slow([], ["pcd", "replay", "mle"]))
    def test_a_width_that_varies_with_the_row_is_learned(self, name):
        rng = np.random.default_rng(31)
        k = rng.normal(size=1500).astype(np.float32)
        y = (rng.normal(size=1500) * np.exp(-0.45 * k)).astype(np.float32)

        def model(x):
            t = numpyro.param("t", 0.0)
            d = ebm.EnergyDistribution(lambda y, k: 0.5 * jnp.exp(t * k) * y**2, context=jnp.asarray(k), batch_shape=(1500,))
            with numpyro.plate("rows", 1500):
                numpyro.sample("x", d, obs=x)

        t = fit(ebm.estimate(model, name, num_steps=20), y, steps=800, rate=0.03)["t"]
        np.testing.assert_allclose(t, 0.9336, atol=0.08)

    @pytest.mark.slow
    def test_chains_that_stand_still_are_counted(self):
        # A step that fits rows of sd 1: those of sd 0.01, a half, never move, and the mean acceptance says nothing of it.
        w = jnp.where(jnp.arange(200) % 2 == 0, 1.0, 0.01)

        def model(x):
            numpyro.param("t", 1.0)
            d = ebm.EnergyDistribution(lambda y, w: 0.5 * (y / w) ** 2, context=w, batch_shape=(200,))
            with numpyro.plate("rows", 200):
                numpyro.sample("x", d, obs=x)

        x = np.asarray(w) * np.random.default_rng(0).normal(size=200).astype(np.float32)
        with told(r"stuck: 5\d% of the chains have not moved"):
            train(model, "pcd", x, 25, num_steps=10, kernel=ebm.MALA(0.5), adapt_step_size=False)
        state = train(model, "pcd", x, 25, num_steps=10, kernel=ebm.MALA(0.5))
        assert not reported(state, "stuck")


class TestTemperature:
    @pytest.mark.slow
    def test_a_constant_temperature_scales_the_energy(self, gaussian_data):
        # Negatives of p^(1/2) match the data: t / 2 is their precision.
        model = ebm.estimate(partial(precision_model, start=6.0), "pcd", num_steps=5, temperature=2.0)
        np.testing.assert_allclose(fit(model, gaussian_data)["t"], 2 * MLE, atol=0.3)

    @pytest.mark.slow
    def test_annealing_crosses_a_barrier(self):
        # Two modes 8 apart, chains from one of them: for a sample of the model half of them would have to change sides.
        energy = lambda x: 0.5 * jnp.minimum((x - 4) ** 2, (x + 4) ** 2)  # noqa: E731
        x = np.full(2000, 4.0, np.float32)
        options = {"num_steps": 100, "kernel": ebm.MALA(0.5), "adapt_step_size": False, "num_chains": 2000}
        cold = train(site_model(energy), "pcd", x, 0, **options).pool.position
        hot = optax.linear_schedule(20.0, 1.0, 99)
        annealed = train(site_model(energy), "pcd", x, 0, temperature=hot, **options).pool.position
        assert np.mean(cold < 0) < 0.01
        assert np.mean(annealed < 0) > 0.25

    @pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, lambda i: 1.0 - i])
    def test_temperatures_are_positive(self, temperature):
        with pytest.raises(ValueError, match="temperatures > 0"):
            ebm.ContrastiveDivergence(num_steps=3, temperature=temperature)


class TestTempering:
    @pytest.mark.slow
    def test_a_ladder_carries_chains_between_modes_and_reports_its_swaps(self):
        # Modes of weights .2 and .8, chains begun in the first: their share has to become .2.
        logits = jnp.log(jnp.array([0.2, 0.8]))

        def energy(x):
            return -jax.nn.logsumexp(logits - 0.5 * ((x - jnp.array([-4.0, 4.0])) / 0.5) ** 2)

        x = np.full(1000, -4.0, np.float32) + 0.5 * np.random.default_rng(0).normal(size=1000).astype(np.float32)
        kernel = ebm.ParallelTempering(ebm.MALA(0.1), temperatures=(1.0, 3.0, 9.0, 27.0, 81.0))
        options = {"num_steps": 100, "kernel": kernel, "num_chains": 1000, "adapt_step_size": False}
        state = train(site_model(energy), "pcd", x, 4, **options)
        assert state.pool.position.shape == (1000, 5)
        share = np.mean(np.asarray(state.pool.position)[:, 0] < 0)
        assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 1000)
        assert 0.1 < float(state.health.swap_rate) < 0.95

    @pytest.mark.slow
    def test_cd_and_mle_take_the_replica_at_temperature_one(self, gaussian_data):
        kernel = ebm.ParallelTempering("mala", temperatures=(1.0, 2.0))
        model = ebm.estimate(precision_model, "cd", num_steps=4, kernel=kernel)
        np.testing.assert_allclose(fit(model, gaussian_data, steps=500)["t"], MLE, atol=0.15)

    @pytest.mark.slow
    def test_elliptical_slices_take_the_base(self, gaussian_data):
        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                d = ebm.EnergyDistribution(lambda x: 0.5 * (t - 1) * x**2, base=dist.Normal(0.0, 1.0))
                numpyro.sample("x", d, obs=x)

        wrapped = ebm.estimate(model, "pcd", num_steps=3, kernel="elliptical_slice")
        np.testing.assert_allclose(fit(wrapped, gaussian_data, steps=500)["t"], MLE, atol=0.15)


class TestEnergyPenalty:
    @pytest.mark.slow
    def test_it_is_the_squares_of_both_energies(self):
        # pcd moves its whole pool, so the negatives of an update are the positions it leaves.
        def surrogate(scale, penalty):
            model = ebm.estimate(site_model(lambda x: 0.5 * x**2 + 0.1), "pcd", energy_l2=penalty)
            return numpyro.infer.util.log_density(numpyro.handlers.seed(model, 3), (ROWS,), {}, {"scale": scale})[0]

        base = numpyro.handlers.seed(ebm.estimate(site_model(lambda x: 0.5 * x**2 + 0.1), "pcd"), 3)
        trace = numpyro.handlers.trace(numpyro.handlers.substitute(base, {"scale": 1.5})).get_trace(ROWS)
        negatives = trace["x$pcd"]["value"]["state"].pool.position
        energy = lambda scale, x: scale * (0.5 * x**2 + 0.1)  # noqa: E731

        def penalty(scale):
            return jnp.sum(energy(scale, ROWS) ** 2) + len(ROWS) * jnp.mean(energy(scale, negatives) ** 2)

        difference = jax.grad(surrogate)(1.5, 0.3) - jax.grad(surrogate)(1.5, 0.0)
        np.testing.assert_allclose(difference, -0.3 * jax.grad(penalty)(1.5), rtol=1e-4)

    def test_it_is_a_number_of_at_least_zero(self):
        with pytest.raises(ValueError, match="energy_l2 >= 0"):
            ebm.ContrastiveDivergence(energy_l2=-1.0)


class TestPools:
    @pytest.mark.slow
    def test_ten_thousand_of_ten_thousand_lineages_survive(self):
        # Steps so small that a chain is known by where it began; batches of 64 slots.
        options = {"num_chains": 10_000, "start": dist.Normal(0.0, 1e4), "kernel": ebm.Langevin(1e-8)}
        model = site_model(lambda x: 0.0 * x)
        began = np.asarray(train(model, "pcd", ROWS, 0, **options).pool.position)
        state = train(model, "pcd", ROWS, 300, **options)
        np.testing.assert_allclose(state.pool.position, began, atol=0.01)
        assert int(state.pool.age.sum()) == 301 * 64
        assert np.mean(np.asarray(state.pool.age) > 0) > 0.8  # 1 - exp(-1.93)

    @pytest.mark.slow
    @pytest.mark.parametrize("buffer_size", [16, 500])
    def test_a_buffer_smaller_or_larger_than_the_batch(self, buffer_size, gaussian_data):
        state = train(precision_model, "replay", gaussian_data[:100], 5, buffer_size=buffer_size, reinit_prob=0.0)
        assert state.pool.position.shape == (buffer_size,)
        assert int(state.pool.age.sum()) == 6 * 20 * min(buffer_size, 100)

    @pytest.mark.slow
    def test_ages_follow_the_probability_of_a_fresh_start(self):
        # All chains move at each update: an age of k updates has probability p (1 - p)^(k - 1).
        state = train(precision_model, "replay", ROWS[:8].repeat(500), 200, buffer_size=4000, num_steps=1, reinit_prob=0.2)
        share = np.mean(np.asarray(state.pool.age) == 1)
        assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)
        assert abs(np.mean(state.pool.age) - 5.0) < 5 * np.sqrt(20 / 4000)

    @pytest.mark.slow
    def test_a_chain_of_the_buffer_keeps_its_context(self):
        k = np.repeat(np.array([0.1, 10.0], np.float32), 250)
        y = (np.random.default_rng(0).normal(size=500) * k).astype(np.float32)

        def model(x):
            d = ebm.EnergyDistribution(lambda y, k: 0.5 * (y / k) ** 2, context=k, batch_shape=(500,))
            with numpyro.plate("rows", 500):
                numpyro.sample("x", d, obs=x)

        options = {"buffer_size": 800, "num_steps": 10, "reinit_prob": 0.05, "start": "data", "kernel": ebm.HMC(0.1, 5)}
        state = train(model, "replay", y, 30, adapt_step_size=False, **options)
        context = np.asarray(state.pool.local[0])
        assert set(np.unique(context)) == {np.float32(0.1), np.float32(10.0)}
        for value in (0.1, 10.0):
            spread = np.asarray(state.pool.position)[np.isclose(context, value)].std()
            assert 0.7 < spread / value < 1.3

    @pytest.mark.slow
    def test_persistent_chains_of_rows_with_a_context(self):
        # Subsampled rows: each chain belongs to its row of the whole data, and k = .8 is recovered.
        rng = np.random.default_rng(0)
        k = rng.uniform(-1, 1, 600).astype(np.float32)
        y = (rng.normal(size=600) * np.exp(-0.5 * 0.8 * k)).astype(np.float32)

        def model(x):
            t = numpyro.param("t", 0.1)
            with numpyro.plate("rows", 600, subsample_size=100):
                batch, context = numpyro.subsample(x, event_dim=0), numpyro.subsample(jnp.asarray(k), event_dim=0)
                d = ebm.EnergyDistribution(lambda y, k: 0.5 * jnp.exp(t * k) * y**2, context=context, batch_shape=(100,))
                numpyro.sample("x", d, obs=batch)

        wrapped = ebm.estimate(model, "pcd", num_steps=5)
        optimiser = optax.adam(optax.exponential_decay(0.05, 400, 0.1))
        svi = SVI(wrapped, ebm.empty_guide, optimiser, Trace_ELBO())
        result = svi.run(jax.random.key(0), 1200, y, progress_bar=False)
        state = result.state.mutable_state["x$pcd"]["state"]
        t = 0.0
        for _ in range(50):  # maximum likelihood, by Newton
            weight = np.exp(t * k) * y**2
            t -= np.sum(0.5 * k * (weight - 1)) / np.sum(0.5 * k**2 * weight)
        np.testing.assert_allclose(result.params["t"], t, atol=0.05)
        assert state.pool.position.shape == (600,)
        assert state.pool.age.min() > 0
        scaled = np.asarray(state.pool.position) * np.exp(0.5 * t * k)
        low, high = scaled[k < -0.5].std(), scaled[k > 0.5].std()
        assert 0.8 < low < 1.2
        assert 0.8 < high < 1.2


class Spectral(nnx.Module):
    """A linear layer whose largest singular value is at most 1."""

    def __init__(self, num_in, num_out, rngs):
        self.linear = nnx.Linear(num_in, num_out, rngs=rngs)

    def __call__(self, x):
        kernel = self.linear.kernel[...]
        return x @ (kernel / jnp.maximum(1.0, jnp.linalg.norm(kernel, 2))) + self.linear.bias[...]


class TestOptimisers:
    @pytest.mark.slow
    def test_spectral_normalisation_bounds_the_slope_of_the_energy(self):
        layers = nnx.Sequential(Spectral(2, 16, nnx.Rngs(0)), jnp.tanh, Spectral(16, 1, nnx.Rngs(1)))
        x = 0.1 * np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)

        def model(x):
            net = nnx_module("net", layers)
            with numpyro.plate("rows", len(x)):
                base = dist.Normal(0, 1).expand([2]).to_event(1)
                numpyro.sample("x", ebm.EnergyDistribution(net, (2,), base=base), obs=x)

        svi = SVI(ebm.estimate(model, "cd"), ebm.empty_guide, optax.adam(0.5), Trace_ELBO())
        params = svi.run(jax.random.key(0), 40, x, progress_bar=False).params
        assert max(jnp.linalg.norm(leaf, 2) for leaf in jax.tree.leaves(params) if leaf.ndim == 2) > 2

        def energy(x):
            with numpyro.handlers.block(), numpyro.handlers.substitute(data=params):
                return jnp.sum(nnx_module("net", layers)(x))

        slopes = jax.jit(jax.vmap(jax.grad(energy)))(3 * np.random.default_rng(1).normal(size=(500, 2)))
        assert jnp.linalg.norm(slopes, axis=1).max() <= 1.0001

    @pytest.mark.slow
    def test_gradients_are_clipped_by_optax(self):
        optimiser = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
        svi = SVI(ebm.estimate(precision_model, "cd"), ebm.empty_guide, optimiser, Trace_ELBO())
        state = svi.update(svi.init(jax.random.key(0), ROWS), ROWS)[0]
        np.testing.assert_allclose(abs(svi.get_params(state)["t"] - 1.0), 1e-3, rtol=1e-2)


def test_memory_does_not_grow_with_the_steps():
    # 10 000 chains of 784 dimensions: 31 MB a copy.
    def memory(num_steps):
        @jax.jit
        def move(key, positions):
            log_density = lambda x, _: -0.5 * jnp.sum(x**2)  # noqa: E731
            return chains.advance(key, ebm.MALA(0.01), log_density, positions, num_steps=num_steps).positions

        shapes = jax.random.key(0), jax.ShapeDtypeStruct((10_000, 784), jnp.float32)
        return move.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert memory(40) <= 1.01 * memory(20)
    assert memory(20) < 16 * 10_000 * 784 * 4


@pytest.mark.slow
def test_the_double_well_is_recovered():
    # E = a (x^2 - 1)^2 at a = 2.
    grid = np.linspace(-3, 3, 6001)
    cdf = np.cumsum(np.exp(-2 * (grid**2 - 1) ** 2))
    x = np.interp(np.random.default_rng(0).uniform(size=5000), cdf / cdf[-1], grid).astype(np.float32)

    def model(x):
        a = numpyro.param("a", 1.0)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("x", ebm.EnergyDistribution(lambda x: a * (x**2 - 1) ** 2), obs=x)

    a = fit(ebm.estimate(model, "pcd", num_steps=5), x, steps=600)["a"]
    np.testing.assert_allclose(a, 2.0, atol=0.15)
