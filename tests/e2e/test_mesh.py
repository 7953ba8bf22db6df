"""Three hosts, one command and one pasted token each: a mesh that serves one split model, and what happens to it."""

from __future__ import annotations

import re
import signal
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import lab as netlab
from support.processes import Api, eventually, in_parallel
from support.world import BIND_PORT, PORT, World, world

PROMPT = "The history of Rome begins"


def ask(api: Api, n: int = 40) -> str:
    return str(api.complete(PROMPT, n)["content"])


@pytest.fixture(scope="module")
def expected(solo: Api) -> str:
    """What one machine says."""
    return ask(solo)


def served_again(world: World, asked: str, *others: str) -> float:
    """Seconds until `asked` and these others serve the model together."""
    began = time.monotonic()
    eventually(lambda: world.served_by(asked, asked, *others), 40, f"{asked}, {others} serve: {world.status(asked)}")
    return time.monotonic() - began


@pytest.mark.timeout(400)
def test_three_hosts_come_and_go(model: Path, expected: str, tmp_path: Path) -> None:
    with world(tmp_path, hosts=3, rtt_ms=5) as mesh:
        token = mesh.seed("h1", "--model", str(model), "--split")
        mesh.start("h2", "--join", token)
        mesh.start("h3", "--join", token)
        times = {"three hosts serve": served_again(mesh, "h1", "h2", "h3")}
        apis = [mesh.api(host) for host in ("h1", "h2", "h3")]
        assert [ask(api) for api in apis] == [expected] * 3
        assert in_parallel([partial(ask, api) for api in apis]) == [expected] * 3  # from all ends at once

        status = mesh.status("h1")
        counters = [stage["counters"] for stage in status["engine"]["stages"]]
        assert all(c["weight_bytes_sent"] == 0 and c["weight_bytes_local"] > 0 for c in counters)
        assert netlab.interface_bytes(mesh.lab, "h1") < 10_000_000 < sum(c["weight_bytes_local"] for c in counters)
        assert counters[0]["pushes"] > 40 and counters[0]["relays"] == 0
        assert "ready on" in mesh.nodes["h1"].command("status").stdout

        mesh.stop("h3", signal.SIGKILL)
        times["a worker was killed"] = served_again(mesh, "h1", "h2")
        assert ask(mesh.api("h2")) == expected
        assert mesh.roles("h1").keys() == {"h1", "h2"}

        mesh.start("h3", "--join", token)
        times["it is back"] = served_again(mesh, "h1", "h2", "h3")
        mesh.stop("h2", signal.SIGTERM)
        times["a worker left"] = served_again(mesh, "h1", "h3")
        assert ask(mesh.api("h3")) == expected

        mesh.lab.set_down("h3")
        times["a worker was cut off"] = served_again(mesh, "h1")
        assert ask(mesh.api("h1")) == expected
        mesh.lab.set_up("h3")
        times["it is back again"] = served_again(mesh, "h1", "h3")
        assert ask(mesh.api("h3")) == expected

        mesh.start("h2", "--join", token)
        served_again(mesh, "h1", "h2", "h3")
        mesh.stop("h1", signal.SIGKILL)
        began = time.monotonic()
        # whoever is asked meanwhile answers when there is a new host
        assert in_parallel([lambda: ask(mesh.api("h2")), lambda: ask(mesh.api("h3"))]) == [expected] * 2
        times["the host was killed"] = time.monotonic() - began
        mesh.start("h1", "--model", str(model), "--split", "--bind-port", str(BIND_PORT))
        began = time.monotonic()
        eventually(lambda: len(mesh.roles("h1")) == 3, 30, "the old seed is in its mesh again, without a token")
        times["the old host is a member again"] = time.monotonic() - began
    print("\n" + "\n".join(f"{what}: {seconds:.1f} s" for what, seconds in times.items()))


@pytest.mark.timeout(200)
def test_far_host_is_left_out_and_a_client_needs_nothing(model: Path, expected: str, tmp_path: Path) -> None:
    far = {("h1", "h3"): {"rtt_ms": 100}, ("h2", "h3"): {"rtt_ms": 100}}
    with world(tmp_path, hosts=4, rtt_ms=5, links=far) as mesh:
        token = mesh.seed("h1", "--model", str(model), "--split")
        mesh.start("h2", "--join", token)
        mesh.start("h3", "--join", token)
        mesh.start("h4", "--client", "--join", token)
        served_again(mesh, "h1", "h2")
        eventually(lambda: len(mesh.roles("h1")) == 4)
        assert mesh.roles("h1") == {"h1": "host", "h2": "stage", "h3": "too far", "h4": "API client only"}
        assert ask(mesh.api("h3")) == ask(mesh.api("h4")) == expected
        assert mesh.served_by("h1", "h1", "h2")


@pytest.mark.timeout(200)
def test_model_too_large_for_two_waits_for_the_third(other_model: Path, tmp_path: Path) -> None:
    """Gemma 3 270M has 178 MB of embeddings, which only a host computes with, and 72 of layers."""
    args, less = (("--max-vram", size, "--no-fetch") for size in ("0.24", "0.04"))  # less a tenth
    small = ("--", "-c", "256", "-t", "1", "-np", "1", "-b", "64", "-ub", "64")
    with world(tmp_path, hosts=3, rtt_ms=2) as mesh:
        token = mesh.seed("h1", "--model", str(other_model), *args, engine_args=small)
        mesh.nodes["h1"].wait_output("with 256 tokens of context, have 216 MB")
        mesh.start("h2", "--join", token, *less, engine_args=small)
        mesh.nodes["h1"].wait_output("with 256 tokens of context, have 252 MB")
        mesh.nodes["h2"].wait_output("Waiting for more peers")
        with pytest.raises(OSError, match=r"503.*Waiting for more peers"):
            mesh.api("h2").request("/health")
        mesh.start("h3", "--join", token, *less, engine_args=small)
        served_again(mesh, "h1", "h2", "h3")
        assert "Elected as host (288 MB available for a" in mesh.nodes["h1"].output()
        assert mesh.api("h3").complete("Hi", 8)["tokens_predicted"] == 8


@pytest.mark.timeout(200)
def test_a_split_model_gets_the_context_that_fits(model: Path, tmp_path: Path) -> None:
    """98 MB of weights and, for its 8,192 tokens, 189 MB of KV cache on two nodes that lend 108 MB each."""
    args = ("--max-vram", "0.12", "--no-fetch")
    options: dict[str, Any] = {"engine_args": ("--", "-t", "1")}  # without a context of its own
    waits = re.compile(r"need \d+ MB with 4,096 tokens of context, have 216 MB; ([\d,]+) would fit: --ctx (\d+)")
    with world(tmp_path, hosts=2, rtt_ms=2) as mesh:
        token = mesh.seed("h1", "--model", str(model), *args, **options)
        mesh.start("h2", "--join", token, *args, **options)
        [[_, would]] = eventually(lambda: waits.findall(mesh.nodes["h1"].output() + mesh.nodes["h2"].output()), 40)
        assert 512 <= int(would) < 4096

        for name in ("h2", "h1"):
            mesh.stop(name, signal.SIGTERM)
        token = mesh.seed("h1", "--model", str(model), *args, "--min-ctx", "512", **options)
        mesh.start("h2", "--join", token, *args, "--min-ctx", "512", **options)
        served_again(mesh, "h1", "h2")
        lines = "".join(node.output() for node in mesh.nodes.values())
        [n_ctx] = re.findall(r" with ([\d,]+) tokens of context: \d+ MB on h\d, \d+ MB here", lines)
        assert int(would) <= int(n_ctx.replace(",", "")) < 4096
        assert mesh.api("h1").complete("Hi", 8)["tokens_predicted"] == 8
        plan = mesh.nodes["h1"].command("plan", str(model), "--min-ctx", "512")
        assert f"{n_ctx} of its 8,192 tokens of context" in plan.stdout, plan.stdout + plan.stderr


@pytest.mark.timeout(200)
def test_stages_that_cannot_reach_each_other_are_relayed(model: Path, expected: str, tmp_path: Path) -> None:
    with world(tmp_path, hosts=3, rtt_ms=5, links={("h2", "h3"): {"loss": 1.0}}) as mesh:
        token = mesh.seed("h1", "--model", str(model), "--split")
        mesh.start("h2", "--join", token)
        mesh.start("h3", "--join", token)
        served_again(mesh, "h1", "h2", "h3")
        assert ask(mesh.api("h1")) == expected
        counters = [stage["counters"] for stage in mesh.status("h1")["engine"]["stages"]]
        assert counters[0]["relays"] > 40 and counters[0]["pushes"] == 0
        assert {node["state"] for node in mesh.status("h2")["nodes"]} == {"alive"}


@pytest.mark.timeout(200)
def test_two_nats_and_one_forwarded_port(model: Path, expected: str, tmp_path: Path) -> None:
    with world(tmp_path, hosts=2, rtt_ms=5) as mesh, ExitStack() as stack:
        inside = [
            stack.enter_context(netlab.behind_nat(mesh.lab, "h1", "192.168.1", forward_udp=BIND_PORT)),
            stack.enter_context(netlab.behind_nat(mesh.lab, "h2", "192.168.2")),
        ]
        seed = ("--model", str(model), "--split", "--advertise", mesh.lab.ip("h1"))
        token = mesh.seed("h1", *seed, prefix=inside[0])
        mesh.start("h2", "--join", token, prefix=inside[1])
        served_again(mesh, "h1", "h2")
        for prefix in inside:
            assert ask(netlab.LabApi(prefix, f"http://127.0.0.1:{PORT}")) == expected
        addresses = [node["address"] for node in mesh.status("h1")["nodes"]]
        assert any(a and a.startswith(mesh.lab.ip("h2") + ":") for a in addresses), addresses
        mesh.close()
