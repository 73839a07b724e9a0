"""Gears: the few sizes that the dynamic dims of a graph may have, such as buckets of decode.

GE compiles the graph once for each gear, so a gear is as fast as a static graph. With several
dynamic dims a gear is one size of each: the first of every list together, then the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.ge.loader import Torchair
from rolemesh.lowering.signature import Signature

__all__ = ["Gears"]


@dataclass(frozen=True)
class Gears:
    """The gears of a graph; none if it may have any size.

    Attributes:
        name: Name of the graph.
        inputs: Names of all inputs.
        sizes: By index of an input and dim, its sizes; as many for each.
    """

    name: str
    inputs: tuple[str, ...]
    sizes: Mapping[tuple[int, int], tuple[int, ...]]

    @classmethod
    def of(
        cls,
        signature: Signature,
        fakes: Sequence[Fake],
        given: Mapping[str, Mapping[int, Sequence[int]]],
    ) -> Gears:
        """The gears that a user gave for a graph.

        Args:
            signature: Signature of the graph.
            fakes: Fake tensors like its inputs, then values of symbols.
            given: By input name and dim, the sizes.

        Raises:
            RolemeshError: RM018 if the gears are not one list for each dynamic dim, all as long.
        """
        names = tuple(entry.name for entry in signature.inputs)
        problem = next(_problems(signature, fakes, given), None)
        if problem is not None:
            raise RolemeshError(
                "RM018",
                what=f"option 'dim_gears' of target 'ge' does not fit graph {signature.name!r}",
                where="option target_options",
                why=problem,
                fix="give for each dynamic dim of each input a list of sizes, all of one length",
            )
        return cls(
            signature.name,
            names,
            {
                (index, dim): tuple(given[name][dim])
                for index, name in enumerate(names)
                for dim in sorted(given.get(name, ()))
            },
        )

    def set(self, fakes: Sequence[Fake], torchair: Torchair) -> None:
        """Tell torchair, which reads them off the fake tensors that it converts for."""
        for index, fake in enumerate(fakes):
            gears = {dim: list(sizes) for (at, dim), sizes in self.sizes.items() if at == index}
            if gears:
                torchair.module.inference.set_dim_gears(fake, gears)

    def check(self, args: Sequence[torch.Tensor]) -> None:
        """Refuse inputs that are in no gear.

        Raises:
            RolemeshError: RM029.
        """
        if not self.sizes:
            return
        found = tuple(args[index].shape[dim] for index, dim in self.sizes)
        gears = list(zip(*self.sizes.values(), strict=True))
        if found in gears:
            return
        dims = [f"dim {dim} of {self.inputs[index]}" for index, dim in self.sizes]
        raise RolemeshError(
            "RM029",
            what=f"sizes {_listed(found)} are no gear of the graph",
            where=f"graph {self.name!r}, {', '.join(dims)}",
            why=f"it was compiled for the gears {'; '.join(map(_listed, gears))}",
            fix="pad the inputs to the next gear, or add a gear to option dim_gears",
        )


def _problems(
    signature: Signature,
    fakes: Sequence[Fake],
    given: Mapping[str, Mapping[int, Sequence[int]]],
) -> Iterator[str]:
    if not given:
        return
    names = [entry.name for entry in signature.inputs]
    tensors = [fake for fake in fakes if isinstance(fake, FakeTensor)]
    sizes = {str(size) for tensor in tensors for size in tensor.shape}
    for symbol, value in zip(signature.symbols, fakes[len(names) :], strict=True):
        if str(value) not in sizes:  # torchair reads it off the tensor that has it as a size
            yield (
                f"sizes depend on {symbol}, which is the size of no input of this rank: GE would "
                "get it as a value, and gears are of sizes"
            )
    for name in given:
        if name not in names:
            yield f"it has no input {name!r}; its inputs are {', '.join(names)}"
    for name, fake in zip(names, tensors, strict=True):
        gears = given.get(name, {})
        dynamic = {dim for dim, size in enumerate(fake.shape) if _is_symbol(size)}
        for dim in gears:
            if dim not in dynamic:
                yield f"dim {dim} of {name} is not a dynamic dim of it: {list(fake.shape)}"
        for dim in sorted(dynamic - set(gears)):
            yield f"dim {dim} of {name} is dynamic and has no gears"
    lengths = {len(sizes) for gears in given.values() for sizes in gears.values()}
    if len(lengths) > 1:
        yield f"the lists of sizes have {' and '.join(map(str, sorted(lengths)))} entries"


def _is_symbol(size: object) -> bool:
    return isinstance(size, torch.SymInt)


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))
