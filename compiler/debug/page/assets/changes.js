"use strict";
/* The difference of two stages of a program. Passes keep the names of nodes, so nodes are matched
   by name. */

const CHANGES = ["added", "removed", "resharded", "changed"];

/* For each node that differs, how: `resharded` lies otherwise, `changed` has another op, other
   arguments or other types. */
function compareStages(before, after) {
  const status = new Map();
  for (const node of after.order) {
    const old = before.nodes.get(node.name);
    if (!old) status.set(node.name, "added");
    else if (old.row === node.row) continue;
    else if (!sameLayouts(old, node)) status.set(node.name, "resharded");
    else if (old.op !== node.op || old.call !== node.call) status.set(node.name, "changed");
  }
  const removed = before.order.filter((node) => !after.nodes.has(node.name));
  for (const node of removed) status.set(node.name, "removed");
  const counts = Object.fromEntries(CHANGES.map((kind) => [kind, 0]));
  for (const kind of status.values()) counts[kind] += 1;
  return { before, after, status, removed, counts };
}

/* The names that differ, in the order of the program; what is removed stands where it stood. */
function changedNames(difference) {
  const { before, after, status } = difference;
  const place = new Map();
  let last = 0;
  for (const node of before.order) {
    const now = after.nodes.get(node.name);
    if (now) last = now.index;
    place.set(node.name, last + 0.5);
  }
  for (const node of after.order) place.set(node.name, node.index);
  return [...status.keys()].sort((a, b) => place.get(a) - place.get(b));
}

/* What changed of one node, as pairs of text. */
function changeOf(difference, name) {
  const old = difference.before.nodes.get(name);
  const now = difference.after.nodes.get(name);
  if (!old || !now) return [];
  const pairs = [];
  if (old.op !== now.op) pairs.push([old.op, now.op]);
  if (old.kinds.join() !== now.kinds.join()) pairs.push([old.kinds.join(", "), now.kinds.join(", ")]);
  if (old.call !== now.call) pairs.push([old.call || "", now.call || ""]);
  return pairs;
}

function drawChanges(target, app) {
  const { difference } = app;
  if (!difference) {
    target.replaceChildren(el("p", { class: "empty" }, "Choose a stage to compare with above."));
    return;
  }
  const { before, after, status, counts } = difference;
  const badges = CHANGES.map((kind) => el("span", { class: `badge ${kind}` }, `${kind} ${counts[kind]}`));
  const names = changedNames(difference);
  const rows = names.slice(0, 1000).map((name) => {
    const node = after.nodes.get(name) || before.nodes.get(name);
    const pairs = changeOf(difference, name).map(([old, now]) =>
      el("div", { class: "pair" }, el("del", {}, clip(old, 160)), " → ", el("ins", {}, clip(now, 160))),
    );
    return el(
      "tr",
      {},
      el("td", {}, el("span", { class: `badge ${status.get(name)}` }, status.get(name))),
      el("td", { class: "name" }, app.nodeLink(name)),
      el("td", {}, shortOp(node.op)),
      el("td", { class: "wide" }, pairs.length ? pairs : kindElement(node.kinds.join(", "), app.program.axes)),
      el("td", { class: "module" }, pathText(node.home)),
    );
  });
  const head = ["change", "node", "op", "what", "module"].map((text) => el("th", { scope: "col" }, text));
  target.replaceChildren(
    el("p", { class: "summary" }, `From ${before.pass} to ${after.pass}: `, badges),
    names.length
      ? el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows))
      : el("p", { class: "empty" }, "Nothing differs."),
    names.length > rows.length ? el("p", { class: "empty" }, `and ${names.length - rows.length} more`) : "",
  );
}
