"use strict";
/* What one box of the graph looks like: a node, a closed group or an open one. */

function rect(box, className, radius) {
  return svg("rect", { class: className, width: box.width, height: box.height, rx: radius });
}

function drawNodeBox(element, box, app) {
  const node = box.item;
  const change = app.difference && app.difference.status.get(node.name);
  const kinds = axisKinds(node, app.program);
  const moved = node.collective && app.program.axes.indexOf(node.collective.axes[0]);
  element.classList.add(node.op === "input" ? "input" : "node");
  if (node.collective) element.classList.add("moves", `axis-${moved % 6}`);
  if (change) element.classList.add(change);
  element.setAttribute("aria-label", `${node.name}, ${node.op}, ${node.kinds.join(", ")}${change ? `, ${change}` : ""}`);
  element.append(rect(box, "body", node.op === "input" ? 14 : 5));
  let left = 0;
  kinds.forEach((kind, axis) => {
    if (!kind) return;
    const strip = { class: `strip axis-${axis % 6} ${kind}`, x: left + 4, y: 5, width: 4, height: box.height - 10, rx: 2 };
    element.append(svg("rect", strip));
    left += 6;
  });
  const x = 12 + Math.max(0, left - 2);
  element.append(svg("text", { class: "title", x, y: 17 }, nodeTitle(node)));
  const note = svg("text", { class: "note", x, y: 32 });
  for (const { text, axis } of kindParts(clip(nodeNote(node), 44), app.program.axes)) {
    note.append(svg("tspan", { class: axis < 0 ? "" : `axis axis-${axis % 6}` }, text));
  }
  drawLeftOut(element, box);
  element.append(note, svg("title", {}, `${node.name} = ${node.op}\n${node.kinds.join(", ")}\n${node.source || ""}`));
}

/* Edges that layout.js leaves out, below the lower right corner. */
function drawLeftOut(element, box) {
  if (!box.leftOut || box.isOpen) return;
  const place = { class: "note", x: box.width - 6, y: box.height + 11, "text-anchor": "end" };
  element.append(svg("text", place, `→ ${box.leftOut} more`));
}

function drawGroupBox(element, box, app) {
  const group = box.item;
  const verb = box.isOpen ? "close" : "open";
  element.classList.add(box.isOpen ? "opened" : "group");
  element.setAttribute("aria-expanded", String(box.isOpen));
  element.setAttribute("aria-label", `module ${group.id}, ${groupNote(group)}, ${verb} with Enter`);
  element.append(rect(box, "body", 7));
  if (box.isOpen) element.append(svg("rect", { class: "head", width: box.width, height: HEAD - 4, rx: 7 }));
  element.append(svg("text", { class: "title", x: 10, y: 16 }, `${box.isOpen ? "▾" : "▸"} ${group.name}`));
  if (box.isOpen) {
    const x = 24 + (group.name.length + 2) * CHARACTER;
    element.append(svg("text", { class: "note", x, y: 16 }, groupNote(group)));
  } else {
    element.append(svg("text", { class: "note", x: 12, y: 31 }, groupNote(group)));
    drawShares(element, box, app.program);
  }
  drawCounts(element, box, app.difference);
  drawLeftOut(element, box);
  element.append(svg("title", {}, group.id));
}

/* How many of the nodes of a closed group lie split over each axis, as a bar. */
function drawShares(element, box, program) {
  const { nodes } = box.item;
  const width = box.width - 24;
  element.append(svg("rect", { class: "share", x: 12, y: box.height - 9, width, height: 4, rx: 2 }));
  program.axes.forEach((_, axis) => {
    const split = nodes.filter((node) => axisKinds(node, program)[axis]).length;
    if (!split) return;
    const height = 4 / program.axes.length;
    const y = box.height - 9 + axis * height;
    const bar = { class: `shard axis-${axis % 6}`, x: 12, y, width: (width * split) / nodes.length, height };
    element.append(svg("rect", bar));
  });
}

/* Changed nodes inside of a group, above its upper right corner. */
function drawCounts(element, box, difference) {
  if (!difference) return;
  const signs = { added: "+", removed: "−", resharded: "≠", changed: "~" };
  const counts = {};
  for (const node of box.item.nodes) {
    const change = difference.status.get(node.name);
    if (change) counts[change] = (counts[change] || 0) + 1;
  }
  const text = svg("text", { class: "counts", x: box.width - 8, y: -3, "text-anchor": "end" });
  for (const kind of CHANGES) {
    if (counts[kind]) text.append(svg("tspan", { class: kind }, ` ${signs[kind]}${counts[kind]}`));
  }
  if (text.childNodes.length) element.append(text);
}
