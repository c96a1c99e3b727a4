// The plots of the numbers in the page, one a metric with a line a run; and the table of finals, sorted at a click.
"use strict";
const runs = JSON.parse(document.getElementById("numbers").textContent);
const { titles, noisy } = JSON.parse(document.getElementById("metrics").textContent); // noisy: of which a mean can be drawn
const COMPACT = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const page = document.documentElement;
const plots = [];
let axis = "step", span = 1; // what x is, and how many steps a mean is of

const style = name => getComputedStyle(page).getPropertyValue(name).trim();

function shown(value) {
  if (value == null) return "–";
  const size = Math.abs(value);
  if (size && size < 1e-3) return (+value.toPrecision(4)).toExponential();
  return size < 1e5 ? String(+value.toPrecision(6)) : COMPACT.format(value);
}

// The mean of each value and those before it, as many as are asked for.
function means(values) {
  let sum = 0;
  return values.map((value, place) => {
    sum += value - (values[place - span] ?? 0);
    return sum / Math.min(place + 1, span);
  });
}

// The values of a metric on one axis for all runs, as uPlot takes them: x, then a row a run.
function table(key) {
  return uPlot.join(runs.map(({ columns }) => {
    const at = columns.step.map((_, place) => place).filter(place => columns[key]?.[place] != null);
    const values = at.map(place => columns[key][place]);
    return [at.map(place => columns[axis][place]), span > 1 && noisy.includes(key.split("/")[0]) ? means(values) : values];
  }));
}

function drawRestarts(plot) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.setLineDash([4, 4]);
  runs.forEach((run, number) => run.restarts.forEach(restart => {
    if (restart[axis] == null || !plot.series[number + 1].show) return;
    const x = plot.valToPos(restart[axis], "x", true);
    if (x < bbox.left || x > bbox.left + bbox.width) return;
    ctx.strokeStyle = style(`--run${number % 8}`);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
  }));
  ctx.restore();
}

function place(key) {
  const figure = document.createElement("figure");
  figure.innerHTML = "<figcaption></figcaption>";
  figure.firstChild.textContent = titles[key];
  document.getElementById("plots").append(figure);
  return [key, figure];
}

function draw([key, figure]) {
  const line = { stroke: style("--line"), width: 1 };
  const side = { stroke: style("--faint"), grid: line, ticks: line, values: (_, at) => at.map(shown) };
  const value = (_, number) => shown(number);
  plots.push(new uPlot({
    width: figure.clientWidth,
    height: 240,
    scales: { x: { time: false } },
    cursor: { sync: { key: "runs", setSeries: true } },
    focus: { alpha: 0.25 },
    axes: [side, { ...side, size: 60 }],
    series: [{ label: axis, value }, ...runs.map((run, number) => {
      const stroke = style(`--run${number % 8}`);
      const dash = [[], [8, 4], [2, 3]][Math.floor(number / 8) % 3]; // eight colours, then the same dashed
      return { label: run.name, stroke, width: 1.5, dash, value, points: { fill: stroke, size: 4 } };
    })],
    hooks: { draw: [drawRestarts] },
  }, table(key), figure));
}

const hidden = () => plots[0]?.series.map(one => one.show === false) ?? [];
const hide = which => which.forEach((is, number) => is && plots.forEach(plot => plot.setSeries(number, { show: false })));
const isZoomed = ({ data: [x], scales }) => scales.x.min > x[0] || scales.x.max < x.at(-1);

function drawAll() {
  const kept = hidden();
  plots.splice(0).forEach(plot => plot.destroy());
  document.getElementById("plots").replaceChildren();
  Object.keys(titles).map(place).forEach(draw); // a figure alone would be given the width of all
  hide(kept);
}

function sortBy(head, column) {
  const body = document.querySelector("#finals tbody");
  const down = head.ariaSort === "ascending";
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const order = (one, other) => value(one) - value(other) || value(one).localeCompare(value(other));
  body.append(...[...body.rows].sort((one, other) => (down ? -1 : 1) * order(one, other)));
  document.querySelectorAll("#finals thead th").forEach(other => { other.ariaSort = null; });
  head.ariaSort = down ? "descending" : "ascending";
}

document.querySelectorAll("#finals thead th").forEach((head, column) => { head.onclick = () => sortBy(head, column); });
document.querySelectorAll("#axes button").forEach(button => {
  button.onclick = () => {
    ({ axis = axis, span = span } = button.dataset);
    button.parentNode.querySelectorAll("button").forEach(one => { one.ariaPressed = one === button; });
    drawAll();
  };
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("resize", () => plots.forEach(plot => plot.setSize({ width: plot.root.parentNode.clientWidth, height: 240 })));
["beforeprint", "afterprint"].forEach((name, ends) => addEventListener(name, () => {
  page.toggleAttribute("data-print", !ends); // the light colours, and the width of paper
  drawAll();
}));
drawAll();

// A page that is written anew every so many seconds loads itself as often, with what was chosen on it, unless it is zoomed.
if (+page.dataset.every) {
  const kept = JSON.parse(sessionStorage.getItem(location.pathname));
  if (kept) {
    [`[data-axis="${kept.axis}"]`, `[data-span="${kept.span}"]`].forEach(button => document.querySelector(button).click());
    hide(kept.hidden);
  }
  setInterval(() => {
    if (plots.some(isZoomed)) return;
    sessionStorage.setItem(location.pathname, JSON.stringify({ axis, span, hidden: hidden() }));
    location.reload();
  }, page.dataset.every * 1000);
}
