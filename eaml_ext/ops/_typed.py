"""Names of torch that lack types, with types, so that decorated functions keep theirs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from eaml_ext._torch_compat import run_frame_eagerly

T = TypeVar("T", bound=Callable[..., Any])

if TYPE_CHECKING:

    class Function(torch.autograd.Function):
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any: ...

    def allow_in_graph(function: T) -> T: ...

    def register_fake(name: str) -> Callable[[T], T]: ...
else:
    Function = torch.autograd.Function

    def allow_in_graph(function):
        run_frame_eagerly(function)
        return torch.compiler.allow_in_graph(function)

    register_fake = torch.library.register_fake
