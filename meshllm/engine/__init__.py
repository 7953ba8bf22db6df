"""llama-server: its command line, its life, and what it tells."""

from meshllm.engine.binaries import Binaries, find_binaries
from meshllm.engine.launch import LaunchSpec, Stage, StageAddress, StageServer, make_launch_spec
from meshllm.engine.process import LeashedProcess
from meshllm.engine.speculation import Speculation
from meshllm.engine.supervisor import Engine, EngineState

__all__ = [
    "Binaries",
    "Engine",
    "EngineState",
    "LaunchSpec",
    "LeashedProcess",
    "Speculation",
    "Stage",
    "StageAddress",
    "StageServer",
    "find_binaries",
    "make_launch_spec",
]
