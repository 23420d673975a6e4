"""What hsgen's backends call of vLLM and SGLang, held against the text of released packages; imports neither.

    pip download --no-deps vllm==0.33.0 sglang==0.5.23
    python -m benchmarks.server_interfaces vllm-*.whl sglang-*.whl

Finds the names that are imported, the parameters of what is overridden or called, and fields of what is read.
"""

from __future__ import annotations

import argparse
import ast
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks import common
from benchmarks.common import Json

ATTENTION = "vllm/v1/attention"
SGLANG = "sglang/srt"
# by file: by name, or Class.name, the parameters it must have, in this order; () of what must only be there
WANTED: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]] = {
    "vllm": {
        f"{ATTENTION}/backends/registry.py": {
            "register_backend": ("backend", "class_path"),
            "AttentionBackendEnum.register": ("cls", "name", "value"),
        },
        "vllm/plugins/__init__.py": {"DEFAULT_PLUGINS_GROUP": ("vllm.general_plugins",)},
        "vllm/config/vllm.py": {
            "get_current_vllm_config": (),
            "VllmConfig.additional_config": (),
        },
        "vllm/model_executor/models/utils.py": {"extract_layer_index": ("layer_name",)},
        f"{ATTENTION}/backend.py": {
            "AttentionCGSupport.NEVER": (),
            "AttentionType.DECODER": (),
            "CommonAttentionMetadata.query_start_loc_cpu": (),
            "CommonAttentionMetadata.seq_lens": (),
            "CommonAttentionMetadata.block_table_tensor": (),
            "CommonAttentionMetadata.max_seq_len": (),
            "CommonAttentionMetadata.num_reqs": (),
            "AttentionBackend.supports_block_size": ("cls", "block_size"),
            "AttentionBackend.supports_kv_connector": ("cls",),
            "AttentionBackend.supports_sink": ("cls",),
            "AttentionBackend.supports_mm_prefix": ("cls",),
            "AttentionBackend.supports_rswa": ("cls",),
            "AttentionBackend.supports_non_causal": ("cls",),
            "AttentionBackend.supports_alibi_sqrt": ("cls",),
            "AttentionBackend.supports_batch_invariance": ("cls",),
            "AttentionBackend.supports_device_cpu_query_lens_mismatch": ("cls",),
        },
        f"{ATTENTION}/backends/triton_attn.py": {
            "TritonAttentionBackend.get_supported_kernel_block_sizes": ("kv_cache_spec",),
            "TritonAttentionBackend.supports_head_size": ("cls", "head_size"),
            "TritonAttentionMetadataBuilder.build": (
                "self",
                "common_prefix_len",
                "common_attn_metadata",
                "fast_build",
            ),
            "TritonAttentionMetadata.num_actual_tokens": (),
            "TritonAttentionMetadata.causal": (),
            "TritonAttentionImpl.forward": (
                "self",
                "layer",
                "query",
                "key",
                "value",
                "kv_cache",
                "attn_metadata",
                "output",
                "output_scale",
                "output_block_scale",
            ),
            **{
                f"TritonAttentionImpl.self.{name}": ()
                for name in (
                    "attn_type",
                    "sliding_window",
                    "alibi_slopes",
                    "logits_soft_cap",
                    "sinks",
                    "kv_sharing_target_layer_name",
                    "num_heads",
                    "head_size",
                    "scale",
                )
            },
        },
    },
    "sglang": {
        f"{SGLANG}/plugins/__init__.py": {"GENERAL_PLUGINS_GROUP": ("sglang.srt.plugins",)},
        f"{SGLANG}/layers/attention/attention_registry.py": {
            "ATTENTION_BACKENDS": (),
            "register_attention_backend": ("name",),
            "create_triton_backend": ("runner",),
        },
        f"{SGLANG}/arg_groups/choices.py": {"add_attention_backend_choices": ()},
        f"{SGLANG}/layers/attention/base_attn_backend.py": {
            "AttentionBackend.init_forward_metadata": ("self", "forward_batch"),
            "AttentionBackend.init_cuda_graph_state": ("self", "max_bs", "max_num_tokens"),
            **{
                f"AttentionBackend.{name}": (
                    "self",
                    "q",
                    "k",
                    "v",
                    "layer",
                    "forward_batch",
                    "save_kv_cache",
                )
                for name in ("forward_decode", "forward_extend")
            },
        },
        f"{SGLANG}/model_executor/forward_batch_info.py": {
            "ForwardMode.is_decode": ("self",),
            "ForwardMode.is_extend_without_speculative": ("self",),
            **{
                f"ForwardBatch.{name}": ()
                for name in (
                    "forward_mode",
                    "batch_size",
                    "req_pool_indices",
                    "seq_lens",
                    "seq_lens_cpu",
                    "extend_seq_lens_cpu",
                )
            },
        },
        f"{SGLANG}/layers/radix_attention.py": {
            f"RadixAttention.self.{name}": ()
            for name in (
                "layer_id",
                "tp_q_head_num",
                "tp_k_head_num",
                "tp_v_head_num",
                "qk_head_dim",
                "v_head_dim",
                "scaling",
                "logit_cap",
                "sliding_window_size",
                "is_cross_attention",
                "attn_type",
            )
        },
        f"{SGLANG}/mem_cache/memory_pool.py": {
            "MHATokenToKVPool.get_kv_buffer": ("self", "layer_id"),
        },
    },
}


def names(tree: ast.Module) -> dict[str, Sequence[str]]:
    """What a file defines at its top and in its classes, with parameters, or the text that it is set to."""
    found: dict[str, Sequence[str]] = {}
    for node in tree.body:
        for name, said in _defined(node):
            found[name] = said
        if isinstance(node, ast.ClassDef):
            found[node.name] = ()
            for inner in node.body:
                for name, said in _defined(inner):
                    found[f"{node.name}.{name}"] = said
            for inner in ast.walk(node):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    found[f"{node.name}.{ast.unparse(inner)}"] = ()
    return found


def _defined(node: ast.stmt) -> Iterator[tuple[str, Sequence[str]]]:
    match node:
        case ast.FunctionDef(name=name, args=args):
            yield name, [each.arg for each in (*args.posonlyargs, *args.args)]
        case ast.Assign(targets=targets, value=value):
            said = [value.value] if isinstance(value, ast.Constant) else []
            yield from ((ast.unparse(target), [str(x) for x in said]) for target in targets)
        case ast.AnnAssign(target=target):
            yield ast.unparse(target), ()
        case ast.ImportFrom(names=aliases):
            yield from ((alias.asname or alias.name, ()) for alias in aliases)
        case _:
            pass


def missing(wheel: Path) -> Iterator[str]:
    """What is not as our backends take it to be."""
    package = wheel.name.split("-")[0]
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
        for path, wanted in WANTED[package].items():
            if path not in inside:
                yield f"{path}: not there"
                continue
            found = names(ast.parse(archive.read(path).decode()))
            for name, said in wanted.items():
                if name not in found:
                    yield f"{path}: no {name}"
                elif said and list(found[name][: len(said)]) != list(said):
                    yield f"{path}: {name} has {list(found[name])}, expected {list(said)}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what was held against what, and what differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_interfaces")
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, help="a file for the result")
    args = parser.parse_args(argv)
    result: Json = {}
    for wheel in args.wheels:
        package, version, *_ = wheel.name.split("-")
        wanted = sum(map(len, WANTED[package].values()))
        differing = list(missing(wheel))
        result[f"{package} {version}"] = {"names": wanted, "differing": differing}
        print(f"{package} {version}: {wanted} names, {len(differing)} not as expected")
        print("".join(f"  {each}\n" for each in differing), end="")
    if args.output:
        common.write_json(args.output, result)
    return int(any(each["differing"] for each in result.values()))


if __name__ == "__main__":
    raise SystemExit(main())
