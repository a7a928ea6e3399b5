"""The root as a package: what wheel and source distribution hold, and how the command starts, wherever the clone is."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from meerkat_engine import __version__

from helpers.imports import ROOT, sources

RECIPES = [f"examples/recipes/{path.name}" for path in (ROOT / "examples" / "recipes").glob("*.toml")]
DATA = ["py.typed", "fed/report/page.html", *RECIPES]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked files, in a folder with a name that no package could have."""
    target = tmp_path_factory.mktemp("clones") / "another name-1.2"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "__pycache__", "build", "dist", "runs", ".*_cache")
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=ignored))


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    return target / run(sys.executable, "-c", BUILD, "build_wheel", target, cwd=clone).splitlines()[-1]


def expected_files() -> set[str]:
    model = [path.relative_to(ROOT).as_posix() for path in (ROOT / "engine/lm/embedded/model").iterdir()]
    return {f"meerkat_engine/{path}" for path in [*sources(), *DATA, *model]}


def test_a_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected_files()
    assert wheel.name == f"meerkat_engine-{__version__}-py3-none-any.whl"


def test_a_source_distribution_builds_the_same_wheel(clone: Path, tmp_path: Path) -> None:
    name = run(sys.executable, "-c", BUILD, "build_sdist", tmp_path, cwd=clone).splitlines()[-1]
    with tarfile.open(tmp_path / name) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built = run(sys.executable, "-c", BUILD, "build_wheel", tmp_path, cwd=unpacked).splitlines()[-1]
    names = zipfile.ZipFile(tmp_path / built).namelist()
    assert {each for each in names if ".dist-info/" not in each} == expected_files()


@pytest.mark.parametrize("inside", [True, False], ids=["in the clone", "elsewhere"])
def test_an_installed_wheel_starts_in_and_outside_a_clone(
    wheel: Path, clone: Path, tmp_path: Path, inside: bool
) -> None:
    """In the clone, Python finds its folders `engine`, `fed` and so on before any installed package."""
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    where = clone if inside else tmp_path
    started = run(sys.executable, "-m", "meerkat_engine", "--version", cwd=where, PYTHONPATH=str(installed))
    assert started == f"meerkat-engine, version {__version__}\n"
    found = run(
        sys.executable,
        "-c",
        "import meerkat_engine.cli as cli; print(cli.__file__)",
        cwd=where,
        PYTHONPATH=str(installed),
    )
    assert Path(found.strip()) == installed / "meerkat_engine" / "cli.py"


def test_the_link_for_type_checkers_leads_to_the_root() -> None:
    assert (ROOT / ".types" / "meerkat_engine").resolve() == ROOT
