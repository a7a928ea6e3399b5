"""Losses of free text: those of transformers with ``labels``, in every layout, and under everything that uses them."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from meerkat_engine.engine.lm import batches, scored_batches
from meerkat_engine.engine.lm.free_text.encoded import EncodedText
from meerkat_engine.engine.lm.layout import Layout
from meerkat_engine.engine.lm.objective import Objective, example_losses, task_loss
from meerkat_engine.engine.lm.text_loss import token_losses

from helpers.constants import CPU
from helpers.free_text import SHAPES, encode_shape, encode_text
from helpers.models import make_model

LAYOUTS = [Layout.PADDED, Layout.SORTED, Layout.PACKED]
ROWS = [{"prompt": "a" * (3 * i + 1), "completion": " b" * (7 - i)} for i in range(6)]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest) -> nn.Module:
    return make_model(request.param, vocabulary=272, positions=200)


def loss_of_transformers(model: Any, data: EncodedText, indices: list[int]) -> float:
    """The loss that transformers computes itself, with -100 where no token is predicted, padded on the right."""
    width = max(len(data.texts[i].ids) for i in indices)
    ids = torch.full((len(indices), width), 0)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, i in enumerate(indices):
        text = data.texts[i]
        n = len(text.ids)
        ids[row, :n] = torch.from_numpy(text.ids)
        mask[row, :n] = 1
        labels[row, torch.from_numpy(text.scored)] = torch.from_numpy(text.ids[text.scored])
    with torch.no_grad():
        return float(model(input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_are_those_of_transformers(model: nn.Module, shape: str, layout: Layout) -> None:
    data = encode_shape(shape)
    data.layout = layout
    batch = data.batch([1, 0], answers="gold", device=CPU)
    alone = [loss_of_transformers(model, data, [i]) for i in (1, 0)]
    with torch.no_grad():
        assert example_losses(model, batch, Objective.LANGUAGE_MODEL).tolist() == pytest.approx(alone, abs=1e-6)
        by_token = task_loss(model, batch, Objective.LANGUAGE_MODEL).item()
        by_example = task_loss(model, batch, Objective.LANGUAGE_MODEL_BY_EXAMPLE).item()
    assert by_token == pytest.approx(loss_of_transformers(model, data, [1, 0]), abs=1e-6)
    assert by_example == pytest.approx(sum(alone) / 2, abs=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_token_losses_are_in_the_order_of_the_texts(model: nn.Module, layout: Layout) -> None:
    data = encode_text(ROWS)
    data.layout = layout
    with torch.no_grad():
        whole = token_losses(model, data.batch(range(6), answers="gold", device=CPU))
        single = [token_losses(model, data.batch([i], answers="gold", device=CPU)) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(single), atol=2e-6, rtol=0)
    assert [len(part) for part in single] == [2 * (7 - i) + 1 for i in range(6)]  # two bytes a word, and the end


@pytest.mark.parametrize("objective", [Objective.LANGUAGE_MODEL, Objective.LANGUAGE_MODEL_BY_EXAMPLE])
def test_micro_batches_have_the_loss_and_the_gradient_of_the_batch(objective: Objective) -> None:
    model, data = make_model(vocabulary=272, positions=200), encode_text(ROWS)
    data.layout = Layout.PACKED
    whole = data.batch(range(6), answers="gold", device=CPU)
    parts = [data.batch(part, answers="gold", device=CPU) for part in ([0], [1, 2, 3], [4, 5])]
    results = []
    for batch in (whole, parts):
        model.zero_grad()
        loss = task_loss(model, batch, objective)
        loss.backward()
        results.append((loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-5)
    assert any(gradient.abs().max() > 1e-3 for gradient in results[0][1])


def test_no_more_than_128_logits_exist_at_a_time() -> None:
    model, data = make_model(vocabulary=272, positions=4000), encode_text(ROWS * 20, max_length=300)
    shapes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    with torch.no_grad():
        task_loss(model, data.batch(range(120), answers="gold", device=CPU), Objective.LANGUAGE_MODEL)
    handle.remove()
    assert sum(math.prod(shape[:-1]) for shape in shapes) == data.answer_tokens
    assert max(math.prod(shape[:-1]) for shape in shapes) == 128


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shapes_are_rounded_up_for_a_gpu_without_a_change_of_the_loss(
    monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    model, data = make_model(vocabulary=272, positions=200), encode_text(ROWS)
    data.layout = layout
    on_cpu = data.batch(range(6), answers="gold", device=CPU)
    monkeypatch.setattr(scored_batches, "send", lambda arrays, _: batches.send(arrays, CPU))
    for_gpu = data.batch(range(6), answers="gold", device=torch.device("cuda"))
    assert (for_gpu.tokens.shape, for_gpu.order.shape) == ((256,), (6, 64))
    with torch.no_grad():
        for objective in (Objective.LANGUAGE_MODEL, Objective.LANGUAGE_MODEL_BY_EXAMPLE):
            losses = [task_loss(model, batch, objective) for batch in (on_cpu, for_gpu)]
            torch.testing.assert_close(*losses, atol=1e-6, rtol=0)


def test_a_forward_pass_does_not_touch_random_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph cannot read their state."""
    model, data = make_model(vocabulary=272, positions=200), encode_text(ROWS)
    monkeypatch.setattr(torch, "get_rng_state", None)
    with torch.inference_mode():
        task_loss(model, data.batch(range(6), answers="gold", device=CPU), Objective.LANGUAGE_MODEL)


@pytest.mark.parametrize("layout", [Layout.AUTO, Layout.PACKED], ids=str)
def test_the_layout_of_free_text_is_checked_like_that_of_label_words(model: nn.Module, layout: Layout) -> None:
    data = encode_text(ROWS)
    data.resolve_layout(layout, model)
    assert (data.layout, data.layout_reason) == (Layout.PACKED, "")


def test_free_text_has_no_candidates() -> None:
    with pytest.raises(ValueError, match="free text has no candidates"):
        encode_text(ROWS).batch([0], answers="all", device=CPU)
