"""The imports between the package's modules, read from the source without importing it."""

import ast
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "meerkat_engine"
ROOT = Path(__file__).parents[2]
LAYERS = ("triton_kernels", "engine", "fed", "bench")
# Modules at the root, which no layer may import; "" is the package itself.
ROOT_MODULES = ("cli", "__main__", "")


def sources(root: Path = ROOT) -> dict[str, str]:
    """The source text of each module of the package, by its path from the root."""
    paths = [path for layer in LAYERS for path in (root / layer).rglob("*.py")]
    paths += [root / name for name in ("__init__.py", "__main__.py", "cli.py")]
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(paths)}


def module_of(path: str) -> str:
    """The dotted name of a module without that of the package; "" for the package itself."""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def imported_names(text: str, path: str) -> list[str]:
    """The absolute dotted names that a module imports, anywhere in it.

    Args:
        text: source text of the module.
        path: path of the module from the root.
    """
    package = [PACKAGE, *path.split("/")[:-1]]
    names = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            names += [f"{base}.{alias.name}" for alias in node.names]
    return names


def own_module(name: str, modules: frozenset[str]) -> str | None:
    """The package's module that an imported name is, or is defined in; None if the name is not in the package.

    Raises:
        LookupError: if the package has no such module.
    """
    if name.split(".")[0] != PACKAGE:
        return None
    below = name.removeprefix(PACKAGE).removeprefix(".")
    parent = below.rpartition(".")[0]
    for candidate in (below, parent):
        if candidate in modules:
            return candidate
    raise LookupError(f"there is neither a module {name} nor one that could define it")


def import_edges(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """All imports within the package, as pairs (importing module, imported module)."""
    modules = frozenset(map(module_of, texts))
    edges = []
    for path, text in texts.items():
        for name in imported_names(text, path):
            target = own_module(name, modules)
            if target is not None and name != f"{PACKAGE}.__version__":  # a string, no module
                edges.append((module_of(path), target))
    return edges


def unit_of(module: str) -> str:
    """The part of a layer that a module belongs to: a folder (``fed.run``), or the module itself (``fed.server``)."""
    return ".".join(module.split(".")[:2])


def violations(texts: Mapping[str, str], order: Mapping[str, list[str]]) -> list[str]:
    """Describes imports against the order of layers and units, and import cycles between the modules of a unit.

    Args:
        texts: see ``sources``.
        order: units of each layer. A unit may import the units before it and the layers below.
    """
    rank = {f"{layer}.{unit}": (i, j) for i, layer in enumerate(LAYERS) for j, unit in enumerate(order[layer])}
    rank |= {layer: (i, len(order[layer])) for i, layer in enumerate(LAYERS)} | dict.fromkeys(
        ROOT_MODULES, (len(LAYERS), 0)
    )
    problems, within_units = [], dict[str, set[str]]()
    for source, target in import_edges(texts):
        a, b = unit_of(source), unit_of(target)
        missing = [unit for unit in (a, b) if unit not in rank]
        if missing:
            problems.append(f"{missing[0]} is not in the list of units")
        elif a == b:
            within_units.setdefault(source, set()).add(target)
        elif rank[b] > rank[a]:
            problems.append(f"{source} imports {target or PACKAGE}, which is above it")
    return problems + [f"cycle: {' -> '.join(cycle)}" for cycle in find_cycles(within_units)]


def find_cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Cycles of a directed graph, at least one if there are any. Edges from a node to itself do not count."""
    cycles, visited = [], set[str]()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            cycles.append([*path[path.index(node) :], node])
        elif node not in visited:
            for target in sorted(graph.get(node, ())):
                if target != node:
                    walk(target, [*path, node])
            visited.add(node)

    for node in sorted(graph):
        walk(node, [])
    return cycles
