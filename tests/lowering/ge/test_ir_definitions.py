"""The signatures of GE ops: read from torchair's own text, plus the few that it does not carry."""

from __future__ import annotations

import re

import pytest

from rolemesh.lowering.ge.ir_definitions import IrDefinition, IrDefinitions
from rolemesh.lowering.ge.loader import diagnose

TEXT = '''
def Made(x):
    """REG_OP(Made)\\n
    .INPUT(x, TensorType({DT_FLOAT, DT_BF16}))\\n
    .OPTIONAL_INPUT( bias , TensorType({DT_FLOAT}))\\n
    .DYNAMIC_INPUT(rest, TensorType::ALL())\\n
    .OUTPUT(y, "T")
    .DYNAMIC_OUTPUT(more, TensorType::ALL())\\n
    .REQUIRED_ATTR(axes, ListInt)\\n
    .ATTR(dst_type, Type, DT_FLOAT)\\n
    .ATRR(misspelt, int, 0)\\n
    """
    op.output("not part of it")


def Other():
    """REG_OP(Other)\\n"""
'''


@pytest.fixture(scope="module")
def carried() -> IrDefinitions:
    return IrDefinitions.read(diagnose("cpu").folder / "dynamo" / "torchair")


def test_a_text_is_taken_apart() -> None:
    definitions = IrDefinitions(TEXT)
    assert definitions["Made"] == IrDefinition(
        "Made",
        inputs=(("x", "required"), ("bias", "optional"), ("rest", "dynamic")),
        outputs=(("y", "required"), ("more", "dynamic")),
        attributes=(("axes", "VT_LIST_INT"), ("dst_type", "VT_DATA_TYPE"), ("misspelt", "VT_INT")),
    )
    assert definitions["Other"] == IrDefinition("Other", (), (), ())
    assert "Third" not in definitions
    with pytest.raises(KeyError):
        definitions["Third"]


def test_what_torchair_carries_goes_before_ours() -> None:
    ours = IrDefinitions("")
    theirs = IrDefinitions('"""REG_OP(LightningIndexer) .INPUT(only)"""')
    assert len(ours["LightningIndexer"].inputs) == 6
    assert theirs["LightningIndexer"].inputs == (("only", "required"),)


def test_every_definition_of_torchair_is_read(carried: IrDefinitions) -> None:
    path = (
        diagnose("cpu").folder / "dynamo/torchair/_ge_concrete_graph/auto_generated_ge_raw_ops.py"
    )
    named = set(re.findall(r"REG_OP\((\w+)\)", path.read_text(encoding="utf-8")))
    assert len(named) == 1733
    assert set(carried) == named | set(IrDefinitions(""))
    types = {kind for name in carried for _, kind in carried[name].attributes}
    assert "VT_UNKNOWN" not in types


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "attributes"),
    [
        ("MatMulV2", "x1 x2 bias? offset_w?", "y", "transpose_x1 transpose_x2 offset_x"),
        ("ConcatV2", "x* concat_dim", "y", "N"),
        ("HcomAllGather", "x", "y", "rank_size group"),
        (
            "SparseFlashAttention",
            "query key value sparse_indices block_table? actual_seq_lengths_query?",
            "attention_out softmax_max softmax_sum",
            "scale_value sparse_block_size layout_query layout_kv sparse_mode",
        ),
    ],
)
def test_signatures(
    carried: IrDefinitions, op: str, inputs: str, outputs: str, attributes: str
) -> None:
    marks = {"required": "", "optional": "?", "dynamic": "*"}
    found = carried[op]
    shown = [name + marks[kind] for name, kind in found.inputs]
    assert shown[: len(inputs.split())] == inputs.split()
    assert " ".join(name + marks[kind] for name, kind in found.outputs) == outputs
    named = [name for name, _ in found.attributes]
    assert named[: len(attributes.split())] == attributes.split()


@pytest.mark.parametrize(
    "op",
    [
        "AddRmsNorm",
        "AllGatherMatmul",
        "AlltoAllMatmul",
        "FusedInferAttentionScore",
        "GroupedMatmul",
        "KvQuantSparseFlashAttention",
        "KvRmsNormRopeCache",
        "LightningIndexer",
        "MatmulAllReduce",
        "MatmulReduceScatter",
        "MoeFinalizeRoutingV2",
        "MoeGatingTopK",
        "MoeInitRoutingV3",
        "QuantLightningIndexer",
        "RmsNorm",
        "RotaryMul",
        "ScatterNdUpdate",
        "ScatterPaKvCache",
        "SparseFlashAttention",
        "SwiGlu",
    ],
)
def test_fused_ops_of_serving_are_there(carried: IrDefinitions, op: str) -> None:
    assert carried[op].inputs
    assert carried[op].outputs
