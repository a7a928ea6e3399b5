"""Settings: sections, flat names, files, and rejected values."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from meerkat_engine.cli import main
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.fed import RunConfig, make_config
from meerkat_engine.fed.config.options import settings
from meerkat_engine.fed.config.run_config import SETTINGS, convert
from meerkat_engine.fed.config.sections import ClientsConfig, MaskConfig, StepConfig
from meerkat_engine.fed.config.toml import config_toml, parse_toml, read_toml, to_toml

from helpers.command import call

# A value other than the default for each setting, in one run. The settings in SPECIAL do not fit into it.
CHANGED: dict[str, Any] = {
    "method": "meerkat-vp", "rounds": 7, "local_steps": 3, "seed": 5, "snapshot_every": 2, "model": "m",
    "dtype": "bfloat16",
    "device": "cuda", "backend": "torch", "capture": "off",
    "quantize": "nf4", "offload": "cpu", "masked_weights": "add", "points": "together", "task": "vader",
    "data_dir": Path("d"), "max_length": 99,
    "clients": 9,
    "clients_per_round": 5, "partition": "natural", "alpha": 0.1, "client_field": "who", "batch_size": 3,
    "micro_batch_size": 2, "layout": "padded", "objective": "language-model", "lr": 0.5, "schedule": "cosine",
    "queries": 2, "eps": 0.1,
    "density": 0.2, "mask": Path("m"), "calibration": Path("c"), "calibration_texts": 3, "calibration_batch_size": 2,
    "calibration_length": 8, "calibration_elements": 5, "lora_rank": 2, "lora_alpha": 4, "vp_steps": 60,
    "vp_initial": 2, "vp_later": 30,
    "vp_rho_later": 2.0, "vp_rho_quie": 0.5, "vp_sigma": 0.1, "vp_null_paths": 5, "aggregation": "median",
    "weighting": "uniform", "trim": 0.3, "clip": 2.0, "max_scalar": 1e6, "max_examples": 50, "dp_noise": 1.0,
    "dp_clip": 0.1, "dp_delta": 1e-6, "attack": "scale", "attackers": 1, "eval_every": 2, "eval_examples": 40,
}  # fmt: skip
# Runs with the other settings, which need certain methods or the user's own data.
SPECIAL: list[dict[str, Any]] = [
    {"method": "meerkat-vp", "stopped_weight": "share", "vp_null": "clients"},
    {"method": "layer-zo", "layer": "model.layers.1"},
    {"method": "lora-fedzo", "lora_targets": "q_proj,v_proj"},
    {"model": "m", "data": Path("f.jsonl"), "template": "{a} and {b}", "labels": "no,yes", "label_field": "l",
     "cut": "b",
     "validation": Path("v.jsonl")},
    {"model": "m", "data": Path("f.jsonl"), "template": "{a}", "answer": "{b}", "prompt_format": "chat",
     "chat_template": Path("t.jinja"), "metrics": "", "max_new_tokens": 9},
    {"model": "m", "dataset": "org/name", "dataset_config": "c", "dataset_revision": "r", "dataset_split": "s",
     "dataset_validation_split": "v"},
]  # fmt: skip


def test_this_file_changes_every_setting() -> None:
    assert {*CHANGED, *(name for settings in SPECIAL for name in settings)} == SETTINGS.keys()
    defaults = make_config({"model": "m", "task": "sst2"}).flat()
    for name, value in convert(CHANGED).items():
        assert value != defaults[name] or name in ("model",), name


@pytest.mark.parametrize("given", [CHANGED, *SPECIAL], ids=lambda given: str(given.get("method", "own data")))
def test_settings_survive_sections_and_files(given: dict[str, Any]) -> None:
    config = make_config(given)
    assert {name: config.flat()[name] for name in given} == convert(given)
    assert make_config(parse_toml(config_toml(config), "here")) == config
    assert config.replace() == config
    for name, setting in SETTINGS.items():
        section = getattr(config, setting.section) if setting.section else config
        assert getattr(section, setting.name) == config.flat()[name]


def test_a_config_can_be_built_from_sections() -> None:
    config = RunConfig(rounds=3, clients=ClientsConfig(count=5), step=StepConfig(lr=0.1), mask=MaskConfig(density=0.5))
    assert (config.flat()["clients"], config.flat()["lr"], config.flat()["density"]) == (5, 0.1, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rounds = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("clients = 4", "c.toml: clients is now count in [clients]"),
        ("lr = 0.1", "c.toml: lr is now lr in [step]"),
        ("rounds = 2\ndp_noise = 1.0", "c.toml: dp_noise is now noise in [privacy]"),
        ('mask = "m"', "c.toml: mask is now file in [mask]"),
        ('model = "m"', "c.toml: model is now source in [model]"),
        ("[privacy]\ndp_noise = 1.0", "c.toml: [privacy] dp_noise is now noise in [privacy]"),
        ("[step]\nrounds = 1", "c.toml: [step] rounds is now rounds at the top"),
        (
            "[step]\nrate = 1",
            "c.toml: [step] has no setting 'rate'; known: batch_size, eps, layout, lr, micro_batch_size",
        ),
        ("[steps]\nlr = 1", "c.toml: unknown setting 'steps'; known at the top: local_steps, method, rounds, seed"),
        ("[step]\nlr = 'much'", "lr must be float, got 'much'"),
        ("[clients]\ncount = true", "clients must be int, got True"),
        ("[data]\ntemplate = 3", "template must be str, got 3"),
    ],
)
def test_errors_in_a_file_name_the_right_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    result = call("run", "--config", tmp_path / "c.toml", "--output", tmp_path / "r")
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "r").exists()


def test_a_byte_order_mark_at_the_start_of_a_file_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfrounds = 7\n")
    assert read_toml(tmp_path / "c.toml") == {"rounds": 7}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": 2**32}, "rounds must be an integer of 32 bits, got one of 33"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits, got one of 65"),
        ({"lr": 2**20000}, "lr must be an integer of 32 bits, got one of 20001"),
        ({"layer": "a\0b"}, "layer has a null character"),
        ({"data_dir": Path("a\ud83d")}, "data_dir has half of a surrogate pair"),
    ],
    ids=["int", "seed", "float", "null", "surrogate"],
)
def test_values_that_no_file_can_hold_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def test_flat_names_in_a_file_are_errors_that_name_the_section() -> None:
    for name, setting in SETTINGS.items():
        if setting.section:
            with pytest.raises(ConfigError) as caught:
                parse_toml(f"{name} = 1", "old.toml")
            assert str(caught.value) == f"old.toml: {name} is now {setting.name} in [{setting.section}]"


def test_a_file_has_a_table_for_each_section() -> None:
    written = tomllib.loads(config_toml(make_config({"model": "m", "task": "sst2", "mask": "f"})))
    assert written["model"] == {
        "source": "m", "dtype": "auto", "device": "auto", "backend": "auto", "capture": "auto", "quantize": "none",
        "offload": "none", "masked_weights": "write",
    }  # fmt: skip
    assert written["mask"]["file"] == "f"
    assert "calibration" not in written["mask"]  # because it is None
    assert list(written)[:2] == ["method", "rounds"]
    with pytest.raises(ConfigError, match="unknown setting 'trust_remote_code'"):
        to_toml({"trust_remote_code": True})


def test_the_digest_covers_all_settings_that_bits_depend_on() -> None:
    given = {"model": "m", "task": "sst2", "quantize": "nf4"}
    config = make_config(given)
    not_in_digest = {"data_dir": "d", "device": "cuda", "backend": "torch", "capture": "off", "offload": "cpu",
                     "snapshot_every": 3, "calibration": "c", "calibration_elements": 5}  # fmt: skip
    assert make_config(given, not_in_digest).digest() == config.digest()
    for change in ({"lr": 0.5}, {"clients": 5}, {"max_scalar": 1e7}, {"seed": 1}, {"eval_every": 3},
                   {"quantize": "int8"}, {"masked_weights": "add"}, {"points": "together"}):  # fmt: skip
        assert config.replace(**change).digest() != config.digest()


def test_help_groups_the_options_by_section() -> None:
    text = call("run", "--help").output
    headings = [line for line in text.splitlines() if line.startswith(("Options", "Settings"))]
    sections = dict.fromkeys(setting.section for setting in SETTINGS.values())
    assert headings == ["Options:", *(
        f"Settings, [{section}] in a file:" if section else "Settings, at the top of a file:" for section in sections
    )]  # fmt: skip
    for heading, name in (("[privacy]", "--dp-noise"), ("[step]", "--lr"), ("[clients]", "--clients ")):
        block = text.split(heading)[1].split("Settings")[0]
        assert f"  {name}" in block


@pytest.mark.parametrize("command", main.commands)
def test_every_command_has_an_example(command: str) -> None:
    *_, example = call(command, "--help").output.split("Example:\n")
    assert example.strip().startswith(f"meerkat-engine {command} ")


def test_settings_decorator_adds_the_named_options() -> None:
    @settings("lr", "clients")
    def command(**_: Any) -> None:
        """A command that does nothing."""

    names = [parameter.name for parameter in command.__click_params__]  # type: ignore[attr-defined]
    assert sorted(names) == ["clients", "config_file", "lr"]
