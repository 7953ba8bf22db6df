"""What llama-server is started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from meshllm import rpc
from meshllm.engine.binaries import Binaries
from meshllm.engine.launch import StageAddress, StageServer, make_launch_spec
from meshllm.engine.speculation import WITHOUT_MODEL, with_draft, without_model
from meshllm.errors import EngineError
from meshllm.models.store import Model, Projector, load_model

BINARIES = Binaries(Path("/b/llama-server"), Path("/b/leash"), Path("/b/backend.so"), Path("/b/measure"))
GB = 10**9


@pytest.fixture(scope="module")
def loaded(model: Path) -> Model:
    return load_model(model)


def server(name: str, *free_gb: float, models: tuple[str, ...] = (), rtt_s: float = 0.001) -> StageServer:
    devices = tuple(rpc.DeviceInfo("CPU", "its CPU", "CPU", int(gb * GB), int(gb * GB)) for gb in free_gb)
    return StageServer(
        StageAddress(name, f"/s/{name}", f"{name}:1"), rpc.ServerInfo("mesh", devices, frozenset(models), rtt_s)
    )


def make(loaded: Model, *servers: StageServer, split: tuple[float, ...] | None = None, **options: Any) -> Any:
    options = {"host_device": "CPU", "extra_args": ()} | options
    return make_launch_spec(loaded, BINARIES, servers, split, **options)


def value_of(command: list[str], option: str) -> str:
    assert command.count(option) == 1
    return command[command.index(option) + 1]


def test_one_machine_alone(loaded: Model) -> None:
    spec = make(loaded, host_device=None, extra_args=("-c", "512"))
    command = spec.command(Path("/run/engine.sock"))
    assert command[0] == "/b/llama-server" and command[-2:] == ["-c", "512"]
    assert value_of(command, "--host") == "/run/engine.sock" and value_of(command, "--alias") == loaded.name
    assert spec.host_layers == 30 and not {"--device", "--tensor-split", "--spec-type"} & set(command)


def test_alone_on_the_device_that_the_user_names(loaded: Model) -> None:
    for named, given in (("CPU", "none"), ("CUDA1", "CUDA1")):
        command = make(loaded, host_device=named).command(Path("s"))
        assert value_of(command, "--device") == given
        assert ("--no-mmproj-offload" in command) == (named == "CPU")
    limited = replace(make(loaded, host_device=None), gpu_limits=("--fit-target", "4096"))
    assert value_of(limited.command(Path("s")), "--fit-target") == "4096"
    split = replace(make(loaded, server("s", 1)), gpu_limits=("--fit-target", "4096"))
    assert "--fit-target" not in split.command(Path("s"))


def test_stages_share_by_their_free_memory(loaded: Model) -> None:
    fingerprint = loaded.fingerprint().hex()
    spec = make(loaded, server("near", 20, 10, models=(fingerprint,)), server("far", 30))
    assert [(s.name, s.device, s.n_layers, s.has_model) for s in spec.stages] == [
        ("near", 0, 10, True),
        ("near", 1, 6, True),
        ("far", 0, 14, False),
    ]
    assert spec.host_layers == 0
    in_layers = sum(tensor.size for tensor in loaded.info.tensors if tensor.name.startswith("blk."))
    assert sum(stage.weight_bytes for stage in spec.stages) == in_layers
    command = spec.command(Path("/s"))
    assert value_of(command, "--device") == "STAGE0,STAGE1,STAGE2,HOST"
    assert value_of(command, "--tensor-split") == "10,6,14,1"
    assert value_of(command, "-ngl") == "999" and value_of(command, "--fit") == "off"


@pytest.mark.parametrize(("rtts_s", "n"), [((0.001, 0.002), "8"), ((0.001, 0.03), "0"), ((0.001, 0.0), "0")])
def test_checkpoints_of_states_are_for_near_stages(loaded: Model, rtts_s: tuple[float, ...], n: str) -> None:
    """A stock server does not say how far it is."""
    spec = make(loaded, *(server(f"s{i}", 1, rtt_s=rtt_s) for i, rtt_s in enumerate(rtts_s)))
    assert value_of(spec.command(Path("/s")), "--ctx-checkpoints") == n


def test_tensors_are_split_over_stages_alone(loaded: Model) -> None:
    for args in (("-sm", "tensor"), ("-c", "512", "--split-mode", "tensor")):
        command = make(loaded, server("a", 1), server("b", 1), extra_args=args).command(Path("/s"))
        assert value_of(command, "--device") == "STAGE0,STAGE1"
    layers = make(loaded, server("a", 1), extra_args=("-sm", "layer")).command(Path("/s"))
    assert value_of(layers, "--device") == "STAGE0,HOST"


def test_the_backend_is_told_of_every_stage(loaded: Model) -> None:
    spec = make(loaded, server("a", 1, 1), host_device="CUDA0")
    config = orjson.loads(spec.backend_config(Path("/run/counters.bin")))
    assert config["stages"] == [
        {"name": "a", "address": "/s/a", "peer_address": "a:1", "device": device} for device in (0, 1)
    ]
    assert config["model"] == {"fingerprint": loaded.fingerprint().hex(), "files": list(loaded.files)}
    assert (config["host_device"], config["counters"]) == ("CUDA0", "/run/counters.bin")


@pytest.mark.parametrize(
    ("split", "layers"), [((2.0, 1.0), [20, 10, 0]), ((1.0, 1.0, 1.0), [10, 10, 10]), ((1.0, 1.0, 0.0), [15, 15, 0])]
)
def test_a_split_by_hand(loaded: Model, split: tuple[float, ...], layers: list[int]) -> None:
    spec = make(loaded, server("a", 1), server("b", 5), split=split)
    assert sum(stage.n_layers for stage in spec.stages) + spec.host_layers == 30
    assert all(abs(s.n_layers - n) <= 1 for s, n in zip(spec.stages, layers, strict=False))
    assert abs(spec.host_layers - layers[-1]) <= 1


@pytest.mark.parametrize("split", [(1.0,), (1.0, 1.0, 1.0, 1.0)])
def test_a_split_of_another_length(loaded: Model, split: tuple[float, ...]) -> None:
    with pytest.raises(EngineError, match=rf"--tensor-split has {len(split)} numbers for 2 stages"):
        make(loaded, server("a", 1), server("b", 1), split=split)


def test_without_a_choice_the_host_takes_what_ggml_has(loaded: Model) -> None:
    assert make(loaded, host_device=None).host_device in {device.name for device in rpc.list_devices()}


@pytest.mark.parametrize("split_model", [False, True])
def test_speculation(loaded: Model, split_model: bool) -> None:
    servers = (server("a", 1),) if split_model else ()
    for kind, (option, _) in WITHOUT_MODEL.items():
        command = make(loaded, *servers, speculation=without_model(kind, 7)).command(Path("/s"))
        assert value_of(command, "--spec-type") == kind
        assert option is None or value_of(command, option) == "7"
        assert ("--poll" in command) is kind.startswith("draft")
        assert ("--spec-ngram-simple-size-n" in command) is (kind == "ngram-simple")
    draft = make(loaded, *servers, speculation=with_draft(loaded, 7)).command(Path("/s"))
    assert value_of(draft, "--spec-type") == "draft-simple" and value_of(draft, "--spec-draft-n-max") == "7"
    assert value_of(draft, "--spec-draft-model") == loaded.files[0] and value_of(draft, "--poll") == "0"
    assert ("--spec-draft-device" in draft) is split_model
    on_gpu = make(loaded, *servers, speculation=with_draft(loaded, 7), host_device="CUDA0").command(Path("/s"))
    assert "--poll" not in on_gpu


@pytest.mark.parametrize("own", ["--spec-type", "--spec-type=ngram-cache", "--spec-default", "-md"])
def test_the_users_own_way_to_speculate_is_the_only_one(loaded: Model, own: str) -> None:
    """llama-server would add it to ours; a draft model of theirs is on the host too."""
    command = make(loaded, server("a", 1), speculation=with_draft(loaded), extra_args=(own, "x")).command(Path("/s"))
    assert command[-2:] == [own, "x"] and command.count("--spec-type") == (own == "--spec-type")
    assert value_of(command, "--spec-draft-device") == "HOST"


def test_nextn_layers_are_the_hosts(loaded: Model) -> None:
    """They are the last ones, and as many stages as there are other layers can be used."""
    head = replace(loaded, n_nextn=2)
    spec = make(head, server("a", 1), server("b", 3))
    assert [stage.n_layers for stage in spec.stages] == [8, 20] and spec.host_layers == 2
    assert value_of(spec.command(Path("/s")), "--tensor-split") == "8,20,3"
    sizes = [t.size for t in loaded.info.tensors if t.name.startswith("blk.") and int(t.name.split(".")[1]) < 28]
    assert sum(stage.weight_bytes for stage in spec.stages) == sum(sizes)
    assert make(head, server("a", 1), server("b", 1), split=(1, 1, 1)).host_layers == 9
    assert make(head, *(server(f"s{i}", 1) for i in range(28))).host_layers == 2
    with pytest.raises(EngineError, match="28 layers, too few for 29 stages"):
        make(head, *(server(f"s{i}", 1) for i in range(29)))


def test_a_state_that_is_copied_for_each_guess_stays_where_it_is(loaded: Model) -> None:
    by_default = without_model("draft-mtp", by_default=True)
    copied = replace(loaded, architecture="qwen3next")
    assert make(copied, speculation=by_default).speculation == by_default
    assert make(copied, server("a", 1), speculation=by_default).speculation is None
    assert make(copied, server("a", 1), speculation=without_model("draft-mtp")).speculation
    assert make(loaded, server("a", 1), speculation=by_default).speculation == by_default


@pytest.mark.parametrize("split_model", [False, True])
def test_the_projector_is_computed_on_the_host(loaded: Model, split_model: bool) -> None:
    servers = (server("a", 1),) if split_model else ()
    seeing = replace(loaded, projector=Projector("/m/mmproj-F16.gguf", 1000, "ab" * 32))
    command = make(seeing, *servers).command(Path("/s"))
    assert value_of(command, "--mmproj") == "/m/mmproj-F16.gguf"
    assert ("--mmproj-device" in command) is split_model
    if split_model:
        assert value_of(command, "--mmproj-device") == "HOST"
        assert value_of(make(loaded, *servers).command(Path("/s")), "--mmproj-device") == "HOST"  # for the user's own
    assert "--mmproj" not in make(seeing, *servers, extra_args=("--no-mmproj",)).command(Path("/s"))
    config = orjson.loads(make(seeing, *servers).backend_config(Path("/c")))
    assert config["model"]["files"] == list(loaded.files)  # a stage needs no projector
