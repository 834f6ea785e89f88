# The native module takes addresses, sizes and numbers; csrc/bindings/ is its only definition.
from typing import Any

def __getattr__(name: str) -> Any: ...
