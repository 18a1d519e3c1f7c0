// The picture as SVG text, piece by piece: the page draws each on its own (so that only what changes moves), a file gets them joined.
"use strict";
(function (root) {
  const { arrange, plain, MONO } = root.graphoptLayout;
  const n = (value) => Math.round(value * 10) / 10;

  /** Text that may hold anything: names come from other people's modules. */
  function esc(text) {
    return String(text).replace(/[&<>"'\u0000-\u001f]/g, (c) => "&#" + (c.charCodeAt(0) < 32 && c !== "\n" ? 32 : c.charCodeAt(0)) + ";");
  }

  /** Characters of a bold proportional font by width, in em, rounded up from DejaVu Sans: the widest font that may stand in for Helvetica. */
  const ADVANCES = [["ijl' ", 0.35], [",-./:;|\\IJf·", 0.44], ["!\"()*[]_`rtLcsxz?", 0.58], ["#+<=>~^&ABDGHKNRUVXOQw→×−≈", 0.85], ["mMW@%…⊣▤", 1.1]];
  const advances = new Map(ADVANCES.flatMap(([signs, em]) => Array.from(signs, (sign) => [sign, em])));
  const FACES = {
    mono: () => MONO,
    bold: (sign) => advances.get(sign) || (sign < "\u0250" ? 0.72 : 1.1), // other scripts' signs are wide
    plain: (sign) => 0.92 * FACES.bold(sign),
  };

  /** Pixels that text takes at most, at `size` pixels. */
  function extent(text, size, face = "mono") {
    return size * Array.from(String(text)).reduce((sum, sign) => sum + FACES[face](sign), 0);
  }

  /** Cuts text so that it fits `width` pixels at `size` pixels: its end, or its start. */
  function fit(text, width, size, face = "mono", cut = "end") {
    if (extent(text, size, face) <= width) return String(text);
    const signs = Array.from(String(text));
    if (cut === "start") signs.reverse();
    let left = width - extent("…", size, face), most = 0;
    while (most < signs.length && (left -= size * FACES[face](signs[most])) >= 0) most += 1;
    const rest = signs.slice(0, Math.max(1, most));
    return cut === "start" ? "…" + rest.reverse().join("").replace(/^[ …]+/, "").replace(/^\w*\.(?=\w)/, "") : rest.join("").replace(/[ ,…]+$/, "") + "…";
  }

  /** What figures are set in, so that none of them is cut: smaller type where there is little room. */
  function sized(text, width, size, face) {
    const wide = extent(text, size, face);
    return wide <= width ? "" : ` style="font-size:${n(Math.floor((20 * size * width) / wide) / 20)}px"`;
  }

  function amount(key, value) {
    const bytes = key.endsWith("bytes"), units = bytes ? ["B", "KiB", "MiB", "GiB", "TiB"] : ["", "K", "M", "G", "T", "P"];
    const step = bytes ? 1024 : 1000;
    let at = 0;
    while (Math.abs(value) >= step && at < units.length - 1) { value /= step; at += 1; }
    const digits = at === 0 ? 0 : value >= 100 ? 0 : value >= 10 ? 1 : 2;
    return (value.toFixed(digits) + " " + units[at]).trim();
  }

  /** "24.0 → 26.0 MiB": the unit once where it is the same. */
  function change(key, before, after) {
    if (before === after) return amount(key, after);
    const a = amount(key, before).split(" "), b = amount(key, after);
    return (a[1] && b.endsWith(" " + a[1]) ? a[0] : a.join(" ")) + " → " + b;
  }

  function percent(before, after) {
    if (before === after) return "=";
    if (!before) return "new";
    const p = (100 * (after - before)) / before;
    if (Math.abs(p) < 0.05) return "≈";
    return (p > 0 ? "+" : "−") + (Math.abs(p) >= 10 ? Math.abs(p).toFixed(0) : Math.abs(p).toFixed(1)) + " %";
  }

  function sum(rows, key, when) {
    let total = null;
    for (const r of rows) if (r[when] && r[when][key] !== undefined) total = (total || 0) + r[when][key];
    return total;
  }

  function words(row) {
    const now = row.statuses.join(" + ");
    return row.changed && row.was.length && row.was.join() !== "unchanged" ? row.was.join(" + ") + " → " + now : now;
  }

  function facts(row) {
    const details = Object.entries(row.detail).map(([k, v]) => k + " " + v).join(", ");
    return row.sources.length ? "from " + row.sources.join(", ") + (details ? " (" + details + ")" : "") : details;
  }

  function counted(rows) {
    const counts = {};
    for (const r of rows) counts[r.statuses[0]] = (counts[r.statuses[0]] || 0) + 1;
    return Object.entries(counts).map(([s, c]) => c + " " + s).join(", ");
  }

  /** The main status of a card; of a closed group, the one most of its rows have apart from unchanged. */
  function mainOf(card) {
    if (card.type !== "group") return card.rows[0].statuses[0];
    const counts = {};
    for (const r of card.rows) if (r.statuses[0] !== "unchanged") counts[r.statuses[0]] = (counts[r.statuses[0]] || 0) + 1;
    return Object.keys(counts).sort((a, b) => counts[b] - counts[a])[0] || "unchanged";
  }

  function glyphs(styles, row) {
    return row.statuses.map((s) => styles[s].glyph).join("");
  }

  /** One card; its corner is the origin. */
  function card(c, data, phase, state, scale) {
    const row = c.rows[0], status = mainOf(c), style = data.styles[status];
    const out = [], w = c.width, ghost = ["dropped", "bypassed", "removed"].includes(status);
    if (c.type !== "row") out.push(`<rect class="sheet" x="5" y="5" width="${w}" height="${c.height}" rx="8"/>`);
    out.push(`<rect class="card${ghost ? " ghost" : ""}" width="${w}" height="${n(c.height)}" rx="8"/>`);
    out.push(`<path class="flag" d="M8 0 H6 A6 6 0 0 0 0 6 V${n(c.height - 6)} A6 6 0 0 0 6 ${n(c.height)} H8 Z"/>`);
    const sign = c.type === "group" ? style.glyph : glyphs(data.styles, row);
    out.push(`<text class="glyph" x="16" y="20">${esc(sign)}</text>`);
    const start = 20 + Math.max(1, Array.from(sign).length) * 13;
    const canOpen = !state.still && (c.type !== "row" || c.nodes.length > 0);
    const space = w - start - (canOpen ? 26 : 10);
    const name = extent(c.name, 12.5) <= space ? c.name : fit(c.short || c.name, space, 12.5, "mono", "start");
    out.push(`<text class="name" x="${start}" y="19.5">${esc(name)}</text>`);
    const room = space - extent(name, 12.5) - 10;
    if (row.kind && c.type !== "group" && (room > 110 || room > extent(row.kind, 10.5, "plain"))) out.push(`<text class="kind" x="${w - (canOpen ? 24 : 10)}" y="19.5" text-anchor="end">${esc(fit(row.kind, room, 10.5, "plain"))}</text>`);
    if (canOpen) out.push(`<g class="fold" data-fold="${esc(c.id)}"><rect class="hit" x="${w - 26}" y="2" width="24" height="26"/><path d="${c.open ? `M${w - 18} 12 l4 5 l4 -5` : `M${w - 16} 10 l5 4.5 l-5 4.5`}"/></g>`);
    let y = 30;
    const quiet = c.type !== "group" && plain(row) && !state.uniform;
    if (!quiet) {
      const by = [...new Set(row.passes.map((i) => phase.passes[i].name))].join(", ");
      const about = c.type === "group" ? counted(c.rows) : words(row);
      // The arcs show where shared weights come from; the card has room for what they are mixed with.
      const details = Object.entries(row.detail).map(([k, v]) => k + " " + v).join(", ");
      const more = c.type === "group" ? "" : details || facts(row) || (by && !about.includes(by) ? "by " + by : "");
      const text = fit(about, w - 26, 11.5, "bold");
      const left = w - 32 - extent(about, 11.5, "bold"); // after it, too little room for words holds none
      out.push(`<text class="status" x="16" y="${y + 7}">${esc(text)}${more && left > 30 ? `<tspan class="facts" dx="6">${esc(fit(more, left, 11.5, "plain"))}</tspan>` : ""}</text>`);
      y += 17;
    }
    const before = sum(c.rows, state.metric, "before"), after = sum(c.rows, state.metric, "after"), most = w - 122;
    const length = (v) => n(Math.max(v ? 1.5 : 0, (most * (v || 0)) / scale));
    out.push(`<rect class="bar before" x="16" y="${y + 1}" width="${length(before)}" height="4" rx="1.5"/><rect class="bar after" x="16" y="${y + 6.5}" width="${length(after)}" height="4" rx="1.5"/>`);
    const added = before === null && !after && row.after && row.after.parameters;
    const text = added ? amount("parameters", row.after.parameters) + " parameters" : before === null && after === null ? "" : before === null || after === null ? amount(state.metric, after === null ? before : after) : change(state.metric, before, after);
    out.push(`<text class="cost" x="${w - 10}" y="${y + 9}" text-anchor="end"${sized(text, 112, 10, "plain")}>${esc(text)}</text>`);
    if (c.open) out.push(operations(c, data, phase));
    return out.join("");
  }

  /** The operations of an open block. */
  function operations(c, data, phase) {
    const dx = (c.width - c.inner.width) / 2, dy = c.head + 6, out = [];
    for (const e of c.inner.edges) out.push(`<path class="wire" d="${line(e.points.map((p) => ({ x: p.x + dx, y: p.y + dy })), 4)}"/>`);
    const nodes = new Map(c.nodes.map((x) => [x.name, x]));
    for (const b of c.inner.boxes) {
      const node = nodes.get(b.id), p = c.inner.at[b.id], status = node.statuses[0], style = data.styles[status];
      const title = `${node.name}: ${node.what}${node.path ? " at " + node.path : ""}${node.changed_by === null ? "" : ", by " + phase.passes[node.changed_by].name}`;
      out.push(`<g class="op s-${esc(status)}" transform="translate(${n(p.x + dx)} ${n(p.y + dy)})"><title>${esc(title)}</title><rect width="${b.width}" height="${b.height}" rx="5"/><text class="sign" x="7" y="16">${esc(style.glyph)}</text><text class="what" x="22" y="16">${esc(b.label)}</text></g>`);
    }
    return out.join("");
  }

  /** A way through points, with round corners. */
  function line(points, radius) {
    let d = `M${n(points[0].x)} ${n(points[0].y)}`;
    for (let i = 1; i < points.length - 1; i += 1) {
      const a = points[i - 1], b = points[i], c = points[i + 1];
      const before = Math.hypot(b.x - a.x, b.y - a.y), after = Math.hypot(c.x - b.x, c.y - b.y);
      const r = Math.min(radius, before / 2, after / 2);
      if (r < 0.5) { d += ` L${n(b.x)} ${n(b.y)}`; continue; }
      d += ` L${n(b.x + ((a.x - b.x) * r) / before)} ${n(b.y + ((a.y - b.y) * r) / before)} Q${n(b.x)} ${n(b.y)} ${n(b.x + ((c.x - b.x) * r) / after)} ${n(b.y + ((c.y - b.y) * r) / after)}`;
    }
    const end = points[points.length - 1];
    return d + ` L${n(end.x)} ${n(end.y)}`;
  }

  /** The sign across an edge: features are cached here, the backward pass stops here. */
  function mark(route, phase) {
    const local = route.stop && phase.sections.some((b) => b.local && b.rows.includes(route.b) && !b.rows.includes(route.a));
    const long = route.how !== "across" && route.how !== "over";
    const text = route.features ? (long ? "features cached · training starts here" : "features cached here") : local ? "no gradient" : long ? "backward stops here" : "backward stops";
    const icon = route.features ? "▤ " : "⊣ ", width = n(extent(icon + text, 10.5, "bold") + 12);
    const middle = route.mark || route.points[Math.floor(route.points.length / 2)];
    return { key: "mark:" + route.key, x: middle.x, y: middle.y, layer: "marks", cls: "mark" + (route.features ? " features" : ""), html: `<g${middle.turned ? ' transform="rotate(-90)"' : ""}><rect x="${n(-width / 2)}" y="-9" width="${width}" height="18" rx="9"/><text text-anchor="middle" y="3.8">${esc(icon + text)}</text></g>` };
  }

  /** The scene: pieces in drawing order. A piece is {key, layer, x, y, cls, html} or {key, layer, d, cls}. */
  function scene(data, phase, state, width, height) {
    const picture = arrange(phase, state, width, height);
    const pieces = [];
    if (!picture) return { width: 10, height: 10, pieces, order: [] };
    // One scale for all single cards; a folded or closed one is a sum, and may be longer: the scale knows them too.
    let scale = 1;
    for (const c of picture.cards.values()) if (c.type !== "end") for (const when of ["before", "after"]) scale = Math.max(scale, sum(c.rows, state.metric, when) || 0);
    for (const b of picture.boxes) {
      // Which blocks it has stands on the cards: where there is no room for it, the title leaves it out.
      const single = b.group.rows.length === 1, whole = b.title + (b.range ? ": " + b.range : "");
      const title = extent(whole, 12, "bold") <= 1.1 * (b.width - 30) ? whole : fit(b.title, 1.25 * (b.width - 30), 12, "bold", "start");
      pieces.push({ key: "box:" + b.id, layer: "boxes", x: b.x, y: b.y, cls: (b.local ? "box local" : "box") + (b.group.rank === null ? "" : " rank" + (b.group.rank % 4)), html: `<rect width="${n(b.width)}" height="${n(b.height)}" rx="12"/>` + (single && !b.local ? "" : `<g class="title" data-group="${esc(b.key)}" role="button" tabindex="-1"><rect class="hit" width="${n(b.width)}" height="28"/><text x="16" y="20"${sized(title, b.width - 30, 12, "bold")}>${esc(title)}</text></g>`) });
    }
    for (const r of picture.routes) {
      const cls = ["edge", r.kind === "before" ? "gone" : "", r.live ? "live" : "", r.attached ? "attached" : ""].join(" ").trim();
      pieces.push({ key: "edge:" + r.key, layer: "edges", cls, d: line(r.points, 9), arrow: true });
    }
    for (const a of picture.arcs) pieces.push({ key: a.key, layer: "arcs", cls: "arc", d: a.d, arrow: true });
    const order = [];
    for (const c of picture.cards.values()) {
      if (c.type === "end") {
        const sizes = c.id === "input" ? data.input : data.output;
        pieces.push({ key: c.id, layer: "cards", x: c.x, y: c.y, cls: "end", html: `<rect width="${c.width}" height="${c.height}" rx="13"/><text x="${c.width / 2}" y="17" text-anchor="middle">${esc(fit(c.id + (sizes ? " " + sizes : ""), 160, 11, "plain"))}</text>` });
        continue;
      }
      const status = mainOf(c), row = c.rows[0];
      order.push(c.id);
      const label = [c.name, c.type === "group" ? c.rows.length + " rows" : row.kind, c.type === "group" ? counted(c.rows) : words(row), facts(row)].filter(Boolean).join(", ");
      pieces.push({ key: "card:" + c.id, id: c.id, layer: "cards", x: c.x, y: c.y, cls: `piece s-${status.replace(/[^a-z]/gi, "")}${plain(row) && c.type !== "group" ? " quiet" : ""}`, html: card(c, data, phase, state, scale), label, rows: c.rows.map((r) => r.name), fold: c.fold, group: c.group, type: c.type, open: c.open, width: c.width, height: c.height });
    }
    for (const r of picture.routes) if (r.stop || r.features) pieces.push(mark(r, phase));
    return { width: picture.width, height: picture.height, columns: picture.columns, pieces, order };
  }

  const LAYERS = ["boxes", "edges", "arcs", "cards", "marks"];

  function text(piece) {
    if (piece.d) return `<path class="${piece.cls}" d="${piece.d}"${piece.arrow ? ` marker-end="url(#${piece.cls.includes("arc") ? "arc" : "tip"})"` : ""}/>`;
    return `<g class="${piece.cls}" transform="translate(${n(piece.x)} ${n(piece.y)})">${piece.html}</g>`;
  }

  const MARKERS = '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10" orient="auto"><path class="tip" d="M0 0.5 L7.5 4 L0 7.5 Z"/></marker><marker id="arc" viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" markerHeight="10" orient="auto"><path class="arctip" d="M0 0.5 L7.5 4 L0 7.5 Z"/></marker></defs>';

  /** The kinds of arrow that are there, and what each means. */
  function arrowKey(pieces) {
    const there = (test) => pieces.some((p) => p.d && test(p.cls.split(" ")));
    const kinds = [
      ["edge live", "gradients come back", (c) => c.includes("live")],
      ["edge", "no gradient comes back", (c) => c.length === 1 && c[0] === "edge"],
      ["edge attached", "into a local loss", (c) => c.includes("attached")],
      ["edge gone", "before only", (c) => c.includes("gone")],
      ["arc", "weights", (c) => c.includes("arc")],
    ];
    return kinds.filter(([, , test]) => there(test));
  }

  /** A whole picture as one SVG file, with a heading and a legend; options.style is its style sheet. */
  function file(data, phase, options) {
    const nodes = (row) => data.pool[row.nodes];
    const state = { labelled: [], open: options.open || new Set(), closed: options.closed || new Set(), level: options.level || "folded", metric: options.metric || data.metric, uniform: false, still: true, nodes };
    const width = options.width || 1200, s = scene(data, phase, state, width - 40, options.height || 760);
    const left = 20, over = s.pieces.some((p) => p.d && p.d.includes("-14")) ? 16 : 0;
    const out = [], full = Math.max(s.width + 2 * left, 680);
    let y = 34;
    const heading = fit(data.title, (full - 40) * 1.5, 18, "bold");
    out.push(`<text class="heading" x="${left}" y="${y}"${sized(heading, full - 40, 18, "bold")}>${esc(heading)}</text>`);
    y += 20;
    out.push(`<text class="sub" x="${left}" y="${y}">${esc(fit(data.subtitle, full - 40, 12, "plain"))}</text>`);
    y += 12;
    const tiles = phase.totals && data.before ? data.tiles.filter((k) => k in data.before && k in phase.totals) : [];
    if (tiles.length) {
      const each = Math.min(210, (full - 2 * left - 10 * (tiles.length - 1)) / tiles.length);
      // One size for all: that of the longest.
      const longest = (texts, size) => texts.reduce((a, b) => (extent(a, size, "plain") >= extent(b, size, "plain") ? a : b));
      const titled = sized(longest(tiles.map((k) => data.figures[k]), 11), each - 16, 11, "plain");
      const written = sized(longest(tiles.map((k) => change(k, data.before[k], phase.totals[k])), 10.5), each - 16, 10.5, "plain");
      tiles.forEach((k, i) => {
        const b = data.before[k], a = phase.totals[k], figures = change(k, b, a);
        out.push(`<g class="tile" transform="translate(${n(left + i * (each + 10))} ${y + 6})"><rect width="${n(each)}" height="60" rx="8"/><text class="what" x="10" y="17"${titled}>${esc(data.figures[k])}</text><text class="big${a < 0.9995 * b ? " good" : ""}" x="10" y="36">${esc(percent(b, a))}</text><text class="small" x="10" y="51"${written}>${esc(figures)}</text></g>`);
      });
      y += 76;
    }
    y += 12 + over;
    const body = LAYERS.map((layer) => s.pieces.filter((p) => p.layer === layer).map(text).join("")).join("");
    out.push(`<g transform="translate(${left} ${y})">${body}</g>`);
    y += s.height + 26;
    let x = left;
    for (const [status, count] of Object.entries(phase.counts)) {
      const label = status + " " + count, wide = extent(label, 11.5, "plain") + 34;
      if (x + wide > full - left) { x = left; y += 20; }
      out.push(`<g class="s-${esc(status)}" transform="translate(${n(x)} ${y})"><text class="glyph" x="0" y="0">${esc(data.styles[status].glyph)}</text><text class="legend" x="17" y="0">${esc(label)}</text></g>`);
      x += wide;
    }
    const label = "bars: " + data.figures[state.metric] + ", before (pale) and after";
    if (x + extent(label, 11.5, "plain") > full - left) { x = left; y += 20; }
    out.push(`<text class="legend pale" x="${n(x)}" y="${y}">${esc(label)}</text>`);
    x = left; y += 20;
    for (const [cls, meaning] of arrowKey(s.pieces)) {
      const space = extent(meaning, 11.5, "plain") + 52;
      if (x + space > full - left) { x = left; y += 20; }
      out.push(`<path class="${cls}" d="M${n(x)} ${y - 4} H${n(x + 28)}" marker-end="url(#${cls === "arc" ? "arc" : "tip"})"/><text class="legend pale" x="${n(x + 35)}" y="${y}">${esc(meaning)}</text>`);
      x += space;
    }
    const total = y + 18;
    return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${n(full)} ${n(total)}" width="${n(full)}" height="${n(total)}" class="graphopt" role="img"><title>${esc(data.title)}</title><style>${options.style}</style><rect class="ground" width="100%" height="100%"/>${MARKERS}${out.join("")}</svg>\n`;
  }

  root.graphoptScene = { scene, file, text, esc, amount, change, percent, sum, words, facts, LAYERS, MARKERS, mainOf };
})(globalThis);
