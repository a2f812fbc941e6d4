"use strict";
// One token: what was written, what teacher and student held likely, and how the gate ruled.

async function inspect(rollouts, row, tokens, place) {
  const start = row.offset + place;
  const [teacher, student] = await Promise.all(
    ["teacher", "student"].map((who) => topFive(rollouts, who, start)),
  );
  const tops = { teacher, student };
  const facts = Object.fromEntries(
    Object.entries(tokens.columns).map(([key, column]) => [key, column?.[place] ?? NaN]),
  );
  return inspectorNode(rollouts, row, tokens, place, facts, tops);
}

// The most likely ids of `who` at a token, with their probabilities; [] where not known.
async function topFive(rollouts, who, at) {
  const found = await tokenIds(rollouts, who + "_top");
  if (!found || !has(rollouts, who + "_top_logprob")) return [];
  const count = rollouts.tokens;
  const entries = [];
  for (let slot = 0; slot < found.length / count; slot++) {
    const [logprob] = await values(rollouts, who + "_top_logprob", at, at + 1, slot);
    const id = found[slot * count + at];
    if (id >= 0 && !Number.isNaN(logprob)) entries.push({ id, probability: Math.exp(logprob) });
  }
  return entries;
}

function inspectorNode(rollouts, row, tokens, place, facts, tops) {
  const written = tokens.ids[place];
  const one = piece(rollouts, written);
  const about = [`${place + 1} of ${row.tokens}`, one.id === undefined ? null : `id ${one.id}`]
    .filter(Boolean)
    .join(" · ");
  return el(
    "div",
    { class: "inspected" },
    el(
      "header",
      {},
      el("div", { class: "written" }, pieceNode(one)),
      el("span", { class: "unit" }, about),
      stepButtons("token", (move) => chooseToken(Math.max(0, Math.min(row.tokens - 1, STATE.token + move)))),
      el(
        "button",
        {
          type: "button",
          class: "icon close",
          "aria-label": "Close the token",
          onclick: () => {
            chooseToken(null);
            document.getElementById("tokens").focus({ preventScroll: true });
          },
        },
        "×",
      ),
    ),
    gauge(rollouts, facts.lambda),
    tops.teacher.length
      ? topList("Teacher", tops.teacher, rollouts, written, facts.teacher_logprob, facts.tail)
      : el("p", { class: "note" }, "The teacher's top five is not known for this rollout (see the notes)."),
    tops.student.length
      ? topList("Student", tops.student, rollouts, written, facts.trained_logprob)
      : el("p", { class: "note" }, "The student's top five is kept for traced rows (trace_every)."),
    factsTable(rollouts, facts, tops, written),
  );
}

function pieceNode(one) {
  if (one.s !== undefined) return el("span", { class: "chip" }, visible(one.s));
  if (one.b !== undefined) return el("span", { class: "chip bytes" }, one.b);
  const shown = visible(one.t).replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
  return el("span", { class: "text" }, shown.length > 60 ? shown.slice(0, 60) + "…" : shown);
}

function gauge(rollouts, lambda) {
  if (lambda === undefined || Number.isNaN(lambda)) return null;
  return el(
    "div",
    { class: "gauge" },
    el("span", {}, "λ"),
    el("div", { class: "track", "--v": lambda }, el("i", {})),
    el("b", {}, stored(rollouts, "lambda", lambda)),
    el("small", {}, `${(100 * lambda).toFixed(0)}% reverse, ${(100 * (1 - lambda)).toFixed(0)}% forward KL`),
  );
}

// The probabilities of a top five are stored roughly, that of the written token finely.
function topList(title, entries, rollouts, written, logprob, tail) {
  const name = title.toLowerCase();
  const rows = entries.map(({ id, probability: rough }) => {
    const isWritten = id === written;
    const isFine = isWritten && !Number.isNaN(logprob ?? NaN);
    const probability = isFine ? Math.exp(logprob) : rough;
    return el(
      "li",
      { class: isWritten ? "written" : null },
      pieceNode(piece(rollouts, id)),
      el("div", { class: "track " + name, "--v": probability }, el("i", {})),
      el("span", { class: "share" }, isFine ? share(probability) : roughShare(probability)),
      isWritten ? el("span", { class: "unseen" }, "(written)") : null,
    );
  });
  const rest =
    tail === undefined || Number.isNaN(tail)
      ? null
      : el(
          "li",
          { class: "rest" },
          el("span", { class: "text", title: "outside the ids that the cache keeps" }, "not kept"),
          el("div", { class: "track rest", "--v": tail }, el("i", {})),
          el("span", { class: "share" }, share(tail)),
        );
  return el(
    "section",
    { class: "top5" },
    el("h3", {}, el("i", { class: "key " + name }), title, " ", el("small", {}, "top five")),
    el("ol", {}, rows, rest),
  );
}

function share(probability) {
  const percent = 100 * probability;
  return percent >= 0.01 || percent === 0
    ? percent.toFixed(percent >= 99.995 ? 0 : percent >= 10 ? 1 : 2) + "%"
    : "< 0.01%";
}

function roughShare(probability) {
  return probability < 1e-3 ? "< 0.1%" : (100 * probability).toFixed(probability < 0.01 ? 1 : 0) + "%";
}

function rank(entries, written) {
  if (!entries.length) return null;
  const place = entries.findIndex(({ id }) => id === written);
  return place < 0 ? "not in the top five" : `${place + 1}`;
}

function factsTable(rollouts, facts, tops, written) {
  const rows = QUANTITIES.filter(
    ({ key }) => key !== "lambda" && facts[key] !== undefined && !Number.isNaN(facts[key]),
  );
  const ranks = [
    ["Rank, teacher", rank(tops.teacher, written)],
    ["Rank, student", rank(tops.student, written)],
  ].filter(([, text]) => text);
  return el(
    "dl",
    { class: "measures" },
    ranks.flatMap(([label, text]) => [el("dt", {}, label), el("dd", {}, text)]),
    rows.flatMap(({ key, label, unit }) => [
      el("dt", {}, label),
      el("dd", {}, stored(rollouts, key, facts[key]), unit ? [" ", el("small", {}, unit)] : null),
    ]),
  );
}
