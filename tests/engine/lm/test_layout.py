"""Layouts of a batch: the same losses in packed, sorted and padded rows, and models that cannot take packed rows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from meerkat_engine.engine.errors import ConfigError
from meerkat_engine.engine.lm.batches import Batch, Item, packed_batch, padded_batch, sorted_batch, text_batch
from meerkat_engine.engine.lm.evaluation import evaluate
from meerkat_engine.engine.lm.layout import Layout, resolve_layout
from meerkat_engine.engine.lm.objective import (
    Objective,
    candidate_scores,
    example_losses,
    task_loss,
)
from meerkat_engine.engine.lm.packing import pack, parts_of_like_length
from meerkat_engine.engine.lm.rows import PackedRows, SortedRows
from meerkat_engine.engine.lm.text_loss import language_model_loss

from helpers.constants import CPU
from helpers.losses import TOLERANCE, candidate_log_likelihoods
from helpers.models import COMMON, make_model
from helpers.prompts import MULTI_TOKEN_TASK, SST2, WORDS, encode_task
from helpers.tensors import same_bits

_WINDOW = {"sliding_window": 6}  # shorter than most sequences, and than every packed row
# Families that compute the same in packed rows.
PACKED = {
    "Llama": {},
    "Qwen2": {},
    "Qwen2 with windows": {"use_sliding_window": True, "max_window_layers": 1, **_WINDOW},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, **_WINDOW},
    "Gemma3": {"head_dim": 8, "sliding_window_pattern": 2, **_WINDOW},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "GPT2": {},
    "Phi3": _WINDOW,
    "Mistral": _WINDOW,
    "GPTNeoX": {},
    "Falcon": {},
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16
    },
    "Starcoder2": _WINDOW,
    "Granite": {"logits_scaling": 2.0},
}  # fmt: skip
# Families that do not: ALiBi, a window of its own, state spaces, attention in chunks.
NOT_PACKED = {
    "Bloom": ({}, "BloomForCausalLM takes no rows of several examples"),
    "Falcon with ALiBi": ({"alibi": True}, "FalconForCausalLM takes no rows of several examples"),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, "in a row with other examples the scores of MptForCausalLM"),
    "GPTNeo": (
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_hidden_layers": 2, "window_size": 6},
        "in a row with other examples the scores of GPTNeoForCausalLM move by",
    ),
    "Mamba": ({"state_size": 4}, "MambaForCausalLM has layers of linear_attention"),
    "Llama4": (
        {"head_dim": 8, "num_local_experts": 2, "attention_chunk_size": 6, "intermediate_size_mlp": 48},
        "Llama4ForCausalLM has layers of chunked_attention",
    ),
}
_CONFIGS = {"Gemma3": "Gemma3TextConfig", "Llama4": "Llama4TextConfig"}
_HEADS = {"GPT2": "GPT2LMHeadModel"}


def build(name: str, extra: dict[str, Any]) -> nn.Module:
    """Builds a tiny model of a family, with random weights large enough that attention matters."""
    family = name.split()[0]
    config = getattr(transformers, _CONFIGS.get(family, f"{family}Config"))(
        **(COMMON | extra | {"num_hidden_layers": extra.get("num_hidden_layers", 3)})
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, _HEADS.get(family, f"{family}ForCausalLM"))(config).eval()
        for p in model.parameters():
            p.data = p.data + 0.1 * torch.randn_like(p) if p.dim() == 1 else 3 * p.data
    return model  # type: ignore[no-any-return]


def make_items(lengths: Sequence[int], answers: Sequence[Sequence[int]]) -> list[Item]:
    """Items with random tokens: ``lengths`` of the prompts, ``answers`` the lengths of each one's answers."""
    random = np.random.default_rng(0)
    return [
        Item(prompt=random.integers(3, 90, n), answers=[random.integers(3, 90, m) for m in of_item])
        for n, of_item in zip(lengths, answers, strict=True)
    ]


ITEMS = make_items([9, 20, 3, 14, 5], [(1, 3, 2), (2, 1, 2), (2, 2, 1), (3, 1, 1), (1, 1, 1)])


def batch(layout: Layout, items: Sequence[Item] = ITEMS) -> Batch:
    labels = [0] * len(items)
    if layout is Layout.PACKED:
        return packed_batch(items, labels, CPU, None)
    make = sorted_batch if layout is Layout.SORTED else padded_batch
    return make(items, labels, 0, CPU, None)


@torch.no_grad()
def one_by_one(model: nn.Module, items: Sequence[Item]) -> list[list[float]]:
    """Log-likelihood of each token of each answer, from unpadded sequences given to the model without any mask."""
    found = []
    for item in items:
        for answer in item.answers:
            ids = torch.tensor([[*item.prompt, *answer]])
            log_p = model(input_ids=ids).logits.float().log_softmax(-1)[0, len(item.prompt) - 1 : -1]
            found.append(log_p[range(len(answer)), answer.tolist()].tolist())
    return found


def check_scores(model: nn.Module, layout: Layout) -> None:
    """Compares the scores of all answers in a layout with those of each answer alone."""
    with torch.no_grad():
        scores = candidate_scores(model, batch(layout)).flatten().tolist()
    wanted = [sum(values) / len(values) for values in one_by_one(model, ITEMS)]
    assert scores == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize(("name", "extra"), PACKED.items(), ids=PACKED)
def test_packed_rows_give_the_scores_of_each_sequence_alone(name: str, extra: dict[str, Any]) -> None:
    model = build(name, extra)
    assert resolve_layout(Layout.AUTO, model, ITEMS, 0) == (Layout.PACKED, "")
    rows = batch(Layout.PACKED).rows
    assert isinstance(rows, PackedRows)
    assert rows.input_ids.numel() < 1.2 * sum(item.length for item in ITEMS)
    check_scores(model, Layout.PACKED)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_packed_rows_fit_both_implementations_of_attention(implementation: str) -> None:
    model = build("Llama", {"attn_implementation": implementation})
    assert model.config._attn_implementation == implementation  # type: ignore[union-attr]
    check_scores(model, Layout.PACKED)


@pytest.mark.parametrize(("name", "extra", "reason"), [(k, *v) for k, v in NOT_PACKED.items()], ids=NOT_PACKED)
def test_models_that_cannot_take_packed_rows_are_recognized(name: str, extra: dict[str, Any], reason: str) -> None:
    model = build(name, extra)
    layout, found = resolve_layout(Layout.AUTO, model, ITEMS, 0)
    assert layout is Layout.SORTED
    assert reason in found
    with pytest.raises(ConfigError, match=r"layout packed does not fit this model: .*; use layout auto or sorted"):
        resolve_layout(Layout.PACKED, model, ITEMS, 0)
    check_scores(model, Layout.SORTED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_hides_no_wrong_model(dtype: torch.dtype) -> None:
    items = make_items([9, 20, 3, 14, 5], [(3, 4, 3)] * 5)
    for name, expected in (("Llama", Layout.PACKED), ("Gemma2", Layout.PACKED), ("GPT2", Layout.PACKED)):
        assert resolve_layout(Layout.AUTO, build(name, PACKED[name]).to(dtype), items, 0)[0] is expected
    for name in ("Mpt", "GPTNeo"):  # they compute, but not the same
        assert resolve_layout(Layout.AUTO, build(name, NOT_PACKED[name][0]).to(dtype), items, 0)[0] is Layout.SORTED


def test_rows_are_no_wider_than_the_model_has_positions() -> None:
    """GPT-Neo's own causal mask is as wide as its positions."""
    extra = {"attention_types": [[["global"], 2]], "num_layers": 2, "num_hidden_layers": 2}
    model, items = build("GPTNeo", extra), make_items([20, 30, 25, 9, 28, 12, 31, 40], [(1,)] * 8)
    assert resolve_layout(Layout.AUTO, model, [items[3], items[5]], 0)[0] is Layout.PACKED
    with pytest.raises(RuntimeError, match="must match the size"):
        packed_batch(items, [0] * 8, CPU, None, in_one_row=True).rows.logits(model)
    batch = packed_batch(items, [0] * 8, CPU, None, 64)
    with torch.no_grad():
        scores = candidate_scores(model, batch).flatten().tolist()
    assert scores == pytest.approx([values[0] for values in one_by_one(model, items)], abs=2e-5)


def test_candidates_that_an_evaluation_sent_serve_backpropagation(llama: nn.Module) -> None:
    data = encode_task()
    evaluate(llama, data)
    task_loss(llama, data.batch([0, 1, 2], answers="all", device=CPU), Objective.CANDIDATES).backward()
    assert llama.lm_head.weight.grad is not None  # type: ignore[union-attr]


def test_a_model_that_ignores_the_mask_is_recognized(llama: nn.Module) -> None:
    forward = llama.model.forward  # type: ignore[union-attr]

    def ignoring(*args: Any, **kwargs: Any) -> Any:
        kwargs["attention_mask"] = None if kwargs["attention_mask"].dim() == 4 else kwargs["attention_mask"]
        kwargs["position_ids"] = torch.arange(kwargs["input_ids"].shape[1])[None]
        return forward(*args, **kwargs)

    llama.model.forward = ignoring  # type: ignore[union-attr]
    layout, reason = resolve_layout(Layout.AUTO, llama, ITEMS, 0)
    assert layout is Layout.SORTED
    assert "the scores of LlamaForCausalLM move by" in reason


def test_a_model_with_another_head_is_recognized(llama: nn.Module) -> None:
    head = llama.lm_head
    llama.get_output_embeddings = lambda: nn.Linear(1, 1)  # type: ignore[assignment, method-assign]
    layout, reason = resolve_layout(Layout.AUTO, llama, ITEMS, 0)
    assert (layout, llama.lm_head) == (Layout.SORTED, head)
    assert "does not pass its hidden states through the output head" in reason


@pytest.mark.parametrize("layout", [Layout.PADDED, Layout.SORTED], ids=str)
def test_other_layouts_are_taken_without_a_check(layout: Layout, llama: nn.Module) -> None:
    llama.forward = None  # type: ignore[method-assign, assignment]
    assert resolve_layout(layout, llama, ITEMS, 0) == (layout, "")


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("layout", [Layout.PADDED, Layout.SORTED, Layout.PACKED], ids=str)
def test_every_layout_gives_the_losses_of_single_examples(
    architecture: str, objective: Objective, task: Any, layout: Layout
) -> None:
    model, data = make_model(architecture), encode_task(task)
    data.layout = layout
    answers = "all" if objective is Objective.CANDIDATES else "gold"
    order = [2, 0, 1]
    likelihoods = [candidate_log_likelihoods(model, data, i) for i in order]
    labels = [int(data.labels[i]) for i in order]
    if objective is Objective.CANDIDATES:
        scores = torch.tensor([[sum(c) / len(c) for c in of_example] for of_example in likelihoods])
        wanted = nn.functional.cross_entropy(scores, torch.tensor(labels), reduction="none").tolist()
        mean = sum(wanted) / len(wanted)
    else:
        gold = [of_example[label] for of_example, label in zip(likelihoods, labels, strict=True)]
        wanted = [-sum(c) / len(c) for c in gold]
        by_token = objective is Objective.LANGUAGE_MODEL
        mean = -sum(map(sum, gold)) / sum(map(len, gold)) if by_token else sum(wanted) / len(wanted)
    batch = data.batch(order, answers=answers, device=CPU)
    assert batch.labels.tolist() == labels
    with torch.no_grad():
        assert example_losses(model, batch, objective).tolist() == pytest.approx(wanted, abs=2 * TOLERANCE)
        assert task_loss(model, batch, objective).item() == pytest.approx(mean, abs=2 * TOLERANCE)


@pytest.mark.parametrize("task", [SST2, MULTI_TOKEN_TASK], ids=["one token", "several tokens"])
def test_gradients_do_not_depend_on_the_layout(task: Any) -> None:
    gradients = []
    for layout in (Layout.PADDED, Layout.SORTED, Layout.PACKED):
        model, data = make_model(), encode_task(task)
        data.layout = layout
        task_loss(model, data.batch([0, 1, 2], answers="all", device=CPU), Objective.CANDIDATES).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


def test_evaluation_does_not_depend_on_the_layout_or_the_batch(llama: nn.Module) -> None:
    words = WORDS.split()
    rows = [{"sentence": " ".join(words[i % 5 : i % 5 + 1 + i % 7]), "label": i % 2} for i in range(40)]
    results = []
    for layout in (Layout.PADDED, Layout.SORTED, Layout.PACKED):
        data = encode_task(MULTI_TOKEN_TASK, rows=rows)
        data.layout = layout
        results += [evaluate(llama, data, size) for size in (1, 7, 100)]
    assert all((r.scores, r.examples) == (results[0].scores, 40) for r in results)
    assert [r.loss for r in results] == pytest.approx([results[0].loss] * 9, abs=TOLERANCE)


@torch.no_grad()
def test_a_sequence_does_not_see_its_neighbours(llama: nn.Module) -> None:
    """Bit for bit: other tokens in the same row, and in other candidates of the same prompt, change nothing."""
    first = packed_batch(ITEMS, [0] * 5, CPU, None, in_one_row=True)
    changed = [
        Item(
            prompt=item.prompt if i == 1 else item.prompt + 1,
            answers=[a if i == 1 and j == 2 else a + 1 for j, a in enumerate(item.answers)],
        )
        for i, item in enumerate(ITEMS)
    ]
    second = packed_batch(changed, [0] * 5, CPU, None, in_one_row=True)
    places = first.answer_places[5][first.answer_mask[5]]  # the third answer of the second item
    before, after = (b.rows.logits(llama) for b in (first, second))
    assert same_bits(before[places], after[places])
    assert not same_bits(before, after)


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)


@given(LENGTHS, st.sampled_from([1, 16, 64]), st.sampled_from([None, 100, 300, 512]))
def test_packing_puts_every_sequence_into_one_row_that_holds_it(
    lengths: list[int], multiple: int, limit: int | None
) -> None:
    width, rows = pack(lengths, multiple, limit)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= width for row in rows)
    assert width % multiple == 0 or width == max(limit or 0, max(lengths))
    rounded = -(-max(lengths) // multiple) * multiple
    if limit is not None:
        assert width <= max(limit, max(lengths))
    assert width * len(rows) <= rounded * len(lengths)  # never more than one padded sequence a row


@given(LENGTHS)
def test_parts_of_like_length_hold_every_sequence_once_and_pad_less(lengths: list[int]) -> None:
    parts = parts_of_like_length(lengths)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert 1 <= len(parts) <= 4
    positions = sum(len(part) * max(lengths[i] for i in part) for part in parts)
    assert positions <= len(lengths) * max(lengths)
    assert all(part == sorted(part) for part in parts)


def test_sequences_are_cut_where_it_saves_most() -> None:
    assert parts_of_like_length([100, 10, 100, 12, 11, 99]) == [[1, 3, 4], [0, 2, 5]]
    assert parts_of_like_length([10, 11, 12, 10]) == [[0, 1, 2, 3]]  # a pass costs more than three positions
    assert isinstance(batch(Layout.SORTED).rows, SortedRows)


def test_most_positions_are_real_tokens() -> None:
    random = np.random.default_rng(1)
    shares = []
    for _ in range(50):
        lengths = (8 + random.gamma(2.0, 12.0, 16)).astype(int).tolist()
        width, rows = pack(lengths)
        shares.append(width * len(rows) / sum(lengths))
    assert np.mean(shares) < 1.1


def test_widths_on_a_gpu_are_few() -> None:
    random = np.random.default_rng(2)
    shapes = set()
    for _ in range(200):
        lengths = (8 + random.gamma(2.0, 12.0, 16)).astype(int).tolist()
        width, rows = pack(lengths, 64)
        shapes.add((width, len(rows)))
    assert len(shapes) <= 30


@pytest.mark.parametrize(("name", "extra"), PACKED.items(), ids=PACKED)
def test_packed_texts_give_the_loss_and_gradient_of_padded_ones(name: str, extra: dict[str, Any]) -> None:
    model = build(name, extra)
    texts = [item.prompt for item in ITEMS]
    padded = {
        "input_ids": torch.tensor([[0] * (20 - len(t)) + t.tolist() for t in texts]),
        "attention_mask": torch.tensor([[0] * (20 - len(t)) + [1] * len(t) for t in texts]),
    }
    packed = text_batch(texts, CPU)
    assert packed.rows.input_ids.numel() < 1.2 * sum(map(len, texts)) < padded["input_ids"].numel()
    found = []
    for batch in (padded, packed):
        model.zero_grad()
        loss = language_model_loss(model, batch)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient))
    assert found[1][0] == pytest.approx(found[0][0], abs=2e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-5 * found[0][1].abs().max().item())
