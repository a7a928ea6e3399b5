"""Weights in 4 or 8 bits, by the formats of bitsandbytes, torchao and GGUF files. Their libraries dequantize them."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..extras import install_hint
from .stored import Stored, moved


class Nf4Stored(Stored):
    """4 bits a weight, by bitsandbytes: one of 16 levels, and the largest absolute value of each block of weights.

    ``quantize`` takes NormalFloat levels (NF4), and blocks of 64 weights with a float32 each. A checkpoint may be
    quantized in another way: to 4-bit floats (FP4), or with the float32 quantized too (double quantization).

    Args:
        packed: two weights a byte, uint8 [n / 2, 1].
        state: bitsandbytes' ``QuantState``.

    References:
        QLoRA, arXiv 2305.14314, section 3.
    """

    def __init__(self, packed: Tensor, state: Any) -> None:
        self.packed, self.state, self.shape = packed.detach(), state, torch.Size(state.shape)
        self.format = str(state.quant_type)

    @classmethod
    def quantize(cls, values: Tensor) -> "Nf4Stored":
        """Quantizes a matrix."""
        packed, state = _bitsandbytes().quantize_4bit(values.float(), blocksize=64, quant_type="nf4")
        return cls(packed, state)

    def to(self, device: torch.device) -> Stored:
        """See ``Stored``."""
        return self if self.packed.device == device else Nf4Stored(self.packed.to(device), self._state_on(device))

    def pinned(self) -> Stored:
        """See ``Stored``."""
        state = copy.copy(self.state)
        state.absmax = state.absmax.pin_memory()
        return Nf4Stored(self.packed.pin_memory(), state)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ``Stored``."""
        own = (self.packed, self.state.absmax, self.state.code)
        return own if self.state.state2 is None else (*own, self.state.state2.absmax, self.state.state2.code)

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        state = self._state_on(device)
        state.dtype = dtype
        return _bitsandbytes().dequantize_4bit(moved(self.packed, device), state)  # type: ignore[no-any-return]

    def _state_on(self, device: torch.device) -> Any:
        """A copy of the state on a device."""
        state = copy.copy(self.state)
        if state.state2 is not None:
            state.state2 = copy.copy(state.state2)
        state.to(device)
        return state


_ONE = 7.874015718698502e-3  # 1 / 127


class Int8Stored(Stored):
    """8-bit integers of bitsandbytes: each row scaled by its largest absolute value.

    Args:
        integers: int8 [rows, columns].
        scales: largest absolute value of each row, float32 [rows].

    References:
        LLM.int8(), arXiv 2208.07339, section 3, of weights alone: activations are not quantized.
    """

    format = "int8"

    def __init__(self, integers: Tensor, scales: Tensor) -> None:
        self.integers, self.scales, self.shape = integers.detach(), scales.detach(), integers.shape

    @classmethod
    def quantize(cls, values: Tensor) -> "Int8Stored":
        """Quantizes a matrix, from its values in float16, as bitsandbytes does."""
        half = values.half()
        if not half.isfinite().all():
            raise ConfigError(
                f"a matrix {tuple(values.shape)} has values beyond float16, in which bitsandbytes quantizes to int8; "
                f"use nf4 or torchao-int8"
            )
        integers, scales, _ = _bitsandbytes().int8_vectorwise_quant(half)
        return cls(integers, scales)

    def to(self, device: torch.device) -> Stored:
        """See ``Stored``."""
        if self.integers.device == device:
            return self
        return Int8Stored(self.integers.to(device), self.scales.to(device))

    def pinned(self) -> Stored:
        """See ``Stored``."""
        return Int8Stored(self.integers.pin_memory(), self.scales.pin_memory())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ``Stored``."""
        return self.integers, self.scales

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        # The bits of bitsandbytes' int8_vectorwise_dequant, which holds two such tensors at once.
        dense = moved(self.integers, device).float().mul_(moved(self.scales, device).view(-1, 1))
        return dense.mul_(_ONE).to(dtype)  # type: ignore[no-any-return]

    def rounded(self, values: Tensor, offsets: Tensor) -> Tensor:
        """See ``Stored``. The scales stay, so values beyond the largest one of their row become that one."""
        scales = moved(self.scales, values.device)[offsets // self.shape[1]]
        integers = (values / (scales * _ONE)).round_().clamp_(-127, 127).nan_to_num_(0)  # a row of zeros has scale 0
        # In the order of ``dense``.
        return integers.mul_(scales).mul_(_ONE)  # type: ignore[no-any-return]


class TorchaoStored(Stored):
    """A quantized tensor of torchao, of any of its formats that can be dequantized.

    Args:
        quantized: the tensor.
    """

    def __init__(self, quantized: Any) -> None:
        self.quantized, self.shape = quantized.detach(), quantized.shape
        self.format = f"torchao {type(quantized).__name__}"

    @classmethod
    def quantize(cls, values: Tensor) -> "TorchaoStored":
        """Quantizes a matrix to 8-bit integers, each row with its own scale."""
        try:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(f"this format needs the package torchao ({error}); {install_hint('torchao')}") from error
        with torch.device("meta"):
            layer = torch.nn.Linear(1, 1, bias=False)
        layer.weight = torch.nn.Parameter(values.float(), requires_grad=False)
        quantize_(layer, Int8WeightOnlyConfig())
        return cls(layer.weight.data)

    def to(self, device: torch.device) -> Stored:
        """See ``Stored``."""
        return self if self.quantized.device == device else TorchaoStored(self.quantized.to(device))

    def pinned(self) -> Stored:
        """See ``Stored``. Not every format of torchao can be pinned; a copy to the device then waits."""
        return self

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ``Stored``."""
        names, _ = self.quantized.__tensor_flatten__()
        return tuple(getattr(self.quantized, name) for name in names)

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        return moved(self.quantized, device).dequantize().to(dtype)  # type: ignore[no-any-return]


class GgufStored(Stored):
    """The blocks of a GGUF file, as the file has them.

    Args:
        blocks: uint8 [rows, bytes of a row].
        type: number of the block type in ggml.
        name: name of the block type, for people.
        columns: number of weights of a row.
    """

    def __init__(self, blocks: Tensor, type: int, name: str, columns: int) -> None:
        self.blocks, self._type, self._name = blocks, type, name
        self.shape, self.format = torch.Size((blocks.shape[0], columns)), f"GGUF {name}"

    def to(self, device: torch.device) -> Stored:
        """See ``Stored``."""
        if self.blocks.device == device:
            return self
        return GgufStored(self.blocks.to(device), self._type, self._name, self.shape[1])

    def pinned(self) -> Stored:
        """See ``Stored``."""
        return GgufStored(self.blocks.pin_memory(), self._type, self._name, self.shape[1])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See ``Stored``."""
        return (self.blocks,)

    def dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        return self._dequantize(moved(self.blocks, device), dtype)

    def rows(self, index: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See ``Stored``."""
        rows = functional.embedding(moved(index, self.blocks.device), self.blocks)
        return self._dequantize(moved(rows, device), dtype)

    def _dequantize(self, blocks: Tensor, dtype: torch.dtype) -> Tensor:
        """Dequantizes rows in float32, as transformers does when it loads the file."""
        dense = _gguf_dequant().dequantize(blocks, self._type, torch.float32)
        return dense.reshape(blocks.shape[0], self.shape[1]).to(dtype)  # type: ignore[no-any-return]

    @staticmethod
    def supports(type: int) -> bool:
        """Whether blocks of a type can be dequantized."""
        return type in _gguf_dequant().GGML_BLOCK


def _gguf_dequant() -> Any:
    try:
        from transformers.integrations.gguf import dequant
    except ImportError as error:
        raise ConfigError(
            f"keeping the blocks of a GGUF file needs transformers 5.23 or later ({error}); upgrade it"
        ) from error
    return dequant


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise ConfigError(
            f"this format needs the package bitsandbytes ({error}); {install_hint('quantize')}"
        ) from error
    return bitsandbytes.functional


__all__ = ["GgufStored", "Int8Stored", "Nf4Stored", "TorchaoStored"]
