"""Atomic writes, also on a full disk and in case of a power cut."""

import errno
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from meerkat_engine.engine.atomic_files import append_fsync, write_atomic
from meerkat_engine.engine.errors import RunError


def test_the_directory_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut cannot be tested here, but the calls that protect against it and their order can."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def recording_fsync(descriptor: int) -> None:
        calls.append("directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def recording_replace(old: Path, new: Path) -> None:
        calls.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    write_atomic(tmp_path / "f", b"new")
    assert calls == ["file", "rename", "directory"]
    assert (tmp_path / "f").read_bytes() == b"new"


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.EIO, False)])
def test_a_directory_sync_may_be_unsupported_but_may_not_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    fsync = os.fsync

    def failing_fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", failing_fsync)
    if passes:
        write_atomic(tmp_path / "f", b"new")
    else:
        with pytest.raises(RunError, match=r"cannot write .*f: Input/output error"):
            write_atomic(tmp_path / "f", b"new")
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """Runs in a separate process whose files may not exceed 1,000 bytes."""
    (tmp_path / "f").write_bytes(b"old")
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from meerkat_engine.engine.errors import RunError\n"
        "from meerkat_engine.engine.atomic_files import write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    write_atomic(Path(sys.argv[1]), b'x' * 2000, replaces=lambda _: True)\n"
        "except RunError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "f"], capture_output=True, text=True)
    assert done.stdout == f"cannot write {tmp_path / 'f'}: File too large\n", done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_bytes() == b"old"


def test_unwritable_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory").mkdir()
    for place, message in (("missing/f", "No such file"), ("file/f", "Not a directory"), ("directory", "directory")):
        with pytest.raises(RunError, match=f"cannot write {tmp_path / place}: .*{message}"):
            write_atomic(tmp_path / place, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "directory"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "f"
    with socket.socket(socket.AF_UNIX) as endpoint:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            endpoint.bind(str(path))
        elif kind == "device":
            path.symlink_to("/dev/null")
        else:
            path.mkdir()
        before = os.stat(path)
        with pytest.raises(RunError, match=r"cannot write .*f: it is a (device|directory).*choose another path"):
            write_atomic(path, b"new", replaces=lambda _: True)
    assert os.stat(path).st_ino == before.st_ino
    assert os.stat(path).st_mode == before.st_mode
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


def test_a_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, target in (("old", "data/old"), ("new", "data/new"), ("twice", "old")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "data" / "old").write_bytes(b"old")
    for name in ("old", "new", "twice"):
        write_atomic(tmp_path / name, name.encode(), replaces=lambda _: True)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / name).read_bytes() == name.encode()
    assert (tmp_path / "data" / "old").read_bytes() == b"twice"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["new", "old"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(RunError, match=r"cannot write .*loop: Too many levels of symbolic links"):
        write_atomic(tmp_path / "loop", b"x")


def test_a_read_only_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    (tmp_path / "f").chmod(0o444)
    with pytest.raises(RunError, match=r"cannot write .*f: the file there is read-only; choose another path, or make"):
        write_atomic(tmp_path / "f", b"new", replaces=lambda _: True)
    assert (tmp_path / "f").read_bytes() == b"old"


def test_another_file_is_replaced_only_if_the_caller_recognizes_it(tmp_path: Path) -> None:
    path, seen = tmp_path / "f", []
    path.write_bytes(b"old")
    refused = r"cannot write .*f: another file is there, which is not replaced; choose another path"
    with pytest.raises(RunError, match=refused):
        write_atomic(path, b"new")
    with pytest.raises(RunError, match=refused):
        write_atomic(path, b"new", replaces=lambda existing: bool(seen.append(existing.read_bytes())))  # type: ignore[func-returns-value]
    assert seen == [b"old"]
    assert path.read_bytes() == b"old"
    write_atomic(path, b"new", replaces=lambda existing: existing.read_bytes() == b"old")
    assert path.read_bytes() == b"new"
    path.write_bytes(b"")
    write_atomic(path, b"into an empty file")
    assert path.read_bytes() == b"into an empty file"


def test_a_replaced_file_keeps_its_mode_and_owner(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    path.chmod(0o640)
    owner = 12345 if os.getuid() == 0 else os.getuid()
    os.chown(path, owner, -1)
    write_atomic(path, b"new", replaces=lambda _: True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_uid == owner


def test_an_append_is_synced_or_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "lines", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with open(path, "ab", buffering=0) as file:
        append_fsync(file, b"one\n")
        append_fsync(file, b"two\n")
    assert synced == [b"one\n", b"one\ntwo\n"]

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with open(path, "ab", buffering=0) as file, pytest.raises(OSError, match="Input/output error"):
        append_fsync(file, b"three\n")
    assert path.read_bytes() == b"one\ntwo\n"
