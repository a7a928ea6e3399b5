"""Generated text: the same tokens in a batch as alone, where it ends, and what it leaves of the model."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import GenerationConfig

from meerkat_engine.engine.errors import ConfigError, DataError, ModelError
from meerkat_engine.engine.lm.generation import Sampling, generate

from helpers.models import make_model
from helpers.tensors import flat_weights, same_bits

PROMPTS = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [40, 41], [9, 10, 11, 12]]
PAD, END = 0, [2, 60, 61, 62]


def lively_model(architecture: str = "llama", positions: int = 64) -> nn.Module:
    """A tiny model whose weights are so large that its text depends on every token and on where it is."""
    model = make_model(architecture, positions=positions)
    for p in model.parameters():
        if p.dim() > 1:
            p.data *= 12
    return model


def reference(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    """The most likely tokens, by a forward pass over the whole text for each of them."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in END:
            return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_batch_gives_the_most_likely_tokens_of_each_prompt(architecture: str, batch_size: int | None) -> None:
    model = lively_model(architecture)
    expected = [reference(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens[:3]) for tokens in expected}) > 2  # else prompts could be confused
    found = generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=12, batch_size=batch_size)
    assert found == expected


def test_an_end_token_ends_the_text_and_is_not_in_it() -> None:
    model = lively_model()
    endless = generate(model, PROMPTS, pad=PAD, end=[], max_new_tokens=10)
    assert [len(tokens) for tokens in endless] == [10] * len(PROMPTS)
    third = endless[0][2]
    first = endless[0].index(third)
    ended = generate(model, PROMPTS, pad=PAD, end=[95, third], max_new_tokens=10)
    assert ended[0] == endless[0][:first]
    assert all(third not in tokens for tokens in ended)
    # a padding token that is also the end token, as in GPT-2
    assert generate(model, PROMPTS, pad=third, end=[95, third], max_new_tokens=10) == ended


def test_nothing_is_computed_after_the_end() -> None:
    model, passes = lively_model(), []
    (text,) = generate(model, PROMPTS[:1], pad=PAD, end=[], max_new_tokens=40)
    end = text[3]
    model.register_forward_hook(lambda *_: passes.append(None))
    generate(model, PROMPTS[:1], pad=PAD, end=[end], max_new_tokens=40)
    assert len(passes) == text.index(end) + 1


def test_text_stops_where_the_model_has_no_more_positions(architecture: str) -> None:
    model = lively_model(architecture, positions=16)
    prompts = [[5, 6, 7], [7] * 14, [8] * 14, [9] * 15, [3] * 10]
    found = generate(model, prompts, pad=PAD, end=[], max_new_tokens=6)
    assert [len(tokens) for tokens in found] == [6, 2, 2, 1, 6]
    assert found == [generate(model, [prompt], pad=PAD, end=[], max_new_tokens=6)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "prompt 2 has no tokens"), ([5] * 64, "prompt 2 has 64 tokens, and the model has 64 positions")],
)
def test_a_prompt_that_cannot_be_continued_is_named(prompt: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        generate(make_model(), [[5], prompt], pad=PAD, end=END, max_new_tokens=4)


def test_a_model_that_is_no_language_model_is_an_error() -> None:
    with pytest.raises(ModelError, match="Linear cannot generate text"):
        generate(nn.Linear(2, 2), [[5]], pad=PAD, end=END, max_new_tokens=4)


def test_the_settings_of_the_checkpoint_neither_change_the_text_nor_warn(caplog: pytest.LogCaptureFixture) -> None:
    model = lively_model()
    expected = generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=8)
    own = GenerationConfig(
        do_sample=True, temperature=1.7, top_p=0.3, top_k=3, repetition_penalty=5.0, max_length=12, bad_words_ids=[[7]],
        eos_token_id=expected[0][1], num_beams=2,
    )  # fmt: skip
    model.generation_config = own
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=8) == expected
    assert not caplog.records
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_is_left_as_it_was() -> None:
    model = make_model(dtype=torch.bfloat16)
    model.train()
    model.get_submodule("model.layers.1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = flat_weights(copy.deepcopy(model))
    generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert same_bits(flat_weights(model), weights)
    assert all(p.grad is None for p in model.parameters())
    # a step by backpropagation still works: no buffer was left in inference mode
    model.train()(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def test_text_is_the_same_while_the_model_drops_units_in_training() -> None:
    model = lively_model("gpt2")
    expected = generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=8)
    model.train()
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    assert generate(model, PROMPTS, pad=PAD, end=END, max_new_tokens=8) == expected


def test_tokens_are_passed_on_as_they_come() -> None:
    model, seen = lively_model(), []
    (whole,) = generate(model, PROMPTS[:1], pad=PAD, end=[], max_new_tokens=9)
    end = whole[5]
    (text,) = generate(model, PROMPTS[:1], pad=PAD, end=[end], max_new_tokens=9, on_token=seen.append)
    assert seen == text == whole[: whole.index(end)]
    with pytest.raises(ValueError, match="single prompt"):
        generate(model, PROMPTS, pad=PAD, end=[], max_new_tokens=9, on_token=seen.append)


def test_stopping_in_the_middle_leaves_the_model_as_it_was() -> None:
    model = lively_model()
    own = model.generation_config
    model.train()

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, PROMPTS[:1], pad=PAD, end=[], max_new_tokens=9, on_token=stop)
    assert model.training
    assert model.generation_config is own


def test_sampling_follows_from_the_seed_whatever_else_is_in_the_batch() -> None:
    model = make_model()

    def draw(prompts: list[list[int]], seed: int, **more: float) -> list[list[int]]:
        return generate(
            model, prompts, pad=PAD, end=[], max_new_tokens=8, sampling=Sampling(seed=seed, **more), batch_size=3
        )  # type: ignore[arg-type]

    state = torch.get_rng_state()
    first = draw(PROMPTS, 1)
    assert first == draw(PROMPTS, 1)
    assert first != draw(PROMPTS, 2)
    assert first[:2] == draw(PROMPTS[:2], 1)
    assert draw([[5], [5]], 1)[0] != draw([[5], [5]], 1)[1]
    assert torch.equal(torch.get_rng_state(), state)
    greedy = generate(model, PROMPTS, pad=PAD, end=[], max_new_tokens=8)
    assert draw(PROMPTS, 1, temperature=1e-4) == greedy
    assert draw(PROMPTS, 1, top_p=1e-6) == greedy


def test_the_tokens_of_a_text_are_drawn_independently() -> None:
    model = make_model()
    for p in model.parameters():
        p.data.zero_()  # all tokens have the same probability
    (text,) = generate(model, [[5]], pad=PAD, end=[], max_new_tokens=40, sampling=Sampling(seed=1))
    assert len(set(text)) > 25  # 33 of 96 tokens are expected, with a standard deviation of 2.2


def test_tokens_are_drawn_with_the_probabilities_of_the_model() -> None:
    """By a chi-square test of 2,000 first tokens; 0.9999 quantile of 3 degrees of freedom: 21.1."""
    model = make_model(vocabulary=4)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[3, 1]])).logits[0, -1]
    for temperature in (float(logits.std()), float(logits.std()) / 1.7):
        drawn = generate(
            model, [[3, 1]] * 2000, pad=PAD, end=[], max_new_tokens=1, batch_size=500,
            sampling=Sampling(temperature=temperature, seed=5),
        )  # fmt: skip
        expected = 2000 * (logits / temperature).softmax(-1)
        counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=4)
        assert float(((counts - expected) ** 2 / expected).sum()) < 21.1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0, got 0"),
        ({"temperature": float("nan")}, "temperature must be"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be"),
    ],
)
def test_values_of_sampling_out_of_range_are_errors(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**values)  # type: ignore[arg-type]
