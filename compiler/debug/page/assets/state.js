"use strict";
/* What is shown, as the part of the address after #: a link opens the same view again. */

const VIEWS = ["graph", "changes", "ledger", "timeline"];

/* program: an id; stage, diff: numbers, diff -1 for none; open: a list of groups, null for those
   that are open by default; node: a box's id; q: the search; sort: a column of the ledger, with -
   in front for descending. */
function readState(hash, run) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const program = run.programs.find((each) => each.id === found.get("program")) || run.programs[0];
  const number = (name, otherwise) => {
    const text = found.get(name) || "";
    return /^\d+$/.test(text) && Number(text) <= program.last ? Number(text) : otherwise;
  };
  return {
    program: program.id,
    stage: number("stage", program.last),
    diff: number("diff", -1),
    view: VIEWS.includes(found.get("view")) ? found.get("view") : "graph",
    open: found.has("open") ? found.get("open").split(",").filter(Boolean) : null,
    node: found.get("node") || "",
    q: found.get("q") || "",
    sort: found.get("sort") || "number",
  };
}

function writeState(state) {
  const written = new URLSearchParams();
  written.set("program", state.program);
  written.set("stage", state.stage);
  if (state.diff >= 0) written.set("diff", state.diff);
  if (state.view !== "graph") written.set("view", state.view);
  if (state.open) written.set("open", state.open.join(","));
  if (state.node) written.set("node", state.node);
  if (state.q) written.set("q", state.q);
  if (state.sort !== "number") written.set("sort", state.sort);
  return `#${written.toString().replaceAll("%2F", "/").replaceAll("%2C", ",")}`;
}
