"""A model that changed is noticed before its weights are written: by what changed, and within a step."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from meerkat_engine import SparseMask, SparseZO
from meerkat_engine.engine.errors import ModelChangedError
from meerkat_engine.engine.launch_groups import MaskedParameter

from helpers.regression import INPUTS, live_weights
from helpers.tensors import same_bits


def make_nested() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
        return nn.Sequential(blocks, nn.Linear(8, 1)).eval()


def make_optimizer(model: nn.Module) -> SparseZO:
    return SparseZO(model, SparseMask.random(model, 0.5, seed=1), lr=0.1)


def last(model: nn.Module) -> nn.Parameter:
    return model[1].weight  # type: ignore[index, return-value]


def other_values(model: nn.Module) -> None:
    last(model).data = last(model).data.clone()


def same_address_other_dtype(model: nn.Module) -> None:
    last(model).data = last(model).data.view(torch.int32).view(torch.float32).view(torch.bfloat16)


def other_parameter(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(last(model).detach().clone())  # type: ignore[index]


def no_parameter(model: nn.Module) -> None:
    del model[1]._parameters["weight"]  # type: ignore[index, union-attr]


CHANGES: dict[Callable[[nn.Module], None], str] = {
    other_values: "at another address",
    same_address_other_dtype: r"was torch.float32 on cpu, now it is torch.bfloat16",
    other_parameter: "was replaced in the model",
    no_parameter: "was replaced in the model",
}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_within_a_step_is_noticed_by_the_next_pass(change: Callable[[nn.Module], None], call: int) -> None:
    model = make_nested()
    opt, calls = make_optimizer(model), []

    def closure() -> float:
        calls.append(1)
        if len(calls) == call:
            change(model)
        return 0.5

    with pytest.raises(ModelChangedError, match=rf"parameter '1\.weight' .*{CHANGES[change]}"):
        opt.step(closure)
    assert len(calls) == call


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_noticed_before_the_closure_runs(change: Callable[[nn.Module], None]) -> None:
    model = make_nested()
    opt, calls = make_optimizer(model), []
    change(model)
    with pytest.raises(ModelChangedError, match=CHANGES[change]):
        opt.step(lambda: calls.append(1) or 0.5)  # type: ignore[func-returns-value, return-value]
    assert not calls


def test_a_module_that_was_replaced_on_the_way_to_a_parameter_is_noticed() -> None:
    model = make_nested()
    opt = make_optimizer(model)
    model[0][1] = nn.Sequential(nn.Linear(8, 8), nn.Tanh())  # type: ignore[index, operator]
    with pytest.raises(ModelChangedError, match=r"parameter '0\.1\.0\.weight' was replaced in the model"):
        opt.step(lambda: 0.5)


def test_a_module_with_another_dictionary_of_parameters_is_noticed_between_steps() -> None:
    model = make_nested()
    opt = make_optimizer(model)
    model[1]._parameters = {name: nn.Parameter(p.detach().clone()) for name, p in model[1]._parameters.items()}  # type: ignore[index, union-attr]
    with pytest.raises(ModelChangedError, match=r"parameter '1\.weight' was replaced in the model"):
        opt.step(lambda: 0.5)


def test_a_new_module_with_the_same_parameters_is_no_change() -> None:
    """As of a library that puts its own block, with the old layers in it, in the place of the model's."""
    model, other = make_nested(), make_nested()
    opt, expected = make_optimizer(model), make_optimizer(other)
    model[0][1] = nn.Sequential(model[0][1][0], nn.Tanh())  # type: ignore[index, operator]
    opt.step(lambda: model(INPUTS).square().mean())
    expected.step(lambda: other(INPUTS).square().mean())
    assert same_bits(live_weights(opt), live_weights(expected))


def test_parameters_are_looked_at_one_by_one_only_to_name_the_one_that_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_nested()
    opt, looks = make_optimizer(model), []
    for name in ("check_memory", "check_present"):
        check = getattr(MaskedParameter, name)
        monkeypatch.setattr(MaskedParameter, name, lambda *of, _check=check: looks.append(1) or _check(*of))
    opt.step_many([lambda: 0.5] * 3)
    assert not looks
    other_values(model)
    with pytest.raises(ModelChangedError):
        opt.step(lambda: 0.5)
    assert looks
