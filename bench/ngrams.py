"""Guessing from repetition, without a draft model: llama-server's ways against none, in one run.

    python bench/ngrams.py [--rtt-ms 20,50] [--tokens 160] [--repeat 1]

Runs in netlab (root): the host h1 and two stages, h2 and h3, one thread a process. Each figure is of the first answer
after a start: ngram-mod remembers earlier answers, and would know the second one by heart. "x none" is against the same
prompt without guesses. The ways take turns, prompt by prompt.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from common import device_servers, median, running, table
from support import lab as netlab

CODE = """def read_lines(path):
    with open(path) as file:
        return [line.strip() for line in file]

def count_words(lines):
    counts = {}
    for line in lines:
        for word in line.split():
            counts[word] = counts.get(word, 0) + 1
    return counts

def most_common(counts, n):
    pairs = sorted(counts.items(), key=lambda pair: -pair[1])
    return pairs[:n]
"""
TEXT = (
    "The lighthouse on the northern cape was built in 1874 by masons from the village, who carried every stone up the "
    "path on their backs. Its lamp burned whale oil until 1921, when a generator was brought over the ice by sledge. "
    "The last keeper, a man called Aksel Brandt, stayed for thirty-one winters and wrote down the weather each morning."
)
PROMPTS = {
    "prose": "Write a short story about a lighthouse keeper and a storm.",
    "edit": f"Before:\n```python\n{CODE}```\nAfter renaming `counts` to `totals`:\n```python\ndef read_lines(path):\n",
    "copy": f"{TEXT}\n\nThe same text once more:\n\nThe lighthouse on the northern cape",
}
MOD, SIMPLE = "ngram-mod", "ngram-simple"
WAYS = {
    "none": (),
    f"{SIMPLE} 4, 8": ("--spec-type", SIMPLE, "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "8"),
    f"{SIMPLE} 12, 48": ("--spec-type", SIMPLE),
    f"{MOD} 24, 48 to 64 (--spec-default)": ("--spec-default",),
    f"{MOD} 16, 1 to 16": (
        *("--spec-type", MOD, "--spec-ngram-mod-n-match", "16"),
        *("--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-max", "16"),
    ),
    f"{MOD} 6, 1 to 8": (
        *("--spec-type", MOD, "--spec-ngram-mod-n-match", "6"),
        *("--spec-ngram-mod-n-min", "1", "--spec-ngram-mod-n-max", "8"),
    ),
    "ngram-map-k4v 4, 8": (
        *("--spec-type", "ngram-map-k4v", "--spec-ngram-map-k4v-size-n", "4", "--spec-ngram-map-k4v-size-m", "8"),
    ),
}


def rows(lab: object, rtt_ms: float, args: argparse.Namespace) -> list[Sequence[object]]:
    found: list[Sequence[object]] = []
    with device_servers(lab, "ours") as servers:
        for kind, prompt in PROMPTS.items():
            none = 0.0
            for way, options in WAYS.items():
                answers = []
                for _ in range(args.repeat):
                    with running(lab, "ours", servers, *options) as (api, _):
                        answers.append(api.complete(args.tokens, prompt)["timings"])
                each = median([answer["predicted_per_token_ms"] for answer in answers])
                none = none or each
                guessed, accepted = answers[0].get("draft_n", 0), answers[0].get("draft_n_accepted", 0)
                share = f"{accepted / guessed:.0%}" if guessed else "-"
                found.append((rtt_ms, kind, way, guessed, share, each, none / each))
                table((), found[-1:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rtt-ms", default="20,50")
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--repeat", type=int, default=1)
    args = parser.parse_args()
    table(("RTT ms", "prompt", "guesses by (n, m)", "guessed", "accepted", "ms a token", "x none"), [])
    for rtt_ms in map(float, args.rtt_ms.split(",")):
        with netlab.make_lab(hosts=3, rtt_ms=rtt_ms) as lab:
            rows(lab, rtt_ms, args)


if __name__ == "__main__":
    main()
