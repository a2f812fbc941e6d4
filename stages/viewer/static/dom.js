"use strict";
// Elements, numbers and text. Text from a run enters the page through text nodes alone.

const SVG = "http://www.w3.org/2000/svg";

// el("p", {class: "note", onclick: f, "--v": 0.5}, "text", child): null attributes and children are left out.
function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (name === "styles") Object.assign(node.style, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return node;
}

// Replace the children of a node; the control of the same name keeps the focus.
function replaced(node, ...children) {
  const nameOf = (one) => one.getAttribute("aria-label") ?? one.textContent;
  const focused = node.contains(document.activeElement) ? document.activeElement : null;
  const [tag, name] = focused ? [focused.tagName, nameOf(focused)] : [null, null];
  node.replaceChildren(...children);
  if (tag)
    [...node.querySelectorAll(tag)].find((one) => nameOf(one) === name)?.focus({ preventScroll: true });
}

function say(text) {
  document.getElementById("said").textContent = text;
}

// Control and format characters and lone surrogates as visible codes: U+202E cannot reorder what is read. Joiners
// within a word or an emoji stay.
const WORD = "\\p{L}\\p{Extended_Pictographic}";
const JOINER = `(?<=[${WORD}\\p{M}\\ufe0f])[\\u200c\\u200d](?=[${WORD}])`;
const UNSEEN = new RegExp(`(?![\\n\\t]|${JOINER})[\\p{Cc}\\p{Cf}\\p{Cs}\\p{Zl}\\p{Zp}]`, "gu");
function visible(text) {
  return text.replace(UNSEEN, (char) => {
    const code = char.codePointAt(0);
    if (code < 0x20) return String.fromCodePoint(0x2400 + code);
    return "⟨" + code.toString(16).toUpperCase().padStart(4, "0") + "⟩";
  });
}

const MINUS = "−";
function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e7)
    return value
      .toExponential(1)
      .replace("e-", "e" + MINUS)
      .replace("e+", "e")
      .replace(/^-/, MINUS);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US").replace(/^-/, MINUS);
  return value.toFixed(size >= 100 ? 1 : size >= 10 ? 2 : digits).replace(/^-/, MINUS);
}

function measure(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return (100 * value).toFixed(1).replace(/^-/, MINUS) + "%";
  return unit === "nats" ? value.toFixed(4).replace(/^-/, MINUS) : number(value);
}

function duration(seconds) {
  if (seconds < 60) return seconds.toFixed(1) + " s";
  const whole = Math.round(seconds);
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60)];
  return hours ? `${hours} h ${minutes} min` : `${minutes} min ${whole % 60} s`;
}

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = count > 0 ? Math.min(4, Math.floor(Math.log2(count) / 10)) : 0;
  return (count / 2 ** (10 * power)).toFixed(power ? 1 : 0) + " " + units[power];
}

function plural(count, noun) {
  return `${count.toLocaleString("en-US")} ${noun}${count === 1 ? "" : "s"}`;
}

function solvedMark(solved) {
  if (solved === null || solved === undefined) return null;
  const label = solved ? "solved" : "not solved";
  return el(
    "span",
    { class: solved ? "mark right" : "mark wrong", role: "img", "aria-label": label, title: label },
    solved ? "✓" : "✗",
  );
}

function select(label, options, value, changed) {
  const field = el("select", { "aria-label": label, onchange: (event) => changed(event.target.value) });
  for (const [key, text] of options)
    field.append(el("option", { value: key, selected: key === value }, text));
  return field;
}

// The colour that a CSS value, as "var(--ink)", has in the present theme.
function resolved(value) {
  const probe = el("i", { styles: { color: value, display: "none" } });
  document.body.append(probe);
  const colour = getComputedStyle(probe).color;
  probe.remove();
  return colour;
}

function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-6; i++)
    found.push(Number((i * step).toPrecision(12)));
  return found;
}
