"use strict";
// Pictures of the gate: λ against D, λ over the steps, means by position and by age.

// A plot area of 100 × 100 units with HTML labels, so that no text is scaled. Ticks: [[place in 0..1, text]].
function frame({ title, note, label, xTicks, yTicks, xName, yName, marks }, ...shapes) {
  const at = (name, place, text, away) =>
    el("span", { class: name, styles: { [away]: 100 * place + "%" } }, text);
  return el(
    "figure",
    { class: "frame" },
    el("figcaption", {}, el("b", {}, title), note ? el("span", { class: "unit" }, note) : null),
    el(
      "div",
      { class: "area", role: "img", "aria-label": label },
      el(
        "div",
        { class: "y" },
        yTicks.map(([place, text]) => at("tick", place, text, "bottom")),
      ),
      el(
        "div",
        { class: "inside" },
        svg("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" }, shapes),
        (marks ?? []).map(([place, text]) =>
          el("span", { class: place > 0.7 ? "pin left" : "pin", styles: { left: 100 * place + "%" } }, text),
        ),
      ),
      el(
        "div",
        { class: "x" },
        xTicks.map(([place, text]) => at("tick", place, text, "left")),
      ),
    ),
    el(
      "div",
      { class: "names" },
      yName ? el("span", {}, "↑ " + yName) : null,
      xName ? el("span", {}, xName + " →") : null,
    ),
  );
}

function power(value) {
  const exponent = Math.round(Math.log10(value));
  if (exponent >= -2 && exponent <= 3) return String(10 ** exponent);
  const digits = "⁰¹²³⁴⁵⁶⁷⁸⁹";
  return (
    "10" + (exponent < 0 ? "⁻" : "") + [...String(Math.abs(exponent))].map((digit) => digits[digit]).join("")
  );
}

// Counts lie between edges; empty bins at both ends are cut off.
function bins(edges, counts) {
  const first = Math.max(
    0,
    counts.findIndex((count) => count > 0),
  );
  const last = Math.max(
    first,
    counts.findLastIndex((count) => count > 0),
  );
  const logs = edges.slice(first, last + 2).map((edge) => Math.log10(edge));
  const [from, to] = [logs[0], logs.at(-1)];
  const place = (value) => (Math.log10(value) - from) / (to - from);
  const decades = logs
    .filter((log) => Math.abs(log - Math.round(log)) < 1e-6)
    .map((log) => 10 ** Math.round(log));
  const every = Math.ceil(decades.length / 6);
  const labels = decades
    .filter((_, i) => (decades.length - 1 - i) % every === 0)
    .map((value) => [place(value), power(value)]);
  return { place, from, to, labels, first, last, size: 1 / (last + 1 - first) };
}

// λ of a divergence; null where the gate has no threshold.
function openness({ tau, alpha, gating }, d) {
  if (tau === null || tau === undefined) return null;
  if (gating === "hard") return d > tau ? 0 : 1;
  return alpha === null || alpha === undefined ? null : 1 / (1 + Math.exp(-alpha * (tau - d)));
}

// The outline of a histogram of shares, of which `most` is 92 high.
function outline(shares, most) {
  const width = 100 / shares.length;
  const points = shares.flatMap((share, i) =>
    [i, i + 1].map((x) => `${(x * width).toFixed(2)},${(100 - (92 * share) / most).toFixed(2)}`),
  );
  return svg("polyline", { points: points.join(" "), class: "early" });
}

function stepsOf(part) {
  const [from, to] = part.steps;
  return from === to ? `step ${from}` : `steps ${from}–${to}`;
}

// D of the tokens of the last steps, in outline that of the first ones, and the gate's λ over it.
function gateAgainstD({ lambda_vs_d: about, first: early, last: late }) {
  const { edges, tau, alpha } = about;
  const { place, from, to, labels, first, last, size } = bins(edges, about.counts);
  const shares = (counts) => {
    const total = counts.reduce((sum, count) => sum + count, 0) || 1;
    return counts.slice(first, last + 1).map((count) => count / total);
  };
  const counts = shares(late?.divergence_histogram ?? about.counts);
  const isSpan = early && early.steps[0] < late.steps[0];
  const before = isSpan ? shares(early.divergence_histogram) : [];
  const most = Math.max(...counts, ...before) || 1;
  const hasGate = openness(about, 1) !== null;
  const middle = (i) => 10 ** (from + (i + 0.5) * size * (to - from));
  const bars = counts.map((count, i) =>
    svg("rect", {
      x: 100 * (i + 0.06) * size,
      width: 100 * 0.88 * size,
      y: 100 - (92 * count) / most,
      height: (92 * count) / most,
      class: hasGate && openness(about, middle(i)) < 0.5 ? "bar shut" : "bar",
    }),
  );
  const line = Array.from({ length: 240 }, (_, i) => {
    const x = i / 239;
    const y = 100 - 92 * openness(about, 10 ** (from + x * (to - from)));
    return `${(100 * x).toFixed(2)},${y.toFixed(2)}`;
  });
  const above = counts.reduce((sum, share, i) => sum + (middle(i) > tau ? share : 0), 0);
  const share = `${(100 * above).toFixed(1)}% above τ`;
  const isSeen = hasGate && place(tau) >= 0 && place(tau) <= 1;
  const x = 100 * place(tau);
  return frame(
    {
      title: "λ against D",
      note: [
        hasGate ? `τ = ${number(tau, 2)}` : null,
        hasGate ? (about.gating === "hard" ? "hard gate" : `α = ${number(alpha, 1)}`) : null,
        isSpan ? `bars: ${stepsOf(late)}; dashed: ${stepsOf(early)}` : null,
      ]
        .filter(Boolean)
        .join(", "),
      label:
        "Histogram of the divergence D of all tokens" +
        (hasGate ? `, and λ falling from 1 to 0 at τ = ${tau}; ${share}.` : "."),
      xTicks: labels,
      yTicks: [
        [0, "0"],
        [0.46, "0.5"],
        [0.92, "1"],
      ],
      marks: isSeen ? [[place(tau), share]] : [],
      xName: `D (${quantity(about.gate_on)?.label ?? "gated divergence"}), nats`,
      yName: hasGate ? "λ (line), share of tokens (bars)" : "share of tokens",
    },
    bars,
    isSpan ? outline(before, most) : null,
    isSeen ? svg("line", { x1: x, x2: x, y1: 0, y2: 100, class: "tau" }) : null,
    hasGate ? svg("polyline", { points: line.join(" "), class: "curve" }) : null,
  );
}

// Shares of the tokens by λ, between linear edges, at each step; many steps are joined.
function gateOverTime({ steps, edges, counts }) {
  const size = 1 / counts[0].length;
  const columns = Math.min(steps.length, 120);
  const shapes = Array.from({ length: columns }, (_, column) => {
    const [first, end] = [column, column + 1].map((one) => Math.floor((one * steps.length) / columns));
    const sums = counts[0].map((_, bin) => counts.slice(first, end).reduce((sum, one) => sum + one[bin], 0));
    const most = Math.max(...sums, 1);
    return sums.map((sum, bin) =>
      sum === 0
        ? null
        : svg("rect", {
            x: (100 * column) / columns,
            width: 100 / columns,
            y: 100 * (1 - (bin + 1) * size),
            height: 100 * size,
            class: "heat",
            "fill-opacity": (0.05 + 0.95 * Math.sqrt(sum / most)).toFixed(3),
          }),
    );
  });
  const at = ticks(steps[0], steps.at(-1), 8)
    .filter(Number.isInteger)
    .map((step) => [(step - steps[0] + 0.5) / (steps.at(-1) - steps[0] + 1), String(step)]);
  const yTicks = [0, 0.5, 1].map((lambda) => [
    (lambda - edges[0]) / (edges.at(-1) - edges[0]),
    String(lambda),
  ]);
  return frame(
    {
      title: "λ over the steps",
      note: "darker: more tokens",
      label: `Distribution of λ at the steps ${steps[0]} to ${steps.at(-1)}.`,
      xTicks: at,
      yTicks,
      xName: "step",
      yName: "λ",
    },
    shapes,
  );
}

// Means over ranges of tokens in the last steps; of λ also those in the first ones.
function meansTable(title, note, table, early) {
  const names = Object.keys(table);
  const lambda = early ? "mean λ, first → last" : "mean λ";
  const head = ["", "share", lambda, "λ < 0.5", "reverse KL", "forward KL"];
  const change = (name) =>
    early?.[name] ? el("span", { class: "unit" }, `${number(early[name].gate)} → `) : null;
  const most = Math.max(...names.map((name) => table[name].rkl ?? 0), 1e-9);
  const rows = names.map((name) => {
    const row = table[name];
    const share = (value) => (value === null || value === undefined ? "–" : (100 * value).toFixed(1) + "%");
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, name),
      el("td", {}, share(row.share)),
      el("td", { class: "change" }, change(name), number(row.gate)),
      el("td", {}, share(row.share_forward)),
      el("td", { class: "barred", "--v": (row.rkl ?? 0) / most }, number(row.rkl, 4)),
      el("td", {}, number(row.fkl, 4)),
    );
  });
  return el(
    "figure",
    { class: "frame" },
    el("figcaption", {}, el("b", {}, title), el("span", { class: "unit" }, note)),
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
      el(
        "table",
        { class: "plain" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map((text) => el("th", { scope: "col" }, text)),
          ),
        ),
        el("tbody", {}, rows),
      ),
    ),
  );
}

function gatePictures(gate) {
  if (!gate) return [];
  const found = [];
  const filled = (table) => table && Object.keys(table).length;
  const isSpan = gate.first && gate.first.steps[0] < gate.last.steps[0];
  const early = (name) => (isSpan ? gate.first[name] : null);
  const span = isSpan ? `, ${stepsOf(gate.first)} → ${stepsOf(gate.last)}` : "";
  if (gate.lambda_vs_d?.counts?.length) found.push(gateAgainstD(gate));
  if (gate.histogram_over_time?.steps?.length > 1) found.push(gateOverTime(gate.histogram_over_time));
  if (filled(gate.by_position))
    found.push(
      meansTable("By position", "tokens of the completion" + span, gate.by_position, early("by_position")),
    );
  if (filled(gate.by_age))
    found.push(
      meansTable("By age of the rollout", "in optimizer steps" + span, gate.by_age, early("by_age")),
    );
  return found;
}
