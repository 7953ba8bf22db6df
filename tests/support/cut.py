"""Models made from the real one: in several files, or with fewer layers, as a draft model."""

from __future__ import annotations

from pathlib import Path

import gguf


def rewrite(source: Path, target: Path, n_layers: int | None = None, split_max_tensors: int = 0) -> list[Path]:
    """The files written, in order; `n_layers` keeps the first so many layers."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(target, architecture, split_max_tensors=split_max_tensors)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = field.contents()
        if name == f"{architecture}.block_count" and n_layers:
            value = n_layers
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        kind, _, rest = tensor.name.partition(".")
        if kind == "blk" and n_layers and int(rest.partition(".")[0]) >= n_layers:
            continue
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(target.parent.glob(f"{target.stem}*.gguf"))
