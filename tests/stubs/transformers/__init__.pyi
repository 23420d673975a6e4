"""What hsgen uses of transformers.  pyright reads this instead of hundreds of models, a third of its time."""

from collections.abc import Callable
from os import PathLike
from typing import Any

class AutoTokenizer:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> Any: ...

class AutoModelForCausalLM:
    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], **options: Any) -> Any: ...

class AttentionInterface:
    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None: ...

class AttentionMaskInterface:
    @classmethod
    def register(cls, key: str, value: Callable[..., Any]) -> None: ...
