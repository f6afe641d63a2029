"""The house: floors, names, docstrings, and the README's code."""

import ast
import dataclasses
import functools
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import numpyro_ebm as ebm
from numpyro_ebm.estimators.names import ESTIMATORS
from numpyro_ebm.estimators.parts.negative_phase import ChainEstimator

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = ROOT / "numpyro_ebm"
FLOORS = {
    "_core": 1,
    "kernels": 2,
    "distributions": 3,
    "energies": 3,
    "sampling": 4,
    "estimators": 5,
    "handlers": 6,
    "training": 7,
    "partition": 7,
    "evaluation": 9,
    "bayes": 8,
    "diagnostics": 9,
    "plots": 10,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path):
    """The dotted name below the package; a package's own for its `__init__`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def imports(module):
    """Pairs of module and name that a module imports from the package; the name is empty where it is a module itself."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpyro_ebm":
            source = node.module.removeprefix("numpyro_ebm").strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                found.add((inner, "") if inner in MODULES else (source, alias.name))
        elif isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] == "numpyro_ebm" for alias in node.names), module
    return found


def home(module, name):
    """The module that defines a name, behind the packages that pass it on."""
    for source, passed_on in imports(module) if MODULES[module].name == "__init__.py" else ():
        if passed_on == name:
            return home(source, name)
    return module


def folder(module):
    return module.split(".")[0]


INSIDE = [module for module in MODULES if module]


def test_the_package_holds_folders_only():
    assert {path.name for path in PACKAGE.iterdir()} - {"__pycache__"} <= {"__init__.py", "py.typed", *FLOORS}


@pytest.mark.parametrize("module", INSIDE)
def test_imports_go_down(module):
    for source, _ in imports(module):
        assert source, f"{module} imports from the root"
        if folder(source) != folder(module):
            assert FLOORS[folder(source)] < FLOORS[folder(module)], f"{module} imports {source}, which is not below"


@pytest.mark.parametrize("module", INSIDE)
def test_a_leading_underscore_means_inside_its_own_folder(module):
    for source, name in imports(module):
        if folder(source) != folder(module):
            private = [part for part in [*source.split(".")[1:], name] if part.startswith("_")]
            assert not private, f"{module} imports {source}.{name}"


def test_no_import_cycles():
    graph = {module: {home(source, name) if name else source for source, name in imports(module)} for module in INSIDE}
    packages = {module for module in INSIDE if MODULES[module].name == "__init__.py"}

    def reaches(start, goal, seen):
        nexts = graph[start] - packages - seen
        return goal in nexts or any(reaches(each, goal, seen | nexts) for each in nexts)

    assert not [module for module in graph if module not in packages and reaches(module, module, set())]


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=module_of)
def test_init_holds_names_only(path):
    for node in ast.parse(path.read_text()).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_constant = isinstance(node, ast.Assign) and node.targets[0].id in ("__version__", "__all__")
        assert isinstance(node, ast.ImportFrom) or is_docstring or is_constant, ast.unparse(node)


def test_the_tables_of_names_sit_in_names():
    tables = {module for module in INSIDE if re.search(r"^\w+: Registry\[", MODULES[module].read_text(), re.MULTILINE)}
    assert tables == {"kernels._moves", "kernels.names", "estimators.names", "partition.names", "bayes.names"}


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
