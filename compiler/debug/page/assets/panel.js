"use strict";
/* The panel of the selected node or module: what it is, how it lies, and why. */

function section(title, ...content) {
  const shown = content.flat().filter((item) => item !== null && item !== undefined && item !== "");
  return shown.length ? el("section", {}, el("h3", {}, title), ...shown) : null;
}

function facts(pairs) {
  const rows = pairs
    .filter(([, value]) => value !== null && value !== undefined && value !== "")
    .flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]);
  return rows.length ? el("dl", {}, ...rows) : null;
}

function drawPanel(target, app) {
  const id = app.state.node;
  const group = id.startsWith("@") ? app.tree.groups.get(id.slice(1)) : null;
  const node = app.tree.nodes.get(id);
  if (group) target.replaceChildren(...groupPanel(group, app));
  else if (node) target.replaceChildren(...nodePanel(node, app));
  else if (id && !id.startsWith("@")) target.replaceChildren(...absentPanel(id, app));
  else target.replaceChildren(...programPanel(app));
  target.scrollTop = 0;
}

function programPanel(app) {
  const { program, stage } = app;
  const weights = stage.order.filter((node) => node.op === "input").length;
  return [
    el("h2", {}, program.id),
    facts([
      ["stage", `${stage.number} ${stage.pass}`],
      ["mesh", program.axes.map((axis) => `${axis}=${program.mesh[axis]}`).join(", ")],
      ["inputs", weights.toLocaleString("en")],
      ["ops", (stage.order.length - weights).toLocaleString("en")],
      ["collectives", stage.collectives.length.toLocaleString("en")],
      ["a rank receives", bytesText(stage.bytes)],
      ["written by", app.run.wrote],
    ]),
    el("p", { class: "empty" }, "Choose a box to see what it is, how it lies, and why."),
  ];
}

function absentPanel(name, app) {
  const links = app.program
    .stagesWith(name)
    .map((number) => el("li", {}, app.stageLink(number)));
  return [
    el("h2", {}, name),
    el("p", {}, "This node is not in this stage."),
    section("It is in", links.length ? el("ul", {}, links) : "no stage of this program"),
  ];
}

function groupPanel(group, app) {
  const ops = new Map();
  for (const node of group.nodes) ops.set(node.op, (ops.get(node.op) || 0) + 1);
  const rows = [...ops].sort((a, b) => b[1] - a[1]).slice(0, 40);
  const bytes = group.collectives.reduce((sum, node) => sum + node.collective.bytes, 0);
  const weights = group.nodes.filter((node) => node.op === "input");
  return [
    el("h2", {}, group.id),
    facts([
      ["nodes", group.nodes.length.toLocaleString("en")],
      ["collectives", group.collectives.length.toLocaleString("en")],
      ["a rank receives", bytesText(bytes)],
    ]),
    section("Collectives", nodeList(group.collectives.map((node) => node.name), app)),
    section("Weights and inputs", nodeList(weights.map((node) => node.name), app)),
    section("Ops", el("ul", { class: "plain" }, rows.map(([op, count]) => el("li", {}, `${count} × ${op}`)))),
  ];
}

function nodePanel(node, app) {
  const { axes } = app.program;
  const change = app.difference && app.difference.status.get(node.name);
  const moduleLink = node.home && app.tree.groups.has(node.home) ? app.groupLink(node.home) : node.home;
  return [
    el("h2", {}, node.name, change ? el("span", { class: `badge ${change}` }, change) : ""),
    el("p", { class: "op" }, node.op === "input" ? node.weight : node.op),
    section("Result", node.kinds.map((kind, i) => resultElement(node, kind, i, axes))),
    section("Where", facts([["module", moduleLink], ["source", node.source]])),
    section("Why it lies so", node.seed || null),
    section("Why it is here", node.reason || null, facts([
      ["moves", node.value && app.nodeLink(node.value)],
      ["for", node.user && app.nodeLink(node.user)],
    ])),
    collectiveSection(node),
    decisionSection(node, app),
    section("Call", callElement(node, app)),
    section(`Operands (${node.operands.length})`, nodeList(node.operands, app)),
    section(`Users (${node.users.length})`, nodeList(node.users, app)),
    section("Through the stages", historyElement(node, app)),
  ].filter(Boolean);
}

function resultElement(node, kind, i, axes) {
  const layout = (node.layouts || [])[i] || [];
  const local = (node.local || [])[i];
  const lines = axes
    .map((axis, j) => [axis, j, layout[j]])
    .filter(([, , placement]) => placement !== undefined)
    .map(([axis, j, placement]) =>
      el("li", {}, el("span", { class: `axis axis-${j % 6}` }, axis), ` ${placementText(placement)}`),
    );
  if (local) lines.push(el("li", {}, `on one rank [${local.join(", ")}]`));
  return el("div", {}, kindElement(kind, axes), lines.length ? el("ul", { class: "plain" }, lines) : "");
}

function collectiveSection(node) {
  const moved = node.collective;
  if (!moved) return section("Cost", facts([["FLOPs on one rank", node.flops && node.flops.toLocaleString("en")]]));
  return section("Cost", facts([
    ["collective", `${moved.op} over ${moved.axes.join(", ")}`],
    ["dim", moved.dim],
    ["sends", el("code", {}, sendsText(node))],
    ["receives", bytesText(moved.bytes)],
    ["formula", moved.formula && el("code", {}, moved.formula)],
  ]));
}

/* The decision is made in the stages propagate and push_back; later stages show the last of them. */
function decisionSection(node, app) {
  let { decision, needs } = node;
  let origin = "";
  for (let i = app.stage.number - 1; i >= 0 && !decision; i -= 1) {
    const older = app.program.stage(i).nodes.get(node.name);
    if (older && older.decision) ({ decision, needs } = older), (origin = app.program.passes[i]);
  }
  if (!decision) return null;
  const perAxis = decision.choices.map((choice, axis) => {
    const name = app.program.axes[axis];
    const priced = (decision.alternatives || [])[axis] || [];
    const rows = priced.map((each) =>
      el("tr", { class: each.choice === choice ? "chosen" : "" },
        el("td", {}, `${each.choice === choice ? "✓ " : ""}${each.choice}`),
        el("td", { class: "number" }, each.price.toLocaleString("en")),
        el("td", { class: "number" }, each.moved.toLocaleString("en")),
        el("td", {}, each.follows)),
    );
    const head = ["choice", "price", "moved", "follows"].map((text) => el("th", { scope: "col" }, text));
    return el("div", {},
      el("p", {}, el("span", { class: `axis axis-${axis % 6}` }, name), ` ${choice}: ${decision.reasons[axis] || ""}`),
      rows.length ? el("table", {}, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows)) : "");
  });
  const needed = (needs || []).map((of, i) => `operand ${i}: ${of.map(placementText).join(", ")}`);
  return section(`Decision${origin ? ` (of ${origin})` : ""}`, perAxis, facts([
    ["rule", el("code", {}, decision.rule)],
    ["needs", needed.join("; ")],
  ]));
}

function callElement(node, app) {
  if (!node.call) return null;
  const parts = node.call.split(/(%[A-Za-z_]\w*)/).map((part) => {
    const name = part.slice(1);
    return part[0] === "%" && node.operands.includes(name) ? app.nodeLink(name) : part;
  });
  return el("code", { class: "call" }, `${shortOp(node.op)}(`, ...parts, ")");
}

function nodeList(names, app, limit = 60) {
  if (!names.length) return null;
  const rows = names.slice(0, limit).map((name) => {
    const node = app.tree.nodes.get(name);
    return el("li", {}, app.nodeLink(name, node && node.weight), " ", node ? kindElement(node.kinds.join(", "), app.program.axes) : "");
  });
  if (names.length > limit) rows.push(el("li", {}, `and ${names.length - limit} more`));
  return el("ul", { class: "plain" }, rows);
}

/* Each stage where the node's types or layouts are new. */
function historyElement(node, app) {
  const rows = [];
  let last = null;
  for (const number of app.program.passes.keys()) {
    const found = app.program.stage(number).nodes.get(node.name);
    const text = found ? found.kinds.join(", ") : null;
    if (text !== last) {
      const shown = found ? kindElement(text, app.program.axes) : el("i", {}, "gone");
      rows.push(el("li", {}, app.stageLink(number), " ", shown));
    }
    last = text;
  }
  return el("ul", { class: "plain" }, rows);
}
