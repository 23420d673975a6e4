"""hsgen as an attention backend of SGLang, named by an entry point of the package.

    python -m sglang.launch_server --model-path MODEL --attention-backend hsgen --page-size 64 \\
        --disable-cuda-graph --json-model-override-args '{"hsgen": {"spec": "moba"}}'

`docs/serving.md` says what of this was run, and what was not.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.attention_registry import (
    ATTENTION_BACKENDS,
    register_attention_backend,
)
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.server_args import add_attention_backend_choices
from torch import Tensor

from hsgen.errors import ArgumentError, HsgenError
from hsgen.integrations.binding import Settings, with_scale
from hsgen.serving import PagedLayer, Rows

NAME = "hsgen"
LEAST_PAGE = 16  # tokens; a table of smaller ones is longer than what it saves


class Backend(AttentionBackend):
    """All layers of a model: those that are dense, or slide, are SGLang's Triton backend's."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        told = getattr(runner.model_config.hf_config, NAME, None)
        self.settings = Settings.read(told, "json-model-override-args['hsgen']")
        self.page = runner.page_size
        if self.page < LEAST_PAGE or self.page & (self.page - 1):
            raise ArgumentError(
                f"page-size: expected a power of two from {LEAST_PAGE} on, got {self.page}"
            )
        self.req_to_token = runner.req_to_token_pool.req_to_token
        self.pool = runner.token_to_kv_pool
        self.others = ATTENTION_BACKENDS["triton"](runner)
        self.forward_metadata: Rows | None = None
        self._layers: dict[int, PagedLayer] = {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Where the rows of each request lie, once a step."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            counts = [1] * forward_batch.batch_size
        elif mode.is_extend_without_speculative():
            counts = list(forward_batch.extend_seq_lens_cpu)
        else:
            raise HsgenError(f"hsgen: expected decode, extend or mixed batches, got {mode.name}")
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        longest = int(forward_batch.seq_lens_cpu.max())
        slots = self.req_to_token[forward_batch.req_pool_indices, : longest : self.page]
        self.forward_metadata = Rows(
            starts=starts,
            lengths=forward_batch.seq_lens.to(torch.int32),
            block_table=(slots // self.page).to(torch.int32),
            longest=longest,
        )
        self.others.init_forward_metadata(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """None: sizes of a step follow lengths."""
        del max_bs, max_num_tokens
        raise HsgenError("hsgen: no step is captured in a CUDA graph; --disable-cuda-graph")

    def forward_decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> Tensor:
        """[tokens, Hq * D] -> [tokens, Hq * Dv]"""
        if self._dense(layer):
            return self.others.forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **others
            )
        return self._attend(q, k, v, layer, save_kv_cache, others)

    def forward_extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **others: Any,
    ) -> Tensor:
        """The same of chunks of prefill, and of mixed batches."""
        if self._dense(layer):
            return self.others.forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache=save_kv_cache, **others
            )
        return self._attend(q, k, v, layer, save_kv_cache, others)

    def _dense(self, layer: Any) -> bool:
        return layer.layer_id in self.settings.dense_layers or layer.sliding_window_size > -1

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, layer: Any, save: bool, others: dict[str, Any]
    ) -> Tensor:
        where = f"hsgen, layer {layer.layer_id}"
        if layer.logit_cap or layer.is_cross_attention or layer.attn_type.value != "decoder":
            raise HsgenError(f"{where}: expected attention of a decoder without a cap of logits")
        if wrong := [name for name, value in others.items() if value is not None]:
            raise HsgenError(f"{where}: no spec is told of {wrong[0]}, which this model has")
        if k is None or not save:
            raise HsgenError(f"{where}: expected new keys and values, got those of another layer")
        assert self.forward_metadata is not None, "init_forward_metadata comes first"
        heads, dims = layer.tp_q_head_num, (layer.qk_head_dim, layer.v_head_dim)
        q = q.view(-1, heads, dims[0])
        o = self._paged(layer).attend(
            with_scale(q, layer.scaling),
            k.view(-1, layer.tp_k_head_num, dims[0]),
            v.view(-1, layer.tp_v_head_num, dims[1]),
            self.forward_metadata,
        )
        return o.flatten(1)

    def _paged(self, layer: Any) -> PagedLayer:
        """A layer whose slots [slots, Hkv, D] are seen as pages."""
        number = layer.layer_id
        if number not in self._layers:
            whole = self.pool.get_kv_buffer(number)
            slots = len(whole[0]) // self.page * self.page
            k, v = (x[:slots].unflatten(0, (-1, self.page)) for x in whole)
            self._layers[number] = self.settings.layer(number, layer.tp_q_head_num, k, v)
        return self._layers[number]


def register() -> None:
    """Make the backend known; SGLang calls it in each of its processes."""
    if NAME not in ATTENTION_BACKENDS:
        register_attention_backend(NAME)(Backend)
        add_attention_backend_choices([NAME])
