"""Data sets on the Hugging Face hub, read with the field names and labels of this project's tasks."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.file_download import repo_folder_name

from ..errors import DataError
from .hub_connection import hub_or_cache


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Location and layout of a data set on the hub. Its files are data, such as Parquet; no code in it is run.

    This project requires version 4 of ``datasets`` or later. These versions reject data sets that are scripts, and
    have no setting to allow them.

    Args:
        path: name of the repository, or path of a local directory with the layout of one.
        config: configuration (subset) of the data set; None if it has only one.
        revision: branch, tag or commit; None is the main branch, and "refs/convert/parquet" is the hub's own Parquet
            conversion of a scripted data set.
        train: name of the split to train on.
        validation: name of the split that is held out; None if the data set has none.
        columns: for each field whose column on the hub has another name, that name.
        label: name of the field with the class.
        first_label: number of class 0 on the hub.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = "validation"
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
            DataError: if the data set has no held-out split or cannot be loaded; the message names what does not
                exist, and what does. Also if its name is a file format of ``datasets``, such as "json".
        """
        import datasets

        name = self.validation if split == "validation" else self.train
        if name is None:
            raise DataError(f"{self} has no held-out split; name one, or hold out a part of its training split")
        self._check_name()
        field_of = {column: field for field, column in self.columns.items()}
        try:
            for row in self._load(name, streaming):
                renamed = {field_of.get(column, column): value for column, value in row.items()}
                if self.first_label and isinstance(renamed.get(self.label), int):
                    renamed[self.label] -= self.first_label
                yield renamed
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(
                f"cannot load {self} from the hub: {self._why(name, error)}; to read local files, pass --data-dir "
                f"(a task's) or --data (your own)"
            ) from error

    def _load(self, split: str, streaming: bool) -> Any:
        """Loads the split of this name as ``datasets`` gives it."""
        import datasets

        local = Path(self.path).exists()
        with nullcontext() if local else hub_or_cache(str(self)):
            loaded = datasets.load_dataset(
                self.path,
                self.config,
                split=split,
                revision=self.revision,
                streaming=streaming,
            )
            if isinstance(loaded, datasets.Dataset) and self.revision is not None and not local:
                self._check_revision(loaded, self.revision)
            return loaded

    def _check_name(self) -> None:
        """Raises ``DataError`` for the name of a file format, for which ``datasets`` reads the working directory."""
        from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

        if self.path.removeprefix("hf://datasets/") not in _PACKAGED_DATASETS_MODULES:
            return
        directory = f", or --dataset ./{self.path} for the directory" if Path(self.path).is_dir() else ""
        raise DataError(
            f"{self.path} is a file format of `datasets`, not a data set; use --data FILE for a file{directory}"
        )

    def _check_revision(self, loaded: Any, revision: str) -> None:
        """Checks that this revision was loaded: without the hub, ``datasets`` takes any that is in its cache.

        Raises:
            FileNotFoundError: if another one was loaded.
        """
        folder = huggingface_hub.constants.HF_HUB_CACHE, repo_folder_name(repo_id=self.path, repo_type="dataset")
        name_of_commit = Path(*folder, "refs", revision)
        commit = name_of_commit.read_text().strip() if name_of_commit.is_file() else revision
        files = [Path(file["filename"]) for file in loaded.cache_files]
        if files and not any(commit in file.parts for file in files):
            raise FileNotFoundError(f"the cache has another revision than {revision!r}")

    def _why(self, split: str, error: Exception) -> str:
        """Says why a split cannot be loaded, in one line: what does not exist, or the error itself."""
        import datasets

        said = " ".join(str(error).split())
        if isinstance(error, ConnectionError):
            return said
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None:
            return f"{said}: {' '.join(str(error.__cause__).split())}"
        try:
            configs = datasets.get_dataset_config_names(self.path, revision=self.revision)
            default = datasets.get_dataset_default_config_name(self.path, revision=self.revision)
            if self.config is None and default is None:
                return f"it has several configurations, of which one must be named: {', '.join(configs)}"
            if self.config is not None and self.config not in configs:
                return f"it has no configuration {self.config!r}, but has {', '.join(configs)}"
            splits = datasets.get_dataset_split_names(self.path, self.config, revision=self.revision)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError):
            return said  # the data set or its revision does not exist, which the error says
        if split not in splits and "[" not in split and "+" not in split:  # not a part of a split, or several
            return f"it has no split {split!r}, but has {', '.join(splits)}"
        return said


__all__ = ["HubSource"]
