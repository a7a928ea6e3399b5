"""Launch configuration: what a launch is compiled for, and versions that cannot work."""

import importlib

import numpy as np
import pytest
import triton

from meerkat_engine.triton_kernels import launch


@pytest.mark.parametrize(("old", "new"), [("3.6.0", "2.3.5"), ("3.7.0", "2.5.0")])
def test_the_interpreter_of_triton_36_is_refused_with_a_newer_numpy(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    monkeypatch.setattr(triton, "__version__", old)
    monkeypatch.setattr(np, "__version__", new)
    importlib.reload(launch)  # works
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    monkeypatch.setattr(np, "__version__", "2.4.0")
    with pytest.raises(ImportError, match=r"the interpreter of triton 3\.6\.0 fails with numpy 2\.4\.0: install"):
        importlib.reload(launch)
