"""``meerkat-engine``: the command line."""

import dataclasses
import datetime
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from .. import __version__
from ..bench.command import bench
from ..errors import ConfigError, MeerkatError
from . import setup
from .config import Method, RunConfig, make_config, read_toml
from .replaying import replay_run
from .report import write_report
from .run import Progress, execute
from .task_choice import chosen_task

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
    "method": "which elements are trained: " + ", ".join(Method),
    "clients": "number of clients K",
    "rounds": "number of rounds R",
    "local_steps": "local steps T of a client in a round",
    "partition": "how examples are dealt to clients: iid, dirichlet, single-label, natural",
    "alpha": "concentration of the dirichlet partition",
    "client_field": "field that names the client of an example, for natural clients [default: the task's]",
    "weighting": "how clients count: examples, uniform",
    "batch_size": "examples of a step",
    "objective": "loss: candidates (cross-entropy over the label words), language-model (answer tokens)",
    "lr": "learning rate",
    "eps": "perturbation scale",
    "density": "share of the elements that are trained, in (0, 1]",
    "mask": "mask file; skips calibration",
    "calibration": "JSON Lines with the field text [default: DATA_DIR/c4_sample/train.jsonl, else the hub's C4]",
    "calibration_texts": "calibration texts",
    "calibration_batch_size": "texts of one gradient",
    "calibration_length": "tokens of a calibration text, at most",
    "max_length": "tokens of prompt and answer, at most",
    "eval_every": "rounds between evaluations; 0: before and after only",
    "eval_examples": "validation examples; 0: all",
    "seed": "root seed",
    "device": "cpu or cuda",
    "dtype": "float32, bfloat16 or float16",
    "backend": "auto, torch, numba or triton",
}


class _Group(click.Group):
    """Turns the engine's errors into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeerkatError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            raise click.ClickException(
                f"cannot write or read {error.filename or 'a file'}: {error.strerror}"
            ) from error


def _settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Options for some settings (all, if none is named); they reach the command as ``settings``."""
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(names or tuple(fields)):
            default = fields[name].default
            kind = type(default) if isinstance(default, (int, float)) else str
            shown = "" if default is None or name in ("model", "task") else f" [default: {default}]"
            option = click.option(
                "--" + name.replace("_", "-"), name, type=kind, default=None, help=_HELP[name] + shown
            )
            command = option(command)
        return click.option(
            "--config", "config_file", type=click.Path(path_type=Path), help="TOML file of settings; options go first"
        )(command)

    return decorate


def _config(config_file: Path | None, options: dict[str, Any]) -> RunConfig:
    given = {name: value for name, value in options.items() if value is not None}
    return make_config(read_toml(config_file) if config_file else {}, given)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meerkat-engine")
def main() -> None:
    """Sparse zeroth-order fine-tuning of language models, federated by scalars alone."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


@main.command()
@_settings()
@click.option("--output", type=click.Path(path_type=Path), help="new run directory [default: runs/TASK-METHOD-TIME]")
@click.option("--compare-random", is_flag=True, help="run a random mask of the same size beside it")
def run(config_file: Path | None, output: Path | None, compare_random: bool, **options: Any) -> None:
    """Fine-tunes a model across simulated clients and writes a run directory."""
    config = _config(config_file, options)
    if output is None:
        output = Path("runs") / f"{chosen_task(config).name}-{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if compare_random and config.mask is not None:
        raise ConfigError("--compare-random makes its own mask; leave --mask out")
    summary = _run(config, output)
    if compare_random:
        click.echo(f"\nThe same with a random mask of {summary['masked_elements']} elements:")
        other = _run(dataclasses.replace(config, method=Method.RANDOM_MASK), output / "random-mask")
        click.echo(
            f"\naccuracy after   {config.method} {summary['accuracy_after']:.4f}   random {other['accuracy_after']:.4f}"
        )


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="also save the model here, as a Hugging Face checkpoint"
)
def replay(directory: Path, output: Path | None) -> None:
    """Rebuilds a run's model from base, mask and ledger, and checks its bits against the run's."""
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already; choose another directory, nothing was changed")
    done = replay_run(directory)
    click.echo(f"replayed {done.rounds} rounds; weights {done.weights}")
    if done.recorded is None:
        click.echo("the run did not finish: no fingerprint to compare with")
    elif done.recorded == done.weights:
        click.echo("the same bits as at the end of the run")
    else:
        raise MeerkatError(f"the run ended with other weights: {done.recorded}")
    if output is not None:
        done.lm.model.save_pretrained(output)  # type: ignore[operator]
        done.lm.tokenizer.save_pretrained(output)
        click.echo(f"saved to {output}")


@main.command()
@_settings("model", "data_dir", "method", "density", "calibration", "calibration_texts", "calibration_batch_size",
           "calibration_length", "seed", "device", "dtype")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), required=True, help="mask file to write")
def mask(config_file: Path | None, output: Path, **options: Any) -> None:
    """Builds a mask and saves it."""
    if output.exists():
        raise ConfigError(f"{output} exists already; choose another file, nothing was changed")
    given = {name: value for name, value in options.items() if value is not None}
    settings = read_toml(config_file) if config_file else {}
    if "model" in given and "data" not in settings:
        given["task"] = "sst2"  # a mask needs no task; any known name passes
    config = make_config(settings, given)
    setup.check_files(config)
    made = setup.make_mask(config, setup.load_language_model(config))
    made.save(output)
    click.echo(f"{len(made)} of {made.table.size} elements ({made.source}; {made.calibration or 'no calibration'})")
    click.echo(f"digest {made.digest}\nsaved to {output}")


@main.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="new file [default: RUN/report.html; several: report.html]"
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Makes one HTML page, figures included, of one or several run directories."""
    click.echo(f"wrote {write_report(list(runs), output)}")


main.add_command(bench)


def _run(config: RunConfig, output: Path) -> dict[str, Any]:
    with tqdm(total=config.rounds, unit="round", disable=None) as bar:

        def report(progress: Progress) -> None:
            bar.n = progress.round
            fields = {"loss": f"{progress.loss:.4f}"}
            if progress.accuracy is not None:
                known["accuracy"] = f"{progress.accuracy:.4f}"
            fields |= known | {"steps/s": f"{progress.steps_per_second:.2f}", "bytes": _amount(progress.bytes)}
            bar.set_postfix(fields)

        known: dict[str, str] = {}
        summary = execute(config, output, report, bar.write if not bar.disable else click.echo)
    _print_summary(summary, output)
    return summary


def _print_summary(s: dict[str, Any], output: Path) -> None:
    full = s["bytes_each_way_if_weights_were_sent"]
    click.echo(f"accuracy        {s['accuracy_before']:.4f} before, {s['accuracy_after']:.4f} after "
               f"({s['validation_examples']} held-out examples); "
               f"macro-F1 {s['macro_f1_before']:.4f}, {s['macro_f1_after']:.4f}")  # fmt: skip
    if s["truncated_train"] or s["truncated_validation"]:
        click.echo(f"cut to fit      {s['truncated_train']} training examples, "
                   f"{s['truncated_validation']} held-out examples (--max-length)")  # fmt: skip
    click.echo(f"trained         {s['masked_elements']:,} of {s['elements']:,} elements in {s['steps']:,} local steps")
    for way in ("up", "down"):
        sent = s[f"bytes_{way}"]
        click.echo(f"bytes {way:<9} {_amount(sent)}; sending the weights would have cost {_amount(full)} "
                   f"({full / sent:,.0f} times as much)")  # fmt: skip
    click.echo(
        f"mask            {_amount(s['mask_bytes'])} of ids to each client once, unless it calibrates for itself"
    )
    share = s["forward_share_of_step"]
    click.echo(
        f"time per step   {s['seconds_per_step'] * 1e3:.1f} ms: forward {share:.1%}, everything else {1 - share:.1%}"
    )
    click.echo(f"run directory   {output}")


def _amount(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    main()
