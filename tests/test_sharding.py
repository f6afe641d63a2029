"""Training on many devices is training on one, up to rounding: on eight simulated devices, and on two processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import numpyro
import optax
import pytest
from helpers import precision_model
from jax.sharding import Mesh
from numpyro.infer import SVI, Trace_ELBO

import numpyro_ebm as ebm
from numpyro_ebm._core.sharding import Placement
from numpyro_ebm.training.sharding import TrainingPlacement, sizes_of_plates

KEY = jax.random.key(0)
CLOSE = {"rtol": 1e-7, "atol": 1e-7}
SCRIPT = Path(__file__).with_name("sharded_run.py")
# Each simulated device keeps a thread while it waits for the others: with as many as cores they would wait for ever.
ENVIRONMENT = os.environ | {"NPROC": "32", "PYTHONPATH": os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    out = tmp_path_factory.mktemp("sharded") / "found"
    done = subprocess.run([sys.executable, str(SCRIPT), str(out)], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr
    return np.load(f"{out}.npz")


def same(found, first, second):
    for name in ("losses", "t", "w"):
        np.testing.assert_allclose(found[f"{first}, {name}"], found[f"{second}, {name}"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pcd", "replay", "cd", "sm", "nce", "all rows"])
def test_eight_devices_are_one(found, name):
    same(found, f"{name}, one", f"{name}, eight")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contexts pcd", "contexts replay", "latents", "held out"])
def test_rows_with_contexts_latents_and_held_out_rows(found, name):
    names = [each.removeprefix(f"{name}, eight, ") for each in found if each.startswith(f"{name}, eight, ")]
    assert len(names) > 1
    for each in names:
        np.testing.assert_allclose(found[f"{name}, eight, {each}"], found[f"{name}, one, {each}"], **CLOSE)


@pytest.mark.slow
def test_parameters_are_split_over_a_second_axis(found):
    same(found, "pcd, one", "pcd, two axes")
    assert {tuple(shape) for shape in found["lies, w"]} == {(4, 8)}


@pytest.mark.slow
def test_chains_differ_from_device_to_device(found):
    chains = found["lies, chains"]
    assert chains.shape == (8, 32, 4)
    assert len(np.unique(chains.reshape(-1, 4), axis=0)) == 256


@pytest.mark.slow
def test_chains_are_taken_and_put_back_without_sending_any(found):
    np.testing.assert_array_equal(found["slots, eight"], found["slots, one"])
    assert (np.abs(found["slots, one"]) > 5).all(1).sum() == 48
    assert found["slots, eight sent"] == 0
    assert found["slots, list sent"] > 0  # slots of any order, which devices have to send


@pytest.mark.slow
@pytest.mark.parametrize("where", ["one", "two"])
def test_a_checkpoint_of_eight_devices_goes_on(found, where):
    same(found, "pcd, one", f"goes on, {where}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sm", "dsm", "cd", "ssm"])
@pytest.mark.parametrize("where", ["one to eight", "eight to one", "eight to two"])
def test_checkpoints_of_any_estimator_and_number_of_devices(found, name, where):
    same(found, f"{name}, uninterrupted", f"{name}, {where}")


@pytest.mark.slow
def test_what_was_trained_on_eight_devices_is_used_on_four(found):
    for what in ("draws", "log Z"):
        for devices in (4, 8):
            np.testing.assert_allclose(found[f"used, {what} {devices}"], found[f"used, {what} None"], **CLOSE)
    assert np.isfinite(found["used, watched"]).all()


@pytest.mark.slow
def test_two_processes_are_one(found, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    commands = [[sys.executable, str(SCRIPT), str(tmp_path / str(i)), str(i), port] for i in range(2)]
    running = [subprocess.Popen(each, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True) for each in commands]
    for each in running:
        _, errors = each.communicate(timeout=600)
        each.stderr.close()
        assert each.returncode == 0, errors[-3000:]
    for i in range(2):
        results = np.load(tmp_path / f"{i}.npz")
        for name in ("losses", "t", "w"):
            np.testing.assert_allclose(results[name], found[f"pcd, one, {name}"], **CLOSE)
        for case, name in (("mala", "draws"), ("mala", "rates"), ("ais", "value"), ("ais", "error")):
            np.testing.assert_allclose(results[name], found[f"{case}, one, {name}"], **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mala", "nuts", "dynamic_hmc", "a model"])
def test_draws_of_eight_devices_are_those_of_one(found, name):
    for what in ("draws", "rates"):
        one, eight = (found[f"{name}, {where}, {what}"] for where in ("one", "eight"))
        np.testing.assert_allclose(eight, one, **CLOSE)
    chains = found[f"{name}, eight, draws"]
    assert len(np.unique(chains[:, -1].reshape(-1, chains.shape[-1]), axis=0)) == np.prod(chains.shape[:-1]) / 30


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ais", "smc", "importance", "bounds"])
def test_log_z_of_eight_devices_is_that_of_one(found, method):
    for what in ("value", "error"):
        one, eight = (found[f"{method}, {where}, {what}"] for where in ("one", "eight"))
        np.testing.assert_allclose(eight, one, **CLOSE)


@pytest.mark.slow
def test_parallel_chains_of_mcmc(found):
    np.testing.assert_allclose(found["parallel, draws"], found["sequential, draws"], **CLOSE)
    assert (found["parallel, devices"], found["sequential, devices"]) == (8, 1)


def test_a_part_that_is_the_whole():
    """One device takes the path of many, and finds what no device finds."""
    normal = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
    draws = [ebm.sample(KEY, normal, "mala", num_warmup=20, num_samples=20, sharding=each) for each in (None, 1)]
    np.testing.assert_allclose(draws[0].samples["x"], draws[1].samples["x"], rtol=1e-4, atol=1e-4)
    one, none = (ebm.log_partition(KEY, normal, kernel="mala", num_levels=20, sharding=each) for each in (None, 1))
    np.testing.assert_allclose(one.value, none.value, rtol=1e-4)


def test_chains_that_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(Placement, "num_parts", 8)
    normal = ebm.EnergyDistribution(lambda x: 0.5 * x**2)
    with pytest.raises(ebm.EnergyError, match=r"num_chains=4 evenly over 8 devices. Write num_chains=8"):
        ebm.sample(KEY, normal, sharding=1)
    of_rows = ebm.EnergyDistribution(lambda x, c: 0.5 * (x - c) ** 2, context=jax.numpy.zeros(6), batch_shape=(6,))
    with pytest.raises(ebm.EnergyError, match=r"num_chains=3 for each of 6 rows evenly over 8 devices. Write num_chains=4"):
        ebm.sample(KEY, of_rows, num_chains=3, sharding=1)
    with pytest.raises(ebm.EnergyError, match=r"num_chains=4 evenly"):
        ebm.sample(KEY, lambda: numpyro.sample("a", numpyro.distributions.Normal()), sharding=1)
    with pytest.raises(ebm.EnergyError, match=r"num_particles=1001 evenly over 8 devices. Write num_particles=1008"):
        ebm.log_partition(KEY, normal, method="smc", num_particles=1001, sharding=1)
    with pytest.raises(TypeError, match="sharding"):
        ebm.log_partition(KEY, normal, method="nested", sharding=1)


def test_refusals():
    svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    for sharding, words in ((0, "sharding=0 devices, and there are 1"), (9, "xla_force_host_platform_device_count=9")):
        with pytest.raises(ebm.EnergyError, match=words):
            ebm.fit(jax.random.key(0), svi, 3, np.ones(4), sharding=sharding)
    for sharding in (True, "all", 2.0):
        with pytest.raises(TypeError, match="a jax.sharding.Mesh or a number of devices"):
            TrainingPlacement.of(sharding)
    assert TrainingPlacement.of(np.int64(1)) == TrainingPlacement.of(1)
    with pytest.raises(ebm.EnergyError, match="one axis .* or two"):
        TrainingPlacement.of(Mesh(np.array(jax.devices()).reshape(1, 1, 1), ("a", "b", "c")))


def test_batches_that_cannot_be_split(monkeypatch):
    monkeypatch.setattr(Placement, "num_parts", 8)
    with pytest.raises(ebm.EnergyError, match=r"Batches of 60 rows.*over 8 devices.*batch_size=64, or pad.*mask=is_row"):
        TrainingPlacement.of(1).check_batches(60, None)
    with pytest.raises(ebm.EnergyError, match=r"Arguments of the lengths \[60, 3\].*over 8 devices. Write batches=x"):
        TrainingPlacement.of(1).check_arguments([np.ones(60), np.ones(3), np.float32(1.0)], [60])
    svi = SVI(ebm.estimate(precision_model, "pcd", num_chains=12), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    with pytest.raises(ebm.EnergyError, match="12 persistent chains cannot be split.*num_chains= or buffer_size=16"):
        ebm.fit(jax.random.key(0), svi, 3, batches=np.ones(64), batch_size=8, sharding=1, progress_bar=False)


def test_batches_of_few_rows(monkeypatch):
    monkeypatch.setattr(Placement, "num_parts", 8)
    for size, num_rows, words in ((100, 100, "batch_size=96"), (60, 63, "batch_size=56"), (5, 5, "sharding=5 or less")):
        with pytest.raises(ebm.EnergyError, match=f"Batches of {size} rows .* over 8 devices. Write {words}, or pad"):
            TrainingPlacement.of(1).check_batches(size, num_rows)
    TrainingPlacement.of(1).check_batches(96, 100)


def test_the_rows_are_those_of_the_plate(monkeypatch):
    def model(x, prior):
        with numpyro.plate("features", 5):
            numpyro.sample("z", numpyro.distributions.Normal())
        with numpyro.plate("rows", len(x), subsample_size=8):
            batch = numpyro.subsample(x, event_dim=0)
            numpyro.sample("x", ebm.EnergyDistribution(lambda v: 0.5 * v**2), obs=batch)

    assert sizes_of_plates(ebm.estimate(model, "sm"), (np.ones(99), np.ones(5)), {}) == {99}
    monkeypatch.setattr(Placement, "num_parts", 8)
    placement = TrainingPlacement.of(1)
    placement.check_arguments([np.ones(96), np.ones(5), np.ones(99)], {96, 5})
    svi = SVI(ebm.estimate(model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    for prior in (np.ones(8), np.ones(1000)):
        with pytest.raises(ebm.EnergyError, match=r"of the lengths \[99, .*\], with 99 rows, cannot be split"):
            ebm.fit(KEY, svi, 3, np.ones(99), prior, sharding=1)
    with pytest.raises(ebm.EnergyError, match=r"of the lengths \[99, 8\], with 99 rows, cannot be split"):
        placement.check_arguments([np.ones(99), np.ones(8)], set())


@pytest.mark.parametrize(("name", "first", "second"), [("sm", 1, None), ("dsm", None, 1), ("cd", 1, None)])
def test_a_checkpoint_of_a_mesh_goes_on(tmp_path, name, first, second):
    """JAX traces arrays on a mesh to other operations, also on a mesh of one device."""
    options = {"batches": np.ones(32, np.float32), "batch_size": 8, "checkpoint": tmp_path, "progress_bar": False}
    for num_steps, sharding in ((1, first), (2, second)):
        own = {"sigma": 0.3} if name == "dsm" else {}
        svi = SVI(ebm.estimate(precision_model, name, **own), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
        assert len(ebm.fit(KEY, svi, num_steps, sharding=sharding, **options).losses) == num_steps


def test_parameters_of_a_mesh_fit_any_program():
    seen = []
    svi = SVI(ebm.estimate(precision_model, "sm"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    options = {"held_out": lambda params: seen.append(params["t"]) or 1.0, "ema": 0.9, "progress_bar": False}
    result = ebm.fit(KEY, svi, 2, np.ones(8, np.float32), sharding=1, **options)
    for each in (result.params["t"], result.ema_params["t"], *seen):
        assert not each.committed
    assert result.state.optim_state[1][0]["t"].committed


def test_one_device_of_a_mesh_is_no_mesh():
    svi = SVI(ebm.estimate(precision_model, "pcd"), ebm.empty_guide, optax.adam(0.1), Trace_ELBO())
    x = np.random.default_rng(0).normal(0, 0.5, 32)
    first, second = (
        ebm.fit(jax.random.key(0), svi, 10, batches=x, batch_size=8, sharding=sharding, progress_bar=False)
        for sharding in (None, 1)
    )
    np.testing.assert_allclose(first.losses, second.losses, rtol=1e-6)
