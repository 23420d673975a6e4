"""The attention backend that `hsgen.integrations.vllm` registers: vLLM's Triton one, whose layers attend by a
spec where they can.

What a spec pools is kept by vLLM's own blocks, so prefix caching, preemption and rejected drafts need no
care.  Dense layers, sliding ones and encoders are Triton's.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from hsgen.errors import HsgenError
from hsgen.integrations.binding import Settings, with_scale
from hsgen.serving import PagedLayer, Rows

BLOCK_SIZES = (16, 32, 64, 128, 256)


class MetadataBuilder(TritonAttentionMetadataBuilder):
    """Triton's, and where the rows of each request begin as the host knows it."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = (
        AttentionCGSupport.NEVER
    )  # sizes follow lengths
    supports_draft_decode_metadata_update = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """As vLLM asks for it, once a step."""
        made = super().build(common_prefix_len, common_attn_metadata, fast_build)
        count = common_attn_metadata.num_reqs
        made.hsgen_rows = Rows(
            starts=common_attn_metadata.query_start_loc_cpu[: count + 1].tolist(),
            lengths=common_attn_metadata.seq_lens[:count],
            block_table=common_attn_metadata.block_table_tensor[:count],
            longest=common_attn_metadata.max_seq_len,
        )
        return made


class Impl(TritonAttentionImpl):
    """One layer."""

    supports_pcp = False
    supports_dcp = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        told = get_current_vllm_config().additional_config
        self._settings = Settings.read(
            told.get("hsgen") if isinstance(told, dict) else None, "additional_config['hsgen']"
        )
        self._own = self.attn_type == AttentionType.DECODER and self.sliding_window == (-1, -1)
        unknown = {
            "alibi_slopes": self.alibi_slopes,
            "logits_soft_cap": self.logits_soft_cap or None,
            "sinks": self.sinks,
            "kv_sharing_target_layer_name": self.kv_sharing_target_layer_name,
        }
        if wrong := [name for name, value in unknown.items() if value is not None and self._own]:
            raise HsgenError(f"HSGEN: no spec is told of {wrong[0]}, which this model has")
        self._layer: PagedLayer | None = None
        self._place: tuple[int, torch.Size] | None = None

    def forward(  # noqa: PLR0917  vLLM's own order
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """o into `output` [tokens, Hq, D]; new keys and values are in their blocks, and are put again."""
        number = extract_layer_index(layer.layer_name)
        own = self._own and number not in self._settings.dense_layers
        if attn_metadata is None or not own:
            return super().forward(
                layer,
                query,
                key,
                value,
                kv_cache,
                attn_metadata,
                output,
                output_scale,
                output_block_scale,
            )
        if output_scale is not None or output_block_scale is not None:
            raise HsgenError("HSGEN: no kernel quantises its output; serve without that fusion")
        if attn_metadata.causal is not True:
            raise HsgenError("HSGEN: expected requests with causality")
        n = attn_metadata.num_actual_tokens
        q, k, v = with_scale(query[:n], self.scale), key[:n], value[:n]
        out = output[:n].view(n, self.num_heads, v.shape[-1])
        self._paged(number, kv_cache).attend(q, k, v, attn_metadata.hsgen_rows, out)
        return output

    def _paged(self, number: int, kv_cache: Tensor) -> PagedLayer:
        """The layer in its blocks [N, Hkv, block, 2 D], a key's numbers before its value's."""
        place = (kv_cache.data_ptr(), kv_cache.shape)
        if self._layer is None or self._place != place:
            k, v = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
            self._layer, self._place = self._settings.layer(number, self.num_heads, k, v), place
        return self._layer


class Backend(TritonAttentionBackend):
    """What vLLM asks of a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """As users type it."""
        return "HSGEN"

    @staticmethod
    def get_impl_cls() -> type[Impl]:
        """Of layers."""
        return Impl

    @staticmethod
    def get_builder_cls() -> type[MetadataBuilder]:
        """Of steps."""
        return MetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """Powers of two."""
        del kv_cache_spec
        return list(BLOCK_SIZES)

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Whether tokens of a block are such."""
        return block_size is None or block_size in BLOCK_SIZES

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """As kernels hold them."""
        return head_size % 16 == 0 and 32 <= head_size <= 256

    @classmethod
    def supports_kv_connector(cls) -> bool:
        """No: blocks from elsewhere come without what is pooled of them."""
        return False

    @classmethod
    def _no(cls, *_: Any) -> bool:
        """What no spec is told of, or no layer here does."""
        return False

    supports_sink = _no
    supports_mm_prefix = _no
    supports_rswa = _no
    supports_non_causal = _no
    supports_alibi_sqrt = _no
    supports_batch_invariance = _no
    supports_device_cpu_query_lens_mismatch = _no
