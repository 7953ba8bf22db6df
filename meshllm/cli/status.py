"""`mesh-llm status`: the mesh as the node on this machine sees it."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click
import orjson

from meshllm.cli.control import ask_node, port_option
from meshllm.units import in_gb, short_id


@click.command("status")
@port_option
@click.option("--json", "as_json", is_flag=True, help="All of it, for programs.")
def status(port: int, as_json: bool) -> None:
    """Nodes, roles, distances, memory, split, and the state of the engine."""
    answer = asyncio.run(ask_node(port, "GET", "/status"))
    if as_json:
        sys.stdout.buffer.write(orjson.dumps(answer, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        click.echo("\n".join(describe(answer)))


def describe(answer: dict[str, Any]) -> list[str]:
    """Lines for people."""
    lines = [f"mesh {answer['mesh_id'][:8]}, UDP port {answer['port']}, mesh-llm {answer['version']}", ""]
    for model in answer["models"]:
        lines += _describe_model(model, {n["id"]: n for n in answer["nodes"]})
    rows = [("node", "role", "state", "RTT", "memory", "sent", "received", "device")]
    for node in answer["nodes"]:
        rtt = "-" if node["rtt_ms"] is None else f"{node['rtt_ms']:.0f} ms"
        moved = [f"{node[k] / 1e6:.1f} MB" for k in ("bytes_sent", "bytes_received")]
        memory = in_gb(node["memory_bytes"])
        rows.append((node["name"], node["role"], node["state"], rtt, memory, *moved, node["device"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    engine = answer["engine"]
    if engine:
        lines += ["", f"engine here: {engine['state']}{': ' + engine['reason'] if engine['reason'] else ''}"]
        lines += [_describe_stage(stage) for stage in engine["stages"]]
        if engine["speculation"]:
            lines.append(_describe_speculation(engine["speculation"]))
    return lines


def _describe_speculation(speculation: dict[str, Any]) -> str:
    line = f"  draft {speculation['draft']}, {speculation['n_max']} tokens at a time"
    if drafted := speculation["drafted"]:
        line += f": {speculation['accepted'] / drafted:.0%} accepted, {speculation['tokens_per_step']} tokens a step"
    return line


def _describe_stage(stage: dict[str, Any]) -> str:
    counters = stage["counters"]
    line = f"  {stage['name']}: {stage['n_layers']} layers"
    if counters:
        read, sent = (counters[f"weight_bytes_{how}"] / 1e6 for how in ("local", "sent"))
        line += f", weights {read:.0f} MB from its disk and {sent:.0f} MB over the network"
        line += f", results pushed {counters['pushes']}, relayed {counters['relays']}"
    return line


def _describe_model(model: dict[str, Any], nodes: dict[str, Any]) -> list[str]:
    if not model["groups"]:
        need, have = in_gb(model["need_bytes"]), in_gb(model["have_bytes"])
        head = f"{model['name']}: waiting for more peers: need {need}, have {have}"
        return [head, *_reasons(model, nodes), ""]
    lines = []
    for group in model["groups"]:
        names = [nodes[i]["name"] if i in nodes else short_id(i) for i in (*group["stages"], group["host"])]
        parts = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, group["shares"], strict=True))
        host = nodes.get(group["host"], {})
        ready = any(s["ready"] for s in host.get("serving", ()))
        lines.append(f"{model['name']}: {'ready' if ready else 'loading'} on {parts} (host last)")
    return [*lines, *_reasons(model, nodes), ""]


def _reasons(model: dict[str, Any], nodes: dict[str, Any]) -> list[str]:
    lines = []
    for node_id, why in model["reasons"].items():
        if node := nodes.get(node_id):
            part = node["fetching"].get(model["fingerprint"])
            lines.append(f"  {node['name']}: {why}{f' ({part:.0%})' if part is not None else ''}")
    return lines
