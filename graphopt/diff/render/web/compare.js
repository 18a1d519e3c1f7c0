// Rows of a comparison, by uPlot: points with error bars for trade-offs, means with a band for curves. Each row keeps its colour and dash.
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("comparison").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const font = "11px Helvetica, Arial, sans-serif";
  let charts = [];

  const styles = data.rows.map((row) => ({ ...row, ink: () => colour(row.colour) }));

  /** The band of one deviation around each mean. */
  function bands(chart) {
    return (u) => {
      const { ctx } = u;
      ctx.save();
      chart.series.forEach((series, i) => {
        if (!series.low) return;
        const points = chart.x.map((x, k) => [x, series.low[k], series.high[k]]).filter((p) => p[1] !== null);
        ctx.fillStyle = styles[series.row].ink(); ctx.globalAlpha = 0.14; ctx.beginPath();
        points.forEach(([x, , high], k) => ctx[k ? "lineTo" : "moveTo"](u.valToPos(x, "x", true), u.valToPos(high, "y", true)));
        points.reverse().forEach(([x, low]) => ctx.lineTo(u.valToPos(x, "x", true), u.valToPos(low, "y", true)));
        ctx.closePath(); ctx.fill();
      });
      ctx.restore();
    };
  }

  /** Points with a bar of one deviation each way, and the row's name beside each: below the one before where two would meet. */
  function points(chart) {
    return (u) => {
      const { ctx } = u, ratio = devicePixelRatio || 1, taken = [];
      ctx.save();
      ctx.lineWidth = 1.5 * ratio; ctx.font = `${11 * ratio}px Helvetica, Arial, sans-serif`; ctx.textBaseline = "middle"; ctx.textAlign = "left";
      for (const p of chart.points) {
        const style = styles[p.row], x = u.valToPos(p.x, "x", true), y = u.valToPos(p.y, "y", true);
        ctx.strokeStyle = ctx.fillStyle = style.ink();
        ctx.beginPath();
        ctx.moveTo(x, u.valToPos(p.y - p.dy, "y", true)); ctx.lineTo(x, u.valToPos(p.y + p.dy, "y", true));
        ctx.moveTo(u.valToPos(p.x - p.dx, "x", true), y); ctx.lineTo(u.valToPos(p.x + p.dx, "x", true), y);
        ctx.stroke();
        ctx.beginPath(); ctx.arc(x, y, 4.5 * ratio, 0, 7); ctx.fill();
      }
      for (const p of chart.points) {
        const style = styles[p.row], x = u.valToPos(p.x, "x", true), y = u.valToPos(p.y, "y", true);
        const wide = ctx.measureText(style.name).width, right = u.bbox.left + u.bbox.width;
        const left = x + 8 * ratio + wide > right ? Math.max(u.bbox.left, x - 8 * ratio - wide) : x + 8 * ratio;
        let at = y - 9 * ratio;
        while (taken.some((t) => Math.abs(t.at - at) < 13 * ratio && left < t.left + t.wide && t.left < left + wide)) at += 13 * ratio;
        taken.push({ left, wide, at });
        ctx.lineWidth = 3 * ratio; ctx.strokeStyle = colour("card"); ctx.strokeText(style.name, left, at); ctx.lineWidth = 1.5 * ratio;
        ctx.fillStyle = colour("ink"); ctx.fillText(style.name, left, at);
      }
      ctx.restore();
    };
  }

  function range(values, spreads, zero) {
    const low = Math.min(...values.map((v, i) => v - spreads[i])), high = Math.max(...values.map((v, i) => v + spreads[i]));
    const pad = 0.15 * (high - low) || 0.1 * Math.abs(high) || 1;
    return [zero ? Math.max(0, low - pad) : low - pad, high + pad];
  }

  function scatter(host, chart, common, axis) {
    const all = chart.points, xs = all.map((p) => p.x), ys = all.map((p) => p.y);
    const scales = { x: { time: false, range: () => range(xs, all.map((p) => p.dx), true) }, y: { range: () => range(ys, all.map((p) => p.dy), false) } };
    const order = [...all].sort((a, b) => a.x - b.x);
    const nothing = { show: true, paths: () => null, points: { show: false } };
    return new uPlot({ ...common, scales, axes: [{ ...axis, size: 28 }, { ...axis, size: 52 }], series: [{}, nothing], hooks: { draw: [points(chart)] } }, [order.map((p) => p.x), order.map((p) => p.y)], host);
  }

  function curves(host, chart, common, axis) {
    const series = chart.series.map((s) => ({ label: styles[s.row].name, stroke: styles[s.row].ink(), width: 2, dash: styles[s.row].dash, spanGaps: true, points: { show: chart.x.length < 40, size: 5, fill: styles[s.row].ink() } }));
    const known = (values) => values.filter((v) => v !== null);
    const ends = chart.series.flatMap((s) => [...known(s.low), ...known(s.high)]);
    const scales = { x: { time: false }, y: { range: () => [Math.max(Math.min(0, ...chart.series.flatMap((s) => known(s.y))), Math.min(...ends)), 1.05 * Math.max(...ends)] } };
    return new uPlot({ ...common, scales, axes: [{ ...axis, label: "epochs trained", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500], size: 28, labelSize: 16, labelGap: 0, labelFont: font }, { ...axis, size: 52 }], series: [{}, ...series], hooks: { draw: [bands(chart)] } }, [chart.x, ...chart.series.map((s) => s.y)], host);
  }

  function draw() {
    for (const c of charts) c.destroy();
    charts = [];
    for (const host of document.querySelectorAll("[data-chart]")) {
      const chart = data.charts[host.dataset.chart];
      host.replaceChildren();
      if (!(chart.points || chart.x).length) {
        const p = document.createElement("p");
        p.className = "empty"; p.textContent = "not known"; host.append(p);
        continue;
      }
      const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 0.5 }, ticks: { stroke: colour("line"), width: 0.5 }, font };
      const common = { width: host.clientWidth, height: innerWidth < 640 ? 220 : 280, padding: [10, 12, 0, 0], cursor: { show: false }, legend: { show: false } };
      charts.push((chart.points ? scatter : curves)(host, chart, common, axis));
    }
  }

  document.querySelector(".theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    for (const frame of document.querySelectorAll("iframe")) if (frame.contentDocument) frame.contentDocument.documentElement.dataset.theme = root.dataset.theme;
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  draw();
  document.documentElement.dataset.ready = "1";
})();
