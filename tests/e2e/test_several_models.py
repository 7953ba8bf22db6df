"""Several models in one mesh: who serves what, where requests go, files from peers, drop, and a shift of load."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.cut import rewrite
from support.processes import Api, MeshLlm, eventually, in_parallel
from support.world import World, world

SMALL, OTHER = "smollm2", "gemma-3-270m"
ENGINE_ARGS = ("--", "-c", "1024", "-t", "1", "-np", "2")


def emit(api: Api, model: str, n: int = 8) -> Any:
    body = {"model": model, "max_tokens": n, "messages": [{"role": "user", "content": "Count to five."}]}
    return api.request("/v1/chat/completions", body | {"temperature": 0})


def folder(world: World, host: str) -> dict[str, str]:
    """A model folder of this host's own."""
    path = world.folder / f"models-{host}"
    path.mkdir(exist_ok=True)
    return {"MESH_LLM_MODELS": str(path)}


def serving(world: World, asked: str) -> dict[str, set[str]]:
    """Model to the hosts that are ready, as `asked` sees it."""
    status = world.status(asked)
    names = {model["fingerprint"]: model["name"].lower() for model in status["models"]}
    found: dict[str, set[str]] = {name: set() for name in names.values()}
    for node in status["nodes"]:
        for entry in node["serving"]:
            if entry["ready"] and node["state"] == "alive" and entry["fingerprint"] in names:
                found[names[entry["fingerprint"]]].add(node["name"])
    return found


def eventually_serving(world: World, asked: str, what: str, **expected: set[str] | int) -> None:
    """`smollm2` and `gemma`: by which hosts, or by how many."""

    def settled() -> bool:
        now = serving(world, asked)
        for short, hosts in expected.items():
            found = next((h for name, h in now.items() if name.startswith(short)), set())
            if (len(found) if isinstance(hosts, int) else found) != hosts:
                return False
        return True

    try:
        eventually(settled, 90)
    except AssertionError:
        raise AssertionError(f"{what}: {serving(world, asked)}") from None


@pytest.fixture(scope="module")
def expected(model: Path, other_model: Path) -> Iterator[dict[str, str]]:
    """What each model says alone."""
    texts = {}
    for name, path in ((SMALL, model), (OTHER, other_model)):
        with MeshLlm("--model", str(path), *ENGINE_ARGS) as node:
            texts[name] = emit(node.ready().api, name)["choices"][0]["message"]["content"]
    yield texts


@pytest.mark.timeout(500)
def test_two_models_on_three_nodes_and_a_fourth(
    model: Path, other_model: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    with world(tmp_path, hosts=5, rtt_ms=2) as mesh:
        models = ("--model", str(model), "--model", str(other_model))
        token = mesh.seed("h1", *models, engine_args=ENGINE_ARGS, env=folder(mesh, "h1"))
        mesh.start("h2", "--join", token, engine_args=ENGINE_ARGS, env=folder(mesh, "h2"))
        eventually_serving(mesh, "h1", "h2 gets what nobody serves", smollm2={"h1"}, gemma={"h2"})
        copied = list(Path(folder(mesh, "h2")["MESH_LLM_MODELS"]).glob("*.gguf"))
        assert [path.read_bytes() == other_model.read_bytes() for path in copied] == [True]
        mesh.start("h3", "--client", "--join", token)
        eventually(lambda: len(serving(mesh, "h3")) == 2)

        apis = [mesh.api(host) for host in ("h1", "h2", "h3")]
        for api in apis:
            listed = [entry["id"].lower() for entry in api.request("/v1/models")["data"]]
            assert [any(name.startswith(m) for name in listed) for m in (SMALL, "gemma")] == [True, True]
            for name in (SMALL, OTHER):
                assert emit(api, name)["choices"][0]["message"]["content"] == expected[name]
            status, error = api.status_of("/v1/chat/completions", {"model": "nothing", "messages": []})
            assert status == 404 and "SmolLM2-135M" in error["error"]["message"]
        asked = [lambda a=api, m=m: emit(a, m) for api in apis for m in (SMALL, OTHER)]
        assert [r["choices"][0]["message"]["content"] for r in in_parallel(asked)] == [
            expected[m] for _ in apis for m in (SMALL, OTHER)
        ]

        mesh.stop("h2", signal.SIGKILL)  # the only server of its model
        mesh.start("h4", "--join", token, engine_args=ENGINE_ARGS, env=folder(mesh, "h4"))
        eventually_serving(mesh, "h1", "h4 takes what is needed", smollm2={"h1"}, gemma={"h4"})
        assert emit(apis[2], OTHER)["choices"][0]["message"]["content"] == expected[OTHER]

        drop_in_the_middle_of_an_answer(mesh, apis)
        eventually_serving(mesh, "h1", "h4 is free", smollm2={"h1", "h4"})
        assert apis[0].status_of("/v1/completions", {"model": OTHER, "prompt": "x"})[0] == 404
        undo = mesh.nodes["h4"].command("drop", "--undo", OTHER)
        assert undo.returncode == 0, undo.stderr
        eventually_serving(mesh, "h1", "it is back", smollm2={"h1"}, gemma={"h4"})

        mesh.start("h5", "--join", token, engine_args=ENGINE_ARGS, env=folder(mesh, "h5"))
        eventually(lambda: sorted(len(h) for h in serving(mesh, "h1").values()) == [1, 2], 90, "h5 serves too")
        shift(mesh, apis)


def drop_in_the_middle_of_an_answer(mesh: World, apis: list[Any]) -> None:
    """Which ends as it should."""

    def answer() -> Any:
        return apis[2].complete("A long story", 300, model=OTHER)

    def drop() -> None:
        eventually(lambda: any(slot["is_processing"] for slot in apis[1].request(f"/slots?model={OTHER}")))
        dropped = mesh.nodes["h3"].command("drop", OTHER)
        assert dropped.returncode == 0 and "is no longer served on any node" in dropped.stdout, dropped.stderr

    apis[1] = mesh.api("h4")
    assert in_parallel([answer, drop])[0]["tokens_predicted"] == 300


def shift(mesh: World, apis: list[Any]) -> None:
    """All want the model of which there is one server: the spare one of the other changes, and nothing is lost."""
    busy = next(name for name, hosts in serving(mesh, "h1").items() if len(hosts) == 1)
    done: list[Any] = []

    def press() -> bool:
        done.extend(in_parallel([lambda: emit(apis[0], busy)] * 3))
        return len(serving(mesh, "h1")[busy]) == 2

    eventually(press, 150, "a second server")
    assert all(r["choices"][0]["message"]["content"] for r in done)
    assert sorted(len(hosts) for hosts in serving(mesh, "h1").values()) == [1, 2]


def has_come(node: MeshLlm, tens: str) -> None:
    """So many percent of the file."""
    eventually(lambda: re.search(rf"from the mesh: {tens}\d%", node.output()), 60, node.output())


@pytest.mark.timeout(300)
def test_a_model_of_several_files_from_two_peers_of_which_one_dies(model: Path, tmp_path: Path) -> None:
    with world(tmp_path, hosts=3, rtt_ms=10, rate_mbit=80) as mesh:
        have = [Path(folder(mesh, host)["MESH_LLM_MODELS"]) for host in ("h1", "h2")]
        parts = rewrite(model, have[0] / "parts-Q4_1.gguf", split_max_tensors=100)
        for path in parts:
            os.link(path, have[1] / path.name)
        token = mesh.seed("h1", "--model", "parts", engine_args=ENGINE_ARGS, env=folder(mesh, "h1"))
        mesh.start("h2", "--join", token, engine_args=ENGINE_ARGS, env=folder(mesh, "h2"))
        eventually_serving(mesh, "h1", "both serve", parts={"h1", "h2"})
        third = mesh.start("h3", "--join", token, engine_args=ENGINE_ARGS, env=folder(mesh, "h3"))
        has_come(third, "[3-6]")
        mesh.stop("h2", signal.SIGKILL)
        third.wait_output("has arrived on this machine", 120)
        got = Path(folder(mesh, "h3")["MESH_LLM_MODELS"])
        assert [p.name for p in sorted(got.glob("*.gguf"))] == [p.name for p in parts] and len(parts) == 3
        assert all((got / p.name).read_bytes() == p.read_bytes() for p in parts)
        assert not list((got / ".partial").iterdir())
        eventually_serving(mesh, "h1", "the third serves", parts={"h1", "h3"})


@pytest.mark.timeout(300)
def test_a_transfer_goes_on_after_the_one_who_gets_it_was_killed(model: Path, tmp_path: Path) -> None:
    with world(tmp_path, hosts=2, rtt_ms=10, rate_mbit=80) as mesh:
        have = Path(folder(mesh, "h1")["MESH_LLM_MODELS"])
        source = rewrite(model, have / "other-Q4_1.gguf", layers=range(20))[0]
        token = mesh.seed("h1", "--model", "other", engine_args=ENGINE_ARGS, env=folder(mesh, "h1"))
        wants = ("--join", token, "--model", "other")
        node = mesh.start("h2", *wants, engine_args=ENGINE_ARGS, env=folder(mesh, "h2"))
        has_come(node, "[4-7]")
        mesh.stop("h2", signal.SIGKILL)
        again = mesh.start("h2", *wants, engine_args=ENGINE_ARGS, env=folder(mesh, "h2"))
        again.wait_output("has arrived on this machine", 120)
        received = [n["bytes_received"] for n in mesh.status("h2")["nodes"] if n["name"] == "h1"]
        assert 0 < received[0] < 0.75 * source.stat().st_size
        got = Path(folder(mesh, "h2")["MESH_LLM_MODELS"]) / source.name
        assert got.read_bytes() == source.read_bytes()
