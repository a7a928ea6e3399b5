"""Paths computed from scalars, against the same paths computed with vectors."""

from dataclasses import replace

import pytest
import torch

from meerkat_engine import SparseMask
from meerkat_engine.engine import stream
from meerkat_engine.engine.errors import MaskError
from meerkat_engine.engine.lm import embedded
from meerkat_engine.fed.gradip import GradIP

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def mask() -> SparseMask:
    random_mask = SparseMask.random(embedded.load().model, 0.01, 3)
    return replace(random_mask, gradient=stream.normal(5, random_mask.ids) * 0.01)


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_traces_equal_those_of_the_path_computed_with_vectors(mask: SparseMask, backend: str) -> None:
    """The client's gradients as vectors: g_t (z_t * m), float64."""
    seeds = [stream.step_seed(1, 0, step) for step in range(5)]
    scalars = {4: [1.5, -2.0, 0.0, 1e-3, 7.0], 9: [0.25]}
    traces = GradIP(mask, CPU, backend).traces(seeds, scalars)
    assert set(traces) == {4, 9}
    assert mask.gradient is not None
    pretraining = mask.gradient.double()
    for client, own in scalars.items():
        path = [g * stream.normal(seed, mask.ids).double() for g, seed in zip(own, seeds, strict=False)]
        trace = traces[client]
        assert trace.gradip == pytest.approx([float(pretraining @ step) for step in path], rel=1e-12, abs=1e-15)
        assert trace.norm == pytest.approx([float(step.norm()) for step in path], rel=1e-12)
        cosines = [float(torch.cosine_similarity(pretraining, step, 0, eps=1e-300)) for step in path]
        assert trace.cosine == pytest.approx(cosines, rel=1e-9, abs=1e-12)


def test_one_pass_over_the_mask_computes_the_paths_of_all_clients(
    mask: SparseMask, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradip = GradIP(mask, CPU, "torch")
    calls = []
    inner = gradip._ops.inner
    monkeypatch.setattr(gradip._ops, "inner", lambda *a: calls.append(a) or inner(*a), raising=False)
    gradip.traces(list(range(10)), {client: [1.0] * 10 for client in range(1000)})
    assert len(calls) == 1


def test_gradip_needs_a_mask_with_a_gradient(mask: SparseMask) -> None:
    with pytest.raises(MaskError, match=r"GradIP needs the gradient .* \(random, seed 3\) does not have"):
        GradIP(replace(mask, gradient=None), CPU)
