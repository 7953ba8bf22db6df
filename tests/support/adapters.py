"""What goes with a model, tiny and random: a projector of images, a LoRA, a control vector."""

from __future__ import annotations

import base64
import struct
import zlib
from pathlib import Path

import gguf
import numpy as np

from support.cut import written

_WIDTH = 32  # of the projector's own embedding
_PATCH, _SIDE = 8, 32  # pixels: 16 patches, each a token
_LAYERS = 2  # of which LLaVA's graph computes all but the last


def projector(target: Path, n_embd: int, kind: str = "mlp", seed: int = 1) -> Path:
    """A vision projector for a model of that width: LLaVA's "mlp", or "gemma3". Its keys: tools/mtmd/clip.cpp."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(target, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", kind)
    writer.add_bool("clip.use_gelu", True)
    sizes = {
        "embedding_length": _WIDTH,
        "feed_forward_length": 2 * _WIDTH,
        "block_count": _LAYERS,
        "projection_dim": n_embd,
        "attention.head_count": 2,
        "image_size": _SIDE,
        "patch_size": _PATCH,
    }
    for key, value in sizes.items():
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.5, 0.5, 0.5])
    writer.add_array("clip.vision.image_std", [0.5, 0.5, 0.5])

    def add(name: str, *shape: int, scale: float = 0.2) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * scale).astype(np.float32))

    add("v.patch_embd.weight", _WIDTH, 3, _PATCH, _PATCH)
    add("v.position_embd.weight", (_SIDE // _PATCH) ** 2, _WIDTH)
    for i in range(_LAYERS):
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            add(f"v.blk.{i}.{part}.weight", _WIDTH, _WIDTH)
        add(f"v.blk.{i}.ffn_up.weight", 2 * _WIDTH, _WIDTH)
        add(f"v.blk.{i}.ffn_down.weight", _WIDTH, 2 * _WIDTH)
        for norm in ("ln1", "ln2"):
            add(f"v.blk.{i}.{norm}.weight", _WIDTH)
            add(f"v.blk.{i}.{norm}.bias", _WIDTH)
    if kind == "gemma3":
        writer.add_uint32("clip.vision.projector.scale_factor", 2)  # 2 x 2 patches a token
        add("mm.soft_emb_norm.weight", _WIDTH)
        add("mm.input_projection.weight", _WIDTH, n_embd)
        return written(writer, target)[0]
    add("mm.0.weight", n_embd, _WIDTH)
    add("mm.0.bias", n_embd)
    add("mm.2.weight", n_embd, n_embd, scale=0.02)
    add("mm.2.bias", n_embd, scale=0.02)
    return written(writer, target)[0]


def lora(target: Path, model: Path, rank: int = 4, seed: int = 1) -> Path:
    """For the queries, the output of attention and the feed-forward network of every layer."""
    random = np.random.default_rng(seed)
    reader = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(target, str(reader.fields["general.architecture"].contents()))
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(rank))
    for tensor in reader.tensors:
        if tensor.name.endswith(("attn_q.weight", "attn_output.weight", "ffn_down.weight")):
            n_in, n_out = (int(n) for n in tensor.shape)
            a = random.standard_normal((rank, n_in)) * n_in**-0.5
            b = random.standard_normal((n_out, rank)) * 0.3
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float32))
    return written(writer, target)[0]


def control_vector(target: Path, n_embd: int, n_layers: int, seed: int = 1) -> Path:
    """A direction for every layer but the first, which has none."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(target, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", n_layers - 1)
    for i in range(1, n_layers):
        writer.add_tensor(f"direction.{i}", (random.standard_normal(n_embd) * 0.5).astype(np.float32))
    return written(writer, target)[0]


def picture(red: int, green: int, blue: int) -> str:
    """The data: URL of a PNG of 8 x 8 pixels, of that colour at its left and black at its right."""
    row = b"\0" + bytes([red, green, blue] * 4 + [0, 0, 0] * 4)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 8)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()
