"use strict";
// Curves over the steps by uPlot: one cursor over all of them, marks of refreshes, smoothing, log axes.

const LINES = ["--blue", "--orange", "--teal", "--violet"];
const DASHES = [[], [5, 4], [2, 3], [9, 3, 2, 3]];
const charts = []; // those on the page: {plot, figure, lines, readout, steps}
let following = false;

// {title, unit, lines: [{label, run, key, colour, dash}]} of the curves of all shown runs, by title.
function pictures(runs) {
  const found = new Map();
  runs.forEach(({ run, colour }) => {
    for (const curve of run.curves ?? []) {
      const series = curve.series.filter(({ key }) =>
        (run.steps?.[key] ?? []).some((value) => value !== null),
      );
      if (!series.length) continue;
      const picture = found.get(curve.title) ?? { ...curve, lines: [] };
      found.set(curve.title, picture);
      series.forEach(({ key, label }, place) => {
        const alone = runs.length === 1;
        picture.lines.push({
          run,
          key,
          label: alone ? label : series.length > 1 ? `${run.name}, ${label}` : run.name,
          colour: alone ? LINES[place % LINES.length] : colour,
          dash: alone ? [] : DASHES[place % DASHES.length],
        });
      });
    }
  });
  return [...found.values()];
}

function smoothed(column, span) {
  if (span <= 1) return column;
  const keep = 1 - 1 / span;
  let [sum, weight] = [0, 0];
  return column.map((value) => {
    if (value === null) return null;
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + (1 - keep);
    return sum / weight;
  });
}

// Columns on the union of the runs' steps, as uPlot takes them.
function aligned(lines) {
  const steps = [...new Set(lines.flatMap(({ run }) => run.steps.step))].sort((a, b) => a - b);
  const places = new Map(steps.map((step, place) => [step, place]));
  const columns = lines.map(({ run, key }) => {
    const column = new Array(steps.length).fill(null);
    run.steps.step.forEach((step, i) => (column[places.get(step)] = run.steps[key][i] ?? null));
    return column;
  });
  return [steps, columns];
}

function chart(picture, settings, runs) {
  const [steps, raw] = aligned(picture.lines);
  const positive = settings.log && raw.some((column) => column.some((value) => value > 0));
  const drawn = positive ? raw.map((column) => column.map((value) => (value > 0 ? value : null))) : raw;
  const smooth = drawn.map((column) => smoothed(column, settings.smooth));
  const readout = picture.lines.map((line) => reading(line));
  const holder = el("div", { class: "plot" });
  const last = picture.lines.map((line, i) => `${line.label} ${number(lastOf(raw[i]))}`).join(", ");
  const figure = el(
    "figure",
    {
      class: "chart",
      tabindex: 0,
      role: "img",
      "aria-label":
        `${[picture.title, picture.unit].filter(Boolean).join(", ")}, over the steps ${steps[0]} to` +
        ` ${steps.at(-1)}; at the end ${last}. Arrow keys read it.`,
    },
    el(
      "figcaption",
      {},
      el("b", {}, picture.title),
      picture.unit ? el("span", { class: "unit" }, picture.unit) : null,
      el(
        "span",
        { class: "reading" },
        readout.map(({ node }) => node),
      ),
    ),
    holder,
  );
  const one = { figure, readout, steps, raw, holder, picture };
  figure.addEventListener("keydown", (event) => walk(one, event));
  one.draw = () => draw(one, smooth, positive, settings, runs);
  return one;
}

function lastOf(column) {
  return column.findLast((value) => value !== null) ?? null;
}

function reading(line) {
  const value = el("b", {});
  const key = el("i", { class: "key", styles: { background: `var(${line.colour})` } });
  return { value, node: el("span", { class: "one" }, key, line.label, " ", value) };
}

function draw(one, smooth, positive, settings, runs) {
  const { lines } = one.picture;
  const faint = settings.smooth > 1;
  const series = [{}];
  const columns = [one.steps];
  lines.forEach((line, i) => {
    const colour = resolved(`var(${line.colour})`);
    const style = { spanGaps: true, points: { show: one.steps.length === 1 } };
    if (faint) {
      series.push({ ...style, stroke: colour.replace("rgb(", "rgba(").replace(")", ", 0.22)"), width: 1 });
      columns.push(positive ? one.raw[i].map((value) => (value > 0 ? value : null)) : one.raw[i]);
    }
    series.push({ ...style, stroke: colour, width: 1.75, dash: line.dash });
    columns.push(smooth[i]);
  });
  one.plot = new uPlot(options(one, series, positive, runs), columns, one.holder);
  touch(one);
  read(one, null);
}

function options(one, series, positive, runs) {
  const [quiet, rule] = [resolved("var(--quiet)"), resolved("var(--rule)")];
  const font = "12px " + getComputedStyle(document.body).fontFamily;
  const axis = { stroke: quiet, font, grid: { stroke: rule, width: 1 }, ticks: { show: false } };
  const short = (_, found) => found.map((value) => (value === null ? "" : tick(value)));
  const flat = one.raw.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...flat), Math.max(...flat)];
  const range = low >= 0 ? [0, high > 0 ? high * 1.08 : 1] : undefined;
  return {
    width: Math.max(200, one.holder.clientWidth),
    height: 172,
    series,
    legend: { show: false },
    padding: [8, 10, 0, 0],
    scales: { x: { time: false }, y: positive ? { distr: 3 } : range ? { range } : {} },
    axes: [
      { ...axis, grid: { show: false }, size: 26, gap: 4, space: 60 },
      { ...axis, size: 50, gap: 6, space: 30, values: short },
    ],
    cursor: { y: false, points: { size: 7 }, drag: { x: true, y: false, setScale: false } },
    hooks: {
      drawClear: [(plot) => drawMarks(plot, runs)],
      setCursor: [(plot) => follow(one, plot)],
      setSelect: [(plot) => zoom(plot)],
      ready: [(plot) => plot.over.addEventListener("dblclick", () => zoomAll(null))],
    },
  };
}

function tick(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e4) return Number((value / 1000).toPrecision(3)) + "k";
  return size < 1e-3
    ? Number(value.toPrecision(2)).toExponential().replace("-", MINUS)
    : String(Number(value.toPrecision(3))).replace("-", MINUS);
}

function drawMarks(plot, runs) {
  const { ctx, bbox } = plot;
  ctx.save();
  ctx.lineWidth = devicePixelRatio;
  for (const { run } of runs) {
    for (const mark of run.marks ?? []) {
      if (mark.kind !== "refresh" && mark.kind !== "warning") continue;
      const x = Math.round(plot.valToPos(mark.step, "x", true));
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = resolved(mark.kind === "warning" ? "var(--orange)" : "var(--edge)");
      ctx.setLineDash(mark.kind === "warning" ? [2 * devicePixelRatio, 3 * devicePixelRatio] : []);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
    }
  }
  ctx.restore();
}

// The cursor of one chart moves those of all others.
function follow(one, plot) {
  const step = plot.cursor.idx === null || plot.cursor.idx === undefined ? null : one.steps[plot.cursor.idx];
  read(one, step);
  if (following) return;
  following = true;
  for (const other of charts) {
    if (other === one || !other.plot) continue;
    other.plot.setCursor({
      left: step === null ? -10 : other.plot.valToPos(step, "x"),
      top: step === null ? -10 : 20,
    });
  }
  following = false;
  announceStep(step);
}

function read(one, step) {
  const place = step === null ? -1 : one.steps.indexOf(step);
  one.readout.forEach(({ value, node }, i) => {
    const found = place < 0 ? lastOf(one.raw[i]) : one.raw[i][place];
    value.textContent = number(found);
    node.classList.toggle("now", place >= 0);
  });
}

function announceStep(step) {
  const note = document.getElementById("at-step");
  if (!note) return;
  if (step === null) note.textContent = note.dataset.idle;
  else {
    const marks = shownRuns().flatMap(({ run }) =>
      (run.marks ?? []).filter((mark) => mark.step === step && mark.kind !== "start"),
    );
    note.textContent = [`step ${step}`, ...marks.map((mark) => visible(mark.text))].join(" · ");
  }
}

function walk(one, event) {
  const move = { ArrowLeft: -1, ArrowRight: 1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
  if (!move || !one.plot) return;
  event.preventDefault();
  event.stopPropagation();
  const from = one.plot.cursor.idx ?? (move > 0 ? -1 : one.steps.length);
  const place = Math.max(0, Math.min(one.steps.length - 1, from + move));
  one.plot.setCursor({ left: one.plot.valToPos(one.steps[place], "x"), top: 20 });
  say(
    `step ${one.steps[place]}: ` +
      one.picture.lines.map((line, i) => `${line.label} ${number(one.raw[i][place])}`).join(", "),
  );
}

function touch(one) {
  const over = one.plot.over;
  const move = (event) => {
    const left = event.touches[0].clientX - over.getBoundingClientRect().left;
    one.plot.setCursor({ left: Math.max(0, Math.min(over.clientWidth, left)), top: 20 });
  };
  over.addEventListener("touchstart", move, { passive: true });
  over.addEventListener("touchmove", move, { passive: true });
}

function zoom(plot) {
  const { left, width } = plot.select;
  if (width > 4) zoomAll([plot.posToVal(left, "x"), plot.posToVal(left + width, "x")]);
  plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
}

function zoomAll(span) {
  for (const one of charts) {
    const [min, max] = span ?? [one.steps[0], one.steps.at(-1)];
    one.plot?.setScale("x", { min, max });
  }
}

// Fill `grid` with the charts of the runs; each is drawn when it comes near the window.
function fillCharts(grid, runs, settings) {
  dropCharts();
  const found = pictures(runs);
  charts.push(
    ...found.map((picture) => chart(picture, { ...settings, log: settings.log ?? picture.log }, runs)),
  );
  grid.replaceChildren(...charts.map(({ figure }) => figure));
  const watch = new IntersectionObserver(
    (entries) => {
      for (const entry of entries) {
        const one = charts.find(({ figure }) => figure === entry.target);
        if (entry.isIntersecting && one && !one.plot) one.draw();
      }
    },
    { rootMargin: "300px" },
  );
  for (const { figure } of charts) watch.observe(figure);
}

function dropCharts() {
  for (const one of charts.splice(0)) one.plot?.destroy();
}

addEventListener("resize", () => {
  for (const one of charts) one.plot?.setSize({ width: Math.max(200, one.holder.clientWidth), height: 172 });
});
