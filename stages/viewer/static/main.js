"use strict";
// Which view is open, in the address; theme; keys.

const VIEWS = {
  overview: ["Overview", overview],
  rollouts: ["Rollouts", rolloutView],
  answers: ["Answers", answerView],
  help: ["Help", helpView],
};
const FRESH = {
  view: "overview",
  run: 0,
  row: null,
  token: null,
  colour: null,
  query: "",
  sort: "rkl",
  show: "all",
  refresh: "",
  prompt: "",
  outcome: "all",
};
const STATE = { ...FRESH };
let written = "";

function readHash() {
  const [name, rest = ""] = location.hash.slice(1).split("?");
  const query = new URLSearchParams(rest);
  const run = RUNS.findIndex((one) => one.name === query.get("run"));
  const token = Number.parseInt(query.get("token"), 10);
  Object.assign(
    STATE,
    FRESH,
    Object.fromEntries(
      ["row", "colour", "query", "sort", "show", "refresh", "prompt", "outcome"]
        .filter((key) => query.has(key))
        .map((key) => [key, query.get(key)]),
    ),
    {
      view: Object.hasOwn(VIEWS, name) ? name : "overview",
      run: Math.max(0, run),
      token: Number.isInteger(token) ? token - 1 : null,
    },
  );
}

function hashOf(state) {
  const query = new URLSearchParams();
  if (RUNS.length > 1) query.set("run", RUNS[state.run].name);
  for (const key of ["row", "colour", "query", "sort", "show", "refresh", "prompt", "outcome"]) {
    const isOfView =
      state.view === "rollouts"
        ? key !== "outcome"
        : state.view === "answers" && ["query", "outcome"].includes(key);
    if (isOfView && state[key] !== FRESH[key] && state[key] !== null) query.set(key, state[key]);
  }
  if (state.view === "rollouts" && state.token !== null) query.set("token", state.token + 1);
  return "#" + state.view + (query.size ? "?" + query : "");
}

// Note a change in the address, without drawing anything.
function setState(part) {
  Object.assign(STATE, part);
  const hash = hashOf(STATE);
  if (hash === written) return;
  written = hash;
  history.replaceState(null, "", hash);
}

// Change the state and draw its view; a new view is a step that Back undoes.
function go(part) {
  const isNew = part.view && part.view !== STATE.view;
  Object.assign(STATE, part);
  const hash = hashOf(STATE);
  written = hash;
  if (isNew) history.pushState(null, "", hash);
  else history.replaceState(null, "", hash);
  show();
}

function show() {
  dropCharts();
  view = null;
  document.body.className = "view-" + STATE.view;
  for (const button of document.querySelectorAll("#nav button")) {
    if (button.dataset.view === STATE.view) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  replaced(document.getElementById("main"), VIEWS[STATE.view][1](STATE));
  if (STATE.view !== "rollouts") scrollTo(0, 0);
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  document.getElementById("theme").textContent = isDark() ? "☀" : "☾";
}

function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

function switchTheme() {
  const theme = isDark() ? "light" : "dark";
  setTheme(theme);
  try {
    localStorage.setItem("dualkl-theme", theme);
  } catch {
    /* a file without storage forgets it */
  }
  redrawColours();
}

function redrawColours() {
  const grid = document.getElementById("charts");
  if (grid) fillCharts(grid, shownRuns(), curveSettings);
  view?.list?.clear();
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const views = { o: "overview", r: "rollouts", a: "answers", "?": "help" };
  let isDone = true;
  if (views[event.key]) go({ view: views[event.key] });
  else if (event.key === "t") switchTheme();
  else if (event.key === "/") focusSearch();
  else isDone = STATE.view === "rollouts" && view !== null && rolloutKeys(event);
  if (isDone) event.preventDefault();
}

function focusSearch() {
  if (!document.getElementById("search")) go({ view: "rollouts" });
  document.body.classList.remove("has-detail");
  document.getElementById("search")?.focus();
}

async function begin() {
  const nav = document.getElementById("nav");
  nav.append(
    ...Object.entries(VIEWS)
      .filter(([name]) => name !== "answers" || RUNS.some((run) => run.answers?.length))
      .map(([name, [text]]) =>
        el("button", { type: "button", "data-view": name, onclick: () => go({ view: name }) }, text),
      ),
  );
  document.getElementById("runs").textContent =
    RUNS.length > 1 ? `${RUNS.length} runs` : visible(RUNS[0].name);
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.getElementById("keys").addEventListener("click", () => go({ view: "help" }));
  document.getElementById("skip").addEventListener("click", (event) => {
    event.preventDefault();
    document.getElementById("main").focus();
  });
  let theme = "";
  try {
    theme = localStorage.getItem("dualkl-theme") ?? "";
  } catch {
    /* as above */
  }
  setTheme(theme);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    setTheme(document.documentElement.dataset.theme);
    redrawColours();
  });
  addEventListener("keydown", onKey);
  addEventListener("popstate", () => {
    if (location.hash !== written) {
      written = location.hash;
      readHash();
      show();
    }
  });
  addEventListener("beforeprint", () => forPrint(true));
  addEventListener("afterprint", () => forPrint(false));
  addEventListener("unhandledrejection", (event) => {
    event.preventDefault(); // the reader is told
    fault(event.reason);
  });
  await Promise.all(RUNS.map(({ rollouts }) => openRollouts(rollouts))).catch(fault);
  readHash();
  show();
}

// What went wrong, as when a server has been stopped.
function fault(reason) {
  const node = document.getElementById("fault");
  node.hidden = false;
  node.textContent =
    visible(String(reason?.message ?? reason)) +
    " Reload the page; if it stays, run the command that made it again.";
}

// Paper is light, and every chart is drawn.
function forPrint(isPrinting) {
  const { dataset } = document.documentElement;
  if (isPrinting) dataset.screen = dataset.theme;
  setTheme(isPrinting ? "light" : (dataset.screen ?? ""));
  redrawColours();
  if (isPrinting) for (const one of charts) if (!one.plot) one.draw();
}

begin();
