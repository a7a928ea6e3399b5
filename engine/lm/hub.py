"""Data sets on the Hugging Face hub, with the fields and labels that the project's tasks have."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import DataError


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where a data set is on the hub. Its files are Parquet or the like, and none of them is run.

    From version 4 on, which this project requires, ``datasets`` refuses a data set that comes as a script, and has no
    setting that would allow it.

    Args:
        path: of the repository, or of a local directory laid out like one.
        config: of the data set; None if it has only one.
        revision: None is the main branch; "refs/convert/parquet" is the hub's own conversion of a scripted data set.
        validation: name of the split that is held out.
        columns: the hub's column for each field that is called otherwise there.
        label: the field that holds the class.
        first_label: the hub's number for class 0.
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
        """The rows of a split.

        Args:
            split: "train" or "validation".
            streaming: reads as rows are taken, instead of all first.

        Raises:
            DataError: if the data set cannot be loaded.
        """
        import datasets

        names = {column: name for name, column in self.columns.items()}
        try:
            for row in datasets.load_dataset(
                self.path,
                self.config,
                split=self.validation if split == "validation" else split,
                revision=self.revision,
                streaming=streaming,
            ):
                renamed = {names.get(column, column): value for column, value in row.items()}
                if self.first_label and isinstance(renamed.get(self.label), int):
                    renamed[self.label] -= self.first_label
                yield renamed
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"cannot load {self} from the hub: {error}; give --data-dir for local files") from error


__all__ = ["HubSource"]
