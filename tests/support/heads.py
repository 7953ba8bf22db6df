"""Tiny models with what speculates: a NextN head of the model itself, or an EAGLE-3 or DFlash model for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support import archs
from support.cut import written

# What a block adds to the residual stream: with twice as much, the next token follows less from the present one alone,
# which is all that the head reads, and some of what it guesses is wrong.
_ADDED = ("attn_output.weight", "ffn_down.weight", "ffn_down_exps.weight", "ffn_down_shexp.weight", "ssm_out.weight")
_HEAD = 32  # width of an attention head of the drafts


def tiny_models(folder: Path, *names: str) -> list[Path]:
    """NAME-mtp.gguf for each: as of archs.tiny_models, and a NextN layer."""
    return [with_heads(path, path.with_stem(f"{path.stem}-mtp")) for path in archs.tiny_models(folder, *names)]


def with_heads(source: Path, target: Path, n_heads: int = 1, gain: float = 2) -> Path:
    """The model with NextN blocks behind its own: copies of its last block that read the token only."""
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    n_blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    n_embd = int(reader.fields[f"{architecture}.embedding_length"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    changed = {"block_count": n_blocks + n_heads, "nextn_predict_layers": n_heads}
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = changed.get(name.removeprefix(f"{architecture}."), field.contents())
        if value == []:
            continue  # which the writer refuses
        if isinstance(value, list) and len(value) == n_blocks:
            value = [*value, *value[-1:] * n_heads]
        sub_type = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    output_norm = next(tensor.data for tensor in reader.tensors if tensor.name == "output_norm.weight")
    last = f"blk.{n_blocks - 1}."
    for tensor in reader.tensors:
        added = tensor.name.endswith(_ADDED)
        data = tensor.data * np.float32(gain) if added else tensor.data
        writer.add_tensor(tensor.name, data)
        if tensor.name.startswith(last) and not tensor.name.endswith("scale"):  # as in real files, which have none
            for i in range(n_heads):
                writer.add_tensor(f"blk.{n_blocks + i}.{tensor.name.removeprefix(last)}", data)
    for i in range(n_blocks, n_blocks + n_heads):
        reads_token = np.concatenate([np.eye(n_embd), np.zeros((n_embd, n_embd))], axis=1)
        writer.add_tensor(f"blk.{i}.nextn.eh_proj.weight", reads_token.astype(np.float32))
        for norm in ("enorm", "hnorm"):
            writer.add_tensor(f"blk.{i}.nextn.{norm}.weight", np.ones(n_embd, np.float32))
        writer.add_tensor(f"blk.{i}.nextn.shared_head_norm.weight", output_norm)
    return written(writer, target)[0]


def eagle3(model: Path, target: Path, extract: Sequence[int]) -> Path:
    """An EAGLE-3 draft of random weights, fed with the inputs of three of the model's layers."""
    n_embd, writer = _draft(model, target, "eagle3", extract)
    writer.add_uint32("eagle3.target_hidden_size", n_embd)
    return _with_weights(writer, target, n_embd, n_in=2 * n_embd, n_features=3, norms=("attn_norm_2",), outer=())


def dflash(model: Path, target: Path, extract: Sequence[int]) -> Path:
    """A DFlash draft of random weights, which guesses a block of tokens at once."""
    n_embd, writer = _draft(model, target, "dflash", extract)
    writer.add_uint32("dflash.block_size", 8)
    writer.add_mask_token_id(0)
    norms = ("attn_q_norm", "attn_k_norm")
    return _with_weights(writer, target, n_embd, n_embd, len(extract), norms, outer=("enc.output_norm",))


def _draft(model: Path, target: Path, architecture: str, extract: Sequence[int]) -> tuple[int, gguf.GGUFWriter]:
    """The model's width, and a writer that has its vocabulary and the sizes of one layer."""
    reader = gguf.GGUFReader(model)
    n_embd = int(reader.fields[f"{reader.fields['general.architecture'].contents()}.embedding_length"].contents())
    writer = gguf.GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(n_embd)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(_HEAD)
    writer.add_value_length(_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_array(f"{architecture}.target_layers", list(extract))
    return n_embd, writer


def _with_weights(
    writer: gguf.GGUFWriter,
    target: Path,
    n_embd: int,
    n_in: int,
    n_features: int,
    norms: Sequence[str],
    outer: Sequence[str],
) -> Path:
    """One layer, and the projection of the features; embedding and output are the model's own."""
    numbers = np.random.default_rng(1)
    shapes = {
        "fc": (n_embd, n_features * n_embd),
        "blk.0.attn_q": (2 * _HEAD, n_in),
        "blk.0.attn_k": (2 * _HEAD, n_in),
        "blk.0.attn_v": (2 * _HEAD, n_in),
        "blk.0.attn_output": (n_embd, 2 * _HEAD),
        "blk.0.ffn_gate": (128, n_embd),
        "blk.0.ffn_up": (128, n_embd),
        "blk.0.ffn_down": (n_embd, 128),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", numbers.normal(0, 0.1, shape).astype(np.float32))
    for norm in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", *outer, *(f"blk.0.{norm}" for norm in norms)):
        width = _HEAD if norm.endswith(("q_norm", "k_norm")) else n_embd
        writer.add_tensor(f"{norm}.weight", np.ones(width, np.float32))
    return written(writer, target)[0]
