"use strict";
// Rollouts: a list to search, sort and filter; the chosen one as a chat of coloured tokens; a token in full.

const SORTS = [
  ["rkl", "largest reverse KL (traced)", (row) => -row.rkl, "rkl"],
  ["gap", "least likely to the teacher", (row) => row.gap, "gap"],
  ["fkl", "largest forward KL (traced)", (row) => -row.fkl, "fkl"],
  ["lambda", "lowest λ (traced)", (row) => row.lambda, "lambda"],
  ["entropy", "highest teacher entropy", (row) => -row.entropy, "entropy"],
  ["longest", "longest", (row) => -row.tokens, "tokens"],
  ["shortest", "shortest", (row) => row.tokens, "tokens"],
  ["newest", "newest", (row) => -row.step, "step"],
  ["oldest", "oldest", (row) => row.step, "step"],
  ["prompt", "by prompt", (row) => row.prompt_id, "prompt_id"],
];
// Means over a rollout's tokens, in words.
const MEANS = [
  ["rkl", "reverse KL"],
  ["fkl", "forward KL"],
  ["lambda", "λ"],
  ["gap", "teacher − behaviour"],
  ["entropy", "entropy"],
];
const ANSWERS = {
  before: "student before training, at temperature 0",
  after: "student after training, at temperature 0",
  teacher: "teacher, at temperature 0",
};
const SHOWS = [
  ["all", "all rollouts", () => true],
  ["cut", "cut", (row) => row.finish === "length"],
  ["solved", "solved", (row) => row.solved === true],
  ["unsolved", "not solved", (row) => row.solved === false],
  ["traced", "traced", (row) => row.rkl !== null && row.rkl !== undefined],
  ["heldout", "held-out texts", (row) => row.source !== "cache"],
];
const SERVED_SORTS = {
  rkl: "-rkl",
  fkl: "-fkl",
  lambda: "lambda",
  gap: "gap",
  longest: "-tokens",
  shortest: "tokens",
  newest: "-step",
  oldest: "step",
  prompt: "prompt_id",
};
const ROW_HEIGHT = 82;
const PAGE = 50; // rows that a server is asked for
let view = null; // the open view: {run, rollouts, rows, list, ...}

function rolloutView(state) {
  const run = RUNS[state.run];
  const rollouts = run.rollouts;
  if (!rollouts?.rows?.length && !DATA.serve)
    return el("p", { class: "empty" }, rollouts?.how ?? "This run has no rollouts that can be read.");
  view = { run, rollouts, rows: [], texts: null, shown: null };
  view.list = new List({
    label: "Rollouts",
    height: ROW_HEIGHT,
    draw: drawRow,
    chosen: (place) => openRow(place, true),
  });
  view.count = el("p", { class: "count", role: "status" });
  view.detail = el(
    "article",
    { class: "detail", "aria-label": "Rollout" },
    el("p", { class: "empty" }, "Choose a rollout."),
  );
  view.inspector = el("aside", { class: "inspector", "aria-label": "Token", hidden: true });
  const node = el(
    "div",
    { class: "rollouts" },
    el(
      "div",
      { class: "browse" },
      el("h1", { class: "unseen" }, `Rollouts of ${visible(run.name)}`),
      RUNS.length > 1 ? runTabs(state) : null,
      filters(state),
      view.count,
      view.list.node,
      rollouts.how ? el("p", { class: "how" }, howChosen(rollouts)) : null,
    ),
    view.detail,
    view.inspector,
  );
  start(state);
  return node;
}

function howChosen(rollouts) {
  if (!DATA.serve) return visible(rollouts.how);
  const known = rollouts.heldout ? "Colour scales and held-out texts" : "Colour scales";
  return `All ${plural(rollouts.total, "rollout")} of the cache. ${known} are of a sample of it.`;
}

async function start(state) {
  const mine = view;
  const kinds = available(mine.rollouts);
  if (!kinds.some(({ key }) => key === state.colour))
    setState({ colour: await firstKnown(mine.rollouts, kinds) });
  await arrange();
  if (mine !== view) return;
  const place = state.row === null ? -1 : mine.rows.findIndex((row) => row.id === state.row);
  if (state.row !== null && place < 0) return openById(state.row);
  if (place >= 0 || !isNarrow()) openRow(Math.max(0, place), false, state.token);
}

// The first quantity that is known for many tokens.
async function firstKnown(rollouts, kinds) {
  for (const { key } of kinds) {
    const found = await values(rollouts, key, 0, rollouts.tokens);
    if (found.filter((value) => !Number.isNaN(value)).length > 0.3 * found.length) return key;
  }
  return kinds[0]?.key ?? null;
}

function isNarrow() {
  return matchMedia("(max-width: 760px)").matches;
}

function filters(state) {
  const { rows } = view.rollouts;
  let waiting = 0;
  const search = el("input", {
    type: "search",
    id: "search",
    placeholder: "Search prompts and completions",
    "aria-label": "Search",
    value: state.query,
    oninput: (event) => {
      clearTimeout(waiting);
      const { value } = event.target;
      waiting = setTimeout(() => change({ query: value }), 120);
    },
  });
  const known = (key) => rows.some((row) => row[key] !== null && row[key] !== undefined);
  const sorts = SORTS.filter(([name, , , key]) => (DATA.serve ? SERVED_SORTS[name] : known(key))).map(
    ([key, text]) => [key, text],
  );
  if (!sorts.some(([key]) => key === state.sort)) setState({ sort: sorts[0][0] });
  const shows = SHOWS.filter(
    ([key, , test]) => key === "all" || (DATA.serve && ["cut", "traced"].includes(key)) || rows.some(test),
  ).map(([key, text]) => [key, text]);
  const refreshes = [...new Set(rows.map((row) => row.refresh))]
    .filter((one) => one !== null && one !== undefined)
    .sort((a, b) => a - b);
  const times = [["", "all refreshes"], ...refreshes.map((one) => [String(one), `refresh ${one}`])];
  view.prompt = el("span", { class: "only", hidden: true });
  return el(
    "div",
    { class: "filters" },
    search,
    el(
      "div",
      { class: "pair" },
      select("Sort", sorts, STATE.sort, (sort) => change({ sort })),
      select("Show", shows, state.show, (show) => change({ show })),
      refreshes.length > 1 ? select("Refresh", times, state.refresh, (refresh) => change({ refresh })) : null,
    ),
    view.prompt,
  );
}

async function change(part) {
  setState({ ...part, token: null });
  await arrange();
  view.list.node.scrollTop = 0;
  if (!isNarrow() && view.rows.length) openRow(0, false);
}

// The rows that the filters leave, in order, into the list.
async function arrange() {
  const mine = view;
  await prepareColour(mine.rollouts);
  if (DATA.serve && STATE.show !== "heldout") return served();
  const [, , test] = SHOWS.find(([key]) => key === STATE.show) ?? SHOWS[0];
  const [, , order, key] = SORTS.find(([name]) => name === STATE.sort) ?? SORTS[0];
  const sought = STATE.query.trim().toLowerCase();
  if (sought) mine.texts ??= await searchTexts(mine.rollouts);
  const kept = mine.rollouts.rows
    .map((row, i) => [row, i])
    .filter(
      ([row, i]) =>
        test(row) &&
        (STATE.show === "heldout" || STATE.prompt || row.source === "cache" || sought) &&
        (!STATE.prompt || row.prompt_id === STATE.prompt) &&
        (STATE.refresh === "" || String(row.refresh) === STATE.refresh) &&
        (!sought || mine.texts[i].includes(sought)),
    );
  const known = (row) => row[key] !== null && row[key] !== undefined;
  kept.sort(
    ([a, i], [b, j]) =>
      known(b) - known(a) || (known(a) && order(a) !== order(b) ? (order(a) < order(b) ? -1 : 1) : i - j),
  );
  mine.rows = kept.map(([row]) => row);
  const isHeldout = STATE.show === "heldout";
  const all = mine.rollouts.rows.filter((row) => (row.source === "cache") !== isHeldout).length;
  told(mine, mine.rows.length, Math.max(all, mine.rows.length));
}

function told(mine, count, total) {
  mine.count.textContent =
    count === total
      ? plural(count, "rollout")
      : `${count.toLocaleString("en-US")} of ${plural(total, "rollout")}`;
  mine.prompt.hidden = !STATE.prompt;
  mine.prompt.replaceChildren(
    "one prompt ",
    el("button", { type: "button", class: "quiet", onclick: () => change({ prompt: "" }) }, "show all"),
  );
  mine.list.fill(count);
  mine.list.at = mine.rows.findIndex((row) => row?.id === STATE.row);
  mine.list.select(mine.list.at);
}

// A server's rows come a page at a time, as the list asks for them.
async function served() {
  const mine = view;
  mine.pages = new Map();
  mine.rows = [];
  const { total } = await page(mine, 0);
  told(mine, total, mine.rollouts.total);
}

// Rows of a server, each with the rollouts that it is `of`: their tokens and columns.
async function askedRows(parameters) {
  const answer = await asked("rows", { run: STATE.run, ...parameters });
  await openRollouts(answer);
  await prepareColour(answer);
  for (const row of answer.rows) row.of = answer;
  return answer;
}

function page(mine, place) {
  const from = Math.floor(place / PAGE) * PAGE;
  if (!mine.pages.has(from)) {
    const parameters = {
      query: STATE.query.trim(),
      sort: SERVED_SORTS[STATE.sort] ?? "",
      refresh: STATE.refresh,
      prompt: STATE.prompt,
      from,
      count: PAGE,
      finish: STATE.show === "cut" ? "length" : "",
      traced: STATE.show === "traced" ? 1 : "",
    };
    mine.pages.set(
      from,
      askedRows(parameters).then((answer) => {
        answer.rows.forEach((row, i) => (mine.rows[from + i] = row));
        return answer;
      }),
    );
  }
  return mine.pages.get(from);
}

async function searchTexts(rollouts) {
  return Promise.all(
    rollouts.rows.map(async (row) =>
      [row.id, row.prompt_id, promptText(rollouts.prompts[row.prompt]), await completionText(rollouts, row)]
        .join("\n")
        .toLowerCase(),
    ),
  );
}

// What the list draws of rollouts: their token ids, and the values of the chosen quantity.
async function prepareColour(rollouts) {
  if (!rollouts.columns?.token) return;
  const { colour } = STATE;
  if (colour) view.top = await domain(view.rollouts, colour); // of the page's sample, so that rows compare
  rollouts.drawn = {
    ids: await tokenIds(rollouts),
    values: colour ? await values(rollouts, colour, 0, rollouts.tokens) : null,
  };
}

function drawRow(place) {
  const row = view.rows[place];
  if (!row) {
    const mine = view;
    page(mine, place).then(() => mine === view && mine.list.clear());
    return el("p", { class: "snippet" }, "…");
  }
  const facts = [
    row.source === "cache" ? (row.refresh === null ? null : `refresh ${row.refresh}`) : row.source,
    plural(row.tokens, "token"),
    metric(row),
  ];
  return [
    el("p", { class: "snippet" }, solvedMark(row.solved), snippet(row)),
    heatStrip(row),
    el(
      "p",
      { class: "meta" },
      row.finish === "length" ? el("span", { class: "tag" }, "cut") : null,
      facts.filter(Boolean).join(" · "),
    ),
  ];
}

function metric(row) {
  const known = (wanted) => {
    const [key, text] = MEANS.find(([one]) => one === wanted) ?? [];
    return !key || row[key] === null || row[key] === undefined ? null : `${text} ${number(row[key])}`;
  };
  return known(STATE.sort) ?? known("rkl") ?? known("gap");
}

function snippet(row) {
  const rollouts = row.of ?? view.rollouts;
  let text = "";
  for (let i = row.offset; i < row.offset + row.tokens && text.length < 160; i++)
    text += pieceText(piece(rollouts, rollouts.drawn.ids[i]));
  return visible(text.slice(0, 160).trimStart()).replaceAll("\n", " ↵ ");
}

// The completion from left to right, each bin as its strongest token.
function heatStrip(row) {
  const found = (row.of ?? view.rollouts).drawn.values;
  if (!found) return el("div", { class: "strip-space" });
  const count = Math.min(row.tokens, 160);
  const canvas = el("canvas", { class: "heat-strip", width: count, height: 1, "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const { key, hue } = quantity(STATE.colour);
  const [hot, cold] = hues(hue);
  for (let bin = 0; bin < count; bin++) {
    const [from, to] = [Math.floor((bin * row.tokens) / count), Math.ceil(((bin + 1) * row.tokens) / count)];
    let [most, isBlue] = [0, false];
    for (let i = row.offset + from; i < row.offset + to; i++) {
      const v = strength(key, found[i], view.top);
      if (v > most) [most, isBlue] = [v, isCold(key, found[i])];
    }
    context.globalAlpha = most;
    context.fillStyle = isBlue ? cold : hot;
    context.fillRect(bin, 0, 1, 1);
  }
  return canvas;
}

const hueCache = new Map();
function hues(name) {
  const known =
    document.documentElement.dataset.theme + matchMedia("(prefers-color-scheme: dark)").matches + name;
  if (!hueCache.has(known))
    hueCache.set(known, [resolved(`var(--hue-${name})`), resolved("var(--hue-cold)")]);
  return hueCache.get(known);
}

async function openById(id) {
  const mine = view;
  if (!DATA.serve) {
    const row = mine.rollouts.rows.find((one) => one.id === id);
    if (!row)
      return mine.detail.replaceChildren(
        el(
          "p",
          { class: "empty" },
          `This page has no rollout ${visible(id)}; its sample may differ from that of the link.`,
        ),
      );
    return showRow(row, STATE.token);
  }
  return showRow({ id }, STATE.token);
}

function openRow(place, isFocused, token = null) {
  const mine = view;
  const row = mine.rows[place];
  if (!row && DATA.serve && place >= 0 && place < mine.list.count)
    return page(mine, place).then(
      () => mine === view && mine.rows[place] && openRow(place, isFocused, token),
    );
  if (!row) return;
  view.list.select(place);
  if (isFocused || !isNarrow()) showRow(row, token);
}

// The chosen row: prompt and completion as chat, and below it other texts of the same prompt.
async function showRow(row, token = null) {
  const mine = view;
  let rollouts = mine.rollouts;
  if (isServed(row)) {
    rollouts = await asked("row", { run: STATE.run, id: row.id });
    await openRollouts(rollouts);
    [row] = rollouts.rows;
  }
  setState({ row: row.id, token: null });
  const tokens = await tokensOf(rollouts, row);
  if (mine !== view || STATE.row !== row.id) return;
  const nodes = Array.from(tokens.ids, (local, place) => tokenNode(rollouts, local, place));
  mine.shown = { row, rollouts, tokens, nodes };
  const body = el(
    "div",
    {
      class: "tokens",
      id: "tokens",
      role: "listbox",
      tabindex: 0,
      "aria-label": "Tokens of the completion; arrow keys read them",
      "aria-orientation": "horizontal",
    },
    nodes,
  );
  body.addEventListener("click", (event) => {
    const node = event.target.closest(".token");
    if (node) chooseToken(nodes.indexOf(node));
  });
  mine.legend = el("div", { class: "legend-space" });
  replaced(
    mine.detail,
    detailHead(rollouts, row),
    el(
      "div",
      { class: "chat" },
      turns(rollouts.prompts[row.prompt]).map(turn),
      el(
        "div",
        { class: "turn assistant" },
        el("span", { class: "role" }, "completion", solvedMark(row.solved)),
        body,
      ),
    ),
    samePrompt(rollouts, row),
  );
  mine.detail.scrollTop = 0;
  document.body.classList.add("has-detail");
  await repaint();
  await chooseToken(token);
  fillOthers(rollouts, row);
}

// Whether the row comes from the server: held-out texts are in the page's own sample.
function isServed(row) {
  return DATA.serve && (row.source ?? "cache") === "cache";
}

function detailHead(rollouts, row) {
  const facts = [
    row.source === "cache"
      ? null
      : `text of the ${row.source === "teacher" ? "teacher" : `student ${row.source} training`}`,
    row.refresh === null || row.source !== "cache" ? null : `refresh ${row.refresh}`,
    row.step === null || row.source !== "cache" ? null : writtenAt(row),
    plural(row.tokens, "token"),
  ].filter(Boolean);
  const means = MEANS.filter(([key]) => row[key] !== null && row[key] !== undefined);
  const kinds = available(rollouts).map(({ key, label }) => [key, label]);
  return el(
    "header",
    { class: "head" },
    el(
      "div",
      { class: "line" },
      el("button", { type: "button", class: "quiet back", onclick: closeDetail }, "← List"),
      el("code", { class: "id", title: row.id }, visible(row.id).slice(0, 10)),
      row.finish === "length" ? el("span", { class: "tag" }, "cut") : null,
      el("span", { class: "unit" }, facts.join(" · ")),
      el("span", { class: "grow" }),
      linkButton(),
      stepButtons("rollout", (move) => openRow(view.list.at + move, true)),
    ),
    el(
      "div",
      { class: "line" },
      means.length
        ? el(
            "span",
            { class: "means" },
            means.map(([key, text]) => el("span", {}, text + " ", el("b", {}, number(row[key])))),
          )
        : null,
    ),
    kinds.length
      ? el(
          "div",
          { class: "line paint" },
          select("Colour the tokens by", kinds, STATE.colour, (colour) => recolour(colour)),
          view.legend,
        )
      : null,
  );
}

function writtenAt({ step, traced_at: traced }) {
  return `written at step ${step}` + (traced ? `, trained on at step ${traced}` : "");
}

// Buttons for the one before and the one after, as keys have them.
function stepButtons(what, moved) {
  const one = (move, sign, text) =>
    el(
      "button",
      { type: "button", class: "icon", title: text, "aria-label": text, onclick: () => moved(move) },
      sign,
    );
  return el(
    "span",
    { class: "steps", role: "group", "aria-label": `Other ${what}s` },
    one(-1, "‹", `Previous ${what}`),
    one(1, "›", `Next ${what}`),
  );
}

function linkButton() {
  const button = copyButton("", "Copy link");
  const fresh = button.cloneNode(true);
  fresh.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(location.href);
      fresh.textContent = "Copied";
    } catch {
      prompt("Copy this:", location.href);
    }
    setTimeout(() => (fresh.textContent = "Copy link"), 1500);
  });
  return fresh;
}

function turn(message) {
  const body = el("div", { class: "said" });
  const parts = message.role === "prompt" ? message.content.split(/(<\|[^|<>]{1,40}\|>)/) : [message.content];
  parts.forEach((part, i) =>
    i % 2 ? body.append(el("span", { class: "chip" }, visible(part))) : body.append(visibleText(part)),
  );
  return el(
    "div",
    { class: "turn " + (message.role === "assistant" ? "assistant" : "user") },
    el("span", { class: "role" }, visible(String(message.role))),
    body,
  );
}

function closeDetail() {
  document.body.classList.remove("has-detail");
  chooseToken(null);
  view.list.node.focus();
}

async function recolour(colour) {
  setState({ colour });
  const pages = await Promise.all(view.pages?.values() ?? []);
  await Promise.all([view.rollouts, ...pages].map(prepareColour));
  view.list.clear();
  await repaint();
}

async function repaint() {
  const { row, rollouts, tokens, nodes } = view.shown;
  const one = quantity(STATE.colour);
  if (!one) return;
  const top = view.top ?? (await domain(rollouts, one.key)); // of the page's sample, so that rows compare
  view.shown.top = top;
  const column = tokens.columns[one.key];
  paint(nodes, one.key, column, top);
  document.getElementById("tokens").className = "tokens hue-" + one.hue;
  const isKnown = column?.some((value) => !Number.isNaN(value));
  const field = view.detail.querySelector(".paint select");
  if (field) field.value = one.key;
  view.legend.replaceChildren(
    isKnown
      ? legend(one, top)
      : el(
          "span",
          { class: "note" },
          `Not known for this rollout: ${one.label.toLowerCase()} is kept for traced rows.`,
        ),
  );
}

async function chooseToken(place) {
  const shown = view?.shown;
  if (!shown) return;
  shown.nodes[STATE.token]?.setAttribute("aria-selected", "false");
  const node = place === null ? null : shown.nodes[place];
  setState({ token: node ? place : null });
  view.inspector.hidden = !node;
  document.body.classList.toggle("has-token", Boolean(node));
  const body = document.getElementById("tokens");
  if (!node) return body.removeAttribute("aria-activedescendant");
  node.setAttribute("aria-selected", "true");
  body.setAttribute("aria-activedescendant", node.id);
  const found = await inspect(shown.rollouts, shown.row, shown.tokens, place);
  if (STATE.token !== place) return;
  replaced(view.inspector, found);
  node.scrollIntoView({ block: "nearest" });
  const value = shown.tokens.columns[STATE.colour]?.[place];
  const text = visible(pieceText(piece(shown.rollouts, shown.tokens.ids[place])));
  say(
    `token ${place + 1} of ${shown.row.tokens}: ${text.replaceAll("\n", "line break")},` +
      ` ${quantity(STATE.colour)?.label ?? ""} ${stored(shown.rollouts, STATE.colour, value)}`,
  );
}

function samePrompt(rollouts, row) {
  return el("section", { class: "others", id: "others" });
}

// The same prompt by other policies, with the words that differ from this completion marked.
async function fillOthers(rollouts, row) {
  const mine = view;
  const place = document.getElementById("others");
  const same = (other) => other.id !== row.id && other.prompt_id && other.prompt_id === row.prompt_id;
  const known = isServed(row)
    ? (await askedRows({ prompt: row.prompt_id, count: 13 })).rows
    : mine.rollouts.rows;
  const rows = known.filter(same);
  const text = await completionText(rollouts, row);
  const order = { before: 0, cache: 1, after: 2, teacher: 3 };
  rows.sort((a, b) => order[a.source] - order[b.source] || a.step - b.step);
  const cards = await Promise.all(
    rows.slice(0, 12).map(async (other) => {
      const name =
        other.source === "cache"
          ? `refresh ${other.refresh}`
          : other.source === "teacher"
            ? "teacher"
            : `student ${other.source} training`;
      const own = await completionText(other.of ?? mine.rollouts, other);
      return otherCard(name, other, own, text, () => showRow(other));
    }),
  );
  const answer = (mine.run.answers ?? []).find(({ prompt_id: id }) => id && id === row.prompt_id);
  if (answer)
    for (const [who] of WHO)
      if (answer[who]) cards.push(otherCard(ANSWERS[who], answer[who], answer[who].text ?? "", text));
  if (mine !== view || STATE.row !== row.id || !cards.length) return;
  const all = rows.length
    ? el(
        "button",
        { type: "button", class: "quiet", onclick: () => change({ prompt: row.prompt_id, show: "all" }) },
        "Only this prompt",
      )
    : null;
  place.replaceChildren(
    el("h2", {}, "The same prompt", el("small", {}, "marked: not in the completion above"), all),
    ...cards,
  );
}

function otherCard(name, other, text, against, opened) {
  const head = [
    el("b", {}, name),
    solvedMark(other.solved),
    other.finish === "length" ? el("span", { class: "tag" }, "cut") : null,
    other.tokens ? el("span", { class: "unit" }, plural(other.tokens, "token")) : null,
    el("span", { class: "grow" }),
    opened ? el("button", { type: "button", class: "quiet", onclick: opened }, "Open") : null,
  ];
  return el(
    "div",
    { class: "other" },
    el("div", { class: "line" }, head),
    el("div", { class: "said" }, marked(text, against, "new")),
  );
}

function rolloutKeys(event) {
  const shown = view?.shown;
  const rows = { j: 1, k: -1 }[event.key];
  if (rows) return (openRow(Math.max(0, Math.min(view.list.count - 1, view.list.at + rows)), true), true);
  if (event.target.closest?.(".list")) {
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 }[event.key];
    if (move) return (openRow(Math.max(0, Math.min(view.list.count - 1, view.list.at + move)), true), true);
    if (event.key === "Enter")
      return (openRow(Math.max(0, view.list.at), true), document.getElementById("tokens")?.focus(), true);
  }
  if (
    event.key === "Escape" &&
    STATE.token === null &&
    document.body.classList.contains("has-detail") &&
    isNarrow()
  )
    return (closeDetail(), true);
  if (!shown) return false;
  return tokenKeys(event, shown);
}

function tokenKeys(event, { nodes, tokens, top }) {
  const { token, colour } = STATE;
  const from = token ?? -1;
  const column = tokens.columns[colour];
  const found = {
    ArrowRight: () => from + 1,
    ArrowLeft: () => (token === null ? 0 : from - 1),
    Home: () => 0,
    End: () => nodes.length - 1,
    ArrowDown: () => (token === null ? 0 : lineAway(nodes, from, 1)),
    ArrowUp: () => (token === null ? 0 : lineAway(nodes, from, -1)),
    n: () => nextStrong(colour, column, top, from, 1),
    p: () => nextStrong(colour, column, top, token === null ? nodes.length : from, -1),
    Escape: () => null,
  }[event.key];
  if (event.key === "c") return (recolour(nextColour()), true);
  if (!found || (event.key === "Escape" && token === null)) return false;
  if (
    ["ArrowDown", "ArrowUp", "Home", "End"].includes(event.key) &&
    token === null &&
    document.activeElement?.id !== "tokens"
  )
    return false;
  const place = found();
  chooseToken(place === null || place < 0 ? (place === null ? null : 0) : Math.min(nodes.length - 1, place));
  return true;
}

function nextColour() {
  const kinds = available(view.shown.rollouts).map(({ key }) => key);
  return kinds[(kinds.indexOf(STATE.colour) + 1) % kinds.length];
}
