"use strict";
// Held-out prompts with the answers of the student before and after training and of the teacher.

const OUTCOMES = [
  ["all", "all answers", () => true],
  ["fixed", "solved only after", ({ before, after }) => after?.solved === true && before?.solved === false],
  ["broken", "solved only before", ({ before, after }) => after?.solved === false && before?.solved === true],
  ["wrong", "not solved after", ({ after }) => after?.solved === false],
  ["changed", "text changed", ({ before, after }) => before?.text !== after?.text],
];

function answerView(state) {
  const run = RUNS[state.run];
  const answers = run.answers ?? [];
  if (!answers.length)
    return el(
      "div",
      { class: "overview" },
      RUNS.length > 1 ? runTabs(state) : null,
      el("p", { class: "empty" }, "No answers: this run has not been evaluated, or it is a cache."),
    );
  const kinds = OUTCOMES.map(([key, text, test]) => [key, text, answers.filter(test)]).filter(
    ([key, , found]) => key === "all" || found.length,
  );
  const outcome = kinds.some(([key]) => key === state.outcome) ? state.outcome : "all";
  const buttons = kinds.map(([key, text, found]) =>
    el(
      "button",
      { type: "button", "aria-pressed": String(key === outcome), onclick: () => go({ outcome: key }) },
      text,
      el("small", {}, String(found.length)),
    ),
  );
  const sought = el("input", {
    type: "search",
    id: "search",
    placeholder: "Search prompts and answers",
    "aria-label": "Search",
    value: state.query,
    oninput: (event) => {
      setState({ query: event.target.value });
      fill();
    },
  });
  const cards = el("div", { class: "answers" });
  const fill = () => {
    const words = STATE.query.trim().toLowerCase();
    const found = kinds
      .find(([key]) => key === outcome)[2]
      .filter((one) => !words || answerText(one).includes(words));
    cards.replaceChildren(
      ...(found.length ? found.map(answerCard) : [el("p", { class: "empty" }, "No answer matches.")]),
    );
  };
  fill();
  return el(
    "div",
    { class: "overview" },
    el("h1", { class: "unseen" }, `Answers of ${visible(run.name)}`),
    RUNS.length > 1 ? runTabs(state) : null,
    el(
      "div",
      { class: "bar" },
      el("div", { class: "tabs", role: "group", "aria-label": "Outcome" }, buttons),
      sought,
      el(
        "span",
        { class: "unit" },
        el("mark", { class: "gone" }, "words"),
        " that training removed, ",
        el("mark", { class: "new" }, "words"),
        " that it brought; for the teacher, those that differ from after",
        run.prompts > answers.length
          ? `. The first ${answers.length} of ${plural(run.prompts, "held-out prompt")}, at temperature 0`
          : ". At temperature 0",
      ),
    ),
    cards,
  );
}

function answerText(one) {
  return [promptText(one), ...WHO.map(([who]) => one[who]?.text ?? "")].join("\n").toLowerCase();
}

function answerCard(one) {
  const against = { before: [one.after, "gone"], after: [one.before, "new"], teacher: [one.after, "new"] };
  const columns = WHO.filter(([who]) => one[who]).map(([who]) => {
    const [other, name] = against[who];
    const text = one[who].text ?? "";
    return el(
      "div",
      { class: "by" },
      el(
        "div",
        { class: "line" },
        el("i", { class: "dot " + who }),
        el("b", {}, who),
        solvedMark(one[who].solved),
        one[who].finish === "length" ? el("span", { class: "tag" }, "cut") : null,
      ),
      el("div", { class: "said" }, other ? marked(text, other.text ?? "", name) : visibleText(text)),
    );
  });
  return el("article", { class: "answer" }, turns(one).map(turn), el("div", { class: "columns" }, columns));
}
