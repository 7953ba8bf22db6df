"""A streamed chat with the first model that the mesh serves: python examples/openai_client.py [QUESTION]

OPENAI_BASE_URL names another endpoint than http://localhost:9337/v1, OPENAI_API_KEY the key if the node has one.
"""

from __future__ import annotations

import os
import sys

from openai import OpenAI

client = OpenAI(
    base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:9337/v1"),
    api_key=os.environ.get("OPENAI_API_KEY", "unused"),  # the package insists on one
)
question = " ".join(sys.argv[1:]) or "Where is the Eiffel Tower?"
models = [model.id for model in client.models.list()]
if not models:
    sys.exit("no model is ready yet; mesh-llm status says why")

stream = client.chat.completions.create(
    model=models[0],
    messages=[{"role": "user", "content": question}],
    stream=True,
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
