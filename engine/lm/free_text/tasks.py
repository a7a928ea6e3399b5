"""The built-in tasks of free text. Their prompts were written for this project."""

from ..hub import HubSource
from .task import Row, TextTask


def _squad(row: Row) -> Row:
    answers = list(row["answers"]["text"])
    return {**row, "answer": answers[0] if answers else "", "answers": answers}


def _drop(row: Row) -> Row:
    spans = list(row["answers_spans"]["spans"])
    return {**row, "answer": ", ".join(spans), "answers": [", ".join(spans)]}


def _dolly(row: Row) -> Row:
    return {**row, "input": row["context"], "output": row["response"]}


# As in MeZO (arXiv 2305.17333) and DeComFL: SQuAD, DROP, and XSum. As in FedKSeed (arXiv 2312.06353): Dolly.
TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask(
            name="squad",
            hub=HubSource(path="rajpurkar/squad"),
            template="{context}\n\nAnswer with words of this text. {question}\nAnswer:",
            answer=" {answer}",
            references="answers",
            prepare=_squad,
        ),
        TextTask(
            name="drop",
            hub=HubSource(path="ucinlp/drop"),
            template="{passage}\n\nAnswer by counting, comparing or quoting this text. {question}\nAnswer:",
            answer=" {answer}",
            references="answers",
            prepare=_drop,
        ),
        TextTask(
            name="xsum",
            hub=HubSource(path="EdinburghNLP/xsum", revision="refs/convert/parquet"),
            template="{document}\n\nThis report in one sentence:",
            answer=" {summary}",
        ),
        TextTask(
            name="dolly",
            hub=HubSource(path="databricks/databricks-dolly-15k", validation=None),
            client_field="category",
            class_field="category",
            prepare=_dolly,
        ),
        TextTask(name="alpaca", hub=HubSource(path="tatsu-lab/alpaca", validation=None)),
    )
}


__all__ = ["TEXT_TASKS"]
