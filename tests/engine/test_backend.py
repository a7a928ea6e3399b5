"""Which backend runs where."""

import os
import subprocess
import sys

import pytest
import torch

from meerkat_engine.backend import TritonBackend, resolve
from meerkat_engine.errors import ConfigError
from meerkat_engine.triton_kernels import compiled, reference


def test_auto_draws_with_numba_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve("auto", cpu).normal is resolve("numba", cpu).normal is compiled.normal
    assert resolve("torch", cpu).normal is reference.normal
    assert isinstance(resolve("triton", cpu), TritonBackend)


def test_numba_is_for_cpus() -> None:
    with pytest.raises(ConfigError, match="works on CPU tensors, these are on cuda"):
        resolve("numba", torch.device("cuda"))


def test_without_numba_auto_is_torch() -> None:
    script = (
        "import sys\n"
        "sys.modules['numba'] = None\n"
        "import torch\n"
        "from meerkat_engine import stream\n"
        "print(stream.normal(0, torch.arange(3)).numel())\n"
        "stream.normal(0, torch.arange(3), backend='numba')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "3\n"
    assert "pip install 'meerkat-engine[cpu]', or use backend='torch'" in done.stderr


def test_triton_on_cpu_needs_the_interpreter() -> None:
    script = (
        "import torch\n"
        "from meerkat_engine import stream\n"
        "stream.normal(0, torch.arange(3))\n"
        "stream.normal(0, torch.arange(3), backend='triton')\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "set TRITON_INTERPRET=1 before the first import of the kernels" in done.stderr


def test_the_interpreter_refuses_gpu_addresses() -> None:
    with pytest.raises(ConfigError, match="unset TRITON_INTERPRET"):
        TritonBackend(torch.device("cuda"))


def test_the_engine_imports_without_triton_and_without_transformers() -> None:
    """Triton is there on Linux only; a CPU client elsewhere needs neither it nor, for its own models, transformers."""
    script = (
        "import sys\n"
        "sys.modules['triton'] = sys.modules['transformers'] = None\n"
        "import torch\n"
        "from meerkat_engine import SparseMask, SparseZO, replay, stream\n"
        "model = torch.nn.Linear(30, 3)\n"
        "opt = SparseZO(model, SparseMask.magnitude(model, 0.1), lr=0.1)\n"
        "print(opt.step(lambda: model(torch.ones(2, 30)).square().mean()).item() > 0)\n"
        "stream.normal(0, torch.arange(3), backend='triton')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "True\n"
    assert "backend 'triton' needs the package triton" in done.stderr
