"use strict";
/* The graph by module: groups in groups down to nodes, with what a closed group shows of its
   content. No group has more than LIMIT items: a longer one is cut into parts, in order, so that
   nothing large is ever laid out at once. */

const LIMIT = 150;

class Group {
  constructor(id, name, parent) {
    this.id = id;
    this.name = name;
    this.parent = parent;
    this.depth = parent ? parent.depth + 1 : 0;
    this.items = [];
    this.nodes = [];
  }
}

/* Groups by id, the group of each node, and all nodes by name. `ghosts` are removed nodes of the
   stage that this one is compared with. */
function buildTree(stage, ghosts) {
  const root = new Group("", "", null);
  const groups = new Map([["", root]]);
  const groupOf = new Map();
  const nodes = new Map();

  function group(path) {
    let found = groups.get(path);
    if (!found) {
      const above = path === INPUTS ? "" : parentPath(path);
      const parent = group(above);
      found = new Group(path, path.slice(above ? above.length + 1 : 0), parent);
      groups.set(path, found);
      parent.items.push(found);
    }
    return found;
  }

  for (const node of [...stage.order, ...ghosts]) {
    const parent = group(node.home);
    parent.items.push(node);
    nodes.set(node.name, node);
  }
  for (const found of [...groups.values()]) cut(found, groups);
  for (const found of groups.values()) {
    for (const item of found.items) if (!(item instanceof Group)) groupOf.set(item.name, found);
  }
  (function collect(found) {
    for (const item of found.items) {
      if (item instanceof Group) found.nodes.push(...collect(item));
      else found.nodes.push(item);
    }
    return found.nodes;
  })(root);
  for (const found of groups.values()) found.collectives = found.nodes.filter((n) => n.collective);
  return { stage, root, groups, groupOf, nodes };
}

function cut(group, groups) {
  if (group.items.length <= LIMIT) return;
  const items = group.items;
  const size = Math.max(LIMIT, Math.ceil(items.length / LIMIT));
  group.items = [];
  for (let first = 0; first < items.length; first += size) {
    const taken = items.slice(first, first + size);
    const name = `${first + 1}–${first + taken.length} of ${items.length}`;
    const part = new Group(`${group.id}~${first / size}`, name, group);
    part.items = taken;
    for (const item of taken) if (item instanceof Group) item.parent = part;
    groups.set(part.id, part);
    group.items.push(part);
  }
  for (const part of group.items) cut(part, groups);
}

/* Groups around a node or group, outermost first, without the root. */
function ancestors(tree, id) {
  let group = tree.groupOf.get(id);
  if (id.startsWith("@")) group = tree.groups.get(id.slice(1))?.parent;
  const found = [];
  for (; group && group.parent; group = group.parent) found.unshift(group);
  return found;
}

/* What is open before anything is clicked: groups that hold nearly all of the program. */
function defaultOpen(tree) {
  const open = [];
  let group = tree.root;
  while (group) {
    const most = 0.7 * group.nodes.length;
    group = group.items.find((item) => item instanceof Group && item.nodes.length > most);
    if (group) open.push(group.id);
  }
  return open;
}

/* The item that stands for a node where only `open` groups are open: a node or a group. */
function shownFor(tree, name, open) {
  for (const group of ancestors(tree, name)) if (!open.has(group.id)) return group;
  return tree.nodes.get(name);
}

/* A box's id: a node's name, or @ and a group's path. */
function boxId(item) {
  return item instanceof Group ? `@${item.id}` : item.name;
}
