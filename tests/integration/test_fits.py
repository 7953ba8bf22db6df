"""Whatever the plan says fits loads and answers: random models, devices and contexts with the real engine.

With pytest -s it prints a table of predicted and measured bytes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.engines import Engine, engine, taken
from support.processes import ENGINE

from meshllm import rpc
from meshllm.engine.fit import Fit, as_split, best_fit, need
from meshllm.engine.memory import ModelMemory, measure
from meshllm.models.store import load_model

N_CASES = int(os.environ.get("MESH_LLM_FIT_CASES", "30"))
OPTIONS = (("-np", "1"), ("-np", "2", "-ub", "128"), ("-ctk", "q8_0", "-ctv", "q8_0", "-fa", "on"), ())


@dataclass(frozen=True)
class Case:
    """`caps` in bytes: of each stage and, last, of the host."""

    model: Path
    options: tuple[str, ...]
    caps: tuple[int, ...]
    memory: ModelMemory
    n_nextn: int


def random_case(rng: random.Random, models: list[Path]) -> Case:
    """On devices that hold the least context, or a little less, or more."""
    model, options = rng.choice(models), rng.choice(OPTIONS)
    memory = measure(ENGINE / "mesh-llm-measure", ["--model", str(model), *options], "test")
    n_nextn = load_model(model).n_nextn
    takes = need(memory, memory.least_ctx(512), n_nextn)
    n_stages = rng.randint(1, min(3, len(memory.layers) - n_nextn - 1))
    parts = [rng.uniform(0.2, 1) for _ in range(n_stages + 1)]
    spare = takes.layers_bytes * rng.uniform(0.9, 3.5) / sum(parts)
    caps = [int(takes.stage_bytes + part * spare) for part in parts[:-1]]
    return Case(model, options, (*caps, int(takes.host_bytes + parts[-1] * spare)), memory, n_nextn)


@contextmanager
def running(case: Case, fit: Fit, folder: Path) -> Iterator[Engine]:
    """On stages that lend no more than their caps."""
    with ExitStack() as stack:
        models = [(rpc.fingerprint([str(case.model)]), [str(case.model)])]
        servers = [
            rpc.DeviceServer("127.0.0.1:0", models=models, threads=1, memory_limit_bytes=cap) for cap in case.caps[:-1]
        ]
        for server in servers:
            stack.callback(server.stop)
        options = (*case.options, "-c", str(fit.n_ctx))
        addresses = [server.address for server in servers]
        yield stack.enter_context(engine(case.model, folder, options, addresses, as_split(fit.layers)))


@pytest.mark.timeout(60 + 30 * N_CASES)
def test_what_fits_loads(model: Path, other_model: Path, tiny_models: list[Path], tmp_path: Path) -> None:
    rng = random.Random(17)
    served = 0
    for i in range(N_CASES):
        case = random_case(rng, [model, other_model, *tiny_models])
        fit = best_fit(case.memory, case.caps[:-1], case.caps[-1], 512, case.n_nextn)
        if fit is None:
            assert not need(case.memory, case.memory.least_ctx(512), case.n_nextn).fits(case.caps[:-1], case.caps[-1])
            continue
        served += 1
        folder = tmp_path / str(i)
        folder.mkdir()
        with running(case, fit, folder) as started:
            assert started.api.complete([1, 2, 3], 4)["tokens_predicted"] == 4
            sizes = taken(started)
        for stage, (predicted, cap) in enumerate(zip(fit.sizes_bytes[:-1], case.caps, strict=False)):
            real = sum(sizes[f"STAGE{stage}"].values())
            print(
                f"| {case.model.stem} | {fit.n_ctx} | {fit.layers[stage]} of {sum(fit.layers)} | {predicted} | {real} |"
            )
            assert real <= cap and real <= predicted * 1.05 + (64 << 10)
    assert served > N_CASES // 3
