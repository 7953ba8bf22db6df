"""Who guesses the tokens that the model then verifies in one batch, in the words of llama-server's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshllm.models.store import Model

HEAD = "draft-mtp"  # the model's own NextN blocks
NGRAM = "ngram-simple"  # of those that guess from repetition, the one that saves most (docs/performance.md)
# What needs no second model, by llama-server's names: its option for the tokens at a time, if it has one, and how many.
# With a recurrent state, each token more that a head guesses costs a copy of that state in each slot.
WITHOUT_MODEL: dict[str, tuple[str | None, int]] = {
    HEAD: ("--spec-draft-n-max", 3),
    NGRAM: ("--spec-ngram-simple-size-m", 8),
    "ngram-mod": ("--spec-ngram-mod-n-max", 64),
    "ngram-map-k": ("--spec-ngram-map-k-size-m", 48),
    "ngram-map-k4v": ("--spec-ngram-map-k4v-size-m", 48),
    "ngram-cache": (None, 8),
}
_DRAFT_N_MAX = 8
_MATCHED = 4  # tokens that must repeat before NGRAM guesses what followed them

# Architectures for whose NextN blocks llama.cpp has a graph (DECODER_MTP in src/models); others only carry the tensors,
# and llama-server would end when it is told to use them.
_WITH_HEAD = frozenset(
    [
        *("bailingmoe3", "cohere2moe", "deepseek2", "deepseek32", "deepseek4", "glm-dsa", "glm4moe", "glm5-next"),
        *("hy_v3", "mimo2", "nemotron_h_moe", "qwen35", "qwen35moe", "qwen3next", "step35"),
    ]
)
# Those whose recurrent state llama.cpp cannot roll back in place (llm_arch_supports_rs_rollback): each guess would
# carry the state of all layers from the stages to the host, and back when it was wrong.
_STATE_IS_COPIED = frozenset({"qwen3next"})

# With these the user speaks to llama-server itself, which adds up all the types that it is given.
_OWN = frozenset(
    [
        *("--spec-type", "--spec-default", "--spec-draft-model", "--model-draft", "-md"),
        *("--spec-draft-hf", "--hf-repo-draft", "-hfd", "-hfrd"),
    ]
)


@dataclass(frozen=True)
class Speculation:
    """`kind`: llama-server's --spec-type. `draft`: the model that guesses, on the host, or None. `n_max`: the tokens
    guessed at a time. `by_default`: nobody has asked for it, so the model is served without it where it does not work.
    """

    kind: str
    n_max: int
    draft: Model | None = None
    by_default: bool = False

    @property
    def name(self) -> str:
        return self.draft.name if self.draft else self.kind.removeprefix("draft-")

    def arguments(self, on_cpu: bool) -> list[str]:
        args = ["--spec-type", self.kind]
        option, _ = WITHOUT_MODEL.get(self.kind, WITHOUT_MODEL[HEAD])
        if option:
            args += [option, str(self.n_max)]
        if self.kind == NGRAM:
            args += ["--spec-ngram-simple-size-n", str(_MATCHED)]
        if self.draft:
            args += ["--spec-draft-model", self.draft.files[0]]
        if on_cpu and self.kind.startswith("draft-"):
            args += ["--poll", "0"]  # spinning threads of one context would take the other's cores
        return args


def without_model(kind: str, n_max: int | None = None, by_default: bool = False) -> Speculation:
    """`kind`: one of WITHOUT_MODEL."""
    return Speculation(kind, n_max or WITHOUT_MODEL[kind][1], by_default=by_default)


def with_draft(draft: Model, n_max: int | None = None, by_default: bool = False) -> Speculation:
    """By what is in the draft's file: a language model, or one of the kinds that are fed with the model's states."""
    return Speculation(_kind(draft), n_max or _DRAFT_N_MAX, draft, by_default)


def _kind(draft: Model) -> str:
    names = {tensor.name for tensor in draft.info.tensors}
    if draft.architecture == "eagle3":
        return "draft-eagle3"
    if draft.architecture == "dflash":
        return "draft-dspark" if "markov_w1.weight" in names else "draft-dflash"
    is_head = draft.n_nextn > 0 and "blk.0.attn_norm.weight" not in names  # NextN blocks in a file of their own
    return HEAD if is_head or draft.architecture == "gemma4-assistant" else "draft-simple"


def has_head(model: Model) -> bool:
    """Whether llama-server can guess with NextN blocks that are in the model's file."""
    tensor = f"blk.{model.n_trunk}.nextn.eh_proj.weight"
    return model.architecture in _WITH_HEAD and any(t.name == tensor for t in model.info.tensors)


def suits_stages(model: Model) -> bool:
    """Whether a wrong guess costs no more than its tokens when the model is split."""
    return model.architecture not in _STATE_IS_COPIED


def chosen_by_user(extra_args: Sequence[str]) -> bool:
    """Whether llama-server's own options among the user's say who guesses."""
    return any(arg.partition("=")[0] in _OWN for arg in extra_args)
