"""The dashboard: one page, live, from any node."""

from meshllm.console.app import make_console

__all__ = ["make_console"]
