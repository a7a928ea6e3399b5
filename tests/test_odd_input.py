"""Odd input through the command line: every command either succeeds or ends with an error of one sentence.

Nothing that a user can put into a file, a model's directory or an option may end in a traceback. Damaged masks, deltas
and ledgers have tests of their own, byte by byte; here they are some files among many.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from hypothesis import example, given, settings
from hypothesis import strategies as st

from meerkat_engine.fed.config.run_config import SETTINGS

from helpers.command import call
from helpers.constants import FUZZ
from helpers.models import make_model, make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = "good bad fine poor film It was terrible great"
QUICK = ("--rounds", "1", "--local-steps", "1", "--batch-size", "2", "--clients", "2", "--calibration-texts", "2",
         "--density", "0.01", "--eval-examples", "4")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a model, its data and a finished run; the commands run in it."""
    home, before = tmp_path_factory.mktemp("odd"), Path.cwd()
    os.chdir(home)
    make_model("gpt2").save_pretrained("model")  # type: ignore[operator]
    make_tokenizer(WORDS).save_pretrained("model")
    lines = [json.dumps({"text": f"{'good' if i % 2 else 'bad'} film", "label": i % 2, "who": "ab"[i % 2]})
             for i in range(12)]  # fmt: skip
    Path("data.jsonl").write_text("\n".join(lines))
    assert_clean(call("run", *OWN, "--data", "data.jsonl", "--method", "random-mask", *QUICK, "--output", "run"), True)
    yield home
    os.chdir(before)


OWN = ("--model", "model", "--template", "{text} It was", "--labels", "terrible,great")


def assert_clean(result: Result, success: bool = False) -> None:
    """Asserts that a command succeeded or ended with an error message of one line."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in ((0,) if success else (0, 1, 2)), result.output
    if result.exit_code:
        *_, message = result.output.splitlines()
        assert message.startswith("Error: "), result.output
        assert len(message) < 2000
    assert "Traceback" not in result.output


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(max_examples=examples * FUZZ, deadline=None, derandomize=FUZZ == 1, database=None)


# One value in a line of JSON, as it stands there: what parsers, tokenizers and comparisons stumble over.
NUMBERS = ["NaN", "-Infinity", "1e999", "-0", "0.5", "1", "7", "-1", "9" * 30, "1" * 5000, "18446744073709551616"]
TEXTS = [r'"\ud83d"', r'"a \udc00 film"', r'"\u0000"', r'"\ufeffgood"', '""', '"  "', '"' + "good " * 200 + '"',
         '"great"', '"\\u2028"', r'"\n"', '"</s>"', '"<pad>"', '"{text}"', '"%s"']  # fmt: skip
values = st.sampled_from([*NUMBERS, *TEXTS, "null", "true", "[]", '["a", {}]', "{}", "[" * 5000, '{"a":' * 5000])
objects = st.dictionaries(
    st.sampled_from(["text", "label", "who", r"\ud83d", "", "\\u0000"]), values, min_size=0, max_size=3
).map(lambda entries: "{" + ", ".join(f'"{key}": {value}' for key, value in entries.items()) + "}")
odd_lines = objects | values | st.sampled_from(["", "\ufeff", "{", "{'text': 1}", "\x00", '{"text": "a"} {}', "text"])
good_lines = st.builds(
    lambda text, label, who: f'{{"text": {text}, "label": {label}, "who": {who}}}',
    st.sampled_from(['"good film"', '"bad"', *TEXTS]),
    st.sampled_from(["0", "1", "true", '"great"', '"terrible "']),
    st.sampled_from(['"a"', '"b"', *TEXTS]) | st.just("3"),
)


def odd_bytes(lines: list[str], start: bytes, end: bytes) -> bytes:
    return start + "\n".join(lines).encode("utf-8", "surrogatepass") + end


odd_files = st.builds(
    odd_bytes,
    st.lists(good_lines, max_size=8).flatmap(lambda good: st.lists(odd_lines, max_size=1).map(lambda odd: good + odd)),
    st.sampled_from([b"", b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00"]),
    st.sampled_from([b"", b"\n", b"\r\n", b"\xf0\x9f", b"\x00"]),
)
good_file = st.lists(good_lines, min_size=8, max_size=16).map(lambda lines: odd_bytes(lines, b"", b"\n"))


@fuzzed(60)
@given(odd_files | good_file, st.sampled_from(["data", "validation", "calibration"]), st.booleans())
def test_odd_json_lines(home: Path, content: bytes, option: str, natural: bool) -> None:
    Path("odd.jsonl").write_bytes(content)
    files = {"data": "data.jsonl", option: "odd.jsonl"}
    arguments = [word for name, file in files.items() for word in (f"--{name}", file)]
    arguments += ["--method", "meerkat" if option == "calibration" else "random-mask"]
    arguments += ["--partition", "natural", "--client-field", "who"] if natural else []
    shutil.rmtree("new", ignore_errors=True)
    assert_clean(call("run", *OWN, *QUICK, *arguments, "--output", "new"))
    assert_not_begun_or_finished()


def assert_not_begun_or_finished() -> None:
    """Asserts that a run whose input is refused leaves nothing behind."""
    if Path("new").exists():
        assert '"summary"' in Path("new/metrics.jsonl").read_text()


# Values of options. A run with one of the large ones that are possible would take hours: it stops before training.
odd_values = st.sampled_from([
    "", " ", "0", "-1", "1", "2", "3", "0.5", "1e-300", "1e300", "1e999", "nan", "-inf", "9" * 25, str(2**63), "x",
    "model", "data.jsonl", "run/mask.safetensors", "run", ".", "/", "/dev/null", "no/such/file", "a" * 300, "\ud83d",
    "{}", "é", "\udcff", "{text}", "{text", "{text}\n", "a,b", '"a","b"', '"a",b', ",", "random-mask", "meerkat-vp",
    "full-fedzo", "layer-zo", "fedavg", "float16", "natural", "dirichlet", "sign-flip", "median", "trimmed-mean",
    "cosine", "label", "language-model", "meta", "cuda:99", "triton", "numba", "embedded", "sst2", "vader", "who",
])  # fmt: skip
names = st.sampled_from(sorted(SETTINGS))


@example({"dtype": "{text}\n"}, "run")
@example({"rounds": str(2**63)}, "run")
@example({"client_field": "\udcff"}, "run")
@fuzzed(120)
@given(st.dictionaries(names, odd_values, min_size=1, max_size=3), st.sampled_from(["run", "mask", "experiment"]))
def test_odd_options(home: Path, odd: dict[str, str], command: str) -> None:
    given_options = {"--data": "data.jsonl", **dict(zip(OWN[::2], OWN[1::2], strict=True)),
                     **dict(zip(QUICK[::2], QUICK[1::2], strict=True)), "--method": "random-mask"}  # fmt: skip
    options = given_options | {f"--{name.replace('_', '-')}": value for name, value in odd.items()}
    shutil.rmtree("new", ignore_errors=True)
    Path("new.mask").unlink(missing_ok=True)
    if command == "experiment":
        words = ["experiment", "local-steps", "--seeds", "0", "--output", "new"]  # 0 runs an arm are refused
    else:
        words = [command, "--output", "new" if command == "run" else "new.mask"]
    known = {"run": set(SETTINGS), "experiment": set(SETTINGS)}.get(command)
    for option, value in options.items():
        if known is not None or option[2:].replace("-", "_") in MASK_SETTINGS:
            words += [f"{option}={value}"]
    assert_clean(call(*words))


MASK_SETTINGS = {"model", "data", "template", "labels", "method", "density", "calibration", "calibration_texts", "seed",
                 "device", "dtype", "max_length", "label_field", "cut", "layer", "objective"}  # fmt: skip

toml_values = st.sampled_from([
    "0", "-1", "1", "2", "true", "nan", "inf", "-0.0", "1e-300", "0x" + "f" * 5000, "9" * 30, "9" * 5000, '""', '"x"',
    '"a\\u0000b"', '"random-mask"', '"data.jsonl"', "[]", "[1, {}]", "{}", "1979-05-27", "[" * 5000, '"\\ud83d"',
    "'''\n'''", '"{text}"', '"natural"',
])  # fmt: skip
sections = sorted({setting.section for setting in SETTINGS.values()} | {"no_section"})
keys = st.sampled_from(sorted({setting.name for setting in SETTINGS.values()} | {'"\\u0000"', "x"}))
tables = st.tuples(st.sampled_from(sections), st.lists(st.tuples(keys, toml_values), max_size=2))


@example([("step", [("lr", "0x" + "f" * 5000)])], b"", "run")
@example([("mask", [("calibration", "9" * 5000)])], b"", "mask")
@example([("data", [("directory", '"a\\u0000b"')])], b"", "run")
@example([("step", [("lr", "[" * 5000)])], b"\xef\xbb\xbf", "run")
@fuzzed(80)
@given(
    st.lists(tables, max_size=2),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"= 1\n"]),
    st.sampled_from(["run", "mask"]),
)
def test_odd_settings_files(
    home: Path, content: list[tuple[str, list[tuple[str, str]]]], start: bytes, command: str
) -> None:
    text = "".join(
        (f"[{section}]\n" if section else "") + "".join(f"{key} = {value}\n" for key, value in entries)
        for section, entries in content
    )
    Path("odd.toml").write_bytes(start + text.encode())
    shutil.rmtree("new", ignore_errors=True)
    Path("new.mask").unlink(missing_ok=True)
    options = (*OWN, "--data", "data.jsonl", "--method", "random-mask")
    if command == "run":
        assert_clean(call("run", "--config", "odd.toml", *options, *QUICK, "--output", "new"))
    else:
        assert_clean(call("mask", "--config", "odd.toml", *options, "--density", "0.01", "--output", "new.mask"))


damage = st.sampled_from([
    b"", b"\x00", b"{}", b"[]\n", b"null\n", b"{", b"\xff\xfe\x00", b"[" * 5000, b'{"round": 0}\n', b'{"round": NaN}\n',
    b'{"summary": {"weights": "\\ud83d", "accuracy_after": "\\ud83d"}}\n', b'{"round": ' + b"9" * 5000 + b"}\n",
    b'{"summary": 1}\n', b'{"summary": {"weights": "", "stopped": 3, "accuracy_after": 1}}\n',
    b'{"round": "\\ud83d", "clients": {"\\ud83d": 1}}\n', b"\xff" * 8 + b"{}",
    b"\x02" + b"\x00" * 7 + b"{}",
    (10**6).to_bytes(8, "little") + b"[" * 10**6,
])  # fmt: skip
RUN_FILES = ["config.toml", "ledger.jsonl", "metrics.jsonl", "gradip.jsonl", "origin.json", "mask.safetensors",
             "snapshot.safetensors"]  # fmt: skip


@example("metrics.jsonl", b'{"summary": {"weights": "", "accuracy_after": 1}}\n', False, "resume")
@example("config.toml", b"[step]\nlr = 0x" + b"f" * 5000, False, "replay")
@fuzzed(80)
@given(
    st.sampled_from(RUN_FILES), damage, st.booleans(), st.sampled_from(["replay", "resume", "report", "mask", "apply"])
)
def test_odd_files_in_a_run_directory(home: Path, name: str, content: bytes, append: bool, command: str) -> None:
    for path in ("damaged", "page.html", "out"):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink(missing_ok=True)
    shutil.copytree("run", "damaged")
    file = Path("damaged", name)
    file.write_bytes((file.read_bytes() if append and file.exists() else b"") + content)
    arguments = {
        "replay": ["replay", "damaged", "--output", "out"],
        "resume": ["run", "--resume", "damaged"],
        "report": ["report", "damaged", "run", "--output", "page.html"],
        "mask": ["mask", *OWN, "--data", "data.jsonl", "--mask", file, "--check", "data"],
        "apply": ["apply", file, "--model", "model", "--output", "out"],
    }[command]
    assert_clean(call(*arguments))


MODEL_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]


@fuzzed(40)
@given(st.sampled_from(MODEL_FILES), damage)
def test_odd_files_in_a_model_directory(home: Path, name: str, content: bytes) -> None:
    shutil.rmtree("broken", ignore_errors=True)
    shutil.copytree("model", "broken")
    Path("broken", name).write_bytes(content)
    assert_clean(call("mask", "--model", "broken", "--method", "random-mask", "--output", "new.mask"))
    Path("new.mask").unlink(missing_ok=True)
