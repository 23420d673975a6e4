"""hsgen as an attention backend of vLLM, named by an entry point of the package.

    vllm serve MODEL --attention-backend HSGEN --additional-config '{"hsgen": {"spec": "moba"}}'

`docs/serving.md` says what of this was run, and what was not.
"""

from __future__ import annotations

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

NAME = "HSGEN"


def register() -> None:
    """Make the backend known.  vLLM calls it in each of its processes, in some more than once."""
    if NAME not in AttentionBackendEnum.__members__:
        register_backend(NAME, "hsgen.integrations.vllm_backend.Backend")
