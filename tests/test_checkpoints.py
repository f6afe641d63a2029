"""Checkpoints: a run that is killed goes on bit for bit, and what does not fit is refused with the difference."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import killed_run
import numpy as np
import numpyro
import optax
import pytest
from helpers import precision_model
from killed_run import X, kept, run
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.digests import checksum
from numpyro_ebm._core.storage import PREFIX, Storage

KEY = jax.random.key(0)
SCRIPT = Path(killed_run.__file__)


def same(first, second):
    first, second = ([each[name] for name in each.files] if hasattr(each, "files") else each for each in (first, second))
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype


def steps_in(folder):
    steps = [each.name.removeprefix(f"{PREFIX}_") for each in Path(folder).iterdir()]
    return sorted(int(step) for step in steps if step.isdigit())


class TestGoingOn:
    def test_twice_fifty_updates_are_a_hundred(self, tmp_path):
        whole = run(None, 100)
        half = run(tmp_path / "run", 50)
        assert (len(half.losses), half.num_batches) == (50, 50)
        seen = []
        both = run(tmp_path / "run", 100, callback=seen.append)
        assert [each["step"] for each in seen] == [75, 100]
        same(kept(both), kept(whole))
        moments = both.state.optim_state[1][1]
        assert any(np.abs(leaf).max() > 0 for leaf in killed_run.bits(moments) if leaf.dtype.kind == "f")
        seen.clear()
        same(kept(run(tmp_path / "run", 100, callback=seen.append)), kept(whole))
        assert not seen
        assert steps_in(tmp_path / "run") == [75, 100]

    @pytest.mark.slow
    def test_a_run_that_stops_between_checks(self, tmp_path):
        assert len(run(tmp_path / "run", 40).losses) == 40
        rest = run(tmp_path / "run", 100)
        np.testing.assert_array_equal(rest.losses, run(None, 100).losses)
        np.testing.assert_array_equal(rest.history["step"], [25, 40, 50, 75, 100])

    @pytest.mark.slow
    def test_an_interval_of_one_s_own(self, tmp_path):
        run(tmp_path / "run", 125, checkpoint_every=50)
        assert steps_in(tmp_path / "run") == [100, 125]

    def test_held_out_rows_and_patience(self, tmp_path):
        def fit(folder, num_steps, **options):
            svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.sgd(2e-3), Trace_ELBO())
            options = {"checkpoint": folder, "check_every": 10, "progress_bar": False} | options
            return ebm.fit(KEY, svi, num_steps, X[:, 0], held_out=(0.8 * X[:50, 0],), **options)

        whole = fit(None, 200, patience=3)
        assert whole.stopped == "patience"
        fit(tmp_path, 20, patience=3)
        same(kept(fit(tmp_path, 200, patience=3)), kept(whole))
        again = fit(tmp_path, 200, patience=3)
        assert (again.stopped, len(again.losses)) == ("patience", len(whole.losses))
        longer = fit(tmp_path, 200, patience=6)
        same(kept(longer), kept(fit(None, 200, patience=6)))

    @pytest.mark.slow
    def test_batches_of_an_iterator(self, tmp_path):
        batches = [X[i : i + 64] for i in range(0, 256, 64)]
        options = {"batches": batches, "batch_size": None, "data_size": 256}
        run(tmp_path / "run", 50, **options)
        same(kept(run(tmp_path / "run", 100, **options)), kept(run(None, 100, **options)))
        with pytest.raises(ebm.EnergyError, match="goes on after 100 batches, and the iterator has fewer"):
            run(tmp_path / "run", 150, **options | {"batches": iter(batches)})

    @pytest.mark.slow
    def test_an_interrupted_run(self, tmp_path):
        def interrupt(figures):
            if figures["step"] == 75:
                raise KeyboardInterrupt

        stopped = run(tmp_path / "run", 150, callback=interrupt)
        assert (stopped.stopped, len(stopped.losses)) == ("interrupted", 75)
        same(kept(run(tmp_path / "run", 150)), kept(run(None, 150)))

    @pytest.mark.slow
    def test_a_run_that_went_back(self, tmp_path):
        def fit(folder, num_steps):
            svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.sgd(0.05), Trace_ELBO())
            options = {"check_every": 30, "on_unhealthy": "rollback", "progress_bar": False}
            return ebm.fit(KEY, svi, num_steps, X[:, 0], checkpoint=folder, **options)

        whole = fit(None, 300)
        assert whole.rollbacks
        for num_steps in range(30, 301, 30):
            last = fit(tmp_path, num_steps)
        same(kept(last), kept(whole))


def killed(folder, out, delay, environment):
    """Start the script, kill it some time after its first check, and return the last step that it told."""
    command = [sys.executable, str(SCRIPT), str(folder), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    told = process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    rest, errors = process.communicate()
    assert told, errors[-2000:]
    return int((told + rest).split()[-1])


@pytest.mark.parametrize("num_kills", [pytest.param(20, marks=pytest.mark.slow)])
def test_a_killed_run_equals_an_uninterrupted_one(tmp_path, num_kills):
    """Kills at random moments of updates and of writes: none loses more than the interval, and the end is the same."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | cache | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])}
    folder, draws = tmp_path / "run", np.random.default_rng(0)
    steps = [0]
    for _ in range(num_kills):
        told = killed(folder, tmp_path / "none.npz", draws.uniform(0, 0.7), environment)
        steps.append(max(steps_in(folder), default=0))
        assert steps[-1] >= told - 25  # the step that was told last may not have been written
        assert steps[-1] >= steps[-2]
    assert 0 < steps[-1] < 2000
    for where, name in ((folder, "killed"), ("", "whole")):
        command = [sys.executable, str(SCRIPT), str(where), str(tmp_path / f"{name}.npz")]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    same(np.load(tmp_path / "killed.npz"), np.load(tmp_path / "whole.npz"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, 25)
    return folder


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"ema": 0.9}, "ema: 0.99 in the checkpoint, 0.9 here"),
            pytest.param({"batch_size": 32}, "batch_size: 64 in the checkpoint, 32 here", marks=pytest.mark.slow),
            pytest.param({"check_every": 20}, "check_every: 25", marks=pytest.mark.slow),
            ({"batches": X[:200]}, r"data: \['float32\[300, 2\]'\].*\['float32\[200, 2\]'\]"),
            pytest.param({"batches": X + 1e-3}, "data: .*checksum", marks=pytest.mark.slow),
        ],
    )
    def test_other_options(self, folder, options, words):
        with pytest.raises(ebm.EnergyError, match=f"is of another run.*{words}.*choose another folder"):
            run(folder, 50, **options)

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("estimator", "optimizer", "energy", "words"),
        [
            ("sm", optax.adam(0.01), lambda v, t: 0.5 * t * v**2, r"estimator: PersistentContrastive.*ScoreMatch"),
            ("pcd", optax.adam(0.02), lambda v, t: 0.5 * t * v**2, "update .model, guide, energy, loss and optimiser"),
            ("pcd", optax.sgd(0.01), lambda v, t: 0.5 * t * v**2, "update .model, guide, energy, loss and optimiser"),
            ("pcd", optax.adam(0.01), lambda v, t: 0.5 * t * v**4, "update .model, guide, energy, loss and optimiser"),
        ],
    )
    def test_another_estimator_optimiser_or_energy(self, tmp_path, estimator, optimizer, energy, words):
        def fit(estimator, optimizer, energy, num_steps):
            def model(x):
                t = numpyro.param("t", 1.0)
                with numpyro.plate("rows", len(x)):
                    numpyro.sample("x", ebm.EnergyDistribution(lambda v: energy(v, t)), obs=x)

            svi = SVI(ebm.estimate(model, estimator), ebm.empty_guide, optimizer, Trace_ELBO())
            return ebm.fit(KEY, svi, num_steps, X[:, 0], checkpoint=tmp_path, check_every=5, progress_bar=False)

        fit("pcd", optax.adam(0.01), lambda v, t: 0.5 * t * v**2, 5)
        with pytest.raises(ebm.EnergyError, match=words):
            fit(estimator, optimizer, energy, 10)
        assert len(fit("pcd", optax.adam(0.01), lambda v, t: 0.5 * t * v**2, 10).losses) == 10

    @pytest.mark.slow
    def test_another_key(self, folder, monkeypatch):
        monkeypatch.setattr(jax.random, "key", lambda seed: jax.random.PRNGKey(seed + 1))
        with pytest.raises(ebm.EnergyError, match="random key: "):
            run(folder, 50)

    def test_another_version(self, folder, monkeypatch):
        monkeypatch.setattr("numpyro_ebm.training.checkpoints.version", lambda name: "9.9.9")
        with pytest.raises(ebm.EnergyError, match=r"version of numpyro-ebm: \d+\.\d+\.\d+ in the checkpoint, 9.9.9 here"):
            run(folder, 50)

    def test_arrays_of_other_shapes_are_named(self, tmp_path):
        with Storage(tmp_path, {}) as storage:
            storage.save(1, {"a": np.zeros(3), "b": np.zeros(2)}, {})
            with pytest.raises(ebm.EnergyError, match=r"\['b'\] is float64\[2\] there and float64\[5\] here \(1 such"):
                storage.arrays({"a": np.zeros(3), "b": np.zeros(5)})

    def test_settings(self, tmp_path):
        with pytest.raises(ebm.EnergyError, match="checkpoint_every >= 1"):
            run(tmp_path, 5, checkpoint_every=0)
        with pytest.raises(ebm.EnergyError, match="belongs to checkpoint="):
            run(None, 5, checkpoint_every=5)


BEGIN = {"init_params": {"t": np.float32(2.0)}, "held_out": (X[:50, 0],)}


def short(folder, num_steps, **options):
    svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.sgd(2e-3), Trace_ELBO())
    return ebm.fit(KEY, svi, num_steps, X[:, 0], checkpoint=folder, progress_bar=False, **options)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    short(folder, 2, **BEGIN)
    return folder


class TestOtherRuns:
    """Options that would have no effect once a run goes on."""

    def test_the_same_goes_on(self, begun):
        assert len(short(begun, 3, **BEGIN).losses) == 3

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"held_out": (2 * X[:50, 0],)}, r"held_out: \('float32\[50\]',\), checksum \w+ in the.*float32\[50\].* here"),
            ({"held_out": None}, r"held_out: \('float32\[50\]',\), checksum \w+ in the checkpoint, none here"),
            ({"held_out": lambda params: 1.0}, "held_out: .* in the checkpoint, a function here"),
            ({"init_params": {"t": np.float32(3.0)}}, r"init_params: checksum \w+ in the checkpoint, checksum \w+ here"),
            ({"init_params": None}, r"init_params: checksum \w+ in the checkpoint, none here"),
        ],
    )
    def test_other_beginnings_and_held_out_rows(self, begun, options, words):
        with pytest.raises(ebm.EnergyError, match=f"is of another run. {words}. Run it as it was"):
            short(begun, 3, **BEGIN | options)

    def test_another_state(self, begun):
        state = short(None, 1)
        for each in (state, state.state):
            with pytest.raises(ebm.EnergyError, match=r"init_params: .*, none here; init_state: none .*, checksum \w+ here"):
                short(begun, 3, **BEGIN | {"init_params": None, "init_state": each})

    def test_the_middle_of_large_data_is_looked_at(self, monkeypatch):
        monkeypatch.setattr("numpyro_ebm._core.digests.MOST_READ", 1000)
        rows = np.zeros((50_000, 2), np.float32)
        other = rows.copy()
        other[24_900:25_100] = 1.0
        assert checksum([rows]) == checksum([rows.copy()])
        assert checksum([rows]) != checksum([other])


class TestFolders:
    def test_other_folders_stay(self, tmp_path):
        for name in ("7", "2024", "ebm"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.txt").write_text("mine")
        with Storage(tmp_path, {}) as storage:
            assert storage.step is None
            for step in (10, 20, 30):
                storage.save(step, {"a": np.zeros(3)}, {})
            assert (storage.step, storage.steps, steps_in(tmp_path)) == (30, [20, 30], [7, 20, 30, 2024])
        assert all((tmp_path / name / "thesis.txt").read_text() == "mine" for name in ("7", "2024", "ebm"))

    def test_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        with Storage("~/run", {}) as storage:
            assert storage.folder == tmp_path / "run"


class TestFailures:
    @pytest.mark.slow
    def test_a_full_disk_keeps_what_is_trained(self, tmp_path, monkeypatch):
        import orbax.checkpoint as ocp

        write, calls = ocp.CheckpointManager.save, []

        def full(self, step, *args, **kwargs):
            calls.append(step)
            if step > 50:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, step, *args, **kwargs)

        monkeypatch.setattr(ocp.CheckpointManager, "save", full)
        with pytest.raises(ebm.CheckpointError, match=r"step 75 could not be written.*No space left.*\[25, 50\]") as caught:
            run(tmp_path / "run", 150)
        result = caught.value.result
        assert len(result.losses) == 75
        same(kept(result), kept(run(None, 75)))
        monkeypatch.undo()
        same(kept(run(tmp_path / "run", 150)), kept(run(None, 150)))

    @pytest.mark.slow
    @pytest.mark.skipif(sys.platform == "win32", reason="there are no limits of files")
    def test_a_limit_of_the_system(self, tmp_path):
        """Files that may not grow beyond some bytes, as on a disk that is full."""
        script = (
            "import resource, signal, sys, killed_run, numpyro_ebm as ebm\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "def limit(figures):\n"
            "    if figures['step'] == 50:\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
            "try:\n"
            "    killed_run.run(sys.argv[1], 150, callback=limit)\n"
            "except ebm.CheckpointError as error:\n"
            "    print(len(error.result.losses), str(error)[:300])\n"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])}
        command = [sys.executable, "-c", script, str(tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "50 The checkpoint of step 50 could not be written" in done.stdout, done.stderr[-2000:]
        assert steps_in(tmp_path / "run") == [25]
        assert len(run(tmp_path / "run", 50).losses) == 50

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ebm.CheckpointError, match="for checkpoints cannot be made or read"):
            run(tmp_path / "file" / "run", 25)

    @pytest.mark.slow
    def test_a_checkpoint_that_cannot_be_read(self, tmp_path):
        run(tmp_path / "run", 50)
        for each in (tmp_path / "run" / f"{PREFIX}_50" / "arrays").rglob("*"):
            if each.is_file():
                each.write_bytes(b"")
        with pytest.raises(
            ebm.CheckpointError, match=r"step 50.*cannot be read.*Remove the folder ebm_step_50 .*\[25, 50\]"
        ):
            run(tmp_path / "run", 100)
        shutil.rmtree(tmp_path / "run" / f"{PREFIX}_50")
        same(kept(run(tmp_path / "run", 100)), kept(run(None, 100)))
