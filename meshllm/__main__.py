"""`python -m meshllm` is `mesh-llm`."""

from meshllm.cli.main import main

main(prog_name="mesh-llm")
