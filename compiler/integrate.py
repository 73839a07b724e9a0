"""`rolemesh.integrate`: register the composite ops with a library of models, in one call.

A model then picks them by name, and none of its code changes::

    rolemesh.integrate("transformers")
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="rolemesh")

Invariants:

* The library is imported by the call, never by importing this module.
* A second call changes nothing.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType

from rolemesh.compiler.integrations.attention import attention, mask_function
from rolemesh.compiler.integrations.experts import experts_function
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.composite.define import define_composite_ops

__all__ = ["IMPLEMENTATION", "integrate"]

IMPLEMENTATION = "rolemesh"
"""What the implementations are called in a model's configuration."""


def integrate(library: str) -> None:
    """Let models of a library use rolemesh's composite ops.

    Args:
        library: `transformers`: registers the attention implementation "rolemesh", with its masks,
            and the experts implementation "rolemesh".

    Raises:
        RolemeshError: RM037 for an unknown library, or one that is missing or too old.

    Example:
        >>> rolemesh.integrate("transformers")
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="rolemesh")
    """
    register = _LIBRARIES.get(library)
    if register is None:
        close = difflib.get_close_matches(library, _LIBRARIES, n=1)
        raise RolemeshError(
            "RM037",
            what=f"there are no composite ops for a library {library!r}",
            where=f"integrate({library!r})",
            why=f"the libraries are {', '.join(_LIBRARIES)}",
            fix=f"did you mean {close[0]!r}?" if close else "call the ops of torch.ops.rolemesh",
        )
    define_composite_ops()
    try:
        register()
    except ImportError as error:
        raise RolemeshError(
            "RM037",
            what=f"{library} is missing or too old",
            where=f"integrate({library!r})",
            why=str(error),
            fix=f"pip install 'rolemesh[{library}]'",
        ) from error


@functools.cache
def _transformers() -> None:
    from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function(sdpa_mask))
    ExpertsInterface.register(IMPLEMENTATION, experts_function(grouped_mm_experts_forward))


_LIBRARIES: Mapping[str, Callable[[], None]] = MappingProxyType({"transformers": _transformers})
"""What registers the ops with each library."""
