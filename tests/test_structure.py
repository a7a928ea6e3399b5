"""Structure of the package: public names, import order, and code that must not occur in it."""

import ast
import doctest
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import meerkat_engine
from meerkat_engine import fed, stream
from meerkat_engine.engine import captured, optimizer, private_closure
from meerkat_engine.engine.lm import label_words, template

from helpers.imports import LAYERS, ROOT, import_edges, imported_names, sources, violations

DOCUMENTED = [stream, captured, optimizer, private_closure, template, label_words]


@pytest.mark.parametrize("module", DOCUMENTED, ids=lambda m: m.__name__)
def test_docstring_examples_pass(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted >= 2
    assert result.failed == 0


def test_ci_runs_the_test_command_of_the_readme() -> None:
    """CI extracts the command from the README, between two lines that must stay there."""
    readme = (ROOT / "README.md").read_text()
    section = readme.split("## Tests\n")[1].split("\nApache-2.0")[0]
    assert section.count("```") == 2
    assert "python -m pytest" in section
    assert "sed -n '/^## Tests/,/^Apache/p' README.md" in (ROOT / ".ci" / "run").read_text()


# The units of each layer, lowest first. A unit is a folder, or a module directly in the layer's folder. It may import
# the units before it in its layer, and everything in the layers below.
UNITS = {
    "triton_kernels": [
        "philox", "elements", "launch", "block", "reference", "numba_normal", "numba_access", "normal", "coefficients",
        "perturb", "restore", "compare", "update", "replay", "inner", "correction_reference", "correction",
    ],
    "engine": [
        "errors", "clock", "caller_warnings", "extras", "frozen", "parameters", "atomic_files", "checksummed",
        "backend", "stream", "updates", "device_values", "lm", "gradients", "layers", "sensitivity", "eligible",
        "ranking", "mask", "mask_sets", "mask_coverage", "launch_groups", "model_watch", "passes", "weights", "delta",
        "replay", "sgd", "two_points", "estimator", "journal", "tensor_trees", "program", "graphs", "captured",
        "private_closure", "param_groups", "step_seeds", "step_warnings", "optimizer", "trainer_checks", "trainer",
    ],
    "fed": [
        "methods", "rejection", "messages", "partition", "selection", "scalars", "aggregation", "answers", "privacy",
        "terms", "replica", "reply_checks", "client", "ledger", "gradip", "server", "exchange", "attack", "config",
        "setup", "torchrun", "run", "doctor", "recipe", "inference", "report", "flower",
    ],
    "bench": [
        "tables", "environment", "figures", "empty_kernel", "assembly", "measure", "compiling", "codegen", "shapes",
        "traffic", "rows", "kernels", "forward", "one_pass", "step", "report", "gpu", "command", "scale",
        "scale_command", "memory", "memory_command", "tune", "experiments",
    ],
}  # fmt: skip


def test_imports_follow_the_order_of_layers_and_units() -> None:
    assert violations(sources(), UNITS) == []


def test_every_unit_exists() -> None:
    modules = {path.removesuffix(".py").removesuffix("/__init__") for path in sources()}
    assert {f"{layer}/{unit}" for layer in LAYERS for unit in UNITS[layer]} <= modules


@pytest.mark.parametrize(
    ("path", "line", "message"),
    [
        ("engine/mask.py", "from ..fed.terms import Terms", "engine.mask imports fed.terms, which is above it"),
        ("fed/server.py", "from ..cli import main", "fed.server imports cli, which is above it"),
        ("fed/terms.py", "from .client import Client", "fed.terms imports fed.client, which is above it"),
        ("fed/run/jsonl.py", "from ..report.page import write_report", "fed.run.jsonl imports fed.report.page"),
        ("fed/client.py", "def f(): from .run.execute import execute", "fed.client imports fed.run.execute, which is"),
        ("triton_kernels/perturb.py", "import meerkat_engine.engine.mask", "triton_kernels.perturb imports engine"),
        ("engine/stream.py", "from .. import SparseMask", "engine.stream imports meerkat_engine"),
        ("fed/run/jsonl.py", "from .metrics import Metrics", "cycle: fed.run.jsonl -> fed.run.metrics ->"),
        ("bench/new_unit.py", "from . import rows", "bench.new_unit is not in the list of units"),
    ],
)  # fmt: skip
def test_an_import_against_the_order_is_found(path: str, line: str, message: str) -> None:
    texts = sources()
    texts[path] = texts.get(path, "") + f"\n{line}\n"
    assert any(problem.startswith(message) for problem in violations(texts, UNITS))


def test_an_import_of_a_missing_module_is_found() -> None:
    with pytest.raises(LookupError, match=r"meerkat_engine\.engine\.masks"):
        import_edges(sources() | {"engine/new.py": "from .masks import SparseMask"})


# torch's functions that make tensors on the default device, and those of them that make the default dtype.
_DTYPED = {"empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros"}
_FACTORIES = _DTYPED | {"arange", "as_tensor", "randint", "randperm", "tensor"}


def implicit_defaults(text: str) -> list[str]:
    """The calls in a module that leave device or dtype to torch's defaults, which a user can change."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if not isinstance(node.func.value, ast.Name) or node.func.value.id != "torch" or name not in _FACTORIES:
            continue
        given = {keyword.arg for keyword in node.keywords}
        if not given & {"device", "out"} or (name in _DTYPED and not given & {"dtype", "out"}):
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sources())
def test_nothing_depends_on_the_default_device_or_dtype(path: str) -> None:
    assert implicit_defaults(sources()[path]) == []


def test_a_call_that_depends_on_a_default_is_found() -> None:
    text = "torch.zeros(3, device=d); torch.arange(3); torch.empty(3, out=o); torch.tensor(1, device=d)"
    assert implicit_defaults(text) == ["torch.zeros(3, device=d)", "torch.arange(3)"]


TESTS = [path for folder in ("tests", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_that_tests_and_examples_import_exist(path: Path) -> None:
    """They exist as files, where an editor finds them. Public names are exempt, because the root package has them."""
    public = {("meerkat_engine", name) for name in meerkat_engine.__all__}
    public |= {("meerkat_engine", "fed", name) for name in fed.__all__}
    for name in imported_names(path.read_text(), path.relative_to(ROOT).as_posix()):
        parts = tuple(name.split("."))
        if parts[0] == "helpers":
            assert (ROOT / "tests" / "helpers" / f"{parts[1]}.py").is_file(), name
        if parts[0] == "meerkat_engine" and parts not in public:
            modules = [ROOT.joinpath(*parts[1:stop]) for stop in (len(parts), max(1, len(parts) - 1))]
            assert any(
                module.with_suffix(".py").is_file() or (module / "__init__.py").is_file() for module in modules
            ), name


def exported_for_checkers(path: Path) -> set[str]:
    """The names that a package's ``__init__`` imports for type checkers."""
    tree = ast.parse(path.read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }


def test_the_public_names_are_these() -> None:
    assert sorted(meerkat_engine.__all__) == [
        "BoundLoss", "Delta", "Estimator", "LanguageModel", "MeerkatError", "Quantize", "SparseMask", "SparseZO",
        "SparseZOTrainer", "UpdateLog", "__version__", "fingerprint", "load_model", "replay", "save_checkpoint",
        "stream",
    ]  # fmt: skip
    assert sorted(fed.__all__) == [
        "Client", "ClientData", "RemotePool", "Replica", "RunConfig", "Server", "Terms", "TrainReply", "TrainRequest",
        "catch_up", "execute", "make_config", "read_ledger", "resume", "serve", "simulate",
    ]  # fmt: skip
    assert {"bits", "normal", "step_seed"} <= set(stream.__all__)


@pytest.mark.parametrize("package", [meerkat_engine, fed], ids=lambda package: package.__name__)
def test_every_public_name_can_be_imported_checked_and_listed(package: ModuleType) -> None:
    names = set(package.__all__) - {"__version__"}
    assert all(getattr(package, name) is not None for name in names)
    assert names <= set(dir(package))
    assert package.__file__ is not None
    assert exported_for_checkers(Path(package.__file__)) == names
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        package.absent  # noqa: B018


def test_help_lists_the_public_names() -> None:
    shown = subprocess.run(
        [sys.executable, "-c", "import meerkat_engine; help(meerkat_engine)"], capture_output=True, text=True,
        check=True, env=os.environ | {"PAGER": "cat"},
    ).stdout  # fmt: skip
    for name in ("class SparseMask", "class SparseZO(", "class SparseZOTrainer", "load_model(", "replay("):
        assert name in shown


def test_a_process_that_only_forwards_messages_loads_no_torch() -> None:
    code = "import sys, meerkat_engine, meerkat_engine.fed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_kernels_only_import_torch_and_triton() -> None:
    """Those that need numba also import it, if that is installed. ``launch`` looks at the version of numpy."""
    for path in (ROOT / "triton_kernels").glob("*.py"):
        for name in imported_names(path.read_text(), f"triton_kernels/{path.name}"):
            assert name.split(".")[0] in {
                "meerkat_engine", "torch", "triton", "bisect", "collections", "contextlib", "dataclasses", "enum",
                "functools", "math", "typing", *(["numpy"] if path.stem == "launch" else []),
            } | ({"numba", "numpy", "concurrent", "itertools"} if path.stem[:6] == "numba_" else set())  # fmt: skip


PATHS = [ROOT / path for path in sources()]
# They import their public names lazily, by constant names.
LAZY = {ROOT / "__init__.py", ROOT / "fed" / "__init__.py"}

CODE_FROM_DATA = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code"}


def code_from_data_uses(tree: ast.AST) -> list[str]:
    """Finds uses, in a module, of functions that could run code from a data file. Each with its line number."""
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            uses += [f"{node.lineno}: {a.name}" for a in node.names if a.name.split(".")[0] in CODE_FROM_DATA]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            root, names = node.module.split(".")[0], [alias.name for alias in node.names]
            if root in CODE_FROM_DATA or (root in ("torch", "numpy") and "load" in names) or "import_module" in names:
                uses.append(f"{node.lineno}: {node.module}.{names[0]}")
        elif isinstance(node, ast.Name) and node.id in ("eval", "exec", "compile", "__import__"):
            uses.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load", "torch.jit.load", "torch.serialization.load", "torch.hub.load", "np.load", "numpy.load",
            "importlib.import_module", "builtins.eval", "builtins.exec", "yaml.load", "yaml.unsafe_load",
        ):  # fmt: skip
            uses.append(f"{node.lineno}: {ast.unparse(node)}")
        elif (
            isinstance(node, ast.keyword)
            and node.arg in ("trust_remote_code", "allow_pickle")
            and isinstance(node.value, ast.Constant)
            and node.value.value
        ):
            uses.append(f"{node.value.lineno}: {node.arg}")
    return uses


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_code_from_data_uses(path: Path) -> None:
    uses = code_from_data_uses(ast.parse(path.read_text()))
    assert not [use for use in uses if path not in LAZY or "import_module" not in use]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)", "load = torch.load", "from torch import load", "import pickle", "from pickle import loads",
        "eval(text)", "exec(text)", "builtins.exec(text)", "__import__(name)", "numpy.load(path)",
        "from_pretrained(x, trust_remote_code=True)", "import joblib.numpy_pickle", "compile(text, '', 'exec')",
    ],
)  # fmt: skip
def test_code_that_runs_code_from_data_is_found(line: str) -> None:
    assert code_from_data_uses(ast.parse(line))
    assert not code_from_data_uses(ast.parse("model.eval(); stream.load(x); from_pretrained(x, trust_remote_code=y)"))


def test_no_global_randomness_in_the_library() -> None:
    for path in PATHS:
        text = path.read_text()
        for call in ("torch.manual_seed", "np.random.seed", "import random", "torch.randn("):
            assert call not in text, f"{path} uses {call}"
