// The page: stores the drawn pieces, moves what changes, and handles mouse, touch and keyboard.
"use strict";
(function () {
  const { scene, esc, amount, change, percent, sum, words, facts, MARKERS, LAYERS } = globalThis.graphoptScene;
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (selector) => document.querySelector(selector);
  const NS = "http://www.w3.org/2000/svg";
  const svg = $("main > svg"), stage = $(".stage"), aside = $("aside");
  const state = { labelled: data.labelled, columns: 0, groupOf: (piece) => piece.group, open: new Set(), closed: new Set(), level: "folded", metric: data.metric, uniform: data.phases.length > 1, nodes: (row) => data.pool[row.nodes] || [] };
  let at = data.show, filter = new Set(), query = "", chosen = null, drawn = new Map(), current = null;
  const view = { x: 0, y: 0, k: 1, touched: false };
  const phase = () => data.phases[at];

  // -- drawing -----------------------------------------------------------------------------------------------------------------
  stage.insertAdjacentHTML("beforebegin", MARKERS);
  const layers = Object.fromEntries(LAYERS.map((name) => { const g = document.createElementNS(NS, "g"); g.setAttribute("class", "layer-" + name); stage.append(g); return [name, g]; }));

  function draw(keepView) {
    const box = svg.getBoundingClientRect();
    state.columns = keepView && current ? current.columns : 0;
    current = scene(data, phase(), state, Math.max(280, box.width - 16), Math.max(240, box.height - 16));
    const old = drawn;
    drawn = new Map();
    const animate = old.size > 0 && current.pieces.length < 400;
    for (const piece of current.pieces) {
      let entry = old.get(piece.key);
      if (!entry) {
        const element = document.createElementNS(NS, piece.d ? "path" : "g");
        entry = { element, html: null };
        layers[piece.layer].append(element);
      }
      const { element } = entry;
      if (piece.d) {
        if (entry.d !== piece.d) element.setAttribute("d", piece.d);
        element.setAttribute("class", piece.cls);
        if (piece.arrow) element.setAttribute("marker-end", `url(#${piece.cls.includes("arc") ? "arc" : "tip"})`);
        entry.d = piece.d;
      } else {
        element.setAttribute("class", piece.cls + (animate ? " move" : ""));
        element.style.transform = `translate(${piece.x}px, ${piece.y}px)`;
        if (entry.html !== piece.html) element.innerHTML = piece.html;
        entry.html = piece.html;
        if (piece.id) {
          element.setAttribute("tabindex", "0");
          element.setAttribute("role", "button");
          element.setAttribute("data-id", piece.id);
          element.setAttribute("aria-label", piece.label);
          if (piece.type !== "row" || piece.open) element.setAttribute("aria-expanded", String(piece.open)); else element.removeAttribute("aria-expanded");
        }
      }
      entry.piece = piece;
      drawn.set(piece.key, entry);
      old.delete(piece.key);
    }
    for (const { element } of old.values()) element.remove();
    // Reading order is tab order.
    const cards = current.order.map((id) => drawn.get("card:" + id).element);
    cards.forEach((element, i) => { if (layers.cards.children[i] !== element) layers.cards.insertBefore(element, layers.cards.children[i] || null); });
    if (!keepView) fit();
    mark();
  }

  function apply() { stage.setAttribute("transform", `translate(${view.x.toFixed(2)} ${view.y.toFixed(2)}) scale(${view.k.toFixed(4)})`); }

  function fit() {
    const box = svg.getBoundingClientRect(), margin = 8;
    const across = (box.width - 2 * margin) / current.width, down = (box.height - 2 * margin) / (current.height + 20);
    // Whole if it stays readable, else as wide as the window, from the top.
    const k = down >= 0.78 ? Math.min(1.15, across, down) : Math.min(1, across);
    view.k = Math.max(0.05, Math.min(k, across));
    view.x = Math.max(margin, (box.width - current.width * view.k) / 2);
    view.y = margin + (current.height * view.k < box.height ? Math.min(24, (box.height - current.height * view.k) / 2) : 16 * view.k);
    view.touched = false;
    apply();
  }

  function zoom(factor, cx, cy) {
    const box = svg.getBoundingClientRect();
    const x = cx === undefined ? box.width / 2 : cx, y = cy === undefined ? box.height / 2 : cy;
    const k = Math.max(0.05, Math.min(4, view.k * factor));
    view.x = x - ((x - view.x) * k) / view.k; view.y = y - ((y - view.y) * k) / view.k; view.k = k; view.touched = true;
    apply();
  }

  function reveal(id) {
    const entry = drawn.get("card:" + id);
    if (!entry) return;
    const p = entry.piece, box = svg.getBoundingClientRect(), covered = !aside.hidden && innerWidth > 640 ? 380 : 0;
    const x = view.x + p.x * view.k, y = view.y + p.y * view.k, w = p.width * view.k, h = Math.min(p.height * view.k, box.height - 40);
    const bottom = !aside.hidden && innerWidth <= 640 ? box.height * 0.38 : box.height;
    let dx = 0, dy = 0;
    if (x < 10) dx = 10 - x; else if (x + w > box.width - covered - 10) dx = box.width - covered - 10 - x - w;
    if (y < 10) dy = 10 - y; else if (y + h > bottom - 10) dy = bottom - 10 - y - h;
    if (dx || dy) { view.x += dx; view.y += dy; view.touched = true; apply(); }
  }

  // -- search and filter -------------------------------------------------------------------------------------------------------
  function hits(row) {
    if (!query) return false;
    if (row.name.toLowerCase().includes(query) || (row.former || "").toLowerCase().includes(query) || row.kind.toLowerCase().includes(query) || row.paths.some((p) => p.toLowerCase().includes(query))) return true;
    return state.nodes(row).some((n) => n.name.toLowerCase().includes(query) || n.what.toLowerCase().includes(query) || n.path.toLowerCase().includes(query));
  }

  function mark() {
    const rows = new Map(phase().rows.map((r) => [r.name, r]));
    let found = 0;
    for (const { element, piece } of drawn.values()) {
      if (!piece.rows) continue;
      const mine = piece.rows.map((name) => rows.get(name)).filter(Boolean);
      const byStatus = !filter.size || mine.some((r) => r.statuses.some((s) => filter.has(s)));
      const hit = mine.filter(hits).length;
      found += hit;
      element.classList.toggle("dim", !byStatus || (query !== "" && !hit));
      element.classList.toggle("hit-by-search", hit > 0);
      element.classList.toggle("chosen", piece.id === chosen);
    }
    $(".found").textContent = query ? (found ? `${found} block${found === 1 ? "" : "s"} found` : "nothing found") : filter.size ? `showing ${[...filter].join(", ")}` : "";
    return found;
  }

  // -- details -----------------------------------------------------------------------------------------------------------------
  function show(id) {
    const entry = drawn.get("card:" + id);
    if (!entry) { hide(); return; }
    chosen = id;
    const rows = entry.piece.rows.map((name) => phase().rows.find((r) => r.name === name)), row = rows[0], one = rows.length === 1;
    const statuses = row.statuses.map((s) => `<span class="s-${esc(s)}"><b class="tint">${esc(data.styles[s].glyph)}</b> ${esc(s)}</span>`).join(" &nbsp;");
    const out = [`<h2>${esc(one ? row.name : rows[0].name + " … " + rows[rows.length - 1].name)}</h2><p>${esc(row.kind)}${one ? "" : ` · ${rows.length} blocks, sums`}</p>`];
    out.push(`<p class="state">${statuses}</p>`);
    if (row.changed && row.was.length && row.was.join() !== "unchanged") out.push(`<p>${esc(words(row))}</p>`);
    if (row.former) out.push(`<p>in the first of the two: ${esc(one ? row.former : row.former + " …")}</p>`);
    const meaning = row.statuses.map((s) => data.styles[s].meaning).filter(Boolean).join("; ");
    if (meaning) out.push(`<p class="subtitle">${esc(meaning)}</p>`);
    if (facts(row)) out.push(`<p>${esc(facts(row))}</p>`);
    for (const message of row.messages) out.push(`<p>⚠ ${esc(message)}</p>`);
    const figures = Object.keys(data.figures).filter((k) => (row.before && k in row.before) || (row.after && k in row.after));
    if (figures.length) {
      out.push(`<h3>One training step, batch ${esc(data.batch)}</h3><table><tr><th></th><th>before</th><th>after</th><th></th></tr>`);
      for (const k of figures) {
        const b = sum(rows, k, "before"), a = sum(rows, k, "after");
        out.push(`<tr><td>${esc(data.figures[k])}</td><td>${b === null ? "–" : esc(amount(k, b))}</td><td>${a === null ? "–" : esc(amount(k, a))}</td><td>${a === null || b === null ? "" : esc(percent(b, a))}</td></tr>`);
      }
      out.push("</table>");
    }
    const shape = (s) => (s ? s.join(" × ") : "–");
    out.push(`<h3>Shapes</h3><p>in ${esc(shape(row.input_shape))}<br>out ${esc(shape(rows[rows.length - 1].output_shape))}</p><p>${row.backward ? "The backward pass runs through it." : "The backward pass does not reach it."}</p>`);
    for (const i of row.passes) {
      const pass = phase().passes[i];
      if (pass) out.push(`<h3>${esc(pass.name)}, pass ${i + 1}${pass.line ? `, ${esc(data.spec || "spec")} line ${pass.line}` : ""}</h3><pre>${esc(pass.text)}</pre>`);
    }
    const nodes = state.nodes(row).filter(globalThis.graphoptLayout.drawn), hidden = state.nodes(row).length - nodes.length;
    if (one && nodes.length) {
      out.push(`<h3>${nodes.length} operation${nodes.length === 1 ? "" : "s"}${hidden ? `, and ${hidden} of shapes and weights` : ""}</h3><ul>`);
      for (const n of nodes.slice(0, 400)) out.push(`<li>${n.statuses[0] === "unchanged" ? "" : `<span class="s-${esc(n.statuses[0])}"><b class="tint">${esc(data.styles[n.statuses[0]].glyph)}</b></span> `}<b>${esc(n.what)}</b> ${esc(n.name)}${n.shape ? ` <span class="subtitle">${esc(n.shape.join("×"))}</span>` : ""}</li>`);
      out.push("</ul>");
    } else if (!one) out.push(`<h3>Blocks</h3><ul>${rows.map((r) => `<li>${esc(r.name)} <span class="subtitle">${esc(words(r))}</span></li>`).join("")}</ul>`);
    $(".details").innerHTML = out.join("");
    aside.hidden = false;
    aside.scrollTop = 0;
    mark();
    reveal(id);
  }

  function hide() {
    const last = chosen;
    chosen = null; aside.hidden = true; mark();
    if (last && drawn.has("card:" + last)) drawn.get("card:" + last).element.focus({ preventScroll: true });
  }

  // -- fold and unfold ---------------------------------------------------------------------------------------------------------
  function toggle(id) {
    const entry = drawn.get("card:" + id);
    if (!entry) return;
    const { piece } = entry, first = "r:" + piece.rows[0];
    if (piece.type === "group") { const key = id.slice(2); state.closed.delete(key); state.open.add(key); }
    else if (piece.type === "fold") state.open.add(id);
    else if (state.open.has(id)) state.open.delete(id);
    else state.open.add(id);
    const rows = phase().groups.find((f) => f.rows[0] === piece.rows[0]);
    const focus = piece.type === "group" && rows && rows.rows.length > 1 && !state.open.has("f:" + piece.rows[0]) && state.level !== "blocks" && state.level !== "operations" ? "f:" + piece.rows[0] : first;
    redraw(piece.type === "row" ? id : focus, id);
  }

  function toggleGroup(key) {
    if (state.closed.has(key)) state.closed.delete(key); else { state.closed.add(key); state.open.delete(key); }
    redraw("g:" + key, [...drawn.values()].map((d) => d.piece).filter((p) => p.id && state.groupOf(p) === key).map((p) => p.id)[0]);
  }

  function foldBack(id) {
    const entry = drawn.get("card:" + id);
    if (entry && entry.piece.fold && state.open.has(entry.piece.fold)) { state.open.delete(entry.piece.fold); redraw(entry.piece.fold, id); return true; }
    return false;
  }

  /** Draws again; what was opened or shut stays where it is on the screen. */
  function redraw(focus, from) {
    const old = drawn.get("card:" + (from || focus));
    draw(Boolean(focus));
    const entry = focus && drawn.get("card:" + focus);
    if (entry && old) {
      view.x += (old.piece.x - entry.piece.x) * view.k; view.y += (old.piece.y - entry.piece.y) * view.k; view.touched = true;
      apply();
    }
    if (entry) { entry.element.focus({ preventScroll: true }); reveal(focus); }
    if (chosen && !drawn.has("card:" + chosen)) { chosen = null; aside.hidden = true; }
  }

  function setLevel(level) {
    state.level = level; state.open.clear(); state.closed.clear();
    for (const b of document.querySelectorAll(".levels button")) b.setAttribute("aria-pressed", String(b.dataset.level === level));
    redraw(null);
  }

  function setPhase(next) {
    at = Math.max(0, Math.min(data.phases.length - 1, next));
    document.querySelectorAll(".phases button").forEach((b, i) => b.setAttribute("aria-pressed", String(i === at)));
    tiles(); filters(); draw(true); showPhase();
    if (chosen) show(chosen);
  }

  // -- head, tools -------------------------------------------------------------------------------------------------------------
  function tiles() {
    const totals = phase().totals;
    $(".tiles").innerHTML = totals && data.before ? data.tiles.filter((k) => k in data.before && k in totals).map((k) => `<div class="tile" role="listitem"><div class="what">${esc(data.figures[k])}</div><div class="big${totals[k] < 0.9995 * data.before[k] ? " good" : ""}">${esc(percent(data.before[k], totals[k]))}</div><div class="small">${esc(change(k, data.before[k], totals[k]))}</div></div>`).join("") : "";
  }

  function filters() {
    const counts = phase().counts;
    for (const s of [...filter]) if (!(s in counts)) filter.delete(s);
    $(".filters").innerHTML = Object.entries(counts).map(([s, c]) => `<button class="s-${esc(s)}" data-status="${esc(s)}" aria-pressed="${filter.has(s)}" title="${esc(data.styles[s].meaning || s)}"><b class="tint">${esc(data.styles[s].glyph)}</b>${esc(s)} ${c}</button>`).join("");
  }

  /** Rows that scroll where they are wider than the window: their ends fade where there is more. */
  function fadeEnds() {
    for (const host of document.querySelectorAll(".phases, .tiles, .tools")) {
      const left = host.scrollLeft, most = host.scrollWidth - host.clientWidth;
      host.classList.toggle("more-left", left > 2);
      host.classList.toggle("more-right", left < most - 2);
    }
  }

  function showPhase() {
    const host = $(".phases"), b = host.querySelector('[aria-pressed="true"]');
    if (!b) return;
    host.scrollLeft += Math.min(0, b.offsetLeft - 40 - host.scrollLeft) + Math.max(0, b.offsetLeft + b.offsetWidth + 40 - host.clientWidth - host.scrollLeft);
    fadeEnds();
  }

  function phaseButtons() {
    const host = $(".phases");
    if (data.phases.length < 2) return;
    host.hidden = false;
    host.innerHTML = data.phases.map((f, i) => {
      const before = i ? new Map(data.phases[i - 1].rows.map((r) => [r.name, r.statuses.join()])) : new Map();
      const strip = `<span class="strip${f.rows.length > 40 ? " dense" : ""}">${f.rows.map((r) => `<i class="s-${esc(r.statuses[0])}${r.statuses[0] === "unchanged" ? "" : " ink"}${i && before.get(r.name) === r.statuses.join() ? " same" : ""}"></i>`).join("")}</span>`;
      return `<button data-phase="${i}" aria-pressed="${i === at}" title="${esc(f.label)}"><span class="when">epoch ${Number(f.epoch.toFixed(2))}</span>${strip}<span class="what">${esc(f.label)}</span></button>`;
    }).join("");
    host.addEventListener("click", (event) => { const b = event.target.closest("button"); if (b) setPhase(Number(b.dataset.phase)); });
    showPhase();
  }

  $("h1").textContent = data.title;
  $(".subtitle").textContent = data.subtitle;
  if (data.notes.length) { $(".notes").hidden = false; $(".notes").textContent = data.notes.join(" "); }
  const select = $(".metric select");
  for (const key of data.metrics) { const o = document.createElement("option"); o.value = key; o.textContent = "Bars: " + data.figures[key]; select.append(o); }
  select.value = state.metric;
  select.addEventListener("change", () => { state.metric = select.value; draw(true); });
  $(".filters").addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    const s = b.dataset.status;
    if (filter.has(s)) filter.delete(s); else filter.add(s);
    b.setAttribute("aria-pressed", String(filter.has(s)));
    mark();
  });
  $(".levels").addEventListener("click", (event) => { const b = event.target.closest("button"); if (b) setLevel(b.dataset.level); });
  const box = $(".search input");
  box.addEventListener("input", () => { query = box.value.trim().toLowerCase(); mark(); });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { box.value = ""; query = ""; mark(); svg.focus(); }
    if (event.key === "Enter") { const first = current.order.find((id) => drawn.get("card:" + id).element.classList.contains("hit-by-search")); if (first) { show(first); drawn.get("card:" + first).element.focus({ preventScroll: true }); } }
  });
  function theme() {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  }
  if (window.frameElement) document.querySelector("[data-do=theme]").hidden = true; // the page around it has that button

  // -- saving ------------------------------------------------------------------------------------------------------------------
  /** The picture as it is opened and folded now, as a file: light, with a heading and a legend. */
  function picture() {
    return globalThis.graphoptScene.file(data, phase(), { level: state.level, metric: state.metric, open: state.open, closed: state.closed, style: data.style });
  }

  function save(blob, ending) {
    const a = document.createElement("a");
    a.href = URL.createObjectURL(blob);
    a.download = data.title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 80) + "." + ending;
    a.click();
    setTimeout(() => URL.revokeObjectURL(a.href), 10000);
  }

  function saveSvg() { save(new Blob([picture()], { type: "image/svg+xml" }), "svg"); }

  function savePng() {
    const image = new Image();
    image.onload = () => {
      const canvas = document.createElement("canvas");
      canvas.width = 2 * image.width; canvas.height = 2 * image.height;
      canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => save(blob, "png"), "image/png");
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(picture());
  }
  addEventListener("beforeprint", fit);

  const actions = { svg: saveSvg, png: savePng, in: () => zoom(1.25), out: () => zoom(0.8), fit, theme };
  $(".view").addEventListener("click", (event) => { const b = event.target.closest("button"); if (b) actions[b.dataset.do](); });
  $("aside .close").addEventListener("click", hide);

  // -- mouse, touch, keyboard --------------------------------------------------------------------------------------------------
  const pointers = new Map();
  let moved = 0, pinch = 0;
  svg.addEventListener("pointerdown", (event) => { pointers.set(event.pointerId, event); moved = pointers.size > 1 ? 99 : 0; pinch = 0; });
  addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    pointers.set(event.pointerId, event);
    if (pointers.size === 2) {
      const [a, b] = [...pointers.values()], distance = Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY), origin = svg.getBoundingClientRect();
      if (pinch) zoom(distance / pinch, (a.clientX + b.clientX) / 2 - origin.left, (a.clientY + b.clientY) / 2 - origin.top);
      pinch = distance;
      return;
    }
    const dx = event.clientX - last.clientX, dy = event.clientY - last.clientY;
    moved += Math.abs(dx) + Math.abs(dy);
    if (moved > 4) { svg.classList.add("moving"); view.x += dx; view.y += dy; view.touched = true; apply(); }
  });
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, (event) => { pointers.delete(event.pointerId); pinch = 0; svg.classList.remove("moving"); });
  svg.addEventListener("wheel", (event) => {
    event.preventDefault();
    const origin = svg.getBoundingClientRect(), unit = event.deltaMode === 1 ? 18 : 1;
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY * unit * 0.01), event.clientX - origin.left, event.clientY - origin.top);
    else { view.x -= (event.shiftKey ? event.deltaY : event.deltaX) * unit; view.y -= (event.shiftKey ? 0 : event.deltaY) * unit; view.touched = true; apply(); }
  }, { passive: false });
  svg.addEventListener("click", (event) => {
    if (moved > 4) return;
    const arrow = event.target.closest("[data-fold]"), group = event.target.closest("[data-group]"), card = event.target.closest("[data-id]");
    if (arrow) toggle(arrow.dataset.fold);
    else if (group) toggleGroup(group.dataset.group);
    else if (card) show(card.dataset.id);
    else if (chosen) hide();
  });
  svg.addEventListener("dblclick", (event) => { const card = event.target.closest("[data-id]"); if (card) toggle(card.dataset.id); });
  addEventListener("keydown", (event) => {
    if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    const card = document.activeElement && document.activeElement.closest("[data-id]"), id = card && card.dataset.id, key = event.key;
    const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[key];
    if (step && (card || document.activeElement === svg || document.activeElement === document.body)) {
      const next = id ? current.order[current.order.indexOf(id) + step] : current.order[step > 0 ? 0 : current.order.length - 1];
      if (next) { drawn.get("card:" + next).element.focus({ preventScroll: true }); reveal(next); if (chosen) show(next); }
    } else if (key === "Enter" && card) show(id);
    else if (key === " " && card) toggle(id);
    else if (key === "Backspace" && card) foldBack(id);
    else if (key === "/") box.focus();
    else if (key === "Escape") { if (chosen) hide(); else { filter.clear(); query = ""; box.value = ""; filters(); mark(); } }
    else if (key === "+" || key === "=") zoom(1.25);
    else if (key === "-") zoom(0.8);
    else if (key === "0") fit();
    else if (key === "t") theme();
    else if (key === "[" || key === "]") setPhase(at + (key === "]" ? 1 : -1));
    else return;
    event.preventDefault();
  });
  let width = innerWidth;
  new ResizeObserver(() => { if (current && (Math.abs(innerWidth - width) > 4 || !view.touched)) { width = innerWidth; draw(false); } }).observe(svg);

  addEventListener("resize", fadeEnds);
  document.addEventListener("scroll", fadeEnds, true);
  tiles(); filters(); phaseButtons(); setLevel("folded"); fadeEnds();
  document.documentElement.dataset.ready = "1";
})();
