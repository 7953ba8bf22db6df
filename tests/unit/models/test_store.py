"""What `--model` means."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import adapters
from support.processes import smollm2

from meshllm.errors import GgufError, ModelError
from meshllm.models.folders import find_models
from meshllm.models.store import Store, load_model, resolve

DEFAULT_MODEL = "SmolLM2-135M-Instruct.Q4_1"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / ".hub"))
    return tmp_path


def test_default_model_when_nothing_is_on_disk() -> None:
    model = resolve(None)
    assert model.name == DEFAULT_MODEL and model.n_layers == 30 and model.architecture == "llama"


def test_the_only_model_on_disk_is_taken(folder: Path) -> None:
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    assert resolve(None).name == "Other-Q8_0"
    assert resolve("other").files == (str(folder / "Other-Q8_0.gguf"),)
    assert set(find_models()) == {"Other-Q8_0", DEFAULT_MODEL}


def test_several_models_need_a_name(folder: Path) -> None:
    for name in ("A-Q4_0", "A-Q8_0"):
        os.symlink(smollm2(), folder / f"{name}.gguf")
    with pytest.raises(ModelError, match="choose one with --model"):
        resolve(None)
    with pytest.raises(ModelError, match="matches several models: A-Q4_0, A-Q8_0"):
        resolve("a")
    assert resolve("a-q8_0").name == "A-Q8_0"


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"did you mean smollm2\?"):
        resolve("smolm2")
    with pytest.raises(GgufError, match="cannot open"):
        resolve("/nowhere/model.gguf")


def test_a_projector_belongs_to_the_model_beside_it(folder: Path) -> None:
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    projector = adapters.projector(folder / "mmproj-Other-F16.gguf", 576)
    model = resolve("other")
    assert model.projector and model.projector.file == str(projector)
    assert model.projector.size_bytes == projector.stat().st_size
    assert model.fingerprint() == load_model(smollm2()).fingerprint()  # a stage computes the same without it
    assert set(find_models()) == {"Other-Q8_0", DEFAULT_MODEL}
    with pytest.raises(GgufError, match="only the projector of a model; name the model"):
        resolve(str(projector))


@pytest.mark.parametrize(
    ("content", "line"), [(b"GGUF", "the projector is ignored: "), (None, "is not a projector, whatever its name says")]
)
def test_a_broken_projector_is_left_out(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | None, line: str
) -> None:
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    (folder / "mmproj-F16.gguf").write_bytes(content or smollm2().read_bytes())
    assert resolve("other").projector is None
    assert line in caplog.text


def test_the_store_notices_a_projector_and_shares_it(folder: Path) -> None:
    lines: list[str] = []
    store = Store(lines.append)
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    fingerprint = load_model(smollm2()).fingerprint().hex()
    assert store.scan() and not store.scan() and set(store.shared) == {fingerprint}
    path = adapters.projector(folder / "mmproj-F16.gguf", 576)
    assert store.scan() and not store.scan()
    projector = store.models[fingerprint].projector
    assert projector and store.shared[projector.fingerprint].files == (str(path),)
    path.unlink()
    assert store.scan() and store.models[fingerprint].projector is None and not lines


def test_a_store_without_projectors(folder: Path) -> None:
    os.symlink(smollm2(), folder / "Other-Q8_0.gguf")
    adapters.projector(folder / "mmproj-F16.gguf", 576)
    store = Store(print, projectors=False)
    store.add(resolve("other"))
    store.scan()
    assert [model.projector for model in store.models.values()] == [None]
