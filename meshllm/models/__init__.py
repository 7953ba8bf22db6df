"""What `--model` means: a file, a name of something on disk, or the default model."""

from meshllm.models.resolve import DEFAULT_MODEL, Model, find_models, load_model, models_folder, offered_models, resolve

__all__ = ["DEFAULT_MODEL", "Model", "find_models", "load_model", "models_folder", "offered_models", "resolve"]
