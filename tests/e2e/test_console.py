"""The dashboard in a real browser, of a lite client beside three nodes that serve one split model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Route, expect, sync_playwright
from support.processes import Api, MeshLlm, eventually, free_port

T = TypeVar("T")
ENGINE_ARGS = ("--", "-c", "2048", "-t", "1", "-np", "2")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[dict[str, Any]]:
    """`nodes` by name; `url` of the lite client's dashboard."""
    with ExitStack() as stack:
        port = free_port()
        args = ("--model", str(model), "--split", "--name", "seed")
        nodes = {"seed": stack.enter_context(MeshLlm(*args, *ENGINE_ARGS))}
        token = re.findall(r"--join (\S+)", nodes["seed"].wait_output("--join "))[-1]
        for name in ("second", HOSTILE):
            nodes[name] = stack.enter_context(MeshLlm("--join", token, "--name", name, *ENGINE_ARGS))
        client = MeshLlm("--client", "--join", token, "--name", "viewer", "--console", str(port))
        nodes["viewer"] = stack.enter_context(client)
        eventually(lambda: three_serve(client.api), 60, "three nodes serve")
        yield {"nodes": nodes, "url": f"http://127.0.0.1:{port}", "token": token}


def run(work: Coroutine[Any, Any, T]) -> T:
    """In a thread: the browser's loop runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def three_serve(api: Api) -> bool:
    try:
        nodes = api.request("/mesh/status")["nodes"]
    except OSError:
        return False
    return any(len(s["stages"]) == 2 and s["ready"] for node in nodes for s in node["serving"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, mesh: dict[str, Any]) -> Iterator[Page]:
    """Fails afterwards for errors on the console and for requests elsewhere."""
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=mesh["url"])
    page = context.new_page()
    wrong: list[str] = []

    def dismissed(dialog: Dialog) -> None:
        wrong.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    page.on("console", lambda message: wrong.append(message.text) if is_wrong(message) else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", dismissed)
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((mesh["url"], "data:")) else None)
    page.goto(mesh["url"])
    expect(page.locator("#state")).to_have_text("ready", timeout=20_000)
    yield page
    context.close()
    assert wrong == []


def is_wrong(message: ConsoleMessage) -> bool:
    """The browser itself logs answers with an error status; the page shows those."""
    return message.type == "error" and "the server responded with a status of 503" not in message.text


def ask(page: Page, text: str) -> None:
    page.fill("#ask", text)
    page.click("#send")


def test_the_bar_shows_who_serves_what(page: Page) -> None:
    expect(page.locator("#bar li")).to_have_count(4)
    seed = page.locator("#bar li", has_text="seed")
    expect(seed).to_contain_text(re.compile(r"(host|stage), \d+ % of SmolLM2"))
    expect(page.locator("#bar li.lit")).to_have_count(3)  # those of the model that is picked
    expect(page.locator("#bar li", has_text="viewer")).to_contain_text("client")
    expect(page.locator("#facts")).to_contain_text("Context")
    expect(page.locator("#facts")).to_contain_text(re.compile(r"Layersseed|Layers.* \d+,"))
    label = page.locator("#ring svg").get_attribute("aria-label") or ""
    assert label.startswith("A token goes ") and label.count("→") == 3
    expect(page.locator("#links tbody tr").first).to_contain_text("ms")


def test_a_hostile_name_is_text(page: Page) -> None:
    expect(page.locator("#bar li", has_text=HOSTILE)).to_have_count(1)
    assert page.locator("#bar img, #nodes img").count() == 0


def test_a_streamed_chat_and_its_end(page: Page) -> None:
    ask(page, "Say hello.")
    expect(page.locator(".turn.assistant")).to_have_text(re.compile(r"\S{3,}"), timeout=30_000)
    expect(page.locator("#send")).to_be_enabled(timeout=60_000)
    page.click("#clear")  # an answer that repeats itself may have filled the context
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Write a very long story.")
    expect(page.locator(".turn.assistant")).to_have_text(re.compile(r"\w+ \w+ \w+"), timeout=30_000)
    page.click("#stop")
    expect(page.locator("#send")).to_be_enabled(timeout=5_000)
    assert page.locator(".turn.error").count() == 0
    page.click("#clear")
    expect(page.locator(".turn")).to_have_count(0)


def test_what_a_model_writes_is_text_and_some_markdown(page: Page) -> None:
    answer = (
        f"# Title\n{HOSTILE}\n\n- **one**\n- `two`\n\n```html\n<script>alert(2)</script>\n```\n[x](javascript:alert(3))"
    )
    body = "".join(
        f"data: {part}\n\n" for part in (f'{{"choices":[{{"delta":{{"content":{json.dumps(answer)}}}}}]}}', "[DONE]")
    )
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page, "x")
    shown = page.locator(".turn.assistant")
    expect(shown.locator("pre code")).to_have_text("<script>alert(2)</script>")
    expect(shown.locator("li")).to_have_count(2)
    expect(shown).to_contain_text(HOSTILE)
    assert shown.locator("img, script, a").count() == 0


def test_the_picker_lights_nodes_and_chooses_for_the_chat(page: Page, mesh: dict[str, Any]) -> None:
    """With a second model, one that waits and one that is on its way, put into what the node tells."""
    status = Api(mesh["url"]).request("/api/status")
    ids = {node["name"]: node["id"] for node in status["nodes"]}
    first = status["models"][0]
    other = first | {"name": "other", "groups": [{"host": ids["second"], "stages": [], "shares": [1.0]}]}
    waiting = first | {"name": "huge", "groups": [], "need_bytes": 22_000_000_000, "have_bytes": 15_000_000_000}
    coming = first | {"name": "coming", "fingerprint": "c" * 64}
    seed, stages = status["nodes"][1], [node["id"] for node in status["nodes"][2:]]
    group = {"host": seed["id"], "stages": stages, "shares": [0.3, 0.3, 0.4]}
    status["models"] += [other, waiting, coming, first | {"name": "loading", "groups": [group]}]
    status["engines"][seed["id"]] = status["engines"][first["groups"][0]["host"]] | {"stage_loaded": [0.25, 1.0]}
    seed["serving"] = []
    status["served"].append("other")
    status["nodes"][1]["fetching"] = {"c" * 64: 0.4}
    body = f"data: {json.dumps(status)}\n\n"
    page.route("**/api/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.reload()
    expect(page.locator("#progress")).to_contain_text("huge: waiting for memory, 7.0 GB of 22.0 GB missing")
    names = [node["name"] for node in status["nodes"]]
    expect(page.locator("#progress")).to_contain_text(
        f"loading is loading on {names[1]} ({names[2]} 25 %, {names[3]} 100 %)"
    )
    expect(page.locator("#progress")).to_contain_text(f"{status['nodes'][1]['name']} is downloading coming: 40 %")
    page.get_by_label("other").check()
    expect(page.locator("#bar li.lit")).to_have_count(1)
    expect(page.locator("#bar li.lit")).to_contain_text("second")
    asked: list[Any] = []

    def answer(route: Route) -> None:
        asked.append(route.request.post_data_json)
        route.fulfill(status=503, body='{"error": {"message": "no host"}}', content_type="application/json")

    page.route("**/v1/chat/completions", answer)
    ask(page, "x")
    expect(page.locator(".turn.error")).to_contain_text("no host")
    assert asked[0]["model"] == "other" and asked[0]["stream"] is True


def test_copies(page: Page, mesh: dict[str, Any]) -> None:
    page.click("button[aria-label='Copy: goose']")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert f"OPENAI_HOST={mesh['nodes']['viewer'].api.base}" in copied and "GOOSE_MODEL=SmolLM2" in copied
    page.click("button[aria-label^='Copy: ~/.pi']")
    assert '"providers"' in page.evaluate("navigator.clipboard.readText()")
    assert page.locator("#invitation li").count() == 0
    page.click("#invite")
    page.click("button[aria-label='Copy: Join from another machine']")
    assert page.evaluate("navigator.clipboard.readText()").startswith("mesh-llm --join ")


def test_by_keyboard_alone(page: Page) -> None:
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the link that skips to the chat
    page.keyboard.type("Say hello.")
    page.keyboard.press("Enter")
    expect(page.locator(".turn.assistant")).to_have_text(re.compile(r"\w{3,}"), timeout=30_000)


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(page: Page, width: int, scheme: Any, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    expect(page.locator("#bar li")).to_have_count(4)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = Path(os.environ.get("MESH_LLM_SCREENSHOTS") or tmp_path)
    page.screenshot(path=str(folder / f"console-{width}-{scheme}.png"), full_page=True)


def test_pages_of_others_may_change_nothing(mesh: dict[str, Any]) -> None:
    async def statuses() -> list[int]:
        found = []
        async with aiohttp.ClientSession() as session:
            for path in ("/api/token", "/api/drop"):
                for headers in (
                    {},
                    {"X-Mesh-LLM-Console": "1", "Origin": "https://evil.example"},
                    {"X-Mesh-LLM-Console": "1", "Host": "evil.example"},
                ):
                    async with session.post(mesh["url"] + path, headers=headers, data=b"{}") as response:
                        found.append(response.status)
            async with session.get(mesh["url"] + "/api/status", headers={"Host": "evil.example"}) as response:
                found.append(response.status)
            async with session.post(
                mesh["url"] + "/api/drop", headers={"X-Mesh-LLM-Console": "1"}, data=b"[]"
            ) as response:
                found.append(response.status)
        return found

    assert run(statuses()) == [403] * 7 + [400]


def test_metrics(mesh: dict[str, Any]) -> None:
    async def read() -> str:
        async with aiohttp.ClientSession() as session, session.get(mesh["url"] + "/metrics") as response:
            return await response.text()

    mesh["nodes"]["viewer"].api.complete("Hi", 2)
    text = run(read())
    assert 'mesh_llm_nodes{state="alive"} 4.0' in text
    assert re.search(r'mesh_llm_peer_received_bytes_total\{peer="[0-9a-f]{16}"\} [1-9]', text)
    assert re.search(r"mesh_llm_request_answer_seconds_count [1-9]", text)


@pytest.mark.timeout(200)
def test_fifty_dashboards_leave_the_node_responsive(mesh: dict[str, Any]) -> None:
    api = mesh["nodes"]["viewer"].api

    def first_token() -> float:
        took = []
        for _ in range(9):
            began = time.monotonic()
            api.complete("Hi", 1)
            took.append(time.monotonic() - began)
        return sorted(took)[4]

    async def watch(session: aiohttp.ClientSession, stop: asyncio.Event) -> int:
        seen = 0
        async with session.get(mesh["url"] + "/api/events") as response:
            async for line in response.content:
                seen += line.startswith(b"data: {")
                if stop.is_set():
                    return seen
        return seen

    async def watched() -> tuple[list[int], float]:
        stop = asyncio.Event()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=100), read_bufsize=1 << 20) as session:
            tasks = [asyncio.create_task(watch(session, stop)) for _ in range(50)]
            until = time.monotonic() + 60
            took = 0.0
            while time.monotonic() < until:
                took = max(took, await asyncio.to_thread(first_token))
                await asyncio.sleep(5)
            stop.set()
            return await asyncio.gather(*tasks), took

    alone = first_token()
    seen, together = run(watched())
    assert min(seen) >= 20  # all are told
    assert together < 5 * alone + 0.2, (alone, together)  # bench/console.py measures


def test_console_options(model: Path) -> None:
    with MeshLlm("--model", str(model), "--console", "0", "--console-host", "0.0.0.0") as node:
        assert node.wait() == 2 and "--api-key KEY is needed" in node.output()
    with MeshLlm("--model", str(model), "--api-key", "k", "--console", str(free_port())) as node:
        base = node.wait_output("the dashboard is at ").split("the dashboard is at ")[1].split()[0]
        api = Api(base)
        assert api.status_of("/api/status")[0] == 401 and api.status_of("/metrics")[0] == 401


def test_a_node_that_is_killed_leaves_the_bar(page: Page, mesh: dict[str, Any]) -> None:
    """The last test: the mesh goes on with two."""
    mesh["nodes"]["second"].kill()
    began = time.monotonic()
    expect(page.locator("#bar li")).to_have_count(3, timeout=15_000)
    expect(page.locator("#bar li", has_text="second")).to_have_count(0)
    assert time.monotonic() - began < 10
    expect(page.locator("#bar li.lit")).to_have_count(2, timeout=60_000)
    ask(page, "Still there?")
    expect(page.locator(".turn.assistant")).to_have_text(re.compile(r"\w{3,}"), timeout=60_000)
