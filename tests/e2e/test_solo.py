"""`mesh-llm --model X` on one machine."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from support.processes import MESH_LLM, Api, MeshLlm, eventually, free_port, in_parallel

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}


def llama_server_of(server: MeshLlm) -> psutil.Process:
    children = psutil.Process(server.popen.pid).children(recursive=True)
    return next(p for p in children if p.name().startswith("llama-server"))


def test_chat(solo: Api) -> None:
    answer = solo.request("/v1/chat/completions", QUESTION | {"max_tokens": 40})
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] > 0
    assert "Paris" in solo.complete("The capital of France is the city of", 4)["content"]


def test_default_model_needs_no_name() -> None:
    with MeshLlm() as server:
        assert solo_model(server.ready().api) == "SmolLM2-135M-Instruct.Q4_1"


def solo_model(api: Api) -> str:
    return str(api.request("/v1/models")["data"][0]["id"])


def test_stream_comes_piece_by_piece(solo: Api) -> None:
    host = solo.base.removeprefix("http://")
    connection = http.client.HTTPConnection(host, timeout=60)
    body = json.dumps(QUESTION | {"max_tokens": 60, "stream": True, "ignore_eos": True})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    arrivals = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            arrivals.append(time.monotonic())
    assert len(arrivals) >= 60
    connection.close()
    # at the end in one piece they would all arrive together
    assert arrivals[len(arrivals) // 2] - arrivals[0] > 0.1 * (arrivals[-1] - arrivals[0]) > 0


def test_two_at_once(solo: Api) -> None:
    answers = in_parallel([lambda: solo.complete("The sky is", 40), lambda: solo.complete("Two and two", 40)])
    assert all(a["tokens_predicted"] == 40 for a in answers)


def test_errors_of_the_engine_pass_through(solo: Api) -> None:
    status, answer = solo.status_of("/v1/chat/completions", {"messages": "no list"})
    assert status >= 400 and answer["error"]["message"]


def test_client_that_goes_frees_its_slot(solo: Api) -> None:
    host, port = solo.base.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "Once", "n_predict": 4000, "ignore_eos": True, "stream": True}).encode()
    head = "POST /completion HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(head.encode() + body)
        assert b"data:" in client.recv(65536) + client.recv(65536)
        assert any(slot["is_processing"] for slot in solo.request("/slots"))
    eventually(lambda: not any(slot["is_processing"] for slot in solo.request("/slots")), 10, "idle slots")


def test_killed_engine_is_started_again_and_the_request_with_it(model: Path) -> None:
    with MeshLlm("--model", str(model)) as server:
        api = server.ready().api
        victim = llama_server_of(server)

        def kill() -> None:
            eventually(lambda: any(slot["is_processing"] for slot in api.request("/slots")))
            victim.kill()

        answer, _ = in_parallel([lambda: api.complete("Hi", 400), kill])
        assert answer["tokens_predicted"] == 400
        assert api.complete("Hi", 3)["tokens_predicted"] == 3
        assert api.engine_status()["restarts"] == 1


def test_request_that_kills_every_engine_is_given_up(model: Path) -> None:
    with MeshLlm("--model", str(model)) as server:
        api = server.ready().api

        def kill() -> None:
            for _ in range(3):
                eventually(lambda: busy(api), 60)
                victim = llama_server_of(server)
                victim.kill()
                victim.wait(10)

        def busy(api: Api) -> bool:
            try:
                return any(slot["is_processing"] for slot in api.request("/slots"))
            except OSError:
                return False

        body = {"prompt": "Hi", "n_predict": 5000, "ignore_eos": True}
        assert in_parallel([lambda: api.status_of("/completion", body), kill])[0][0] == 503


def test_killed_parent_takes_the_engine_along(model: Path) -> None:
    with MeshLlm("--model", str(model)) as server:
        engine = llama_server_of(server.ready())
        server.kill(signal.SIGKILL)
        eventually(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE, 5, "no llama-server")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_leaves_nothing_behind(model: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as temporary:  # short enough for sockets
        monkeypatch.setenv("TMPDIR", temporary)
        with MeshLlm("--model", str(model)) as server:
            engine = llama_server_of(server.ready())
            assert list(Path(temporary).glob("mesh-llm-*"))
            server.kill(number)
            assert server.wait(10) == 0
            assert not engine.is_running()
        assert not list(Path(temporary).glob("mesh-llm-*"))


def fails_with(*args: str) -> str:
    with tempfile.TemporaryDirectory() as data:
        env = os.environ | {"XDG_DATA_HOME": data}
        result = subprocess.run([MESH_LLM, *args], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.splitlines()
    assert [line.startswith("mesh-llm: ") for line in lines].count(True) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return lines[-1]


def test_port_in_use(model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "is in use; choose another with --port" in fails_with("--model", str(model), "--port", port)


def test_bad_model_files(model: Path, tmp_path: Path) -> None:
    port = str(free_port())
    data = model.read_bytes()
    cases = {
        "text.gguf": (b"this is no model", "is not a GGUF file"),
        "empty.gguf": (b"", "empty.gguf is empty"),
        "head.gguf": (data[:1000], "download it again"),
        "half.gguf": (data[: len(data) // 2], "download it again"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        line = fails_with("--model", str(path), "--port", port)
        assert message in line and str(path) in line
    assert "cannot open" in fails_with("--model", str(tmp_path / "none.gguf"), "--port", port)


def test_broken_weights_of_a_readable_file(model: Path, tmp_path: Path) -> None:
    """The index is whole but llama.cpp cannot load it: its own reason is the message."""
    data = model.read_bytes()
    changed = tmp_path / "odd.gguf"
    changed.write_bytes(
        data.replace(b"llama.attention.head_count_kv", b"llama.attention.head_count_xx", 1).replace(
            b"llama.embedding_length", b"llama.embedding_lengtx", 1
        )
    )
    line = fails_with("--model", str(changed), "--port", str(free_port()))
    assert "cannot serve odd" in line


def test_unknown_name() -> None:
    line = fails_with("--model", "SmolLM3-135M", "--port", str(free_port()))
    assert "did you mean smollm2, SmolLM2-135M-Instruct.Q4_1" in line


def test_missing_engine(model: Path, tmp_path: Path) -> None:
    line = fails_with("--model", str(model), "--bin-dir", str(tmp_path), "--port", str(free_port()))
    assert "llama-server is missing; check --bin-dir" in line


def test_not_enough_memory(model: Path) -> None:
    """Another machine may come, or the user asks for less."""
    with MeshLlm("--model", str(model), "--max-vram", "0.2", "--", "-c", "8192") as server:
        output = server.wait_output("Waiting for more peers: need ")
        found = re.search(r"with 8,192 tokens of context, have 180 MB; ([\d,]+) would fit: --ctx (\d+)", output)
        assert found, output
    with MeshLlm("--model", str(model), "--max-vram", "0.2", "--ctx", found[2]) as server:
        server.ready()
    with MeshLlm("--model", str(model), "--max-vram", "0.2", "--min-ctx", "1024") as server:
        assert "tokens of context: " in server.ready().output()
