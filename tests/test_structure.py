"""What the package exports, and which part may import which."""

import ast
import doctest
from pathlib import Path
from types import ModuleType

import pytest

import meerkat_engine
import meerkat_engine.optimizer
import meerkat_engine.privacy
import meerkat_engine.template
from meerkat_engine import fed

ROOT = Path(__file__).parents[1]


DOCUMENTED = [meerkat_engine.stream, meerkat_engine.optimizer, meerkat_engine.privacy, meerkat_engine.template]


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda m: m.__name__)
def test_examples_in_docstrings(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0


def test_ci_runs_the_readmes_test_command() -> None:
    """It is cut out of the README, between these two lines."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Tests\n")[1].split("\nApache-2.0")[0]
    assert section.count("```") == 2
    assert "python -m pytest" in section
    assert "sed -n '/^## Tests/,/^Apache/p' README.md" in (ROOT / ".ci" / "run").read_text()


LAYERS = ["triton_kernels", "engine", "fed", "bench"]
# the command line sits on top of everything
COMMAND_LINE = {"fed/cli.py", "engine/__main__.py", "bench/__main__.py"}


def test_public_names() -> None:
    assert sorted(meerkat_engine.__all__) == [
        "MeerkatError", "SparseMask", "SparseZO", "__version__", "replay", "stream",
    ]  # fmt: skip
    assert sorted(fed.__all__) == [
        "Client", "ClientData", "Replica", "RunConfig", "Server", "Terms", "TrainReply", "TrainRequest", "catch_up",
        "execute", "make_config", "read_ledger", "resume", "serve", "simulate",
    ]  # fmt: skip
    assert {"bits", "normal", "step_seed"} <= set(meerkat_engine.stream.__all__)


def imported(path: Path, package: list[str]) -> list[str]:
    """Absolute names of what a module of the given package imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def layer_of(name: str) -> str | None:
    parts = name.split(".")
    if parts[0] != "meerkat_engine":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS else "engine"


MODULES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if str(relative) in COMMAND_LINE:
        return
    inside = list(relative.parts[:-1])
    package = ["meerkat_engine", *(inside[1:] if inside[0] == "engine" else inside)]
    here = LAYERS.index(inside[0])
    for name in imported(path, package):
        layer = layer_of(name)
        assert layer is None or LAYERS.index(layer) <= here, f"{relative} imports {name}"
        assert not name.startswith("tests")


def test_kernels_need_torch_and_triton_only() -> None:
    """And numba, where it is installed."""
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for name in imported(path, ["meerkat_engine", "triton_kernels"]):
            assert name.split(".")[0] in {
                "meerkat_engine", "torch", "triton", "bisect", "collections", "contextlib", "dataclasses", "functools",
                "typing",
            } | ({"numba", "numpy", "concurrent", "itertools"} if path.name == "compiled.py" else set())  # fmt: skip


CODE_FROM_DATA = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}


def runs_code_from_data(tree: ast.AST) -> list[str]:
    """What in a module could run code that is in a file: each use, with its line."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in CODE_FROM_DATA]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            root, names = node.module.split(".")[0], [alias.name for alias in node.names]
            if root in CODE_FROM_DATA or (root in ("torch", "numpy") and "load" in names):
                found.append(f"{node.lineno}: {node.module}")
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            found.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load", "torch.jit.load", "torch.serialization.load", "torch.hub.load", "np.load", "numpy.load",
            "importlib.import_module", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load",
        ):  # fmt: skip
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif (
            isinstance(node, ast.keyword)
            and node.arg in ("trust_remote_code", "allow_pickle")
            and isinstance(node.value, ast.Constant)
            and node.value.value
        ):
            found.append(f"{node.value.lineno}: {node.arg}")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_from_data(path: Path) -> None:
    assert not runs_code_from_data(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "load = torch.load", "from torch import load", "import pickle", "from pickle import loads",
        "eval(text)", "exec(text)", "builtins.exec(text)", "__import__(name)", "numpy.load(path)",
        "from_pretrained(x, trust_remote_code=True)", "import joblib.numpy_pickle", "compile(text, '', 'exec')",
    ],
)  # fmt: skip
def test_what_would_run_code_is_seen(line: str) -> None:
    assert runs_code_from_data(ast.parse(line))
    assert not runs_code_from_data(ast.parse("model.eval(); stream.load(x); from_pretrained(x, trust_remote_code=y)"))


def test_no_global_randomness_in_the_library() -> None:
    for path in MODULES:
        text = path.read_text()
        for call in ("torch.manual_seed", "np.random.seed", "import random", "torch.randn("):
            assert call not in text, f"{path} uses {call}"
