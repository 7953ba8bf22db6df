"""Which draft model, if any, speculates for a model."""

from __future__ import annotations

from meshllm.engine import Speculation
from meshllm.models.store import Model, draft_on_disk, resolve

NGRAM = "ngram"


class Drafting:
    """The user's choice. `named`: a model's name or path, NGRAM, or None for the pairing in the catalog.

    `n_max`: tokens guessed at a time, 0 for no guesses. Raises ModelError and GgufError for a draft that cannot be.
    """

    def __init__(self, named: str | None, n_max: int) -> None:
        self._ngram = named == NGRAM
        self._draft = resolve(named) if named and not self._ngram else None
        self._n_max = n_max

    @property
    def size_bytes(self) -> int:
        """Of the draft model that the user named."""
        return self._draft.size_bytes if self._draft else 0

    def for_model(self, model: Model) -> Speculation | None:
        """Looks at the disk."""
        if self._n_max == 0:
            return None
        if self._ngram:
            return Speculation(None, self._n_max)
        draft = self._draft or draft_on_disk(model)
        return Speculation(draft, self._n_max) if draft and draft.files != model.files else None
