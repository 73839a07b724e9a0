"""What does not fit a model is refused by name, all of it at once, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.runtime.checkpoint.files import open_checkpoint
from rolemesh.runtime.checkpoint.load import fill_from_checkpoint
from rolemesh.runtime.checkpoint.naming import AsTheyAre
from rolemesh.runtime.checkpoint.plan import make_plan

MODEL = {
    "embed": torch.zeros(7, 3),
    "norm": torch.zeros(3),
    "steps": torch.zeros(2, dtype=torch.int64),
}


def refused(folder: Path, saved: Mapping[str, torch.Tensor], *, cast: bool = False) -> str:
    """The refusal of a checkpoint for MODEL, after which MODEL is as it was."""
    save_file(dict(saved), folder / "model.safetensors")
    tensors = {name: torch.full_like(value, 3) for name, value in MODEL.items()}
    with pytest.raises(RolemeshError) as caught:
        fill_from_checkpoint(folder, tensors, cast=cast, progress=False)
    assert caught.value.code == "RM033"
    assert all((value == 3).all() for value in tensors.values())
    return str(caught.value)


def test_every_kind_of_misfit_is_listed_at_once(tmp_path: Path) -> None:
    saved = {
        "embed": torch.ones(3, 7),
        "steps": torch.ones(2, dtype=torch.int32),
        "head.weight": torch.ones(2),
    }
    text = refused(tmp_path, saved)
    assert (
        f"the checkpoint {tmp_path}/model.safetensors does not fit the model: tensors 1 missing, "
        "1 extra, 1 of another shape, 1 of another dtype" in text
    )
    assert "missing: norm" in text
    assert "extra: head.weight" in text
    assert "shape: embed is [3, 7], the model has [7, 3]" in text
    assert "dtype: steps is i32, the model has i64" in text
    assert "give the checkpoint of this model" in text


def test_another_dtype_alone_is_fixed_by_a_cast(tmp_path: Path) -> None:
    saved = {name: v.bfloat16() if v.is_floating_point() else v for name, v in MODEL.items()}
    text = refused(tmp_path, saved)
    assert "tensors 2 of another dtype" in text
    assert "dtype: embed is bf16, the model has f32" in text
    assert "fix: build the model in the checkpoint's dtype, or pass cast=True" in text


def test_cast_rounds_floats_and_refuses_integers(tmp_path: Path) -> None:
    saved = {"embed": torch.rand(7, 3), "norm": torch.rand(3), "steps": torch.ones(2)}
    text = refused(tmp_path, saved, cast=True)
    assert "tensors 1 of another dtype" in text
    assert "dtype: steps is f32, the model has i64" in text
    save_file({"embed": saved["embed"]}, tmp_path / "model.safetensors")
    half = torch.zeros(7, 3, dtype=torch.float16)
    fill_from_checkpoint(tmp_path, {"embed": half}, cast=True, progress=False)
    assert torch.equal(half, saved["embed"].half())


def test_many_misfits_are_cut_short_by_kind(tmp_path: Path) -> None:
    extra = {f"old.{index:02}": torch.zeros(1) for index in range(40)}
    text = refused(tmp_path, {**extra, "embed": torch.zeros(1)})
    assert "tensors 2 missing, 40 extra, 1 of another shape" in text
    assert "and 20 more" in text
    assert "missing: steps" in text
    assert "shape: embed" in text


def test_one_name_of_a_tied_tensor_is_enough(tmp_path: Path) -> None:
    tied = torch.zeros(4, 2)
    value = torch.rand(4, 2)
    for name in ("embed", "head"):
        save_file({name: value}, tmp_path / "model.safetensors")
        tied.zero_()
        fill_from_checkpoint(tmp_path, {"embed": tied, "head": tied}, progress=False)
        assert torch.equal(tied, value)
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(RolemeshError, match="tensors 1 missing") as caught:
        fill_from_checkpoint(tmp_path, {"embed": tied, "head": tied}, progress=False)
    assert "missing: embed" in str(caught.value)


def test_both_names_of_a_tied_tensor_must_agree(tmp_path: Path) -> None:
    tied = torch.zeros(4, 2)
    value = torch.rand(4, 2)
    save_file({"embed": value, "head": value.clone()}, tmp_path / "model.safetensors")
    fill_from_checkpoint(tmp_path, {"embed": tied, "head": tied}, progress=False)
    assert torch.equal(tied, value)
    other = value.clone()
    other[3, 1] += 1
    save_file({"embed": value, "head": other}, tmp_path / "model.safetensors")
    with pytest.raises(RolemeshError, match=r"\[RM033\].* different values for one") as caught:
        fill_from_checkpoint(tmp_path, {"embed": tied, "head": tied}, progress=False)
    assert "head differs from embed" in str(caught.value)
    assert "set tie_word_embeddings=False" in str(caught.value)


class Lenient(AsTheyAre):
    """Lets checkpoints lack `norm`."""

    def may_lack(self, name: str) -> bool:
        return name == "norm"


def test_a_tensor_that_may_be_missing_keeps_its_value_if_it_has_one(tmp_path: Path) -> None:
    save_file({"embed": torch.ones(7, 3)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    tensors = {"embed": MODEL["embed"], "norm": MODEL["norm"]}
    assert len(make_plan(checkpoint, tensors, Lenient(), cast=False)) == 1
    freed = torch.zeros(3)
    freed.untyped_storage().resize_(0)
    for empty in (freed, torch.zeros(3, device="meta")):
        with pytest.raises(RolemeshError, match="missing: norm"):
            make_plan(checkpoint, {**tensors, "norm": empty}, Lenient(), cast=False)


def test_plan_follows_the_file(tmp_path: Path) -> None:
    save_file(MODEL, tmp_path / "model.safetensors")
    plan = make_plan(open_checkpoint(tmp_path), MODEL, AsTheyAre(), cast=False)
    starts = [conversion.sources[0].start for conversion in plan]
    assert len(starts) == 3
    assert starts == sorted(starts)
