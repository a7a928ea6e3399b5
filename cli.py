"""``meerkat-engine``: the command line."""

import datetime
import io
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from . import __version__
from .bench.command import bench
from .bench.experiments.command import experiment
from .bench.memory_command import bench_memory
from .bench.scale_command import bench_server
from .bench.tables import table
from .bench.tune.command import tune
from .engine.errors import ConfigError, MeerkatError
from .engine.lm.checkpoint import check_does_not_exist
from .engine.lm.scores import SCORES, scores_in, shown
from .engine.mask import SparseMask
from .engine.mask_coverage import MaskCoverage
from .engine.mask_sets import sparser, united
from .fed.config.options import GroupedCommand, example, given_options, settings, settings_from_file
from .fed.config.run_config import RunConfig, make_config
from .fed.doctor import doctor
from .fed.inference.chat import chat
from .fed.inference.evaluate import evaluate
from .fed.inference.predict import predict
from .fed.methods import Method
from .fed.recipe import recipe
from .fed.report.export import apply_delta, save_run
from .fed.report.page import write_report
from .fed.run.directory import is_run
from .fed.run.execute import check_same_settings, execute, resume
from .fed.run.plan import make_plan, plan_lines
from .fed.run.replay import replay_run
from .fed.run.terminal import show_run
from .fed.setup.data import TaskData, check_files, client_shares, encode
from .fed.setup.mask import make_mask, mask_coverage
from .fed.setup.model import load_language_model, resolved
from .fed.setup.threads import choose_threads
from .fed.torchrun.rank_pool import RankPool
from .fed.torchrun.ranks import torchrun_ranks
from .fed.torchrun.worker_rank import run_worker_rank


class _Group(click.Group):
    """Prints errors of the engine, of the file system and of lack of memory as one line and exits with code 1."""

    def make_context(self, info_name: str | None, args: list[str], *rest: Any, **extra: Any) -> click.Context:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # so that a name outside the console's encoding can be shown
                stream.reconfigure(errors="backslashreplace")
        for argument in args:
            if not _is_text(argument):
                raise click.UsageError(
                    f"the argument {argument!a} is not {sys.getfilesystemencoding()}; rename the file"
                )
        return super().make_context(info_name, args, *rest, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MeerkatError as error:
            raise click.ClickException(" ".join(str(error).splitlines())) from error
        except OSError as error:
            raise click.ClickException(
                f"cannot write or read {error.filename or 'a file'}: {error.strerror or error}"
            ) from error
        except (MemoryError, RuntimeError) as error:
            if not _is_lack_of_memory(error):
                raise
            raise click.ClickException(
                "there is not enough memory; use a smaller --micro-batch-size, --calibration-batch-size or model"
            ) from error


def _is_text(argument: str) -> bool:
    """Whether an argument has no bytes that cannot be decoded, which the operating system allows."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_lack_of_memory(error: Exception) -> bool:
    # on a CPU, torch raises a RuntimeError
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meerkat-engine")
def main() -> None:
    """Sparse zeroth-order fine-tuning of language models, on one machine or federated.

    In a federation, clients and server exchange scalars instead of weights.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


# An option and not a setting, so that no settings file can switch it on.
_trust_remote_code_option = click.option(
    "--trust-remote-code", is_flag=True, help="run Python code that comes with the model, if there is any"
)


@main.command(
    cls=GroupedCommand,
    epilog=example(
        "meerkat-engine run --model HuggingFaceTB/SmolLM2-135M --task sst2 --clients 4 \\",
        "    --partition dirichlet --alpha 0.5 --rounds 20 --output runs/mine",
    ),
)
@settings()
@click.option("--output", type=click.Path(path_type=Path), help="new run directory [default: runs/TASK-METHOD-TIME]")
@click.option("--resume", "resumed", type=click.Path(path_type=Path), metavar="DIR",
              help="resume the run in DIR; if DIR holds no run and settings are given, start one there")  # fmt: skip
@click.option("--compare-random", is_flag=True,
              help="afterwards, run the same settings with a random mask of the same size")  # fmt: skip
@click.option("--dry-run", is_flag=True,
              help="say what the run needs (steps, memory, bytes, time) from a few steps; write nothing")  # fmt: skip
@click.option("--ranks-per-client", type=click.IntRange(min=1), default=1, metavar="N",
              help="under torchrun: processes that share the micro-batches of one client [default: 1]")  # fmt: skip
@_trust_remote_code_option
def run(ranks_per_client: int, trust_remote_code: bool, **options: Any) -> None:
    """Fine-tunes a model across simulated clients and writes a run directory.

    Without --model, the small embedded model is trained, with defaults that suit it in place of those below. Under
    torchrun, all processes share the work: each round's clients are distributed over them.
    """
    with torchrun_ranks(ranks_per_client) as ranks:
        if ranks is None:
            _run_or_resume(trust_remote_code=trust_remote_code, pool=None, **options)
        elif ranks.rank:
            run_worker_rank(ranks, trust_remote_code=trust_remote_code)
        else:
            pool = RankPool(ranks)
            _run_or_resume(trust_remote_code=trust_remote_code, pool=pool, **options)
            pool.end()


def _run_or_resume(
    *,
    config_file: Path | None,
    output: Path | None,
    resumed: Path | None,
    compare_random: bool,
    dry_run: bool,
    trust_remote_code: bool,
    pool: RankPool | None,
    **options: Any,
) -> None:
    """Does the work of ``meerkat-engine run`` in the process that has the server."""
    execution: dict[str, Any] = {"trust_remote_code": trust_remote_code, "pool": pool}
    user_settings = settings_from_file(config_file) | given_options(options)
    if resumed is not None and output is not None:
        raise ConfigError("--resume continues in the run's own directory; leave --output out")
    if resumed is not None and (is_run(resumed) or not user_settings):
        config, output = check_same_settings(user_settings, resumed), resumed
    else:
        config, output = make_config(user_settings), output or resumed
    choose_threads(config.model.source)
    if dry_run:
        if resumed is not None or pool is not None:
            raise ConfigError("--dry-run plans a new run in one process; leave --resume and torchrun out")
        plan = make_plan(config, click.echo, trust_remote_code=trust_remote_code)
        click.echo("\n".join(plan_lines(plan, config)))
        return
    if output is None:
        output = Path("runs") / f"{config.task.name}-{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if compare_random:
        _check_compare_random(resolved(config))
    may_resume = resumed is not None
    options_again = " --compare-random" * compare_random + " --trust-remote-code" * trust_remote_code
    with _resume_command_when_stopped(output, options_again):
        summary = _execute_and_show(config, output, execution, may_resume=may_resume)
        if compare_random:
            _compare_random(config, summary, output, execution, may_resume=may_resume)


@contextmanager
def _resume_command_when_stopped(output: Path, options: str) -> Iterator[None]:
    """Context that, on Ctrl-C, shows the command which continues the run in ``output``."""
    try:
        yield
    except KeyboardInterrupt:
        if is_run(output):
            command = f"meerkat-engine run --resume {shlex.quote(str(output))}{options}"
            click.echo(f"\nstopped; to continue: {command}", err=True)
        raise


def _compare_random(
    config: RunConfig, summary: dict[str, Any], output: Path, execution: dict[str, Any], *, may_resume: bool
) -> None:
    """Runs the settings of a finished run with a random mask, and shows the main score of both."""
    click.echo(f"\nThe same with a random mask of {summary['masked_elements']} elements:")
    random_config = config.replace(method=Method.RANDOM_MASK)
    random_summary = _execute_and_show(random_config, output / "random-mask", execution, may_resume=may_resume)
    title = SCORES[_main_score(summary)].title
    values = f"{config.method} {_score_after(summary)}   random {_score_after(random_summary)}"
    click.echo(f"\n{title} after   {values}   (both at learning rate {config.step.lr:g})")


def _main_score(summary: dict[str, Any]) -> str:
    """Name of the score that the task is judged by."""
    return shown(scores_in(summary, "_after"))[0]


def _score_after(summary: dict[str, Any]) -> str:
    """The main score after training in words, with the number of examples without finite scores if there are any."""
    name, not_scored = _main_score(summary), summary.get("nonfinite_after")
    value = SCORES[name].text(summary[f"{name}_after"])
    return value + (f" ({not_scored} examples not scored)" if not_scored else "")


def _check_compare_random(config: RunConfig) -> None:
    """Raises ``ConfigError`` if a run with these settings cannot be compared with one on a random mask."""
    if config.mask.file is not None:
        raise ConfigError("--compare-random makes its own random mask; leave --mask out")
    if config.method is Method.RANDOM_MASK:
        raise ConfigError("--compare-random compares with a random mask, which random-mask uses anyway; leave it out")
    if not config.method.recipe.differs_only_in_mask:
        raise ConfigError(
            f"--compare-random compares masks only, and {config.method} differs from random-mask in more than its "
            f"mask; leave it out"
        )
    if config.model.dtype != "float32":
        raise ConfigError(
            f"--compare-random needs --dtype float32: a random mask changes the loss by so little that "
            f"{config.model.dtype} rounds it to noise"
        )


def _execute_and_show(
    config: RunConfig, output: Path, execution: dict[str, Any], *, may_resume: bool
) -> dict[str, Any]:
    """Runs the settings in a directory, or resumes the run with these settings that it holds if that is allowed."""
    if may_resume and is_run(output):
        config = resolved(config)
        if check_same_settings({}, output).digest() != config.digest():
            raise ConfigError(f"{output} holds a run with other settings; move it away")
        return show_run(output, lambda report, log: resume(output, report, log, config=config, **execution))
    return show_run(output, lambda report, log: execute(config, output, report, log, **execution))


@main.command(epilog=example("meerkat-engine replay runs/mine --output film-critic"))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path),
              help="also save the model as a Hugging Face checkpoint in this new directory")  # fmt: skip
@click.option("--round", "number", type=int, metavar="R",
              help="stop after round R; 0 gives the base model [default: the last round]")  # fmt: skip
@click.option("--delta", type=click.Path(path_type=Path), help="also save the masked weights alone to this new file")
@click.option("--model", help="path or id of the base model, if it is not where the run's config.toml says")
@_trust_remote_code_option
def replay(
    directory: Path,
    output: Path | None,
    number: int | None,
    delta: Path | None,
    model: str | None,
    trust_remote_code: bool,
) -> None:
    """Rebuilds a run's model from base model, mask and ledger, and compares its bits with the run's."""
    for path in filter(None, (output, delta)):
        check_does_not_exist(path)
    if output is not None and output == delta:
        raise ConfigError(f"--output and --delta both name {output}; nothing was changed")
    replayed = replay_run(directory, round=number, model=model, trust_remote_code=trust_remote_code)
    click.echo(f"replayed {replayed.round} rounds; weights {replayed.weights}")
    if not replayed.is_last_round:
        click.echo(
            f"the ledger continues to round {len(replayed.ledger.rounds)}; only the last round has a fingerprint to "
            f"compare with"
        )
    elif replayed.recorded_weights is None:
        click.echo("the run did not finish: no fingerprint to compare with")
    elif replayed.recorded_weights == replayed.weights:
        click.echo("the same bits as at the end of the run")
    else:
        raise MeerkatError(f"the run ended with other weights: {replayed.recorded_weights}")
    if delta is not None:
        replayed.delta().save(delta)
        click.echo(f"saved {len(replayed.masked.mask)} masked weights to {delta}")
    if output is not None:
        save_run(replayed, output)
        click.echo(f"saved to {output}")


@main.command(epilog=example("meerkat-engine apply round-10.delta --model embedded --output film-critic-10"))
@click.argument("delta_file", metavar="DELTA", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="the base model: Hugging Face id, directory, GGUF file, or 'embedded'")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="new directory for the checkpoint")
@click.option(
    "--onto-plain", is_flag=True, help="apply it to plain weights although the run's were quantized: another model"
)
@_trust_remote_code_option
def apply(delta_file: Path, model: str, output: Path, onto_plain: bool, trust_remote_code: bool) -> None:
    """Applies a delta to its base model and saves the result as a Hugging Face checkpoint.

    `meerkat-engine replay RUN --delta FILE` writes a delta.
    """
    delta = apply_delta(delta_file, model, output, onto_plain=onto_plain, trust_remote_code=trust_remote_code)
    result = "another model than the run's" if onto_plain else f"weights {delta.weights}"
    click.echo(f"applied {len(delta.mask)} weights of round {delta.round} to {model}; {result}")
    click.echo(f"saved to {output}")


@main.command(
    cls=GroupedCommand,
    epilog=example("meerkat-engine mask --model HuggingFaceTB/SmolLM2-135M --output mask.safetensors"),
)
@settings("model", "task", "data_dir", "data", "validation", "dataset", "dataset_config", "dataset_revision",
          "dataset_split", "dataset_validation_split", "template", "labels", "label_field", "answer", "prompt_format",
          "chat_template", "cut", "clients", "partition", "alpha", "client_field", "method", "density", "mask",
          "calibration", "calibration_texts", "calibration_batch_size", "calibration_length", "calibration_elements",
          "layer", "objective", "max_length", "seed", "device", "dtype", "quantize", "offload")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="new file to save the mask to")
@click.option("--check", "checked_tasks", multiple=True, metavar="TASK",
              help="report which share of this task's squared gradient the mask covers; may be repeated")  # fmt: skip
@click.option("--client", type=int, metavar="I",
              help="with --method task-mask: choose it on the examples that a run gives to client I")  # fmt: skip
@click.option("--by-density", is_flag=True, help="with --check: report it for sparser masks, too, down to 1e-5")
@click.option("--beside", multiple=True, type=click.Path(path_type=Path), metavar="FILE",
              help="with --check: report it for this mask file, too; may be repeated")  # fmt: skip
@_trust_remote_code_option
def mask(
    config_file: Path | None,
    output: Path | None,
    checked_tasks: tuple[str, ...],
    client: int | None,
    by_density: bool,
    beside: tuple[Path, ...],
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Chooses a mask and saves it, or measures how well it fits a task."""
    if output is None and not checked_tasks:
        raise ConfigError("give --output FILE to save the mask, or --check TASK to measure how well it fits a task")
    if (by_density or beside) and not checked_tasks:
        raise ConfigError("--by-density and --beside are for the masks that a task is measured on; give --check TASK")
    _check_new(output)
    user_settings = settings_from_file(config_file) | given_options(options)
    chosen_on_task = user_settings.get("method") == Method.TASK_MASK and "mask" not in user_settings
    if client is not None and not chosen_on_task:
        raise ConfigError(f"--client is for a mask chosen on a client's examples; give --method {Method.TASK_MASK}")
    if "model" in user_settings and not user_settings.keys() & {"task", "data", "dataset"}:
        if chosen_on_task:
            raise ConfigError(f"{Method.TASK_MASK} chooses its elements on a task's examples; give --task or --data")
        # The mask does not depend on the task, but RunConfig wants the name of one.
        user_settings["task"] = checked_tasks[0] if checked_tasks else "sst2"
    config = make_config(user_settings)
    if output is not None and not config.method.recipe.elements.uses_density:
        raise ConfigError(
            f"{config.method} needs no mask file: its elements follow from the settings; leave --output out"
        )
    check_files(config)
    choose_threads(config.model.source)
    lm = load_language_model(config, trust_remote_code=trust_remote_code)
    data = encode(config, lm) if chosen_on_task else None
    among = None if data is None or client is None else _examples_of(config, data, client)
    sparse_mask = make_mask(config, lm, None if data is None else data.train, among)
    click.echo(f"{len(sparse_mask)} of {sparse_mask.table.size} elements "
               f"({sparse_mask.source}; {sparse_mask.calibration or 'no calibration'})")  # fmt: skip
    if output is not None:
        sparse_mask.save(output)
        click.echo(f"digest {sparse_mask.digest}\nsaved to {output}")
    masks = _by_density(sparse_mask) if by_density else {"the mask": sparse_mask}
    masks |= {path.name: SparseMask.load(path, lm.model) for path in beside}
    for task in checked_tasks:
        coverages = mask_coverage(config.on_task(task), lm, list(masks.values()))
        if len(masks) > 1:
            click.echo(f"\n{task}\n{_coverage_table(masks, coverages)}")
            continue
        (coverage,) = coverages
        click.echo(f"{task}: holds {coverage.captured:.1%} of the squared gradient (best mask of that size "
                   f"{coverage.best:.1%}, random {coverage.chance:.1%}); {coverage.overlap:.1%} of its elements are in "
                   f"the best mask")  # fmt: skip


def _examples_of(config: RunConfig, data: TaskData, client: int) -> Tensor:
    """Indices of the training examples of a client, int64 [n]."""
    if not 0 <= client < config.clients.count:
        raise ConfigError(f"there is no client {client}: the {config.clients.count} clients have numbers from 0 on")
    return client_shares(config, data)[client]


def _by_density(mask: SparseMask) -> dict[str, SparseMask]:
    """A mask and the sparser ones in it, of 3 and 1 times powers of ten from density 1e-5 on, by their densities."""
    densities = [digit * 10.0**-power for power in range(5, 0, -1) for digit in (1, 3)]
    masks = [*(sparser(mask, density) for density in densities if density < 0.99 * mask.density), mask]
    return {f"density {mask.density:.3g}": mask for mask in masks}


def _coverage_table(masks: Mapping[str, SparseMask], coverages: Sequence[MaskCoverage]) -> str:
    """Table of a task's coverage by several masks."""
    lines = [
        [name, f"{len(mask):,}", *(f"{100 * share:.4g}%" for share in (c.captured, c.best, c.chance, c.overlap))]
        for (name, mask), c in zip(masks.items(), coverages, strict=True)
    ]
    columns = ["mask", "elements", "holds of the squared gradient", "best mask of that size", "random"]
    return table([*columns, "of its elements in the best mask"], lines)


def _check_new(output: Path | None) -> None:
    """Raises ``ConfigError`` if a file to write exists."""
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already; choose another file, nothing was changed")


@main.command(
    "mask-union", epilog=example("meerkat-engine mask-union a.safetensors b.safetensors --output all.safetensors")
)
@click.argument("masks", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--density", type=float,
              help="keep this share of the model's elements: those of the most masks, then those that these masks rank "
              "first [default: keep all elements of the masks]")  # fmt: skip
@click.option("--output", required=True, type=click.Path(path_type=Path), help="new file to save the union to")
def mask_union(masks: tuple[Path, ...], density: float | None, output: Path) -> None:
    """Unites mask files of one model, for example those of clients that each chose one on examples of their own.

    `meerkat-engine mask --method task-mask --data MINE.jsonl ... --output MINE.safetensors` makes a client's mask.
    """
    _check_new(output)
    union = united([SparseMask.load(path) for path in masks], density)
    union.save(output)
    click.echo(f"{len(union)} of {union.table.size} elements ({union.source}; {union.calibration or 'no calibration'})")
    click.echo(f"digest {union.digest}\nsaved to {output}")


@main.command(epilog=example("meerkat-engine report runs/mine runs/other"))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="new HTML file [default: report.html, in the run's directory if there is one run, else in this directory]",
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Writes one HTML page with the tables and figures of one or several runs."""
    click.echo(f"wrote {write_report(list(runs), output)}")


main.add_command(bench)
main.add_command(bench_server)
main.add_command(bench_memory)
main.add_command(experiment)
main.add_command(tune)
main.add_command(chat)
main.add_command(evaluate)
main.add_command(predict)
main.add_command(doctor)
main.add_command(recipe)


if __name__ == "__main__":
    main()
