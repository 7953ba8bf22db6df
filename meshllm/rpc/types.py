"""Records that the compiled extension returns."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceInfo:
    """A ggml device. Memory in bytes."""

    name: str
    description: str
    type: str  # "CPU", "GPU", "IGPU" or "ACCEL"; "unknown" behind a stock server
    memory_free: int
    memory_total: int


@dataclass(frozen=True)
class ServerInfo:
    """The answer of a device server to `probe`."""

    kind: str  # "mesh", or "stock" for llama.cpp's own ggml-rpc-server
    devices: tuple[DeviceInfo, ...]
    models: frozenset[str]  # fingerprints in hexadecimal
    rtt_s: float = 0.0  # of one request and its reply; 0 for a stock server


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a GGUF; `offset` and `size` in bytes, from the start of file number `file`."""

    name: str
    type: int
    ne: tuple[int, int, int, int]
    file: int
    offset: int
    size: int


@dataclass(frozen=True)
class GgufInfo:
    """A model's files. `data_offsets` and `sizes` in bytes, one per file; `metadata` holds scalars and strings."""

    files: tuple[str, ...]
    data_offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, int | float | bool | str]
