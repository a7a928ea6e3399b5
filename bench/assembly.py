"""Reads machine code: NVIDIA's with cuobjdump, AMD's from the compiler's assembly."""

import re
import subprocess
import tempfile
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import triton

# Kinds of instructions. The first pattern that matches an instruction's name decides its kind.
_NVIDIA = {
    "float64": r"D(ADD|MUL|FMA|SETP)|MUFU\.\w*64\w*",
    "float32": r"F(ADD|MUL|FMA|SEL|SETP|MNMX|CHK)|HSETP2",
    "special": r"MUFU",
    "convert": r"(I2F|I2FP|F2F|F2FP|F2I|HADD2\.F32)",
    "memory": r"(LD|ST|ULDC|ATOM|RED|MEMBAR|ERRBAR|CGAERRBAR|CCTL)",
    "control": r"(BRA|EXIT|BAR|BSSY|BSYNC|NOP|WARPSYNC|CALL|RET|DEPBAR|YIELD)",
    "uniform": r"U[A-Z0-9]+|S2UR|R2UR|VOTEU",
    "move": r"(MOV|CS2R|S2R|P2R|R2P|PLOP3|SHFL|HFMA2\.MMA)",  # HFMA2.MMA loads constants: no half arithmetic
    "integer": r"(IMAD|IADD|LOP|SHF|LEA|ISETP|SEL|PRMT|VIADD|IABS|IMNMX|VIMNMX|SGXT|BMSK|I2I|FLO|POPC)",
}
_AMD = {
    "memory": r"(global|buffer|flat|ds|scratch)_|s_(load|buffer_load|store)",
    "control": r"s_(branch|cbranch|endpgm|waitcnt|nop|barrier|setpc|swappc|getpc|sleep)|s_set_gpr|s_code_end",
    "uniform": r"s_|v_readfirstlane",
    "convert": r"v_cvt",
    "special": r"v_(sqrt|rsq|rcp|log|exp|sin|cos)_",
    "float64": r"v_\w+_f64",
    "float32": r"v_\w+_f32",
    "move": r"v_(mov|accvgpr|swap|perm|readlane|writelane)",
    "integer": r"v_",
}


class Assembly:
    """The machine code of one compiled kernel.

    Args:
        kernel: a compiled kernel, as returned by Triton's compiler.

    Attributes:
        amd: whether the kernel was compiled for an AMD GPU.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self.amd = "amdgcn" in kernel.asm

    @cached_property
    def text(self) -> str:
        """The machine code as text."""
        return str(self._kernel.asm["amdgcn"]) if self.amd else self._cuobjdump("-sass")

    def usage(self) -> tuple[int, int, int]:
        """Returns the registers per thread, the spills, and the local memory per thread in bytes.

        Registers are vector registers on AMD. Spills are instructions on NVIDIA and registers on AMD. Local memory
        includes stack and scratch memory.
        """
        if self.amd:
            spills = self._number(r"\.vgpr_spill_count:\s+(\d+)") + self._number(r"\.sgpr_spill_count:\s+(\d+)")
            return self._number(r"\.vgpr_count:\s+(\d+)"), spills, self._number(r"ScratchSize: (\d+)")
        usage = self._cuobjdump("-res-usage")
        local = self._number(r"LOCAL:(\d+)", usage) + self._number(r"STACK:(\d+)", usage)
        return self._number(r"REG:(\d+)", usage), len(re.findall(r"\b(?:STL|LDL)\b", self.text)), local

    def fused(self) -> int:
        """Returns the number of fused multiply-adds in the machine code plus those in the PTX.

        In the PTX a square root is still one instruction.
        """
        ptx = len(re.findall(r"\bfma\.", self._kernel.asm.get("ptx", "")))
        names = r"\bFFMA\b|\bv_(?:fma|mad|fmac|mac|fmaak|fmamk|madak|madmk)_(?:mix_)?f(?:16|32)"
        return ptx + len(re.findall(names, self.text)) + 2 * len(re.findall(r"\bv_pk_(?:fma|mad|fmac)_f32", self.text))

    def square_roots(self) -> int:
        """Returns the number of square roots per thread."""
        # triton 3.6 expands them itself for AMD, each into one rsq and fused operations
        return self._lanes(r"= (?:tail )?call (?:<(\d+) x )?.*(?:sqrt|amdgcn\.rsq)")

    def quotients(self) -> int:
        """Returns the number of float64 divisions per thread."""
        return self._lanes(r"= (?:tail )?call (?:<(\d+) x )?double>? @llvm\.nvvm\.div") + self._lanes(
            r"= fdiv (?:<(\d+) x )?double"
        )

    def _lanes(self, pattern: str) -> int:
        """Number of values that the operations in the LLVM code compute; the group is an operation's vector length."""
        return sum(int(length or 1) for length in re.findall(pattern, self._kernel.asm["llir"]))

    def wide_loads(self) -> int:
        """Returns the number of 16-byte loads per thread from global memory."""
        return len(re.findall(r"\bLDG\.E\.128|(?:global|buffer)_load_dwordx4", self.text))

    def wide_stores(self) -> int:
        """Returns the number of 16-byte stores per thread to global memory."""
        return len(re.findall(r"\bSTG\.E\.128|(?:global|buffer)_store_dwordx4", self.text))

    def mix(self) -> dict[str, int]:
        """Returns the number of instructions of each kind. A loop body counts once; "other" matches no pattern."""
        kinds = _AMD if self.amd else _NVIDIA
        counts = Counter(
            next((kind for kind, pattern in kinds.items() if re.match(pattern, name)), "other")
            for name in self._instructions()
        )
        return {kind: counts[kind] for kind in sorted([*kinds, "other"])}

    def _instructions(self) -> list[str]:
        if self.amd:
            return re.findall(r"^\t([a-z]\w+)\b", self.text.split("\t.section\t.rodata")[0], re.M)
        names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", self.text, re.M)
        return [name for name in names if name != "NOP"]  # NOPs pad the code

    def _cuobjdump(self, option: str) -> str:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self._kernel.asm["cubin"])
            file.flush()
            return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout

    def _number(self, pattern: str, text: str | None = None) -> int:
        match = re.search(pattern, self.text if text is None else text)
        if match is None:
            raise RuntimeError(f"the compiler's output has no match for {pattern!r}")
        return int(match[1])


__all__ = ["Assembly"]
