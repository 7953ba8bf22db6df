"""Models made from the real one: in several files, or with fewer layers, as a draft model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf


def rewrite(
    source: Path,
    target: Path,
    layers: Sequence[int] | None = None,
    split_max_tensors: int = 0,
    numbers: Mapping[str, int] | None = None,
    change: Callable[[str, Any], Any] = lambda _name, data: data,
) -> list[Path]:
    """The files written, in order; `layers` are the ones to keep.

    `numbers` replace those of the metadata; `change` returns the data of a tensor, given its name and what it was.
    """
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture, split_max_tensors=split_max_tensors)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == f"{architecture}.block_count" and layers:
            value = len(layers)
        value = (numbers or {}).get(name, value)
        if value == []:
            continue  # gguf does not write empty lists
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        kind, _, rest = tensor.name.partition(".")
        name = tensor.name
        if kind == "blk" and layers is not None:
            number, _, rest = rest.partition(".")
            if int(number) not in layers:
                continue
            name = f"blk.{layers.index(int(number))}.{rest}"
        writer.add_tensor(name, change(name, tensor.data), raw_dtype=tensor.tensor_type)
    return written(writer, target)


def written(writer: gguf.GGUFWriter, target: Path) -> list[Path]:
    """Writes what the writer holds. The files, in order."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}*.gguf"))
