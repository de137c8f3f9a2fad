"""The promises of the package as a whole: documented names, one direction of dependence, a README that runs."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hsbackend

ROOT = Path(__file__).resolve().parents[1]
#: Modules from the bottom up: each may import only those before it.
ORDER = [
    "status", "_parallel", "_blas", "families", "checks", "cuda", "program", "certificates", "batched", "_face_kernels",
    "_least_norm_kernels", "metric", "face", "reduce", "structure", "route", "_sparse_kernels",
    "_sparse_newton_kernels", "sparse_program", "sparse_face", "solvers", "plan", "sparse_plan", "differentiate",
    "operators", "linear_maps", "_lsmr_kernels", "lsmr", "lstsq_factor", "lstsq_operator", "lstsq_problem",
    "least_squares", "nullspace", "closed_forms", "pseudo_inverse", "qp_program", "qp_face", "qp_operators", "closest",
    "sparse_qp", "qp", "sets", "polyhedron", "functional", "nn",
]  # fmt: skip


@pytest.mark.parametrize("name", hsbackend.__all__)
def test_public_names_are_documented(name: str) -> None:
    value = getattr(hsbackend, name)
    if name == "__version__":
        assert re.fullmatch(r"\d+\.\d+\.\d+", value)
    else:
        assert inspect.getdoc(value)
        assert len(inspect.getdoc(value).splitlines()[0]) > 15


def public_callables() -> dict[str, object]:
    """Return what a PyTorch user calls: functions, named sets, modules."""
    found = {
        name: getattr(hsbackend, name) for name in ("project", "solve_qp", "lstsq", "hs_jacobian", "hs_jvp", "hs_vjp")
    }
    found |= {f"nn.{name}": getattr(hsbackend.nn, name) for name in ("Projection", "QP")}
    members = vars(hsbackend.functional).items()
    found |= {
        f"functional.{name}": member
        for name, member in members
        if inspect.isfunction(member) and member.__module__ == "hsbackend.functional" and not name.startswith("_")
    }
    members = vars(hsbackend.Polyhedron).items()
    found |= {
        f"Polyhedron.{name}": getattr(hsbackend.Polyhedron, name)
        for name, member in members
        if isinstance(member, classmethod) and not name.startswith("_")
    }
    return found | {"Polyhedron": hsbackend.Polyhedron}


@pytest.mark.parametrize("name", public_callables())
def test_every_argument_is_documented(name: str) -> None:
    value = public_callables()[name]
    text = inspect.getdoc(value) or ""
    assert text.splitlines()[0].endswith((".", "axis.", "}``."))
    for parameter in inspect.signature(value).parameters:
        assert re.search(rf"^ +\*?{parameter}: ", text, re.M), f"{name} does not say what {parameter} is"


def test_every_function_has_its_set() -> None:
    """A function of an axis exists for every set whose tensors say everything but the point."""
    functions = {name.removeprefix("functional.") for name in public_callables() if name.startswith("functional.")}
    named = {name.removeprefix("Polyhedron.") for name in public_callables() if name.startswith("Polyhedron.")}
    assert named - functions == {"order", "product", "box_intersect_affine"}
    assert functions <= named


def test_import_is_cheap() -> None:
    code = "import hsbackend, sys; print([name for name in ('torch', 'numba', 'scipy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hsbackend.nothing


@pytest.mark.parametrize("module", ORDER)
def test_one_direction_of_dependence(module: str) -> None:
    path = ROOT / "hsbackend" / module
    files = sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    allowed = set(ORDER[: ORDER.index(module)]) | {module}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hsbackend"):
                parts = node.module.split(".")
                names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            assert set(names) <= allowed, f"{file.name} imports {set(names) - allowed}"


def test_the_core_knows_no_host() -> None:
    for file in (ROOT / "hsbackend").rglob("*.py"):
        assert not re.search(r"^\s*(import|from) (cvxpy|cvxpylayers|diffcp|jax)", file.read_text(), re.M), file.name


def test_every_module_has_a_docstring() -> None:
    for folder in ("hsbackend", "adapters", "comparisons"):
        for file in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(file.read_text())), file


def test_readme_runs() -> None:
    """The Python blocks of the README, in order, in one namespace."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert len(blocks) >= 3
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), namespace)


def test_package_version_matches_the_project_file() -> None:
    assert f'version = "{hsbackend.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert importlib.import_module("hsbackend").__version__ == hsbackend.__version__
