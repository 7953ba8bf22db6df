"""mesh-llm: one command pools spare machines so that an LLM runs across all of them."""

from importlib.metadata import version

__version__ = version("mesh-llm")
