"""Files of tensors from strangers: nothing in them is executed, and they take no more memory than their size says."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100


def load_tensors(path: Path | str) -> Any:
    """What `torch.save` or safetensors wrote: tensors and plain values, on the CPU.

    Raises ValueError, or whatever torch raises, for a file that is damaged, that holds more than that, or whose content
    is larger than the file: packed, or a tensor that repeats its numbers.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as parts:
            sizes = [part.file_size for part in parts.infolist()]
            if sum(sizes) > path.stat().st_size:
                raise ValueError("its parts are larger than the file")
    content = torch.load(path, map_location="cpu", weights_only=True)
    _refuse_repeated(content)
    return content


def _refuse_repeated(content: Any) -> None:
    seen, left = set(), [(content, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor claims more numbers than the file holds")
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            left += [(part, depth + 1) for part in parts]
