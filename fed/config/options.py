"""The settings of a run as options of a command."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import click

from ..aggregation import Rule
from ..methods import Method
from ..partition import Partition
from ..terms import Schedule
from .run_config import RunConfig, read_toml

_HELP = {
    "model": "Hugging Face id, directory or GGUF file [default: the embedded model]",
    "task": "task to fine-tune for [default: the embedded task]",
    "data_dir": "directory with TASK/{train,validation}.jsonl [default: the hub's copy]",
    "data": "JSON Lines of your own, in place of a task; needs --template and --labels",
    "validation": "JSON Lines to evaluate on [default: a fifth of --data, held out]",
    "template": "the prompt for --data, its fields in braces: '{text} It was'",
    "labels": "the label words for --data, one per class, separated by commas: terrible,great",
    "label_field": "field of --data with the class (a number from 0) or the label word",
    "cut": "field of --data that is cut where a prompt is too long [default: the template's first]",
    "method": "one of " + ", ".join(Method),
    "clients": "number of clients K",
    "clients_per_round": "clients sampled for a round; 0: all",
    "rounds": "number of rounds R",
    "local_steps": "local steps T of a client in a round",
    "partition": "how examples are dealt to clients: " + ", ".join(Partition),
    "alpha": "concentration of the dirichlet partition",
    "client_field": "field that names the client of an example, for natural clients [default: the task's]",
    "weighting": "how clients count: examples, uniform",
    "aggregation": "what is made of the scalars of a step: " + ", ".join(Rule),
    "trim": "trimmed-mean: share cut from each end, in (0, 0.5)",
    "clip": "size to which scalars are cut before they are aggregated; 0: none",
    "max_scalar": "size above which a scalar is refused",
    "max_examples": "number of examples above which a client's claim is refused; 0: any is believed",
    "attack": "what hostile clients do to their scalars, to try it: none, sign-flip (times -1), scale (times 1e6)",
    "attackers": "how many clients do it, the last ones",
    "dp_noise": "differential privacy: noise multiplier of the scalars; 0: none",
    "dp_clip": "differential privacy: what one example may change of a difference of losses",
    "dp_delta": "differential privacy: delta",
    "batch_size": "examples of a step; with --dp-noise their expected number",
    "micro_batch_size": "examples of one forward pass; 0: the whole batch",
    "objective": "loss: candidates (cross-entropy over the label words), language-model (answer tokens)",
    "lr": "learning rate of the first step",
    "schedule": "how it falls over the run: " + ", ".join(Schedule),
    "queries": "perturbations of a step [decomfl: 5]",
    "eps": "perturbation scale",
    "density": "share of the elements that are trained, in (0, 1]",
    "mask": "mask file; skips calibration",
    "calibration": "JSON Lines with the field text [default: DATA_DIR/c4_sample/train.jsonl, else the hub's C4]",
    "calibration_texts": "calibration texts",
    "calibration_batch_size": "texts of one gradient",
    "calibration_length": "tokens of a calibration text, at most",
    "max_length": "tokens of prompt and answer, at most",
    "layer": "layer-zo: dotted name of a module [default: the transformer block with the largest gradient]",
    "lora_rank": "lora-fedzo: rank of the adapters",
    "lora_alpha": "lora-fedzo: scale times rank",
    "lora_targets": "lora-fedzo: modules, separated by commas [default: the architecture's usual ones]",
    "vp_steps": "meerkat-vp: steps T_cali of the path by which a client is judged",
    "vp_initial": "meerkat-vp: its first steps that are compared with its last",
    "vp_later": "meerkat-vp: its last steps",
    "vp_rho_later": "meerkat-vp: threshold of rho_later [default: from paths on held-out examples]",
    "vp_rho_quie": "meerkat-vp: threshold of rho_quie [default: likewise]",
    "vp_sigma": "meerkat-vp: |GradIP| below which a step is quiet [default: likewise]",
    "vp_null_paths": "meerkat-vp: how many such paths",
    "eval_every": "rounds between evaluations; 0: before and after only",
    "eval_examples": "validation examples; 0: all",
    "snapshot_every": "rounds between snapshots for --resume; 0: none, it replays the ledger",
    "seed": "root seed",
    "device": "cpu or cuda",
    "dtype": "float32, bfloat16 or float16",
    "backend": "auto, torch, numba or triton",
}


def settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for some settings (all, if none is named); they reach the command as ``settings``."""
    fields, hints = {field.name: field for field in dataclasses.fields(RunConfig)}, get_type_hints(RunConfig)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(fields)):
            default, kinds = fields[name].default, get_args(hints[name]) or (hints[name],)
            kind = next((each for each in kinds if each in (int, float)), str)
            shown = "" if default in (None, "") or name in ("model", "task") else f" [default: {default}]"
            option = click.option(
                "--" + name.replace("_", "-"), name, type=kind, default=None, help=_HELP[name] + shown
            )
            command = option(command)
        return click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="TOML file of settings; options go first"
        )(command)

    return decorate


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def from_file(config_file: Path | None) -> dict[str, Any]:
    """The settings of a file, if there is one."""
    return read_toml(config_file) if config_file else {}


__all__ = ["from_file", "given", "settings"]
