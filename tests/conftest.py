"""Shared fixtures: fixed keys, x64 where a test needs it; compiled programs are forgotten before they fill the memory."""

import ctypes
import gc
import os
import resource
import sys
from importlib.metadata import version
from pathlib import Path

# Most of the suite's time is XLA's: compile quickly rather than well.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if version("jaxlib").startswith(("0.9.", "0.10.")):  # halves the time there; later ones do not know it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")


MOST_MEMORY = 1000 * 2**20
"""Bytes that a worker may hold before it forgets its programs: eight of them are to fit in 16 GB."""


LONG_TESTS = frozenset(Path(__file__).with_name("long_tests.txt").read_text().splitlines())
"""Tests that are slow by measurement: see list_long_tests.py."""


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if f"{item.path.name}::{item.nodeid.partition('::')[2]}" in LONG_TESTS:
            item.add_marker(pytest.mark.slow)


def memory():
    """Bytes that this process holds; where the system does not say, the most that it has held."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_programs():
    jax.clear_caches()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc keeps what is freed, and the system would not see that it is
        trim(0)


@pytest.fixture(scope="module", autouse=True)
def programs_of_a_file():
    yield
    forget_programs()


@pytest.fixture(autouse=True)
def programs_within_bounds():
    yield
    if memory() > MOST_MEMORY:
        forget_programs()


@pytest.fixture
def rng_key():
    return jax.random.key(20260101)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def gaussian_data():
    """XG of the cases: mean x^2 = 0.2502951, maximum likelihood precision 3.99528."""
    return np.random.default_rng(0).normal(0, 0.5, 2000)
