"""Loading models from directories and GGUF files, and rejecting unsafe or damaged ones."""

import contextlib
import json
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.checkpoint import save_checkpoint
from meerkat_engine.engine.lm.models import load_model, max_positions, prepare_tokenizer
from meerkat_engine.engine.parameters import fingerprint

from helpers.command import call
from helpers.constants import FUZZ
from helpers.models import make_model, make_tokenizer
from helpers.tensors import same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model_and_tokenizer_are_loaded_from_a_directory(tmp_path: Path, llama: nn.Module, dtype: torch.dtype) -> None:
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), dtype)
    assert {p.dtype for p in lm.model.parameters()} == {dtype}
    assert not lm.model.training
    assert all(p.requires_grad for p in lm.model.parameters())
    assert lm.tokenizer.padding_side == "left"
    for a, b in zip(lm.model.parameters(), llama.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype))


def test_buffers_are_those_of_plain_transformers(tmp_path: Path, llama: nn.Module) -> None:
    """With rotary frequencies rounded to bfloat16, losses would differ from those of the saved model elsewhere."""
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path)
    model = load_model(str(tmp_path), torch.bfloat16).model
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    buffers = dict(plain.named_buffers())
    assert buffers
    assert all(same_bits(b, buffers[name]) for name, b in model.named_buffers())
    ids = torch.arange(3, 43).view(2, 20)
    assert same_bits(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "no/where",
            r"cannot load the model 'no/where' on the Hugging Face hub \(there is no directory 'no/where' here\)",
        ),
        ("nowhere.gguf", r"there is no GGUF file 'nowhere\.gguf'"),
    ],
)
def test_missing_models_raise(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(source)


def test_files_without_a_model_raise(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"cannot load the model .* as a directory"):
        load_model(str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(os.urandom(100))
    with pytest.raises(ModelError, match=r"cannot load the model .* as a GGUF file"):
        load_model(str(tmp_path / "x.gguf"))


@pytest.fixture
def saved(tmp_path: Path, llama: nn.Module) -> Path:
    """Directory of a valid model, for tests to damage."""
    llama.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def assert_rejected(directory: Path, message: str) -> None:
    """Asserts that loading raises an error that names the directory and matches ``message``."""
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(directory))
    assert f"cannot load the model {str(directory)!r} as a directory: " in str(caught.value)


class Payload:
    """Object whose pickle creates a file when it is loaded."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.proof,)


def test_pickled_weights_are_rejected_without_being_read(saved: Path, tmp_path: Path) -> None:
    torch.save({"x": Payload(tmp_path / "proof")}, saved / "pytorch_model.bin")
    load_model(str(saved))  # reads the safetensors file in the same directory instead
    assert not (tmp_path / "proof").exists()
    (saved / "model.safetensors").unlink()
    assert_rejected(saved, r"its weights are a pickle \(pytorch_model\.bin\); a pickle can contain code")
    assert not (tmp_path / "proof").exists()
    save_file({"x": torch.zeros(1)}, saved / "other.safetensors")  # not a file name that the model uses
    assert_rejected(saved, "no file named model.safetensors found")
    assert not (tmp_path / "proof").exists()
    torch.load(saved / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "proof").exists()


def test_config_that_names_a_pickle_is_rejected(saved: Path) -> None:
    """In transformers this setting has precedence over ``use_safetensors``."""
    weights = load_file(saved / "model.safetensors")
    torch.save(weights, saved / "adapter_model.bin")
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    assert_rejected(saved, r"its config names 'adapter_model\.bin' as its weights; a pickle can contain code")


@pytest.mark.parametrize(
    "name", ["weights.bin", "../outside/weights.bin", "../outside/model.safetensors", "/absolute/model.safetensors"]
)
def test_index_that_names_pickles_or_outside_files_is_rejected(
    saved: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """transformers joins these names to the directory, and loads other files than safetensors with ``torch.load``."""
    weights = load_file(saved / "model.safetensors")
    (saved / "model.safetensors").rename(saved / "decoy.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    (saved.parent / "outside").mkdir(exist_ok=True)
    if not name.startswith("/"):
        (torch.save if name.endswith(".bin") else save_file)(weights, saved / name)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    message = (
        r"its model\.safetensors\.index\.json names '.*' as weights, which is not a safetensors file in the same|"
        r"its weights are a pickle"
    )
    assert_rejected(saved, message)


def test_sharded_weights_are_loaded(saved: Path) -> None:
    """The index is written by transformers."""
    model = load_model(str(saved)).model
    model.save_pretrained(saved / "shards", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(saved).save_pretrained(saved / "shards")
    assert len(list((saved / "shards").glob("model-*.safetensors"))) > 1
    assert fingerprint(load_model(str(saved / "shards")).model) == fingerprint(model)


@pytest.mark.parametrize("alone", [True, False])
def test_adapters_are_rejected(saved: Path, alone: bool) -> None:
    """An adapter names a base model, which can be anywhere, and its own weights can be a pickle."""
    if alone:
        (saved / "config.json").unlink()
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/model", "peft_type": "LORA"}')
    torch.save({}, saved / "adapter_model.bin")
    assert_rejected(saved, "it is an adapter or contains one")


def test_missing_weights_raise(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    assert_rejected(saved, r"its weights lack 1 of the model's tensors, among them 'model\.norm\.weight'")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", b"\x10", "header"),
        ("tokenizer.json", b'{"version": "1.0", "model": {}}', "KeyError"),
        ("config.json", b'{"model_type": "llama", "hidden_size": "many"}', "hidden_size"),
        ("config.json", b'{"model_type": "llamb"}', "llamb"),
    ],
    ids=["weights", "tokenizer", "a setting", "an architecture"],
)
def test_damaged_files_raise_model_error(saved: Path, name: str, content: bytes, message: str) -> None:
    (saved / name).write_bytes(content)
    assert_rejected(saved, message)


CODE = """
from pathlib import Path
Path({proof!r}).touch()
import transformers
class Config(transformers.LlamaConfig):
    model_type = "made-up"
class Model(transformers.LlamaForCausalLM):
    config_class = Config
"""


def add_code(saved: Path, proof: Path, model_type: str = "made-up") -> None:
    """Adds code to the model that creates the file ``proof`` when it runs."""
    config = json.loads((saved / "config.json").read_text())
    classes = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (saved / "config.json").write_text(json.dumps(config | {"model_type": model_type, "auto_map": classes}))
    (saved / "code.py").write_text(CODE.format(proof=str(proof)))


def test_remote_code_runs_only_if_trusted(
    saved: Path, tmp_path: Path, llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    proof = tmp_path / "proof"
    add_code(saved, proof)
    assert_rejected(saved, "it needs code of its own; read that, and if you trust it, give --trust-remote-code")
    assert not proof.exists()
    model = load_model(str(saved), trust_remote_code=True).model
    assert proof.exists()
    assert type(model).__name__ == "Model"
    for a, b in zip(model.parameters(), llama.parameters(), strict=True):
        assert same_bits(a, b)


def test_remote_code_of_a_built_in_architecture_is_ignored(saved: Path, tmp_path: Path) -> None:
    add_code(saved, tmp_path / "proof", model_type="llama")
    assert type(load_model(str(saved)).model).__module__.startswith("transformers.")
    assert not (tmp_path / "proof").exists()


def test_tokens_beyond_the_embedding_are_refused(saved: Path) -> None:
    tokenizer = make_tokenizer(" ".join(f"word{i}" for i in range(92)))
    tokenizer.save_pretrained(saved)
    assert len(load_model(str(saved)).tokenizer) == 96
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(saved)
    assert_rejected(
        saved, "1 of its tokenizer's tokens are beyond the 96 rows of its embedding, among them '<tool>' wi"
    )
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(saved)
    assert_rejected(saved, "2 of its tokenizer's tokens are beyond .*, the padding token '<padding>' with id 97")


def test_a_refused_model_leaves_no_run_directory(saved: Path, tmp_path: Path) -> None:
    tokenizer = make_tokenizer("a b")
    tokenizer.add_tokens([f"<tool{i}>" for i in range(100)])
    tokenizer.save_pretrained(saved)
    (tmp_path / "data.jsonl").write_text('{"text": "a", "class": "b"}\n' * 8)
    data = ["--data", tmp_path / "data.jsonl", "--template", "{text}", "--labels", "a,b", "--label-field", "class"]
    result = call("run", "--model", saved, *data, "--output", tmp_path / "run")
    assert result.exit_code == 1
    (message,) = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert "10 of its tokenizer's tokens are beyond the 96 rows of its embedding" in message
    assert not (tmp_path / "run").exists()


def test_tokenizer_that_makes_no_tokens_is_refused(saved: Path) -> None:
    tokenizer = make_tokenizer("a")
    tokenizer.backend_tokenizer.pre_tokenizer = None  # the whole text is one unknown word
    tokenizer.save_pretrained(saved)
    assert_rejected(saved, "its tokenizer makes 1 tokens of the text")


@pytest.mark.parametrize(
    ("architecture", "settings", "positions"),
    [
        ("llama", {}, 64),
        ("gpt2", {"n_positions": 48}, 48),
        ("mpt", {"max_seq_len": 32, "d_model": 32, "n_heads": 4, "n_layers": 1}, 32),
        ("bloom", {"hidden_size": 32, "n_head": 4, "n_layer": 1}, None),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 1}, None),
    ],
)
def test_number_of_positions(architecture: str, settings: dict[str, int], positions: int | None) -> None:
    if architecture == "llama":
        model = make_model(positions=64)
    else:
        config = AutoConfig.for_model(architecture, vocab_size=96, **settings)
        model = AutoModelForCausalLM.from_config(config)
    assert max_positions(model) == positions
    assert max_positions(nn.Linear(2, 2)) is None


def test_default_device_and_dtype_of_torch_do_not_matter(saved: Path) -> None:
    expected = load_model(str(saved)).model
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        loaded = load_model(str(saved))
        save_checkpoint(loaded, saved.parent / "out", "# a card")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for (name, a), b in zip(expected.state_dict().items(), loaded.model.state_dict().values(), strict=True):
        assert same_bits(a, b), name
    assert {b.device.type for b in loaded.model.buffers()} == {"cpu"}


CONTENTS = st.one_of(
    st.binary(max_size=40),
    st.sampled_from([b"", b"{}", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b"{" * 50_000, b'{"a": 1e999}', None]),
)


@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_directories_raise_model_error(data: st.DataObject, llama: nn.Module) -> None:
    """Files are replaced, cut, changed, or become directories; the model is loaded as it was, or refused."""
    with TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        llama.save_pretrained(directory)  # type: ignore[operator]
        make_tokenizer("a b").save_pretrained(directory)
        name = data.draw(st.sampled_from(sorted(path.name for path in directory.iterdir())))
        path = directory / name
        good = path.read_bytes()
        kind = data.draw(st.sampled_from(["replaced", "cut", "a value changed", "missing", "a directory"]))
        if kind == "replaced":
            content = data.draw(CONTENTS)
            path.write_bytes(good[: len(good) // 2] + b"\0" + good[len(good) // 2 :] if content is None else content)
        elif kind == "cut":
            path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        elif kind == "a value changed" and name.endswith(".json"):
            content = json.loads(good)
            key = data.draw(st.sampled_from(sorted(content)))
            content[key] = data.draw(st.sampled_from([None, -1, 0, "x", [], {}, [1], {"a": 1}, 0.5, True, 1e400]))
            path.write_text(json.dumps(content))
        else:
            path.unlink()
            if kind == "a directory":
                path.mkdir()
        with contextlib.suppress(ModelError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_model(str(directory))


def test_tokenizer_without_padding_and_end_token_raises() -> None:
    tokenizer = make_tokenizer("a")
    tokenizer.pad_token = None
    assert prepare_tokenizer(tokenizer).pad_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        prepare_tokenizer(tokenizer)
