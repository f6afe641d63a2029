"""The house: floors, names, docstrings, and the README's code."""

import ast
import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import numpyro_ebm as ebm
from numpyro_ebm.estimators import ESTIMATORS
from numpyro_ebm.estimators._chains import ChainEstimator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "numpyro_ebm"
FLOORS = {
    "_typing": 0,
    "_errors": 0,
    "_doors": 0,
    "_modes": 0,
    "_registry": 0,
    "_autodiff": 0,
    "_callables": 0,
    "_programs": 0,
    "_spreads": 0,
    "_known": 0,
    "_supports": 0,
    "_blocks": 0,
    "_bases": 0,
    "_shapes": 0,
    "_laplacian": 0,
    "_overfitting": 0,
    "_held_out": 1,
    "_flow": 0,
    "_surrogates": 1,
    "_context": 0,
    "_unnormalized": 1,
    "_normalized": 0,
    "_levels": 0,
    "_derivatives": 0,
    "optimizers": 0,
    "noise": 0,
    "empirical": 0,
    "kernels": 1,
    "chains": 2,
    "_starts": 2,
    "coupling": 2,
    "samplers": 3,
    "_row_distribution": 3,
    "_events": 3,
    "distributions": 3,
    "scores": 3,
    "factors": 3,
    "_models": 5,
    "estimators": 4,
    "_rows": 5,
    "joint": 5,
    "handlers": 5,
    "mcmc": 5,
    "sampling": 5,
    "_recording": 6,
    "arviz": 6,
    "diagnostics": 7,
    "_results": 6,
    "_data_sites": 6,
    "likelihood": 6,
    "evaluation": 6,
    "standard_errors": 6,
    "reports": 6,
    "training": 6,
    "_sites": 6,
    "partition": 6,
    "plots": 7,
    "__init__": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def part_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    own = FLOORS[part_of(path)]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_ebm"):
            inner = node.module.split(".")[1:] or [alias.name for alias in node.names]
            for name in inner[:1] if node.module != "numpyro_ebm" else inner:
                assert FLOORS[name] <= own, f"{path.name} imports {name} from a floor above"


def test_no_import_cycles_within_a_floor():
    graph = {}
    for path in FILES:
        if path.name == "__init__.py":
            continue
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numpyro_ebm"):
                names.add(node.module.removeprefix("numpyro_ebm").strip(".") or "")
        graph[".".join(path.relative_to(PACKAGE).with_suffix("").parts)] = names

    def reaches(start, goal, seen):
        return any(n == goal or (n not in seen and reaches(n, goal, seen | {n})) for n in graph.get(start, ()))

    assert not [name for name in graph if reaches(name, name, set())]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small_and_raise_no_asserts(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    assert not [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Assert)]


def test_version_comes_from_the_metadata():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ebm.__version__)


def test_all_names_what_is_public_and_the_docstring_shows_it_first():
    public = [name for name in vars(ebm) if not name.startswith("_") and not inspect.ismodule(getattr(ebm, name))]
    assert sorted(ebm.__all__) == sorted(public)
    assert set(ebm.__all__) <= set(re.findall(r"\w+", ebm.__doc__))


NOT_IMPORTED = ["arviz", "diffrax", "equinox", "flax", "flowjax", "folx", "matplotlib", "pandas", "scipy.stats", "sklearn"]
NOT_IMPORTED += ["xarray"]


def test_the_import_brings_no_more_than_it_needs():
    script = f"import sys, numpyro_ebm; print([name for name in {NOT_IMPORTED} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr[-2000:]


def test_the_registries_hold_what_their_docstrings_say():
    for name in ("available_estimators", "available_kernels", "available_partition_methods"):
        function = getattr(ebm, name)
        assert list(function()) == sorted(function())
        assert str(function()) in " ".join(function.__doc__.split())


def test_the_readme_names_every_estimator_its_class_and_its_options():
    shared = {field.name for field in dataclasses.fields(ChainEstimator)} - {"num_steps"}
    seen = set()
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \| (.*?) \| (objective|gradient) \|", README, re.MULTILINE)
    for names, text, role in rows:
        classes, _, options = text.partition(": ")
        names, classes = re.findall("`([a-z_]+)`", names), re.findall("`([A-Za-z]+)`", classes)
        for name, cls in zip(names, (ESTIMATORS.classes[name] for name in names), strict=True):
            assert cls.__name__ in classes
            assert cls.role == role
            left_out = shared if issubclass(cls, ChainEstimator) else set()
            own = [field.name for field in dataclasses.fields(cls) if field.name not in left_out]
            assert options.strip("`") == ", ".join(own), name
            seen.add(name)
    assert seen == set(ebm.available_estimators())
    for name in shared:
        assert f"`{name}`" in README


@pytest.mark.slow
def test_readme_code_runs(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks, "the README has an example"
    assert max(block.count("\n") for block in blocks) <= 25
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run(
        [sys.executable, "-W", "ignore::FutureWarning", str(script)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("*.nc"))
