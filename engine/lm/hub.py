"""Data sets on the Hugging Face hub, read with the field names and labels of this project's tasks."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .hub_connection import hub_or_cache


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Location and layout of a data set on the hub. Its files are data, such as Parquet; no code in it is run.

    This project requires version 4 of ``datasets`` or later. These versions reject data sets that are scripts, and have
    no setting to allow them.

    Args:
        path: name of the repository, or path of a local directory with the layout of one.
        config: configuration (subset) of the data set; None if it has only one.
        revision: branch, tag or commit; None is the main branch, and "refs/convert/parquet" is the hub's own Parquet
            conversion of a scripted data set.
        validation: name of the split that is held out.
        columns: for each field whose column on the hub has another name, that name.
        label: name of the field with the class.
        first_label: number of class 0 on the hub.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    validation: str = "validation"
    columns: Mapping[str, str] = field(default_factory=dict)
    label: str = "label"
    first_label: int = 0

    def __str__(self) -> str:
        return "".join([
            self.path,
            f" ({self.config})" if self.config else "",
            f" @ {self.revision}" if self.revision else "",
        ])  # fmt: skip

    def rows(self, split: str, streaming: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the rows of a split, with columns and labels renamed to those of the task.

        Args:
            split: "train" or "validation".
            streaming: whether to read rows only as they are consumed, instead of all of them first.

        Raises:
            DataError: if the data set cannot be loaded.
        """
        import datasets

        field_of = {column: name for name, column in self.columns.items()}
        try:
            for row in self._load(split, streaming):
                renamed = {field_of.get(column, column): value for column, value in row.items()}
                if self.first_label and isinstance(renamed.get(self.label), int):
                    renamed[self.label] -= self.first_label
                yield renamed
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot load {self} from the hub: {error}; to read local files, pass --data-dir"
            ) from error

    def _load(self, split: str, streaming: bool) -> Any:
        """Loads a split as ``datasets`` gives it."""
        import datasets

        with nullcontext() if Path(self.path).exists() else hub_or_cache(str(self)):
            return datasets.load_dataset(
                self.path,
                self.config,
                split=self.validation if split == "validation" else split,
                revision=self.revision,
                streaming=streaming,
            )


__all__ = ["HubSource"]
