"""`fit` with batches: scaling against priors, rows that are told apart, sources of rows, and what happens if they fail."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from estimator_cases import continuous_options
from helpers import some_slow, vector_model
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoNormal

import numpyro_ebm as ebm
from numpyro_ebm.handlers.minibatch import minibatch
from numpyro_ebm.training.batches import feed_of

KEY = jax.random.key(0)
fit = partial(ebm.fit, progress_bar=False)
X = np.random.default_rng(0).normal(0, 0.5, 100).astype(np.float32)
EXACT = float((100 / 2 + 1) / (np.sum(X**2) / 2 + 20))
"""Mode of the posterior of a precision under Gamma(2, 20), whose prior counts as much as 40 of the rows."""


def with_prior(x, weight=None):
    """A precision with a strong prior, and rows in a plate that is written for the batch."""
    t = numpyro.sample("t", dist.Gamma(2.0, 20.0))
    with numpyro.plate("rows", len(x)), handlers.scale(scale=1.0 if weight is None else weight):
        normal = ebm.EnergyDistribution(lambda v: 0.5 * t * v**2 - 0.5 * jnp.log(t), normalized=True)
        numpyro.sample("x", normal, obs=x)


def of_all_rows(x):
    """The same with a plate that is written for the whole data set."""
    t = numpyro.sample("t", dist.Gamma(2.0, 20.0))
    with numpyro.plate("rows", 100, subsample_size=len(x)):
        normal = ebm.EnergyDistribution(lambda v: 0.5 * t * v**2 - 0.5 * jnp.log(t), normalized=True)
        numpyro.sample("x", normal, obs=x)


def log_density(model, x, t=3.0, **bound):
    wrapped = minibatch(model, len(x), **bound) if bound else model
    return float(numpyro.infer.util.log_density(wrapped, (x,), {}, {"t": jnp.asarray(t)})[0])


def svi_of(model, name=None, optimiser=None, guide=ebm.empty_guide, **options):
    model = model if name is None else ebm.estimate(model, name, **options)
    guide = guide(model) if isinstance(guide, type) else guide
    return SVI(model, guide, optimiser or optax.adam(0.02), Trace_ELBO())


class TestScale:
    @pytest.mark.parametrize("model", [with_prior, of_all_rows])
    @pytest.mark.parametrize("batch", [X[:10], X[:7], X[:1]])
    def test_the_batches_of_an_epoch_have_the_mean_of_the_whole(self, model, batch):
        prior = float(dist.Gamma(2.0, 20.0).log_prob(3.0))
        rows = -0.5 * 3.0 * np.sum(batch**2) + len(batch) * 0.5 * np.log(3.0)
        found = log_density(model, batch, num_rows=100, plate="rows")
        np.testing.assert_allclose(found, prior + 100 / len(batch) * rows, rtol=1e-5)

    @pytest.mark.parametrize("model", some_slow([with_prior], [of_all_rows]))
    def test_a_prior_counts_once(self, model):
        svi = svi_of(model, guide=AutoDelta, optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 1500)))
        result = fit(KEY, svi, 1500, batches=X, batch_size=8, ema=0.99)
        np.testing.assert_allclose(result.params["t_auto_loc"], EXACT, rtol=0.02)

    @pytest.mark.slow
    def test_weights_of_rows(self):
        """A row of weight 2 counts twice, one of weight 1/2 half."""
        weight = np.where(np.arange(100) < 60, 2.0, 0.5).astype(np.float32)
        svi = svi_of(with_prior, guide=AutoDelta, optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 2000)))
        result = fit(KEY, svi, 2000, batches=(X, weight), batch_size=10, ema=0.995)
        exact = (1 + np.sum(weight) / 2) / (np.sum(weight * X**2) / 2 + 20)
        np.testing.assert_allclose(result.params["t_auto_loc"], exact, rtol=0.03)

    def test_masked_rows(self):
        def model(x, is_seen):
            with numpyro.plate("rows", len(x)), handlers.mask(mask=is_seen):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * numpyro.param("t", 1.0) * v**2), obs=x)

        is_seen = np.arange(100) % 3 > 0
        holed = np.where(is_seen, X, np.nan)
        result = fit(KEY, svi_of(model, "sm", optax.adam(0.1)), 300, batches=(holed, is_seen), batch_size=100)
        np.testing.assert_allclose(result.params["t"], 1 / np.mean(X[is_seen] ** 2), rtol=1e-3)

    def test_whole_batches_are_the_arguments(self):
        """One batch of all rows makes the same updates as rows among the arguments."""
        whole = fit(KEY, svi_of(vector_model, "sm"), 20, np.c_[X, X])
        batch = fit(KEY, svi_of(vector_model, "sm"), 20, batches=np.c_[X, X], batch_size=500)
        np.testing.assert_allclose(batch.losses, whole.losses, rtol=1e-5)

    def test_plates_are_told_apart_by_name(self):
        def square(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("columns", 4, dim=-1), numpyro.plate("rows", len(x), dim=-2):
                numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2), obs=x)

        x = np.random.default_rng(1).normal(0, 1, (40, 4))
        with pytest.raises(ebm.EnergyError, match=r"\['columns', 'rows'\] all fit.*row_plate='columns'"):
            fit(KEY, svi_of(square, "sm"), 3, batches=x, batch_size=4)
        result = fit(KEY, svi_of(square, "sm", optax.adam(0.1)), 300, batches=x, batch_size=4, row_plate="rows", ema=0.95)
        np.testing.assert_allclose(result.params["t"], 1 / np.mean(x**2), rtol=0.15)
        assert fit(KEY, svi_of(square, "sm"), 3, batches=x, batch_size=7).losses.shape == (3,)

    def test_plates_that_do_not_fit(self):
        def mean(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", 30):
                numpyro.sample("x", dist.Normal(t, 1), obs=jnp.mean(x))

        with pytest.raises(ebm.EnergyError, match=r"plates {'rows': 30}, and none fits the batch of 8 rows.*len\(x\)"):
            fit(KEY, svi_of(mean), 3, batches=X, batch_size=8)
        with pytest.raises(ebm.EnergyError, match=r"'x' is in the plate 'rows' of size 30.*batch of 8 rows.*of 100"):
            fit(KEY, svi_of(mean), 3, batches=X, batch_size=8, row_plate="rows")
        with pytest.raises(ebm.EnergyError, match="row_plate='row' is no plate of the model. Did you mean 'rows'"):
            fit(KEY, svi_of(with_prior, guide=AutoDelta), 3, batches=X, batch_size=8, row_plate="row")
        with pytest.raises(ebm.EnergyError, match=r"plates {'rows': 100}.*data set of 50 rows \(data_size"):
            fit(KEY, svi_of(of_all_rows, guide=AutoDelta), 3, batches=[X[:20]], data_size=50)

    def test_several_plates_of_rows(self):
        def model(x, y):
            a, b = (numpyro.sample(name, dist.Gamma(2.0, 20.0)) for name in "ab")
            with numpyro.plate("rx", len(x)):
                numpyro.sample("x", dist.Normal(0, a**-0.5), obs=x)
            with numpyro.plate("ry", len(y)):
                numpyro.sample("y", dist.Normal(0, b**-0.5), obs=y)

        svi = svi_of(model, guide=AutoDelta, optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 600)))
        run = partial(fit, KEY, svi, batches=(X, X), batch_size=20)
        with pytest.raises(ebm.EnergyError, match=r"row_plate='rx' if that one.*row_plate=\('rx', 'ry'\)"):
            run(3)
        with pytest.raises(ebm.EnergyError, match=r"site 'y' depends on the 20 rows.*row_plate=\('rx', 'ry'\)"):
            run(3, row_plate="rx")
        result = run(600, row_plate=("rx", "ry"), ema=0.97)
        for name in "ab":
            np.testing.assert_allclose(result.params[f"{name}_auto_loc"], EXACT, rtol=0.02)

    @pytest.mark.parametrize("kind", ["plain", "event", "factor", "nothing"])
    def test_rows_outside_of_their_plate(self, kind):
        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", dist.Normal(t, 1), obs=x)
            if kind == "factor":
                numpyro.factor("y", -t * x**2)
            elif kind == "nothing":  # of as many values as a batch, which do not depend on it
                numpyro.sample("y", dist.Normal(t, 1), obs=jnp.ones(20))
            else:
                numpyro.sample("y", dist.Normal(t, 1).expand([len(x)]).to_event(kind == "event"), obs=x)

        run = partial(fit, KEY, svi_of(model), 2, batches=X, batch_size=20)
        if kind == "nothing":
            assert run().stopped == "end"
        else:
            with pytest.raises(ebm.EnergyError, match=r"site 'y' depends on the 20.*plate\('rows', len\(x\)\): around it"):
                run()


class TestIndices:
    x = np.repeat([1.0, 3.0], 50).astype(np.float32)

    def test_of_a_plate_of_the_batch(self):
        """The rows that a batch holds, and not the last one again and again: t = 1 / mean(x^2)."""

        def model(x):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)) as i:
                numpyro.sample("x", dist.Normal(0, jnp.abs(t) ** -0.5), obs=x[i])

        for batches in (
            {"batches": self.x, "batch_size": 20},
            {"batches": list(self.x.reshape(10, 10).T), "data_size": 100},
        ):
            svi = svi_of(model, optimiser=optax.adam(optax.cosine_decay_schedule(0.05, 300)))
            np.testing.assert_allclose(fit(KEY, svi, 300, ema=0.97, **batches).params["t"], 0.2, rtol=0.02)

    def with_entries(self, size, x):
        w = numpyro.param("w", jnp.zeros(100))
        with numpyro.plate("rows", size or len(x), subsample_size=len(x)) as i:
            numpyro.sample("x", dist.Normal(w[i], 1.0), obs=x)

    def test_of_a_plate_of_the_data_set(self):
        y = np.arange(100.0, dtype=np.float32)
        result = fit(KEY, svi_of(partial(self.with_entries, 100), optimiser=optax.sgd(0.1)), 100, batches=y, batch_size=20)
        np.testing.assert_allclose(result.params["w"], y, atol=1e-3)

    @pytest.mark.parametrize(
        ("size", "batches", "words"),
        [
            (
                None,
                {"batches": X, "batch_size": 20},
                r"of 20 rows.*array of 100.*plate\('rows', 100, subsample_size",
            ),
            (None, {"batches": [X[:20]], "data_size": 100}, r"batch of 20 rows.*an array of 100"),
            (100, {"batches": [X[:20]]}, r"does not number its rows.*batches that are \(x, row\), and w\[row\]"),
        ],
    )
    def test_of_the_other_kind(self, size, batches, words):
        with pytest.raises(ebm.EnergyError, match=words):
            fit(KEY, svi_of(partial(self.with_entries, size)), 3, **batches)

    @pytest.mark.parametrize("place", ["model", "guide"])
    def test_of_the_data_set_on_rows_of_the_batch(self, place):
        def model(x, *, in_place=place == "model"):
            with numpyro.plate("rows", 100, subsample_size=len(x)) as i:
                z = numpyro.sample("z", dist.Normal(0, 1))
                numpyro.sample("x", dist.Normal(z, 1), obs=jnp.take(x, i, axis=0) if in_place else x)

        def guide(x):
            with numpyro.plate("rows", 100, subsample_size=len(x)) as i:
                numpyro.sample("z", dist.Delta(x[i + 0] if place == "guide" else x))

        with pytest.raises(ebm.EnergyError, match="data set of 100 rows.*an array of 20 by them.*write obs=x"):
            fit(KEY, svi_of(model, guide=guide), 3, batches=X, batch_size=20)


class TestRowsThatAreToldApart:
    def test_chains_belong_to_their_row(self):
        def model(x, context):
            t = numpyro.param("t", 1.0)
            with numpyro.plate("rows", len(x)):
                energy = lambda v, c: 0.5 * t * (v - c) ** 2  # noqa: E731
                numpyro.sample("x", ebm.EnergyDistribution(energy, context=context), obs=x)

        context = 100 * np.arange(30.0)
        x = X[:30] + context
        svi = svi_of(model, "pcd", num_steps=2)
        result = fit(KEY, svi, 60, batches=(x, context), batch_size=8, record_chains=4)
        pool = result.state.mutable_state["x$pcd"]["state"].pool
        assert pool.age.shape == (30,)
        assert np.all(np.abs(pool.position - context) < 20)
        assert np.all(np.abs(result.chains.samples["x"] - context[:4, None]) < 20)
        loader = [(x[i : i + 8], context[i : i + 8]) for i in range(0, 24, 8)]
        with pytest.raises(ebm.EnergyError, match=r"'pcd' keeps a chain for each row.*batches=\(x, context\).*'replay'"):
            fit(KEY, svi, 3, batches=loader, data_size=24)
        assert fit(KEY, svi_of(model, "cd"), 3, batches=loader, data_size=24).losses.shape == (3,)

    def local_latents(self, size, x, index=None):
        with numpyro.plate("rows", size or len(x), subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1))
            numpyro.sample("x", dist.Normal(z, 0.1), obs=x)

    @pytest.mark.slow
    def test_latents_of_rows(self):
        model = partial(self.local_latents, 30)
        svi = SVI(model, AutoNormal(model), optax.adam(optax.cosine_decay_schedule(0.05, 3000)), Trace_ELBO())
        x = np.linspace(-2, 2, 30)
        result = fit(KEY, svi, 3000, batches=x, batch_size=7)
        np.testing.assert_allclose(result.params["z_auto_loc"], x / 1.01, atol=0.1)

    def test_latents_of_rows_whose_place_is_not_known(self):
        x = np.linspace(-2, 2, 30)
        model = partial(self.local_latents, None)
        svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
        with pytest.raises(ebm.EnergyError, match=r"'z_auto_loc' has an entry for each row.*plate\('rows', 30, subsample"):
            fit(KEY, svi, 3, batches=x, batch_size=7)
        model = partial(self.local_latents, 30)
        svi = SVI(model, AutoNormal(model), optax.adam(0.05), Trace_ELBO())
        with pytest.raises(ebm.EnergyError, match="an iterator does not number its rows.*batch_size=256"):
            fit(KEY, svi, 3, batches=[x[:7], x[7:14]])


class TestSources:
    def test_an_epoch_has_each_row_once(self):
        feed = feed_of(KEY, X, 30, None)
        epochs = [np.concatenate([feed.take().index for _ in range(4)]) for _ in range(3)]
        for epoch in epochs:
            np.testing.assert_array_equal(np.sort(epoch), np.arange(100))
        assert not np.array_equal(*epochs[:2])
        again = feed_of(KEY, X, 30, None)
        again.skip(7)
        np.testing.assert_array_equal(again.take().index, epochs[1][90:])

    def test_forms_of_a_batch(self, tmp_path):
        np.save(tmp_path / "x.npy", X)
        mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
        losses = [
            fit(KEY, svi_of(with_prior, guide=AutoDelta), 15, batches=batches, batch_size=30).losses
            for batches in (X, mapped, jnp.asarray(X), (X,), {"x": X}, X.astype(np.float64))
        ]
        for each in losses[1:]:
            np.testing.assert_allclose(each, losses[0], rtol=1e-6)

    def test_iterables(self):
        parts = [X[i : i + 30] for i in range(0, 100, 30)]
        run = partial(fit, KEY, num_steps=9, data_size=100)
        first = run(svi_of(with_prior, guide=AutoDelta), batches=parts)
        assert first.num_batches == 9
        for batches in ([[each] for each in parts], [{"x": each} for each in parts]):
            np.testing.assert_array_equal(run(svi_of(with_prior, guide=AutoDelta), batches=batches).losses, first.losses)
        whole = fit(KEY, svi_of(of_all_rows, guide=AutoDelta), 9, batches=parts)
        np.testing.assert_allclose(whole.losses, first.losses, rtol=1e-6)

    def test_dicts_are_read_by_name(self):
        def model(x, weight):
            with_prior(x, weight)

        weight = np.full(20, 2.0, np.float32)
        run = partial(fit, KEY, num_steps=6, data_size=100)
        first = run(svi_of(model, guide=AutoDelta), batches=[{"x": X[:20], "weight": weight}])
        batches = [{"x": X[:20], "weight": weight}, {"weight": weight, "x": X[:20]}]
        np.testing.assert_array_equal(run(svi_of(model, guide=AutoDelta), batches=batches).losses, first.losses)
        for bad in ({"x": X[:20]}, {"x": X[:20], "wieght": weight}, (X[:20], weight)):
            with pytest.warns(ebm.TrainingStoppedWarning, match=r"\['x', 'weight'\] at first.*after 1 updates"):
                assert run(svi_of(model, guide=AutoDelta), batches=[batches[0], bad]).stopped == "data"

    @pytest.mark.slow
    def test_a_data_loader_of_grain_goes_on_from_its_place(self):
        import grain.python as grain

        def loader():
            source = grain.RangeDataSource(0, 100, 1)
            sampler = grain.IndexSampler(100, grain.NoSharding(), shuffle=True, num_epochs=5, seed=3)
            take = type("Take", (grain.MapTransform,), {"map": lambda self, i: X[i]})()
            return grain.DataLoader(data_source=source, sampler=sampler, operations=[take, grain.Batch(20)])

        svi = svi_of(with_prior, guide=AutoDelta)
        whole = fit(KEY, svi, 12, batches=loader(), data_size=100, check_every=6)
        half = fit(KEY, svi, 6, batches=loader(), data_size=100, check_every=6)
        rest = fit(KEY, svi, 6, batches=loader(), data_size=100, check_every=6, init_state=half)
        np.testing.assert_array_equal(np.r_[half.losses, rest.losses], whole.losses)

    def test_one_trace_per_shape(self):
        calls = []

        def model(x):
            t = numpyro.param("t", 1.0)

            def energy(v):
                calls.append(len(calls))
                return 0.5 * t * v**2

            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(energy), obs=x)

        counts = []
        for num_steps in (5, 50, 150):  # batches of 32, 32, 32 and 4 rows
            calls.clear()
            fit(KEY, svi_of(model, "sm"), num_steps, batches=X, batch_size=32, check_every=50)
            counts.append(len(calls))
        assert counts[0] == counts[1] == counts[2]

    def test_groups_of_batches_change_nothing(self, monkeypatch):
        run = partial(fit, KEY, num_steps=40, batches=X, batch_size=16, check_every=20)
        first = run(svi_of(with_prior, guide=AutoDelta))
        for most in (1, 3):
            monkeypatch.setattr("numpyro_ebm.training._run.MOST_AT_ONCE", most)
            np.testing.assert_array_equal(run(svi_of(with_prior, guide=AutoDelta)).losses, first.losses)

    @pytest.mark.parametrize(
        ("batches", "options", "words"),
        [
            (X, {}, "no batch_size"),
            (X, {"batch_size": 0}, "batch_size >= 1"),
            (X, {"batch_size": 8, "data_size": 100}, "length of the arrays"),
            (X[:0], {"batch_size": 8}, "needs rows"),
            (np.float32(3.0), {"batch_size": 8}, "needs rows"),
            ((X, X[:5]), {"batch_size": 8}, r"\[100, 5\] rows"),
            ([X, X], {"batch_size": 8}, r"an iterable, here of type list.*tuple: batches=\(np.asarray\(x\)"),
            ({"x": X}, {"batch_size": 8, "x": X}, "The argument 'x' is given twice"),
            ([X], {}, "does not say how many rows.*data_size"),
            ([X], {"data_size": 0}, "data_size >= 1"),
            ([X], {"data_size": 10}, "data_size=10 is the number of rows of the whole data set, and the first .* has 100"),
            ([], {"data_size": 100}, "no batches"),
            (None, {"data_size": 100}, "data_size belongs to batches="),
            (None, {"row_plate": "rows"}, "row_plate belongs to batches="),
        ],
    )
    def test_refusals(self, batches, options, words):
        args = (X,) if batches is None else ()
        with pytest.raises(ebm.EnergyError, match=words):
            fit(KEY, svi_of(with_prior, guide=AutoDelta), 5, *args, batches=batches, **options)

    def test_types(self):
        with pytest.raises(TypeError, match=r"got list at 'x'.*batches={'x': np.asarray\(x\)}"):
            fit(KEY, svi_of(with_prior, guide=AutoDelta), 5, batches={"x": [1.0, 2.0]}, batch_size=2)
        for batches, words in ((3, "got int"), (["a"], "it holds str"), (iter([(X, 1.0)]), "it holds float")):
            with pytest.raises(TypeError, match=words):
                fit(KEY, svi_of(with_prior, guide=AutoDelta), 5, batches=batches, data_size=100)


@pytest.mark.parametrize("name", some_slow(["sm", "pcd", "nce"], [n for n in continuous_options(shape=(2,))]))
def test_every_estimator_takes_a_short_last_batch(name):
    x = np.random.default_rng(0).normal(0, 1, (21, 2)).astype(np.float32)
    svi = svi_of(vector_model, name, optax.sgd(1e-4), **continuous_options(shape=(2,))[name])
    result = fit(KEY, svi, 7, batches=x, batch_size=8, check_every=5)
    assert np.isfinite(result.losses).all()
    assert (result.stopped, result.num_batches) == ("end", 7)


class Countdown:
    """An iterator that can be set back, like those of grain, and raises once at a place."""

    def __init__(self, place=None, error=None):
        self.number, self.place, self.error = 0, place, error

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == self.place:
            self.place = None
            raise self.error
        self.number += 1
        return X[10 * (self.number % 10) :][:10]

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


class TestPlace:
    """A run goes on with the first batch that it had not used, however it ended."""

    @pytest.mark.parametrize(("place", "error"), [(24, KeyboardInterrupt()), (24, OSError("gone"))])
    def test_of_an_iterator_that_can_be_set_back(self, tmp_path, place, error):
        run = partial(fit, KEY, num_steps=60, data_size=100, check_every=30)
        whole = run(svi_of(with_prior, guide=AutoDelta), batches=Countdown())
        with pytest.warns(ebm.TrainingStoppedWarning) if isinstance(error, OSError) else nullcontext():
            first = run(svi_of(with_prior, guide=AutoDelta), batches=Countdown(place, error), checkpoint=tmp_path)
        assert first.num_batches == len(first.losses) < 30
        rest = run(svi_of(with_prior, guide=AutoDelta), batches=Countdown(), checkpoint=tmp_path)
        np.testing.assert_array_equal(rest.losses, whole.losses)

    @pytest.mark.filterwarnings("ignore::numpyro_ebm.UnhealthyChainsWarning")
    def test_after_an_error_of_the_chains(self, tmp_path):
        """The device stops somewhere in the interval, and other batches have been taken by then."""

        def run(num_steps, **options):
            chains = {"num_steps": 1, "num_chains": 8, "kernel": "langevin", "on_unhealthy": "raise"}
            svi = svi_of(vector_model, "pcd", optax.sgd(0.5), **chains)
            options |= {"batch_size": 10, "check_every": 40, "on_unhealthy": "rollback"}
            return fit(KEY, svi, num_steps, batches=np.c_[X, X], **options)

        whole = run(160)
        assert whole.rollbacks
        for num_steps in range(40, 161, 40):
            rest = run(num_steps, checkpoint=tmp_path)
        assert rest.num_batches == 160
        np.testing.assert_array_equal(rest.losses, whole.losses)


class TestFailures:
    def run(self, batches, num_steps=40, **options):
        return fit(KEY, svi_of(with_prior, guide=AutoDelta), num_steps, batches=batches, check_every=10, **options)

    def test_an_iterator_that_raises(self):
        def failing():
            for _ in range(24):
                yield X[:20]
            raise OSError("the disk is gone")

        with pytest.warns(ebm.TrainingStoppedWarning, match="raised OSError: the disk is gone.*after 24 updates"):
            result = self.run(failing(), data_size=100)
        assert (result.stopped, len(result.losses), result.best_step) == ("data", 24, 24)
        np.testing.assert_array_equal(result.losses, self.run([X[:20]], 24, data_size=100).losses)

    def test_an_iterator_that_ends(self):
        with pytest.warns(ebm.TrainingStoppedWarning, match="came to its end"):
            result = self.run(iter([X[:20]] * 7), data_size=100)
        assert (result.stopped, len(result.losses)) == ("data", 7)

    @pytest.mark.parametrize("bad", [np.full(3, np.nan), np.zeros(0), "rows"])
    def test_a_bad_batch(self, bad):
        batches = [X[:20]] * 24 + [bad] + [X[:20]] * 15
        if not isinstance(bad, str) and bad.size:
            with pytest.warns(ebm.NonFiniteLossWarning, match=r"at update 25.*after 20\. Row 0 of a batch.*is not finite"):
                result = self.run(batches, data_size=100)
            assert (result.stopped, result.best_step) == ("nonfinite", 20)
        else:
            with pytest.warns(ebm.TrainingStoppedWarning, match="raised (EnergyError|TypeError).*(needs rows|holds str)"):
                result = self.run(batches, data_size=100)
            assert (result.stopped, result.best_step) == ("data", 24)
        assert np.isfinite(result.params["t_auto_loc"])

    def test_a_row_that_is_not_finite_is_named_by_its_place_in_the_data(self):
        holed = np.where(np.arange(100) == 17, np.nan, X)
        with pytest.warns(ebm.NonFiniteLossWarning, match=r"Row 17 of the data set, in an array .* \(20,\)"):
            result = self.run(holed, batch_size=20)
        assert np.isfinite(result.params["t_auto_loc"])

    def test_a_batch_that_the_model_does_not_take(self):
        def run(batches):
            return fit(KEY, svi_of(vector_model, "sm"), 40, batches=batches, data_size=100, check_every=10)

        good, bad = np.c_[X, X][:20], np.c_[X, X, X][:20]
        with pytest.warns(ebm.TrainingStoppedWarning, match=r"shapes \[\(20, 3\)\]: EnergyError.*event_shape=\(2,\)"):
            result = run([*[good] * 24, bad])
        assert (result.stopped, len(result.losses), result.best_step) == ("data", 24, 24)
        np.testing.assert_array_equal(result.losses, run([good]).losses[:24])
        with pytest.raises(ebm.EnergyError, match=r"event_shape=\(2,\)"):
            run([bad])

    def test_a_batch_of_one_row(self):
        assert np.isfinite(self.run(X, batch_size=1).losses).all()

    def test_an_interruption_keeps_the_updates_so_far(self):
        def interrupted():
            for _ in range(24):
                yield X[:20]
            raise KeyboardInterrupt

        result = self.run(interrupted(), data_size=100)
        assert (result.stopped, len(result.losses)) == ("interrupted", 20)  # batches reach the device in groups

    def test_a_callback_that_raises(self):
        seen = []

        def callback(figures):
            seen.append(figures)
            if len(seen) == 2:
                raise ValueError("no space left")

        with pytest.warns(ebm.TrainingStoppedWarning, match="callback raised ValueError: no space left.*after 20 updates"):
            result = self.run(X, batch_size=20, callback=callback)
        assert (result.stopped, len(result.losses)) == ("callback", 20)
        assert [each["step"] for each in seen] == [10, 20]
        assert seen[0].keys() == {"step", "loss", "gradient_norm", "steps_per_second"}
