"""Compiled graphs on disk: a later process runs a graph without tracing or converting it again.

What is kept is torchair's own artefact, the Python code that its `cache_compile` keeps: the
serialized GE graph, its compile options, and the function that calls it.

Invariants:

* A file is found by what it was made from (`Entry.key`): the bound graph, its inputs, the groups of
  its collectives, the options, and the versions of all that had a part in it. What a user changes
  behind the back of all those, such as a converter registered with torchair, needs another folder.
* A graph with symbolic sizes comes with the guards that tracing and converting it added: who reads
  it back gets them too, in the shape environment of the symbols.
* A file is run only if it belongs to this user, nobody else can write or read it, and its checksum
  is right; otherwise the graph is converted again, with a warning.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import stat
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import fx

from rolemesh.compiler.ir.atomic import write_whole
from rolemesh.lowering.flatten import Fake
from rolemesh.lowering.ge.files import safe_name, unwritable
from rolemesh.lowering.ge.loader import Torchair
from rolemesh.lowering.ge.options import GeOptions
from rolemesh.lowering.signature import Signature

__all__ = ["Entry", "Stored", "entry_of", "write_text"]

_FORMAT = "rolemesh compiled GE graph 2"


class Stored(NamedTuple):
    """A compiled graph from disk.

    Attributes:
        compiled: torchair's callable, as its compiler would return it.
        kept: Indices of the outputs that it returns.
        text: Content of its file.
    """

    compiled: Callable[..., Sequence[torch.Tensor | None]]
    kept: tuple[int, ...]
    text: str


class _Content(NamedTuple):
    """What a file holds: code, indices of kept outputs, and guards on the symbols."""

    code: str
    kept: tuple[int, ...]
    guards: str


@dataclass(frozen=True)
class Entry:
    """The place of one compiled graph.

    Attributes:
        folder: The folder, as the user gave it; None if there is none.
        required: Whether a folder that cannot be written to is an error.
        name: Name of the graph.
        key: A digest of all that the compiled graph is made from.
        symbols: Those of its inputs that are values of symbols.
    """

    folder: str | None
    required: bool
    name: str
    key: str
    symbols: tuple[torch.SymInt, ...]

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"{safe_name(self.name)}.{self.key[:16]}.json"

    def load(self, torchair: Torchair) -> Stored | None:
        """The compiled graph, or None if there is none that can be trusted."""
        if self.folder is None:
            return None
        path = Path(self.folder, self.file)
        try:
            problem = _foreign(path)
            content = "" if problem else path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, UnicodeDecodeError) as error:
            problem, content = f"{type(error).__name__}: {error}", ""
        found = None if problem else _decode(content, self.key)
        if found is None:
            warnings.warn(
                f"the compiled graph in {path} is not used, and converted again: "
                f"{problem or 'it is damaged, or was made for another graph'}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        if not _rely_on(found.guards, self.symbols):
            return None
        compiler = torchair.module.npu_fx_compiler
        artifacts = compiler._CompiledFxArtifacts(py_code=found.code)
        return Stored(compiler._CompiledFxGraph.load_artifacts(artifacts), found.kept, content)

    def text(
        self,
        compiled: Callable[..., Sequence[torch.Tensor | None]],
        kept: Sequence[int],
        torchair: Torchair,
    ) -> str:
        """The content of the file for a compiled graph that has not run yet.

        Args:
            compiled: What torchair's compiler returned.
            kept: Indices of the outputs that it returns.
            torchair: The torchair that converted it.
        """
        code = _code(compiled.runner, self.name, torchair)  # type: ignore[attr-defined]
        return _encode(self.key, _Content(code, tuple(kept), _guards(self.symbols)))

    def store(self, text: str) -> None:
        """Write the file, if there is a folder.

        Raises:
            RolemeshError: RM018 if the folder cannot be made or written to, and is required.
        """
        if self.folder is None:
            return
        try:
            write_text(Path(self.folder, self.file), text)
        except OSError as error:
            if self.required:
                raise unwritable("cache", self.folder, error) from error
            warnings.warn(
                f"graph {self.name!r} is not kept in {self.folder!r}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )


def write_text(path: Path, text: str) -> None:
    """Write the file of a compiled graph, for this user alone; its folder is made.

    Raises:
        OSError: If that fails.
    """
    write_whole(path, text.encode(), mode=0o600, parents=True)


def entry_of(
    module: fx.GraphModule,
    fakes: Sequence[Fake],
    signature: Signature,
    options: GeOptions,
    torchair: Torchair,
) -> Entry | None:
    """Where the compiled form of a bound graph is kept.

    Args:
        module: The bound graph.
        fakes: Fake tensors like its inputs, and values of symbols.
        signature: Its signature.
        options: Its options.
        torchair: The torchair that converts it.

    Returns:
        The entry, which has a folder with the option `cache`; None for a graph that calls functions
        which text cannot tell apart, with a warning if it was to be kept.
    """
    try:
        lines = [*_module(module), *map(_fake, fakes)]
    except _NotPlainError as error:
        if options.cache is not None:
            warnings.warn(
                f"graph {signature.name!r} is not kept in {options.cache!r}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
        return None
    lines += [
        f"signature {signature}",
        f"options {torchair.device} {options.fuse} {options.frozen_parameters}",
        f"gears {sorted((name, sorted(dims.items())) for name, dims in options.dim_gears.items())}",
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
        f"torchair {torchair.version} {torchair.cann}",
        f"torch {torch.__version__}, Python {platform.python_version()}",
        f"rolemesh {_own_sources()}",
    ]
    key = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    symbols = tuple(fake for fake in fakes if isinstance(fake, torch.SymInt))
    return Entry(options.cache, options.cache_required, signature.name, key, symbols)


class _NotPlainError(Exception):
    """A graph holds something whose text does not say what it does."""


def _module(module: fx.GraphModule) -> Iterator[str]:
    """A line for each node, and one for each group and tensor that nodes name."""
    groups: set[str] = set()
    for node in module.graph.nodes:
        kwargs = {key: _plain(value) for key, value in sorted(node.kwargs.items())}
        yield f"{node.op} {node.name} {_target(node)} {_plain(node.args)} {kwargs}"
        if node.op == "get_attr":
            yield _constant(module, str(node.target))
        if isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
            groups.add(str(bound.get("group_name", "")))
    for name in sorted(groups - {""}):
        group = dist.distributed_c10d._resolve_process_group(dist.distributed_c10d.GroupName(name))
        tag = dist.distributed_c10d._get_group_tag(group)
        yield f"group {name} {tag} {dist.get_process_group_ranks(group)}"


def _target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target} {target._schema}"
    own = isinstance(target, types.FunctionType) and target.__module__.startswith("rolemesh.")
    if isinstance(target, types.BuiltinFunctionType) or (own and "<" not in target.__qualname__):
        return f"{target.__module__}.{target.__qualname__}"
    raise _NotPlainError(f"node {node.name} calls {target}")


def _plain(value: object) -> str:
    """A text that tells an argument from every other one."""
    if value is None or isinstance(value, _ATOMS):
        return repr(value)
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Sequence):
        return f"({', '.join(map(_plain, value))})"
    if isinstance(value, slice):
        return f"slice{_plain((value.start, value.stop, value.step))}"
    raise _NotPlainError(f"a {type(value).__name__} is an argument")


_ATOMS = (
    bool | int | float | complex | str | torch.dtype | torch.device | torch.layout
) | torch.memory_format


def _constant(module: fx.GraphModule, name: str) -> str:
    value: object = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, torch.Tensor):
        raise _NotPlainError(f"attribute {name} is a {type(value).__name__}")
    data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{name} {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def _fake(fake: Fake) -> str:
    if isinstance(fake, torch.SymInt):
        return f"input {_size(fake)}"
    sizes = [*map(_size, fake.shape), *map(_size, fake.stride())]
    return f"input {fake.dtype} {fake.device} {sizes}"


def _size(size: int | torch.SymInt) -> str:
    """A size; for a symbolic one its formula, its range, and whether it is one.

    Tracing tells apart sizes of one and others; what else it may rely on is in the guards.
    """
    if isinstance(size, int):
        return str(size)
    node = size.node
    return f"{node.expr} {node.shape_env.bound_sympy(node.expr)} {node.hint == 1}"


def _guards(symbols: Sequence[torch.SymInt]) -> str:
    """What tracing and conversion relied on of these symbols, as torch writes it in its caches."""
    if not symbols:
        return ""
    shape_env = symbols[0].node.shape_env
    guards = shape_env.get_pruned_guards(symbols)
    return shape_env.produce_guards_expression(symbols, guards=guards) or ""


def _rely_on(guards: str, symbols: Sequence[torch.SymInt]) -> bool:
    """Add guards to the symbols' shape environment, if they hold."""
    if not guards:
        return True
    evaluate = symbols[0].node.shape_env.evaluate_guards_expression
    hints = [symbol.node.hint for symbol in symbols]
    return bool(evaluate(guards, hints)) and bool(evaluate(guards, symbols))


@cache
def _own_sources() -> str:
    """A digest of the code that lowers, so that a change of it is a change of version."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent.parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _code(graph: object, name: str, torchair: Torchair) -> str:
    """The code that torchair makes for a converted graph.

    A graph that was not kept checks its inputs on the engine, in every run. So does this one: the
    code's own checks, of the first run only, are left out; they fail for symbolic sizes. With CANN,
    the code asks for HCCL's present names of the groups.
    """
    plain = copy.copy(graph)
    plain._all_meta_tensor_input = {}  # type: ignore[attr-defined]
    named = plain._graph.name  # type: ignore[attr-defined]
    plain._graph.name = name  # type: ignore[attr-defined]
    try:
        code: str = plain.codegen(extend_config={}, enable_cache=torchair.cann)  # type: ignore[attr-defined]
    finally:
        plain._graph.name = named  # type: ignore[attr-defined]
    return code


def _encode(key: str, content: _Content) -> str:
    body = json.dumps(content._asdict())
    return "\n".join([_FORMAT, key, hashlib.sha256(body.encode()).hexdigest(), body])


def _decode(content: str, key: str) -> _Content | None:
    """What a file holds; None if the content is not what `_encode` made for this key."""
    found_format, _, rest = content.partition("\n")
    found_key, _, rest = rest.partition("\n")
    checksum, _, body = rest.partition("\n")
    right = hashlib.sha256(body.encode()).hexdigest()
    if (found_format, found_key, checksum) != (_FORMAT, key, right):
        return None
    values: Mapping[str, object] = json.loads(body)
    code, kept, guards = values["code"], values["kept"], values["guards"]
    assert isinstance(code, str)
    assert isinstance(guards, str)
    assert isinstance(kept, list)
    return _Content(code, tuple(kept), guards)


def _foreign(path: Path) -> str:
    """Why a file must not be run, whatever is in it; empty if nothing speaks against it."""
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        return "it is no ordinary file"
    if found.st_uid != os.getuid():
        return "it belongs to another user"
    if found.st_mode & 0o077:
        return f"others have access to it (mode {stat.S_IMODE(found.st_mode):o}, not 600)"
    return ""
