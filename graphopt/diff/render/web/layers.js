// Layered layout of boxes with edges between them: dagre's, in pieces and with lanes, because dagre takes more than twice the time for twice
// the boxes, and sets a point wherever an edge passes by a rank.
"use strict";
(function (root) {
  // dagre copies plain values; V8 without a browser has no structuredClone.
  if (typeof root.structuredClone === "undefined") root.structuredClone = (value) => JSON.parse(JSON.stringify(value));

  const GAP = 22, LANE = 7;
  const MOST = 600; // ranks that edges may pass by, in all, before they get lanes

  /** An order in which every edge leads on, with the places in it where everything before leads to; null where there is a circle. */
  function inSeries(nodes, edges) {
    const number = new Map(nodes.map((n, i) => [n.id, i])), inputs = nodes.map(() => 0), readers = nodes.map(() => []);
    for (const e of edges) { inputs[number.get(e.to)] += 1; readers[number.get(e.from)].push(number.get(e.to)); }
    const at = new Array(nodes.length), cuts = [];
    // What nothing leads to comes first.
    const order = nodes.map((_, i) => i).filter((i) => !inputs[i]);
    for (let place = 0; place < order.length; place += 1) {
      at[order[place]] = place;
      for (const reader of readers[order[place]]) if (!(inputs[reader] -= 1)) order.push(reader);
    }
    if (order.length < nodes.length) return null;
    for (let place = 0, far = 0, ends = false; place < order.length; place += 1) {
      if (far === place && !ends) cuts.push(place);
      ends = ends || !readers[order[place]].length;
      for (const reader of readers[order[place]]) far = Math.max(far, at[reader]);
    }
    return { order, at, cuts, number, readers };
  }

  /**
   * Layered layout of boxes, as `dagreOn` gives it. dagre takes more than twice the time for twice the boxes, so what lies between two boxes
   * that everything passes through is laid out by itself, and put below what comes before.
   */
  function layered(nodes, edges, options) {
    const series = inSeries(nodes, edges);
    if (nodes.length === 1 && !edges.length) return framed(nodes, { [nodes[0].id]: { x: 0, y: 0 } }, []);
    if (!series || series.cuts.length < 2) return placed(nodes, edges, options);
    const { order, at: place, cuts, number } = series;
    const starts = cuts[0] === 0 ? cuts : [0, ...cuts], last = order.length - 1;
    const ends = [...starts.slice(1), last].filter((end, i) => end > starts[i]);
    const pieceOf = new Array(order.length);
    ends.forEach((end, i) => { for (let p = starts[i]; p < end; p += 1) pieceOf[p] = i; });
    const own = ends.map(() => []);
    edges.forEach((e, i) => own[pieceOf[place[number.get(e.from)]]].push(i));
    const at = {}, routed = new Array(edges.length), down = options.rankdir === "TB";
    ends.forEach((end, i) => {
      const members = order.slice(starts[i], end + 1).sort((a, b) => a - b).map((m) => nodes[m]);
      const mine = own[i].map((e) => edges[e]);
      const piece = members.length === 2 && mine.length === 1 ? pair(members, mine[0], options, down) : placed(members, mine, options);
      const joint = nodes[order[starts[i]]].id, known = at[joint];
      const dx = known ? known.x - piece.at[joint].x : 0, dy = known ? known.y - piece.at[joint].y : 0;
      for (const m of members) at[m.id] = at[m.id] || { x: piece.at[m.id].x + dx, y: piece.at[m.id].y + dy };
      piece.edges.forEach((e, k) => { routed[own[i][k]] = { ...e, points: e.points.map((q) => ({ x: q.x + dx, y: q.y + dy })) }; });
    });
    return framed(nodes, at, routed);
  }

  /** As `dagreOn`. Where edges pass by many ranks, those without a label run in lanes on the right, one for each box that they come from. */
  function placed(nodes, edges, options) {
    const span = options.rankdir === "TB" && edges.length >= nodes.length ? spans(nodes, edges) : null;
    if (!span || span.reduce((sum, ranks) => sum + ranks - 1, 0) <= MOST) return dagreOn(nodes, edges, options);
    const long = edges.map((e, i) => span[i] > 1 && !e.label);
    const { at, edges: short, width } = dagreOn(nodes, edges.filter((_, i) => !long[i]), options);
    const boxes = new Map(nodes.map((n) => [n.id, { ...n, ...at[n.id] }])), gap = options.ranksep ?? GAP;
    const reach = new Map(); // from each box, down to where
    edges.forEach((e, i) => { if (long[i]) reach.set(e.from, Math.max(reach.get(e.from) || 0, boxes.get(e.to).y)); });
    const lane = new Map(), ends = [];
    for (const [id, end] of [...reach].sort((a, b) => boxes.get(a[0]).y - boxes.get(b[0]).y)) {
      const free = ends.findIndex((y) => y < boxes.get(id).y), place = free < 0 ? ends.length : free;
      ends[place] = end;
      lane.set(id, width + LANE * (place + 1));
    }
    const routed = edges.map((e, i) => {
      if (!long[i]) return short.shift();
      const a = boxes.get(e.from), b = boxes.get(e.to), out = a.y + a.height, xa = a.x + a.width / 2, xb = b.x + b.width / 2, x = lane.get(e.from);
      const [leave, enter] = [out + 0.35 * gap, b.y - 0.35 * gap];
      return { ...e, points: [{ x: xa, y: out }, { x: xa, y: leave }, { x, y: leave }, { x, y: enter }, { x: xb, y: enter }, { x: xb, y: b.y }] };
    });
    return framed(nodes, at, routed);
  }

  /** How many ranks each edge leads down, where every box stands right below the lowest that leads to it; null where there is a circle. */
  function spans(nodes, edges) {
    const series = inSeries(nodes, edges);
    if (!series) return null;
    const rank = nodes.map(() => 0), { order, number, readers } = series;
    for (const box of order) for (const reader of readers[box]) rank[reader] = Math.max(rank[reader], rank[box] + 1);
    return edges.map((e) => rank[number.get(e.to)] - rank[number.get(e.from)]);
  }

  /** Two boxes, one behind the other. */
  function pair(boxes, edge, options, down) {
    const [a, b] = boxes[0].id === edge.from ? boxes : [boxes[1], boxes[0]], gap = options.ranksep ?? GAP;
    const middle = Math.max(a.width, b.width) / 2, centre = Math.max(a.height, b.height) / 2;
    const rest = gap + (edge.label ? (down ? edge.label.height : edge.label.width) : 0);
    const at = down
      ? { [a.id]: { x: middle - a.width / 2, y: 0 }, [b.id]: { x: middle - b.width / 2, y: a.height + rest } }
      : { [a.id]: { x: 0, y: centre - a.height / 2 }, [b.id]: { x: a.width + rest, y: centre - b.height / 2 } };
    const points = down
      ? [0, rest / 2, rest].map((way) => ({ x: middle, y: a.height + way }))
      : [0, rest / 2, rest].map((way) => ({ x: a.width + way, y: centre }));
    return { at, edges: [{ ...edge, points }] };
  }

  /** dagre on boxes: `nodes` [{id, width, height}], `edges` [{from, to, label?}] -> {width, height, at: {id: {x, y}}, edges}. x, y are corners. */
  function dagreOn(nodes, edges, options) {
    const g = new root.dagre.graphlib.Graph({ multigraph: true });
    g.setGraph({ marginx: 0, marginy: 0, ranksep: GAP, nodesep: 18, edgesep: 8, ...options });
    g.setDefaultEdgeLabel(() => ({}));
    for (const n of nodes) g.setNode(n.id, { width: n.width, height: n.height });
    edges.forEach((e, i) => g.setEdge(e.from, e.to, e.label ? { width: e.label.width, height: e.label.height, labelpos: "c", weight: e.weight || 1 } : { weight: e.weight || 1 }, String(i)));
    if (nodes.length) root.dagre.layout(g);
    const at = {};
    for (const n of nodes) {
      const p = g.node(n.id);
      at[n.id] = { x: p.x - n.width / 2, y: p.y - n.height / 2 };
    }
    return framed(nodes, at, edges.map((e, i) => ({ ...e, points: g.edge(e.from, e.to, String(i)).points || [] })));
  }

  /** The same, moved so that it begins at 0, with its size. */
  function framed(nodes, at, routed) {
    let left = 0, top = 0, right = 0, bottom = 0;
    for (const p of Object.values(at)) { left = Math.min(left, p.x); top = Math.min(top, p.y); }
    for (const n of nodes) {
      at[n.id].x -= left; at[n.id].y -= top;
      right = Math.max(right, at[n.id].x + n.width); bottom = Math.max(bottom, at[n.id].y + n.height);
    }
    const edges = routed.map((e) => ({ ...e, points: e.points.map((q) => ({ x: q.x - left, y: q.y - top })) }));
    for (const e of edges) for (const q of e.points) right = Math.max(right, q.x);
    return { width: right, height: bottom, at, edges };
  }

  root.graphoptLayers = { layered };
})(globalThis);
