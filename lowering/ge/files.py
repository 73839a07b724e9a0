"""Files of converted graphs: `NAME.pbtxt` and `NAME.txt` to look at, `NAME.air` to compile.

`NAME.txt` is for reading (`graph_text`). `NAME.pbtxt` has the form that torchair's own dump has, a
GraphDef of TensorFlow whose attributes are GE's as text, which Netron and TensorBoard open. The
offline model is written by torchair's export. Parameters are inputs of it, and inputs that the
graph changes are RefData.

Invariants:

* A graph gives the same bytes in every run: what torchair numbers or names by the process (the
  graph, HCCL's groups, the order of maps) has a name or an order of its own here.
* A file is whole or not there.
* The converted graph stays as it is.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.compiler.ir.errors import RolemeshError
from rolemesh.lowering.ge.graph_text import graph_text
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.signature import Signature

__all__ = ["read_text", "safe_name", "unwritable", "write_files"]


def write_files(compiled: object, signature: Signature, options: GeOptions) -> None:
    """Write the files of a graph that the options ask for.

    Args:
        compiled: What torchair's compiler returned for the graph; it must not have run yet.
        signature: Names the files, the graph and its inputs.
        options: Its `dump` and `export` are the folders; what is None is not written.

    Raises:
        RolemeshError: RM018 if a folder cannot be made or written to.
    """
    if options.dump is None and options.export is None:
        return
    name = signature.name
    graph = compiled.runner  # type: ignore[attr-defined]
    model = _stable_model(graph.graph, name)
    if options.dump is not None:
        path = Path(options.dump, safe_name(name))
        inputs = [entry.name for entry in signature.inputs] + list(signature.symbols)
        try:
            write_whole(
                path.with_name(f"{path.name}.pbtxt"), _text(model.graph[0]).encode(), parents=True
            )
            text = graph_text(model.graph[0], inputs)
            write_whole(path.with_name(f"{path.name}.txt"), text.encode())
        except OSError as error:
            raise unwritable("dump", options.dump, error) from error
    if options.export is not None:
        written = {*graph._ref_data_idx, *graph._graph_output_ref_input.values()}
        _mark_state(model.graph[0], written)
        try:
            _export(model, Path(options.export), f"{safe_name(name)}.air")
        except OSError as error:
            raise unwritable("export", options.export, error) from error


def read_text(path: Path) -> bytes:
    """The graph of a `.pbtxt` as a serialized `ModelDef`, which an engine can load.

    torchair must have been loaded. Attributes of the graph as a whole are not in the text.

    Raises:
        OSError: If the file cannot be read.
        RolemeshError: RM027 if it is no such text.
    """
    from google.protobuf import text_format
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    model = ModelDef()
    graph = model.graph.add(name=path.stem)
    try:
        text = text_format.Parse(path.read_text(encoding="utf-8"), _graph_text()())
        for node in text.node:
            op = graph.op.add(name=node.name, type=node.op)
            op.input.extend(re.sub(r"^\^(.*)", r"\1:-1", source) for source in node.input)
            for entry in node.attr:
                if entry.key.startswith("[i]"):
                    target: Any = op.input_desc.add()
                elif entry.key.startswith("[o]"):
                    target = op.output_desc.add()
                else:
                    target = op.attr[entry.key]
                text_format.Parse(entry.value.s, target)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise RolemeshError(
            "RM027",
            what="a file is no GE graph as text",
            where=str(path),
            why=str(error),
            fix="pass a .pbtxt that option dump of target ge wrote",
        ) from error
    return model.SerializeToString(deterministic=True)


def safe_name(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".") or "_"


def unwritable(option: str, folder: str, error: OSError) -> RolemeshError:
    """The error for a folder that an option names."""
    return RolemeshError(
        "RM018",
        what=f"option {option!r} of target 'ge': cannot write to {folder!r}",
        where="option target_options",
        why=f"{type(error).__name__}: {error}",
        fix="name a folder that this process can make, or write to",
    )


def _stable_model(graph: Any, name: str) -> Any:
    """A copy of a graph's `ModelDef` in which nothing depends on the process."""
    from torchair._ge_concrete_graph.hcom_utils import rename_cached_pgname

    model = type(graph.model)()
    model.CopyFrom(graph.model)
    model.graph[0].name = name
    rename_cached_pgname(model.graph[0], graph.used_process_group)
    return model


def _mark_state(graph: Any, written: Iterable[int]) -> None:
    """Make the inputs that a graph changes RefData: memory that an offline model keeps."""
    indices = set(written)
    for op in graph.op:
        if op.type == "Data" and op.attr["index"].i in indices:
            op.type = "RefData"


def _export(model: Any, folder: Path, file: str) -> None:
    """Let torchair write an offline model; CANN does not promise to write it whole."""
    from torchair.core import _torchair

    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{file}.") as part:
        _torchair.export(
            model.SerializeToString(deterministic=True),
            {"export_path_dir": part, "export_name": file},
        )
        Path(part, file).replace(folder / file)


def _text(graph: Any) -> str:
    from google.protobuf import text_format

    text = _graph_text()()
    for op in graph.op:
        node = text.node.add(name=op.name, op=op.type)
        node.input.extend(re.sub(r"^(.*):-1$", r"^\1", source) for source in op.input)
        values = [(key, op.attr[key]) for key in sorted(op.attr)]
        values += [(f"[i]{desc.name}", desc) for desc in op.input_desc]
        values += [(f"[o]{desc.name}", desc) for desc in op.output_desc]
        for key, value in values:
            entry = node.attr.add(key=key)
            entry.value.s = text_format.MessageToString(value).encode()
    written: str = text_format.MessageToString(text)
    return written


@cache
def _graph_text() -> type[Any]:
    """TensorFlow's GraphDef, as far as torchair's dump uses it.

    Its map of attributes is a list of entries here, which reads and writes the same text, but keeps
    the order.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="rolemesh/graph_text.proto", package="rolemesh")
    field = descriptor_pb2.FieldDescriptorProto
    for message, members in _GRAPH_TEXT.items():
        kind = file.message_type.add(name=message)
        for number, (name, repeated, type_) in members.items():
            of_message = type_ in _GRAPH_TEXT
            kind.field.add(
                name=name,
                number=number,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
                type=field.TYPE_MESSAGE if of_message else getattr(field, f"TYPE_{type_}"),
                type_name=f".rolemesh.{type_}" if of_message else None,
            )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("rolemesh.Graph"))


_GRAPH_TEXT = {
    "Graph": {1: ("node", True, "Node")},
    "Node": {
        1: ("name", False, "STRING"),
        2: ("op", False, "STRING"),
        3: ("input", True, "STRING"),
        5: ("attr", True, "Attribute"),
    },
    "Attribute": {1: ("key", False, "STRING"), 2: ("value", False, "Value")},
    "Value": {2: ("s", False, "BYTES")},
}
"""Messages: by number a field's name, whether it is repeated, and its type."""
