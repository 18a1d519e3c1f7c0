// Where everything goes: what is a box (operations in an open block, blocks in a group, which is a stage or a local module, groups in a
// column, columns in the picture), and the edges between columns. Positions inside every box are those of layers.js.
"use strict";
(function (root) {
  const { layered } = root.graphoptLayers;
  const CARD = 244, HEAD = 24, GAP = 22, GUTTER = 58, SIDE = 26, PAD = 12, MARK = 30;
  const MONO = 0.602; // width of a character of a monospaced font, in em

  /** What is drawn as a card: folds, single rows, or whole groups. */
  function cardsOf(phase, state) {
    const rows = new Map(phase.rows.map((r) => [r.name, r]));
    const groups = [], met = new Map();
    for (const fold of phase.groups) {
      const members = fold.rows.map((n) => rows.get(n));
      const first = members[0], section = phase.sections.find((s) => s.local && s.name === first.section);
      const key = section ? "section:" + section.name : "stage:" + first.stage;
      let group = groups[groups.length - 1];
      if (!group || group.key !== key) {
        const nth = met.get(key) || 0;
        met.set(key, nth + 1);
        group = { key: nth ? key + "#" + (nth + 1) : key, local: !!section, rank: section ? section.rank : null, title: "", section: section ? section.name : null, stage: first.stage, folds: [], rows: [] };
        if (nth) group.key = key + "#" + (nth + 1);
        groups.push(group);
      }
      group.folds.push({ name: fold.name, rows: members });
      group.rows.push(...members);
    }
    let number = 0;
    for (const group of groups) {
      if (group.local) number += 1;
      const own = group.rows.filter((r) => !r.attached_to);
      const range = own.length ? own[0].name + (own.length > 1 ? " … " + own[own.length - 1].name : "") : "";
      group.title = group.local ? (group.section === "last module" ? "last module" : "local module " + number) + (group.rank === null ? "" : " · rank " + group.rank) : group.stage;
      group.range = group.local ? range : "";
      const shut = group.rows.length > 1 && (state.closed.has(group.key) || (state.level === "stages" && !state.open.has(group.key)));
      if (shut) {
        group.cards = [{ id: "g:" + group.key, type: "group", name: group.title + (group.range ? ": " + group.range : ""), rows: group.rows, group: group.key, open: false, nodes: [] }];
        continue;
      }
      group.cards = [];
      const short = (name) => (group.stage && name.startsWith(group.stage + ".") ? name.slice(group.stage.length + 1) : name);
      for (const fold of group.folds) {
        const apart = fold.rows.length === 1 || state.level === "blocks" || state.level === "operations" || state.open.has("f:" + fold.rows[0].name);
        if (!apart) {
          group.cards.push({ id: "f:" + fold.rows[0].name, type: "fold", name: fold.name, short: short(fold.name), rows: fold.rows, group: group.key, open: false, nodes: [] });
          continue;
        }
        for (const row of fold.rows) {
          const id = "r:" + row.name, nodes = state.nodes(row).filter(drawn);
          const open = nodes.length > 0 && (state.open.has(id) !== (state.level === "operations"));
          group.cards.push({ id, type: "row", name: row.name, short: short(row.name), rows: [row], group: group.key, open, nodes, fold: fold.rows.length > 1 ? "f:" + fold.rows[0].name : null });
        }
      }
    }
    return groups;
  }

  /** Shape arithmetic and the tensors that operations read are left out of the picture, unless a pass did something to them. */
  function drawn(node) {
    return node.statuses[0] !== "unchanged" || (node.shape !== null && node.op !== "get_attr");
  }

  function plain(row) {
    return row.statuses.length === 1 && row.statuses[0] === "unchanged" && !row.changed;
  }

  /** Layouts of blocks' operations: blocks of the same operations look the same. */
  const layouts = new Map();
  function operationsOf(boxes, wires) {
    const number = new Map(boxes.map((b, i) => [b.id, i]));
    const key = JSON.stringify([boxes.map((b) => b.width), wires.map((w) => [number.get(w.from), number.get(w.to)])]);
    if (!layouts.has(key)) {
      const plain = wires.map((w) => ({ from: number.get(w.from), to: number.get(w.to) }));
      layouts.set(key, layered(boxes.map((b, i) => ({ ...b, id: i })), plain, { rankdir: "TB", ranksep: 14, nodesep: 10 }));
    }
    const found = layouts.get(key);
    const at = Object.fromEntries(boxes.map((b, i) => [b.id, { ...found.at[i] }]));
    return { ...found, at, edges: wires.map((w, i) => ({ ...w, points: found.edges[i].points.map((q) => ({ ...q })) })) };
  }

  /** Sizes a card, and lays out its operations where it is open. */
  function measure(card, state) {
    const quiet = card.type !== "group" && plain(card.rows[0]) && !state.uniform;
    card.head = 30 + (quiet ? 0 : 17) + 17;
    card.width = CARD;
    card.height = card.head;
    if (!card.open) return;
    const known = new Set(card.nodes.map((n) => n.name));
    const boxes = card.nodes.map((n) => {
      const label = n.what + (n.shape ? "  " + n.shape.join("×") : "");
      return { id: n.name, width: Math.ceil(label.length * 11 * MONO) + 34, height: 24, label };
    });
    const wires = [];
    for (const n of card.nodes) for (const i of new Set(n.inputs)) if (known.has(i)) wires.push({ from: i, to: n.name });
    const inner = operationsOf(boxes, wires);
    card.inner = { ...inner, boxes };
    card.width = Math.max(CARD, inner.width + 2 * PAD);
    card.height = card.head + inner.height + 2 * PAD - 4;
  }

  /** Room for a group's title; a stage of one block needs none. */
  function headOf(group) {
    return group.local || group.rows.length > 1 ? HEAD : 2;
  }

  /** Splits the run of cards into `count` columns of about the same height; a group may go on in the next column. */
  function columnsOf(groups, count) {
    const units = [];
    for (const group of groups) {
      group.cards.forEach((card, i) => {
        const height = card.height + GAP + (i === 0 ? headOf(group) + 2 * PAD : 0);
        if (card.rows[0].attached_to && i > 0 && units.length) units[units.length - 1].cards.push(card), (units[units.length - 1].height += height);
        else units.push({ group, cards: [card], height, start: i === 0 });
      });
    }
    const fill = (most) => {
      const columns = [[]];
      let used = 0;
      for (const unit of units) {
        const last = columns[columns.length - 1];
        const extra = last.length && !unit.start ? 0 : unit.start ? 0 : HEAD + 2 * PAD;
        if (last.length && used + unit.height > most) { columns.push([unit]); used = unit.height + (unit.start ? 0 : HEAD + 2 * PAD); }
        else { last.push(unit); used += unit.height + extra; }
      }
      return columns;
    };
    const total = units.reduce((sum, u) => sum + u.height, 0);
    let low = Math.max(0, ...units.map((u) => u.height)), high = total + (HEAD + 2 * PAD) * (groups.length + 1);
    while (high - low > 4) {
      const middle = (low + high) / 2;
      if (fill(middle).length <= count) high = middle; else low = middle;
    }
    return fill(high).map((column) => {
      const parts = [];
      for (const unit of column) {
        let part = parts[parts.length - 1];
        if (!part || part.group !== unit.group) { part = { group: unit.group, cards: [], continued: !unit.start }; parts.push(part); }
        part.cards.push(...unit.cards);
      }
      return parts;
    });
  }

  /** The whole picture for one number of columns. */
  function compose(phase, state, groups, count) {
    const home = new Map();
    for (const g of groups) for (const c of g.cards) for (const r of c.rows) home.set(r.name, c.id);
    const stops = new Set(phase.gradient_stops.map((e) => e.join("\n")));
    const wires = new Map();
    for (const [a, b, kind] of phase.edges) {
      const from = home.get(a), to = home.get(b);
      if (from === undefined || to === undefined || from === to) continue;
      const key = from + "→" + to, old = wires.get(key), stop = stops.has(a + "\n" + b);
      if (!old || (old.kind === "before" && kind !== "before") || stop) wires.set(key, { key, from, to, kind, stop: stop || !!(old && old.stop), a, b, features: phase.feature_input === a });
      else if (phase.feature_input === a) old.features = true;
    }
    const rowOf = new Map(phase.rows.map((r) => [r.name, r]));
    const labelled = new Set((state.labelled || []).map((e) => home.get(e[0]) + "→" + home.get(e[1])));
    for (const w of wires.values()) {
      w.room = labelled.has(w.key);
      w.attached = rowOf.get(w.b).attached_to === w.a;
      w.live = w.kind !== "before" && !w.stop && rowOf.get(w.a).backward && rowOf.get(w.b).backward;
    }
    const columns = columnsOf(groups, count);
    const cards = new Map(), boxes = [], routes = [], used = new Set();
    const first = groups[0] && groups[0].cards[0], lastGroup = groups[groups.length - 1];
    const last = lastGroup && [...lastGroup.cards].reverse().find((c) => !c.rows[0].attached_to);
    const partOf = new Map();
    for (const parts of columns) for (const part of parts) { part.wires = []; for (const card of part.cards) partOf.set(card.id, part); }
    for (const w of wires.values()) if (partOf.get(w.from) === partOf.get(w.to)) partOf.get(w.from).wires.push(w);
    columns.forEach((parts, c) => {
      for (const part of parts) {
        const ids = new Set(part.cards.map((card) => card.id));
        part.id = part.group.key + (part.continued ? "+" + c : "");
        const nodes = part.cards.map((card) => ({ id: card.id, width: card.width, height: card.height }));
        const inside = [];
        for (const w of part.wires) {
          used.add(w.key);
          inside.push({ ...w, weight: w.kind === "before" ? 1 : 4, label: w.stop || w.features || w.room ? { width: 10, height: MARK } : null });
        }
        if (first && ids.has(first.id)) { nodes.push({ id: "input", width: 170, height: 26 }); inside.push({ key: "input", from: "input", to: first.id, kind: "both", weight: 4 }); }
        if (last && ids.has(last.id)) { nodes.push({ id: "output", width: 170, height: 26 }); inside.push({ key: "output", from: last.id, to: "output", kind: "both", live: rowOf.get(last.rows[0].name).backward, weight: 4 }); }
        part.plan = layered(nodes, inside, { rankdir: "TB", ranksep: GAP });
        part.width = part.plan.width + 2 * SIDE;
        part.height = part.plan.height + headOf(part.group) + 2 * PAD;
      }
    });
    // Groups in a column, and columns in the picture, are chains.
    const stacks = columns.map((parts) => layered(parts.map((p) => ({ id: p.id, width: p.width, height: p.height })), parts.slice(1).map((p, i) => ({ from: parts[i].id, to: p.id })), { rankdir: "TB", ranksep: MARK + 4 }));
    const row = layered(stacks.map((s, i) => ({ id: "c" + i, width: s.width, height: s.height })), stacks.slice(1).map((_, i) => ({ from: "c" + i, to: "c" + (i + 1) })), { rankdir: "LR", ranksep: GUTTER });
    columns.forEach((parts, c) => {
      for (const part of parts) {
        const x = row.at["c" + c].x + stacks[c].at[part.id].x, y = stacks[c].at[part.id].y; // columns start at the top: that is where one reads on
        boxes.push({ id: part.id, key: part.group.key, x, y, width: part.width, height: part.height, title: (part.continued ? "↳ " : "") + part.group.title, range: part.group.range, local: part.group.local, group: part.group, column: c });
        const dx = x + SIDE, dy = y + headOf(part.group) + PAD;
        for (const card of part.cards) cards.set(card.id, { ...card, x: dx + part.plan.at[card.id].x, y: dy + part.plan.at[card.id].y, column: c, box: part.id });
        for (const id of ["input", "output"]) if (part.plan.at[id]) cards.set(id, { id, type: "end", rows: [], x: dx + part.plan.at[id].x, y: dy + part.plan.at[id].y, width: 170, height: 26, column: c, box: part.id });
        for (const e of part.plan.edges) routes.push({ ...e, points: e.points.map((p) => ({ x: p.x + dx, y: p.y + dy })), how: "inside" });
      }
    });
    const boxOf = new Map(boxes.map((b) => [b.id, b])), below = columns.map(() => []);
    for (const card of cards.values()) below[card.column].push(card);
    for (const column of below) column.sort((a, b) => a.y - b.y);
    for (const w of wires.values()) {
      if (used.has(w.key)) continue;
      const a = cards.get(w.from), b = cards.get(w.to);
      routes.push({ ...w, ...between(a, b, boxOf.get(a.box), boxOf.get(b.box), below[a.column]) });
    }
    const height = Math.max(0, ...boxes.map((b) => b.y + b.height)), width = Math.max(0, ...boxes.map((b) => b.x + b.width));
    return { width, height, cards, boxes, routes, arcs: arcsOf(phase, home, cards), columns: columns.length };
  }

  /** The place of the first of these cards, which are in the order of their heights, that begins below `y`. */
  function firstBelow(column, y) {
    let low = 0, high = column.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (column[middle].y > y) high = middle; else low = middle + 1;
    }
    return low;
  }

  /** An edge that leaves its group, for a column's cards from top to bottom: straight down where nothing is in between, else through the gutter. */
  function between(a, b, boxA, boxB, column) {
    if (a.column === b.column) {
      let clear = true;
      for (let i = firstBelow(column, a.y); clear && i < column.length && column[i].y < b.y; i += 1) {
        const c = column[i];
        clear = c === a || c === b || c.x >= a.x + a.width || c.x + c.width <= a.x;
      }
      const xa = a.x + a.width / 2, xb = b.x + b.width / 2;
      if (clear) {
        const middle = boxA.y + boxA.height + MARK / 2 + 2;
        return { how: "down", points: Math.abs(xa - xb) < 1 ? [{ x: xa, y: a.y + a.height }, { x: xb, y: b.y }] : [{ x: xa, y: a.y + a.height }, { x: xa, y: middle }, { x: xb, y: middle }, { x: xb, y: b.y }], mark: { x: (xa + xb) / 2, y: middle } };
      }
      const lane = Math.max(a.x + a.width, b.x + b.width) + SIDE / 2;
      return { how: "lane", points: [{ x: a.x + a.width, y: a.y + 16 }, { x: lane, y: a.y + 16 }, { x: lane, y: b.y + 14 }, { x: b.x + b.width + (b.type === "row" ? 1 : 6), y: b.y + 14 }], mark: { x: xb, y: boxA.y + boxA.height + MARK / 2 + 2 } };
    }
    const ya = a.y + Math.min(a.height, a.head || a.height) / 2, yb = b.y + Math.min(b.height, b.head || b.height) / 2;
    const lane = boxB.x - GUTTER / 2;
    if (b.column === a.column + 1) return { how: "across", points: [{ x: a.x + a.width, y: ya }, { x: lane, y: ya }, { x: lane, y: yb }, { x: b.x, y: yb }], mark: { x: lane, y: (ya + yb) / 2, turned: true } };
    const laneA = boxA.x + boxA.width + GUTTER / 2, over = -14;
    return { how: "over", points: [{ x: a.x + a.width, y: ya }, { x: laneA, y: ya }, { x: laneA, y: over }, { x: lane, y: over }, { x: lane, y: yb }, { x: b.x, y: yb }], mark: { x: lane, y: (over + yb) / 2, turned: true } };
  }

  /** From the blocks whose weights are used to the blocks that use them. */
  function arcsOf(phase, home, cards) {
    const arcs = new Map();
    for (const r of phase.rows) {
      for (const source of r.sources) {
        const a = cards.get(home.get(source)), b = cards.get(home.get(r.name));
        if (!a || !b || a === b) continue;
        const key = "arc:" + a.id + ">" + b.id;
        if (arcs.has(key)) continue;
        const fromY = a.y > b.y ? a.y + 14 : a.y + Math.min(a.height, a.head) - 14, toY = a.y > b.y ? b.y + Math.min(b.height, b.head) - 12 : b.y + 12;
        if (a.column === b.column) {
          const bow = Math.min(a.x, b.x) - Math.min(24, 12 + Math.abs(a.y - b.y) / 30);
          arcs.set(key, { key, d: `M${n(a.x)} ${n(fromY)} C${n(bow - 8)} ${n(fromY)} ${n(bow - 8)} ${n(toY)} ${n(b.x - 1)} ${n(toY)}` });
        } else {
          const leftward = a.column > b.column;
          const x1 = leftward ? a.x : a.x + a.width, x2 = leftward ? b.x + b.width : b.x, out = leftward ? -46 : 46;
          arcs.set(key, { key, d: `M${n(x1)} ${n(fromY)} C${n(x1 + out)} ${n(fromY)} ${n(x2 - out)} ${n(toY)} ${n(x2)} ${n(toY)}` });
        }
      }
    }
    return [...arcs.values()];
  }

  const n = (value) => Math.round(value * 10) / 10;

  /** The picture that is largest in a window of `width` x `height`. On a narrow one: a single column. */
  function arrange(phase, state, width, height) {
    const groups = cardsOf(phase, state);
    for (const g of groups) for (const c of g.cards) measure(c, state);
    const count = groups.reduce((sum, g) => sum + g.cards.length, 0);
    let best = null;
    // While one opens and shuts things, columns stay: a picture that jumps is lost.
    if (state.columns) return compose(phase, state, groups, state.columns);
    for (let columns = 1; columns <= Math.min(8, Math.max(1, count)); columns += 1) {
      const picture = compose(phase, state, groups, columns);
      if (best && picture.columns <= best.columns) continue;
      const across = Math.min(1, width / (picture.width + 24));
      const scale = Math.min(across, height / (picture.height + 40));
      // Wider than the window is worse than longer: text has to stay readable.
      const worth = across < 0.72 ? across * 0.1 + scale * 0.01 : Math.min(across, Math.max(scale, 0.3)) + scale * 0.01;
      if (!best || worth > best.worth + 0.005) best = { ...picture, worth, across };
      if (across < 0.4) break;
    }
    return best;
  }

  root.graphoptLayout = { arrange, drawn, plain, MONO, CARD };
})(globalThis);
