"""A graph that a stage refuses fails the requests in work, in words; the stage and what waits live on."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.damage import DamagingLink
from support.engines import Engine, engine

from meshllm import rpc
from meshllm.engine.counters import LinkState, read_counters

OPTIONS = ("-np", "2", "-b", "64", "-ub", "32")
KEPT, REFUSED = "Rome was not built in a day. " * 8, "The sun is hot, and the moon is not. " * 12


def ask(engine: Engine, slot: int, prompt: str) -> dict[str, Any]:
    answer = engine.api.complete(prompt, 12, id_slot=slot, cache_prompt=True, return_tokens=True)
    return {"tokens": answer["tokens"], "computed": answer["timings"]["prompt_n"]}


@pytest.mark.parametrize("damaged", [0, 1])
def test_only_the_request_in_work_fails(model: Path, tmp_path: Path, damaged: int) -> None:
    with ExitStack() as stack:
        files = [str(model)]
        models = [(rpc.fingerprint(files), files)]
        links = []
        for _ in range(2):
            server = rpc.DeviceServer("127.0.0.1:0", models=models, threads=1)
            stack.callback(server.stop)
            links.append(stack.enter_context(DamagingLink(server.address)))
        split = stack.enter_context(engine(model, tmp_path, OPTIONS, [link.address for link in links], (1, 1, 1)))
        alone = stack.enter_context(engine(model, tmp_path, OPTIONS))
        before = [ask(e, 0, KEPT) for e in (split, alone)]
        links[damaged].damage_next_graph()
        status, answer = split.api.status_of("/completion", {"prompt": REFUSED, "id_slot": 1})
        assert links[damaged].damaged
        assert status == 500 and answer["error"]["message"] == "Compute error."
        after = [[ask(e, 1, REFUSED), ask(e, 0, KEPT + "And so")] for e in (split, alone)]
        assert split.counters is not None
        counters = read_counters(split.counters)
        log = split.process.output()
    assert before[0] == before[1]
    assert after[0] == after[1] and after[0][1]["computed"] < 12
    assert counters.state is LinkState.CONNECTED and sum(stage.refusals for stage in counters.stages) == 1
    assert "names a device that does not exist" in log
