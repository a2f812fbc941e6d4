"use strict";
// The first view: verdict, results, curves of all runs, gate, cost, provenance.

const RUN_COLOURS = ["--blue", "--orange", "--teal", "--violet", "--ink"];
const hidden = new Set();
const curveSettings = { smooth: 1, log: null };

function shownRuns() {
  return RUNS.map((run, place) => ({ run, place, colour: RUN_COLOURS[place % RUN_COLOURS.length] })).filter(
    ({ place }) => !hidden.has(place),
  );
}

function section(title, note, ...children) {
  const full = children.flat().filter(Boolean);
  if (!full.length) return null;
  return el("section", {}, el("h2", {}, title, note ? [" ", el("small", {}, note)] : null), full);
}

function overview(state) {
  const run = RUNS[state.run];
  return el(
    "div",
    { class: "overview" },
    RUNS.length > 1 ? runTabs(state) : null,
    el(
      "section",
      { class: "lead" },
      el(
        "p",
        { class: "about" },
        [
          run.kind === "cache" ? `cache ${visible(run.name)}` : visible(run.name),
          run.about ? visible(run.about) : null,
        ]
          .filter(Boolean)
          .join(" · "),
      ),
      el("h1", {}, visible(run.headline)),
      run.verdict && run.verdict !== run.headline + "."
        ? el("p", { class: "verdict" }, visible(run.verdict))
        : null,
      notes(run),
      warnings(run),
    ),
    section("Results", intervalNote(run), results(run)),
    section(
      "Runs compared",
      "after training, with 95 % intervals; differences are paired by prompt, bold where the interval leaves out 0",
      comparison(),
    ),
    section("Differences", "keys that differ between the runs", differences()),
    curveSection(),
    gateSection(run.gate),
    worstSection(run),
    section("Cost", null, costs(run), roundPictures(run.rounds)),
    section("Provenance", null, provenance(run)),
    section("Configuration", "as trained", configuration(run)),
  );
}

function gateSection(gate) {
  const pictures = gatePictures(gate);
  if (!pictures.length) return null;
  return section(
    "Gate",
    null,
    gate.told ? el("p", { class: "told" }, visible(gate.told)) : null,
    el("div", { class: "frames" }, pictures),
  );
}

function runTabs(state) {
  const tabs = RUNS.map((run, place) =>
    el(
      "button",
      {
        type: "button",
        "aria-pressed": String(place === state.run),
        onclick: () => go({ run: place, row: null, token: null }),
      },
      el("i", { class: "key", styles: { background: `var(${RUN_COLOURS[place % RUN_COLOURS.length]})` } }),
      visible(run.name),
    ),
  );
  return el("div", { class: "tabs", role: "group", "aria-label": "Run" }, tabs);
}

function notes(run) {
  if (!run.notes?.length) return null;
  return folded(
    "notes",
    "Notes",
    run.notes.map((text) => el("li", {}, visible(text))),
    2,
  );
}

function folded(name, label, items, few) {
  const rest = items.slice(few);
  return el(
    "div",
    { class: name, role: "note", "aria-label": label },
    el("ul", {}, items.slice(0, few)),
    rest.length ? el("details", {}, el("summary", {}, `${rest.length} more`), el("ul", {}, rest)) : null,
  );
}

function warnings(run) {
  if (!run.warnings?.length) return null;
  const one = ({ step, text }) =>
    el(
      "li",
      {},
      step === null || step === undefined ? null : el("b", {}, `step ${step}`),
      " ",
      visible(text),
    );
  return folded("warnings", "Warnings", run.warnings.map(one), 3);
}

const WHO = [
  ["before", "before"],
  ["after", "after"],
  ["teacher", "teacher"],
];

function results(run) {
  const rows = (run.table ?? []).filter((row) => WHO.some(([who]) => row[who]));
  if (!rows.length) return null;
  const highs = {};
  for (const row of rows) {
    const reach = Math.max(...WHO.map(([who]) => row[who]?.high ?? row[who]?.value ?? 0));
    highs[row.unit] = Math.max(highs[row.unit] ?? 0, reach);
  }
  const body = rows.map((row) => {
    const top = row.unit === "%" ? 1 : rounded(highs[row.unit]);
    return el(
      "tr",
      {},
      el(
        "th",
        { scope: "row" },
        row.label,
        row.unit === "nats" ? [" ", el("small", {}, "nats/token")] : null,
      ),
      WHO.map(([who]) => el("td", { class: who }, cell(row[who], row.unit))),
      el("td", { class: "dots" }, dots(row, top)),
    );
  });
  const head = el(
    "tr",
    {},
    el("td", {}),
    WHO.map(([who, text]) => el("th", { scope: "col" }, el("i", { class: "dot " + who }), text)),
    el("td", { class: "dots" }),
  );
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Results" },
    el("table", { class: "results" }, el("thead", {}, head), el("tbody", {}, body)),
  );
}

// The next of 1, 1.5, 2, 3, 4, 6, 8 times a power of ten.
function rounded(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map((k) => k * power).find((k) => k >= value * 0.999);
}

function cell(value, unit) {
  if (!value || value.value === null) return "–";
  const spread =
    value.low === null || value.low === undefined || value.high === null
      ? null
      : el(
          "small",
          {},
          `${measure(value.low, unit).replace("%", "")} – ${measure(value.high, unit).replace("%", "")}`,
        );
  return [measure(value.value, unit), spread];
}

// Three lanes, one for each measurement, on the scale 0 to `top`.
function dots(row, top) {
  const at = (value) => `${Math.max(0, Math.min(100, (100 * value) / top)).toFixed(2)}%`;
  const lanes = WHO.filter(([who]) => row[who] && row[who].value !== null).map(([who], lane) => {
    const { value, low, high } = row[who];
    const y = 8 + 12 * WHO.findIndex(([name]) => name === who);
    const bar =
      low === null || low === undefined
        ? null
        : svg("line", { x1: at(low), x2: at(high), y1: y, y2: y, class: "interval " + who });
    return [bar, svg("circle", { cx: at(value), cy: y, r: 4.5, class: "dot " + who })];
  });
  const middle = svg("line", { x1: "50%", x2: "50%", y1: 0, y2: 40, class: "rule" });
  const edges = ["0%", "100%"].map((x) => svg("line", { x1: x, x2: x, y1: 0, y2: 40, class: "rule" }));
  return el(
    "div",
    { class: "strip", "aria-hidden": "true" },
    svg("svg", { width: "100%", height: 40, overflow: "visible" }, edges, middle, lanes.flat()),
    el("div", { class: "ends" }, el("span", {}, "0"), el("span", {}, row.unit === "%" ? "100%" : tick(top))),
  );
}

function flat(config) {
  return new Map(
    Object.entries(config ?? {}).flatMap(([name, value]) =>
      value && typeof value === "object" && !Array.isArray(value)
        ? Object.entries(value).map(([key, one]) => [key, spelled(one)])
        : [[name, spelled(value)]],
    ),
  );
}

function spelled(value) {
  return typeof value === "string" ? visible(value) : visible(JSON.stringify(value) ?? "–");
}

function intervalNote(run) {
  const prompts = run.prompts ? `${plural(run.prompts, "held-out prompt")}; ` : "";
  return `${prompts}95 % intervals: Wilson's for shares of prompts, else a bootstrap over prompts`;
}

function runHeads() {
  return RUNS.map((run, place) =>
    el(
      "th",
      { scope: "col" },
      el("i", { class: "key", styles: { background: `var(${RUN_COLOURS[place % RUN_COLOURS.length]})` } }),
      visible(run.name),
    ),
  );
}

// The same figures of all runs after training.
function comparison() {
  const labels = [...new Set(RUNS.flatMap((run) => (run.table ?? []).map(({ label }) => label)))];
  const rowOf = (run, label) => (run.table ?? []).find((row) => row.label === label);
  const known = labels.filter((label) => RUNS.filter((run) => rowOf(run, label)?.after).length > 1);
  if (RUNS.length < 2 || !known.length) return null;
  const others = RUNS.filter((run) => run.compared?.length);
  const heads = others.map((run) =>
    el("th", { scope: "col" }, `${visible(run.name)} ${MINUS} ${visible(RUNS[0].name)}`),
  );
  const rows = known.map((label) => {
    const found = RUNS.map((run) => rowOf(run, label));
    const { unit } = found.find(Boolean);
    return el(
      "tr",
      {},
      el("th", { scope: "row" }, label, unit === "nats" ? [" ", el("small", {}, "nats/token")] : null),
      found.map((row) => el("td", {}, cell(row?.after, unit))),
      others.map(({ compared }) => el("td", {}, difference(compared.find((one) => one.label === label)))),
    );
  });
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Runs compared" },
    el(
      "table",
      { class: "plain compared" },
      el("thead", {}, el("tr", {}, el("td", {}), runHeads(), heads)),
      el("tbody", {}, rows),
    ),
  );
}

// A difference between runs, and whether its interval leaves room for none.
function difference(one) {
  if (!one) return "–";
  const signed = (value) => (value > 0 ? "+" : "") + measure(value, one.unit).replace("%", "");
  const isClear = one.low > 0 || one.high < 0;
  return [
    el(isClear ? "b" : "span", {}, signed(one.value) + (one.unit === "%" ? " points" : "")),
    el("small", {}, `${signed(one.low)} to ${signed(one.high)}`),
  ];
}

const PLACES_OF_RUNS = ["run_name", "runs_dir", "cache_dir", "wandb_name", "wandb_project"];

function differences() {
  if (RUNS.length < 2) return null;
  const configs = RUNS.map((run) => flat(run.config));
  const keys = [...new Set(configs.flatMap((config) => [...config.keys()]))];
  const differing = keys.filter(
    (key) =>
      !PLACES_OF_RUNS.includes(key) && new Set(configs.map((config) => config.get(key) ?? "–")).size > 1,
  );
  if (!differing.length)
    return el("p", { class: "note" }, "All keys are the same, apart from names and folders.");
  const head = el("tr", {}, el("th", { scope: "col" }, "key"), runHeads());
  const rows = differing.map((key) =>
    el(
      "tr",
      {},
      el("th", { scope: "row" }, el("code", {}, key)),
      configs.map((config) => el("td", {}, config.get(key) ?? "–")),
    ),
  );
  return el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": "Differing keys" },
    el("table", { class: "plain left" }, el("thead", {}, head), el("tbody", {}, rows)),
  );
}

function curveSection() {
  if (!pictures(shownRuns()).length && !hidden.size) return null;
  const grid = el("div", { class: "charts", id: "charts" });
  const redraw = () => fillCharts(grid, shownRuns(), curveSettings);
  const span = el("output", {}, smoothLabel());
  const slider = el("input", {
    type: "range",
    min: 0,
    max: 6,
    value: Math.log2(curveSettings.smooth),
    "aria-label": "Smoothing, steps",
    oninput: (event) => {
      curveSettings.smooth = 2 ** Number(event.target.value);
      span.textContent = smoothLabel();
      redraw();
    },
  });
  const log = select(
    "Vertical axes",
    [
      ["auto", "axes as suits"],
      ["log", "log axes"],
      ["linear", "linear axes"],
    ],
    curveSettings.log === null ? "auto" : curveSettings.log ? "log" : "linear",
    (value) => {
      curveSettings.log = value === "auto" ? null : value === "log";
      redraw();
    },
  );
  const idle = matchMedia("(hover: none)").matches
    ? "touch reads all curves · grey lines: refreshes"
    : "hover reads all curves · drag to zoom, double-click to undo · grey lines: refreshes";
  const bar = el(
    "div",
    { class: "bar" },
    runBoxes(redraw),
    el("label", { class: "slide" }, "smoothing ", slider, span),
    log,
    el("span", { id: "at-step", class: "unit", "data-idle": idle }, idle),
  );
  requestAnimationFrame(redraw);
  return el("section", {}, el("h2", {}, "Curves"), bar, grid);
}

function smoothLabel() {
  return curveSettings.smooth === 1 ? "off" : plural(curveSettings.smooth, "step");
}

function runBoxes(redraw) {
  if (RUNS.length < 2) return null;
  return RUNS.map((run, place) =>
    el(
      "label",
      { class: "box" },
      el("input", {
        type: "checkbox",
        checked: !hidden.has(place),
        onchange: (event) => {
          event.target.checked ? hidden.delete(place) : hidden.add(place);
          redraw();
        },
      }),
      el("i", { class: "key", styles: { background: `var(${RUN_COLOURS[place % RUN_COLOURS.length]})` } }),
      visible(run.name),
    ),
  );
}

const KIND_COLOURS = {
  generate: "--blue",
  score: "--sky",
  train: "--orange",
  evaluate: "--teal",
  load: "--violet",
  other: "--edge",
};

function costs(run) {
  const parts = (run.seconds ?? []).filter(({ seconds }) => seconds > 0);
  const total = parts.reduce((sum, { seconds }) => sum + seconds, 0);
  const colours = Object.values(KIND_COLOURS);
  const colour = ({ kind }, place) => `var(${KIND_COLOURS[kind] ?? colours[place % colours.length]})`;
  const bar = el(
    "div",
    { class: "stack", "aria-hidden": "true" },
    parts.map((part, i) =>
      el("i", { styles: { flexGrow: part.seconds / total, background: colour(part, i) } }),
    ),
  );
  const keys = el(
    "ul",
    { class: "shares" },
    parts.map((part, i) =>
      el(
        "li",
        {},
        el("i", { class: "key", styles: { background: colour(part, i) } }),
        el("span", {}, part.phase),
        el("b", {}, duration(part.seconds)),
        el("small", {}, `${((100 * part.seconds) / total).toFixed(0)}%`),
      ),
    ),
  );
  return [
    parts.length
      ? el("div", { class: "cost" }, el("p", { class: "note" }, `${duration(total)} in all`), bar, keys)
      : null,
    tiles(run),
  ];
}

// Rounds of stage one: seconds by use, and tokens a second. Many rounds are joined.
function roundPictures(rounds) {
  const all = rounds?.seconds ?? [];
  if (all.length < 2) return null;
  const columns = Math.min(all.length, 120);
  const parts = Array.from({ length: columns }, (_, i) => {
    const [from, end] = [i, i + 1].map((one) => Math.floor((one * all.length) / columns));
    const mean = (list) => list.reduce((sum, value) => sum + (value ?? 0), 0) / list.length;
    const seconds = Object.keys(ROUND_USES).map((use) => mean(all.slice(from, end).map((one) => one[use])));
    const rates = ROUND_RATES.map(([key]) => mean(rounds[key].slice(from, end)));
    return { seconds, rates, isFirst: rounds.is_first.slice(from, end).some((one) => one) };
  });
  const labels = ticks(1, all.length, Math.min(6, all.length - 1))
    .filter(Number.isInteger)
    .map((round) => [(round - 0.5) / all.length, String(round)]);
  return el("div", { class: "frames rounds" }, roundSeconds(parts, labels), roundRates(parts, labels));
}

const ROUND_USES = {
  generate: ["generating", "--blue"],
  score: ["scoring", "--sky"],
  write: ["writing", "--violet"],
  rows: ["making rows", "--teal"],
  other: ["other", "--edge"],
};
const ROUND_RATES = [
  ["generated_tokens_per_second", "generated", "--blue"],
  ["scored_tokens_per_second", "scored", "--orange"],
];

function roundSeconds(parts, xTicks) {
  const uses = Object.values(ROUND_USES);
  const top = rounded(Math.max(...parts.map(({ seconds }) => seconds.reduce((sum, one) => sum + one, 0))));
  const width = 100 / parts.length;
  const bars = parts.map(({ seconds }, i) => {
    let from = 100;
    return seconds.map((one, use) => {
      const height = (100 * one) / top;
      from -= height;
      const fill = `var(${uses[use][1]})`;
      return svg("rect", { x: (i + 0.06) * width, width: 0.88 * width, y: from, height, styles: { fill } });
    });
  });
  const shown = uses.filter((_, use) => parts.some(({ seconds }) => seconds[use] > 0.01 * top));
  return roundFrame("Seconds of a round", shown, top, xTicks, bars);
}

function roundRates(parts, xTicks) {
  const top = rounded(Math.max(...parts.flatMap(({ rates }) => rates)));
  const lines = ROUND_RATES.map(([, , colour], which) => {
    const points = parts.map(
      ({ rates }, i) => `${((i + 0.5) / parts.length) * 100},${100 - (100 * rates[which]) / top}`,
    );
    return svg("polyline", { points: points.join(" "), class: "rate", styles: { stroke: `var(${colour})` } });
  });
  const keys = ROUND_RATES.map(([, text, colour]) => [text, colour]);
  return roundFrame("Tokens a second", keys, top, xTicks, lines);
}

function roundFrame(title, keys, top, xTicks, shapes) {
  const note = keys.map(([text, colour]) =>
    el("span", { class: "one" }, el("i", { class: "key", styles: { background: `var(${colour})` } }), text),
  );
  const yTicks = [0, 0.5, 1].map((place) => [place, tick(place * top)]);
  const label = `${title} by round of stage one, up to ${tick(top)}.`;
  return frame({ title, note, label, xTicks, yTicks, xName: "round of stage one and its refreshes" }, shapes);
}

const TILES = [
  ["cache", "rows", "rollouts in the cache", "count"],
  ["cache", "scored_tokens", "scored tokens", "count"],
  ["cache", "bytes", "size of the cache", "bytes"],
  ["cache", "bytes_per_token", "bytes a token", "number"],
  ["cache", "signal_bytes_per_token", "of them teacher signal", "number"],
  ["cache", "cut_share", "completions cut", "share"],
  ["stage_one", "generated_tokens_per_second", "tokens written a second", "count"],
  ["stage_one", "scored_tokens_per_second", "tokens scored a second", "count"],
  ["stage_one", "padding_waste", "padding of the teacher's forwards", "share"],
];
const FORMS = {
  count: (value) => Math.round(value).toLocaleString("en-US"),
  bytes,
  number: (value) => value.toFixed(1),
  share: (value) => (100 * value).toFixed(1) + "%",
};

function tiles(run) {
  const facts = TILES.filter(([group, key]) => typeof run[group]?.[key] === "number").map(
    ([group, key, label, form]) => [label, FORMS[form](run[group][key])],
  );
  const memory = Object.entries(run.memory ?? {})
    .filter(([, value]) => typeof value === "number")
    .map(([name, value]) => [`peak GPU memory, ${name.replaceAll("_", " ")}`, bytes(value)]);
  const nodes = [...facts, ...memory].map(([label, value]) =>
    el("div", { class: "tile" }, el("dt", {}, visible(label)), el("dd", {}, value)),
  );
  return nodes.length ? el("dl", { class: "tiles" }, nodes) : null;
}

function provenance(run) {
  const facts = run.provenance ?? [];
  if (!facts.length) return null;
  return el(
    "dl",
    { class: "facts" },
    facts.flatMap(({ label, value }) => [
      el("dt", {}, visible(label)),
      el(
        "dd",
        {},
        el("code", {}, visible(String(value))),
        label === "command" ? copyButton(String(value)) : null,
      ),
    ]),
    el("dt", {}, "this page"),
    el("dd", {}, `DualKL ${DATA.made.version}, ${DATA.made.time.replace("T", " ").replace("Z", " UTC")}`),
  );
}

function copyButton(text, label = "Copy") {
  return el(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: async (event) => {
        const button = event.target;
        try {
          await navigator.clipboard.writeText(text);
          button.textContent = "Copied";
        } catch {
          prompt("Copy this:", text);
        }
        setTimeout(() => (button.textContent = label), 1500);
      },
    },
    label,
  );
}

function configuration(run) {
  const sections = Object.entries(run.config ?? {});
  if (!sections.length) return null;
  const changes = (run.config_changes ?? []).map(({ from_step: step, key, old, new: now }) =>
    el(
      "li",
      {},
      el("b", {}, `from step ${step}`),
      " ",
      el("code", {}, key),
      ` ${spelled(now)} (was ${spelled(old)})`,
    ),
  );
  const blocks = sections.map(([name, keys]) => {
    const entries =
      keys && typeof keys === "object" && !Array.isArray(keys) ? Object.entries(keys) : [[name, keys]];
    return el(
      "div",
      { class: "block" },
      el("h3", {}, name),
      el(
        "dl",
        {},
        entries.flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, spelled(value))]),
      ),
    );
  });
  return [
    changes.length ? el("ul", { class: "changes" }, changes) : null,
    el(
      "details",
      {},
      el(
        "summary",
        {},
        `All ${sections.reduce((sum, [, keys]) => sum + Object.keys(keys ?? {}).length, 0)} keys`,
      ),
      el("div", { class: "blocks" }, blocks),
    ),
  ];
}
