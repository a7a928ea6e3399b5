"""LoRA adapters: placement, initialization, training of the adapters alone, and merging into a plain model."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm.lora import add_lora, merge_lora
from meerkat_engine.engine.lm.objective import Objective, task_loss
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.constants import CPU
from helpers.models import make_model
from helpers.prompts import MULTI_TOKEN_TASK, encode_task
from helpers.tensors import same_bits

IDS = torch.arange(60).view(3, 20) % 90 + 3
DTYPES = [torch.float32, torch.bfloat16]
# Relative to the largest logit: a few roundings of 2**-24 and 2**-9. Observed: 1e-6 and 0.022.
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 0.04}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def train(model: nn.Module, names: list[str]) -> None:
    """Trains the named parameters for three steps."""
    opt = SparseZO(model, SparseMask.of_parameters(model, names), lr=2.0, eps=1e-2)
    for _ in range(3):
        opt.step(lambda: language_model_loss(model, IDS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adapters_are_added_trained_merged_and_saved(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, plain = make_model(architecture, dtype), make_model(architecture, dtype)
    kind, before = type(model), logits(model)
    names = add_lora(model, rank=4, seed=3)
    assert len(names) == 2 * 2 * (1 if architecture == "gpt2" else 2)  # layers, A and B, targets
    parameters = dict(model.named_parameters())
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {parameters[name].dtype for name in names} == {dtype}
    assert type(model) is kind
    assert not model.training
    assert {name for name, p in parameters.items() if p.requires_grad} == set(names)
    assert same_bits(logits(model), before)

    kept = {name: p.clone() for name, p in parameters.items()}
    train(model, names)
    assert {name for name, p in parameters.items() if not torch.equal(p, kept[name])} == set(names)
    with_adapters = logits(model)
    tolerance = TOLERANCE[dtype] * with_adapters.abs().max().item()
    assert (with_adapters - before).abs().max() > 4 * tolerance

    merge_lora(model)
    torch.testing.assert_close(logits(model), with_adapters, atol=tolerance, rtol=0)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert [name for name, _ in loaded.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(same_bits(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    if dtype is torch.float32:  # make_model casts the rotary frequencies too
        assert same_bits(logits(loaded.eval()), logits(model))


def test_adapters_depend_on_the_seed_only(llama: nn.Module) -> None:
    adapters = []
    for seed, torch_seed in ((3, 0), (3, 1), (4, 0)):
        model = make_model()
        torch.manual_seed(torch_seed)
        state = torch.get_rng_state()
        names = add_lora(model, rank=4, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        adapters.append(torch.cat([model.get_parameter(name).view(-1) for name in names]))
    assert same_bits(adapters[0], adapters[1])
    assert not torch.equal(adapters[0], adapters[2])


def test_initial_adapters_have_the_scale_of_peft() -> None:
    model = nn.ModuleDict({"a": nn.Linear(256, 64), "b": nn.Linear(64, 512)})
    add_lora(model, rank=64, targets=["a", "b"], seed=0)
    for layer, width in ((model["a"], 256), (model["b"], 64)):
        values = layer.lora_A["default"].weight
        assert values.std().item() == pytest.approx(1 / math.sqrt(3 * width), rel=0.05)
        assert layer.lora_B["default"].weight.count_nonzero() == 0
    assert not torch.equal(model["a"].lora_A["default"].weight[:, :64], model["b"].lora_A["default"].weight * 0.5)


def test_adapters_are_scaled_by_alpha_over_rank() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8, bias=False)})
    weight = model["a"].weight.clone()
    add_lora(model, rank=2, alpha=6, targets=["a"], seed=0)
    a, b = model["a"].lora_A["default"].weight, model["a"].lora_B["default"].weight
    b.data.fill_(0.5)
    expected = weight + 3 * (b @ a)
    merge_lora(model)
    torch.testing.assert_close(model["a"].weight, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("objective", list(Objective))
def test_losses_depend_on_the_adapters(architecture: str, dtype: torch.dtype, objective: Objective) -> None:
    model = make_model(architecture, dtype)
    answers = "all" if objective is Objective.CANDIDATES else "gold"
    batch = encode_task(MULTI_TOKEN_TASK).batch([0, 1, 2], answers=answers, device=CPU)
    plain = [language_model_loss(model, IDS), task_loss(model, batch, objective)]
    names = add_lora(model, seed=1)
    with_zero_adapters = [language_model_loss(model, IDS), task_loss(model, batch, objective)]
    assert [x.item() for x in with_zero_adapters] == pytest.approx([x.item() for x in plain], abs=TOLERANCE[dtype])
    for name in names:
        model.get_parameter(name).data.add_(0.3)
    changed = [language_model_loss(model, IDS), task_loss(model, batch, objective)]
    assert all(a.item() != b.item() for a, b in zip(changed, plain, strict=True))


def test_invalid_targets_and_settings_raise(llama: nn.Module) -> None:
    with pytest.raises(
        ConfigError, match=r"no module of LlamaForCausalLM is named 'c_attn' \(LoRA targets q_proj, c_attn"
    ):
        add_lora(llama, targets=["q_proj", "c_attn"], seed=0)
    with pytest.raises(ConfigError, match=r"its linear layers: q_proj, k_proj, v_proj, o_proj, gate_proj"):
        add_lora(llama, targets=["c_attn"], seed=0)
    with pytest.raises(
        ConfigError, match=r"targets must be linear layers, but 'model\.embed_tokens' is of type Embedding"
    ):
        add_lora(llama, targets=["embed_tokens"], seed=0)
    with pytest.raises(
        ConfigError,
        match=r"no default LoRA targets for the architecture None; choose targets from its linear layers: 0",
    ):
        add_lora(nn.Sequential(nn.Linear(2, 2)), seed=0)
    for arguments in ({"rank": 0}, {"alpha": 0.0}, {"alpha": math.inf}):
        with pytest.raises(ConfigError, match="needs a rank of at least 1 and a positive alpha"):
            add_lora(llama, seed=0, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no adapters to merge"):
        merge_lora(llama)
    assert not hasattr(llama, "peft_config")
    add_lora(llama, seed=0)
    with pytest.raises(ConfigError, match="has adapters already"):
        add_lora(llama, seed=0)


def test_merged_model_can_get_adapters_again(llama: nn.Module) -> None:
    first = add_lora(llama, seed=0)
    merge_lora(llama)
    assert add_lora(llama, seed=0) == first


def test_error_without_peft_names_the_extra(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install -c constraints.txt '\.\[lora\]'"):
        add_lora(llama, seed=0)
