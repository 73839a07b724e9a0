"""torchair's native boundary in Python, for machines without CANN.

torchair is Python down to three native modules, which talk to CANN. Without CANN those cannot be
loaded; the modules made here take their names. They keep the contract of the native ones, argument
errors included, and hand each graph to the engine in force (`lowering.ge.engine`).

Invariants:

* What a load of torchair initialises, and nothing else, is in its `Session`.
* A graph goes to the engine when torchair compiles it, and runs on the tensors it is called with.
* What needs a device has no effect: dumps of device memory, tuning, and memory formats, which here
  are all plain.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from math import prod
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import ClassVar

import torch

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.engine import Executable, LoadedGraph, engine_in_force
from rolemesh.lowering.ge.ir_definitions import IrDefinitions

__all__ = ["SOC", "NativeGraph", "Session", "TorchDataType", "native_modules"]

SOC = "Ascend910B1"
"""The chip that torchair is told of where there is none."""

_HOST, _DEVICE = 0, 1


class TorchDataType(IntEnum):
    """Numbers of dtypes on the boundary that shares tensors by address."""

    BOOL = 0
    INT8 = 1
    UINT8 = 2
    INT16 = 3
    INT32 = 4
    INT64 = 5
    FLOAT16 = 6
    BF16 = 7
    FLOAT32 = 8
    FLOAT64 = 9
    COMPLEX32 = 10
    COMPLEX64 = 11
    COMPLEX128 = 12
    UINT16 = 13
    UINT32 = 14
    UINT64 = 15


_DTYPES: Mapping[TorchDataType, torch.dtype] = MappingProxyType(
    {
        kind: getattr(torch, "bfloat16" if kind is TorchDataType.BF16 else kind.name.lower())
        for kind in TorchDataType
    }
)


@dataclass
class Session:
    """What one load of torchair has set up.

    Attributes:
        torchair: The folder of its package.
        options: Options of the engine; None while it is not initialised.
        settings: Where torchair asked for logs and dumps, by the name of its function.
    """

    torchair: Path
    options: Mapping[str, str] | None = None
    settings: dict[str, str] = field(default_factory=dict)

    @cached_property
    def definitions(self) -> IrDefinitions:
        """The signatures of GE ops; read on first use."""
        return IrDefinitions.read(self.torchair)

    def initialize(self, options: Mapping[str, str]) -> None:
        """Start the engine.

        Raises:
            RuntimeError: If no device is named.
        """
        if "ge.exec.deviceId" not in options:
            raise RuntimeError("Device id is not specified when initializing GE")
        self.options = dict(options)

    def finalize(self) -> None:
        """Stop the engine."""
        self.options = None

    def registered(
        self, op_type: str
    ) -> tuple[str, list[tuple[str, str]], list[tuple[str, str]], list[tuple[str, str]]]:
        """Status, inputs, outputs and attributes of an op; the status is ERROR if it is unknown."""
        if op_type not in self.definitions:
            return "ERROR", [], [], []
        found = self.definitions[op_type]
        return "SUCCESS", list(found.inputs), list(found.outputs), list(found.attributes)

    def compatibility(self, op_type: str, inputs: Sequence[str], attributes: Sequence[str]) -> str:
        """Which optional inputs and attributes of these an op lacks; empty if it has all."""
        if op_type not in self.definitions:
            problem = "failed, maybe you need upgrade cann version."
            return f"OperatorFactory find optype {op_type} {problem}"
        found = self.definitions[op_type]
        extra_inputs = [name for name in inputs if name not in dict(found.inputs)]
        extra_attributes = [name for name in attributes if name not in dict(found.attributes)]
        if not extra_inputs and not extra_attributes:
            return ""
        return (
            f"optype {op_type} unsupported optional input [{', '.join(extra_inputs)}], "
            f"optional attr [{', '.join(extra_attributes)}], please upgrade cann version."
        )


class NativeGraph:
    """One GE graph: what torchair's `TorchNpuGraph` derives from.

    Attributes:
        session: The load of torchair that it belongs to; set by `native_modules`.
    """

    session: ClassVar[Session]

    def __init__(self, name: str) -> None:
        self._name = name
        self._graph: LoadedGraph | None = None
        self._executable: Executable | None = None

    def load(
        self,
        model: bytes,
        options: Mapping[str, str],
        placements: Sequence[int],
        output_dtypes: Sequence[int],
        executor: int,
    ) -> None:
        """Take a graph.

        Args:
            model: A serialized `ModelDef`.
            options: Compile options.
            placements: For each input 0 for the host or 1 for the device.
            output_dtypes: For each output its `ge.DataType`.
            executor: 0 to run on the host, 1 on the device.

        Raises:
            RuntimeError: For another executor.
        """
        if executor not in (_HOST, _DEVICE):
            raise RuntimeError("Executor type is unknown.")
        self._executable = None
        self._graph = LoadedGraph(
            name=self._name,
            model=bytes(model),
            options={str(key): str(value) for key, value in options.items()},
            placements=tuple(int(place) for place in placements),
            output_dtypes=tuple(int(dtype) for dtype in output_dtypes),
            on_device=executor == _DEVICE,
        )

    def set_hint_shape(
        self, inputs: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]]
    ) -> None:
        """Say what shapes the inputs and outputs have; -1 is a dynamic dim.

        Raises:
            RuntimeError: Before `load`.
        """
        if self._graph is None:
            raise RuntimeError("Set graph inputs and outputs shape must after load")
        self._graph = replace(
            self._graph,
            input_shapes=tuple(tuple(int(size) for size in shape) for shape in inputs),
            output_shapes=tuple(tuple(int(size) for size in shape) for shape in outputs),
        )

    def compile(self) -> None:
        """Hand the graph to the engine in force.

        Raises:
            RuntimeError: Before `load`, or before the engine was initialised.
            RolemeshError: RM025 if there is no engine; what the engine finds wrong with the graph.
        """
        problem = f"Failed to compile graph {self._name}, because "
        if self.session.options is None:
            raise RuntimeError(problem + "session is not initialized.")
        if self._graph is None:
            raise RuntimeError(problem + "graph have not been added.")
        self._executable = engine_in_force().load(self._graph)

    def auto_tune(self, packed: tuple[object, object]) -> None:
        """Check the arguments of tuning; on the host there is nothing to tune.

        Args:
            packed: Example inputs, and a stream.

        Raises:
            RuntimeError: If an input is not a tensor.
        """
        inputs, _ = packed
        _tensors(inputs)

    def summary(self) -> str:
        """What the graph is, in a line."""
        if self._graph is None:
            return f"graph {self._name}, not loaded"
        place = "the device" if self._graph.on_device else "the host"
        state = "compiled" if self._executable else "not compiled"
        return f"graph {self._name} for {place}, {state}, {len(self._graph.placements)} inputs"

    def run(self, packed: tuple[object, object, object]) -> list[torch.Tensor]:
        """Run the graph once.

        Args:
            packed: One tensor per input; for each output the tensor that takes it, or None, or an
                empty list if none has one; and a stream, which has no meaning here.

        Returns:
            One tensor per output.

        Raises:
            RuntimeError: Before `compile`, or for arguments that are not tensors.
            RolemeshError: RM029 for another number of inputs than the graph has; what the engine
                raises.
        """
        inputs, assigned, _ = packed
        values = _tensors(inputs)
        targets = _tensors(assigned, optional=True)
        if self._executable is None or self._graph is None:
            raise RuntimeError("Executor is not initialized.")
        if len(values) != len(self._graph.placements):
            raise RolemeshError(
                "RM029",
                what=f"a GE graph of {len(self._graph.placements)} inputs got {len(values)}",
                where=f"graph {self._name}",
                why="it takes one tensor for each Data op",
                fix="call it with the tensors that it was converted for",
            )
        return self._executable.run([value for value in values if value is not None], targets)


def _tensors(values: object, *, optional: bool = False) -> list[torch.Tensor | None]:
    if not isinstance(values, list | tuple):
        raise RuntimeError("not a list or tuple")
    for index, value in enumerate(values):
        if value is None and not optional:
            raise RuntimeError(f"element {index} is None")
        if not isinstance(value, torch.Tensor | None):
            raise RuntimeError(f"element {index} is not a Tensor")
    return list(values)


def native_modules(torchair: Path) -> dict[str, ModuleType]:
    """New native modules for one load of torchair, by their names.

    Args:
        torchair: The folder of its package.
    """
    session = Session(torchair)
    tables: Mapping[str, Mapping[str, object]] = {
        "_torchair": {
            "TorchNpuGraphBase": type("TorchNpuGraphBase", (NativeGraph,), {"session": session}),
            "TorchDataType": TorchDataType,
            "InitializeGraphEngine": session.initialize,
            "FinalizeGraphEngine": session.finalize,
            "get_registered_ir_def": session.registered,
            "check_cann_compat": session.compatibility,
            "export": _export,
            "as_torch_tensors": _as_torch_tensors,
            "StupidRepeat": _repeat,
            "GetSocName": lambda: SOC,
            "CheckAclnnAvaliable": lambda name: False,  # no kernels of CANN are here
            **_setters(session),
        },
        "_npu_graph_executor": {"GetNpuStorageSizes": lambda tensor: list(tensor.shape)},
        "_npu_utils": {"NpuFormatCastViaCpu": _format_cast},
    }
    modules = {}
    for name, members in tables.items():
        module = module_from_spec(ModuleSpec(f"torchair.core.{name}", None))
        vars(module).update(members)
        modules[module.__name__] = module
    return modules


def _setters(session: Session) -> dict[str, object]:
    """Functions that only tell CANN where to write something."""

    def setter(name: str) -> object:
        def remember(*values: object) -> None:
            session.settings[name] = " ".join(map(str, values))

        return remember

    names = ("InitDeviceStdoutChannel", "SetDebugLogPath", "AclmdlSetDump")
    return {name: setter(name) for name in (*names, "AclopStartDumpArgs", "AclopStopDumpArgs")}


def _export(model: bytes, options: Mapping[str, str]) -> None:
    """Write a graph as an offline model, whole or not at all, and equal graphs as equal files.

    Args:
        model: A serialized `ModelDef`.
        options: `export_path_dir`, a folder that is made if it is not there, and `export_name`.

    Raises:
        RuntimeError: If an option is missing, or the file is a link.
        RolemeshError: RM027 if `model` is no `ModelDef`.
    """
    for key, name in (("export_path_dir", "Export_path"), ("export_name", "Export_name")):
        if key not in options:
            raise RuntimeError(f"{name} is none when export graph")
    path = Path(options["export_path_dir"], options["export_name"])
    if path.is_symlink():
        raise RuntimeError("Target file path should not be an symbolic link")
    from google.protobuf.message import DecodeError
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    parsed = ModelDef()
    try:
        parsed.ParseFromString(model)
    except DecodeError as error:
        raise RolemeshError(
            "RM027",
            what="a graph to export is no ModelDef",
            where=str(path),
            why=str(error),
            fix="export a graph that torchair converted",
        ) from error
    write_whole(path, parsed.SerializeToString(deterministic=True), parents=True)


def _as_torch_tensors(
    shape: Sequence[int], dtype: int, addresses: Sequence[int]
) -> tuple[int, list[torch.Tensor]]:
    """Tensors over memory of the host that someone else owns.

    Returns:
        A status, 0 or 1 for an unknown dtype, and a tensor per address.
    """
    if dtype not in _DTYPES:
        return 1, []
    kind = _DTYPES[TorchDataType(dtype)]
    size = prod(shape) * kind.itemsize
    if size == 0:
        return 0, [torch.empty(list(shape), dtype=kind) for _ in addresses]
    memory = [(ctypes.c_char * size).from_address(address) for address in addresses]
    return 0, [torch.frombuffer(part, dtype=kind).reshape(list(shape)) for part in memory]


def _format_cast(
    tensor: torch.Tensor,
    acl_format: int,
    customize_dtype: int | None = None,
    input_dtype: int | None = None,
) -> torch.Tensor:
    """The same values in another memory format of the device; the host has one format."""
    if tensor.dim() >= 2 and not all(tensor.shape[-2:]):
        raise RuntimeError(
            "input tensor last two dims must be greater than 0, but are "
            f"{tensor.shape[-2]} and {tensor.shape[-1]}"
        )
    return tensor


def _repeat(word: str, times: int) -> None:
    sys.stderr.write(word * times)
