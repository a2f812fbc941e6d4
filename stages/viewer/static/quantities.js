"use strict";
// What a token can be coloured by. A value becomes v in [0, 1]; CSS mixes the hue --hot into the paper by v.

const QUANTITIES = [
  {
    key: "rkl",
    label: "Reverse KL",
    short: "R",
    unit: "nats",
    hue: "warm",
    ends: ["agree", "far apart"],
    help:
      "KL(student‖teacher) at this position, in nats. Large where the student puts mass that the teacher" +
      " does not.",
  },
  {
    key: "fkl",
    label: "Forward KL",
    short: "F",
    unit: "nats",
    hue: "warm",
    ends: ["agree", "far apart"],
    help:
      "KL(teacher‖student) at this position, in nats. Large where the student misses what the teacher" +
      " would write.",
  },
  {
    key: "lambda",
    label: "Gate λ",
    short: "λ",
    unit: "",
    hue: "gate",
    ends: ["1, reverse KL", "0, forward KL"],
    help: "Weight of the reverse KL in the loss of this token; the forward KL has 1 − λ.",
  },
  {
    key: "gap",
    label: "Teacher − behaviour logprob",
    short: "Δ",
    unit: "nats",
    hue: "both",
    ends: ["teacher: less likely", "more likely"],
    help: "Log-probability of the written token by the teacher minus by the policy that wrote it.",
  },
  {
    key: "teacher_logprob",
    label: "Teacher logprob",
    short: "log q",
    unit: "nats",
    hue: "cool",
    ends: ["likely", "unlikely"],
    help: "Log-probability of the written token by the teacher.",
  },
  {
    key: "behaviour_logprob",
    label: "Behaviour logprob",
    short: "log μ",
    unit: "nats",
    hue: "cool",
    ends: ["likely", "unlikely"],
    help: "Log-probability of the written token under the policy that wrote it, as it was sampled.",
  },
  {
    key: "teacher_entropy",
    label: "Teacher entropy",
    short: "H(q)",
    unit: "nats",
    hue: "teal",
    ends: ["certain", "open"],
    help: "Entropy of the teacher's distribution at this position.",
  },
  {
    key: "student_entropy",
    label: "Student entropy",
    short: "H(p)",
    unit: "nats",
    hue: "teal",
    ends: ["certain", "open"],
    help: "Entropy of the policy that wrote the row, at this position.",
  },
  {
    key: "trained_logprob",
    label: "Student logprob in training",
    short: "log p",
    unit: "nats",
    hue: "cool",
    ends: ["likely", "unlikely"],
    help: "Log-probability of the written token by the student, at the step that trained on the row.",
  },
  {
    key: "trained_entropy",
    label: "Student entropy in training",
    short: "H(p′)",
    unit: "nats",
    hue: "teal",
    ends: ["certain", "open"],
    help: "Entropy of the student's distribution, at the step that trained on the row.",
  },
  {
    key: "tail",
    label: "Teacher's tail mass",
    short: "tail",
    unit: "",
    hue: "violet",
    ends: ["none", "much"],
    help: "Teacher's probability outside the ids that the cache keeps.",
  },
  {
    key: "student_tail",
    label: "Student's tail mass",
    short: "tail p",
    unit: "",
    hue: "violet",
    ends: ["none", "much"],
    help: "Student's probability outside the ids that the cache keeps, at the step that trained on the row.",
  },
];

const domains = new Map();

function quantity(key) {
  return QUANTITIES.find((one) => one.key === key);
}

function available(rollouts) {
  return QUANTITIES.filter((one) => has(rollouts, one.key));
}

// The magnitude that is drawn strongest: the 99th percentile over the rows, rounded up to 1, 2 or 5.
function domain(rollouts, key) {
  if (key === "lambda") return Promise.resolve(1);
  const known = domains.get(rollouts) ?? new Map();
  domains.set(rollouts, known);
  if (!known.has(key)) known.set(key, percentile(rollouts, key));
  return known.get(key);
}

async function percentile(rollouts, key) {
  const found = await values(rollouts, key, 0, rollouts.tokens);
  const every = Math.max(1, Math.floor(found.length / 20000));
  const sizes = found
    .filter((value, i) => i % every === 0 && !Number.isNaN(value))
    .map(Math.abs)
    .sort();
  const high = sizes[Math.floor(0.99 * (sizes.length - 1))] || 1;
  const power = 10 ** Math.floor(Math.log10(high));
  return [1, 2, 5, 10].map((k) => k * power).find((k) => k >= high * 0.999);
}

// How strongly a value is drawn, in [0, 1]; small values stay visible by the square root. NaN: not known.
function strength(key, value, top) {
  if (Number.isNaN(value)) return NaN;
  if (key === "lambda") return Math.min(1, Math.max(0, 1 - value));
  return Math.sqrt(Math.min(1, Math.abs(value) / top));
}

function isCold(key, value) {
  return key === "gap" && value > 0;
}

function legend(one, top) {
  const signed = one.hue === "both";
  const cells = Array.from({ length: 21 }, (_, i) => {
    const v = signed ? Math.abs(i - 10) / 10 : i / 20;
    return el("i", { class: signed && i > 10 ? "cold" : null, "--v": v });
  });
  const values =
    one.key === "lambda"
      ? [1, 0.5, 0]
      : one.key.endsWith("logprob")
        ? [0, -top / 4, -top]
        : [0, top / 4, top];
  const shown = (signed ? [-top, 0, top] : values).map((value) => el("span", {}, tick(value)));
  const [from, to] = one.ends;
  return el(
    "figure",
    { class: "legend hue-" + one.hue, "aria-label": `Colours from ${from} to ${to}` },
    el("figcaption", {}, from),
    el("div", { class: "ramp" }, el("div", { class: "cells" }, cells), el("div", { class: "ticks" }, shown)),
    el("figcaption", {}, to),
  );
}
