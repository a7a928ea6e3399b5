"""The dtype that a checkpoint's weights are stored in."""

import math
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from .weight_files import safetensors_files

# Names in safetensors and GGUF files, and as in ``models.DTYPES``.
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def own_dtype(source: str) -> str:
    """Returns the name of the dtype in which a checkpoint stores most of its weights.

    float32 for weights of any other type, such as those of a quantized GGUF file, and where no weights can be read:
    ``load_model`` then says why.

    Args:
        source: see ``models.load_model``; files of a model on the hub are downloaded.
    """
    elements: Counter[str] = Counter()
    try:
        if Path(source).suffix == ".gguf":
            from gguf import GGUFReader

            for tensor in GGUFReader(source).tensors:
                elements[tensor.tensor_type.name] += int(tensor.n_elements)
        else:
            for path in safetensors_files(source):
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118, it is no dictionary
                        part = file.get_slice(name)
                        elements[part.get_dtype()] += math.prod(part.get_shape())
    except Exception:  # damaged files raise exceptions of any type
        return "float32"
    stored, _ = elements.most_common(1)[0] if elements else ("F32", 0)
    return _NAMES.get(stored, "float32")


__all__ = ["own_dtype"]
