"""Which projector belongs to which model."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshllm.models.projectors import best, file_name, projector_beside, projector_of


def beside(folder: Path, model: str, *names: str) -> str | None:
    """Of the model's file and others in that folder."""
    for name in (model, *names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = projector_beside(folder / model, Path(model).stem.partition("-00001-of")[0])
    return str(found.relative_to(folder)) if found else None


@pytest.mark.parametrize(
    ("model", "projector"),
    [  # as unsloth, ggml-org, bartowski, lmstudio-community and mradermacher name them
        ("Qwen3.5-27B-Q4_K_M.gguf", "mmproj-F16.gguf"),
        ("gemma-3-4b-it-Q4_K_M.gguf", "mmproj-model-f16.gguf"),
        ("google_gemma-3-27b-it-Q4_K_M.gguf", "mmproj-google_gemma-3-27b-it-f16.gguf"),
        ("google_gemma-3-27b-it-Q4_K_M.gguf", "mmproj-gemma-3-27b-it-F16.gguf"),
        ("Qwen2.5-VL-7B-Instruct-Q8_0.gguf", "Qwen2.5-VL-7B-Instruct-mmproj-f16.gguf"),
        ("Qwen2.5-VL-7B-Instruct.Q8_0.gguf", "Qwen2.5-VL-7B-Instruct.mmproj-Q8_0.gguf"),
        ("Small-UD-Q4_K_XL.gguf", "mmproj-Small-BF16.gguf"),
    ],
)
def test_names_of_the_publishers(tmp_path: Path, model: str, projector: str) -> None:
    assert beside(tmp_path, model, projector, model.replace("Q4_K_M", "Q8_0")) == projector


def test_in_a_folder_of_several_models_it_must_bear_the_models_name(tmp_path: Path) -> None:
    assert beside(tmp_path, "A-7B-Q4_0.gguf", "B-7B-Q4_0.gguf", "mmproj-F16.gguf", "mmproj-B-7B-F16.gguf") is None
    assert beside(tmp_path, "A-7B-Q4_0.gguf", "mmproj-A-7B.gguf") == "mmproj-A-7B.gguf"
    assert beside(tmp_path, "Fine-A-7B-Q4_0.gguf", "mmproj-Fine-A-7B-F16.gguf") == "mmproj-Fine-A-7B-F16.gguf"
    assert beside(tmp_path, "AA-7B-Q4_0.gguf") is None  # whose name only ends in the same letters


def test_another_models_projector_is_none_of_ours(tmp_path: Path) -> None:
    assert beside(tmp_path, "A-Q4_0.gguf", "mmproj-B-F16.gguf") is None


def test_a_repository_with_a_folder_for_each_quantisation(tmp_path: Path) -> None:
    part = "UD-Q4_K_XL/A-UD-Q4_K_XL-00001-of-00002.gguf"
    assert beside(tmp_path, part, part.replace("00001-of", "00002-of"), "mmproj-BF16.gguf") == "mmproj-BF16.gguf"
    assert beside(tmp_path, "other/A-Q4_0.gguf", "mmproj-A-F16.gguf") is None


def test_f16_before_bf16_before_whatever_there_is() -> None:
    names = ["mmproj-F32.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"]
    assert [best(names), best(names[:2]), best(names[:1]), best([])] == [names[2], names[1], names[0], None]
    assert projector_of("A-Q4_0", names, alone=True) == "mmproj-F16.gguf"


def test_the_name_here_is_plain_and_finds_its_model(tmp_path: Path) -> None:
    assert file_name("Gemma-3-27B-it-Q4_K_M", "F16") == "mmproj-Gemma-3-27B-it-F16.gguf"
    assert file_name("../../etc/x y-Q4_0") == "mmproj-.._.._etc_x_y.gguf"
    for model in ("A-7B-Q4_0", "A-7B.Q4_0", "A"):
        name = file_name(model, "BF16")
        assert beside(tmp_path / model, f"{model}.gguf", name) == name
