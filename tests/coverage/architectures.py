"""Which architectures `make sweep` covers, as data.

The causal types and the encoders are those of `transformers` that PyTorch itself captures as one
graph: with a static cache, prefill and decode, results equal to eager. What PyTorch does not
capture is no subject of the sweep.

Invariants: within a kind, names are unique; an architecture's roles are in the order of the table's
columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["ARCHITECTURES", "EXPLANATIONS", "ROLES", "Architecture", "Kind", "selected"]


class Kind(Enum):
    """What an architecture is, with the heading of its table."""

    CAUSAL = "Causal language models"
    ENCODER = "Encoders"
    VISION = "Vision-language models"


ROLES: Mapping[Kind, tuple[str, ...]] = {
    Kind.CAUSAL: ("prefill", "decode", "pd_mixed"),
    Kind.ENCODER: ("prefill",),
    Kind.VISION: ("prefill", "decode", "pd_mixed"),
}
"""The roles that are checked, by kind."""

_MODEL: Mapping[Kind, str] = {
    Kind.CAUSAL: "hf:{}",
    Kind.ENCODER: "hf:encoder/{}",
    Kind.VISION: "hf:vision/{}",
}


@dataclass(frozen=True)
class Architecture:
    """One row of a table.

    Attributes:
        kind: What it is.
        name: Its `transformers` model type.
    """

    kind: Kind
    name: str

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that are checked."""
        return ROLES[self.kind]

    @property
    def model(self) -> str:
        """The MODEL argument of `rolemesh check`."""
        return _MODEL[self.kind].format(self.name)


_CAUSAL = """
afmoe apertus arcee aria_text axk1 axk2 bailing_hybrid bamba bart beam bert bigbird_pegasus bitnet
blenderbot blenderbot-small bloom camembert codegen cohere cohere2 cohere2_moe cohere_compass_text
cwm data2vec-text deepseek_v2 deepseek_v3 deepseek_v32 diffllama doge dots1 electra emu3 ernie
ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma
gemma2 gemma3 gemma3_text gemma3n_text gemma4 gemma4_text gemma4_unified gemma4_unified_text glm
glm4 glm4_moe glm4_moe_lite glm_moe_dsa got_ocr2 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox
gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hy_v4 hyperclovax internlm3
iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 lfm2_moe lfm3 llama llama4
llama4_text mamba mamba2 marian mbart mellum mimo_v2_flash minicpm3 minimax_m2 minimax_m3_vl_text
ministral ministral3 mistral mixtral mllama modernbert-decoder moshi moss_transcribe_diarize
nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe pegasus persimmon phi phi3
phi4_multimodal phimoe plbart qwen2 qwen2_moe qwen3 qwen3_5 qwen3_5_moe qwen3_5_moe_text
qwen3_5_text qwen3_moe qwen3_next recurrent_gemma roberta roberta-prelayernorm roc_bert seed_oss
smollm3 solar_open stablelm starcoder2 vaultgemma whisper xlm-roberta xlm-roberta-xl xmod youtu
zamba zamba2 zaya
"""

_ENCODERS = """
albert bart bert big_bird camembert clip_text_model clip_vision_model convbert deberta deberta-v2
dinov2 distilbert electra embedding_gemma2_text eurobert gemma3_text gte jina_embeddings_v3 llama
mistral mobilebert modernbert mpnet mt5 nomic_bert qwen2 qwen3 roberta roformer
siglip_vision_model squeezebert t5 t5gemma umt5 vit xlm-roberta xlnet
"""

_VISION = """
gemma3 glm4v idefics3 internvl llama4 llava paligemma qwen2_5_vl qwen2_vl qwen3_vl smolvlm
"""

ARCHITECTURES: tuple[Architecture, ...] = (
    *(Architecture(Kind.CAUSAL, name) for name in _CAUSAL.split()),
    *(Architecture(Kind.ENCODER, name) for name in _ENCODERS.split()),
    *(Architecture(Kind.VISION, name) for name in _VISION.split()),
)
"""Every architecture, in the order of the tables."""

EXPLANATIONS: Mapping[tuple[Kind, str], str] = {}
"""Why a row that is not ok is not, and what helps: one paragraph each, printed below the tables."""


def selected(names: tuple[str, ...] = (), part: tuple[int, int] = (1, 1)) -> list[Architecture]:
    """The architectures of a run.

    Args:
        names: What to take, by default all: a name as `bart`, for both if two kinds have it; a name
            of one kind as `encoder/bart`; or a whole kind as `encoder`.
        part: `(i, n)`: the i-th of n runs of neighbours in the list, i from 1.

    Raises:
        ValueError: For a name that is not in the list, or a part that does not exist.
    """
    index, parts = part
    if not 1 <= index <= parts:
        raise ValueError(f"there is no part {index} of {parts}")
    named = {name for entry in ARCHITECTURES for name in _names(entry)}
    for name in names:
        if name not in named:
            raise ValueError(f"{name!r} is not an architecture of the sweep")
    found = [entry for entry in ARCHITECTURES if not names or set(names) & set(_names(entry))]
    size = -(-len(found) // parts)
    return found[(index - 1) * size : index * size]


def _names(entry: Architecture) -> tuple[str, ...]:
    kind = entry.kind.name.lower()
    return (entry.name, f"{kind}/{entry.name}", kind)
