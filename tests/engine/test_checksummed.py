"""Damaged mask files: every byte of a small one, random bytes of a larger one, invalid content with valid checksums."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from meerkat_engine import SparseMask
from meerkat_engine.engine.errors import MaskError, RunError
from meerkat_engine.engine.mask import _KIND
from meerkat_engine.engine.parameters import ParameterTable

from helpers.constants import FUZZ
from helpers.damage import (
    BYTE_CHANGES,
    assert_changed_bytes_are_rejected,
    header_size,
    is_rejected,
    rewrite,
    with_damaged_byte,
)
from helpers.models import make_model
from helpers.tensors import same_bits


def small_mask() -> SparseMask:
    model = nn.Linear(3, 2)
    values = torch.tensor([0.5, -0.0, 3.0])
    return SparseMask(
        ids=torch.tensor([0, 3, 7]), table=ParameterTable.of(model), density=0.375, source="test",
        calibration="a few texts", gradient=values, scores=values.square(),
    )  # fmt: skip


def same_mask(a: SparseMask, b: SparseMask) -> bool:
    tensors = [(a.ids, b.ids), (a.gradient, b.gradient), (a.scores, b.scores)]
    plain = [(m.table, m.density, m.source, m.calibration) for m in (a, b)]
    return plain[0] == plain[1] and all(
        (x is None and y is None) or (x is not None and y is not None and same_bits(x, y)) for x, y in tensors
    )


def mask_is_rejected(path: Path, original: SparseMask) -> bool:
    return is_rejected(path, SparseMask.load, MaskError, lambda loaded: same_mask(loaded, original))


def test_a_changed_byte_is_rejected_or_has_no_effect(tmp_path: Path) -> None:
    mask, path = small_mask(), tmp_path / "m"
    mask.save(path)
    assert_changed_bytes_are_rejected(path, lambda: mask_is_rejected(path, mask), BYTE_CHANGES)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> tuple[SparseMask, bytes, Path]:
    model, path = make_model(), tmp_path_factory.mktemp("masks") / "m"
    mask = SparseMask.from_gradients(model, [torch.arange(40).view(2, 20) + 3], 0.02)
    mask.save(path)
    return mask, path.read_bytes(), path


@settings(max_examples=400 * FUZZ, deadline=None)
@given(data=st.data())
def test_random_damage_of_a_larger_mask_is_rejected(
    larger: tuple[SparseMask, bytes, Path], data: st.DataObject
) -> None:
    mask, good, path = larger
    damaged, position = with_damaged_byte(data, good)
    path.write_bytes(damaged)
    assert mask_is_rejected(path, mask) or position < header_size(good)


@settings(max_examples=200 * FUZZ, deadline=None)
@given(data=st.data())
def test_truncated_and_longer_files_are_rejected(larger: tuple[SparseMask, bytes, Path], data: st.DataObject) -> None:
    mask, good, path = larger
    length = data.draw(st.integers(0, len(good) - 1) | st.integers(0, 20))
    path.write_bytes(good[:length])
    assert mask_is_rejected(path, mask)
    path.write_bytes(good + data.draw(st.binary(min_size=1, max_size=40)))
    assert mask_is_rejected(path, mask)


@settings(max_examples=100 * FUZZ, deadline=None)
@given(content=st.binary(max_size=200))
def test_files_with_random_content_are_rejected(larger: tuple[SparseMask, bytes, Path], content: bytes) -> None:
    larger[2].write_bytes(content)
    assert mask_is_rejected(larger[2], larger[0])


@pytest.mark.parametrize("with_gradient", [True, False])
def test_save_and_load_return_the_same_mask(tmp_path: Path, with_gradient: bool) -> None:
    mask = small_mask()
    if not with_gradient:
        mask = SparseMask(ids=mask.ids, table=mask.table, density=0.375, source="test")
    mask.save(tmp_path / "m")
    assert same_mask(SparseMask.load(tmp_path / "m"), mask)


def test_a_loaded_mask_does_not_depend_on_its_file(tmp_path: Path) -> None:
    """safetensors maps the file: a later write to the file must not change a mask that was already checked."""
    mask = small_mask()
    mask.save(tmp_path / "m")
    loaded = SparseMask.load(tmp_path / "m")
    with open(tmp_path / "m", "r+b") as file:
        file.seek(-48, 2)
        file.write(b"\xff" * 48)
    assert same_mask(loaded, mask)


def read_parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "checksum"}
        return metadata, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


Change = Callable[[dict[str, str], dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, t: m.update(extra="1"), "unknown 'extra' in its metadata"),
        (lambda m, t: m.pop("calibration"), "no 'calibration' in its metadata"),
        (lambda m, t: t.update(extra=torch.zeros(1)), "unknown 'extra' among its tensors"),
        (lambda m, t: t.pop("ids"), "no 'ids' among its tensors"),
        (lambda m, t: t.update(ids=t["gradient"].clone()), "'ids' is F32 instead of I64"),
        (lambda m, t: t.update(ids=t["ids"].flip(0)), "must be in|must ascend"),
        (lambda m, t: t.update(ids=t["ids"] + 1), "must be in"),
        (lambda m, t: t.update(ids=torch.tensor([0, 3, 6])), "its digest does not match its ids and table"),
        (lambda m, t: t.update(scores=t["scores"][:2]), r"scores must be float32 \[3\]"),
        (lambda m, t: m.update(d="9"), "its d does not match"),
        (lambda m, t: m.update(density="nan"), "density must be in"),
        (lambda m, t: m.update(density="many"), "could not convert"),
        (lambda m, t: m.update(table="[" * 100_000), "not a list of"),
        (lambda m, t: m.update(table="7"), "not a list of"),
        (lambda m, t: m.update(table='[["weight",[2,3],0],["bias",[2],2]]'), "'bias' begins at 2 instead of 6"),
        (lambda m, t: m.update(table='[["weight",[2,-3],0]]'), "'weight' has no valid shape"),
        (lambda m, t: m.update(table='[["w",[2,3],0],["w",[2],6]]'), "lists a parameter twice"),
        (lambda m, t: m.update(table=f'[["w",[{2**62},4],0]]'), "element ids end at"),
        (lambda m, t: m.update(table='[["w",[true,8],0]]'), "'w' has no valid shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_invalid_content_with_a_valid_checksum_is_rejected(tmp_path: Path, change: Change, message: str) -> None:
    """The reader checks every property that it relies on, also if the checksum is valid."""
    small_mask().save(tmp_path / "good")
    rewrite(tmp_path / "good", tmp_path / "m", _KIND, change)
    with pytest.raises(MaskError, match=message) as caught:
        SparseMask.load(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value)


def test_format_version_1_is_rejected(tmp_path: Path) -> None:
    small_mask().save(tmp_path / "good")
    metadata, tensors = read_parts(tmp_path / "good")
    save_file(tensors, tmp_path / "old", metadata | {"format": "meerkat-mask/1"})
    with pytest.raises(
        MaskError,
        match=r"not of format meerkat-mask/2, .* \(found format 'meerkat-mask/1'\); create a new one with `meerkat-",
    ):
        SparseMask.load(tmp_path / "old")


def test_the_checksum_is_the_documented_one(tmp_path: Path) -> None:
    import hashlib

    small_mask().save(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__")
    checksum = metadata.pop("checksum")
    rows, body = [], b""
    for name in sorted(header):
        begin, end = header[name]["data_offsets"]
        rows.append([name, header[name]["dtype"], header[name]["shape"]])
        body += data[8 + length + begin : 8 + length + end]
    text = json.dumps([[[key, metadata[key]] for key in sorted(metadata)], rows], separators=(",", ":"))
    assert hashlib.sha256(text.encode("ascii") + b"\n" + body).hexdigest() == checksum


def test_unwritable_strings_and_unreadable_paths_are_named(tmp_path: Path) -> None:
    mask = small_mask()
    unencodable = SparseMask(ids=mask.ids, table=mask.table, density=0.375, source="a file \udcff")
    with pytest.raises(MaskError, match=r"cannot write the mask .* cannot be encoded as UTF-8"):
        unencodable.save(tmp_path / "m")
    for path, message in ((tmp_path, "it is a directory"), (tmp_path / "m", "No such file")):
        with pytest.raises(MaskError, match=f"cannot read the mask '{path}': .*{message}"):
            SparseMask.load(path)


@pytest.mark.parametrize("existing", ["text", "weights", "delta", "damaged mask"])
def test_saving_a_mask_does_not_replace_another_file(tmp_path: Path, existing: str) -> None:
    mask, path = small_mask(), tmp_path / "m"
    if existing == "text":
        path.write_text("notes")
    elif existing == "damaged mask":
        mask.save(path)
        path.write_bytes(path.read_bytes()[:-20])
    else:
        metadata = {"format": "meerkat-delta/1"} if existing == "delta" else None
        save_file({"ids": mask.ids}, path, metadata)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"cannot write .*m: another file is there, which is not replaced"):
        mask.save(path)
    assert path.read_bytes() == before


def test_saving_a_mask_replaces_a_mask_of_any_version(tmp_path: Path) -> None:
    mask, path = small_mask(), tmp_path / "m"
    save_file({"ids": mask.ids}, path, {"format": "meerkat-mask/1"})
    for _ in range(2):
        mask.save(path)
        assert same_mask(SparseMask.load(path), mask)
