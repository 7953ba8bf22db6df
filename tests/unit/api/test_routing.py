"""Which server gets a request: names, load, and where a conversation is cached."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshllm.api.routing import (
    Affinity,
    Candidate,
    Load,
    RequestInfo,
    check_capability,
    find_model,
    needed_for,
    read_request_info,
)
from meshllm.errors import NotJsonError, UnknownModelError, WrongModelError
from meshllm.mesh.announcement import Capability

SERVED = [("Qwen2.5-32B-Instruct-Q4_K_M", "a"), ("SmolLM2-135M-Instruct.Q4_1", "b")]


def chat(*texts: str, **fields: object) -> bytes:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]
    return json.dumps({"messages": messages, **fields}).encode()


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("32b", "a"),
        ("qwen2.5-32b-instruct", "a"),
        ("Qwen/Qwen2.5-32B-Instruct-GGUF:Q4_K_M", "a"),
        ("SMOLLM2-135M-INSTRUCT.q4_1", "b"),
        ("smollm2", "b"),
    ],
)
def test_names_as_users_write_them(wanted: str, found: str) -> None:
    assert find_model(wanted, SERVED, []) == found


def test_an_unknown_name_is_told_what_is_served() -> None:
    with pytest.raises(UnknownModelError, match=r"'gpt-4' is not served here; served: Qwen2\.5-32B.*, SmolLM2"):
        find_model("gpt-4", SERVED, [])
    assert find_model("later", SERVED, [("later-Q8_0", "c")]) == "c"


def test_the_model_of_a_request() -> None:
    assert read_request_info(chat("hi", model="x")).model == "x"
    assert read_request_info(chat("hi"), "from-the-query").model == "from-the-query"
    assert (
        read_request_info(b"")
        == read_request_info(b"--boundary")
        == read_request_info(b"[1]")
        == read_request_info(b"{broken")
        == RequestInfo()
    )
    assert read_request_info(b'{"model": 5, "messages": 7}') == RequestInfo()


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("/v1/chat/completions", Capability.COMPLETION),
        ("/completion", Capability.COMPLETION),
        ("/v1/messages", Capability.COMPLETION),
        ("/v1/embeddings", Capability.EMBEDDING),
        ("/embedding", Capability.EMBEDDING),
        ("/v1/rerank", Capability.RERANK),
        ("/reranking", Capability.RERANK),
        ("/tokenize", None),
        ("/v1/messages/count_tokens", None),
        ("/", None),
    ],
)
def test_what_a_path_asks_of_a_model(path: str, needs: Capability | None) -> None:
    assert needed_for(path) is needs


def test_a_model_that_completes_no_text() -> None:
    for capability, where in ((Capability.EMBEDDING, "/v1/embeddings"), (Capability.RERANK, "/v1/rerank")):
        with pytest.raises(WrongModelError, match=f"at {where}; it does not complete text"):
            check_capability(capability, RequestInfo(needs=Capability.COMPLETION))
        for needs in (None, Capability.EMBEDDING, Capability.RERANK):
            check_capability(capability, RequestInfo(needs=needs))
    for needs in Capability:
        check_capability(Capability.COMPLETION, RequestInfo(needs=needs))


def test_a_body_that_says_it_is_json() -> None:
    assert read_request_info(b"[1]", must_be_json=True) == RequestInfo()
    for body in (b"{", b"[" * 5000, b"\xff", b'{"a": NaN}'):
        with pytest.raises(NotJsonError, match="the body is not JSON"):
            read_request_info(body, must_be_json=True)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: f'{{"model":{t}}}'.encode()))
def test_any_body_is_read(body: bytes) -> None:
    read_request_info(body)


def test_a_conversation_goes_back_to_its_server() -> None:
    affinity = Affinity()
    idle = [Candidate("near", 0, 0.001), Candidate("far", 0, 0.05)]
    first = read_request_info(chat("word " * 300))
    assert affinity.choose(idle, first).node_id == "near"
    affinity.remember(first, "far")
    longer = read_request_info(chat("word " * 300, "yes", "and then?"))
    assert affinity.choose(idle, longer).node_id == "far"
    assert affinity.choose(idle, read_request_info(chat("other " * 300))).node_id == "near"
    assert affinity.choose([Candidate("near", 0, 0.1), Candidate("far", 3, 0.1)], longer).node_id == "near"
    assert affinity.choose([Candidate("near", 0, 0.1)], longer).node_id == "near"  # the other is gone
    tools = read_request_info(chat("word " * 300, "yes", tools=[{"name": "f"}]))
    assert affinity.choose(idle, tools).node_id == "near"  # another beginning


def test_the_least_loaded_then_the_nearest() -> None:
    chosen = Affinity().choose(
        [Candidate("a", 2, 0.0), Candidate("b", 1, 0.08), Candidate("c", 1, 0.02)], RequestInfo()
    )
    assert chosen.node_id == "c"


def test_a_load_counts_what_goes_through_here_and_what_others_bring() -> None:
    now = [0.0]
    ended: list[int] = []
    load = Load(lambda: now[0], lambda: ended.append(1))
    with load:
        with load:
            assert load.total == 2
            load.report(5)
            assert load.total == 5
        assert load.total == 4 and not ended
        load.fail()
        assert load.total > 100 and load.through_here == 1
        now[0] = 60.0
        assert load.total == 1
    assert load.total == 0 and ended
