"""Who, if anybody, guesses tokens ahead for a model."""

from __future__ import annotations

from meshllm.engine.speculation import HEAD, NGRAM, WITHOUT_MODEL, Speculation, has_head, with_draft, without_model
from meshllm.models.store import Model, draft_on_disk, resolve

_SHORT = {"mtp": HEAD, "ngram": NGRAM}


class Drafting:
    """The user's choice. `named`: a model's name or path; a way that needs no model, `mtp`, `ngram` or one of
    WITHOUT_MODEL; or None for the model's own head, or else the pairing in the catalog.

    `n_max`: tokens guessed at a time, 0 for no guesses, None for what suits. Raises ModelError and GgufError for a
    draft that cannot be.
    """

    def __init__(self, named: str | None, n_max: int | None) -> None:
        kind = _SHORT.get(named or "", named)
        self._kind = kind if kind in WITHOUT_MODEL else None
        self._draft = resolve(named) if named and not self._kind else None
        self._n_max = n_max

    @property
    def size_bytes(self) -> int:
        """Of the draft model that the user named."""
        return self._draft.size_bytes if self._draft else 0

    def for_model(self, model: Model) -> Speculation | None:
        """Looks at the disk. A model without a head has nothing to guess with where the user wants its head to."""
        if self._n_max == 0:
            return None
        if self._kind:
            able = self._kind != HEAD or has_head(model)
            return without_model(self._kind, self._n_max) if able else None
        if self._draft:
            return with_draft(self._draft, self._n_max) if self._draft.files != model.files else None
        if has_head(model):
            return without_model(HEAD, self._n_max, by_default=True)
        draft = draft_on_disk(model)
        return with_draft(draft, self._n_max, by_default=True) if draft and draft.files != model.files else None
