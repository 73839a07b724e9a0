"use strict";
/* How values lie: the placement of each axis in words, and types with a colour per mesh axis.
   Colours are classes axis-0, axis-1, ... in the order of the mesh; page.css has them. */

function isWhole(placement) {
  return placement === "replicated";
}

/* Per axis of the mesh what a node's results do: "shard", "partial", "owner" or "". */
function axisKinds(node, program) {
  const layouts = node.layouts || [];
  return program.axes.map((_, axis) => {
    for (const layout of layouts) {
      const placement = layout[axis];
      if (placement === undefined || isWhole(placement)) continue;
      if (placement.partial) return "partial";
      return "owner" in placement ? "owner" : "shard";
    }
    return "";
  });
}

/* Whether two nodes lie alike; without layouts a value is whole. */
function sameLayouts(one, other) {
  return layoutKey(one) === layoutKey(other);
}

function layoutKey(node) {
  const layouts = node.layouts || [];
  return layouts.every((layout) => layout.every(isWhole)) ? "" : JSON.stringify(layouts);
}

function placementText(placement) {
  if (placement === null || placement === undefined) return "any";
  if (isWhole(placement)) return "replicated";
  if (placement.partial) return `partial ${placement.partial}`;
  if ("owner" in placement) return `whole on rank ${placement.owner}`;
  if (placement.shard) {
    const [dim, outer, size] = placement.shard;
    return `split dim ${dim} (${size}${outer === 1 ? "" : `, in each of ${outer}`})`;
  }
  if (placement.segmented) {
    const [dim, segments] = placement.segmented;
    return `split dim ${dim} in ${plural(segments.length, "segment")}`;
  }
  if (placement.routed) return `rows by ${placement.routed[0]}, dim ${placement.routed[1]}`;
  return JSON.stringify(placement);
}

/* Parts of a type's text, with the axis that each belongs to, or -1: 13@tp, owner(0)@tp, +sum(tp). */
function kindParts(kind, axes) {
  if (!axes.length) return [{ text: kind, axis: -1 }];
  const names = axes.map((axis) => axis.replace(/[^\w]/g, "\\$&")).join("|");
  const pattern = new RegExp(`(?:\\w+\\([^()]*\\)|[\\w*+]*)@(${names})(?:/\\w+)?\\b|\\+\\w+\\((${names})\\)`, "g");
  const parts = [];
  let end = 0;
  for (const match of kind.matchAll(pattern)) {
    if (match.index > end) parts.push({ text: kind.slice(end, match.index), axis: -1 });
    parts.push({ text: match[0], axis: axes.indexOf(match[1] || match[2]) });
    end = match.index + match[0].length;
  }
  if (end < kind.length) parts.push({ text: kind.slice(end), axis: -1 });
  return parts;
}

/* A type as HTML. */
function kindElement(kind, axes) {
  const parts = kindParts(kind, axes).map(({ text, axis }) =>
    axis < 0 ? text : el("span", { class: `axis axis-${axis % 6}` }, text),
  );
  return el("code", { class: "kind" }, ...parts);
}

function drawLegend(target, program) {
  const items = program.axes.map((axis, i) =>
    el(
      "li",
      {},
      el("span", { class: `swatch axis-${i % 6}` }),
      el("b", {}, axis),
      ` ${program.mesh[axis]} ranks`,
    ),
  );
  if (items.length) {
    items.push(
      el("li", {}, el("span", { class: "swatch shard" }), "split"),
      el("li", {}, el("span", { class: "swatch partial" }), "partial"),
      el("li", {}, el("span", { class: "swatch owner" }), "on one rank"),
      el("li", {}, el("span", { class: "swatch collective" }), "collective"),
    );
  } else items.push(el("li", {}, "no mesh yet"));
  target.replaceChildren(...items);
}
