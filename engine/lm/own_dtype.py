"""The dtype that a checkpoint's weights are stored in."""

import math
import re
from collections import Counter
from pathlib import Path

from safetensors import safe_open

from .weight_files import safetensors_files

# Names in safetensors and GGUF files, and as in ``models.DTYPES``.
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_NO_WEIGHTS = {"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "F8_E4M3", "F8_E5M2"}
# Names of the scales beside weights that bitsandbytes or torchao has quantized.
_SCALES = re.compile(
    r"\.weight\.(nested_)?(absmax|quant_map)$|\.SCB$|"
    r"\._\w+_(scale|scale_and_zero|per_tensor_scale|zero_point|act_pre_scale)$"
)


def own_dtype(source: str) -> str:
    """Returns the name of the dtype in which a checkpoint stores most of its weights, those that are packed left out.

    float32 for weights of any other type, such as those of a quantized GGUF file, and where no weights can be read:
    ``load_model`` then says why.

    Args:
        source: see ``models.load_model``; files of a model on the hub are downloaded.
    """
    elements = Counter({stored: n for stored, n in _elements(source).items() if stored not in _NO_WEIGHTS})
    stored, _ = elements.most_common(1)[0] if elements else ("F32", 0)
    return _NAMES.get(stored, "float32")


def holding_dtype(source: str) -> str:
    """Returns the name of the smallest dtype that holds all of a checkpoint's weights as they are, up to float32.

    Some checkpoints store a few weights in a wider dtype than the others: "float32" for these.

    Args:
        source: see ``own_dtype``.
    """
    names = {_NAMES.get(stored, "float32") for stored in _elements(source) if stored not in _NO_WEIGHTS}
    return names.pop() if len(names) == 1 else "float32"


def _elements(source: str) -> Counter[str]:
    """Number of elements of each type in a checkpoint's files, but for scales; empty where these cannot be read."""
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
                        if _SCALES.search(name):
                            continue
                        part = file.get_slice(name)
                        elements[part.get_dtype()] += math.prod(part.get_shape())
    except Exception:  # damaged files raise exceptions of any type
        return Counter()
    return elements


__all__ = ["holding_dtype", "own_dtype"]
