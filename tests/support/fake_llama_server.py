"""Stands in for llama-server: `--host SOCKET`, and its behaviour in the last argument.

`serve` answers /health; GET /end ends it with status 7, GET /lose reports a lost stage to who started it.
`serve once` serves at its first start, and fails at every later one. `fail` cannot load the model. `serve unless it
guesses` fails with speculative decoding.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

LOG = """0.00.001 I load_tensors:          CPU model buffer size =    12.50 MiB
0.00.002 I llama_context: n_ctx         = 4096
0.00.002 I llama_context: n_ctx         = 512
0.00.003 I slot print_timing: id 0 | task 1 | prompt eval time =      50.00 ms /    10 tokens
0.00.003 I slot print_timing: id 0 | task 1 |        eval time =     500.00 ms /    20 tokens
draft acceptance = 0.50000 (    6 accepted /    12 generated), mean len = 3.00
"""
LOST = struct.pack("<8sII", b"MLCOUNT1", 0, 2)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/lose":
            config = json.loads(Path(os.environ["MESH_LLM_BACKEND_CONFIG"]).read_text())
            with open(config["counters"], "r+b") as file:
                file.write(LOST)
                file.seek(4608)
                file.write(b"lost stage far\0")
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
        if self.path == "/end":
            threading.Timer(0.02, os._exit, (7,)).start()

    def address_string(self) -> str:
        return "unix"


def main() -> None:
    socket, mode = sys.argv[sys.argv.index("--host") + 1], sys.argv[-1]
    served_before = Path(__file__).with_suffix(".served") if mode == "serve once" else None
    if mode == "fail" or (served_before and served_before.exists()):
        sys.exit("0.00.001 E the weights are broken\n0.00.002 E so the model is not loaded")
    if mode == "serve unless it guesses" and "--spec-type" in sys.argv:
        sys.exit("0.00.001 E the head is broken")
    if served_before:
        served_before.touch()
    print(LOG, end="", flush=True)
    ThreadingUnixStreamServer(socket, Handler).serve_forever()


main()
