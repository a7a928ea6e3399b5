"""``meerkat-engine``: the command line."""

import datetime
import os
from pathlib import Path
from typing import Any

import click

from . import __version__
from .bench.command import bench
from .bench.experiments.command import experiment
from .bench.scale_command import bench_server
from .engine.errors import ConfigError, MeerkatError
from .engine.lm.checkpoint import check_absent
from .fed.config.options import GroupedCommand, example, from_file, given, settings
from .fed.config.run_config import RunConfig, make_config
from .fed.methods import Method
from .fed.report.export import apply_delta, save_run
from .fed.report.page import write_report
from .fed.run.directory import is_run
from .fed.run.execute import check_same_settings, execute, resume
from .fed.run.replay import replay_run
from .fed.run.terminal import show
from .fed.setup.data import check_files, encode
from .fed.setup.mask import make_mask, mask_coverage
from .fed.setup.model import load_language_model
from .fed.torchrun.rank_pool import RankPool
from .fed.torchrun.ranks import torchrun_ranks
from .fed.torchrun.worker_rank import run_worker_rank


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


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="meerkat-engine")
def main() -> None:
    """Sparse zeroth-order fine-tuning of language models, federated by scalars alone."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()


_trust = click.option(  # an option and no setting: a file cannot ask for it
    "--trust-remote-code", is_flag=True, help="run the code that comes with the model, if it comes with some"
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
              help="go on with the run in DIR; with settings, begin it where there is none yet")  # fmt: skip
@click.option("--compare-random", is_flag=True, help="run a random mask of the same size beside it")
@click.option("--ranks-per-client", type=click.IntRange(min=1), default=1, metavar="N",
              help="under torchrun: processes that share a client's micro-batches [default: 1]")  # fmt: skip
@_trust
def run(ranks_per_client: int, trust_remote_code: bool, **options: Any) -> None:
    """Fine-tunes a model across simulated clients and writes a run directory.

    Without --model, settings that suit the embedded model go before the defaults below. Started by torchrun, the
    clients of a round are dealt to all processes.
    """
    with torchrun_ranks(ranks_per_client) as ranks:
        if ranks is None:
            _serve(trust_remote_code=trust_remote_code, pool=None, **options)
        elif ranks.rank:
            run_worker_rank(ranks, trust_remote_code=trust_remote_code)
        else:
            pool = RankPool(ranks)
            _serve(trust_remote_code=trust_remote_code, pool=pool, **options)
            pool.end()


def _serve(
    *,
    config_file: Path | None,
    output: Path | None,
    resumed: Path | None,
    compare_random: bool,
    trust_remote_code: bool,
    pool: RankPool | None,
    **options: Any,
) -> None:
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code, "pool": pool}
    user = from_file(config_file) | given(options)
    if resumed is not None:
        if output is not None or compare_random:
            raise ConfigError("--resume goes on in the directory of the run; leave --output and --compare-random out")
        if is_run(resumed) or not user:
            check_same_settings(user, resumed)
            show(resumed, lambda report, log: resume(resumed, report, log, **where))
            return
        output = resumed
    config = make_config(user)
    if output is None:
        output = Path("runs") / f"{config.task.name}-{config.method}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if compare_random and config.mask.file is not None:
        raise ConfigError("--compare-random makes its own mask; leave --mask out")
    if compare_random and (config.method is Method.RANDOM_MASK or not config.method.recipe.plain):
        raise ConfigError(f"--compare-random compares masks alone; {config.method} differs in more, or in nothing")
    summary = _run(config, output, where)
    if compare_random:
        click.echo(f"\nThe same with a random mask of {summary['masked_elements']} elements:")
        other = _run(config.replace(method=Method.RANDOM_MASK), output / "random-mask", where)
        click.echo(
            f"\naccuracy after   {config.method} {summary['accuracy_after']:.4f}   random {other['accuracy_after']:.4f}"
            f"   (both at learning rate {config.step.lr:g})"
        )


@main.command(epilog=example("meerkat-engine replay runs/mine --output film-critic"))
@click.argument("directory", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="also save the model here, as a Hugging Face checkpoint"
)
@click.option("--round", "number", type=int, metavar="R", help="stop at the end of this round; 0: the base model")
@click.option("--delta", type=click.Path(path_type=Path), help="also save the masked weights alone to this file")
@click.option("--model", help="the base model, if elsewhere than the run's settings say")
@_trust
def replay(
    directory: Path,
    output: Path | None,
    number: int | None,
    delta: Path | None,
    model: str | None,
    trust_remote_code: bool,
) -> None:
    """Rebuilds a run's model from base, mask and ledger, and checks its bits against the run's."""
    for path in filter(None, (output, delta)):
        check_absent(path)
    if output is not None and output == delta:
        raise ConfigError(f"--output and --delta both name {output}; nothing was changed")
    done = replay_run(directory, round=number, model=model, trust_remote_code=trust_remote_code)
    click.echo(f"replayed {done.round} rounds; weights {done.weights}")
    if not done.last:
        click.echo(f"the ledger goes on to round {len(done.ledger.rounds)}: no fingerprint to compare with")
    elif done.recorded is None:
        click.echo("the run did not finish: no fingerprint to compare with")
    elif done.recorded == done.weights:
        click.echo("the same bits as at the end of the run")
    else:
        raise MeerkatError(f"the run ended with other weights: {done.recorded}")
    if delta is not None:
        done.delta().save(delta)
        click.echo(f"saved {len(done.masked.mask)} masked weights to {delta}")
    if output is not None:
        save_run(done, output)
        click.echo(f"saved to {output}")


@main.command(epilog=example("meerkat-engine apply round-10.delta --model embedded --output film-critic-10"))
@click.argument("delta", type=click.Path(path_type=Path))
@click.option("--model", required=True, help="the base model: Hugging Face id, directory, GGUF file, or embedded")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="directory of the new checkpoint")
@_trust
def apply(delta: Path, model: str, output: Path, trust_remote_code: bool) -> None:
    """Puts a delta of `replay --delta` onto its base model and saves that as a Hugging Face checkpoint."""
    done = apply_delta(delta, model, output, trust_remote_code=trust_remote_code)
    click.echo(f"put {len(done.mask)} weights of round {done.round} onto {model}; weights {done.weights}")
    click.echo(f"saved to {output}")


@main.command(
    cls=GroupedCommand,
    epilog=example("meerkat-engine mask --model HuggingFaceTB/SmolLM2-135M --output mask.safetensors"),
)
@settings("model", "task", "data_dir", "data", "validation", "template", "labels", "label_field", "cut", "method",
          "density", "mask", "calibration", "calibration_texts", "calibration_batch_size", "calibration_length",
          "layer", "objective", "max_length", "seed", "device", "dtype")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), help="mask file to write")
@click.option("--check", "checked", multiple=True, metavar="TASK",
              help="say how much of this task's squared gradient the mask holds; may be repeated")  # fmt: skip
@_trust
def mask(
    config_file: Path | None, output: Path | None, checked: tuple[str, ...], trust_remote_code: bool, **options: Any
) -> None:
    """Builds a mask and saves it, or says whether it transfers to a task."""
    if output is None and not checked:
        raise ConfigError("give --output FILE to save the mask, or --check TASK to see what it holds of a task")
    if output is not None and output.exists():
        raise ConfigError(f"{output} exists already; choose another file, nothing was changed")
    user = from_file(config_file) | given(options)
    by_task = user.get("method") == Method.TASK_MASK and "mask" not in user
    if "model" in user and not user.keys() & {"task", "data"}:
        if by_task:
            raise ConfigError(f"{Method.TASK_MASK} chooses its elements on a task's examples; give --task or --data")
        user["task"] = (*checked, "sst2")[0]  # a mask needs no task; any known name passes
    config = make_config(user)
    if output is not None and not config.method.recipe.elements.ranked:
        raise ConfigError(f"{config.method} needs no mask file: what it trains has a name")
    check_files(config)
    lm = load_language_model(config, trust_remote_code=trust_remote_code)
    made = make_mask(config, lm, encode(config, lm.tokenizer).train if by_task else None)
    click.echo(f"{len(made)} of {made.table.size} elements ({made.source}; {made.calibration or 'no calibration'})")
    if output is not None:
        made.save(output)
        click.echo(f"digest {made.digest}\nsaved to {output}")
    for task in checked:
        found = mask_coverage(config.on_task(task), lm, [made])[0]
        click.echo(f"{task}: holds {found.captured:.1%} of the squared gradient; the best mask of that size "
                   f"{found.best:.1%}, chance {found.chance:.1%}; shares {found.overlap:.1%} of the best one's "
                   f"elements")  # fmt: skip


@main.command(epilog=example("meerkat-engine report runs/mine runs/other"))
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="new file [default: RUN/report.html; several: report.html]"
)
def report(runs: tuple[Path, ...], output: Path | None) -> None:
    """Makes one HTML page, figures included, of one or several run directories."""
    click.echo(f"wrote {write_report(list(runs), output)}")


main.add_command(bench)
main.add_command(bench_server)
main.add_command(experiment)


def _run(config: RunConfig, output: Path, where: dict[str, Any]) -> dict[str, Any]:
    return show(output, lambda report, log: execute(config, output, report, log, **where))


if __name__ == "__main__":
    main()
