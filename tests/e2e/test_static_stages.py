"""One model over device servers in other network namespaces, through an unmodified llama-server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support import lab as netlab
from support.processes import (
    ENGINE,
    Api,
    DeviceServer,
    MeshLlm,
    Process,
    StockServer,
    eventually,
    in_parallel,
)

PORT, RPC_PORT, STOCK_PORT = 9337, 50052, 50053
ENGINE_ARGS = ("--", "-c", "8192", "-t", "2", "-np", "4", "--no-cache-prompt")
N_PREDICT = 200
WORDS = "Rome was not built in a day, and the people who built it were not always of one mind about the plan. "
PROMPTS = {1: "Hi", 300: WORDS * 12, 2000: WORDS * 83}


@pytest.fixture(scope="module")
def hosts() -> Iterator[Any]:
    if why := netlab.missing():
        pytest.skip(why)
    with netlab.make_lab(hosts=3, rtt_ms=1) as lab:
        yield lab


@pytest.fixture(scope="module")
def servers(hosts: Any, model: Path) -> Iterator[dict[str, str]]:
    """Addresses of two of our device servers on two hosts and of a stock one."""
    with ExitStack() as stack:
        for host in ("h2", "h3"):
            listen = f"{hosts.ip(host)}:{RPC_PORT}"
            prefix = netlab.prefix(hosts, host)
            args = ("--allow-remote", "--model", str(model))
            stack.enter_context(DeviceServer(listen, *args, prefix=prefix)).ready()
        stock = StockServer(hosts.ip("h3"), STOCK_PORT, prefix=netlab.prefix(hosts, "h3"))
        stack.enter_context(stock).ready()
        yield {
            "h2": f"{hosts.ip('h2')}:{RPC_PORT}",
            "h3": f"{hosts.ip('h3')}:{RPC_PORT}",
            "stock": stock.address,
        }


def serve(hosts: Any, model: Path, *args: str, engine_args: tuple[str, ...] = ENGINE_ARGS) -> MeshLlm:
    return MeshLlm("--model", str(model), *args, *engine_args, port=PORT, prefix=netlab.prefix(hosts, "h1"))


def api_of(hosts: Any) -> netlab.LabApi:
    return netlab.LabApi(netlab.prefix(hosts, "h1"), f"http://127.0.0.1:{PORT}")


def answers(api: Api) -> dict[str, Any]:
    """Texts and log-probabilities for every prompt, one by one and four at once."""
    out: dict[str, Any] = {}
    for n, prompt in PROMPTS.items():
        out[f"prompt {n}"] = api.complete(prompt, N_PREDICT, n_probs=1)
    four = in_parallel([partial(api.complete, f"{WORDS} Number {i}.", N_PREDICT, n_probs=1) for i in range(4)])
    return out | {f"at once {i}": answer for i, answer in enumerate(four)}


@pytest.fixture(scope="module")
def reference(hosts: Any, model: Path) -> dict[str, Any]:
    """What plain llama-server says, with no line of ours in between."""
    socket = f"http://127.0.0.1:{PORT}"
    argv = [str(ENGINE / "llama-server"), "-m", str(model), "--port", str(PORT), *ENGINE_ARGS[1:]]
    with Process(argv, prefix=netlab.prefix(hosts, "h1")):
        api = netlab.LabApi(netlab.prefix(hosts, "h1"), socket)
        eventually(api.healthy, 60, "plain llama-server")
        return answers(api)


STAGES = {
    "one stage": ("h2",),
    "two stages": ("h2", "h3"),
    "stock last": ("h2", "stock"),
    "stock first": ("stock", "h2"),
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("layout", STAGES)
def test_same_answers_as_plain_llama_server(
    hosts: Any, servers: dict[str, str], model: Path, reference: dict[str, Any], layout: str
) -> None:
    stages = [arg for name in STAGES[layout] for arg in ("--stage", servers[name])]
    with serve(hosts, model, *stages) as server:
        server.ready()
        got = answers(api_of(hosts))
        status = api_of(hosts).engine_status()
    for name, expected in reference.items():
        assert got[name]["content"] == expected["content"], name
        pairs = zip(got[name]["completion_probabilities"], expected["completion_probabilities"], strict=True)
        assert max(abs(a["logprob"] - b["logprob"]) for a, b in pairs) < 1e-3, name
    counters = [stage["counters"] for stage in status["stages"]]
    if layout == "two stages":
        assert counters[0]["pushes"] > N_PREDICT and counters[0]["relays"] == 0
    if "stock" in layout:
        assert counters[0]["relays"] > N_PREDICT and counters[0]["pushes"] == 0
    for name, stage, count in zip(STAGES[layout], status["stages"], counters, strict=True):
        weights = ("weight_bytes_sent", "weight_bytes_local")
        moved = tuple(count[key] for key in weights)
        assert moved == ((stage["weight_bytes"], 0) if name == "stock" else (0, stage["weight_bytes"]))


def spent(before: Any, after: Any) -> list[dict[str, int]]:
    return [
        {key: b["counters"][key] - a["counters"][key] for key in a["counters"]}
        for a, b in zip(before["stages"], after["stages"], strict=True)
    ]


def test_one_wait_a_token_and_logits_stay(hosts: Any, servers: dict[str, str], model: Path) -> None:
    with serve(hosts, model, "--stage", servers["h2"], "--stage", servers["h3"]) as server:
        server.ready()
        api = api_of(hosts)
        api.complete("Hi", 8)
        before = api.engine_status()
        api.complete("Hi", 101)
        first, last = spent(before, api.engine_status())
    n_tokens, n_embd, n_vocab = 101, 576, 49152
    assert first["blocking_waits"] == 0
    assert last["blocking_waits"] <= n_tokens + 1
    # what comes back is one hidden state a token, not the logits
    assert last["bytes_received"] < 1.1 * n_tokens * (n_embd * 4 + 8) + 1000 < n_tokens * n_vocab * 4 / 50
    assert first["graph_sends"] == last["graph_sends"] == 0
    assert first["pushes"] >= n_tokens - 1


def test_a_prompt_in_parts_keeps_the_last_layer_on_its_stage(hosts: Any, servers: dict[str, str], model: Path) -> None:
    """All parts but the last give no output: the last layer's tensors are then empty, and no reason to move it."""
    args = (*ENGINE_ARGS, "-ub", "16", "-b", "256")
    with serve(hosts, model, "--stage", servers["h2"], "--stage", servers["h3"], engine_args=args) as server:
        server.ready()
        api = api_of(hosts)
        before = api.engine_status()
        api.complete(list(range(1000, 1256)), 1)
        first, last = spent(before, api.engine_status())
    assert first["blocking_waits"] + last["blocking_waits"] <= 2
    assert first["bytes_received"] + last["bytes_received"] < 100_000  # the weights of one layer are megabytes
    assert first["graph_sends"] + last["graph_sends"] <= 6


def test_changing_batches_send_each_graph_once(hosts: Any, servers: dict[str, str], model: Path) -> None:
    """Four clients start and stop: shapes alternate, and once all have been seen nothing is sent again."""
    with serve(hosts, model, "--stage", servers["h2"], "--stage", servers["h3"]) as server:
        server.ready()
        api = api_of(hosts)

        def round_of_four() -> None:
            in_parallel([partial(api.complete, "Hello there", n) for n in (10, 20, 30, 40)])

        totals: list[tuple[int, int]] = []
        while len(totals) < 100 and (not totals or totals[-1][0] > 0):
            before = api.engine_status()
            round_of_four()
            change = spent(before, api.engine_status())
            totals.append((sum(c["graph_sends"] for c in change), sum(c["graph_hits"] for c in change)))
    # clients that start together meet in batches that differ by chance: ten rounds until no shape is new, or twenty
    sends, hits = totals[-1]
    assert sends == 0 and hits >= 2 * 40, totals


def test_killed_device_server_fails_the_request_only(hosts: Any, servers: dict[str, str], model: Path) -> None:
    listen = f"{hosts.ip('h3')}:50060"
    prefix = netlab.prefix(hosts, "h3")
    args = ("--allow-remote", "--model", str(model))
    api = api_of(hosts)
    with DeviceServer(listen, *args, prefix=prefix) as victim, ExitStack() as stack:
        victim.ready()
        server = stack.enter_context(serve(hosts, model, "--stage", servers["h2"], "--stage", listen)).ready()
        before = api.engine_status()

        def kill() -> None:
            eventually(lambda: spent(before, api.engine_status())[0]["pushes"] > 20, 30, "an answer under way")
            victim.kill(signal.SIGKILL)

        def ask() -> str:
            with pytest.raises(OSError) as error:
                api.request("/completion", {"prompt": "Hi", "n_predict": 4000, "ignore_eos": True})
            return str(error.value)

        text, _ = in_parallel([ask, kill])
        assert "500" in text and "Compute error" in text
        eventually(lambda: api.engine_status()["state"] == "stage lost", 5)
        with pytest.raises(OSError, match="503") as refused:
            api.complete("Hi", 3)
        assert "STAGE1" in str(refused.value) and "is lost" in str(refused.value)
        with DeviceServer(listen, *args, prefix=prefix) as back:
            back.ready()
            eventually(lambda: api.engine_status()["state"] == "ready", 30, "ready again")
            assert api.complete("Hi", 5)["tokens_predicted"] == 5
            assert server.popen.poll() is None and api.engine_status()["restarts"] == 1


def test_stage_without_the_model_gets_its_weights(hosts: Any, model: Path, other_model: Path) -> None:
    """The other model of the tests is no help; a warning says that weights travel."""
    listen = f"{hosts.ip('h3')}:50061"
    with DeviceServer(listen, "--allow-remote", "--model", str(other_model), prefix=netlab.prefix(hosts, "h3")) as ours:
        ours.ready()
        with serve(hosts, model, "--stage", listen) as server:
            server.ready()
            stage = api_of(hosts).engine_status()["stages"][0]
            assert "the weights are sent to it over the network" in server.output()
            assert stage["counters"]["weight_bytes_sent"] == stage["weight_bytes"]
            assert stage["counters"]["weight_bytes_local"] == 0


def test_second_family(hosts: Any, servers: dict[str, str], other_model: Path) -> None:
    """Gemma 3: other operators, sliding windows, tied embeddings.

    Without repacked weights, which round differently and which a stage does not have.
    """
    texts = []
    for stages in ([], ["--stage", servers["h2"], "--stage", servers["h3"]]):
        with serve(hosts, other_model, *stages, engine_args=("--", "-c", "2048", "-t", "2", "--no-repack")) as server:
            server.ready()
            texts.append(api_of(hosts).complete("The history of Rome begins", 60)["content"])
    assert texts[0] == texts[1]


def test_a_stage_that_lends_little_gets_a_shorter_context(hosts: Any, model: Path) -> None:
    """150 MB hold the layers and their compute buffers, but not the 189 MB of KV cache of 8,192 tokens."""
    listen = f"{hosts.ip('h3')}:50062"
    args = ("--allow-remote", "--max-vram", "0.15")
    with DeviceServer(listen, *args, prefix=netlab.prefix(hosts, "h3")) as lends:
        lends.ready()
        with serve(hosts, model, "--stage", listen, engine_args=()) as server:
            line = server.wait_output("would fit: --ctx ")
            assert server.wait(10) == 2 and "does not fit with 4,096 tokens of context on its stages" in line
        would = line.split("--ctx ")[1].split()[0]
        with serve(hosts, model, "--stage", listen, "--min-ctx", "256", engine_args=()) as server:
            server.ready()
            assert api_of(hosts).request("/props")["default_generation_settings"]["n_ctx"] == int(would)
