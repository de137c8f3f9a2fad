"""`import hsbackend` is cheap: no host, and each host fails alone. Each test is a fresh interpreter."""

import subprocess
import sys

import pytest

HOSTS = ("cvxpy", "cvxpylayers", "diffcp", "jax", "mlx", "triton", "skfolio")


def _python(code, *blocked):
    """Run `code` where the modules in `blocked` cannot be imported; return what it printed."""
    preamble = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", preamble + code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_no_host():
    loaded = _python(f"import hsbackend\nprint([name for name in {HOSTS!r} if name in sys.modules])")
    assert loaded == "[]"


def test_dir_and_all_load_no_host():
    code = "import hsbackend as h\nh.__all__\nprint('HSBackend' in dir(h), 'cvxpy' in sys.modules)"
    assert _python(code) == "True False"


def test_public_names():
    """Every name is listed and found; the errors need no host, the backend loads it when first used."""
    code = """
import hsbackend
def loaded(): return "cvxpylayers" in sys.modules
for name in ("SolveError", "HSBackendError", "UnsupportedProblemError", "InvalidOptionError", "Status"):
    assert name in hsbackend.__all__ and hasattr(hsbackend, name) and not loaded(), name
for name in ("HSBackend", "enable", "disable", "enabled"):
    assert name in hsbackend.__all__ and hasattr(hsbackend, name) and loaded(), name
print(hsbackend.HSBackend().__class__.__module__)
"""
    assert _python(code) == "hsbackend.adapters.cvxpylayers"


def test_unknown_name_is_an_attribute_error():
    code = "import hsbackend\ntry:\n    hsbackend.HSBackened\nexcept AttributeError as error:\n    print(error)"
    assert "HSBackened" in _python(code)


@pytest.mark.parametrize("host", ["cvxpy", "cvxpylayers", "diffcp"])
def test_missing_host(host):
    """The library imports; what needs the host says what is missing."""
    code = "import hsbackend\ntry:\n    hsbackend.HSBackend\nexcept ImportError as error:\n    print(error)"
    assert host in _python(code, host)


def test_missing_jax_does_not_hide_torch():
    code = """
import cvxpy as cp, torch, hsbackend
from hsbackend.adapters.cvxpylayers import CvxpyLayer
x, y = cp.Variable(2), cp.Parameter(2)
layer = CvxpyLayer(cp.Problem(cp.Minimize(cp.sum_squares(x - y)), [x >= 0]), [y], [x])
print(layer(torch.tensor([1.0, -1.0]))[0].tolist() == [1.0, 0.0])
"""
    assert _python(code, "jax", "mlx", "triton") == "True"


def test_adapters_do_not_lie_at_the_top():
    """The folder `adapters` is `hsbackend.adapters` once installed, and nothing else."""
    code = "from importlib.util import find_spec\nsys.path.remove('')\nprint(find_spec('adapters'))"
    assert _python(code) == "None"
