"""What a worker lends and names, over devices that are told what they are."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
from support import adapters
from support.memories import MB, layer, memory_of
from support.processes import smollm2

from meshllm import rpc
from meshllm.engine import LaunchSpec
from meshllm.errors import EngineError, NotOnDiskError
from meshllm.mesh.groups import Group
from meshllm.node import worker as worker_module
from meshllm.node.worker import Worker, WorkerConfig

GB = 10**9
DEVICES = [
    rpc.DeviceInfo("CUDA0", "A GPU", "GPU", 10 * GB, 24 * GB),
    rpc.DeviceInfo("CUDA1", "Another GPU", "GPU", 40 * GB, 24 * GB),
    rpc.DeviceInfo("CPU", "A processor", "CPU", 64 * GB, 64 * GB),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    monkeypatch.setattr(rpc, "list_devices", lambda: DEVICES)
    for name in ("A-Q4_0", "B-Q4_0"):
        os.symlink(smollm2(), tmp_path / f"{name}.gguf")
    return tmp_path


def make(*models: str, **options: Any) -> Worker:
    config: dict[str, Any] = {
        "models": models or ("A-Q4_0",),
        "begins": True,
        "fetch": True,
        "draft": None,
        "draft_max": 8,
        "device": None,
        "threads": 1,
        "max_vram_bytes": 0,
        "bin_dir": None,
        "engine_args": (),
    }
    return Worker(WorkerConfig(**config | options), lambda _line: None, lambda _step: None, None)


def test_all_gpus_are_lent_less_a_reserve() -> None:
    worker = make()
    assert worker.device_name() == "A GPU, Another GPU"
    assert worker.memory_bytes() == int((10 + 24) * GB * 0.9)  # no more than a device has in all


def test_the_users_cap_and_draft_count() -> None:
    assert make(max_vram_bytes=4 * GB).memory_bytes() == int(8 * GB * 0.9)
    assert make(draft="B-Q4_0", max_vram_bytes=4 * GB).memory_bytes() == int(8 * GB * 0.9) - smollm2().stat().st_size


def test_the_device_that_the_user_names() -> None:
    worker = make(device="CPU")
    assert worker.device_name() == "A processor"
    with pytest.raises(EngineError, match="no device CUDA7; there are: CUDA0, CUDA1, CPU"):
        make(device="CUDA7").device_name()


def test_of_ram_only_what_is_available_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    for available, lent in ((500 * GB, 64 * GB), (8 * GB, 8 * GB)):
        monkeypatch.setattr(worker_module, "available_ram", lambda available=available: available)
        assert make(device="CPU").memory_bytes() == int(lent * 0.9)
    assert make().memory_bytes() == int((10 + 24) * GB * 0.9)


def test_without_a_gpu_the_processor_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "list_devices", lambda: DEVICES[2:])
    assert make().device_name() == "A processor"


def test_a_projector_is_announced_and_shared_unless_it_is_switched_off(folder: Path) -> None:
    path = adapters.projector(folder / "mmproj-A-F16.gguf", 576)
    worker = make()
    fingerprint = worker.named[0].fingerprint
    projector = worker.projectors[fingerprint]
    assert projector.size_bytes == path.stat().st_size
    assert set(worker.sharing._models()) == {fingerprint, projector.fingerprint}
    assert make(engine_args=("--no-mmproj",)).projectors == {}


def test_models_are_named_in_the_users_order_and_once() -> None:
    assert [model.name for model in make("B-Q4_0", "A-Q4_0").named] == ["B-Q4_0", "A-Q4_0"]
    assert [model.name for model in make("B-Q4_0", "A-Q4_0", "B-Q4_0").named] == ["A-Q4_0", "B-Q4_0"]
    assert len({model.fingerprint for model in make().models}) == 1  # the same weights, whatever their name


def test_a_model_that_is_not_on_disk_is_fetched_where_that_may_be() -> None:
    wanted = "Qwen2.5-7B"
    assert list(make(wanted).missing) == [wanted] and make(wanted).named == []
    with pytest.raises(NotOnDiskError):
        make(wanted, fetch=False)
    with pytest.raises(NotOnDiskError):
        make("nothing-like-it")  # and nobody to ask: this node founds the mesh
    assert list(make("nothing-like-it", begins=False).missing) == ["nothing-like-it"]


def test_who_founds_a_mesh_serves_something(folder: Path) -> None:
    (folder / "B-Q4_0.gguf").unlink()
    assert [model.name for model in make(models=()).named] == ["A-Q4_0"]
    assert make(models=(), begins=False).named == []


def test_without_a_server_and_an_engine_it_is_quiet() -> None:
    worker = make()
    assert worker.server_counters() == {} and not worker.ready
    assert worker.ggml_version.startswith("ggml ")


def test_a_machine_that_has_less_than_it_said_is_asked_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    contexts: list[int] = []
    lines: list[str] = []

    class TooLarge:
        """An engine that gets ready with less than 20,000 tokens."""

        def __init__(self, spec: LaunchSpec, *_args: object) -> None:
            contexts.append(spec.n_ctx)
            assert [stage.n_layers for stage in spec.stages] and spec.host_layers

        async def run(self) -> None:
            if contexts[-1] > 20_000:
                raise EngineError("cannot serve it: mesh-llm: peer (STAGE0) is out of memory: 96 MiB more are needed")
            raise asyncio.CancelledError

    memory = memory_of(*[layer(10 * MB, 1000)] * 30)
    peer = rpc.ServerInfo("mesh", (rpc.DeviceInfo("CPU", "its CPU", "CPU", GB, GB),), frozenset(), 0.001)
    monkeypatch.setattr(rpc, "list_devices", lambda: [rpc.DeviceInfo("CPU", "here", "CPU", GB // 2, GB // 2)])
    monkeypatch.setattr(rpc, "probe", lambda *_args: peer)
    monkeypatch.setattr(worker_module, "Engine", TooLarge)
    monkeypatch.setattr(worker_module, "measure", lambda *_args: memory)
    worker = make(models=("A-Q4_0",))
    worker.emit = lines.append
    group = Group(worker.named[0], "h", ("p",), (0.5, 0.5), (GB // 2, GB // 2))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(worker.serve(group, [("peer", Path("/nowhere/peer.sock"))], lambda: None))
    assert contexts == sorted(contexts, reverse=True) and len(set(contexts)) == len(contexts) > 1
    told = [line for line in lines if "out of memory" in line]
    assert len(told) == len(contexts) - 1 and told[0].endswith("trying to do with 85% of all devices' memory")


def test_a_gpu_alone_is_filled_to_the_users_cap() -> None:
    assert make()._gpu_limits() == ("--fit-ctx", "4096")
    assert make(min_ctx=512, max_vram_bytes=4 * GB)._gpu_limits() == ("--fit-ctx", "512", "--fit-target", "5722,34332")
    assert make(max_vram_bytes=90 * GB)._gpu_limits()[-1] == "1024,1024"
