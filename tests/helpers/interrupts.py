"""Raises KeyboardInterrupt wherever Python can deliver a signal, one place at a time."""

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from helpers.imports import ROOT

# Python looks for signals when a function starts, after a call, and when a loop jumps back.
_AFTER = {"CALL", "CALL_FUNCTION_EX", "CALL_KW"}
_AT = {"JUMP_BACKWARD"}
_CODE = tuple(str(ROOT / folder) for folder in ("engine", "triton_kernels", "fed"))


class Interrupts:
    """Counts the places at which a signal can arrive, and raises at chosen ones.

    Args:
        at: numbers of the places to interrupt, counted from 0 in the order of execution.

    Attributes:
        functions: name of the function of each place that was reached.
    """

    def __init__(self, *at: int) -> None:
        self.at = set(at)
        self.functions: list[str] = []
        self._previous: dict[FrameType, str] = {}

    @property
    def seen(self) -> int:
        """Number of places that were reached."""
        return len(self.functions)

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        """Trace function, see ``sys.settrace``."""
        if not frame.f_code.co_filename.startswith(_CODE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        here = event == "call"
        if event == "opcode":
            name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            here = name in _AT or self._previous.get(frame) in _AFTER
            self._previous[frame] = name
        if here:
            self.functions.append(frame.f_code.co_qualname)
            if self.seen - 1 in self.at:
                raise KeyboardInterrupt(f"{frame.f_code.co_qualname}, line {frame.f_lineno}")
        return self.trace

    @contextmanager
    def active(self) -> Iterator["Interrupts"]:
        """Context in which interrupts are counted and raised."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            yield self
        finally:
            sys.settrace(before)


__all__ = ["Interrupts"]
