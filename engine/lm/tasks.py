"""Classification tasks as prompts: a template, the field that may be cut, and one label word per class.

The SST-2 prompt is MeZO's (arXiv 2305.17333, table 13): the sentence, "It was", and "great" or "terrible". The other
prompts were written for this project. Their label words are short, because label words of one token need only one
sequence per example for all classes together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, DataError
from .hub import HubSource
from .label_words import follow_prompt
from .template import fill, template_fields
from .text import check_text

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A classification task.

    Args:
        name: value of ``--task``, and name of the folder under ``--data-dir``.
        hub: the task's data set on the Hugging Face hub; None if it is not there.
        template: the prompt, with field names in braces; the label word follows it.
        cut: name of the field whose end is cut when the prompt is too long.
        label_words: one word per class, at least two, each exactly as it follows the prompt: in most cases with a space
            in front.
        label: name of the field with the class: an integer from 0 (or its digits as text, unless a label word is a
            number), a bool, or a label word.
        client_field: name of the field that names the client an example belongs to, for the partition "natural"; None
            if there is no such field.
        domains: names of the task's domains: rows are read from the folders NAME_DOMAIN and get the field ``domain``;
            empty for a task with a single folder.

    Raises:
        ConfigError: if the template is malformed, ``cut`` is not one of its fields, a label word is empty or occurs
            twice, there are fewer than two, or template or label words hold half of a surrogate pair.
    """

    name: str
    hub: HubSource | None = None
    template: str
    cut: str
    label_words: tuple[str, ...]
    label: str = "label"
    client_field: str | None = None
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_text(self.template, "the template")
            check_text("".join(self.label_words), f"a label word of task {self.name!r}")
        except DataError as error:
            raise ConfigError(str(error)) from None
        fields = self.fields
        if self.cut not in fields:
            raise ConfigError(f"cut {self.cut!r} is not a field of the template, whose fields are {', '.join(fields)}")
        words = [_normalized(word) for word in self.label_words]
        listed = ", ".join(map(repr, words))
        if len(words) < 2 or not all(words):
            raise ConfigError(f"task {self.name!r} needs at least two label words, none of them empty; got {listed}")
        if len(set(words)) < len(words):
            raise ConfigError(f"task {self.name!r} needs different label words; got {listed}")

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the template uses."""
        return template_fields(self.template)

    def check(self, row: Row, where: str) -> None:
        """Checks that a row has the task's fields and a valid label.

        Args:
            row: the example.
            where: where the row comes from, for the error message.

        Raises:
            DataError: if a field is missing, is not text or holds half of a surrogate pair, or the label is invalid.
        """
        for name in (*self.fields, self.label):
            if name not in row:
                raise DataError(f"{where}: task {self.name!r} needs the field {name!r}; found {sorted(row)}")
        for name in self.fields:
            if not isinstance(row[name], str):
                raise DataError(f"{where}: field {name!r} must be text, got {type(row[name]).__name__}")
            check_text(row[name], f"{where}: field {name!r}")
        try:
            self.class_of(row)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    def class_of(self, row: Row) -> int:
        """Returns the class of a row, in [0, number of label words).

        Raises:
            DataError: if the label is not a class, or is ambiguous: the number of one class and the word of another.
        """
        label, words = row[self.label], [_normalized(word) for word in self.label_words]
        if isinstance(label, str) and _normalized(label) in words:
            return words.index(_normalized(label))
        numbers = [str(i) for i in range(len(words))]
        if isinstance(label, str) and label.strip() in numbers and not any(word.isdecimal() for word in words):
            return int(label)  # in a table of text, such as a .csv file, numbers are text
        if not isinstance(label, int) or not 0 <= label < len(words):
            raise DataError(
                f"label {label!r} is outside task {self.name!r}, "
                f"whose labels are 0 to {len(words) - 1} or the words {', '.join(words)}"
            )
        other_classes = [i for i, word in enumerate(words) if word.casefold() == str(label).casefold() and i != label]
        if other_classes:
            raise DataError(
                f"label {label} of task {self.name!r} is the number of one class and the label word of another; "
                f'if you mean the word, write it as text: "{words[other_classes[0]]}"'
            )
        return int(label)

    def prompt(self, row: Row) -> str:
        """Returns the prompt of a row, with the fields' surrounding white space removed."""
        return fill(self.template, {name: row[name] for name in self.fields})


def _normalized(word: str) -> str:
    """The word without surrounding white space, and with single spaces inside."""
    return " ".join(word.split())


SST2 = Task(
    name="sst2",
    hub=HubSource(path="nyu-mll/glue", config="sst2"),
    template="{sentence} It was",
    cut="sentence",
    label_words=(" terrible", " great"),
)

_SUPER_GLUE = "aps/super_glue"

TASKS = {
    task.name: task
    for task in (
        SST2,
        Task(
            name="ag_news",
            hub=HubSource(path="fancyzhx/ag_news", validation="test"),
            template="{text}\nSection of the newspaper:",
            cut="text",
            label_words=(" World", " Sports", " Business", " Technology"),
        ),
        Task(
            name="yelp_polarity",
            hub=HubSource(path="fancyzhx/yelp_polarity", validation="test"),
            template="{text}\nOn the whole, the experience was",
            cut="text",
            label_words=(" bad", " good"),
        ),
        Task(
            name="boolq",
            hub=HubSource(path="google/boolq"),
            template="{passage}\nGoing by this text, {question}? The answer is",
            cut="passage",
            label_words=(" no", " yes"),
            label="answer",
        ),
        Task(
            name="rte",
            hub=HubSource(path=_SUPER_GLUE, config="rte"),
            template="{premise}\nClaim: {hypothesis}\nThe text supports the claim:",
            cut="premise",
            label_words=(" yes", " no"),
        ),
        Task(
            name="wsc",
            hub=HubSource(path=_SUPER_GLUE, config="wsc"),
            template='{text}\nHere "{span2_text}" refers to "{span1_text}". This reading is',
            cut="text",
            label_words=(" wrong", " right"),
        ),
        Task(
            name="wic",
            hub=HubSource(path=_SUPER_GLUE, config="wic"),
            template='{sentence1}\n{sentence2}\nThe meanings of "{word}" in these two sentences are',
            cut="sentence1",
            label_words=(" different", " identical"),
        ),
        Task(
            name="trec",
            hub=HubSource(path="CogComp/trec", revision="refs/convert/parquet", validation="test"),
            template="{text}\nType of answer:",
            cut="text",
            label_words=(" abbreviation", " thing", " description", " person", " place", " number"),
            label="coarse_label",
        ),
        Task(
            name="medical_abstracts",
            hub=HubSource(
                path="TimSchopf/medical_abstracts",
                validation="test",
                columns={"text": "medical_abstract", "label": "condition_label"},
                first_label=1,
            ),
            template="{text}\nGroup of diseases:",
            cut="text",
            label_words=(" cancer", " digestive", " nervous", " heart", " general"),
        ),
        Task(
            name="vader",
            template="{sentence} All in all, that sounds",
            cut="sentence",
            label_words=(" negative", " positive"),
            client_field="domain",
            domains=("amazon", "movie", "nyt", "tweets"),
        ),
    )
}


def custom_task(name: str, template: str, labels: str, *, label: str = "label", cut: str | None = None) -> Task:
    """Creates a task for the user's own data.

    Args:
        name: the task's name, used in messages and in the names of run directories.
        template: the prompt, with field names in braces; see ``label_words.follow_prompt`` for how it may end.
        labels: the label words, separated by commas; all of them may be in double quotes.
        label: name of the field with the class.
        cut: name of the field that may be cut; None is the first field of the template.

    Raises:
        ConfigError: see ``Task`` and ``label_words.follow_prompt``.
    """
    template, label_words = follow_prompt(template, labels)
    return Task(
        name=name,
        template=template,
        cut=cut or template_fields(template)[0],
        label_words=label_words,
        label=label,
    )


__all__ = ["SST2", "TASKS", "Row", "Task", "custom_task"]
