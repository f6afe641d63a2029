"""Posteriors of real data that are known exactly: a network of symptoms, and one lattice."""

import functools
import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import numpyro_ebm as ebm
from numpyro_ebm.energies import Graph

DATA = Path(__file__).parents[1] / "examples" / "data" / "adhd_cap.csv"
EDGES = {
    ("avoid", "closeatt"): (1.1338, 0.4033),
    ("avoid", "distract"): (1.8637, 0.4333),
    ("avoid", "listen"): (1.0004, 0.3968),
    ("closeatt", "distract"): (0.4088, 0.4661),
    ("closeatt", "forget"): (0.3358, 0.3437),
    ("distract", "forget"): (0.8071, 0.3993),
    ("forget", "listen"): (0.9463, 0.3663),
    ("instruct", "listen"): (1.1791, 0.3989),
}


def symptoms(x):
    """A Boltzmann machine of six symptoms, with the priors of the reference."""
    s = numpyro.sample("s", dist.Cauchy(0, 2.5).expand([15]).to_event(1))
    share = numpyro.sample("share", dist.Beta(0.5, 0.5).expand([6]).to_event(1))  # the odds are beta-prime
    with numpyro.plate("rows", len(x)):
        machine = ebm.energies.BoltzmannMachine.from_pairs(s, jnp.log(share) - jnp.log1p(-share))
        numpyro.sample("x", ebm.EnergyDistribution(machine), obs=x)


def six_symptoms():
    """Return the rows of six symptoms, and the indices of `EDGES` among the pairs."""
    names = DATA.read_text().splitlines()[0].split(",")[1:7]
    pairs = list(itertools.combinations(names, 2))
    x = np.genfromtxt(DATA, delimiter=",", skip_header=1, dtype=int)[:, 1:7]
    return x, [pairs.index(edge) for edge in EDGES]


LATTICE = """
+++-+--+++
-+-+++++++
----+--+++
+---+----+
-+++++++-+
+---+-+---
++-+--++--
++++-++++-
++++-+-++-
+++-+++-++
"""


def ising(s):
    coupling, field = numpyro.sample("coupling", dist.Uniform(-0.2, 1)), numpyro.sample("field", dist.Uniform(-0.6, 0.6))
    with numpyro.plate("rows", len(s)):
        numpyro.sample("s", ebm.EnergyDistribution(ebm.energies.Ising(Graph.lattice(10, 10), coupling, field)), obs=s)


def log_z(coupling, field):
    """Of a 10 x 10 lattice with free boundary, by the transfer matrix, one spin after another."""
    states = (np.arange(2**10)[:, None] >> np.arange(10)) % 2 * 2 - 1
    own = np.exp(coupling * (states[:, 1:] * states[:, :-1]).sum(1) + field * states.sum(1))
    between, sums = np.exp(coupling * np.array([[1, -1], [-1, 1]])), own
    for _ in range(9):
        sums = functools.reduce(lambda w, _: np.tensordot(w, between, axes=(0, 0)), range(10), sums.reshape((2,) * 10))
        sums = sums.ravel() * own
    return np.log(sums.sum())


def spins():
    """Return the lattice."""
    return np.array([[1 if sign == "+" else -1 for sign in line] for line in LATTICE.split()])


@functools.cache
def posterior_of_ising():
    """Return a grid of couplings and one of fields, and the log density at their pairs."""
    s = spins()
    sums = (s[1:] * s[:-1]).sum() + (s[:, 1:] * s[:, :-1]).sum(), s.sum()
    assert sums == (24, 22)
    couplings, fields = np.linspace(-0.2, 1, 62)[1:-1], np.linspace(-0.6, 0.6, 62)[1:-1]
    log_p = np.array([[sums[0] * j + sums[1] * h - log_z(j, h) for h in fields] for j in couplings])
    return couplings, fields, log_p


def moments_of_ising():
    """Return means and standard deviations of coupling and field."""
    couplings, fields, log_p = posterior_of_ising()
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    grids = {"coupling": (couplings, p.sum(1)), "field": (fields, p.sum(0))}
    mean = {name: of @ grid for name, (grid, of) in grids.items()}
    return mean, {name: np.sqrt(of @ grid**2 - mean[name] ** 2) for name, (grid, of) in grids.items()}
