"""`mesh-llm status`: the mesh as the node on this machine sees it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping

import click
import orjson

from meshllm.cli.control import ask_node
from meshllm.cli.options import Command, option, port
from meshllm.mesh.engine_status import EngineStage, SpeculationStatus
from meshllm.node.status import FullStatus, ModelStatus, NodeStatus
from meshllm.units import in_gb, short_id


@click.command("status", cls=Command)
@port()
@option("--json", "as_json", is_flag=True, help="Print the whole status as JSON, for programs.")
def status(port: int, as_json: bool) -> None:
    """Show the nodes, the models and the engine.

    As this machine's node sees them: roles, round-trip times, memory, splits, and why a model is not served.
    """
    if as_json:
        answer = asyncio.run(ask_node(port, "GET", "/status"))
        sys.stdout.buffer.write(orjson.dumps(answer, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        click.echo(asyncio.run(ask_node(port, "GET", "/status.txt")))


def describe(status: FullStatus) -> list[str]:
    """Lines for people. The node makes them, so the command and the node may have different versions."""
    nodes = {node.id: node for node in status.nodes}
    lines = [f"mesh {status.mesh_id[:8]}, UDP port {status.port}, mesh-llm {status.version}", ""]
    for model in status.models:
        lines += _describe_model(model, nodes)
    rows: list[tuple[str, ...]] = [("node", "role", "state", "RTT", "memory", "sent", "received", "device")]
    for node in status.nodes:
        rtt = "-" if node.rtt_ms is None else f"{node.rtt_ms:.0f} ms"
        moved = [f"{n / 1e6:.1f} MB" for n in (node.bytes_sent, node.bytes_received)]
        rows.append((node.name, node.role, node.state, rtt, in_gb(node.memory_bytes), *moved, node.device))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if engine := status.engine:
        lines += ["", f"engine here: {engine.state}{': ' + engine.reason if engine.reason else ''}"]
        lines += [_describe_stage(stage) for stage in engine.stages]
        if engine.speculation:
            lines.append(_describe_speculation(engine.speculation))
    return lines


def _describe_speculation(speculation: SpeculationStatus) -> str:
    line = f"  draft {speculation.draft}, up to {speculation.n_max} tokens drafted per step"
    if drafted := speculation.drafted:
        line += (
            f": {speculation.accepted / drafted:.0%} accepted, {speculation.tokens_per_step} tokens verified per step"
        )
    return line


def _describe_stage(stage: EngineStage) -> str:
    line = f"  {stage.name}: {stage.n_layers} layers"
    if counters := stage.counters:
        read, sent = in_gb(counters.weight_bytes_local), in_gb(counters.weight_bytes_sent)
        line += f", weights {read} from its disk and {sent} over the network"
        line += f", results pushed {counters.pushes}, relayed {counters.relays}"
    return line


def _describe_model(model: ModelStatus, nodes: Mapping[str, NodeStatus]) -> list[str]:
    if not model.groups:
        need, have = in_gb(model.need_bytes), in_gb(model.have_bytes)
        head = f"{model.name}: waiting for more peers: need {need}, have {have}"
        return [head, *_reasons(model, nodes), ""]
    lines = []
    for group in model.groups:
        names = [nodes[i].name if i in nodes else short_id(i) for i in (*group.stages, group.host)]
        parts = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, group.shares, strict=True))
        host = nodes.get(group.host)
        ready = host is not None and any(serving.ready for serving in host.serving)
        lines.append(f"{model.name}: {'ready' if ready else 'loading'} on {parts} (host last)")
    return [*lines, *_reasons(model, nodes), ""]


def _reasons(model: ModelStatus, nodes: Mapping[str, NodeStatus]) -> list[str]:
    lines = []
    for node_id, reason in model.reasons.items():
        if node := nodes.get(node_id):
            part = node.fetching.get(model.fingerprint)
            lines.append(f"  {node.name}: {reason}{f' ({part:.0%})' if part is not None else ''}")
    return lines
