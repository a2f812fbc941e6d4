"use strict";
// Tokens at which student and teacher are farthest apart, each a link to its rollout.

const MOST_WORST = 10;
const MOST_OF_A_ROW = 2;

// What tells how far apart they are: reverse KL where rows were traced, else the log-probabilities.
function worstKind(rollouts) {
  return ["rkl", "gap"].find((key) => has(rollouts, key));
}

function worstSection(run) {
  const { rollouts } = run;
  const key = rollouts?.rows?.length ? worstKind(rollouts) : null;
  if (!key) return null;
  const body = el("tbody", {});
  const measured = key === "rkl" ? "reverse KL" : "teacher − behaviour logprob";
  const head = ["the token, in its text", measured, "the teacher's first choice"];
  fillWorst(rollouts, key, body);
  return section(
    "Farthest apart",
    `tokens of the largest ${key === "rkl" ? "reverse KL when they were trained on" : "fall in log-probability"}` +
      `, at most ${MOST_OF_A_ROW} of a rollout, among those on this page`,
    el(
      "div",
      { class: "scroll", tabindex: 0, role: "region", "aria-label": "Tokens that are farthest apart" },
      el(
        "table",
        { class: "plain worst" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            head.map((text) => el("th", { scope: "col" }, text)),
          ),
        ),
        body,
      ),
    ),
  );
}

async function fillWorst(rollouts, key, body) {
  const [ids, column] = await Promise.all([tokenIds(rollouts), values(rollouts, key, 0, rollouts.tokens)]);
  const found = worstOf(rollouts, key, column);
  const tops = await Promise.all(
    found.map(({ row, place }) => topFive(rollouts, "teacher", row.offset + place)),
  );
  body.replaceChildren(...found.map((one, i) => worstRow(rollouts, key, ids, one, tops[i][0])));
}

// [{row, place, value}], farthest apart first.
function worstOf(rollouts, key, column) {
  const sign = key === "gap" ? -1 : 1;
  const all = rollouts.rows
    .filter(({ source }) => source === "cache")
    .flatMap((row) =>
      Array.from(column.subarray(row.offset, row.offset + row.tokens), (value, place) => ({
        row,
        place,
        value,
      }))
        .filter(({ value }) => sign * value > 0)
        .sort((a, b) => sign * (b.value - a.value))
        .slice(0, MOST_OF_A_ROW),
    );
  return all.sort((a, b) => sign * (b.value - a.value)).slice(0, MOST_WORST);
}

function worstRow(rollouts, key, ids, { row, place, value }, first) {
  const text = (from, end) => {
    let found = "";
    for (let i = Math.max(0, from); i < Math.min(row.tokens, end); i++)
      found += pieceText(piece(rollouts, ids[row.offset + i]));
    return visible(found).replaceAll("\n", "↵");
  };
  const written = piece(rollouts, ids[row.offset + place]);
  const opened = () =>
    go({ ...FRESH, run: STATE.run, view: "rollouts", row: row.id, token: place, colour: key });
  return el(
    "tr",
    {},
    el(
      "td",
      { class: "context" },
      el(
        "button",
        { type: "button", class: "quiet", onclick: opened, title: `Open token ${place + 1} of its rollout` },
        el("span", { class: "before-it" }, el("bdi", {}, text(place - 12, place).slice(-48))),
        pieceNode(written),
        el("span", { class: "after-it" }, text(place + 1, place + 8).slice(0, 28)),
      ),
    ),
    el("td", {}, stored(rollouts, key, value)),
    el(
      "td",
      { class: "choice" },
      first ? [pieceNode(piece(rollouts, first.id)), " ", roughShare(first.probability)] : "–",
    ),
  );
}
