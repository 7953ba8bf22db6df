"""Runs a node of a mesh: its identity, worker, API, dashboard, and the control socket of `status` and `token`."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler

from meshllm.api import Access, make_app, make_peer_app
from meshllm.cli.agents import NO_KEY, OWN_KEY, launch_lines, snippets
from meshllm.cli.http import access_of, bind, serving, until_signal, url_of
from meshllm.cli.options import ServeConfig
from meshllm.cli.output import Output, open_engine_log
from meshllm.cli.status import describe
from meshllm.console import make_console
from meshllm.errors import MeshLlmError
from meshllm.mesh.announcement import Capability
from meshllm.mesh.known_meshes import KnownMeshes
from meshllm.mesh.token import Token, decode
from meshllm.node.node import Node, NodeConfig, default_name
from meshllm.node.router import LocalTarget
from meshllm.node.status import FullStatus
from meshllm.paths import control_socket, data_folder
from meshllm.quic.address import join_address, split_address
from meshllm.quic.identity import Identity, IdentityFile, make_identity
from meshllm.quic.stacks import default_stack
from meshllm.units import GB


async def serve_node(config: ServeConfig) -> None:
    output = Output(verbose=config.verbose, json=config.log_json)
    output.show_logs()
    with contextlib.ExitStack() as stack:
        token = decode(config.join, time.time()) if config.join else None
        listener = stack.enter_context(contextlib.closing(bind(config.host, config.port)))
        console = None
        if config.console is not None:
            console = stack.enter_context(contextlib.closing(bind(config.console_host, config.console, "--console")))
        log_file = stack.enter_context(open_engine_log(output, config.engine_log))
        identity, state = _identity(config, stack)
        worker = None
        if not config.client:
            from meshllm.node.worker import Worker, WorkerConfig

            worker_config = WorkerConfig(
                models=config.model,
                begins=token is None,
                fetch=not config.no_fetch,
                draft=config.draft,
                draft_max=config.draft_tokens,
                device=config.device,
                threads=config.threads,
                max_vram_bytes=int((config.max_vram or 0) * GB),
                bin_dir=config.bin_dir,
                engine_args=config.engine_args,
            )
            worker = Worker(worker_config, output.emit, output.progress, log_file)
        node_config = NodeConfig(
            name=config.name or default_name(),
            bind_port=config.bind_port,
            quic=config.quic or default_stack(config.client),
            advertise=_advertised(config),
            token=token,
            split=config.split,
            tensor_split=config.tensor_split or (),
        )
        node = Node(node_config, identity, state, worker, output.emit)
        await until_signal(_run(node, token, listener, console, access_of(config), output))


def _advertised(config: ServeConfig) -> tuple[str, ...]:
    """The --advertise addresses, completed with --bind-port where they have no port. Raises MeshLlmError."""
    found = []
    for text in config.advertise:
        address = text if split_address(text) else join_address(text.strip("[]"), config.bind_port)
        if not split_address(address):
            raise MeshLlmError(f"--advertise {text}: give HOST:PORT, or HOST alone together with --bind-port")
        found.append(address)
    return tuple(found)


def _identity(config: ServeConfig, stack: contextlib.ExitStack) -> tuple[Identity, KnownMeshes]:
    """The key and the known meshes. A lite client, and a second node on one machine, has a key for this run only.

    Raises MeshLlmError when another process uses the file that --identity names.
    """
    if config.client and config.identity is None:
        return make_identity(), KnownMeshes(None)
    path = config.identity or data_folder() / "identity.pem"
    file = IdentityFile(path)
    stack.callback(file.close)
    identity = file.load()
    if identity is None:
        if config.identity:
            raise MeshLlmError(f"another mesh-llm is using the key file {path}; give this one another with --identity")
        return make_identity(), KnownMeshes(None)
    return identity, KnownMeshes(path.with_name(path.name + ".mesh.json"))


async def _run(
    node: Node,
    token: Token | None,
    listener: socket.socket,
    console: socket.socket | None,
    access: Access,
    output: Output,
) -> None:
    local = _NodeWithApi(node, listener, access)
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(serving(make_app(node.router, access), listener))
        inner = make_peer_app(LocalTarget(node.router))
        await stack.enter_async_context(serving(inner, node.folder / "api.sock"))
        if console:
            await stack.enter_async_context(serving(make_console(local, node.router, access), console))
            output.emit(f"the dashboard is at {url_of(console).removesuffix('/v1')}")
        with contextlib.suppress(OSError):  # too long a path: the node runs, only `mesh-llm status` does not
            where = control_socket(listener.getsockname()[1])
            await stack.enter_async_context(serving(_control_app(node, local), where))
        announced = asyncio.create_task(_announce(node, token, local, output), name="announce")
        try:
            await node.run()
        finally:
            announced.cancel()


class _NodeWithApi:
    """What the dashboard and the control socket ask: the node, and where its API is, which the node does not know."""

    def __init__(self, node: Node, listener: socket.socket, access: Access) -> None:
        self._node = node
        self.url = url_of(listener)
        self._port = listener.getsockname()[1]
        self.key = OWN_KEY if access.api_key else NO_KEY
        self.open_to_all = not access.local and not access.api_key
        self.make_token, self.drop = node.make_token, node.drop

    async def describe_all(self) -> FullStatus:
        status = self._node.describe()
        engines = await self._node.router.engines()
        agents = tuple(snippets(self.url, _writers(self._node), self.key))
        return FullStatus(**vars(status), engines=engines, api_port=self._port, agents=agents)


async def _announce(node: Node, token: Token | None, local: _NodeWithApi, output: Output) -> None:
    await node.started.wait()
    if local.open_to_all:
        output.emit(f"warning: anyone who can reach {local.url} can use it; protect it with --api-key KEY")
    if token is None:
        output.emit(f"to add a machine, run there: mesh-llm --join {node.make_token()}")
    await node.router.wait_served()
    output.emit(f"the API is at {local.url}")
    for line in launch_lines(local.url, _writers(node), local.key):
        output.emit(line)


def _writers(node: Node) -> list[str]:
    """The served models that an agent can talk to."""
    return [model.name for model in node.router.served() if model.capability is Capability.COMPLETION]


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except MeshLlmError as error:
        return web.json_response({"error": str(error)}, status=409)


def _control_app(node: Node, local: _NodeWithApi) -> web.Application:
    """What the commands on this machine ask, over the control socket."""

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(body=orjson.dumps(await local.describe_all()))

    async def status_text(_request: web.Request) -> web.Response:
        return web.Response(text="\n".join(describe(await local.describe_all())))

    async def token(request: web.Request) -> web.Response:
        return web.json_response({"token": node.make_token(float((await request.json())["expires_s"]))})

    async def revoke(request: web.Request) -> web.Response:
        node.revoke(decode((await request.json())["token"], 0))
        return web.json_response({})

    async def drop(request: web.Request) -> web.Response:
        asked = await request.json()
        return web.json_response({"name": node.drop(asked["model"], asked["undo"])})

    app = web.Application(middlewares=[_errors_as_json])
    app.router.add_get("/status", status)
    app.router.add_get("/status.txt", status_text)
    app.router.add_post("/token", token)
    app.router.add_post("/revoke", revoke)
    app.router.add_post("/drop", drop)
    return app
