"use strict";
// A completion as tokens that are coloured, walked by arrow keys, and chosen.

// What the page needs of a row's tokens: local ids, and each quantity's values where known.
async function tokensOf(rollouts, row) {
  const [start, stop] = [row.offset, row.offset + row.tokens];
  const ids = (await tokenIds(rollouts)).subarray(start, stop);
  const kinds = available(rollouts);
  const columns = await Promise.all(kinds.map(({ key }) => values(rollouts, key, start, stop)));
  return { ids, columns: Object.fromEntries(kinds.map(({ key }, i) => [key, columns[i]])) };
}

function tokenNode(rollouts, local, place) {
  const one = piece(rollouts, local);
  const node = el("span", { class: "token", id: "t" + place, role: "option", "aria-selected": "false" });
  if (one.s !== undefined) node.append(el("span", { class: "chip" }, visible(one.s)));
  else if (one.b !== undefined) node.append(el("span", { class: "chip bytes" }, one.b));
  else withBreaks(node, visible(one.t));
  return node;
}

// Line breaks and tabs as a mark and the break itself.
function withBreaks(node, text) {
  for (const part of text.split(/(\n|\t)/)) {
    if (part === "\n") node.append(el("span", { class: "break", "aria-hidden": "true" }, "↵"), "\n");
    else if (part === "\t") node.append(el("span", { class: "break", "aria-hidden": "true" }, "⇥"), "\t");
    else if (part) node.append(part);
  }
}

// Colour the nodes by a quantity; unknown values are left plain and dotted.
function paint(nodes, key, column, top) {
  nodes.forEach((node, i) => {
    const v = column ? strength(key, column[i], top) : NaN;
    node.classList.toggle("unknown", Number.isNaN(v));
    node.classList.toggle("cold", isCold(key, column?.[i]));
    node.style.setProperty("--v", Number.isNaN(v) ? 0 : v.toFixed(3));
  });
}

// The token a line above or below, nearest in horizontal place.
function lineAway(nodes, from, direction) {
  const here = nodes[from].getBoundingClientRect();
  let [best, distance, line] = [from, Infinity, null];
  for (let i = from + direction; i >= 0 && i < nodes.length; i += direction) {
    const box = nodes[i].getBoundingClientRect();
    if (direction > 0 ? box.top < here.top + 4 : box.top > here.top - 4) continue;
    line ??= box.top;
    if (Math.abs(box.top - line) > 4) break;
    if (Math.abs(box.left - here.left) < distance) [best, distance] = [i, Math.abs(box.left - here.left)];
  }
  return best;
}

// The next token, in a direction, among the tenth that is drawn strongest.
function nextStrong(key, column, top, from, direction) {
  if (!column) return from;
  const drawn = Array.from(column, (value) => strength(key, value, top) || 0);
  const limit = Math.max([...drawn].sort((a, b) => b - a)[Math.floor(drawn.length / 10)], 1e-9);
  for (let i = from + direction; i >= 0 && i < drawn.length; i += direction) if (drawn[i] >= limit) return i;
  return from;
}

// Words of `text`, with those that are not in `other` (by the longest common subsequence) marked. Texts that
// share less than a quarter of their words are left as they are: marks everywhere say nothing.
function marked(text, other, name) {
  const [a, b] = [other, text].map((one) => one.split(/(\s+)/).filter((word) => word));
  const kept = common(a, b);
  const words = kept.filter((_, i) => b[i].trim());
  if (words.filter((one) => one).length < words.length / 4)
    return [el("span", { class: "differs" }, "a different text"), visibleText(text)];
  return b.map((word, i) => {
    if (kept[i] || !word.trim()) return visibleText(word);
    return el("mark", { class: name }, visibleText(word));
  });
}

function visibleText(text) {
  const span = document.createDocumentFragment();
  withBreaks(span, visible(text));
  return span;
}

// For each word of b, whether a longest common subsequence with a has it. Long texts: the common ends alone.
function common(a, b) {
  const kept = new Array(b.length).fill(false);
  let [start, tail] = [0, 0];
  while (start < a.length && start < b.length && a[start] === b[start]) kept[start++] = true;
  while (tail < Math.min(a.length, b.length) - start && a.at(-1 - tail) === b.at(-1 - tail))
    kept[b.length - ++tail] = true;
  const [n, m] = [a.length - tail - start, b.length - tail - start];
  if (n <= 0 || m <= 0 || n * m > 4e6) return kept;
  const length = new Uint16Array((n + 1) * (m + 1));
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      const at = i * (m + 1) + j;
      length[at] =
        a[start + i] === b[start + j] ? length[at + m + 2] + 1 : Math.max(length[at + m + 1], length[at + 1]);
    }
  }
  for (let i = 0, j = 0; i < n && j < m;) {
    const at = i * (m + 1) + j;
    if (a[start + i] === b[start + j]) ((kept[start + j] = true), i++, j++);
    else if (length[at + m + 1] >= length[at + 1]) i++;
    else j++;
  }
  return kept;
}
