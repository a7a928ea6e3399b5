"""``gradip.jsonl``: the GradIP values of the clients, one line a round.

Each line ends in a CRC-32 that is continued from the CRC-32 of the round's line in the ledger. So a line that is
damaged, or belongs to other scalars, is found. The file follows from mask and ledger: without it, a run that is resumed
writes it again.
"""

from collections.abc import Mapping
from pathlib import Path

from ...engine.errors import RunError
from ..gradip import Trace
from ..ledger.file import Ledger
from ..ledger.sealed_lines import decode_line, encode_line
from .directory import GRADIP, LEDGER, RunDirectory
from .jsonl import Line, is_number

MEASURES = ("gradip", "norm", "cosine")
_REMEDY = "; delete the file, and `meerkat-engine run --resume` writes it again from mask and ledger"


def append_traces(directory: RunDirectory, round: int, traces: Mapping[int, Trace], ledger_crc: int) -> None:
    """Appends a line to ``gradip.jsonl``, with six digits a number.

    Args:
        directory: the run directory.
        round: number of the round.
        traces: GradIP, gradient norm and cosine of each client's steps in the round.
        ledger_crc: CRC-32 of the round's line in the ledger.

    Raises:
        RunError: if the line cannot be written.
    """
    clients = {
        str(i): {name: [float(f"{x:.6g}") for x in values] for name, values in vars(trace).items()}
        for i, trace in traces.items()
    }
    directory.append(GRADIP, encode_line({"round": round, "clients": clients}, ledger_crc)[0])


def read_gradip(path: Path, ledger: Ledger | None) -> list[Line]:
    """Reads and checks ``gradip.jsonl`` in a run directory.

    Args:
        path: path of the run directory.
        ledger: its ledger; None if there is none.

    Returns:
        The lines, in the order of the ledger's rounds, perhaps of the first rounds only; none if there is no file. A
        last line without its newline is incomplete and left out.

    Raises:
        RunError: if a line is damaged, or does not belong to the ledger.
    """
    file = path / GRADIP
    texts = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
    if not texts:
        return []
    if ledger is None or len(texts) > len(ledger.lines):
        raise RunError(
            f"{file} has {len(texts)} rounds, but {path / LEDGER} only {len(ledger.lines) if ledger else 0}, so the "
            f"ledger is missing or has lost rounds; put it back; nothing was changed"
        )
    lines = []
    for number, (text, record, crc) in enumerate(zip(texts, ledger.lines, ledger.crcs[1:], strict=False), 1):
        line, _ = decode_line(text, crc, f"{file}, line {number}", RunError, _REMEDY)
        if line.get("round") != record.round or not _has_paths(line):
            raise RunError(
                f"{file}, line {number}: not the GradIP values of the clients in round {record.round}{_REMEDY}"
            )
        lines.append(line)
    return lines


def _has_paths(line: Line) -> bool:
    """Whether a line has a list of numbers for each client and measure."""
    clients = line.get("clients")
    return isinstance(clients, dict) and all(
        isinstance(path, dict) and all(isinstance(path.get(m), list) and all(map(is_number, path[m])) for m in MEASURES)
        for path in clients.values()
    )


__all__ = ["MEASURES", "append_traces", "read_gradip"]
