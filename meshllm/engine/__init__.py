"""llama-server: its command line, its life, and what it tells."""

from meshllm.engine.binaries import Binaries, find_binaries
from meshllm.engine.plan import EnginePlan, Stage, StageServer, plan_engine
from meshllm.engine.supervisor import Engine, EngineState

__all__ = ["Binaries", "Engine", "EnginePlan", "EngineState", "Stage", "StageServer", "find_binaries", "plan_engine"]
