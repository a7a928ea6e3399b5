"""The summary of the program's results, as a page in Markdown."""

import json
from pathlib import Path
from typing import Any

from ..tables import amount, table

PROGRAM, SUMMARY = "program.json", "summary.md"
DONE = "done"
STOPPED = ("failed", "out of time")
_PUBLISHED = (
    "A published figure for OPT-1.3B, SST-2, batch 16, by a trainer on vLLM that is not bit-exact: 18 ms a step "
    "(its baseline 52 ms). It is not ours, and not of this machine."
)


def markdown(directory: Path) -> str:
    """Returns the page for a directory of results, whichever parts there are."""
    program = json.loads((directory / PROGRAM).read_text())
    results = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json") if path.name != PROGRAM}
    sections = [
        _machine(program, results.get("machine", {})),
        _outcomes(program["parts"]),
        _bits(program["parts"], results),
        _sweep(results.get("sweep", {}).get("rows", [])),
        _steps([row for name in ("steps", "compiled") for row in results.get(name, {}).get("rows", [])]),
        _memory(directory / "memory" / "result.md"),
        _pipeline(results.get("pipeline", {})),
        _profile(program["parts"].get("ncu", {}), results.get("ncu", {})),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _machine(program: dict[str, Any], machine: dict[str, Any]) -> str:
    if not machine:
        return f"{program['device']}, {program['date']}"
    named = [f"commit {machine['commit'][:7]}", program["date"]]
    named += [f"{name} {value}" for name, value in {**machine["versions"], **machine["nvidia_smi"]}.items()]
    return f"{machine['machine']['device']}: {', '.join(named)}."


def _memory(page: Path) -> str:
    return page.read_text().strip() if page.is_file() else ""


def _outcomes(parts: dict[str, Any]) -> str:
    lines = [[name, part["outcome"], f"{part['seconds']:.0f} s" if "seconds" in part else ""]
             for name, part in parts.items()]  # fmt: skip
    ends = [
        f"{name} ended with:\n\n```\n{part['end_of_output'][-1000:].strip()}\n```"
        for name, part in parts.items()
        if part["outcome"] in STOPPED
    ]
    return "\n\n".join([table(["part", "outcome", "time"], lines), *ends])


def _bits(parts: dict[str, Any], results: dict[str, Any]) -> str:
    lines = []
    if "end_of_output" in parts.get("tests", {}):
        lines.append(["tests", parts["tests"]["end_of_output"].strip().rpartition("\n")[2].strip("= ")])
    if words := results.get("words", {}).get("words"):
        differing = ", ".join(f"{name} {words[name]}" for name in ("radius", "sine", "cosine"))
        lines.append([f"of {words['words']:,} words differ", differing])
    for name in ("captured", "eager"):
        if run := results.get("runs", {}).get(name):
            lines.append([f"embedded run, {name}, replayed on the CPU", run["replay_on_the_cpu"]])
    if "same_ledger" in results.get("runs", {}):
        same = results["runs"]["same_ledger"]
        lines.append(["embedded run, captured and eager", "the same ledger" if same else "other ledgers"])
    return table(["bits", "found"], lines) if lines else ""


def _sweep(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        times = [f"{row[name] * 1e6:,.1f}" if name in row else "" for name in ("cold", "captured", "host")]
        if "failed" in row:
            times[0] = f"no numbers: {row['failed']}"
        lines.append([row["model"], f"{row['density']:g}", f"{row['elements']:,}", row["operation"], str(row["steps"]),
                      row["config"], *times])  # fmt: skip
    columns = ["model", "density", "elements", "operation", "steps", "block x warps", "cold, us", "captured, us",
               "host, us"]  # fmt: skip
    return table(columns, lines) if lines else ""


def _steps(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        name = row["row"]
        if "captured" in name and row.get("not_captured"):
            name += f" (not captured: {row['not_captured']})"
        numbers = [f"no numbers: {row['failed']}", "", ""] if "failed" in row else [
            f"{row['seconds'] * 1e3:.2f}", f"{row['host'] * 1e3:.2f}",
            amount(row["peak_bytes"]) if "peak_bytes" in row else "",
        ]  # fmt: skip
        lines.append([row["model"], f"{row['batch']} x {row['lengths']}", name, *numbers])
    columns = ["model", "batch x tokens", "row", "ms a step", "host, ms", "peak of the memory"]
    return f"{table(columns, lines)}\n\n{_same_scalars(rows)}\n\n{_PUBLISHED}" if lines else ""


def _same_scalars(rows: list[dict[str, Any]]) -> str:
    """How often captured and eager steps gave the same scalars, to the bit."""
    scalars: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        if row["row"] in ("meerkat, captured", "meerkat, eager") and "scalars" in row:
            scalars.setdefault((row["model"], row["lengths"]), []).append(row["scalars"])
    pairs = [pair for pair in scalars.values() if len(pair) == 2]
    same = sum(captured == eager for captured, eager in pairs)
    return f"Captured and eager steps have the same scalars in {same} of {len(pairs)} cases."


def _pipeline(results: dict[str, Any]) -> str:
    lines = [
        [name, f"{1 / min(run['seconds_per_step_by_round']):.1f}", run["replay_on_the_cpu"]]
        for name in ("captured", "eager")
        if (run := results.get(name))
    ]
    columns = ["a run on a checkpoint of random weights", "steps a second, fastest round", "replayed on the CPU"]
    return table(columns, lines) if lines else ""


def _profile(part: dict[str, Any], result: dict[str, Any]) -> str:
    """What ncu counted for a perturbation, beside what it must move."""
    counted = [line.strip() for line in part.get("end_of_output", "").splitlines() if "__" in line and ".sum" in line]
    if not counted or "must_move_bytes" not in result:
        return ""
    return f"A perturbation must move {amount(result['must_move_bytes'])}; ncu counts: {'; '.join(counted)}"


__all__ = ["DONE", "PROGRAM", "STOPPED", "SUMMARY", "markdown"]
