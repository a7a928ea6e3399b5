"""Loading models from directories and GGUF files, and rejecting unsafe or damaged ones."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import ModelError
from meerkat_engine.engine.lm.checkpoint import save_checkpoint
from meerkat_engine.engine.lm.models import load_model, prepare_tokenizer
from meerkat_engine.engine.lm.objective import language_model_loss
from meerkat_engine.engine.parameters import fingerprint

from helpers.models import make_byte_tokenizer, make_model, make_tokenizer
from helpers.tensors import same_bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model_and_tokenizer_are_loaded_from_a_directory(tmp_path: Path, llama: nn.Module, dtype: torch.dtype) -> None:
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    make_tokenizer("a b").save_pretrained(tmp_path)
    lm = load_model(str(tmp_path), dtype)
    assert {p.dtype for p in lm.model.parameters()} == {dtype}
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())
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


def write_gguf(path: Path, model: nn.Module) -> None:
    """Writes a Llama model to a GGUF file in llama.cpp's layout: float32 tensors, byte-level tokenizer."""
    gguf = pytest.importorskip("gguf", reason="needs the extra gguf")
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)  # type: ignore[union-attr]
    writer.add_embedding_length(config.hidden_size)  # type: ignore[union-attr]
    writer.add_block_count(config.num_hidden_layers)  # type: ignore[union-attr]
    writer.add_feed_forward_length(config.intermediate_size)  # type: ignore[union-attr]
    writer.add_head_count(config.num_attention_heads)  # type: ignore[union-attr]
    writer.add_head_count_kv(config.num_key_value_heads)  # type: ignore[union-attr]
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)  # type: ignore[union-attr]
    writer.add_vocab_size(config.vocab_size)  # type: ignore[union-attr]
    tokens = make_byte_tokenizer().get_vocab()
    names = sorted(tokens, key=lambda token: int(tokens[token]))
    names += ["ab", *(f"<unused{i}>" for i in range(config.vocab_size - len(names) - 1))]  # type: ignore[union-attr]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(names)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    renames = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm", "input_layernorm": "attn_norm",
    }  # fmt: skip
    for name, p in model.named_parameters():
        value = p.detach().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}  # type: ignore[union-attr]
        for projection, n in heads.items():
            if projection in name:  # llama.cpp interleaves the two halves that rotary embedding pairs
                value = value.reshape(n, 2, value.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(value.shape)
        for old, new in renames.items():
            name = name.replace(old, new)
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_gguf_model_is_loaded_trained_and_saved(tmp_path: Path) -> None:
    original = make_model("llama", vocabulary=300)
    write_gguf(tmp_path / "model.gguf", original)
    lm = load_model(str(tmp_path / "model.gguf"))
    ids = torch.arange(3, 43).view(2, 20)
    torch.testing.assert_close(lm.model(input_ids=ids).logits, original(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    opt = SparseZO(lm.model, SparseMask.random(lm.model, 0.1, 0), lr=1e-3)
    assert torch.isfinite(opt.step(lambda: language_model_loss(lm.model, ids)))
    save_checkpoint(lm, tmp_path / "out", "# a card")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(same_bits(a, b) for a, b in zip(plain.parameters(), lm.model.parameters(), strict=True))
    half = load_model(str(tmp_path / "model.gguf"), torch.bfloat16).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


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


def test_tokenizer_without_padding_and_end_token_raises() -> None:
    tokenizer = make_tokenizer("a")
    tokenizer.pad_token = None
    assert prepare_tokenizer(tokenizer).pad_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a padding nor an end-of-sequence token"):
        prepare_tokenizer(tokenizer)
