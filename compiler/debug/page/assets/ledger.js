"use strict";
/* The ledger: every collective of the stage as a sortable table, with totals. */

const COLUMNS = [
  { key: "number", title: "#", number: true, of: (node, i) => i + 1 },
  { key: "node", title: "collective", of: (node) => node.name },
  { key: "axes", title: "axes", of: (node) => node.collective.axes.join(", ") },
  { key: "dim", title: "dim", number: true, of: (node) => node.collective.dim },
  { key: "sends", title: "a rank sends", of: sendsText },
  { key: "bytes", title: "bytes", number: true, of: (node) => node.collective.bytes },
  { key: "formula", title: "formula", of: (node) => node.collective.formula || "" },
  { key: "module", title: "module", of: (node) => node.home },
  { key: "cause", title: "cause", of: (node) => node.reason || "" },
];

/* The type of what a rank sends, with the dtype as in types: f32[2, 4, 32]. */
function sendsText(node) {
  const dtype = (node.kinds[0] || node.collective.dtype).split("[")[0];
  return `${dtype}[${node.collective.shape.join(", ")}]`;
}

function ledgerRows(stage, found, sort) {
  const names = found && new Set(found.map((node) => node.name));
  const rows = stage.collectives
    .map((node, i) => ({ node, cells: COLUMNS.map((column) => column.of(node, i)) }))
    .filter(({ node }) => !names || names.has(node.name));
  const sign = sort.startsWith("-") ? -1 : 1;
  const at = COLUMNS.findIndex((column) => column.key === sort.replace("-", ""));
  if (at < 0) return rows;
  const compare = COLUMNS[at].number
    ? (a, b) => (a ?? -1) - (b ?? -1)
    : (a, b) => a.localeCompare(b, "en", { numeric: true });
  return rows.sort((a, b) => sign * compare(a.cells[at], b.cells[at]));
}

function drawLedger(target, app) {
  const { stage, program, found } = app;
  const { sort, q } = app.state;
  if (!stage.collectives.length) {
    const text = "No collectives in this stage: the pass partition inserts them.";
    target.replaceChildren(el("p", { class: "empty" }, text));
    return;
  }
  const rows = ledgerRows(stage, found, sort);
  const { key: focused } = document.activeElement.dataset;
  const head = COLUMNS.map((column) => {
    const now = sort.replace("-", "") === column.key;
    const down = now && sort.startsWith("-");
    const next = now && !down ? `-${column.key}` : column.key;
    const button = el("button", { type: "button", onclick: () => app.go({ sort: next }, true) },
      `${column.title}${now ? (down ? " ▾" : " ▴") : ""}`);
    button.dataset.key = column.key;
    const order = now ? (down ? "descending" : "ascending") : "none";
    return el("th", { scope: "col", "aria-sort": order }, button);
  });
  const body = rows.map(({ node, cells }) =>
    el("tr", { class: node.name === app.state.node ? "chosen" : "" },
      cells.map((value, i) => {
        const { key, number } = COLUMNS[i];
        if (key === "node") return el("td", { class: "name" }, app.nodeLink(value));
        if (key === "axes") {
          const axis = program.axes.indexOf(node.collective.axes[0]) % 6;
          return el("td", {}, el("span", { class: `axis axis-${axis}` }, value));
        }
        if (key === "formula") return el("td", { class: "formula" }, el("code", {}, value));
        if (key === "module") return el("td", { class: "module" }, pathText(value));
        return el("td", { class: number ? "number" : key === "cause" ? "wide" : "sends" },
          number && value !== null ? value.toLocaleString("en") : value ?? "–");
      })),
  );
  const bytes = rows.reduce((sum, { node }) => sum + node.collective.bytes, 0);
  const total = el("tr", {}, el("td", { colspan: 5 }, `total of ${plural(rows.length, "collective")}`),
    el("td", { class: "number" }, bytes.toLocaleString("en")), el("td", { colspan: 3 }, bytesText(bytes)));
  target.replaceChildren(
    el("p", { class: "summary" }, ledgerSummary(rows)),
    q ? el("p", { class: "empty" }, `${rows.length} of ${stage.collectives.length} fit the search “${q}”.`) : "",
    el("table", { class: "ledger" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, body), el("tfoot", {}, total)),
  );
  if (focused) target.querySelector(`[data-key=${focused}]`)?.focus();
}

/* Bytes by op. */
function ledgerSummary(rows) {
  const ops = new Map();
  for (const { node } of rows) {
    const { op, bytes } = node.collective;
    const [count, sum] = ops.get(op) || [0, 0];
    ops.set(op, [count + 1, sum + bytes]);
  }
  return [...ops].map(([op, [count, sum]]) => el("span", { class: "badge" }, `${count} × ${op} ${bytesText(sum)}`));
}
