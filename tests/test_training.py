"""`fit`: held-out rows, early stopping, what it says of overfitting, and that nothing of a run is lost."""

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from helpers import precision_model, some_slow
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal
from numpyro.primitives import mutable

import numpyro_ebm as ebm
from numpyro_ebm._core import programs
from numpyro_ebm.training import _run, _warnings
from numpyro_ebm.training._held_out import take_apart
from numpyro_ebm.training._task import Task
from numpyro_ebm.training.overfitting import held_out_rise, is_significant, runaway
from numpyro_ebm.training.unseen import occurrences, unseen

KEY = jax.random.key(0)
HEALTHY = {
    "sm": {},
    "dsm": {"sigma": 0.3},
    "ssm_vr": {"projection": "gaussian"},
    "nce": {"noise": dist.Normal(0, 0.8)},
}

fit = partial(ebm.fit, progress_bar=False)


def rows(num, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, num)


def svi_of(name="sm", model=precision_model, optimiser=None, **options):
    estimated = ebm.estimate(model, name, **options)
    return SVI(estimated, ebm.empty_guide, optimiser or optax.adam(0.05), Trace_ELBO())


def ring(num, seed):
    draws = np.random.default_rng(seed)
    angle = draws.uniform(0, 2 * np.pi, num)
    return 2 * np.c_[np.cos(angle), np.sin(angle)] + draws.normal(0, 0.3, (num, 2))


def wide_net(x):
    """A net of 128 units over a base: flexible enough to learn 60 rows by heart."""
    inner = numpyro.param("inner", lambda key: jax.random.normal(key, (2, 128)))
    shift = numpyro.param("shift", lambda key: jax.random.normal(key, (128,)))
    outer = numpyro.param("outer", lambda key: jax.random.normal(key, (128,)) / 128)
    base = dist.Normal(0, 3).expand([2]).to_event(1)
    with numpyro.plate("rows", len(x)):
        energy = ebm.EnergyDistribution(lambda v: jax.nn.silu(v @ inner + shift) @ outer, (2,), base=base)
        numpyro.sample("x", energy, obs=x)


class TestUpdates:
    @pytest.mark.parametrize("name", ["sm", "pcd"])
    @pytest.mark.slow
    def test_they_are_those_of_svi_run(self, name):
        svi = svi_of(name)
        expected = svi.run(KEY, 25, rows(40), progress_bar=False)
        result = fit(KEY, svi, 25, rows(40), check_every=10)
        np.testing.assert_allclose(result.losses, expected.losses, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(result.params["t"], expected.params["t"], rtol=1e-5)
        assert jax.tree.structure(result.state) == jax.tree.structure(expected.state)
        assert (result.best_step, result.stopped, result.check_steps.size) == (25, "end", 0)

    def test_a_run_goes_on_from_its_state(self):
        svi, x = svi_of("dsm", sigma=0.1), rows(40)
        whole = fit(KEY, svi, 30, x, check_every=10)
        half = pickle.loads(pickle.dumps(fit(KEY, svi_of("dsm", sigma=0.1), 20, x, check_every=10)))
        rest = fit(jax.random.key(9), svi_of("dsm", sigma=0.1), 10, x, init_state=half.state, check_every=10)
        np.testing.assert_array_equal(np.r_[half.losses, rest.losses], whole.losses)
        started = fit(KEY, svi, 10, x, init_params={"t": jnp.asarray(3.0)}, check_every=10)
        assert abs(started.params["t"] - 3) < 0.6

    def test_two_programs_and_none_for_a_second_call(self):
        svi, x = svi_of(), rows(30)
        state = fit(KEY, svi, 25, x, check_every=10).state
        kept = set(programs._kept)
        for num_steps in (25, 5, 40):  # in tens and fives
            fit(jax.random.key(1), svi, num_steps, x + 1, check_every=10, init_state=state)
        assert set(programs._kept) <= kept
        fit(KEY, svi, 3, x, check_every=10, init_state=state)
        assert len(set(programs._kept) - kept) == 1

    def test_held_out_rows_take_one_program(self):
        svi, x, y = svi_of(), rows(30), rows(20, 1)
        state = fit(KEY, svi, 20, x, check_every=10, held_out=(y,)).state
        kept = set(programs._kept)
        fit(jax.random.key(1), svi, 20, x + 1, check_every=10, held_out=(y + 1,), init_state=state)
        assert set(programs._kept) <= kept

    def test_numbers_among_the_arguments_stay_numbers(self):
        result = fit(KEY, svi_of(), 3, rows(50), num_rows=50, batch_size=8, check_every=10)
        assert result.losses.shape == (3,)

    def test_progress(self, capsys):
        ebm.fit(KEY, svi_of(), 20, rows(30), held_out=(rows(30, 1),), check_every=10)
        shown = capsys.readouterr().err
        assert "20/20" in shown
        assert "held-out" in shown
        fit(KEY, svi_of(), 10, rows(30))
        assert not capsys.readouterr().err


class TestHeldOut:
    def test_the_best_parameters_come_back(self):
        # From above: the rows for training have the optimum 1 / mean(x^2), which the held-out rows pass on the way.
        x, y = rows(200), 0.95 * rows(200)
        svi = svi_of(optimiser=optax.sgd(2e-3), model=partial(precision_model, start=9.0))
        result = fit(KEY, svi, 300, x, held_out=(y,), check_every=10)
        np.testing.assert_array_equal(result.check_steps, np.arange(0, 301, 10))
        assert 0 < result.best_step < 300
        best = float(result.params["t"])
        losses = 0.5 * best**2 * np.sum(y**2) - best * len(y)
        np.testing.assert_allclose(losses, result.held_out_losses.min(), rtol=1e-5)
        last = svi.get_params(result.state)["t"]
        assert abs(last - 1 / np.mean(x**2)) < abs(best - 1 / np.mean(x**2))

    def test_patience(self):
        svi = svi_of(optimiser=optax.sgd(2e-3), model=partial(precision_model, start=9.0))
        settings = {"held_out": (0.95 * rows(200),), "check_every": 10}
        whole = fit(KEY, svi, 300, rows(200), **settings)
        result = fit(KEY, svi, 300, rows(200), patience=3, **settings)
        assert result.stopped == "patience"
        assert result.best_step == whole.best_step
        assert len(result.losses) == result.check_steps[-1] == whole.best_step + 30
        np.testing.assert_array_equal(result.losses, whole.losses[: len(result.losses)])
        assert result.params["t"] == whole.params["t"]

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["dsm", "ssm_vr", "nce"])
    def test_noise_of_the_loss_is_the_same_at_each_check(self, name):
        svi = svi_of(name, optimiser=optax.sgd(0.0), **HEALTHY[name])
        result = fit(KEY, svi, 6, rows(30), held_out=(rows(20, 1),), check_every=2)
        assert len(set(result.losses)) == 6
        assert len(set(result.held_out_losses)) == 1

    def test_keyword_arguments(self):
        x, y = rows(30), rows(20, 1)
        positional = fit(KEY, svi_of(), 4, x, held_out=(y,), check_every=2)
        for held_out in ((), None):
            named = fit(KEY, svi_of(), 4, x=x, held_out=held_out, held_out_kwargs={"x": y}, check_every=2)
            np.testing.assert_allclose(named.held_out_losses, positional.held_out_losses, rtol=1e-6)

    @pytest.mark.slow
    def test_any_svi(self):
        def model(x):
            scale = numpyro.sample("scale", dist.LogNormal(0, 1))
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", dist.Normal(0, scale), obs=x)

        svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO(num_particles=2))
        result = fit(KEY, svi, 200, rows(200), held_out=(rows(100, 1),), check_every=50)
        assert result.held_out_losses[-1] < result.held_out_losses[0]
        assert set(result.params) == {"scale_auto_loc", "scale_auto_scale"}

    def test_state_of_layers_is_that_of_training(self):
        def model(x):
            count = mutable("count", {"updates": jnp.zeros(())})
            count["updates"] = count["updates"] + 1
            numpyro.factor("counted", -count["updates"])
            precision_model(x)

        svi = svi_of(model=model, optimiser=optax.sgd(0.0))
        result = fit(KEY, svi, 4, rows(30), held_out=(rows(20, 1),), check_every=2)
        counts = result.held_out_losses - result.held_out_losses[0]
        np.testing.assert_allclose(counts, [0, 2, 4], atol=1e-4)
        assert result.state.mutable_state["count"]["updates"] == 5  # svi.init counts one

    def test_rows_that_the_model_does_not_take(self):
        def model(x):
            with numpyro.plate("rows", 30):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: numpyro.param("t", 1.0) * x**2), obs=x)

        with pytest.raises(ValueError, match=r"does not take the held-out rows.*plate\('rows', len\(x\)\)"):
            fit(KEY, svi_of(model=model), 4, rows(30), held_out=(rows(20),))
        with pytest.raises(ValueError, match="held-out rows: At site 'x': Row 3 of the data is not finite"):
            fit(KEY, svi_of(), 4, rows(30), held_out=(np.where(np.arange(20) == 3, np.nan, rows(20)),))

        def overflowing(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: numpyro.param("t", 1.0) * jnp.exp(x**2)), obs=x)

        with pytest.raises(ValueError, match="held-out rows is (nan|inf) before the first update"):
            fit(KEY, svi_of(model=overflowing), 4, rows(30), held_out=(np.full(3, 1e3),))

    def test_a_function_that_is_not_finite(self):
        """The parameters before training are never the best for want of a finite loss."""
        run = partial(fit, KEY, num_steps=60, x=rows(100), check_every=20)
        with pytest.raises(ebm.EnergyError, match="loss from the function held_out is nan before the first update"):
            run(svi_of(), held_out=lambda params: np.nan)
        for losses, best_step, words in (
            ([1.0, np.nan, np.inf, np.nan], 60, r"at 3 of 4 checks, first after 20.*last ones.*none to compare.*after 60"),
            ([1.0, np.nan, 3.0, 2.0], 0, r"at 1 of 4 checks.*the best of the others.*after 0"),
            ([1.0, 0.5, np.nan, np.nan], 20, r"at 2 of 4 checks, first after 40.*after 20"),
        ):
            values = iter(losses)
            with pytest.warns(ebm.NonFiniteLossWarning, match=words):
                result = run(svi_of(), held_out=lambda params, values=values: next(values))
            assert result.best_step == best_step
            last = fit(KEY, svi_of(), best_step, rows(100)).params["t"] if best_step else 1.0
            assert result.params["t"] == last

    def test_a_function_that_returns_an_array(self):
        with pytest.raises(TypeError, match=r"one number; got an array of shape \(1,\)"):
            fit(KEY, svi_of(), 6, rows(30), held_out=lambda params: params["t"][None])

    def test_a_run_that_ends_between_checks_goes_on_without_that_check(self, tmp_path):
        """The check after 20 updates is the best of all, and an uninterrupted run has none there."""
        losses = {0: 5.0, 20: 1.0, 50: 3.0, 100: 4.0}

        def run(num_steps, **options):
            svi = svi_of(optimiser=optax.sgd(1e-3))
            steps = {float(fit(KEY, svi, step, rows(60)).params["t"]): step for step in (20, 50, 100)}
            loss = lambda params: losses[steps.get(float(params["t"]), 0)]  # noqa: E731
            return fit(KEY, svi, num_steps, rows(60), held_out=loss, check_every=50, **options)

        whole = run(100)
        for _ in range(2):  # the same call again changes nothing
            first = run(20, checkpoint=tmp_path)
            assert (first.best_step, list(first.held_out_losses)) == (20, [5.0, 1.0])
        both = run(100, checkpoint=tmp_path)
        np.testing.assert_array_equal(both.check_steps, [0, 50, 100])
        np.testing.assert_array_equal(both.held_out_losses, whole.held_out_losses)
        assert both.best_step == whole.best_step == 50
        assert both.params["t"] == whole.params["t"]


def table_model(x):
    """Independent categories 0 to 3."""
    h = numpyro.param("h", jnp.zeros((3, 4)))
    energy = lambda x: -jnp.sum(h[jnp.arange(3), x])  # noqa: E731
    with numpyro.plate("rows", len(x), subsample_size=len(x) - 1):
        batch = numpyro.subsample(x, event_dim=1)
        d = ebm.EnergyDistribution(energy, (3,), support=constraints.integer_interval(0, 3))
        numpyro.sample("x", d, obs=batch)


class TestValuesThatNoRowHas:
    """Rows with codes 0 to 2 under a support of 0 to 3, whose last column is constant."""

    rng = np.random.default_rng(0)
    train, test = rng.integers(0, 3, (60, 3)) * [1, 1, 0], rng.integers(0, 4, (60, 3)) * [1, 1, 0]

    def test_held_out_rows_that_have_them_are_named_when_their_loss_rises(self):
        svi = svi_of("exact", table_model, optax.adam(0.1))
        with pytest.warns(ebm.OverfittingWarning, match="have 2 values that no training row has: column 0 of 'x' is 3 in"):
            ebm.fit(KEY, svi, 600, self.train, held_out=(self.test,), check_every=50, progress_bar=False)

    @pytest.mark.parametrize("name", ["exact", "cd"])
    def test_diagnose_says_so_without_a_warning(self, name):
        estimated = ebm.estimate(table_model, name)
        result = SVI(estimated, ebm.empty_guide, optax.adam(0.1), Trace_ELBO()).run(KEY, 10, self.train, progress_bar=False)
        finding = ebm.diagnose(estimated, result, self.train)["x values"]
        assert (finding.status, finding.measured) == ("ok", "no row has the value: column 0 of 'x' is 3 (5 such values)")
        assert "prior" in finding.advice
        full = np.tile(np.arange(4)[:, None], (10, 3))
        assert ebm.diagnose(estimated, result, full)["x values"].measured == "each column takes each of its values"

    def test_missing_entries_do_not_count(self):
        rows = self.train.astype(float)
        rows[rows == 2] = np.nan
        estimated = ebm.estimate(table_model, "cd", positive_phase=ebm.PositivePhase())
        (counted,) = occurrences(estimated, {"h": jnp.zeros((3, 4))}, (rows,), {}).values()
        expected = [[np.sum(rows[:, k] == value) for value in range(4)] for k in range(3)]
        np.testing.assert_array_equal(counted.counts, expected)

    def test_members_of_a_mixed_event_are_counted_too(self):
        support = ebm.Blocks(("x", "s", "n"), (constraints.real, ebm.spins, constraints.nonnegative_integer), ((), (2,), ()))

        def model(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda e: 0.5 * e[0] ** 2, (4,), support=support), obs=x)

        rows = np.array([[0.3, 1, -1, 4], [-0.2, 1, 1, 0]])
        (counted,) = occurrences(ebm.estimate(model, "cd"), {}, (rows,), {}).values()
        np.testing.assert_array_equal(counted.counts, [[0, 2], [1, 1]])
        assert unseen(counted) == "no row has the value: column 0 of 'x.s' is -1"


class TestOverfitting:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", some_slow([n for n in HEALTHY if n != "nce"], ["nce"]))
    @pytest.mark.parametrize("start", some_slow([4.0], [1.0]))
    def test_healthy_runs_do_not_warn(self, name, start):
        svi = svi_of(name, model=partial(precision_model, start=start), **HEALTHY[name])
        for seed in range(4):
            data = rows(150, 10 + seed), rows(100, 20 + seed)
            result = fit(jax.random.key(seed), svi, 1000, data[0], held_out=(data[1],), check_every=50)
            assert result.stopped == "end"
            fit(jax.random.key(seed), svi, 1000, data[0], check_every=50)

    @pytest.mark.slow
    def test_a_net_that_learns_its_rows_by_heart(self):
        svi = svi_of(model=wide_net, optimiser=optax.adam(0.01))
        x, held_out = ring(60, 0), (ring(300, 1),)
        with pytest.warns(ebm.OverfittingWarning, match=r"held-out rows was .* after \d+ updates and is .*patience=5"):
            result = fit(KEY, svi, 2000, x, held_out=held_out)
        assert result.best_step < 1000
        stopped = fit(KEY, svi, 2000, x, held_out=held_out, patience=5)
        assert (stopped.stopped, stopped.best_step) == ("patience", result.best_step)
        with pytest.warns(ebm.OverfittingWarning, match="falls ever faster.*held_out"):
            fit(KEY, svi, 2000, x)
        last = svi.get_params(result.state)
        learned, other = (ebm.training_report(svi.model, last, data).sites[0].figures for data in (x, *held_out))
        assert learned["score_norm"] ** 2 + learned["trace_per_dim"] < 0 < other["score_norm"] ** 2 + other["trace_per_dim"]
        assert other["score_norm"] > 10 * learned["score_norm"]

    def test_whether_rows_lost_enough(self):
        draws = np.random.default_rng(0).normal(size=400)
        draws = (draws - draws.mean()) / draws.std()
        assert is_significant([draws[:, None] + 3.6 / 20])
        assert not is_significant([draws + 3.4 / 20])
        assert not is_significant([draws + 3.6 / 20, 3 * draws[:100]])
        assert is_significant([np.full(3, np.nan)])

    @pytest.mark.slow
    def test_rows_are_compared_under_the_noise_of_the_checks(self, monkeypatch):
        seen = []
        monkeypatch.setattr(_warnings, "held_out_rise", lambda *_: "it rose")
        monkeypatch.setattr(_warnings, "is_significant", lambda differences: seen.append(differences))
        svi = svi_of("dsm", sigma=0.1, optimiser=optax.sgd(2e-3))
        result = fit(KEY, svi, 10, rows(50), held_out=(rows(30, 1),), check_every=10)
        fall = result.held_out_losses[0] - result.held_out_losses[1]
        best = result._replace(params={"t": jnp.ones(())})
        task = Task(svi, take_apart((rows(50),), {}), take_apart((rows(30, 1),), {}), jax.random.fold_in(KEY, 1))
        assert [each.shape for each in seen[0]] == [(30,)]
        (differences,) = _warnings._row_differences(best, task)
        np.testing.assert_allclose(differences.sum(), -fall, rtol=1e-4)

    def test_the_rise_of_a_curve(self):
        steps, losses = np.arange(0, 1100, 100), np.linspace(10, 1, 1000)
        valley = np.array([10, 5, 2, 1, 1.5, 2, 3, 4, 5, 6, 7.0])
        assert "was 1 after 300 updates and is 7 after 1000" in held_out_rise(valley, steps, losses)
        assert held_out_rise(valley, steps, losses[::-1]) is None  # training got worse as well: it diverges
        assert held_out_rise(np.sort(valley)[::-1], steps, losses) is None
        assert held_out_rise(valley[:6], steps[:6], losses) is None  # two checks after the best
        small = np.where(valley < 2, valley, 1 + 0.04 * np.arange(11) / 10)
        assert held_out_rise(np.r_[10, small[1:]], steps, losses) is None
        jitter = np.array([3, 1, 2.0, 1.1, 2, 1.2, 2, 1.1, 1.9, 1.1, 2])
        assert held_out_rise(jitter, steps, losses) is None
        assert "is nan" in held_out_rise(np.r_[valley[:5], np.full(6, np.nan)], steps, losses)

    def test_a_loss_that_runs_away(self):
        time = np.linspace(0, 1, 600)
        noise = np.random.default_rng(0).normal(size=600)
        assert "ever faster" in runaway(-np.exp(12 * time) + noise)
        for curve in (-1e6 * (1 - np.exp(-5 * time)), -np.exp(3 * time), 1e6 - np.exp(12 * time), -1e4 * time):
            assert runaway(curve + noise) is None
        assert runaway(-np.exp(12 * time[:50])) is None

    @pytest.mark.slow
    def test_a_surrogate_that_is_no_objective_is_not_judged(self):
        def falling(x):
            t = numpyro.param("t", 0.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: 0.5 * (1 + 0 * t) * x**2), obs=x)
            numpyro.factor("outside", jnp.exp(t))

        run = partial(fit, KEY, num_steps=100, check_every=100)
        run(svi=svi_of("cd", model=falling, num_steps=1, optimiser=optax.adam(0.15)), x=rows(10))
        with pytest.warns(ebm.OverfittingWarning, match="ever faster"):
            run(svi=svi_of("sm", model=falling, optimiser=optax.adam(0.15)), x=rows(10))


class TestEnds:
    def test_losses_that_are_not_finite(self):
        svi = svi_of(optimiser=optax.sgd(0.05))  # above 2 / sum(x^2), where it diverges
        x = rows(400)
        with pytest.warns(ebm.NonFiniteLossWarning, match=r"at update \d+.*returned are those after 30\."):
            result = fit(KEY, svi, 5000, x, check_every=10)
        assert (result.stopped, result.best_step, len(result.losses)) == ("nonfinite", 30, 40)
        assert np.isfinite(result.params["t"])
        assert not np.isfinite(result.losses[-1])
        assert np.isfinite(svi.get_params(result.state)["t"])
        slower = fit(KEY, svi_of(optimiser=optax.sgd(1e-4)), 5, x, init_state=result.state, check_every=5)
        assert np.isfinite(slower.losses).all()
        with pytest.warns(ebm.NonFiniteLossWarning, match="those after 0"):
            result = fit(KEY, svi, 5000, x, held_out=(x,), check_every=10)
        assert result.params["t"] == 1.0

    def test_unhealthy_chains_raise_what_they_are_and_lose_nothing(self):
        """An energy that comes to have no density: what was trained until the last check is in the exception."""

        def model(x):
            t = numpyro.param("t", 1.0)
            numpyro.factor("pull", -1000 * t)  # by 0.1 in each update
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        svi = svi_of("cd", model=model, optimiser=optax.sgd(1e-4), kernel=ebm.Langevin(0.1), on_unhealthy="raise")
        with pytest.raises(ebm.UnhealthyChainsError, match=r"^At site 'x', estimator 'cd': unbounded: .*base=") as caught:
            fit(KEY, svi, 500, rows(40), check_every=4)
        result = caught.value.result
        assert result.stopped == "unhealthy"
        assert result.best_step == len(result.losses) == 8
        np.testing.assert_allclose(result.params["t"], 0.2, atol=0.02)
        np.testing.assert_array_equal(result.params["t"], svi.get_params(result.state)["t"])

    def test_a_row_that_is_not_finite_is_named(self):
        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x), subsample_size=5):
                batch = numpyro.subsample(x, event_dim=0)
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=batch)

        x = np.where(np.arange(40) == 17, np.nan, rows(40))
        with pytest.warns(ebm.NonFiniteLossWarning, match=r"Row 17 of the argument of shape \(40,\).*\(1 such rows\)"):
            result = fit(KEY, svi_of(model=model), 100, x, check_every=5)
        assert np.isfinite(result.params["t"])

    def test_an_interruption_leaves_what_there_is(self, monkeypatch):
        svi, x = svi_of(), rows(30)
        whole = fit(KEY, svi, 20, x, held_out=(x,), check_every=10)
        updates, calls = _run._scan, []

        def interrupted(*args, **kwargs):
            calls.append(args)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return updates(*args, **kwargs)

        monkeypatch.setattr(_run, "_scan", interrupted)
        result = fit(KEY, svi, 50, x, held_out=(x,), check_every=10)
        assert result.stopped == "interrupted"
        np.testing.assert_array_equal(result.losses, whole.losses)
        assert result.params["t"] == whole.params["t"]
        calls[:] = [None, None]
        assert fit(KEY, svi, 50, x, check_every=10).losses.shape == (0,)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"num_steps": 0}, "num_steps >= 1"),
            ({"check_every": 2.5}, "check_every >= 1"),
            ({"patience": 0, "held_out": (rows(5),)}, "patience >= 1"),
            ({"init_state": (), "init_params": {"t": 1.0}}, "one of the two"),
            ({"patience": 3}, r"there are none.*held_out=\(x_test,\), patience=3"),
        ],
    )
    def test_settings(self, settings, words):
        with pytest.raises(ebm.EnergyError, match=words):
            fit(KEY, svi_of(), **({"num_steps": 10} | settings), x=rows(5))

    @pytest.mark.parametrize("name", ["cd", "pcd", "mle"])
    def test_held_out_rows_of_a_surrogate_that_is_no_objective(self, name):
        for spec in (name, {"x": name}):
            with pytest.raises(ebm.EnergyError, match=f"'{name}'.*no measure of fit"):
                fit(KEY, svi_of(spec), 10, rows(5), held_out=(rows(5),))
        wrapped = numpyro.handlers.scale(ebm.estimate(precision_model, name), 0.1)
        svi = SVI(wrapped, ebm.empty_guide, optax.sgd(0.1), Trace_ELBO())
        with pytest.raises(ebm.EnergyError, match=f"'{name}'.*no measure of fit"):
            fit(KEY, svi, 10, rows(5), held_out=(rows(5),))

    def test_types(self):
        with pytest.raises(TypeError, match="needs a numpyro.infer.SVI; got estimate"):
            fit(KEY, ebm.estimate(precision_model, "sm"), 10, rows(5))
        for held_out in (rows(5), [rows(5)], (rows(5), 1)):
            with pytest.raises(TypeError, match=r"1 positional arguments, as a tuple; got.*held_out=\(x_test,\)"):
                fit(KEY, svi_of(), 10, rows(5), held_out=held_out)


class TestRecordedChains:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "options"), [("replay", {"buffer_size": 32}), pytest.param("pcd", {}, marks=pytest.mark.slow)]
    )
    def test_they_are_where_the_state_has_them(self, name, options):
        def model(x):
            t = numpyro.param("t", 2.0)
            with numpyro.plate("rows", len(x)):
                energy = ebm.EnergyDistribution(
                    lambda v: t * v, support=dist.constraints.positive, base=dist.Exponential(1.0)
                )
                numpyro.sample("x", energy, obs=x)

        svi = svi_of(name, model=model, kernel=ebm.ParallelTempering("mala", temperatures=(1.0, 2.0)), **options)
        x = np.random.default_rng(0).exponential(size=16)
        result = fit(KEY, svi, 6, x, check_every=2, record_chains=3)
        samples, energies, steps = result.chains
        np.testing.assert_array_equal(steps, [2, 4, 6])
        assert samples["x"].shape == energies["x"].shape == (3, 3)
        state = result.state.mutable_state[f"x${name}"]["state"]
        cold = jax.vmap(svi.model.estimators.kernel.lower)(state.pool.position)[:3]
        np.testing.assert_allclose(samples["x"][:, -1], np.exp(cold), rtol=1e-5)
        np.testing.assert_allclose(energies["x"][:, -1], (1 + result.params["t"]) * samples["x"][:, -1], rtol=1e-4)
        plain = fit(KEY, svi, 6, x, check_every=2)
        assert plain.chains is None
        np.testing.assert_array_equal(plain.losses, result.losses)

    @pytest.mark.slow
    def test_rows_of_their_own_and_a_latent_parameter(self):
        def model(x, context, batch_size=None):
            t = numpyro.sample("t", dist.Gamma(2.0, 1.0))
            with numpyro.plate("rows", 12, subsample_size=batch_size):
                batch, rows = numpyro.subsample(x, event_dim=0), numpyro.subsample(context, event_dim=0)
                energy = lambda v, c: 0.5 * t * (v - c) ** 2  # noqa: E731
                numpyro.sample("x", ebm.EnergyDistribution(energy, context=rows, batch_shape=rows.shape), obs=batch)

        estimated = ebm.estimate(model, "pcd")
        svi = SVI(estimated, AutoNormal(estimated), optax.adam(0.01), Trace_ELBO())
        x, context = rows(12), 100 * np.arange(12.0)
        result = fit(KEY, svi, 4, x + context, context, check_every=2, record_chains=5)
        assert np.all(abs(result.chains.samples["x"] - context[:5, None]) < 20)
        assert np.all(result.chains.energies["x"] < 1000)
        result = fit(KEY, svi, 4, x + context, context, batch_size=4, check_every=2, record_chains=5)
        assert not result.chains.energies

    @pytest.mark.slow
    def test_refusals(self):
        x = rows(8)
        with pytest.raises(ebm.EnergyError, match=r"the estimators are \['cd'\].*\['f_ebm', 'pcd', 'replay'\] do"):
            fit(KEY, svi_of("cd"), 2, x, record_chains=2)
        with pytest.raises(ebm.EnergyError, match=r"record_chains=9.*'x' has 8 persistent chains"):
            fit(KEY, svi_of("pcd"), 2, x, record_chains=9)
        with pytest.raises(ebm.EnergyError, match="record_chains >= 0"):
            fit(KEY, svi_of("pcd"), 2, x, record_chains=-1)
