"""What the mesh would make of today's models on machines that people have; prints the table of docs/performance.md.

The models are heads written from their published shapes (config.json on the hub) with the types of a Q4_K_M file, or
MXFP4 for gpt-oss; their weights are holes. llama.cpp plans them, so the figures are its own.
usage: .venv/bin/python bench/plans.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from meshllm.engine import find_binaries
from meshllm.engine.memory import measure
from meshllm.models.store import Model, load_model
from meshllm.node.files import model_info
from meshllm.node.outlook import Machine, outlook
from meshllm.node.worker import RESERVE

GB = 10**9
MIN_CTX = 4096
# What Metal lends of 32 and of 128 GiB: two thirds, three quarters from 64 GiB on.
MAC_32, MAC_128 = 22.9, 103.0
HOMES = {
    "two 16 GB GPUs": (16.0, 16.0),
    "32 GB Mac, 24 GB GPU": (MAC_32, 24.0),
    "two 32 GB Macs": (MAC_32, MAC_32),
    "four 24 GB GPUs": (24.0, 24.0, 24.0, 24.0),
    "128 GB Mac, 12 GB laptop": (MAC_128, 12.0),
}


@dataclass(frozen=True)
class Shape:
    """`n_expert` of `d_ff` each, or a dense layer."""

    name: str
    arch: str
    n_layers: int
    d_model: int
    d_ff: int
    n_head: int
    n_kv: int
    d_head: int
    n_vocab: int
    n_ctx: int
    n_expert: int = 0
    window: int = 0


SHAPES = (
    Shape("Qwen3-32B", "qwen3", 64, 5120, 25600, 64, 8, 128, 151936, 40960),
    Shape("Llama-3.3-70B", "llama", 80, 8192, 28672, 64, 8, 128, 128256, 131072),
    Shape("Qwen2.5-72B", "qwen2", 80, 8192, 29568, 64, 8, 128, 152064, 32768),
    Shape("Qwen3-30B-A3B", "qwen3moe", 48, 2048, 768, 32, 4, 128, 151936, 40960, 128),
    Shape("Qwen3-235B-A22B", "qwen3moe", 94, 4096, 1536, 64, 4, 128, 151936, 40960, 128),
    Shape("gpt-oss-120b", "gpt-oss", 36, 2880, 2880, 64, 8, 64, 201088, 131072, 128, 128),
)


_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}


def tensors(s: Shape) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    """Name, elements with the input dimension last, and type."""
    small = Type.Q8_0 if s.arch == "gpt-oss" else Type.Q4_K
    larger = Type.Q8_0 if s.arch == "gpt-oss" else Type.Q6_K
    yield "token_embd.weight", (s.n_vocab, s.d_model), small
    yield "output.weight", (s.n_vocab, s.d_model), larger
    yield "output_norm.weight", (s.d_model,), Type.F32
    for il in range(s.n_layers):
        important = il < s.n_layers // 8 or il >= 7 * s.n_layers // 8 or (il - s.n_layers // 8) % 3 == 2
        for name, shape, kind in layer(s, small, larger, important):
            # as llama.cpp does where a row is no multiple of 256
            kind = _FALLBACK.get(kind, kind) if shape[-1] % 256 else kind
            yield f"blk.{il}.{name}", shape, kind


def layer(s: Shape, small: Type, larger: Type, important: bool) -> Iterator[tuple[str, tuple[int, ...], Type]]:
    q, kv, d = s.n_head * s.d_head, s.n_kv * s.d_head, s.d_model
    rich = larger if important else small  # as llama.cpp's Q4_K_M has it (use_more_bits)
    yield "attn_norm.weight", (d,), Type.F32
    yield "post_attention_norm.weight" if s.arch == "gpt-oss" else "ffn_norm.weight", (d,), Type.F32
    for name, n, kind in (("attn_q", q, small), ("attn_k", kv, small), ("attn_v", kv, rich)):
        yield f"{name}.weight", (n, d), kind
        if s.arch in ("qwen2", "gpt-oss"):
            yield f"{name}.bias", (n,), Type.F32
    yield "attn_output.weight", (d, q), small
    if s.arch.startswith("qwen3"):
        yield "attn_q_norm.weight", (s.d_head,), Type.F32
        yield "attn_k_norm.weight", (s.d_head,), Type.F32
    if not s.n_expert:
        yield "ffn_gate.weight", (s.d_ff, d), small
        yield "ffn_up.weight", (s.d_ff, d), small
        yield "ffn_down.weight", (d, s.d_ff), rich
        return
    yield "ffn_gate_inp.weight", (s.n_expert, d), Type.F32
    expert = Type.MXFP4 if s.arch == "gpt-oss" else small
    yield "ffn_gate_exps.weight", (s.n_expert, s.d_ff, d), expert
    yield "ffn_up_exps.weight", (s.n_expert, s.d_ff, d), expert
    yield "ffn_down_exps.weight", (s.n_expert, d, s.d_ff), expert if s.arch == "gpt-oss" else rich
    if s.arch == "gpt-oss":
        yield "attn_output.bias", (d,), Type.F32
        yield "attn_sinks.weight", (s.n_head,), Type.F32
        yield "ffn_gate_inp.bias", (s.n_expert,), Type.F32
        for name, n in (("gate", s.d_ff), ("up", s.d_ff), ("down", d)):
            yield f"ffn_{name}_exps.bias", (s.n_expert, n), Type.F32


def write(s: Shape, folder: Path) -> Path:
    path = folder / f"{s.name}.gguf"
    writer = gguf.GGUFWriter(path, s.arch)
    writer.add_context_length(s.n_ctx)
    writer.add_block_count(s.n_layers)
    writer.add_embedding_length(s.d_model)
    writer.add_feed_forward_length(s.d_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_kv)
    writer.add_key_length(s.d_head)
    writer.add_value_length(s.d_head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(s.n_vocab)
    writer.add_tokenizer_model("none")
    if s.n_expert:
        writer.add_expert_count(s.n_expert)
        writer.add_expert_used_count(8 if s.arch == "qwen3moe" else 4)
        writer.add_expert_feed_forward_length(s.d_ff)
    if s.window:
        writer.add_sliding_window(s.window)
    total = 0
    for name, shape, kind in tensors(s):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        n_bytes = int(np.prod(shape, dtype=np.int64)) // block * size
        writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, raw_dtype=kind)
        total += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + total)
    return path


def cell(model: Model, memory_gb: tuple[float, ...]) -> str:
    memory = measure(find_binaries(None).measure, ["--model", model.files[0]], model.fingerprint().hex())
    machines = [Machine(f"m{i}", int(gb * GB * (1 - RESERVE)), 1.0) for i, gb in enumerate(memory_gb)]
    found = outlook(model_info(model), memory, model.n_nextn, machines, MIN_CTX)
    if found.fit is None:
        lacks = (found.placement.need_bytes - sum(found.placement.have_bytes)) / GB
        return f"lacks {max(lacks, 0.1):.0f} GB" + (f"; {found.most:,} with --min-ctx" if found.most else "")
    sizes = " + ".join(f"{n / GB:.0f}" for n in reversed(found.fit.sizes_bytes))
    return f"{found.fit.n_ctx:,} ({sizes} GB)"


def main() -> None:
    print(f"| model | weights | {' | '.join(HOMES)} |")
    print(f"| --- | --- |{' --- |' * len(HOMES)}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            model = load_model(write(shape, Path(folder)))
            cells = " | ".join(cell(model, memory) for memory in HOMES.values())
            print(f"| {shape.name} | {model.size_bytes / GB:.1f} GB | {cells} |", flush=True)


if __name__ == "__main__":
    main()
