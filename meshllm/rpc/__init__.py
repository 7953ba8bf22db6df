"""The data plane from Python: the compiled extension, and model fingerprints."""

try:
    from meshllm.rpc._native import DeviceServer, ggml_version, list_devices, probe, read_gguf, split_parts
except ModuleNotFoundError as error:  # pragma: no cover - only in a tree that was never built
    if error.name != "meshllm.rpc._native":
        raise
    raise ModuleNotFoundError(
        "meshllm's compiled extension is missing: run `pip install .` in the checkout, then start mesh-llm in another "
        "folder, since here Python imports the checkout's own meshllm",
        name=error.name,
    ) from None
from meshllm.rpc.fingerprint import fingerprint
from meshllm.rpc.types import DeviceInfo, GgufInfo, ServerInfo, TensorInfo

__all__ = [
    "DeviceInfo",
    "DeviceServer",
    "GgufInfo",
    "ServerInfo",
    "TensorInfo",
    "fingerprint",
    "ggml_version",
    "list_devices",
    "probe",
    "read_gguf",
    "split_parts",
]
