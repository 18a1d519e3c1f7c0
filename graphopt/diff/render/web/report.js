// A run's curves, by uPlot. Phases are lines across all charts; each series has a colour and a dash of its own.
"use strict";
(function () {
  const run = JSON.parse(document.getElementById("run").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  let charts = [];

  /** The lines at which phases begin, with their number above. */
  function phases(u) {
    const { ctx } = u, ratio = devicePixelRatio || 1;
    ctx.save();
    ctx.strokeStyle = colour("stop"); ctx.fillStyle = colour("stop"); ctx.lineWidth = 1.5 * ratio; ctx.setLineDash([5 * ratio, 4 * ratio]);
    ctx.font = `700 ${11 * ratio}px Helvetica, Arial, sans-serif`; ctx.textAlign = "left"; ctx.textBaseline = "top";
    let free = -1e9;
    for (const phase of run.phases) {
      if (!phase.epoch) continue;
      const x = u.valToPos(phase.epoch, "x", true), label = phase.label, wide = ctx.measureText(label).width;
      if (x < u.bbox.left - 1 || x > u.bbox.left + u.bbox.width + 1) continue;
      ctx.beginPath(); ctx.moveTo(x, u.bbox.top); ctx.lineTo(x, u.bbox.top + u.bbox.height); ctx.stroke();
      const start = Math.min(x + 4 * ratio, u.bbox.left + u.bbox.width - wide);
      if (start > free) { ctx.fillText(label, start, u.bbox.top + 3 * ratio); free = start + wide + 8 * ratio; }
    }
    ctx.restore();
  }

  /** Without a pointer over the chart, the legend shows the last values. */
  function latest(u) {
    if (u.legend.idx === null || u.legend.idx === undefined) u.setLegend({ idx: u.data[0].length - 1 });
  }

  /** In the legend: the value there, or the last one before, where a curve has fewer points than others. */
  function shown(u, value, series, at) {
    while (at > 0 && (value === null || value === undefined)) { at -= 1; value = u.data[series][at]; }
    return value === null || value === undefined ? "–" : Number(value.toPrecision(4)).toString();
  }

  const palette = [["after", []], ["features", [6, 4]], ["good", [2, 3]], ["stop", [8, 3, 2, 3]]];

  function draw() {
    for (const c of charts) c.destroy();
    charts = [];
    for (const host of document.querySelectorAll("[data-chart]")) {
      const chart = run.charts[host.dataset.chart];
      host.replaceChildren();
      if (!chart || !chart.x.length) {
        const p = document.createElement("p");
        p.className = "empty"; p.textContent = "nothing measured yet"; host.append(p);
        continue;
      }
      const axis = { stroke: colour("muted"), grid: { stroke: colour("line"), width: 0.5 }, ticks: { stroke: colour("line"), width: 0.5 }, font: "11px Helvetica, Arial, sans-serif" };
      const options = {
        width: host.clientWidth, height: innerWidth < 640 ? 200 : 240, padding: [10, 12, 0, 0],
        scales: {
          x: { time: false, range: [0, run.until] },
          y: chart.log ? { distr: 3, range: (u, low, high) => [low / 1.3, high * 2] } : { range: (u, low, high) => { const pad = (chart.zero ? high : high - low) || Math.abs(high) || 1; return [chart.zero ? 0 : low - 0.06 * pad, high + 0.2 * pad]; } },
        },
        axes: [{ ...axis, label: "epochs trained", size: 28, labelSize: 16, labelGap: 0, labelFont: "11px Helvetica, Arial, sans-serif" }, { ...axis, size: 52 }],
        series: [{ label: "epochs trained", value: (u, v) => (v === null ? "–" : v.toFixed(2)) }, ...chart.series.map((s, i) => ({ label: s.name, stroke: colour(palette[i % palette.length][0]), width: 2, dash: palette[i % palette.length][1], spanGaps: true, points: { show: s.points, size: 6, fill: colour(palette[i % palette.length][0]) }, value: shown }))],
        hooks: { draw: [phases], ready: [latest], setLegend: [latest] },
        cursor: { sync: { key: "run" } },
        legend: { live: true },
      };
      charts.push(new uPlot(options, [chart.x, ...chart.series.map((s) => s.y)], host));
    }
  }

  document.querySelector(".theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    const inner = document.querySelector("iframe").contentDocument;
    if (inner) inner.documentElement.dataset.theme = root.dataset.theme;
    draw();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
  draw();
  document.documentElement.dataset.ready = "1";
})();
