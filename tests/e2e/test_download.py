"""`mesh-llm download` against a local server that speaks the hub's API for the calls used."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from support import adapters
from support.cut import rewrite
from support.processes import MESH_LLM, MeshLlm, free_port

REPOSITORY = "somebody/Small-GGUF"


class Hub:
    """`files` of REPOSITORY; `cut_after` bytes of an answer the connection ends, once."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.cut_after: int | None = None
        self.wrong_digest = False
        self.tokens: list[str] = []
        self.ranges: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        self.tokens.append(request.headers.get("Authorization", ""))
        path = request.path.partition("?")[0]
        if path == f"/api/models/{REPOSITORY}":
            listing = {"id": REPOSITORY, "siblings": [{"rfilename": name} for name in [*self.files, "README.md"]]}
            self._send(request, 200, {"Content-Type": "application/json"}, json.dumps(listing).encode(), body)
        elif path.startswith("/somebody/Gated"):
            self._send(request, 403, {"X-Error-Code": "GatedRepo"}, b"", body)
        elif path.startswith(f"/{REPOSITORY}/resolve/main/"):
            self._file(request, path.rpartition("/")[2], body)
        elif path == "/direct/direct-Q4_1.gguf":
            self._file(request, next(iter(self.files)), body)
        else:
            self._send(request, 404, {"X-Error-Code": "RepoNotFound"}, b"", body)

    def _file(self, request: BaseHTTPRequestHandler, name: str, body: bool) -> None:
        if name not in self.files:
            self._send(request, 404, {"X-Error-Code": "EntryNotFound"}, b"", body)
            return
        content = self.files[name]
        digest = hashlib.sha256(content + (b"!" if self.wrong_digest else b"")).hexdigest()
        headers = {"X-Repo-Commit": "0" * 40, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        wanted = request.headers.get("Range")
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if match:
            self.ranges.append(wanted or "")
            first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(request, 206, headers, content[first : last + 1], body)
        else:
            self._send(request, 200, headers, content, body)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes, body: bool
    ) -> None:
        request.send_response(status)
        for key, value in headers.items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body and self.cut_after is not None and len(content) > self.cut_after:
            content, self.cut_after = content[: self.cut_after], None
            request.close_connection = True
        if body:
            request.wfile.write(content)


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole model of 3 layers."""
    return rewrite(model, tmp_path_factory.mktemp("small") / "s.gguf", layers=range(3))[0].read_bytes()


@pytest.fixture
def hub(small: bytes) -> Iterator[Hub]:
    hub = Hub({"small-Q4_K_M.gguf": small, "small-Q8_0.gguf": small[:1000]})
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def download(hub: Hub | None, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    endpoint = {"HF_ENDPOINT": hub.url} if hub else {}
    env = os.environ | endpoint | {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_TOKEN": "secret"} | env
    return subprocess.run(
        [MESH_LLM, "download", *args], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def refused(hub: Hub | None, *args: str, **env: str) -> str:
    result = download(hub, *args, **env)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    folder = Path(os.environ["MESH_LLM_MODELS"])
    assert not list(folder.glob("*.gguf"))
    return result.stderr.splitlines()[-1]


def models_folder() -> Path:
    return Path(os.environ["MESH_LLM_MODELS"])


def test_the_catalog_is_listed() -> None:
    lines = download(None).stdout.splitlines()
    row = next(line for line in lines if "Qwen2.5-32B-Instruct" in line)
    assert "32b" in row and "20.0 GB" in row and "Qwen2.5-0.5B" in row and "Q4_K_M" in row
    assert [line.split()[-1] for line in lines if line.startswith("smollm2")] == ["yes"]
    assert len(lines) > 12


def test_a_repository_and_its_usual_quantisation(hub: Hub, small: bytes) -> None:
    result = download(hub, REPOSITORY)
    final = models_folder() / "small-Q4_K_M.gguf"
    assert result.returncode == 0 and result.stdout.strip() == str(final), result.stderr
    assert final.read_bytes() == small and "100 % of" in result.stderr and "MB/s" in result.stderr
    assert "Bearer secret" in hub.tokens
    listed = download(None).stdout
    assert re.search(r"small-Q4_K_M +\S+ MB +yes", listed)


def test_a_projector_comes_with_its_model_and_is_served(hub: Hub, small: bytes, tmp_path: Path) -> None:
    projector = adapters.projector(tmp_path / "any.gguf", 576).read_bytes()
    hub.files |= {"mmproj-F16.gguf": projector, "mmproj-BF16.gguf": projector[:500], "mmproj-F32.gguf": projector[:500]}
    result = download(hub, REPOSITORY)
    assert result.returncode == 0 and result.stdout.strip() == str(models_folder() / "small-Q4_K_M.gguf")
    assert sorted(path.name for path in models_folder().glob("*.gguf")) == [
        "mmproj-small-F16.gguf",
        "small-Q4_K_M.gguf",
    ]
    assert (models_folder() / "mmproj-small-F16.gguf").read_bytes() == projector
    listed = download(None).stdout
    assert "mmproj" not in listed and re.search(r"small-Q4_K_M +\S+ MB +yes +yes", listed)
    with MeshLlm("--model", "small", "--", "-c", "512", "-t", "1") as node:
        served = node.ready().api.request("/v1/models")["data"][0]
        assert served["id"] == "small-Q4_K_M" and "multimodal" in served["capabilities"]


def test_a_connection_cut_in_the_middle_is_resumed(hub: Hub, small: bytes) -> None:
    hub.cut_after = len(small) // 2
    first = download(hub, f"{REPOSITORY}:q4_k_m", HF_HUB_DOWNLOAD_TIMEOUT="5")
    if first.returncode:  # the library goes on by itself, or the next call does
        assert "run the command again to resume" in first.stderr
        assert not list(models_folder().glob("*.gguf"))
        assert download(hub, f"{REPOSITORY}:q4_k_m").returncode == 0
    assert (models_folder() / "small-Q4_K_M.gguf").read_bytes() == small
    assert any(int(r.removeprefix("bytes=").removesuffix("-")) > 0 for r in hub.ranges)


def test_a_killed_download_is_resumed(hub: Hub, small: bytes) -> None:
    partial = models_folder() / ".partial"
    partial.mkdir(parents=True)
    etag = hashlib.sha256(small).hexdigest()
    url = f"{hub.url}/{REPOSITORY}/resolve/main/small-Q4_K_M.gguf"
    mark = hashlib.sha256(f"{url} {etag}".encode()).hexdigest()[:16]
    (partial / f"small-Q4_K_M.gguf.{mark}").write_bytes(small[:5_000_000])
    assert download(hub, REPOSITORY).returncode == 0
    assert hub.ranges == ["bytes=5000000-"]
    assert (models_folder() / "small-Q4_K_M.gguf").read_bytes() == small


def test_a_terminal_gets_a_bar(hub: Hub) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    env = os.environ | {"HF_ENDPOINT": hub.url}
    with subprocess.Popen([MESH_LLM, "download", REPOSITORY], env=env, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        output = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while data := os.read(ours, 4096):
                output += data
        assert process.wait(30) == 0
    os.close(ours)
    assert re.search(rb"small-Q4_K_M.gguf: 100%.*[kM]B/s\]", output), output


def test_a_url(hub: Hub, small: bytes) -> None:
    assert download(hub, f"{hub.url}/direct/direct-Q4_1.gguf").returncode == 0
    assert (models_folder() / "direct-Q4_1.gguf").read_bytes() == small
    assert "its path has to end in .gguf" in download(hub, f"{hub.url}/x.bin").stderr


def test_what_cannot_be_had_is_one_line(hub: Hub) -> None:
    assert "has no Q5_0; it has: Q4_K_M, Q8_0" in refused(hub, f"{REPOSITORY}:Q5_0")
    assert "no such repository" in refused(hub, "somebody/Else-GGUF")
    assert "there is no model 'qwen2.5-33b' in the catalog; did you mean" in refused(hub, "qwen2.5-33b")
    gated = f"{hub.url}/somebody/Gated/resolve/main/x.gguf"
    assert "is gated: accept its terms on the hub" in refused(hub, gated)
    hub.wrong_digest = True
    assert "arrived damaged" in refused(hub, REPOSITORY)


def test_no_network() -> None:
    line = refused(None, REPOSITORY, HF_ENDPOINT=f"http://127.0.0.1:{free_port()}")
    assert "cannot be reached" in line
    assert "HF_HUB_OFFLINE is set" in refused(None, REPOSITORY, HF_HUB_OFFLINE="1")


def test_no_space(hub: Hub) -> None:
    if os.geteuid() != 0:
        pytest.skip("a small disk needs root")
    folder = models_folder()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=True)
    try:
        assert re.search(r"needs another \d+ MB in \S+, which has \d MB free; make space", refused(hub, REPOSITORY))
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_node_downloads_what_it_is_told_to_serve(hub: Hub) -> None:
    """And ends with one line when there is no such thing."""
    env = {"HF_ENDPOINT": hub.url}
    with MeshLlm("--model", f"{REPOSITORY}:q4_k_m", "--", "-c", "512", "-t", "1", env=env) as node:
        node.ready()
        assert "downloading somebody/Small-GGUF:q4_k_m" in node.output()
        assert node.api.request("/v1/models")["data"][0]["id"] == "small-Q4_K_M"
    with MeshLlm("--model", "somebody/Else-GGUF", env=env) as node:
        assert node.wait() == 2 and "no such repository" in node.output().splitlines()[-1]
    with MeshLlm("--model", "somebody/Else-GGUF", "--no-fetch", env=env) as node:
        assert node.wait() == 2 and "there is no model" in node.output().splitlines()[-1]


def test_a_model_is_planned_from_its_head(hub: Hub, small: bytes, tmp_path: Path) -> None:
    nodes = tmp_path / "nodes.toml"
    nodes.write_text('[[node]]\nname = "a"\nmemory_gb = 1\n')
    (tmp_path / "small.gguf").write_bytes(small)
    models = tmp_path / "models"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", "MESH_LLM_MODELS": str(models)}

    def plan(model: str) -> list[str]:
        args = [MESH_LLM, "plan", model, "--nodes", str(nodes)]
        result = subprocess.run(args, env=env, capture_output=True, text=True, timeout=60, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    from_hub, from_disk = plan(f"{REPOSITORY}:Q4_K_M"), plan(str(tmp_path / "small.gguf"))
    assert from_hub[1:] == from_disk[1:] and "8,192 of its 8,192 tokens" in from_hub[0]
    read = [int(wanted.removeprefix("bytes=0-")) + 1 for wanted in hub.ranges]
    assert read == sorted(read) and read[-1] < len(small) and not models.exists()
    missing = subprocess.run(
        [MESH_LLM, "plan", "somebody/Gated:Q8_0", "--nodes", str(nodes)],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1
