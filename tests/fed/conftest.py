"""Fixtures: the embedded model, its task, and a factory of small federations."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from meerkat_engine.engine.lm import embedded
from meerkat_engine.engine.lm.examples import EncodedTask
from meerkat_engine.engine.lm.models import LanguageModel

from helpers.federation import Federation


@pytest.fixture(scope="session")
def task_data() -> EncodedTask:
    lm = embedded.load()
    return EncodedTask(embedded.TASKS[embedded.NAME], embedded.rows("train")[:200], lm.tokenizer, 128, "embedded")


@pytest.fixture
def federation(task_data: EncodedTask) -> Iterator[Callable[..., Federation]]:
    with ExitStack() as stack:

        def make(**settings: Any) -> Federation:
            new = Federation(task_data, **settings)
            if new.writer is not None:
                stack.enter_context(new.writer)
            return new

        yield make


@pytest.fixture(scope="session")
def embedded_model() -> LanguageModel:
    return embedded.load()
