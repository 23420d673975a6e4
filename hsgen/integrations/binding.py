"""A spec as a library's settings name it, for the heads that a layer of a model has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hsgen import spec as language
from hsgen import standins
from hsgen.errors import ArgumentError, HsgenError
from hsgen.runtime import Kernel, load_kernel
from hsgen.serving import PagedLayer
from hsgen.spec import Spec

KEYS = ("spec", "dense_layers", "interpret")


def with_scale(query: Tensor, scale: float | None) -> Tensor:
    """Queries [..., D] that a kernel's own scale, D^-0.5, turns into logits of a layer's scale."""
    natural = query.shape[-1] ** -0.5
    return query if scale is None or scale == natural else query * (scale / natural)


def kernel_of(
    spec: Spec, layer: int, *, query: int, kv: int, dims: tuple[int, int], **options: Any
) -> Kernel:
    """The kernel of one layer.  Heads and head dims are the model's; an index stays as the spec has it.

    Raises:
        HsgenError: layers would have to hand selections to each other, or a branch has a scale of its
            own: a model's layers have theirs.
    """
    scaled = [branch.name for branch in spec.attend if branch.scale is not None]
    if scaled:
        raise HsgenError(
            f"spec {spec.name}: branch {', '.join(scaled)} has a scale of its own, as a model's layer has",
            help="leave `scale` out: the layer's is used",
        )
    bound = standins.bind(spec, query=query, kv=kv, dim=dims)
    bound = language.verify(bound.model_copy(update={"index": spec.index}))
    made = load_kernel(bound, layer=layer, **options)
    if made.spec.reuse:
        raise HsgenError(
            f"spec {made.spec.name}: layers of a model hand no selection to each other"
        )
    return made


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a server is told, as `{"spec": "moba", "dense_layers": [0, 1]}`.

    Attributes:
        spec: What layers attend by.
        dense_layers: Those that do not.
        interpret: As of load_kernel, for tests.
    """

    spec: Spec
    dense_layers: frozenset[int]
    interpret: bool = False

    @classmethod
    def read(cls, told: object, where: str) -> Settings:
        """Of a server's own settings.

        Raises:
            ArgumentError: something else than these keys, or no spec.
        """
        example = '{"spec": "moba", "dense_layers": [0, 1]}'
        if not isinstance(told, Mapping) or "spec" not in told:
            raise ArgumentError(
                f"{where}: expected what layers attend by, as {example}, got {told!r}"
            )
        if unknown := [key for key in told if key not in KEYS]:
            raise ArgumentError(f"{where}: expected {example}, got {unknown[0]!r} beside it")
        return cls(
            spec=language.load(told["spec"]),
            dense_layers=frozenset(told.get("dense_layers", ())),
            interpret=bool(told.get("interpret", False)),
        )

    def layer(self, number: int, query_heads: int, k_pages: Tensor, v_pages: Tensor) -> PagedLayer:
        """One layer on the pages [N, page, Hkv, D] of a server."""
        kernel = kernel_of(
            self.spec,
            number,
            query=query_heads,
            kv=k_pages.shape[2],
            dims=(k_pages.shape[3], v_pages.shape[3]),
            interpret=self.interpret,
        )
        return PagedLayer(kernel, k_pages, v_pages)
