"""Annotations are true: beartype checks them while the public surface runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

STOPS = (
    "estimators",
    "posteriors",
    "energies",
    "declarations",
    "kernels",
    "samplers",
    "log_partitions",
    "training",
    "evaluation",
    "tests_of_draws",
    "figures",
    "generalised_posteriors",
    "posterior_kernels",
    "edges_of_networks",
)


@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_annotations_hold(stop):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), str(here)])
    environment = {**os.environ, "PYTHONPATH": path}
    script = [sys.executable, str(here / "typed_tour.py"), stop]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr[-3000:]
