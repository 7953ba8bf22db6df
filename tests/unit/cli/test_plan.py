"""What `mesh-llm plan` reads and prints."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from support.memories import MB, layer, memory_of
from support.processes import smollm2

from meshllm.cli.main import main
from meshllm.cli.plan import describe
from meshllm.mesh.announcement import ModelInfo
from meshllm.node.outlook import Machine, outlook

MEMORY = memory_of(*[layer(10 * MB, 1000)] * 30)
INFO = ModelInfo("m", "ab" * 32, 300 * MB, 30)


def test_a_plan_is_a_table_and_the_lack_of_one_a_line() -> None:
    machines = [Machine("small", 240 * MB, 3.0), Machine("large", 250 * MB, 3.0)]
    lines = describe(outlook(INFO, MEMORY, 0, machines, 4096), MEMORY)
    assert lines[0].startswith("m, 300 MB, ") and lines[0].endswith(" of its 32,768 tokens of context")
    assert [line.split()[:2] for line in lines[2:]] == [["small", "stage"], ["large", "host"]]
    found = outlook(INFO, MEMORY, 0, [Machine("small", 190 * MB, 3.0), Machine("large", 190 * MB, 3.0)], 4096)
    [line] = describe(found, MEMORY)
    assert "would not be served" in line and line.endswith(f"{found.most:,} would fit: --ctx {found.most}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("x", "does not list nodes"),
        ("[[node]]\nmemory_gb = 3", "does not list nodes"),
        ('[[node]]\nname = "a"\nmemory_gb = 0', "above 0"),
        ('[[node]]\nname = "a"\nmemory_gb = "much"', "does not list nodes"),
        ('[[node]]\nname = "a"\nmemory_gb = 1\n[[node]]\nname = "a"\nmemory_gb = 1', "same name"),
    ],
)
def test_a_file_that_lists_no_machines_is_told(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "nodes.toml"
    path.write_text(content)
    result = CliRunner().invoke(main, ["plan", str(smollm2()), "--nodes", str(path)])
    assert result.exit_code == 2 and reason in result.stderr and "Traceback" not in result.stderr


def test_of_a_real_model(tmp_path: Path) -> None:
    path = tmp_path / "nodes.toml"
    path.write_text('[[node]]\nname = "a"\nmemory_gb = 0.1\n[[node]]\nname = "b"\nmemory_gb = 0.1\n')
    arguments = ["plan", str(smollm2()), "--nodes", str(path)]
    waits = CliRunner().invoke(main, arguments)
    assert waits.exit_code == 1 and "would fit: --ctx " in waits.stdout
    most = waits.stdout.split("--ctx ")[1].strip()
    served = CliRunner().invoke(main, [*arguments, "--ctx", most])
    assert served.exit_code == 0 and " of its 8,192 tokens of context" in served.stdout
    assert CliRunner().invoke(main, [*arguments, "--ctx", str(int(most) + 512)]).exit_code == 1
