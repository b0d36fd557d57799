"use strict";
// One Plotly chart a panel, all runs in each; and the phases of one run's steps, stacked.

const DASHES = ["solid", "dash", "dot"];
const WINDOW = 10; // steps of the mean
const DECAY = 0.9; // of the exponential moving average
const view = { axis: "step", smooth: "", hidden: new Set(), timeline: 0 };
const drawings = []; // functions that draw a chart anew

function timeUnit() {
  const longest = Math.max(...DATA.runs.map((run) => run.columns.seconds.at(-1)));
  return longest > 7200 ? ["hours", 3600] : ["minutes", 60];
}

function horizontal(run) {
  const [, seconds] = timeUnit();
  if (view.axis === "step") return run.columns.step;
  return run.columns.seconds.map((value) => value / seconds);
}

// Of the values that were measured: the mean of the last WINDOW, before there are as many, of those
// there are; or the average in which each older value weighs DECAY of the next.
function smoothed(values) {
  if (view.smooth === "ema") {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = DECAY * sum + value;
      weight = DECAY * weight + 1;
      return sum / weight;
    });
  }
  const recent = [];
  return values.map((value) => {
    if (value === null) return null;
    recent.push(value);
    if (recent.length > WINDOW) recent.shift();
    return recent.reduce((sum, x) => sum + x, 0) / recent.length;
  });
}

function lines(panel) {
  const found = [];
  DATA.runs.forEach((run, index) => {
    if (view.hidden.has(index)) return;
    Object.entries(panel.series).forEach(([metric, label], number) => {
      const values = run.columns[metric];
      if (!values || values.every((value) => value === null)) return;
      const measured = values.filter((value) => value !== null).length;
      const sparse = metric.startsWith("eval/") || measured < values.length / 4;
      const line = { color: runColour(index), width: 1.8, dash: DASHES[number] };
      const x = panel.against ? run.columns[panel.against] : horizontal(run);
      if (!x) return;
      const base = { x, y: values, type: "scatter", connectgaps: true, line };
      const name = label ? `${run.name}, ${label}` : run.name;
      if (view.smooth && !sparse) {
        const faint = { ...base, mode: "lines", opacity: 0.22, hoverinfo: "skip" };
        found.push({ ...faint, line: { ...line, width: 1 }, meta: { metric, run: index, raw: true } });
        base.y = smoothed(values);
      }
      base.mode = sparse ? "lines+markers" : "lines";
      base.marker = { size: 6, color: line.color };
      found.push({ ...base, name, hovertemplate: "%{y:.4g}", meta: { metric, run: index } });
    });
  });
  return found;
}

// Where a watch was tripped: a line where it began, and a bar of the run's colour along the axis.
function alertShapes(indices) {
  return indices.flatMap((index) => {
    const run = DATA.runs[index];
    const x = horizontal(run);
    const at = (step) => {
      const place = run.columns.step.findIndex((other) => other >= step);
      return x[place < 0 ? x.length - 1 : place];
    };
    return run.alerts.flatMap((alert) => {
      const [first, last] = [at(alert.first), at(alert.last)];
      const place = { xref: "x", yref: "paper", layer: "below", name: alert.name };
      const line = { color: colour("--alert"), width: 1, dash: "dot" };
      const bar = { color: runColour(index), width: 1.5 };
      return [
        { ...place, type: "line", x0: first, x1: first, y0: 0, y1: 1, line },
        { ...place, type: "rect", x0: first, x1: last, y0: -0.03, y1: 0, fillcolor: bar.color, line: bar },
      ];
    });
  });
}

function layout(share, shapes, against = "") {
  const [word] = timeUnit();
  const axis = { gridcolor: colour("--rule"), zeroline: false, linecolor: colour("--rule"), automargin: true };
  return {
    margin: { l: 44, r: 10, t: 8, b: 34 },
    showlegend: false,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 11, color: colour("--soft") },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--rule"), font: { color: colour("--ink") } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: { ...axis, title: { text: against || (view.axis === "step" ? "step" : word), standoff: 4 }, showgrid: false },
    yaxis: { ...axis, nticks: 6, ...(share ? { range: [-0.02, 1.02] } : {}) },
    shapes,
  };
}

function chart(title, unit) {
  const caption = make("figcaption", "", make("strong", "", title));
  if (unit) caption.append(make("span", "", unit));
  const drawing = make("div", "chart");
  drawing.setAttribute("role", "img");
  drawing.setAttribute("aria-label", `Chart: ${title}`);
  return [make("figure", "", caption, drawing), caption, drawing];
}

function plot(element, traces, appearance) {
  return Plotly.react(element, traces, appearance, { displayModeBar: false, responsive: true });
}

function addPanel(sheet, panel) {
  const [figure, caption, drawing] = chart(panel.title, panel.unit);
  const labels = Object.values(panel.series);
  if (labels.length > 1) {
    labels.forEach((label, i) => caption.append(make("span", `series ${DASHES[i]}`, label)));
  }
  figure.dataset.metrics = Object.keys(panel.series).join(" ");
  figure.dataset.against = panel.against;
  sheet.append(figure);
  drawings.push(() => {
    const shown = DATA.runs.map((_, i) => i).filter((i) => !view.hidden.has(i));
    const traces = lines(panel);
    const shapes = panel.against ? [] : alertShapes(shown);
    const appearance = layout(panel.share, shapes, panel.against && panel.unit);
    if (panel.against) appearance.hovermode = "closest";
    const nothing = traces.every((trace) => trace.y.every((value) => !value));
    if (nothing && !panel.share) appearance.yaxis.range = [-0.02, 1];
    return plot(drawing, traces, appearance);
  });
}

const PHASE_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999"];

function addTimeline(sheet) {
  const [figure, caption, drawing] = chart("Phases of a step", "seconds");
  figure.id = "timeline";
  figure.className = "whole";
  const marks = make("span");
  const tallest = make("span");
  if (DATA.runs.length > 1) {
    const select = make("select", "", ...DATA.runs.map((run, i) => option(i, run.name)));
    select.setAttribute("aria-label", "Run whose phases are drawn");
    select.addEventListener("change", () => {
      view.timeline = Number(select.value);
      draw();
    });
    caption.append(select);
  }
  caption.append(marks, tallest);
  sheet.append(figure);
  const draw = () => {
    const run = DATA.runs[view.timeline];
    marks.replaceChildren();
    const traces = run.phases.map((phase, i) => {
      const mark = make("span", "series block", `${phase} `);
      mark.style.setProperty("--mark", PHASE_COLOURS[i % PHASE_COLOURS.length]);
      marks.append(mark);
      return {
        x: horizontal(run),
        y: run.columns[`time/${phase}_s`].map((value) => value ?? 0),
        name: phase,
        stackgroup: "phases",
        mode: "lines",
        line: { width: 0, shape: "hv" },
        fillcolor: PHASE_COLOURS[i % PHASE_COLOURS.length],
        hovertemplate: "%{y:.3g} s",
      };
    });
    const appearance = layout(false, alertShapes([view.timeline]));
    // The first step compiles: it must not flatten the others.
    const totals = run.columns.step.map((_, i) => traces.reduce((sum, t) => sum + t.y[i], 0));
    const usual = totals.toSorted((a, b) => a - b)[Math.floor(0.97 * (totals.length - 1))];
    const most = Math.max(...totals);
    const cut = most > 2 * usual;
    if (cut) appearance.yaxis.range = [0, 1.3 * usual];
    const step = run.columns.step[totals.indexOf(most)];
    tallest.textContent = cut ? `${most.toFixed(1)} s at step ${step}, beyond the top` : "";
    return plot(drawing, traces, appearance);
  };
  drawings.push(draw);
}

function drawAll() {
  DATA.runs.forEach((_, i) => {
    const button = $("legend").children[i];
    button.setAttribute("aria-pressed", String(!view.hidden.has(i)));
    button.firstChild.style.borderColor = runColour(i);
  });
  // One a frame, so that the page can be used meanwhile; only the last request is carried on.
  const mine = (drawAll.latest = Symbol("drawing"));
  document.documentElement.dataset.charts = "drawing";
  const next = (i) => {
    if (mine !== drawAll.latest) return;
    if (i === drawings.length) {
      document.documentElement.dataset.charts = "drawn";
      return;
    }
    drawings[i]();
    setTimeout(next, 0, i + 1);
  };
  next(0);
}

DATA.runs.forEach((run, i) => {
  const button = make("button", "", make("i"), run.name);
  button.type = "button";
  button.addEventListener("click", () => {
    if (!view.hidden.delete(i)) view.hidden.add(i);
    drawAll();
  });
  $("legend").append(button);
});
for (const group of DATA.groups) {
  const sheet = make("div", "sheet");
  const section = make("section", "", make("h2", "", group.title), sheet);
  $("charts").append(section);
  if (group.title === "Throughput") addTimeline(sheet);
  for (const panel of group.panels) addPanel(sheet, panel);
}
for (const input of document.querySelectorAll("input[name=axis]")) {
  input.addEventListener("change", () => {
    view.axis = input.value;
    drawAll();
  });
}
$("smooth").addEventListener("change", () => {
  view.smooth = $("smooth").value;
  drawAll();
});
themeListeners.push(drawAll);
drawAll();
