"""`run_mcmc`: the draws of one run, in blocks that are saved, from which another process goes on."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS, DiscreteHMCGibbs, HMCGibbs

import numpyro_ebm as ebm
from numpyro_ebm._core.storage import Storage

KEY = jax.random.key(0)
ROWS = np.random.default_rng(0).normal(1.0, 1.0, 20)
EDGES = np.array([[0, 1], [1, 2]])
SPINS = np.random.default_rng(0).choice([-1, 1], (30, 3))


def normal(x):
    m = numpyro.sample("m", dist.Normal(0, 3))
    s = numpyro.sample("s", dist.HalfNormal(2))
    numpyro.deterministic("ratio", m / s)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", dist.Normal(m, s), obs=x)


def energy(x):
    numpyro.sample("v", ebm.EnergyDistribution(lambda v: 0.5 * jnp.sum((v - x[:2]) ** 2), (2,)))


def network(x):
    j = numpyro.sample("j", dist.Normal(0, 1).expand([2]).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("x", ebm.EnergyDistribution(ebm.energies.Ising(EDGES, j), (3,), support=ebm.spins), obs=x)


def exchange():
    return ebm.ExchangeKernel(network, exact_sampler="enumeration", num_newton_steps=3)


CASES = {
    "nuts": (lambda: NUTS(normal), ROWS, {}),
    "vectorized": (lambda: NUTS(normal), ROWS, {"num_chains": 3, "chain_method": "vectorized"}),
    "sequential": (lambda: NUTS(normal), ROWS, {"num_chains": 2, "chain_method": "sequential"}),
    "blackjax": (lambda: ebm.BlackJAXKernel(energy, "nuts"), ROWS, {"thinning": 2}),
    "exchange": (exchange, SPINS, {"num_chains": 2, "chain_method": "vectorized"}),
}


def mcmc_of(name, num_samples=60):
    kernel, x, options = CASES[name]
    return MCMC(kernel(), num_warmup=20, num_samples=num_samples, progress_bar=False, **options), x


def same(first, second):
    for one, other in (
        (first.get_samples(group_by_chain=True), second.get_samples(group_by_chain=True)),
        (first.get_extra_fields(group_by_chain=True), second.get_extra_fields(group_by_chain=True)),
    ):
        assert one.keys() == other.keys()
        jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("name", ["nuts", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "nuts")])
def test_the_draws_are_those_of_one_run(tmp_path, name):
    """In blocks, and with another process in the place of the first: both are the run in one piece."""
    whole, x = mcmc_of(name)
    whole.run(KEY, x)
    blocks, _ = mcmc_of(name)
    ebm.run_mcmc(KEY, blocks, x, checkpoint=tmp_path / "blocks", save_every=20)
    same(blocks, whole)
    first, _ = mcmc_of(name, 40)
    ebm.run_mcmc(KEY, first, x, checkpoint=tmp_path / "parts", save_every=40)
    again, _ = mcmc_of(name)
    ebm.run_mcmc(KEY, again, x, checkpoint=tmp_path / "parts", save_every=40)
    same(again, whole)
    assert (again.num_samples, again.progress_bar) == (60, False)
    stored, _ = mcmc_of(name)
    ebm.run_mcmc(KEY, stored, x, checkpoint=tmp_path / "parts")
    same(stored, whole)
    assert len(ebm.to_arviz(stored).posterior.draw) == len(ebm.to_arviz(whole).posterior.draw)


@pytest.mark.parametrize("name", ["blackjax", "exchange"])
def test_what_a_kernel_keeps_is_not_traced(name):
    """Under a transformation, as NumPyro's parallel chains are, what `init` computes would be of that trace alone."""
    kernel, x, _ = CASES[name]
    sampler = kernel()
    state = jax.jit(lambda key: sampler.init(key, 20, None, (x,), {}))(KEY)
    after = jax.jit(lambda state: sampler.sample(state, (x,), {}))(state)
    assert after.i == 1


@pytest.mark.slow
def test_parallel_chains(tmp_path):
    """On two devices: the warm-up and the draws apart, and the draws in blocks, are the run in one piece."""
    script = Path(__file__).with_name("parallel_run.py")
    paths = os.pathsep.join([str(script.parents[1]), str(script.parent)])
    environment = os.environ | {"NPROC": "32", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, script, tmp_path], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


IDENTITY = """
from test_saved_mcmc import KEY, mcmc_of
from numpyro_ebm.sampling.saved_mcmc import _identity
for name in ("nuts", "blackjax", "exchange"):
    mcmc, x = mcmc_of(name)
    print(_identity(mcmc, KEY, None, (x,), {}))
"""


@pytest.mark.slow
def test_another_process_finds_the_same_run():
    """The order of Python's sets differs from process to process, and with it that of operations."""
    folder = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(folder.parent), str(folder)])}
    found = [
        subprocess.run(
            [sys.executable, "-c", IDENTITY], env=os.environ | paths | {"PYTHONHASHSEED": seed}, capture_output=True
        )
        for seed in "12"
    ]
    assert found[0].stdout.count(b"computation") == 3, found[0].stderr
    assert found[0].stdout == found[1].stdout


def test_an_interruption_and_an_error_keep_whole_blocks(tmp_path, monkeypatch):
    mcmc, x = mcmc_of("nuts")
    run, calls = MCMC.run, []

    def interrupted(self, *args, **kwargs):
        calls.append(self.num_samples)
        if len(calls) == 4:  # the warm-up, and two blocks
            raise KeyboardInterrupt
        return run(self, *args, **kwargs)

    monkeypatch.setattr(MCMC, "run", interrupted)
    with pytest.warns(UserWarning, match="holds the first 40 draws"):
        ebm.run_mcmc(KEY, mcmc, x, checkpoint=tmp_path, save_every=20)
    assert mcmc.get_samples()["m"].shape == (40,)
    monkeypatch.undo()

    def full(self, step, *args):
        raise ebm.CheckpointError("no space left")

    save = Storage.save
    monkeypatch.setattr(Storage, "save", full)
    again, _ = mcmc_of("nuts")
    with pytest.raises(ebm.CheckpointError, match="no space left"):
        ebm.run_mcmc(KEY, again, x, checkpoint=tmp_path, save_every=20)
    assert again.get_samples()["m"].shape == (60,)
    monkeypatch.setattr(Storage, "save", save)
    whole, _ = mcmc_of("nuts")
    whole.run(KEY, x)
    same(again, whole)


def test_another_run_is_refused(tmp_path):
    mcmc, x = mcmc_of("nuts", 20)
    ebm.run_mcmc(KEY, mcmc, x, checkpoint=tmp_path, save_every=20)
    other = MCMC(ebm.BlackJAXKernel(normal, "hmc"), num_warmup=20, num_samples=40, progress_bar=False)
    with pytest.raises(ebm.EnergyError, match=r"kernel: NUTS\(.* in the checkpoint, BlackJAXKernel\(kernel=HMC\("):
        ebm.run_mcmc(KEY, other, x, checkpoint=tmp_path)
    for changed, words in (((KEY, x + 1), "data"), ((jax.random.key(1), x), "random key")):
        with pytest.raises(ebm.EnergyError, match=f"another run. {words}: "):
            ebm.run_mcmc(changed[0], mcmc_of("nuts")[0], changed[1], checkpoint=tmp_path)
    slower = MCMC(NUTS(normal, target_accept_prob=0.95), num_warmup=20, num_samples=40, progress_bar=False)
    with pytest.raises(ebm.EnergyError, match=r"kernel: NUTS\(.*target_accept_prob=0.8.*target_accept_prob=0.95"):
        ebm.run_mcmc(KEY, slower, x, checkpoint=tmp_path)
    wider = MCMC(NUTS(energy), num_warmup=20, num_samples=40, progress_bar=False)
    with pytest.raises(ebm.EnergyError, match=r"sites: \['m sample \[\]', 's sample \[\]'.*\['v sample \[2\]'\] here"):
        ebm.run_mcmc(KEY, wider, x, checkpoint=tmp_path)


def test_refusals(tmp_path):
    mcmc, x = mcmc_of("blackjax")
    with pytest.raises(ebm.EnergyError, match="save_every=5 has to be a multiple of thinning=2"):
        ebm.run_mcmc(KEY, mcmc, x, checkpoint=tmp_path, save_every=5)
    with pytest.raises(ebm.EnergyError, match="save_every >= 1"):
        ebm.run_mcmc(KEY, mcmc, x, checkpoint=tmp_path, save_every=0)
    with pytest.raises(TypeError, match="needs a numpyro.infer.MCMC; got NUTS"):
        ebm.run_mcmc(KEY, NUTS(normal), x, checkpoint=tmp_path)


def test_other_parameters_are_refused(tmp_path):
    """Draws of an energy as it was trained before are no draws of it as it is now, though all sites are the same."""

    def trained(x=None):
        t = numpyro.param("t", 1.0)
        numpyro.sample("v", ebm.EnergyDistribution(lambda v: 0.5 * t * v**2))

    def run(t, kernel="nuts"):
        sampler = ebm.BlackJAXKernel(trained, kernel, params={"t": jnp.asarray(t)})
        mcmc = MCMC(sampler, num_warmup=20, num_samples=20, progress_bar=False)
        ebm.run_mcmc(KEY, mcmc, checkpoint=tmp_path)
        return mcmc.get_samples()["v"]

    first = run(1.0)
    np.testing.assert_array_equal(run(1.0), first)
    with pytest.raises(ebm.EnergyError, match="another run. densities: "):
        run(2.0)
    with pytest.raises(ebm.EnergyError, match="another run. kernel: "):
        run(1.0, ebm.NUTS(step_size=0.5))


def wide(inverse_mass_matrix):
    def model():
        numpyro.sample("z", dist.Normal(0, 1).expand([1500]))

    return NUTS(model, inverse_mass_matrix=inverse_mass_matrix, adapt_mass_matrix=False, max_tree_depth=2)


def weighted(scale, formula=1.0, high=5.0):
    def model():
        with numpyro.handlers.scale(scale=scale):
            z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.interval(0.0, high), (), ()))
        numpyro.factor("weight", -z)
        numpyro.deterministic("d", formula * z)

    return NUTS(model)


def mixed(target_accept_prob=0.8):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(z, 1))

    return DiscreteHMCGibbs(NUTS(model, target_accept_prob=target_accept_prob))


def drawn_by(shift):
    def draw_m(rng_key, gibbs_sites, hmc_sites):
        return {"m": shift + hmc_sites["s"] * jax.random.normal(rng_key)}

    def model():
        m = numpyro.sample("m", dist.Normal(0, 1))
        numpyro.sample("s", dist.LogNormal(m, 1))

    return HMCGibbs(NUTS(model), draw_m, ["m"])


ONES = jnp.ones(1500)
COMPUTATION = r"run. computation \(potential energy, kernel, postprocess_fn\): "
OTHERS = {
    "potential_fn": (lambda s: NUTS(potential_fn=lambda z: 0.5 * (z - s) ** 2), 0.0, 100.0, COMPUTATION),
    "init_params": (lambda s: NUTS(potential_fn=lambda z: 0.5 * z**2), 0.0, 3.0, r"run. init_params: \['float32\[\]'\]"),
    "scale": (weighted, 1.0, 1e4, "run. densities: "),
    "support": (lambda high: weighted(1.0, 1.0, high), 5.0, 6.0, "run. densities: "),
    "deterministic": (lambda formula: weighted(1.0, formula), 1.0, 1e4, "run. deterministic sites: "),
    "inverse_mass_matrix": (wide, ONES, ONES.at[700].set(9.0), r"run. kernel: .*\.\.\..*with checksum"),
    "inner_kernel": (mixed, 0.8, 0.99, r"run. kernel: .*inner_kernel=NUTS\(.*target_accept_prob=0.99"),
    "gibbs_fn": (drawn_by, 0.0, 1.0, COMPUTATION),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_chains_compute_is_compared(tmp_path, name):
    """The names of its parts are the same; the message names what differs."""
    kernel_of, one, other, words = OTHERS[name]

    def run(setting, num_samples):
        mcmc = MCMC(kernel_of(setting), num_warmup=2, num_samples=num_samples, progress_bar=False)
        start = setting if name == "init_params" else 0.0
        options = {"init_params": jnp.asarray(start)} if mcmc.sampler.model is None else {}
        ebm.run_mcmc(KEY, mcmc, checkpoint=tmp_path, **options)
        return jax.tree.leaves(mcmc.get_samples())[0]

    first = run(one, 3)
    np.testing.assert_array_equal(run(one, 3), first)
    with pytest.raises(ebm.EnergyError, match=words):
        run(other, 4)


def test_another_postprocess_fn_is_refused(tmp_path):
    def run(factor):
        kernel = NUTS(potential_fn=lambda z: 0.5 * z**2)
        mcmc = MCMC(kernel, num_warmup=2, num_samples=3, postprocess_fn=lambda z: factor * z, progress_bar=False)
        ebm.run_mcmc(KEY, mcmc, checkpoint=tmp_path, init_params=jnp.zeros(()))

    run(1.0)
    with pytest.raises(ebm.EnergyError, match=COMPUTATION):
        run(2.0)


@pytest.mark.slow
def test_other_settings_of_exchange_are_refused(tmp_path):
    def run(num_steps):
        kernel = ebm.ExchangeKernel(network, num_steps=num_steps, num_newton_steps=3)
        mcmc = MCMC(kernel, num_warmup=5, num_samples=10, progress_bar=False)
        ebm.run_mcmc(KEY, mcmc, SPINS, checkpoint=tmp_path)
        return mcmc.get_samples()["j"]

    np.testing.assert_array_equal(run(3), run(3))
    with pytest.raises(ebm.EnergyError, match="kernel: ExchangeKernel.*num_steps=3.*num_steps=4"):
        run(4)
