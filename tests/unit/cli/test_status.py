"""The status as people read it."""

from __future__ import annotations

from dataclasses import replace

from support.statuses import full_status

from meshllm.cli.status import describe


def test_every_part_of_the_mesh_has_its_line() -> None:
    assert describe(full_status()) == [
        "mesh cdcdcdcd, UDP port 7, mesh-llm 1.2.3",
        "",
        "small-Q4_0: ready on peer 50%, me 50% (host last)",
        "  me: host",
        "  peer: stage",
        "",
        "big-Q4_0: waiting for more peers: need 10.0 GB, have 3.0 GB",
        "  late: gets the model (25%)",
        "",
        "node  role    state    RTT    memory  sent    received  device",
        "me    worker  alive    -      2.0 GB  0.0 MB  0.0 MB",
        "peer  worker  alive    12 ms  1.0 GB  5.0 MB  7.0 MB    CPU",
        "late  worker  suspect  -      0 MB    0.0 MB  0.0 MB",
        "",
        "engine here: ready",
        "  peer: 4 layers, weights 400 MB from its disk and 0 MB over the network, results pushed 6, relayed 1",
        "  draft ngram, up to 8 tokens drafted per step: 50% accepted, 3.0 tokens verified per step",
    ]


def test_a_lite_client_has_no_engine() -> None:
    status = replace(full_status(), engine=None, models=())
    assert not any("engine here" in line for line in describe(status))
    assert describe(status)[2].startswith("node ")
