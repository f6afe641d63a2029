"""The examples, run small."""

import argparse
import importlib.util
import itertools
from pathlib import Path

import arviz
import numpy as np
import pytest
import xarray
from helpers import check_moments

ROOT = Path(__file__).parents[1]


def load(name, folder="examples"):
    spec = importlib.util.spec_from_file_location(name, ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def wine():
    return load("wine")


def test_a_missing_writer_is_said_before_the_training(wine, tmp_path, monkeypatch):
    monkeypatch.setattr(wine, "find_spec", lambda name: None)
    monkeypatch.setattr(wine, "train", lambda *args: pytest.fail("it trained first"))
    with pytest.raises(SystemExit, match=r"pip install 'h5netcdf\[h5py\]'"):
        wine.main(["--quick", "--out", str(tmp_path)])


def test_wine(wine, tmp_path, capsys):
    rows = wine.main(["--quick", "--methods", "dsm", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for name in ("gaussian", "mixture", "dsm"):
        assert name in printed
    for row in rows:
        assert np.isfinite([row[k] for k in ("sm_loss", "ll", "ll_se", "log_z_se", "is_ess", "rhat", "ess", "gap")]).all()
        assert -16 < row["ll"] < -12
    for name in ("wine.png", "wine_ranks.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    data = arviz.from_netcdf(tmp_path / "wine.nc")
    assert dict(data["posterior"].sizes) == {"chain": 4, "draw": 60, "component": 11}
    assert dict(data["observed_data"].sizes) == {"row": 159, "component": 11}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluate")
    sizes = {"steps": 600, "check-every": 50, "samples": 500, "levels": 200, "particles": 1000, "proposals": 20_000}
    return out, load("evaluate").main([f"--{name}={value}" for name, value in sizes.items()] + ["--out", str(out)])


@pytest.mark.slow
def test_train_resume(tmp_path, capsys):
    results = load("train_resume").main(["--steps=300", "--check-every=50", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "equal, bit for bit: True" in printed
    assert "uninterrupted" in printed
    for result in results.values():
        assert len(result.losses) == 300
        assert -40 < -result.held_out_losses.min() < -20
    assert (tmp_path / "train_resume.png").stat().st_size > 20_000


@pytest.mark.slow
def test_mnist(tmp_path, capsys):
    found = load("mnist").main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "independent pixels" in printed
    assert "nats per digit" in printed
    assert found["lower"] < found["upper"]
    # 40 updates move a small network little from independent pixels.
    assert abs(found["upper"] - found["pixels"]) < 10
    assert 0.5 < found["auroc"] <= 1
    assert (tmp_path / "mnist.png").stat().st_size > 20_000


@pytest.mark.slow
def test_evaluate(evaluated):
    out, results = evaluated
    evaluation, found = results["evaluation"], results["diagnoses"]
    assert list(evaluation.results) == ["pcd", "nce", "dsm", "gaussian", "mixture"]
    for measures in evaluation.results.values():
        assert all(measures.values())
        assert -16 < measures["log_likelihood"].mean < -12
    gain = evaluation.difference("pcd", "gaussian")
    assert gain.mean > 5 * gain.standard_error
    assert len(found) == 6
    assert not {"movement", "R-hat", "divergences", "acceptance"} & {
        each.name for each in found["pcd: draws by NUTS"].warnings
    }
    html = (out / "evaluate.html").read_text()
    assert all(name in html for name in found)
    assert len([path for path in out.glob("evaluate_*.png") if path.stat().st_size > 10_000]) == 7
    training = xarray.open_dataset(out / "evaluate.nc", group="training")
    assert dict(training.sizes) == {"chain": 6, "draw": 12, "component": 11}
    assert training["draw"].values[-1] == 600


@pytest.mark.slow
def test_importance_ais_and_smc_agree_on_a_deep_energy_of_red_wine(evaluated):
    _, results = evaluated
    rows = {row["method"]: row for row in results["log_z"]}
    for a, b in itertools.combinations(("importance", "ais", "smc"), 2):
        assert abs(rows[a]["value"] - rows[b]["value"]) < 4 * np.hypot(rows[a]["se"], rows[b]["se"])
    # The errors are small enough for that to say something.
    assert all(0 < row["se"] < 0.15 for row in rows.values())
    assert -0.5 < float(results["bounds"].gap) < 1


@pytest.mark.slow
@pytest.mark.filterwarnings("default:The weights behind log Z")  # so few proposals as --quick has
def test_latent_prior(tmp_path, capsys):
    rows = load("latent_prior").main(["--quick", "--out", str(tmp_path)])
    assert "the energy prior gains" in capsys.readouterr().out
    assert [row["prior"] for row in rows] == ["normal", "energy"]
    for row in rows:
        assert np.isfinite([row[k] for k in ("bound", "se", "elbo", "log_z", "log_z_se", "share")]).all()
        assert -40 < row["elbo"] < row["bound"] < -15
    assert (tmp_path / "latent_prior.png").stat().st_size > 20_000


@pytest.mark.slow
def test_persistent_chains_keep_what_they_reached(wine):
    """Averages of the parameters and a good log Z: the validation curve stays within half a nat of its best."""
    args = argparse.Namespace(steps=1600, chunk=100, patience=1600, ema=0.995, seed=2019)
    curve = np.array(wine.train("pcd", wine.METHODS["pcd"], wine.load(2019), args).curve)
    steps, values = curve.T
    fall = np.maximum.accumulate(values) - values
    assert np.max(fall[steps >= 800]) < 0.5
    assert np.max(values) > -12.5


@pytest.mark.slow
def test_the_splits_and_the_baselines_are_those_of_the_literature(wine):
    splits = wine.load(2019)
    assert [len(part) for part in splits] == [1296, 144, 159]
    everything = np.concatenate(splits)
    np.testing.assert_allclose(np.cov(everything.T), (1 + 0.05**2) * np.eye(11), atol=0.02)
    gaussian, mixture = wine.baselines(splits, 2019)
    # Means over three splits: -16.13 and -4.81, -13.22 and -17.9.
    assert abs(gaussian["ll"] + 15.5) < 1.5
    assert mixture["ll"] > gaussian["ll"] + 1.5
    assert mixture["sm_loss"] < gaussian["sm_loss"] - 3


@pytest.mark.slow
def test_mixture2d(tmp_path, capsys):
    rows = load("mixture2d").main(["--quick", "--methods", "mle", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "10 transitions from its start" in printed
    for row in rows:
        assert np.isfinite([row[k] for k in ("kl", "weight_error", "chain_sd", "gap", "acceptance", "step_size")]).all()
        np.testing.assert_allclose(row["weights"].sum(), 1.0, atol=0.01)
    assert (tmp_path / "mixture2d.png").stat().st_size > 20_000


@pytest.mark.slow
def test_rbm_digits(tmp_path, capsys):
    found = load("rbm_digits").main(["--epochs=100", "--checks=4", "--warmup=20", "--samples=50", "--out", str(tmp_path)])
    assert "independent pixels reach -25.25" in capsys.readouterr().out
    for row in found["trained"]:
        assert -21 < row["held_out"] < -19
        assert abs(row["ais"] - row["log_z"]) < 5 * row["ais_se"] < 1
    centred, uncentred = found["centring"]
    assert abs(centred["x"] - centred["1 - x"]) < 0.1
    assert abs(uncentred["x"] - uncentred["1 - x"]) > 2
    assert (tmp_path / "rbm_digits.png").stat().st_size > 20_000


@pytest.mark.slow
def test_ising(tmp_path):
    sizes = ["--couplings", "0.2", "--width", "24", "--warmup", "100", "--samples", "400", "--rows", "500", "--steps", "400"]
    found = load("ising").main([*sizes, "--out", str(tmp_path)])
    for row in found["sweep"]:
        # Below the critical coupling a lattice of this width is like the infinite one; its energy
        # per spin has a variance below 3 / N.
        assert abs(row["energy"] - row["exact"]) < 5 * np.sqrt(3.0 / 24**2 / row["ess"])
    rmse = {row["method"]: row["rmse"] for row in found["recovered"]}
    assert rmse["exact"] < 0.06
    assert max(rmse.values()) < 1.3 * rmse["exact"]
    assert (tmp_path / "ising.png").stat().st_size > 20_000


@pytest.mark.slow
def test_score_based(tmp_path, capsys):
    rows = load("score_based").main(["--quick", "--out", str(tmp_path)])
    assert "bits per pixel of 17 grey levels" in capsys.readouterr().out
    assert [row["model"].split(" ")[0] for row in rows] == ["gaussian", "mixture", "score"]
    assert np.isfinite([[row["bits"], row["se"]] for row in rows]).all()
    # The least possible is above 0; a network of 200 updates is near the uniform's log2 17.
    gaussian, mixture, score = (row["bits"] for row in rows)
    assert 2.3 < mixture < gaussian < 3.2
    assert 2.3 < score < 4.6
    assert (tmp_path / "score_based.png").stat().st_size > 20_000


@pytest.mark.slow
def test_mixture2d_against_the_truth(tmp_path):
    methods = ["pcd", "replay", "mle"]
    rows = {row["method"]: row for row in load("mixture2d").main(["--methods", *methods, "--out", str(tmp_path)])}
    for name in ("pcd", "replay"):
        assert rows[name]["kl"] < 0.05
        assert rows[name]["weight_error"] < 0.02
    # Short runs from the base: chains near the data, the energy wrong.
    assert rows["mle"]["kl"] > 0.1
    assert rows["mle"]["chain_sd"] < 0.25


@pytest.mark.slow
def test_score_matching_of_red_wine_beats_the_gaussian_and_reaches_the_mixture():
    table = load("uci_score_matching", "benchmarks").main(["--splits", "1"])
    for name in ("sm", "ssm_vr", "dsm"):
        assert table[name][0] < table["mixture"][0] < table["gaussian"][0]


@pytest.mark.slow
def test_ica_has_its_known_errors():
    options = ["--sources", "logistic", "--rows", "4000", "--replicates", "20", "--steps", "400"]
    table = load("ica", "benchmarks").main(["--methods", "mle", "sm", *options])
    for name, truth in (("mle", 67.8), ("sm", 82.6)):
        errors = table[name][:, 0]
        assert abs(errors.mean() - truth) < 5 * errors.std(ddof=1) / np.sqrt(20)
        assert errors.std(ddof=1) / np.sqrt(20) < truth / 3


@pytest.mark.slow
def test_ica_by_the_stein_discrepancy_runs():
    options = ["--dim", "2", "--rows", "200", "--replicates", "1", "--steps", "5"]
    assert np.isfinite(load("ica", "benchmarks").main(["--methods", "lsd", *options])["lsd"]).all()


@pytest.mark.slow
def test_density_ratio(tmp_path, capsys):
    ratios, densities = load("density_ratio").main(["--quick", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "The most telling held-out wines by nce" in printed
    assert "log_normalizer_se" in printed
    assert [row["method"] for row in ratios] == ["logistic regression", "two mixtures", "nce", "tre"]
    for row in ratios:
        assert row["errors"] < 0.08
        assert row["auc"] > 0.97
        assert row["mean_red"] > 1 > -1 > row["mean_white"]
    assert [row["method"] for row in densities[2:]] == [
        "flow by likelihood",
        "energy by nce",
        "flow by flow_nce",
        "energy by flow_nce",
    ]
    assert all(-25 < row["ll"] < -11 for row in densities)
    assert (tmp_path / "density_ratio.png").stat().st_size > 20_000


@pytest.mark.slow
def test_mutual_information(capsys):
    table = load("mutual_information", "benchmarks").main([])
    assert "found" in capsys.readouterr().out
    found = {(row["d"], row["method"]): row["found"] / row["exact"] for row in table}
    np.testing.assert_allclose([found[20, "nce"], found[20, "tre"], found[80, "tre"]], 1.0, atol=0.1)
    assert found[80, "nce"] < 0.7  # saturated


@pytest.mark.slow
def test_six_symptoms_by_exact_maximum_likelihood_and_pseudolikelihood(tmp_path, capsys):
    networks = load("symptom_network").main(["--items", "6", "--penalty", "0", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    # Both by enumeration of the 64 states in NumPy, minimised by SciPy.
    np.testing.assert_allclose(
        [networks[name].nll for name in ("exact", "pseudolikelihood")], [2.657124, 2.668128], atol=2e-6
    )
    for line in ("independent   3.90883", "exact   2.65712", "pseudolikelihood   2.66813", "avoid - distract"):
        assert line in printed
    exact, pseudo = (each.errors["couplings"] for each in networks.values())
    np.testing.assert_allclose(pseudo, exact, rtol=0.15)
    assert (tmp_path / "symptom_network.png").stat().st_size > 20_000


@pytest.mark.slow
def test_all_symptoms_with_a_prior(tmp_path, capsys):
    networks = load("symptom_network").main(["--no-errors", "--out", str(tmp_path)])
    found = [networks[name].nll for name in ("exact", "pseudolikelihood")]
    np.testing.assert_allclose(found, [7.13026, 7.20555], atol=2e-5)
    assert "independent  11.38669" in capsys.readouterr().out


@pytest.mark.slow
def test_marriages_by_exchange_and_pseudolikelihood(tmp_path, capsys):
    options = ["--models", "stars", "wealth", "--samples", "600", "--networks", "50", "--no-bar", "--out", str(tmp_path)]
    fits = load("ergm").main(options)
    printed = capsys.readouterr().out
    assert "Model 'stars': posterior by exchange" in printed
    # By logistic regression on the changes; that of independent marriages is the maximum likelihood of statnet.
    np.testing.assert_allclose(fits["stars"].pseudo, [-1.664534, 0.011773], atol=1e-6)
    np.testing.assert_allclose(fits["wealth"].pseudo, [-2.594929, 0.010546], atol=1e-6)
    for draws in (fits["wealth"].draws, fits["wealth"].exact):
        check_moments(draws, np.array([-2.6396, 0.010661]), np.array([0.54641, 0.004787]) ** 2)
    assert fits["stars"].exact is None
    density = fits["wealth"].networks.mean((1, 2)) * 16 / 15
    assert abs(density.mean() - 20 / 120) < 5 * density.std() / np.sqrt(50)
    assert (tmp_path / "ergm.png").stat().st_size > 20_000


@pytest.mark.slow
def test_bayesian_network(tmp_path, capsys):
    script = load("bayesian_network")
    fits = script.main(["--items", "4", "--samples", "500", "--out", str(tmp_path)])
    exact, exchange, pseudo = (fits[name] for name in ("exact", "exchange", "pseudolikelihood"))
    means, errors = [], []
    for each in (exact, exchange):
        ess = script.statistics(each.couplings)[0]
        assert np.all(ess > 200)
        means.append(each.couplings.mean((0, 1)))
        errors.append(each.couplings.std((0, 1)) / np.sqrt(ess))
    assert np.all(abs(means[0] - means[1]) < 5 * np.hypot(*errors))
    assert np.all(pseudo.couplings.std((0, 1)) < 0.85 * exact.couplings.std((0, 1)))
    found = [each.inclusion for each in (exact, exchange)]
    gap = found[0].probabilities["couplings"] - found[1].probabilities["couplings"]
    assert np.all(abs(gap) < 5 * np.hypot(*(each.standard_errors["couplings"] for each in found)) + 1e-3)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("avoid - closeatt", "ESS/s in all", "Diagnosis of exchange"))
    assert (tmp_path / "bayesian_network.png").stat().st_size > 20_000


@pytest.fixture(scope="module")
def protein():
    return load("protein_contacts")


@pytest.mark.slow
def test_protein_contacts(protein, tmp_path, capsys):
    table = protein.main(["--quick", "--out", str(tmp_path)])
    assert "500 sequences of 40 sites; 440 after the weights" in capsys.readouterr().out
    assert list(table) == ["distance along chain", "mutual information", "mean-field DCA", "pseudolikelihood"]
    assert all(0 <= share <= 1 for shares in table.values() for share in shares)
    assert (tmp_path / "protein_contacts.png").stat().st_size > 20_000


def test_weights_and_frequencies_of_sequences(protein):
    x = np.random.default_rng(0).integers(0, 3, (60, 5))
    same = np.mean(x[:, None] == x, axis=2)
    weights = protein.weights_of(x, 0.8)
    np.testing.assert_allclose(weights, 1 / np.sum(same > 0.79, axis=1))
    single, double = protein.statistics(x, weights)
    share = weights / weights.sum()
    np.testing.assert_allclose(single[2, 1], np.sum(share * (x[:, 2] == 1)), rtol=1e-5)
    np.testing.assert_allclose(double[2, 1, 4, 0], np.sum(share * (x[:, 2] == 1) * (x[:, 4] == 0)), rtol=1e-5)


@pytest.mark.slow
def test_chains_of_sequences_follow_the_data_after_pcd(protein, tmp_path, capsys):
    options = ["--quick", "--generate", "300", "--chain-rate", "0.1", "--out", str(tmp_path)]
    table = protein.main(options)
    assert "Connected frequencies" in capsys.readouterr().out
    pseudo, pcd, most = (table[f"{name}, generated"] for name in ("pseudolikelihood", "pcd", "the data"))
    # Over five seeds the slopes are 0.55 to 0.59 before pcd and 0.78 to 0.89 after it; correlations rise by 0.10 to 0.14.
    assert pseudo[0] + 0.08 < pcd[0] < most[0]
    assert abs(pcd[1] - 1) < 0.3 < abs(pseudo[1] - 1)


@pytest.mark.slow
def test_protein_contacts_beat_mean_field_and_mutual_information(protein, tmp_path):
    table = protein.main(["--steps", "60", "--out", str(tmp_path)])
    np.testing.assert_allclose(table["mutual information"], [0.792, 0.703, 0.646], atol=2e-3)
    np.testing.assert_allclose(table["mean-field DCA"], [0.980, 0.965, 0.906], atol=2e-3)
    assert table["pseudolikelihood"][1] > 0.97
    assert table["pseudolikelihood"][2] > 0.92


@pytest.mark.slow
def test_votes_have_their_exact_likelihoods():
    table = load("votes", "benchmarks").main([])
    nll = {name: figures["nll"] for name, figures in table.items()}
    # By enumeration in NumPy, minimised by SciPy.
    found = [nll[name] for name in ("exact", "pseudolikelihood", "ratio_matching")]
    np.testing.assert_allclose(found, [6.62345, 6.64068, 7.52234], atol=2e-4)
    assert nll["exact"] < nll["pcd"] < nll["exact"] + 0.01
    assert nll["exact"] < nll["nce nu=20"] < nll["nce nu=5"] < nll["nce nu=1"]
    assert abs(table["nce nu=20"]["log_z_error"]) < 0.4


@pytest.mark.slow
def test_generalised_bayes(tmp_path, capsys):
    script = load("generalized_bayes")
    result = script.main(["--samples", "500", "--sets", "200", "--contamination", "0.2", "--out", str(tmp_path)])
    draws, fits = result["symptoms"], result["galaxies"]
    sd = {name: each.std(0) for name, each in draws.items()}
    np.testing.assert_allclose(sd["pseudolikelihood"] / sd["exact"], 0.69, atol=0.12)
    np.testing.assert_allclose(sd["calibrated"] / sd["exact"], 1.0, atol=0.15)  # 1000 dependent draws of each
    plain, robust = (script.moved(fits[kernel, 0.2], fits[kernel, 0.0]) for kernel in ("plain", "robust"))
    np.testing.assert_allclose([plain, robust], [0.050, 0.020], atol=0.003)
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("avoid - distract", "Calibration by 'curvature'", "robust moves"))
    assert (tmp_path / "generalized_bayes.png").stat().st_size > 20_000
