"""What inductor makes of a rank's graph: caches are written in place, collectives are within."""

from __future__ import annotations

import json
import math
import re
from ast import literal_eval
from collections import Counter
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
from tests.models import Prompt, Setup, traced
from torch._inductor.graph import GraphLowering

from rolemesh.compiler.api import shard
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.compiler.ir.program import Program
from rolemesh.lowering.bind import bind
from rolemesh.lowering.eager import lower_eager
from rolemesh.lowering.inductor import InductorOptions, lower_inductor, reload_inductor
from rolemesh.lowering.signature import Signature
from rolemesh.lowering.sizes import Examples
from rolemesh.lowering.targets import target
from rolemesh.runtime.groups import stand_in_groups


class Generated(BaseException):
    """Ends a compilation before the generated code is compiled, which takes longest."""


def stop(code: str) -> None:
    raise Generated(code)


def code_of(program: Program) -> tuple[str, set[tuple[int, ...]]]:
    """The code that inductor generates for rank 0, and the shapes of the caches there."""
    with stand_in_groups(program.the_mesh, 0) as groups:
        module = bind(program, 0, groups.names)
        examples, signature = Examples(program, 0).inputs, Signature.of(program, 0)
        with (
            torch._inductor.config.patch(force_disable_caches=True),
            patch.object(GraphLowering, "save_output_code", stop),
            pytest.raises(Generated) as caught,
        ):
            lower_inductor(module, examples, signature)
    (code,) = caught.value.args
    mutated = [examples[index] for index in signature.mutated.values()]
    return code, {tuple(x.shape) for x in mutated if isinstance(x, torch.Tensor) and x.ndim > 1}


def buffers(code: str) -> Counter[tuple[int, ...]]:
    """Shapes that generated code allocates."""
    return Counter(map(literal_eval, re.findall(r"empty_strided_cpu\((\([0-9, ]*\))", code)))


# gpt_oss has caches of a sliding window
@pytest.mark.parametrize(("model", "role"), [("llama", "pd_mixed"), ("gpt_oss", "decode")])
def test_a_decode_step_copies_no_cache(model: str, role: str) -> None:
    step = traced(Setup(model), Prompt(2, 5), 0)
    program = shard(step, {"tp": 2}, role, phase="decode").program
    code, caches = code_of(program)
    made = buffers(code)
    assert caches
    assert not caches & set(made)
    assert max(map(math.prod, made)) <= 2 * max(map(math.prod, caches))  # keys of all heads
    assert "copy_(" not in code
    issued = re.findall(r"_c10d_functional\.(\w+?)_?\.default\(", code)
    assert Counter(issued)["wait_tensor"] == len(issued) / 2 > 0


def test_a_decode_step_over_latents_makes_nothing_of_the_size_of_the_cache() -> None:
    step = traced(Setup("deepseek_v32", "rolemesh", "batched_mm", layers=1), Prompt(3, 25), 0)
    code, caches = code_of(shard(step, {"tp": 2}, "decode", phase="decode").program)
    assert max(map(math.prod, buffers(code))) < max(map(math.prod, caches))
    assert "rolemesh.sparse_attention" not in code  # keys are gathered by a fused kernel


def test_layers_are_compiled_once_and_loaded_again() -> None:
    step = traced(Setup("llama", layers=5), Prompt(2, 5), 0)
    program = shard(step, {"tp": 1}, "decode", phase="decode").program
    examples, signature = Examples(program, 0).inputs, Signature.of(program, 0)
    inputs = [
        torch.rand(x.shape).to(x.dtype) if x.dtype.is_floating_point else torch.ones_like(x)
        for x in examples
        if isinstance(x, torch.Tensor)
    ]
    copies = [[x.clone() for x in inputs] for _ in range(3)]
    with stand_in_groups(program.the_mesh, 0) as groups:
        eager = lower_eager(bind(program, 0, groups.names), examples, signature)
        module = bind(program, 0, groups.names)
        compiled = lower_inductor(module, examples, signature, InductorOptions(repeats=2))
        assert compiled.steps is not None
        assert len(compiled.codes) < len(compiled.steps.steps)
        assert compiled.saved is not None
        saved = json.loads(json.dumps(compiled.saved))
        loaded = reload_inductor(saved, examples, signature)
        assert loaded is not None
        expected = eager(*copies[0])
        for run, mine in ((compiled, copies[1]), (loaded, copies[2])):
            torch.testing.assert_close(run(*mine), expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(mine, copies[0], rtol=1e-5, atol=1e-5)  # caches


@pytest.mark.parametrize("repeats", [1, True, "12"])
def test_a_number_of_repeats_that_is_none(repeats: object) -> None:
    with pytest.raises(RolemeshError) as caught:
        target("inductor").parse({"repeats": repeats})
    assert caught.value.code == "RM018"
    assert "fewest equal layers" in str(caught.value)
