"""``replay`` of a log gives the bits of the training, and a log that does not belong to the weights is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from meerkat_engine import SparseMask, SparseZO, UpdateLog, fingerprint, replay
from meerkat_engine.engine.errors import LedgerError

from helpers.constants import DTYPES


def make_net(dtype: torch.dtype = torch.float32, shift: float = 0.0) -> nn.Sequential:
    """A small network with the same weights in every call, all moved by ``shift``."""
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.sin(torch.arange(p.numel(), dtype=torch.float32)).view_as(p) + shift)
    return net.to(dtype)


def loss_of(net: nn.Module) -> Callable[[], Tensor]:
    x = torch.cos(torch.arange(24, dtype=torch.float32)).view(4, 6)
    return lambda: net(x.to(next(net.parameters()).dtype)).float().square().mean()


def mask_of(net: nn.Module) -> SparseMask:
    return SparseMask.random(net, 0.4, 2)


def train(net: nn.Module, steps: int = 5, **options: Any) -> SparseZO:
    opt = SparseZO(net, mask_of(net), **({"lr": 0.05, "eps": 1e-2, "seed": 7} | options))
    for step in range(steps):
        opt.param_groups[0]["lr"] = 0.05 / (1 + step)
        opt.step(loss_of(net))
    return opt


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters(), "lr": 0.05}, {"params": net[2].parameters(), "lr": 0.003}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"queries": 3}, {"estimator": "forward-difference"}], ids=str)
def test_a_saved_log_replays_to_the_bits(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype) -> None:
    net = make_net(dtype)
    train(net, **options).log.save(tmp_path / "updates.jsonl")
    base = make_net(dtype)
    replay(base, mask_of(base), UpdateLog.load(tmp_path / "updates.jsonl"))
    assert fingerprint(base) == fingerprint(net) != fingerprint(make_net(dtype))


@pytest.mark.parametrize(("order", "lr_of_group_1"), [(1, 0.003), (-1, 0.05)], ids=["in order", "in reverse"])
def test_each_parameter_group_is_replayed_with_its_own_lr(tmp_path: Path, order: int, lr_of_group_1: float) -> None:
    net = make_net()
    train(net, params=groups_of(net)[::order], queries=2).log.save(tmp_path / "updates.jsonl")
    log = UpdateLog.load(tmp_path / "updates.jsonl")
    assert log.updates[2][1] == (0.025 / 2, lr_of_group_1 / 2)
    base = make_net()
    replay(base, mask_of(base), log)
    assert fingerprint(base) == fingerprint(net)


def test_skipped_queries_are_left_out() -> None:
    net = make_net()
    opt = SparseZO(net, mask_of(net), lr=0.05, nonfinite="skip")
    for bad in (False, True, False):
        opt.step(lambda bad=bad: loss_of(net)() * (math.nan if bad else 1))
    assert [math.isnan(g) for _, _, g in opt.log.updates] == [False, True, False]
    base = make_net()
    replay(base, mask_of(base), opt.log)
    assert fingerprint(base) == fingerprint(net)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logs_before_and_after_a_resume_replay_together_and_not_alone(dtype: torch.dtype) -> None:
    net = make_net(dtype)
    first = train(net)
    resumed_net = make_net(dtype)
    resumed = SparseZO(resumed_net, mask_of(resumed_net), lr=0.05, eps=1e-2, seed=7)
    resumed.load_state_dict(first.state_dict())
    for _ in range(3):
        resumed.step(loss_of(resumed_net))
    base = make_net(dtype)
    with pytest.raises(LedgerError, match="the updates of a resumed training after those before it"):
        replay(base, mask_of(base), resumed.log)
    replay(base, mask_of(base), first.log + resumed.log)
    assert fingerprint(base) == fingerprint(resumed_net)
    assert len((first.log + resumed.log).updates) == 8


def test_a_log_is_refused_where_it_does_not_belong() -> None:
    log = train(make_net()).log
    other_mask = SparseMask.random(make_net(), 0.4, 3)
    net = make_net()
    named = replace(log, updates=[(s, (lr, lr), g) for s, lr, g in log.updates], groups=(("0.weight",), ("2.bias",)))
    cases: list[tuple[nn.Module, SparseMask, UpdateLog, str]] = [
        (make_net(shift=0.01), mask_of(net), log, "replay on the base model in its original dtype"),
        (make_net(torch.bfloat16), mask_of(net), log, "replay on the base model in its original dtype"),
        (net, other_mask, log, f"were recorded with mask {log.mask[:12]}, this mask is {other_mask.digest[:12]}"),
        (net, mask_of(net), replace(log, stream_version=2), "of stream version 2, this is version 1"),
        (net, mask_of(net), replace(log, updates=log.updates[:3]), "nothing was changed"),
        (net, mask_of(net), replace(log, updates=log.updates[::-1]), "nothing was changed"),
        (net, mask_of(net), named, "the parameter groups of the updates are not those"),
    ]
    for model, mask, wrong, message in cases:
        before = fingerprint(model)
        with pytest.raises(LedgerError, match=message):
            replay(model, mask, wrong)
        assert fingerprint(model) == before


def test_a_training_in_bfloat16_is_refused_on_a_base_in_float32() -> None:
    """Although every bfloat16 weight equals its float32 master."""
    log = train(make_net(torch.bfloat16)).log
    upcast = make_net(torch.bfloat16).float()
    with pytest.raises(LedgerError, match="in its original dtype"):
        replay(upcast, mask_of(upcast), log)


def test_updates_of_the_caller_are_replayed_too() -> None:
    net, base = make_net(), make_net()
    opt = train(net)
    for seed in range(20):
        opt.apply(seed, 0.1 + seed / 7)
    replay(base, mask_of(base), opt.log)
    assert fingerprint(base) == fingerprint(net)


def test_part_of_a_log_can_be_replayed_if_its_end_is_not_stated() -> None:
    log = train(make_net()).log
    net, base = make_net(), make_net()
    train(net, steps=3)
    replay(base, mask_of(base), replace(log, updates=log.updates[:3], end=""))
    assert fingerprint(base) == fingerprint(net)


def test_bare_updates_are_applied_unchecked() -> None:
    net, base = make_net(), make_net()
    log = train(net).log
    replay(base, mask_of(base), iter(log.updates))  # type: ignore[arg-type]
    assert fingerprint(base) == fingerprint(net)
