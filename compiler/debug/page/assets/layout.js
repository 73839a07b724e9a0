"use strict";
/* Where boxes and edges lie. Each open group is laid out by itself with dagre, its open groups as
   boxes of their own size: a layout never has more than LIMIT boxes, and opening one group moves
   nothing inside of another. An edge is drawn in the innermost group that has both ends. */

const CHARACTER = 6.65;
const HEAD = 26;
const PAD = 12;
const HUB = 5;

function boxSize(item, axes) {
  if (item instanceof Group) {
    const length = Math.max(item.name.length + 4, groupNote(item).length);
    return { width: Math.max(120, length * CHARACTER + 24), height: 46 };
  }
  const length = Math.max(nodeTitle(item).length, clip(nodeNote(item), 44).length);
  return { width: Math.max(72, length * CHARACTER + 24 + 5 * axes.length), height: 40 };
}

function nodeTitle(node) {
  const op = node.op === "input" ? node.weight.split(".").slice(-2).join(".") : shortOp(node.op);
  return clip(op, 40);
}

function nodeNote(node) {
  return node.kinds.length > 1 ? `${node.kinds[0]} +${node.kinds.length - 1}` : node.kinds[0] || "";
}

function groupNote(group) {
  const moved = group.collectives.length;
  return plural(group.nodes.length, "op") + (moved ? ` · ${plural(moved, "collective")}` : "");
}

/* Edges by the open group that draws them: id -> Map("from to" -> {from, to, count}). */
function edgesByGroup(tree, open) {
  const found = new Map();
  const chains = new Map();
  const chain = (name) => {
    if (!chains.has(name)) chains.set(name, [...ancestors(tree, name), tree.nodes.get(name)]);
    return chains.get(name);
  };
  for (const node of tree.nodes.values()) {
    for (const operand of node.operands) {
      if (!tree.nodes.has(operand)) continue;
      const from = chain(operand);
      const to = chain(node.name);
      let level = 0;
      while (from[level] === to[level] && open.has(from[level].id)) level += 1;
      if (from[level] === to[level]) continue;
      const group = level ? from[level - 1].id : "";
      const key = `${boxId(from[level])} ${boxId(to[level])}`;
      if (!found.has(group)) found.set(group, new Map());
      const edge = found.get(group).get(key);
      if (edge) edge.count += 1;
      else found.get(group).set(key, { from: boxId(from[level]), to: boxId(to[level]), count: 1 });
    }
  }
  return found;
}

/* Edges to leave out: where one box is read by many, its edges to boxes that something else leads
   to anyway. They are drawn when one of the two boxes is chosen. */
function farEdges(edges) {
  const count = new Map();
  const near = new Map();
  for (const { from } of edges) count.set(from, (count.get(from) || 0) + 1);
  const isHub = (id) => count.get(id) > HUB;
  for (const { from, to } of edges) if (!isHub(from)) near.set(to, true);
  return new Set(edges.filter(({ from, to }) => isHub(from) && near.has(to)));
}

/* All boxes and edges with absolute places: {boxes: Map(id -> box), edges, far, width,
   height}. A box knows how many of its edges are left out. */
function layoutGraph(tree, open, axes) {
  const edges = edgesByGroup(tree, open);
  const inside = layoutGroup(tree.root, open, axes, edges);
  const result = { boxes: new Map(), edges: [], far: [], width: inside.width, height: inside.height };
  place(inside, PAD, PAD, result);
  result.width += 2 * PAD;
  result.height += 2 * PAD;
  return result;
}

function layoutGroup(group, open, axes, edges) {
  const graph = new dagre.graphlib.Graph();
  const large = group.items.length > 100;
  graph.setGraph({
    nodesep: 14,
    ranksep: 30,
    edgesep: 8,
    ranker: large ? "longest-path" : "network-simplex",
  });
  const insides = new Map();
  for (const item of group.items) {
    const id = boxId(item);
    if (item instanceof Group && open.has(item.id)) {
      const inside = layoutGroup(item, open, axes, edges);
      const width = Math.max(inside.width + 2 * PAD, (item.name.length + groupNote(item).length + 9) * CHARACTER);
      insides.set(id, inside);
      graph.setNode(id, { width, height: inside.height + HEAD + PAD });
    } else graph.setNode(id, boxSize(item, axes));
  }
  const own = [...(edges.get(group.id) || new Map()).values()];
  const far = farEdges(own);
  for (const { from, to, count } of own.filter((edge) => !far.has(edge))) {
    graph.setEdge(from, to, { count, weight: Math.min(count, 4) });
  }
  dagre.layout(graph);
  const { width = 0, height = 0 } = graph.graph();
  return { group, graph, insides, far: [...far], width, height };
}

function place(laid, left, top, result) {
  for (const item of laid.group.items) {
    const id = boxId(item);
    const { x, y, width, height } = laid.graph.node(id);
    const box = { id, item, x: left + x - width / 2, y: top + y - height / 2, width, height };
    const inside = laid.insides.get(id);
    box.isOpen = Boolean(inside);
    result.boxes.set(id, box);
    if (inside) place(inside, box.x + (width - inside.width) / 2, box.y + HEAD, result);
  }
  for (const edge of laid.far) {
    result.far.push(edge);
    const box = result.boxes.get(edge.from);
    box.leftOut = (box.leftOut || 0) + 1;
  }
  for (const edge of laid.graph.edges()) {
    const { points, count } = laid.graph.edge(edge);
    const moved = points.map((point) => [left + point.x, top + point.y]);
    attach(moved, result.boxes.get(edge.v), result.boxes.get(edge.w));
    result.edges.push({ from: edge.v, to: edge.w, count, points: moved });
  }
}

/* Edges leave an open group at its lower side and enter it at its upper side. */
function attach(points, from, to) {
  const beside = (box, x) => Math.min(box.x + box.width - PAD, Math.max(box.x + PAD, x));
  if (from.isOpen && points[1][1] >= from.y + from.height) {
    points[0] = [beside(from, points[1][0]), from.y + from.height];
  }
  const last = points.length - 1;
  if (to.isOpen && points[last - 1][1] <= to.y) {
    points[last] = [beside(to, points[last - 1][0]), to.y];
  }
}
