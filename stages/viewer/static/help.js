"use strict";
// What each quantity means, a line each, and the keys.

const KEYS = [
  ["o r a ?", "overview, rollouts, answers, help"],
  ["j k", "next and previous rollout"],
  ["← →", "previous and next token; on a curve, step"],
  ["↑ ↓", "token a line above or below"],
  ["n p", "next and previous strongly coloured token"],
  ["c", "next quantity to colour by"],
  ["/", "search"],
  ["t", "light or dark"],
  ["Esc", "close the token; leave the search"],
];
const TERMS = [
  ["Rollout", "One completion that a policy sampled for a prompt, with its log-probabilities."],
  ["Behaviour policy", "The student as it was when it wrote the rollout."],
  ["Cut", "The completion ended at max_new_tokens, not at an end token."],
  ["Refresh", "New rollouts from the current student; number 0 is stage one itself."],
  ["Gate", "λ = σ(α (τ − D)); the loss of a token is λ · reverse KL + (1 − λ) · forward KL."],
  ["τ, α", "The divergence D at which λ is one half, and the slope of the gate there."],
  ["Drift", "Mean of behaviour − student log-probability over a step's tokens, in nats per token."],
  [
    "Interval",
    "How far a figure would move with other prompts, 95 %: Wilson's interval for the share of prompts that are" +
      " solved or cut, a bootstrap over prompts for means over tokens. With few prompts it is wide. Runs are compared" +
      " prompt by prompt: by Bonett and Price's interval for shares, else by a paired bootstrap.",
  ],
  [
    "Within chance",
    "So uneven a split of the prompts whose outcome changed is likely without any effect (McNemar's exact" +
      " test, p ≥ 0.05).",
  ],
  [
    "Traced row",
    "A row for which training kept λ, both KLs and the student's top five, each trace_every steps.",
  ],
  ["Tail", "All ids that the cache does not keep, as one outcome with their probability."],
  [
    "Figures of a rollout",
    "Means over its tokens. Teacher − behaviour: the difference of their log-probabilities; entropy: the teacher's.",
  ],
];

function helpView() {
  const list = (pairs) =>
    el(
      "dl",
      { class: "terms" },
      pairs.flatMap(([term, text]) => [el("dt", {}, term), el("dd", {}, text)]),
    );
  const keys = el(
    "dl",
    { class: "terms" },
    KEYS.flatMap(([names, text]) => [
      el(
        "dt",
        {},
        names.split(" ").map((name) => el("kbd", {}, name)),
      ),
      el("dd", {}, text),
    ]),
  );
  return el(
    "div",
    { class: "overview help" },
    el("h1", {}, "What you see"),
    el("section", {}, el("h2", {}, "Of a token"), list(QUANTITIES.map(({ label, help }) => [label, help]))),
    el("section", {}, el("h2", {}, "Words"), list(TERMS)),
    el("section", {}, el("h2", {}, "Keys"), keys),
    el(
      "section",
      {},
      el("h2", {}, "Text"),
      list([
        ["Chips", "Special tokens by name, and bytes that are no text as hex."],
        ["↵ ⇥", "A line break or a tab; the break itself follows."],
        ["␛ ⟨202E⟩", "Control and direction marks are shown by name and have no effect."],
      ]),
    ),
  );
}
