"""`mesh-llm device-server`: stock clients, clients that die, clients that lie."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from support.processes import (
    ENGINE,
    MESH_LLM,
    Api,
    DeviceServer,
    MeshLlm,
    Process,
    backend_environment,
    eventually,
    free_port,
)

from meshllm import rpc
from meshllm.errors import MeshLlmError, ProtocolError, TransportError

HELLO = b"\x0e" + struct.pack("<Q", 24) + bytes(24)


@pytest.fixture
def server(model: Path) -> Iterator[rpc.DeviceServer]:
    """In this process, so that its counters can be read."""
    running = rpc.DeviceServer("127.0.0.1:0", models=[(rpc.fingerprint([str(model)]), [str(model)])], threads=2)
    yield running
    running.stop()


def ended_or_healthy(process: Process, api: Api) -> bool:
    return process.popen.poll() is not None or api.healthy()


def test_stock_llama_server_uses_our_device_server(server: rpc.DeviceServer, model: Path) -> None:
    port = free_port()
    plain = [str(ENGINE / "llama-server"), "-m", str(model), "--port", str(port), "-c", "512", "-t", "2"]
    remote = [*plain, "--rpc", server.address, "-ngl", "999", "--fit", "off"]
    texts = []
    for argv in (plain, remote):
        with Process(argv) as process:
            api = Api(f"http://127.0.0.1:{port}")
            eventually(partial(ended_or_healthy, process, api), 60, "healthy")
            texts.append(api.complete("The history of Rome", 40)["content"])
    assert texts[0] == texts[1]
    assert server.counters()["graphs_computed"] > 40


def test_stock_client_of_two_servers(server: rpc.DeviceServer) -> None:
    """llama.cpp's own test: what lies on one server means nothing to another, and sizes are asked by strides too."""
    other = rpc.DeviceServer("127.0.0.1:0", threads=1)
    try:
        command = [str(ENGINE / "test-rpc-multi-server"), server.address, other.address]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert other.counters()["graphs_computed"] == 1
        assert server.counters()["errors"] == other.counters()["errors"] == 0
        assert server.take_log() == other.take_log() == []
    finally:
        other.stop()


def test_killed_client_frees_its_memory(server: rpc.DeviceServer, model: Path) -> None:
    with MeshLlm("--model", str(model), "--stage", server.address) as client:
        client.ready()
        assert server.counters()["memory_used"] > 50e6
        client.kill(signal.SIGKILL)
        eventually(lambda: server.counters()["memory_used"] == 0, 10, "no memory used")


def test_memory_limit_is_said_in_one_line(model: Path) -> None:
    with DeviceServer("127.0.0.1:0", "--max-vram", "0.02", "--model", str(model)) as small:
        small.ready()
        command = [MESH_LLM, "--model", str(model), "--stage", small.address, "--port", str(free_port())]
        command += ["--ctx", "4096"]  # by itself it would look for a context that fits
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and "is out of memory:" in last and "MiB more are needed" in last


def raw(address: str, *parts: bytes) -> bytes:
    """Sends bytes as they are, says that no more will come, and reads what comes back."""
    host, port = address.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=20) as s:
        with contextlib.suppress(OSError):
            for part in parts:
                s.sendall(part)
            s.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while piece := s.recv(65536):
                answer += piece
        return answer


def frame(command: int, payload: bytes = b"", size: int | None = None) -> bytes:
    return bytes([command]) + struct.pack("<Q", len(payload) if size is None else size) + payload


def mesh_hello() -> bytes:
    version = rpc.ggml_version().encode()
    return HELLO + frame(64, struct.pack("<H", 1) + bytes([len(version)]) + version)


ATTACKS = {
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "noise": os.urandom(4096),
    "half a hello": HELLO[:5],
    "unknown command": HELLO + frame(200),
    "endless frame": HELLO + frame(6, size=2**63),
    "endless graph": HELLO + frame(10, struct.pack("<III", 0, 0xFFFFFFFF, 0)),
    "foreign buffer": HELLO + frame(4, struct.pack("<Q", 0xDEADBEEF)),
    "command of a mesh": HELLO + frame(70, bytes(24)),
    "noise as 66": mesh_hello() + frame(66, os.urandom(300)),
    "huge count in 67": mesh_hello() + frame(67, struct.pack("<II", 0, 2**31)),
    "huge size in 69": mesh_hello() + frame(69, struct.pack("<QQ", 1, 2**64 - 1) + bytes(100)),
    "foreign buffer in 73": mesh_hello() + frame(73, struct.pack("<QQQQ", 1, 1, 0, 8)),
    "zeros as 75": mesh_hello() + frame(75, bytes(100)),
    "noise as 74": HELLO + frame(74, os.urandom(16)),
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_hostile_bytes_end_their_own_session_only(server: rpc.DeviceServer, attack: bytes) -> None:
    raw(server.address, attack)
    assert rpc.probe(server.address, 5).kind == "mesh"
    eventually(lambda: server.counters()["sessions_open"] == 0, 10, "closed sessions")
    assert server.counters()["memory_used"] == 0


def test_errors_come_back_in_words(server: rpc.DeviceServer) -> None:
    gguf = bytes(32) + bytes([12]) + b"../../secret" + bytes(4 + 32 + 8) + struct.pack("<QQQ", 1, 0, 16)
    cases = {
        frame(1, struct.pack("<I", 9)): b"the client names a device that does not exist",
        frame(70, struct.pack("<QQQ", 77, 0, 8)): b"does not own",
        frame(0, struct.pack("<IQ", 0, 64)) + frame(68, gguf) + frame(15): b"does not have the model",
        frame(0, struct.pack("<IQ", 0, 64)) + frame(70, struct.pack("<QQQ", 1, 60, 8)): b"outside its buffer",
    }
    for request, message in cases.items():
        assert message in raw(server.address, mesh_hello() + request), message


def test_names_that_are_paths_are_only_names(server: rpc.DeviceServer, model: Path) -> None:
    fingerprint = rpc.fingerprint([str(model)])
    name = b"/etc/passwd"
    request = fingerprint + bytes([len(name)]) + name + bytes(4 + 32 + 8) + struct.pack("<QQQ", 1, 0, 16)
    answer = raw(server.address, mesh_hello() + frame(0, struct.pack("<IQ", 0, 64)) + frame(68, request) + frame(15))
    assert b"the model has no tensor of the requested name" in answer


def test_memory_beyond_what_there_is(server: rpc.DeviceServer) -> None:
    answer = raw(server.address, HELLO, frame(0, struct.pack("<IQ", 0, 2**60)))
    assert answer.endswith(struct.pack("<QQQ", 16, 0, 0))


def test_another_ggml_version_is_refused(server: rpc.DeviceServer) -> None:
    answer = raw(server.address, HELLO + frame(64, struct.pack("<H", 1) + b"\x059.9.9"))
    assert b"the client has ggml 9.9.9" in answer


def test_many_silent_strangers_do_no_harm(server: rpc.DeviceServer) -> None:
    host, port = server.address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection((host, int(port))))
        assert rpc.probe(server.address, 5).kind == "mesh"


def test_addresses_that_cannot_be() -> None:
    with pytest.raises(MeshLlmError, match="no encryption"):
        rpc.DeviceServer("0.0.0.0:0")
    with pytest.raises(TransportError, match="write HOST:PORT"):
        rpc.DeviceServer("nonsense")
    with pytest.raises(MeshLlmError, match="no device 'TPU9' on this machine"):
        rpc.DeviceServer("127.0.0.1:0", devices=["TPU9"])
    with pytest.raises(TransportError, match="Connection refused"):
        rpc.probe(f"127.0.0.1:{free_port()}", 2)


def test_not_a_device_server_is_said(solo: Api) -> None:
    with pytest.raises((ProtocolError, TransportError)):
        rpc.probe(solo.base.removeprefix("http://"), 2)


def test_unix_socket(model: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("s") / "d.sock"
    with DeviceServer(f"unix:{path}", "--model", str(model)) as server:
        assert server.ready().address == f"unix:{path}"
        with MeshLlm("--model", str(model), "--stage", server.address) as client:
            assert client.ready().api.complete("Hi", 5)["tokens_predicted"] == 5
    assert not path.exists()


def test_a_stage_waits_for_the_way_to_the_next(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A node may hear of the next stage, and make the socket that leads to it, later than the host does."""
    folder = tmp_path_factory.mktemp("s")
    servers = [rpc.DeviceServer(f"unix:{folder}/{name}.sock", threads=1) for name in "ab"]
    try:
        with contextlib.ExitStack() as stack:
            a, b = (stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in servers)
            for s, name in ((a, "a"), (b, "b")):
                s.settimeout(20)
                s.connect(f"{folder}/{name}.sock")
                s.sendall(mesh_hello())
            b.recv(8 + 28, socket.MSG_WAITALL)
            key = b.recv(1024)[8 + 2 + 1 + len(rpc.ggml_version()) :][:16]
            a.recv(8 + 28, socket.MSG_WAITALL)
            a.recv(1024)
            address = b"unix:peer-b.sock"
            a.sendall(frame(71, struct.pack("<I", 0) + key + bytes([len(address)]) + address))
            a.settimeout(0.3)
            with pytest.raises(TimeoutError):
                a.recv(9)
            a.settimeout(20)
            (folder / "peer-b.sock").symlink_to(folder / "b.sock")
            assert a.recv(9, socket.MSG_WAITALL) == struct.pack("<QB", 1, 1)  # else the host relays
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_cleanly(number: signal.Signals) -> None:
    with DeviceServer() as server:
        server.ready()
        server.kill(number)
        assert server.wait(10) == 0


def test_lost_stage_at_the_start_is_one_line(model: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    command = [MESH_LLM, "--model", str(model), "--stage", address, "--port", str(free_port())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.strip() == f"mesh-llm: cannot connect to {address}: Connection refused"


OPERATORS = ["RMS_NORM", "SOFT_MAX", "SET_ROWS", "GET_ROWS", "CONT", "SCALE", "SWIGLU", "ARGSORT", "CONCAT", "CLAMP"]
OPERATORS += ["FILL", "SET", "ARANGE", "DIAG", "TRI", "SOLVE_TRI", "SSM_CONV", "SSM_SCAN", "GATED_DELTA_NET"]
OPERATORS += ["RWKV_WKV6", "RWKV_WKV7", "GATED_LINEAR_ATTN", "DSV4_HC_COMB", "DSV4_HC_PRE", "DSV4_HC_POST"]
OPERATORS += ["CONV_2D_DW", "CONV_TRANSPOSE_1D", "CONV_TRANSPOSE_2D", "COL2IM_1D", "POOL_1D", "POOL_2D", "UPSCALE"]
OPERATORS += ["PAD", "PAD_REFLECT_1D", "ROLL", "TIMESTEP_EMBEDDING", "ACC", "ADD_ID", "COUNT_EQUAL", "LEAKY_RELU"]
OPERATORS += ["XIELU"]
# All others that a stage takes pass too, but CPY, GET_ROWS, MUL_MAT, FLASH_ATTN_EXT, CONV_2D, IM2COL_3D, ROPE,
# LIGHTNING_INDEXER and some more take up to minutes; test_archs.py computes with most of them.


def test_ggmls_own_operator_tests_pass_on_a_stage(server: rpc.DeviceServer, tmp_path: Path) -> None:
    """test-backend-ops compares the results of our device with those of the CPU."""
    config = tmp_path / "backend.json"
    config.write_text(f'{{"stages": [{{"address": "{server.address}"}}], "host_device": "CPU"}}')
    environment = os.environ | backend_environment(config)
    for operator in OPERATORS:
        command = [str(ENGINE / "test-backend-ops"), "test", "-b", "STAGE0", "-o", operator]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
        lines = [line for line in result.stdout.splitlines() if "OK" in line]
        assert result.returncode == 0 and lines, (operator, result.stdout[-2000:])
