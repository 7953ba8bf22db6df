"""How llama-server is started: its arguments, its stages and their layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import orjson

from meshllm import rpc
from meshllm.engine.binaries import Binaries
from meshllm.engine.embedding import embedding_arguments
from meshllm.engine.layers import assign_layers, tensor_split
from meshllm.engine.speculation import Speculation, chosen_by_user, suits_stages
from meshllm.errors import EngineError
from meshllm.mesh.engine_status import EngineStage, StageCounters
from meshllm.models.store import Model, Projector

# llama-server's prompt cache would read the KV cache of whole conversations back over the network.
_STAGE_OPTIONS = ("-ngl", "999", "--fit", "off", "--cache-ram", "0")
# Without a checkpoint of what cannot be cut back (recurrent states, sliding windows) a prompt that differs before its
# end is computed from the start: each turn with a model whose reasoning is left out of the next prompt. It is a copy on
# the host, of 20 to 450 MB for today's models, up to three a prompt; over a link that is not local they cost more.
_N_CHECKPOINTS = 8  # a conversation; each takes host memory
_LOCAL_RTT_S = 0.005
# By default llama-server gives the projector, also one that the user names, to its first device, a stage: weights and
# images would cross the network.
_PROJECTOR_ON_HOST = ("--mmproj-device", "HOST")
# A draft model would be spread over all devices; on the host, guessing costs no round trip.
_DRAFT_ON_HOST = ("--spec-draft-device", "HOST")
_NO_PROJECTOR = ("--no-mmproj", "--no-mmproj-auto")  # llama-server itself heeds them only with -hf


@dataclass(frozen=True)
class StageAddress:
    """A device server: `address` for the host, `peer_address` for the other stages."""

    name: str
    address: str
    peer_address: str


@dataclass(frozen=True)
class StageServer:
    """A device server that takes part, and its answer to `probe`."""

    at: StageAddress
    info: rpc.ServerInfo


@dataclass(frozen=True)
class Stage:
    """One device of one device server."""

    at: StageAddress
    device: int
    description: str
    n_layers: int
    has_model: bool
    weight_bytes: int  # of its layers

    @property
    def name(self) -> str:
        return self.at.name

    def status(self, counters: StageCounters | None) -> EngineStage:
        return EngineStage(
            **asdict(self.at),
            device=self.device,
            description=self.description,
            n_layers=self.n_layers,
            has_model=self.has_model,
            weight_bytes=self.weight_bytes,
            counters=counters,
        )


@dataclass(frozen=True)
class LaunchSpec:
    model: Model
    binaries: Binaries
    stages: tuple[Stage, ...]
    host_layers: int
    host_device: str
    extra_args: tuple[str, ...]
    speculation: Speculation | None = None
    n_checkpoints: int = 0  # with stages
    n_ctx: int = 0  # tokens; 0 for what llama-server chooses
    only_device: str = ""  # that the user named; llama-server itself takes all GPUs
    gpu_limits: tuple[str, ...] = ()  # llama-server's options of --fit, without stages

    @property
    def projector(self) -> Projector | None:
        """The model's, unless the user has switched it off."""
        return self.model.projector if takes_projector(self.extra_args) else None

    def command(self, socket: Path) -> list[str]:
        """llama-server and its arguments. The user's own come last, and so take precedence."""
        args = [str(self.binaries.llama_server), "--model", self.model.files[0], "--alias", self.model.name]
        args += ["--host", str(socket), "--log-verbosity", "4", "--offline"]
        if self.stages:
            devices = [f"STAGE{i}" for i in range(len(self.stages))]
            if not splits_tensors(self.extra_args):
                devices.append("HOST")
            layers = [*(stage.n_layers for stage in self.stages), self.host_layers]
            args += ["--device", ",".join(devices), "--tensor-split", tensor_split(layers), *_STAGE_OPTIONS]
            args += ["--ctx-checkpoints", str(self.n_checkpoints)]
            args += [*_PROJECTOR_ON_HOST, *_DRAFT_ON_HOST]
        else:
            args += self.gpu_limits
            if self.only_device:
                args += ["--device", "none" if self.only_device == "CPU" else self.only_device]
                args += ["--no-mmproj-offload"] if self.only_device == "CPU" else []
        args += ["-c", str(self.n_ctx)] if self.n_ctx else []
        args += embedding_arguments(self.model)
        if self.projector:
            args += ["--mmproj", self.projector.file]
        if self.speculation:
            args += self.speculation.arguments(on_cpu=self.host_device == "CPU")
        return [*args, *self.extra_args]

    def backend_config(self, counters: Path) -> bytes:
        """The JSON that MESH_LLM_BACKEND_CONFIG names; docs/architecture.md."""
        stages = [asdict(stage.at) | {"device": stage.device} for stage in self.stages]
        model = {"fingerprint": self.model.fingerprint().hex(), "files": self.model.files}
        return orjson.dumps(
            {"stages": stages, "host_device": self.host_device, "model": model, "counters": str(counters)}
        )


def plan_arguments(model: Model, extra_args: Sequence[str]) -> list[str]:
    """Those that say what memory the model takes, without devices and files other than the model's."""
    args = ["--model", model.files[0], "--offline", *embedding_arguments(model)]
    if model.projector and takes_projector(extra_args):
        args += ["--mmproj", model.projector.file]
    return [*args, *extra_args]


def make_launch_spec(
    model: Model,
    binaries: Binaries,
    servers: Sequence[StageServer],
    split: Sequence[float] | None,
    host_device: str | None,
    extra_args: Sequence[str],
    speculation: Speculation | None = None,
) -> LaunchSpec:
    """`servers` in the order of the layers. `split` has one number per stage, and may have one more for the host's own
    layers; without it, layers are split by the stages' free memory. Raises EngineError.
    """
    devices = [(server, i, device) for server in servers for i, device in enumerate(server.info.devices)]
    weights = [float(device.memory_free) for _, _, device in devices] if split is None else list(split)
    if len(weights) not in (len(devices), len(devices) + 1):
        raise EngineError(
            f"--tensor-split has {len(weights)} numbers for {len(devices)} stages; "
            f"give {len(devices)}, or {len(devices) + 1} for the host to hold layers too"
        )
    host_weight = weights.pop() if len(weights) > len(devices) else 0.0
    layers = assign_layers(model.n_layers, weights, host_weight, model.n_nextn) if devices else [model.n_layers]
    sizes = _layer_bytes(model)
    fingerprint = model.fingerprint().hex() if devices else ""
    stages = []
    first = 0
    for (server, index, device), n in zip(devices, layers[:-1], strict=True):
        weight_bytes = sum(sizes[first : first + n])
        has_model = fingerprint in server.info.models
        stages.append(Stage(server.at, index, device.description, n, has_model, weight_bytes))
        first += n
    device_name = host_device or _best_device()
    if chosen_by_user(extra_args) or (speculation and speculation.by_default and stages and not suits_stages(model)):
        speculation = None
    local = all(0 < server.info.rtt_s <= _LOCAL_RTT_S for server in servers)
    n_checkpoints = _N_CHECKPOINTS if local else 0
    return LaunchSpec(
        model,
        binaries,
        tuple(stages),
        layers[-1],
        device_name,
        tuple(extra_args),
        speculation,
        n_checkpoints,
        only_device=host_device or "",
    )


def takes_projector(extra_args: Sequence[str]) -> bool:
    """Whether the user has not switched the model's projector off, among llama-server's options."""
    return not set(_NO_PROJECTOR) & set(extra_args)


def splits_tensors(extra_args: Sequence[str]) -> bool:
    """Whether the user splits each tensor over the devices; llama.cpp then takes no device with the CPU's buffers."""
    given = set(pairwise(extra_args))
    return bool(given & {("-sm", "tensor"), ("--split-mode", "tensor")})


def _layer_bytes(model: Model) -> list[int]:
    sizes = [0] * model.n_layers
    for tensor in model.info.tensors:
        kind, _, rest = tensor.name.partition(".")
        number = rest.partition(".")[0]
        if kind == "blk" and number.isdigit() and int(number) < model.n_layers:
            sizes[int(number)] += tensor.size
    return sizes


def _best_device() -> str:
    """ggml's first GPU, or the CPU."""
    devices = rpc.list_devices()
    return next((d.name for d in devices if d.type in ("GPU", "IGPU")), "CPU")
