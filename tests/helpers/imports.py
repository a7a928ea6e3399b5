"""Who imports whom, read from the source: no module of the package is imported for it."""

import ast
from collections.abc import Mapping
from pathlib import Path

PACKAGE = "meerkat_engine"
ROOT = Path(__file__).parents[2]
LAYERS = ("triton_kernels", "engine", "fed", "bench")
# Modules at the root, which no layer may import; "" is the package itself.
TOP = ("cli", "__main__", "")


def sources(root: Path = ROOT) -> dict[str, str]:
    """The text of every module of the package, by its path from the root."""
    paths = [path for layer in LAYERS for path in (root / layer).rglob("*.py")]
    paths += [root / name for name in ("__init__.py", "__main__.py", "cli.py")]
    return {path.relative_to(root).as_posix(): path.read_text() for path in sorted(paths)}


def module_of(path: str) -> str:
    """Dotted name below the package; "" for the package itself."""
    return path.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def imported_names(text: str, path: str) -> list[str]:
    """Absolute dotted names of all that a module imports, wherever in it, one name an imported name."""
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
    """The module of the package that an imported name is, or is in; None if it is not of the package.

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
    raise LookupError(f"there is no module {name}, nor one that it could be in")


def arrows(texts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(importing module, imported module) of all imports within the package."""
    modules = frozenset(map(module_of, texts))
    found = []
    for path, text in texts.items():
        for name in imported_names(text, path):
            target = own_module(name, modules)
            if target is not None and name != f"{PACKAGE}.__version__":  # a plain string
                found.append((module_of(path), target))
    return found


def room_of(module: str) -> str:
    """The part of a layer that a module belongs to: a folder (``fed.run``), or the module itself (``fed.server``)."""
    return ".".join(module.split(".")[:2])


def violations(texts: Mapping[str, str], order: Mapping[str, list[str]]) -> list[str]:
    """Imports that run against the order of layers and rooms, and circles between the modules of a room.

    Args:
        texts: see ``sources``.
        order: rooms of each layer; one may import those that stand before it.
    """
    rank = {f"{layer}.{room}": (i, j) for i, layer in enumerate(LAYERS) for j, room in enumerate(order[layer])}
    rank |= {layer: (i, len(order[layer])) for i, layer in enumerate(LAYERS)} | dict.fromkeys(TOP, (len(LAYERS), 0))
    found, within = [], dict[str, set[str]]()
    for source, target in arrows(texts):
        a, b = room_of(source), room_of(target)
        missing = [room for room in (a, b) if room not in rank]
        if missing:
            found.append(f"{missing[0]} is not in the list of rooms")
        elif a == b:
            within.setdefault(source, set()).add(target)
        elif rank[b] > rank[a]:
            found.append(f"{source} imports {target or PACKAGE}, which is above it")
    return found + [f"circle: {' -> '.join(circle)}" for circle in circles(within)]


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """A circle from each node that one leads back to; none if there are none."""
    found, done = [], set[str]()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for target in sorted(graph.get(node, ())):
                if target != node:
                    walk(target, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found
