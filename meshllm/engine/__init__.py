"""llama-server: its command line, its life, and what it tells."""

from meshllm.engine.binaries import Binaries, find_binaries
from meshllm.engine.launch import EnginePlan, Speculation, Stage, StageServer, plan_engine
from meshllm.engine.process import LeashedProcess
from meshllm.engine.supervisor import Engine, EngineState

__all__ = [
    "Binaries",
    "Engine",
    "EnginePlan",
    "EngineState",
    "LeashedProcess",
    "Speculation",
    "Stage",
    "StageServer",
    "find_binaries",
    "plan_engine",
]
