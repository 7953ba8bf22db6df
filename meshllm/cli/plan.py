"""`mesh-llm plan`: where a model would be served, and with which context."""

from __future__ import annotations

import asyncio
import tempfile
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshllm.cli.control import ask_node
from meshllm.cli.options import Command, ctx, min_ctx, option, port
from meshllm.errors import MeshLlmError, NotOnDiskError
from meshllm.mesh.announcement import ModelInfo
from meshllm.units import GB, in_gb

if TYPE_CHECKING:
    from meshllm.engine.memory import ModelMemory
    from meshllm.node.outlook import Machine, Outlook

_EXAMPLES = """\b
Examples:
  mesh-llm plan qwen3-32b                     on the machines of the mesh that runs
  mesh-llm plan qwen3-32b --nodes home.toml   on those of a file, each as follows:
\b
    [[node]]
    name = "mac"
    memory_gb = 32
    rtt_ms = 5
"""


@click.command("plan", cls=Command, epilog=_EXAMPLES)
@click.argument("model")
@option(
    "--nodes",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Machines to plan for; default: those of the mesh that runs on this machine.",
)
@ctx()
@min_ctx()
@port()
@click.argument("engine_args", nargs=-1, type=click.UNPROCESSED, metavar="[-- LLAMA-SERVER OPTIONS]")
def plan(
    model: str, nodes: Path | None, ctx: int | None, min_ctx: int, port: int, engine_args: tuple[str, ...]
) -> None:
    """Show where a model would be served, and with which context.

    MODEL is a path or a name, as mesh-llm download takes it too. Nothing is loaded, and of a model that is not on disk
    only the heads of its files are read, which list what is in them.
    """
    from meshllm.node.outlook import outlook  # needs the extension, which a lite client has not

    machines = _from_file(nodes) if nodes else _of_the_mesh(asyncio.run(ask_node(port, "GET", "/status")))
    info, memory, host_min = _measured(model, [*(("-c", str(ctx)) if ctx else ()), *engine_args])
    result = outlook(info, memory, host_min, machines, min_ctx)
    click.echo("\n".join(describe(result, memory)))
    if result.fit is None:
        raise SystemExit(1)


def _measured(wanted: str, engine_args: list[str]) -> tuple[ModelInfo, ModelMemory, int]:
    """The model, what it takes, and how many layers only the host can have."""
    from meshllm.engine import find_binaries
    from meshllm.engine.launch import plan_arguments
    from meshllm.engine.memory import measure
    from meshllm.models.download import can_be_had, find_source
    from meshllm.models.heads import model_of_heads
    from meshllm.models.store import resolve
    from meshllm.node.files import model_info

    with tempfile.TemporaryDirectory(prefix="mesh-llm-heads-") as folder:
        try:
            model = resolve(wanted)
        except NotOnDiskError:
            if not can_be_had(wanted):
                raise
            model = model_of_heads(find_source(wanted), Path(folder))
        arguments = plan_arguments(model, engine_args)
        memory = measure(find_binaries(None).measure, arguments, model.fingerprint().hex())
        return model_info(model), memory, model.n_nextn


def describe(outlook: Outlook, memory: ModelMemory) -> list[str]:
    model, fit, need = outlook.placement.model, outlook.fit, outlook.placement.need
    if fit is None:
        advice = f"{outlook.most:,} would fit: --ctx {outlook.most}" if outlook.most else "no context fits"
        have = in_gb(sum(outlook.placement.have_bytes))
        return [
            f"{model.name} would not be served: it takes {in_gb(outlook.placement.need_bytes)} with {need.n_ctx:,} "
            f"tokens of context, and the machines have {have}; {advice}"
        ]
    lines = [f"{model.name}, {in_gb(model.size_bytes)}, {fit.n_ctx:,} of its {memory.n_ctx_train:,} tokens of context"]
    roles = [*("stage" for _ in outlook.machines[:-1]), "host"]
    rows = [("node", "role", "layers", "takes", "of")]
    for machine, role, layers, size in zip(outlook.machines, roles, fit.layers, fit.sizes_bytes, strict=True):
        rows.append((machine.name, role, str(layers), in_gb(size), in_gb(machine.memory_bytes)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return lines + ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def _from_file(path: Path) -> list[Machine]:
    from meshllm.node.outlook import Machine
    from meshllm.node.worker import RESERVE

    try:
        entries = tomllib.loads(path.read_text())["node"]
        return [
            Machine(str(node["name"]), int(_positive(node["memory_gb"]) * GB * (1 - RESERVE)), float(node["rtt_ms"]))
            for node in (entry | {"rtt_ms": entry.get("rtt_ms", 1)} for entry in entries)
        ]
    except OSError as error:
        raise MeshLlmError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise MeshLlmError(f"{path} does not list nodes with name and memory_gb: {error}") from None


def _positive(value: Any) -> float:
    if not float(value) > 0:
        raise ValueError("memory_gb must be above 0")
    return float(value)


def _of_the_mesh(status: dict[str, Any]) -> list[Machine]:
    from meshllm.node.outlook import Machine

    workers = [node for node in status["nodes"] if node["role"] == "worker" and node["state"] == "alive"]
    own = status["node_id"]
    return [
        Machine(node["name"], node["memory_bytes"], 0.0 if node["id"] == own else node["rtt_ms"]) for node in workers
    ]
