"""Weights in few bits: what a format holds, and that quantizing loses what it must and no more."""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.frozen.quantized import Int8Stored, Nf4Stored, TorchaoStored
from meerkat_engine.engine.frozen.stored import PlainStored, Stored

from helpers.constants import CPU, DTYPES
from helpers.tensors import same_bits

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FORMATS: dict[str, Callable[[Tensor], Stored]] = {
    "plain": PlainStored,
    "nf4": Nf4Stored.quantize,
    "int8": Int8Stored.quantize,
    "torchao": TorchaoStored.quantize,
}
QUANTIZED = [name for name in FORMATS if name != "plain"]
PACKAGES = {"nf4": "bitsandbytes", "int8": "bitsandbytes", "torchao": "torchao"}
SHAPES = [(4, 64), (3, 5), (1, 1), (128, 256)]
NF4_LEVELS = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip  # QLoRA, appendix E


def make(name: str, values: Tensor) -> Stored:
    if name in PACKAGES:
        pytest.importorskip(PACKAGES[name], reason="needs the extra quantize")
    return FORMATS[name](values)


def matrix(rows: int, columns: int) -> Tensor:
    """Random weights with a row of zeros."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    values[rows // 2] *= float(rows == 1)
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_dense_values_are_new_and_rounded_once(name: str, shape: tuple[int, int]) -> None:
    values = matrix(*shape)
    before, stored = values.clone(), make(name, values)
    dense = stored.dense(torch.float32, CPU)
    assert stored.shape == values.shape == dense.shape
    assert dense.is_contiguous()
    assert dense.isfinite().all()
    for dtype in DTYPES:
        assert same_bits(stored.dense(dtype, CPU), dense.to(dtype))
        index = torch.tensor([shape[0] - 1, 0, 0])
        assert same_bits(stored.rows(index, dtype, CPU), dense[index].to(dtype))
    dense.zero_()  # whoever gets them may write them
    assert same_bits(values, before)
    assert shape == (1, 1) or stored.dense(torch.float32, CPU).any()
    assert stored.to(CPU) is stored
    with pytest.raises(IndexError):
        stored.rows(torch.tensor([-1]), torch.float32, CPU)


@pytest.mark.parametrize("name", FORMATS)
def test_they_are_quantized_from_their_values_whatever_holds_them(name: str) -> None:
    wide = matrix(32, 48).bfloat16().float()
    expected = make(name, wide).dense(torch.float32, CPU)
    for held in (wide.bfloat16(), wide.t().contiguous().t()):
        assert same_bits(make(name, held).dense(torch.float32, CPU), expected)
    with torch.inference_mode():
        made = make(name, wide.bfloat16())
    assert same_bits(made.dense(torch.float32, CPU), expected)
    assert not made.dense(torch.float32, CPU).is_inference()


def test_bytes_of_each_format() -> None:
    values, size = matrix(128, 256), 128 * 256
    assert PlainStored(values).nbytes == 2 * PlainStored(values.bfloat16()).nbytes == 4 * size
    assert make("nf4", values).nbytes == size // 2 + size // 64 * 4 + 16 * 4
    assert make("int8", values).nbytes == size + 128 * 4
    assert size + 128 * 4 <= make("torchao", values).nbytes <= size + 2 * 128 * 4
    assert [make(name, values).format for name in FORMATS] == ["float32", "nf4", "int8", "torchao Int8Tensor"]


def test_nf4_takes_the_nearest_of_its_levels() -> None:
    values = matrix(8, 64)
    scaled = values.view(-1, 64) / values.view(-1, 64).abs().amax(1, keepdim=True).clamp(min=1e-30)
    nearest = (scaled[..., None] - NF4_LEVELS).abs().argmin(-1)
    expected = NF4_LEVELS[nearest] * values.view(-1, 64).abs().amax(1, keepdim=True)
    torch.testing.assert_close(make("nf4", values).dense(torch.float32, CPU), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["int8", "torchao"])
def test_int8_is_at_most_half_a_step_of_the_row_away(name: str) -> None:
    values = matrix(16, 64).half().float()
    step = values.abs().amax(1, keepdim=True) / 127
    assert ((make(name, values).dense(torch.float32, CPU) - values).abs() <= step * 0.502).all()


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_missing_package_is_named_with_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = {"bitsandbytes": "bitsandbytes.functional", "torchao": "torchao.quantization"}[PACKAGES[name]]
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(
        ConfigError, match=rf"needs the package {PACKAGES[name]} .*pip install .*'\.\[(quantize|torchao)\]'"
    ):
        FORMATS[name](matrix(4, 64))
