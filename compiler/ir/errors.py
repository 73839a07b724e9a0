"""The one exception type that rolemesh raises on purpose, and the table of its codes.

Invariants:

* Every code is a key of `CODES`, and `docs/errors.md` lists exactly those codes and titles.
* A code is never reused or renumbered: users search for it, and scripts match on it.
* The rendered message always starts with ``[RMxxx]`` and the sentence that says what happened.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["CODES", "RolemeshError"]

CODES: Mapping[str, str] = MappingProxyType(
    {
        "RM001": "unknown role",
        "RM002": "unknown mesh axis",
        "RM003": "unknown target",
        "RM004": "unknown phase",
        "RM005": "mesh size differs from world size",
        "RM006": "no process group",
        "RM007": "role needs a cache the model does not take",
        "RM008": "pattern matches nothing",
        "RM009": "dim cannot be split as asked",
        "RM010": "op without a sharding rule",
        "RM011": "data-dependent shape",
        "RM012": "random op in a sharded inference graph",
        "RM013": "a rank died or hangs",
        "RM014": "bad layout text or spec",
        "RM015": "bad mesh",
        "RM016": "verifier found an invalid program",
        "RM017": "gradients do not fit the role",
        "RM018": "bad option",
        "RM019": "bad MODEL argument",
        "RM020": "arguments differ from the traced ones",
        "RM021": "conflicting shards of one dim",
        "RM022": "bad rule specification",
        "RM023": "graph break or failed capture",
        "RM024": "tensor lives as shards",
        "RM025": "torchair cannot be used",
        "RM026": "op that GE graphs cannot express",
        "RM027": "malformed GE graph",
        "RM028": "GE op without semantics",
        "RM029": "GE graph got other inputs than it takes",
        "RM030": "collective of a GE graph without its partners",
        "RM031": "GE op failed",
        "RM032": "checkpoint cannot be read",
        "RM033": "checkpoint does not fit the model",
        "RM034": "request that the engine cannot serve",
        "RM035": "run directory cannot be read",
        "RM036": "run directory cannot be written",
        "RM037": "library cannot be integrated",
        "RM038": "bad layout manifest",
        "RM039": "manifests do not fit each other",
        "RM040": "op without a gradient",
        "RM041": "checkpoint cannot be written",
        "RM042": "artefact cannot be read",
        "RM043": "artefact does not fit",
        "RM044": "artefact cannot be written",
    }
)
"""Every error code and its short title, in the order of `docs/errors.md`."""


class RolemeshError(Exception):
    """An error that names what happened, where, why, and how to fix it.

    The message is one block of at most four parts; parts left empty are not printed::

        [RM002] mesh has no axis 'tq'
          where: option mesh of torch.compile
          why: the axes of this mesh are tp, dp
          fix: use one of those names, or add the axis to the mesh

    Attributes:
        code: Stable identifier, a key of `CODES`.
        what: One sentence that says what happened.
        where: The op, module path, source line, role or rank concerned; may be empty.
        why: The fact that makes it an error; may be empty.
        fix: What the user can do about it; may be empty.
    """

    code: str
    what: str
    where: str
    why: str
    fix: str

    def __init__(
        self, code: str, what: str, *, where: str = "", why: str = "", fix: str = ""
    ) -> None:
        """Build the error and its message.

        Args:
            code: A key of `CODES`.
            what: One sentence that says what happened.
            where: The op, module path, source line, role or rank concerned.
            why: The fact that makes it an error.
            fix: What the user can do about it.

        Raises:
            ValueError: If `code` is not in `CODES` or `what` is empty.
        """
        if code not in CODES:
            raise ValueError(f"{code!r} is not an error code of rolemesh; add it to CODES first")
        if not what:
            raise ValueError(f"{code} needs a sentence that says what happened")
        self.code = code
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix
        super().__init__(self._render())

    @property
    def title(self) -> str:
        """The short title of the code, as `docs/errors.md` lists it."""
        return CODES[self.code]

    # Exception pickles as `cls(*args)`, which would pass the rendered message as the code. Errors
    # do travel between processes: a rank's failure is raised again where the ranks were started.
    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.code, self.what, self.where, self.why, self.fix)

    def _render(self) -> str:
        lines = [f"[{self.code}] {_indented(self.what, 2)}"]
        for label, text in (("where", self.where), ("why", self.why), ("fix", self.fix)):
            if text:
                lines.append(f"  {label}: {_indented(text, 4)}")
        return "\n".join(lines)


def _indented(text: str, width: int) -> str:
    """Indent the continuation lines of `text`, so that a part stays visibly one part."""
    return text.replace("\n", "\n" + " " * width)


def _rebuild(
    cls: type[RolemeshError], code: str, what: str, where: str, why: str, fix: str
) -> RolemeshError:
    return cls(code, what, where=where, why=why, fix=fix)
