"""The endpoint that clients talk to."""

from meshllm.api.access import Access
from meshllm.api.proxy import make_app, make_inner_app
from meshllm.api.routing import Ask, UnknownModelError
from meshllm.api.target import Place, Served, Target

__all__ = ["Access", "Ask", "Place", "Served", "Target", "UnknownModelError", "make_app", "make_inner_app"]
