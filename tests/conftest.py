"""Shared fixtures: fixed keys, x64 where a test needs it."""

import os
from importlib.metadata import version

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
