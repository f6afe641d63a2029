"""`diagnose`, `split_rhat` and `nested_rhat`: what is wrong is found, and nothing is found where nothing is."""

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
import xarray
from helpers import precision_model
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from scipy.stats import chi2, norm

import numpyro_ebm as ebm
from numpyro_ebm.diagnostics._bounds import chi2_bound, gamma_bound, normal_bound
from numpyro_ebm.diagnostics._neighbors import neighbors

KEY = jax.random.key(0)
WELLS = ebm.EnergyDistribution(lambda x: 8.0 * (x**2 - 1) ** 2)


def well_rows(num, seed=0):
    """Rows of both modes of the double well, by quadrature."""
    grid = np.linspace(-2, 2, 20_001)
    weights = np.exp(-8 * (grid**2 - 1) ** 2)
    return np.random.default_rng(seed).choice(grid, num, p=weights / weights.sum())


def autoregression(shape, phi=0.5, seed=0):
    """Stationary chains ``(chains, draws, dim)``, each coordinate standard normal."""
    noise = np.random.default_rng(seed).normal(size=shape)
    chains = noise.copy()
    for i in range(1, shape[1]):
        chains[:, i] = phi * chains[:, i - 1] + np.sqrt(1 - phi**2) * noise[:, i]
    return chains.astype(np.float32)


def names(diagnosis):
    return {finding.name for finding in diagnosis.warnings}


HEALTHY = {
    "normal": lambda z: z,
    "skewed": np.exp,
    "heavy tails": lambda z: np.sign(z) * np.abs(z) ** 2.5,
    "two clusters": lambda z: z + 3 * (z > 0),
}


class TestHealthyDraws:
    @pytest.mark.parametrize("law", HEALTHY)
    @pytest.mark.parametrize(("shape", "phi"), [((4, 1000, 5), 0.6), ((2, 2000, 1), 0.7), ((8, 300, 2), -0.3)])
    def test_chains_with_a_known_law(self, law, shape, phi):
        rows = np.random.default_rng(1).normal(size=(60 * shape[0], shape[2]))
        draws = {"x": HEALTHY[law](autoregression(shape, phi))}
        diagnosis = ebm.diagnose(draws, data=HEALTHY[law](rows))
        assert diagnosis.is_healthy, str(diagnosis)
        assert {"x modes", "x neighbours", "R-hat", "ESS"} <= {f.name for f in diagnosis.findings if f.status == "ok"}

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize(
        ("case", "kernel"), [(1, "nuts"), (2, "hmc"), (3, "mala"), (5, "nuts"), ("positive", "nuts"), ("mixture", "nuts")]
    )
    def test_runs_of_ours(self, case, kernel, seed):
        rng = np.random.default_rng(seed)
        if case == "positive":
            energy = lambda x: jnp.sum(x) - 2 * jnp.sum(jnp.log(x))  # noqa: E731
            law, rows = (
                ebm.EnergyDistribution(energy, (2,), support=dist.constraints.positive),
                rng.gamma(3.0, 1.0, (400, 2)),
            )
        elif case == "mixture":
            centres = np.array([[-1.5, 0.0], [1.5, 0.0]])
            energy = lambda x: -jax.nn.logsumexp(-0.5 * jnp.sum((x - centres) ** 2, -1))  # noqa: E731
            law, rows = ebm.EnergyDistribution(energy, (2,)), rng.normal(size=(400, 2)) + centres[rng.integers(2, size=400)]
        else:
            factor = np.random.default_rng(case).normal(size=(case, case))
            precision = factor @ factor.T / case + np.eye(case)
            law = ebm.EnergyDistribution(lambda x: 0.5 * x @ precision @ x, (case,))
            rows = rng.multivariate_normal(np.zeros(case), np.linalg.inv(precision), 400)
        draws = ebm.sample(jax.random.key(seed), law, kernel, num_warmup=500, num_samples=1000)
        diagnosis = ebm.diagnose(draws, data=rows)
        assert diagnosis.is_healthy, str(diagnosis)


class TestChains:
    @pytest.mark.parametrize("values", [np.full((4, 100), 0.3), np.arange(4.0)[:, None] + np.zeros((4, 100))])
    def test_frozen_ones_have_no_effective_draws(self, values):
        diagnosis = ebm.diagnose({"x": values})
        assert "[0, 1, 2, 3] are frozen" in diagnosis["movement"].measured
        assert diagnosis["R-hat"].status == diagnosis["ESS"].status == "not checked"
        assert ("independent chains" in names(diagnosis)) == bool(np.ptp(values) == 0)

    def test_some_frozen_and_rounding_errors(self):
        x = autoregression((4, 500, 2))
        x[2] = x[2, 0]
        x[3] = np.float32(0.7) * (1 + 1e-7 * x[3])
        diagnosis = ebm.diagnose({"x": x})
        assert "[2, 3] are frozen" in diagnosis["movement"].measured
        assert diagnosis["R-hat"].status == "warning"

    def test_copies(self):
        x = autoregression((3, 500, 2))
        x[2] = x[0]
        diagnosis = ebm.diagnose({"x": x})
        assert names(diagnosis) == {"independent chains"}
        assert "chains 0 and 2 are identical" in diagnosis["independent chains"].measured

    def test_draws_that_are_not_finite_are_named(self):
        x = autoregression((4, 500, 2))
        x[1, 7, 0] = np.nan
        diagnosis = ebm.diagnose({"x": x, "y": autoregression((4, 500, 1), seed=1)})
        assert names(diagnosis) == {"finite draws"}
        assert "1 values are not finite: x[0] in chain 1, draw 7" in diagnosis["finite draws"].measured
        assert diagnosis["R-hat"].status == "ok"  # of the other coordinates
        everywhere = ebm.diagnose({"x": np.full((4, 50), np.nan)}, data=np.arange(50.0))
        assert everywhere["R-hat"].status == everywhere["x against data"].status == "not checked"
        assert {"finite draws"} <= names(everywhere)

    def test_chains_apart_and_chains_too_short(self):
        x = autoregression((4, 500, 2))
        x[:, :, 1] += np.arange(4)[:, None]
        diagnosis = ebm.diagnose({"x": x})
        assert names(diagnosis) == {"R-hat", "ESS"}
        assert "x[1]" in diagnosis["R-hat"].measured
        slow = {"x": autoregression((4, 300, 1), 0.95)}
        assert "ESS" in names(ebm.diagnose(slow))
        healthy = {"x": autoregression((4, 100, 1), 0.3)}
        assert ebm.diagnose(healthy).is_healthy
        assert names(ebm.diagnose(healthy, min_ess=400)) == {"ESS"}
        assert ebm.diagnose({"x": autoregression((1, 500, 1))})["R-hat"].status == "not checked"
        assert ebm.diagnose({"x": np.ones((4, 1))})["ESS"].status == "not checked"

    def test_what_the_sampler_says(self):
        x, rng = autoregression((4, 500, 1)), np.random.default_rng(0)
        healthy = {
            "acceptance_rate": rng.uniform(0.7, 0.9, (4, 500)),
            "is_divergent": np.zeros((4, 500), bool),
            "energy": rng.normal(size=(4, 500)),
            "potential_energy": rng.normal(size=(4, 500)),
            "tree_depth": np.full((4, 500), 3),
            "is_nonfinite": np.zeros((4, 500), bool),
        }
        faults = {
            "divergences": {"is_divergent": rng.uniform(size=(4, 500)) < 0.01},
            "acceptance": {"acceptance_rate": np.full((4, 500), 0.05)},
            "E-BFMI": {"energy": np.cumsum(healthy["energy"], axis=1)},
            "energy trend": {"potential_energy": healthy["potential_energy"] + np.linspace(0, 3, 500)},
            "tree depth": {"tree_depth": np.full((4, 500), 10)},
            "finite proposals": {"is_nonfinite": np.ones((4, 500), bool)},
        }
        kernel = ebm.NUTS()
        diagnosis = ebm.diagnose(ebm.Draws({"x": x}, healthy, kernel))
        assert diagnosis.is_healthy, str(diagnosis)
        assert all(diagnosis[name].status == "ok" for name in faults)
        for name, fault in faults.items():
            found = names(ebm.diagnose(ebm.Draws({"x": x}, healthy | fault, kernel)))
            assert name in found
            assert found <= {name, "R-hat", "ESS"}  # of the log density
        tiny = healthy | {"acceptance_rate": np.full((4, 500), 0.999)}
        assert ebm.diagnose(ebm.Draws({"x": x}, tiny, kernel))["acceptance"].status == "ok"
        slow = ebm.diagnose(ebm.Draws({"x": autoregression((4, 500, 1), 0.99)}, tiny, kernel))
        assert "larger step_size" in slow["acceptance"].advice
        unadjusted = ebm.diagnose(ebm.Draws({"x": x}, healthy, ebm.Langevin()))
        assert "never rejects" in unadjusted["acceptance"].measured

    @pytest.mark.slow
    def test_numpyros_own_kernel_and_arviz_data(self):
        mcmc = MCMC(
            NUTS(lambda: numpyro.sample("x", dist.Normal(0, 1))), num_warmup=200, num_samples=500, progress_bar=False
        )
        mcmc.run(KEY, extra_fields=("accept_prob", "num_steps", "potential_energy"))
        diagnosis = ebm.diagnose(mcmc)
        assert diagnosis["tree depth"].status == diagnosis["energy trend"].status == "ok"
        assert "at least 0.27" in diagnosis["acceptance"].bound
        rows = np.random.default_rng(0).normal(size=200)
        data = ebm.to_arviz({"x": autoregression((4, 500, 1))[..., 0]}, observed_data={"x": rows})
        diagnosis = ebm.diagnose(data)
        assert diagnosis.is_healthy
        assert diagnosis["x modes"].status == "ok"


class TestData:
    def test_chains_in_one_mode_look_fine_without_data(self):
        near_one = lambda key, law, shape: 1 + 0.01 * jax.random.normal(key, shape + law.event_shape)  # noqa: E731
        draws = ebm.sample(KEY, WELLS, "mala", num_warmup=500, num_samples=1000, start=near_one)
        alone = ebm.diagnose(draws)
        assert alone.is_healthy
        assert alone["modes"].status == "not checked"
        assert "one mode" in alone["modes"].measured
        assert {"x modes", "x mean", "x neighbours"} <= names(ebm.diagnose(draws, data=well_rows(400)))

    def test_a_small_mode_that_is_missed_and_one_that_is_not_there(self):
        rng = np.random.default_rng(0)
        rows = np.where(rng.uniform(size=1000) < 0.2, 6.0, 0.0)[:, None] + rng.normal(size=(1000, 1))
        draws = autoregression((4, 1000, 1))
        assert "x modes" in names(ebm.diagnose({"x": draws}, data=rows))
        both = draws + 6.0 * (autoregression((4, 1000, 1), seed=1) > 0.84)
        found = names(ebm.diagnose({"x": both}, data=rng.normal(size=(1000, 1))))
        assert "x support" in found
        assert "x modes" not in found

    def test_draws_that_are_copies_of_rows(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(300, 2))
        draws = rows[rng.integers(300, size=(4, 300))] + 1e-3 * rng.normal(size=(4, 300, 2))
        diagnosis = ebm.diagnose({"x": draws}, data=rows)
        assert names(diagnosis) == {"x copies"}
        assert "lie on rows" in diagnosis["x copies"].advice

    @pytest.mark.parametrize("kernel", ["hmc", pytest.param("mala", marks=pytest.mark.slow)])
    def test_an_unbounded_energy(self, kernel):
        draws = ebm.sample(KEY, ebm.EnergyDistribution(lambda x: -(x**2)), kernel, num_warmup=100, num_samples=200)
        assert np.all(np.isfinite(draws.samples["x"]))
        found = names(ebm.diagnose(draws, data=np.random.default_rng(0).normal(size=200)))
        assert {"growth", "x distance", "ESS"} <= found

    def test_draws_far_away_that_are_steady(self):
        draws = {"x": 1.9e8 * autoregression((4, 500, 1))}
        diagnosis = ebm.diagnose(draws, data=np.random.default_rng(0).normal(size=(200, 1)))
        assert "x distance" in names(diagnosis)
        assert "base=" in diagnosis["x distance"].advice
        x = autoregression((4, 50, 1))[..., 0].astype(float)
        x[2] = 1e300
        assert {"movement", "x distance"} <= names(ebm.diagnose({"x": x}, data=np.arange(50.0)))

    def test_rows_in_a_plate_and_values_that_repeat(self):
        rows = np.random.default_rng(0).normal(size=300)
        assert ebm.diagnose({"x": autoregression((4, 500, 3))}, data=rows)["x modes"].status == "ok"
        rounded = ebm.diagnose({"x": np.round(autoregression((4, 500, 1)))}, data=np.round(rows)[:, None])
        assert rounded["x modes"].status == "not checked"

    def test_nearest_neighbours_have_their_law_under_the_null(self):
        rng = np.random.default_rng(0)
        z = []
        for _ in range(60):
            seen = neighbors(rng.normal(size=(80, 2)), rng.normal(size=(50, 2)))
            z.append([each.z for each in seen])
        z = np.array(z)
        assert np.all(abs(z.mean(0)) < 5 / np.sqrt(60))
        assert np.all(abs(z.std(0) - 1) < 5 / np.sqrt(30))  # skewed: twice the variance of a normal's

    def test_bounds(self):
        assert abs(normal_bound() - norm.isf(5e-7)) < 1e-6
        exact = chi2.isf(1e-6, [2, 7, 40])
        bounds = np.array([chi2_bound(degrees) for degrees in (2, 7, 40)])
        assert np.all((bounds > exact) & (bounds < 1.1 * exact))
        assert gamma_bound(100.0, 1.0) == pytest.approx(100 + norm.isf(1e-6), rel=2e-3)
        assert gamma_bound(0.1, 0.0) == 0.1


class TestReport:
    def test_text_html_and_dicts(self):
        diagnosis = ebm.diagnose({"<b>": autoregression((4, 500, 1), 0.99)}, data=np.zeros((3, 1)))
        text, markup = str(diagnosis), diagnosis._repr_html_()
        assert text.splitlines()[0].startswith(f"{len(diagnosis.warnings)} warnings")
        assert text.index("[!!]") < text.index("[ok]")
        assert "&lt;b&gt;" in markup
        assert "<b>[" not in markup
        assert "http" not in markup
        as_dict = diagnosis.as_dict()
        assert as_dict["ESS"]["status"] == "warning"
        assert as_dict["ESS"]["bound"] == "at least 100"
        assert {finding.name for finding in diagnosis.findings} == set(as_dict)
        assert all(finding.advice for finding in diagnosis.warnings)

    def test_refusals(self):
        x = {"x": autoregression((4, 50, 2))}
        with pytest.raises(ebm.EnergyError, match=r"shape \(10, 3\), and its draws \(4, 50, 2\)"):
            ebm.diagnose(x, data=np.ones((10, 3)))
        with pytest.raises(ebm.EnergyError, match=r"data for \['y'\]"):
            ebm.diagnose(x, data={"y": np.ones((10, 2))})
        with pytest.raises(ebm.EnergyError, match=r"variables \['x', 'y'\]. Write data=\{'x': x\}"):
            ebm.diagnose(x | {"y": np.ones((4, 50))}, data=np.ones((10, 2)))
        with pytest.raises(TypeError, match="no further arguments but data and min_ess"):
            ebm.diagnose(x, np.ones(3))
        with pytest.raises(TypeError, match="needs the result of its training"):
            ebm.diagnose(ebm.estimate(precision_model, "sm"))
        with pytest.raises(TypeError, match="got int"):
            ebm.diagnose(3)


def trained(name, x, updates=300, rate=0.1, **options):
    """A model, and its training by an Adam that slows down."""
    model = ebm.estimate(precision_model, name, **options)
    optimiser = optax.adam(optax.exponential_decay(rate, updates // 3, 0.1))
    svi = SVI(model, ebm.empty_guide, optimiser, Trace_ELBO())
    return model, ebm.fit(KEY, svi, updates, x, progress_bar=False)


ROWS = np.random.default_rng(0).normal(0, 0.5, 400)


class TestTraining:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "options"),
        [
            ("sm", {}),
            ("dsm", {"sigma": 0.1}),
            pytest.param("cd", {"num_steps": 5}, marks=pytest.mark.slow),
            pytest.param("pcd", {"num_steps": 5}, marks=pytest.mark.slow),
            pytest.param("replay", {"buffer_size": 1000}, marks=pytest.mark.slow),
            pytest.param("nce", {"noise": dist.Normal(0, 1)}, marks=pytest.mark.slow),
        ],
    )
    def test_healthy_runs(self, name, options):
        model, result = trained(name, ROWS, **options)
        diagnosis = ebm.diagnose(model, result, ROWS)
        assert diagnosis.is_healthy, str(diagnosis)
        expected = {"sm": "x score", "dsm": "x smoothing", "nce": "x overlap"}.get(name, "x energy gap")
        assert diagnosis[expected].status == "ok"
        assert (name != "pcd") or diagnosis["x modes"].status == "ok"

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore::UserWarning")  # which the estimators give in training
    def test_noise_that_teaches_nothing(self):
        model = ebm.estimate(precision_model, "nce", noise=dist.Normal(8.0, 0.1))
        diagnosis = ebm.diagnose(model, {"t": 1.0, "x$log_normalizer": 0.0}, ROWS)
        assert names(diagnosis) == {"x overlap"}
        assert "saturated" in diagnosis["x overlap"].advice
        for sigma, words in ((0.01, "larger sigma"), (2.0, "smaller sigma")):
            diagnosis = ebm.diagnose(ebm.estimate(precision_model, "dsm", sigma=sigma), {"t": 1.0}, ROWS)
            assert names(diagnosis) == {"x smoothing"}
            assert words in diagnosis["x smoothing"].advice

    @pytest.mark.slow
    def test_an_energy_that_is_not_at_its_optimum(self):
        for name, key, more in (("sm", "x score", {}), ("nce", "x accuracy", {"x$log_normalizer": -1.0})):
            model = ebm.estimate(precision_model, name)
            assert names(ebm.diagnose(model, {"t": 20.0} | more, ROWS)) == {key}

    @pytest.mark.slow
    def test_conditions_and_the_gap_of_chains(self):
        def concave(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", ebm.EnergyDistribution(lambda x: -(x**2)), obs=x)

        model = ebm.estimate(concave, "cd", num_steps=10)
        svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        with pytest.warns(ebm.UnhealthyChainsWarning, match="unbounded"):
            state = jax.block_until_ready(svi.init(KEY, ROWS[:64]))
        diagnosis = ebm.diagnose(model, state)
        assert "unbounded" in diagnosis["x chains"].measured
        assert "base" in diagnosis["x chains"].advice
        assert diagnosis["x energy gap"].status == "not checked"
        assert names(ebm.diagnose(state)) == {"x chains"}
        values = svi.get_params(state) | state.mutable_state
        assert "x energy gap" in names(ebm.diagnose(model, values, ROWS[:64]))

    @pytest.mark.slow
    def test_persistent_chains_that_miss_a_mode(self):
        def wells(x):
            with numpyro.plate("rows", len(x)):
                numpyro.sample("x", WELLS, obs=x)

        model = ebm.estimate(wells, "pcd", start=dist.Normal(1.0, 0.05), num_steps=50)
        svi = SVI(model, ebm.empty_guide, optax.adam(0.01), Trace_ELBO())
        rows = well_rows(300)
        values = svi.init(KEY, rows).mutable_state
        assert "x modes" in names(ebm.diagnose(model, values, rows))

    def test_losses(self):
        model, result = trained("sm", ROWS, updates=120, rate=0.003)
        assert "x score" in names(ebm.diagnose(model, result, ROWS))
        noise = np.random.default_rng(0).normal(size=200)
        falls = {"warning": np.linspace(100, 1, 200), "ok": 100 * np.exp(-np.arange(200) / 20)}
        for status, losses in falls.items():
            diagnosis = ebm.diagnose(model, result._replace(losses=losses + noise), ROWS)
            assert diagnosis["descent"].status == status
        bad = result._replace(losses=np.r_[result.losses, np.nan])
        diagnosis = ebm.diagnose(model, bad, ROWS)
        assert "first at update 121" in diagnosis["loss"].measured
        fallen = np.r_[np.linspace(10, 1, 5), np.linspace(1, 8, 7)]
        steps = 10 * np.arange(12)
        held = result._replace(losses=np.linspace(9, 1, 110), held_out_losses=fallen, check_steps=steps)
        assert "held-out loss" in names(ebm.diagnose(model, held, ROWS))
        away = result._replace(losses=-np.exp(np.linspace(0, 12, 600)))
        assert "ever faster" in ebm.diagnose(model, away, ROWS)["descent"].measured

    def test_what_cannot_be_looked_at(self):
        model, result = trained("sm", ROWS, updates=2)
        diagnosis = ebm.diagnose(model, result)
        assert diagnosis["figures"].status == "not checked"
        alone = ebm.diagnose(result)
        assert alone["loss"].status == "ok"
        assert alone["descent"].status == alone["figures"].status == "not checked"
        with pytest.raises(TypeError, match="for draws"):
            ebm.diagnose(result, data=ROWS)
        with pytest.raises(ebm.EnergyError, match="no value"):
            ebm.diagnose(model, {}, ROWS)


class TestSplitRhat:
    def test_the_indicator_sees_what_the_mean_does_not(self):
        # Two chains in one mode and two in the other, or all that change: the variance alone tells neither.
        rng = np.random.default_rng(0)
        signs = np.array([1, 1, -1, -1])[:, None]
        x = signs * np.abs(rng.normal(3, 1, (4, 500)))
        functions = {"energy": lambda x: (jnp.abs(x) - 3) ** 2, "left": lambda x: x < 0, "always": lambda x: x**2 >= 0}
        found = ebm.split_rhat({"x": x}, functions)
        assert found["energy"].rhat < 1.02
        assert found["energy"].ess_bulk > 1000
        assert found["left"].rhat == np.inf
        assert "differs between chains" in found["left"].note
        assert found["left"].mean == 0.5
        assert np.isnan(found["always"].rhat)
        assert "1 in all draws of all chains" in str(found["always"])
        mixed = ebm.split_rhat({"x": x * rng.choice([-1, 1], (4, 500))}, functions)
        assert mixed["left"].rhat < 1.02
        assert mixed["left"].note == ""

    def test_it_is_that_of_arviz_and_reads_all_kinds(self):
        x = autoregression((4, 200, 2))
        data = ebm.to_arviz({"x": x, "y": x[..., 0]})
        product = lambda draw: draw["x"][1] * draw["y"]  # noqa: E731
        found = ebm.split_rhat(data, {"product": product})["product"]
        expected = ebm.to_arviz({"f": x[..., 1] * x[..., 0]})
        np.testing.assert_allclose(found.rhat, float(arviz.rhat(expected)["f"]), rtol=1e-5)
        np.testing.assert_allclose(found.ess_tail, float(arviz.ess(expected, method="tail")["f"]), rtol=1e-4)
        chains = ebm.FitResult({}, None, np.zeros(1), np.zeros(0), np.zeros(0, int), 1, "end")
        with pytest.raises(ebm.EnergyError, match=r"record_chains=8"):
            ebm.split_rhat(chains, {"x": lambda x: x})
        record = ebm.RecordedChains({"x": x}, {}, np.arange(200))
        assert ebm.split_rhat(chains._replace(chains=record), {"x": lambda x: x[0]})["x"].rhat < 1.05

    def test_refusals(self):
        x = {"x": autoregression((2, 50, 2))}
        with pytest.raises(ebm.EnergyError, match=r"'f' returned \(2,\) for one draw"):
            ebm.split_rhat(x, {"f": lambda x: x})
        with pytest.raises(TypeError, match="functions by name"):
            ebm.split_rhat(x, lambda x: x)
        x["x"][0, 3] = np.nan
        assert "1 of 100 values are not finite" in ebm.split_rhat(x, {"f": lambda x: x[0]})["f"].note


class TestNestedRhat:
    def test_values_by_hand(self):
        # Superchain means 0 and 2, chain means one from each, draws one from each of these: B = 2, W = 2 + 2.
        x = np.array([[-2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 4.0]])
        np.testing.assert_allclose(ebm.nested_rhat({"x": x}, 2)["x"], np.sqrt(1.5))
        # One draw per chain: B = 2, W = var(-1, 1) = 2. One chain per superchain: B = var(-1, 1, 1, 3), W = 2.
        np.testing.assert_allclose(ebm.nested_rhat({"x": x.mean(1, keepdims=True)}, 2)["x"], np.sqrt(2))
        np.testing.assert_allclose(ebm.nested_rhat({"x": x}, 4)["x"], np.sqrt(1 + np.var([-1, 1, 1, 3], ddof=1) / 2))

    def test_independent_chains_have_the_ratio_of_theory(self):
        rng = np.random.default_rng(0)
        for num_chains, num_draws in ((8, 1), (4, 5)):
            x = rng.normal(size=(200 * num_chains, num_draws, 3))
            ratio = ebm.nested_rhat({"x": x}, 200)["x"] ** 2 - 1
            expected = 1 / (num_chains * (num_draws + 1)) if num_draws > 1 else 1 / num_chains
            np.testing.assert_allclose(ratio, expected, rtol=5 * np.sqrt(2 / 199) + 0.05)

    def test_superchains_that_remember_their_start(self):
        rng = np.random.default_rng(0)
        x = np.repeat(3 * rng.normal(size=16), 8)[:, None] + rng.normal(size=(128, 1))
        assert ebm.nested_rhat({"x": x}, 16)["x"] > 2
        found = ebm.nested_rhat({"x": x}, 16, {"sign": lambda x: x > 0})
        assert set(found) == {"sign"}
        assert found["sign"] > 1.2

    @pytest.mark.skipif(not hasattr(arviz, "rhat_nested"), reason="ArviZ 1.x has it")
    def test_it_is_that_of_arviz(self):
        x = np.repeat(np.random.default_rng(0).normal(size=4), 3)[:, None] + autoregression((12, 7, 1))[..., 0]
        data, owners = xarray.Dataset({"x": (("chain", "draw"), x)}), list(np.repeat(np.arange(4), 3))
        theirs = float(arviz.rhat_nested(data, superchain_ids=owners, method="identity")["x"])
        np.testing.assert_allclose(ebm.nested_rhat({"x": x}, 4)["x"], theirs, rtol=1e-5)

    def test_refusals(self):
        with pytest.raises(ebm.EnergyError, match="num_superchains=3 for 4 chains"):
            ebm.nested_rhat({"x": np.ones((4, 5))}, 3)
        with pytest.raises(ebm.EnergyError, match="no variance within"):
            ebm.nested_rhat({"x": np.ones((4, 1))}, 4)
        with pytest.raises(ebm.EnergyError, match="num_superchains >= 2"):
            ebm.nested_rhat({"x": np.ones((4, 1))}, 1)


def test_data_that_are_all_the_same_say_nothing():
    draws = {"x": np.random.default_rng(0).normal(size=(4, 100, 2))}
    assert ebm.diagnose(draws, data=np.ones((2, 2)))["x against data"].status == "not checked"
    with pytest.raises(TypeError, match="diagnose needs an MCMC"):
        ebm.diagnose(draws["x"])
