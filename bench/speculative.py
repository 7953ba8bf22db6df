"""Guessing ahead over a split model: tokens a second with a draft model, with n-grams and with neither, in one run.

    python bench/speculative.py [--rtt-ms 0,20,50] [--tokens 128] [--repeat 3] [--draft-max 4]

Runs in netlab (root): the host h1 and two stages, h2 and h3, one thread a process. The draft is the model itself but
for two of its 30 layers: it costs nearly what the model costs, where a real one costs a tenth or less, so this shows
what is saved of the network's round trips, not what a GPU would gain. "x none" is against the same prompt without.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from common import MODEL, LabApi, device_servers, median, running, table
from support import lab as netlab
from support.cut import rewrite

PROMPTS = {
    "prose": "Write a short story about a lighthouse keeper and a storm.",
    "code": "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\ndef mul(a, b):\n",
}
LEFT_OUT = (25, 26)


def measure(api: LabApi, prompt: str, n_tokens: int, repeat: int) -> tuple[float, int, int]:
    """Milliseconds a token; tokens guessed and accepted."""
    answers = [api.complete(n_tokens, prompt)["timings"] for _ in range(repeat)]
    first = answers[0]
    each = median([a["predicted_per_token_ms"] for a in answers])
    return each, first.get("draft_n", 0), first.get("draft_n_accepted", 0)


def rows(lab: object, rtt_ms: float, draft: Path, args: argparse.Namespace) -> list[Sequence[object]]:
    found: list[Sequence[object]] = []
    none: dict[str, float] = {}
    ways = {"none": ("--no-draft",), "ngram": ("--draft", "ngram"), "draft": ("--draft", str(draft))}
    with device_servers(lab, "ours") as servers:
        for way, options in ways.items():
            limit = () if way == "none" else ("--draft-max", str(args.draft_max))
            with running(lab, "ours", servers, options=(*options, *limit)) as (api, _):
                for kind, prompt in PROMPTS.items():
                    each, guessed, accepted = measure(api, prompt, args.tokens, args.repeat)
                    none.setdefault(kind, each)
                    share = f"{accepted / guessed:.0%}" if guessed else "-"
                    steps = args.tokens - accepted
                    found.append((rtt_ms, kind, way, share, args.tokens / steps, each, none[kind] / each))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="0,20,50")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--draft-max", type=int, default=4)
    args = parser.parse_args()
    table(("RTT ms", "prompt", "guesses", "accepted", "tokens a step", "ms a token", "x none"), [])
    with tempfile.TemporaryDirectory() as folder:
        layers = [i for i in range(30) if i not in LEFT_OUT]
        draft = rewrite(MODEL, Path(folder) / "draft-Q4_1.gguf", layers)[0]
        for rtt_ms in map(float, args.rtt_ms.split(",")):
            with netlab.make_lab(hosts=3, rtt_ms=rtt_ms) as lab:
                for row in rows(lab, rtt_ms, draft, args):
                    table((), [row])


if __name__ == "__main__":
    main()
