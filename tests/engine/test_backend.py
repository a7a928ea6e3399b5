"""Selection of the backend by name and device."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from meerkat_engine.engine.backend import TritonBackend, resolve
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.triton_kernels import numba_normal as compiled
from meerkat_engine.triton_kernels import reference


def run_script(*lines: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a script in a separate process, with changed environment variables."""
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, env=os.environ | environment
    )


def test_auto_draws_with_numba_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve("auto", cpu).normal is resolve("numba", cpu).normal is compiled.normal
    assert resolve("torch", cpu).normal is reference.normal
    assert isinstance(resolve("triton", cpu), TritonBackend)


def test_numba_rejects_gpu_tensors() -> None:
    with pytest.raises(ConfigError, match="works on CPU tensors, these are on cuda"):
        resolve("numba", torch.device("cuda"))


def test_auto_uses_torch_if_numba_is_not_installed() -> None:
    done = run_script(
        "import sys",
        "sys.modules['numba'] = None",
        "import torch",
        "from meerkat_engine import stream",
        "print(stream.normal(0, torch.arange(3)).numel())",
        "stream.normal(0, torch.arange(3), backend='numba')",
    )
    assert done.stdout == "3\n"
    assert "run pip install -c constraints.txt '.[cpu]', or use backend='torch'" in done.stderr


@pytest.mark.parametrize("error", ["ImportError", "OSError", "AttributeError"])
def test_auto_uses_torch_and_says_so_once_if_numba_cannot_be_imported(tmp_path: Path, error: str) -> None:
    """As when the installed NumPy is too new for it, or one of its libraries is missing."""
    broken = tmp_path / "numba" / "__init__.py"
    broken.parent.mkdir()
    broken.write_text(f"raise {error}('Numba needs NumPy 2.3 or less')")
    done = run_script(
        "import torch, warnings",
        "warnings.simplefilter('always')",
        "from meerkat_engine import stream",
        "print([stream.normal(0, torch.arange(3)).numel() for _ in range(2)])",
        "stream.normal(0, torch.arange(3), backend='numba')",
        PYTHONPATH=str(tmp_path),
    )
    assert done.stdout == "[3, 3]\n"
    assert done.stderr.count("UserWarning: normals are drawn by torch, which is several times slower") == 1
    assert done.stderr.count("(Numba needs NumPy 2.3 or less)") == 2  # the warning, and the error at backend='numba'


@pytest.mark.parametrize("backend", ["auto", "numba"])
def test_numba_without_a_cache_directory_suggests_a_fix(backend: str) -> None:
    """This happens in a container with a read-only installation and no home directory."""
    done = run_script(
        "from numba.core.caching import CacheImpl",
        "CacheImpl._locator_classes = []",  # no directory is writable
        "import torch",
        "from meerkat_engine import stream",
        f"stream.normal(0, torch.arange(3), backend={backend!r})",
    )
    assert done.returncode == (backend == "numba")
    assert "set NUMBA_CACHE_DIR to a writable directory, or use backend='torch'" in done.stderr


def test_triton_on_cpu_needs_the_interpreter() -> None:
    done = run_script(
        "import torch",
        "from meerkat_engine import stream",
        "stream.normal(0, torch.arange(3))",
        "stream.normal(0, torch.arange(3), backend='triton')",
        TRITON_INTERPRET="0",
    )
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1 before the first import of the kernels" in done.stderr


def test_the_interpreter_rejects_gpu_tensors() -> None:
    with pytest.raises(ConfigError, match="unset TRITON_INTERPRET"):
        TritonBackend(torch.device("cuda"))


def test_the_engine_imports_without_triton_and_without_transformers() -> None:
    """Triton exists only on Linux. CPU clients elsewhere do not need it, nor transformers for other kinds of models."""
    done = run_script(
        "import sys",
        "sys.modules['triton'] = sys.modules['transformers'] = None",
        "import torch",
        "from meerkat_engine import SparseMask, SparseZO, replay, stream",
        "model = torch.nn.Linear(30, 3)",
        "opt = SparseZO(model, SparseMask.magnitude(model, 0.1), lr=0.1)",
        "print(opt.step(lambda: model(torch.ones(2, 30)).square().mean()).item() > 0)",
        "stream.normal(0, torch.arange(3), backend='triton')",
    )
    assert done.stdout == "True\n"
    assert "backend 'triton' needs the package triton" in done.stderr
