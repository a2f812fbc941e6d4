"use strict";
// The page's data: runs, columns that are decoded when first asked for, and rows of a served cache.

const DATA = JSON.parse(document.getElementById("dualkl-data").textContent);
const RUNS = DATA.runs;
const decoded = new Map();

const DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%/()*+-;:=,?@^_`{|}~";
const PLACES = Uint8Array.from({ length: 128 }, (_, code) =>
  Math.max(0, DIGITS.indexOf(String.fromCharCode(code))),
);

// Bytes of base 85: five digits for four bytes, the last ones fewer.
function bytesOf(text) {
  const whole = text.padEnd(Math.ceil(text.length / 5) * 5, "~");
  const found = new DataView(new ArrayBuffer((whole.length / 5) * 4));
  for (let i = 0; i < whole.length; i += 5) {
    let number = 0;
    for (let k = 0; k < 5; k++) number = number * 85 + PLACES[whole.charCodeAt(i + k)];
    found.setUint32((i / 5) * 4, number);
  }
  return new Uint8Array(found.buffer, 0, found.byteLength - (whole.length - text.length));
}

// The inflated form of a raw deflate stream, read as "arrayBuffer" or "json".
async function unpacked(text, how) {
  if (!("DecompressionStream" in window))
    throw new Error("This browser cannot unpack the rollouts: it is older than May 2023.");
  try {
    const stream = new Blob([bytesOf(text)]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return await new Response(stream)[how]();
  } catch {
    throw new Error("This page's data are damaged: they cannot be unpacked.");
  }
}

// Rows, prompts and vocabulary come packed; put them in their places.
async function openRollouts(rollouts) {
  if (!rollouts?.packed) return;
  Object.assign(rollouts, await unpacked(rollouts.packed, "json"), { packed: null });
}

// The codes of a column of numbers, slot after slot: their first 8 bits, then the others; each is the
// difference to the slot before, and in slot 0 to the column that it comes after.
async function numbers(rollouts, column) {
  const parts = new Uint8Array(await unpacked(column.data, "arrayBuffer"));
  const low = Math.max(0, column.bits - 8);
  const count = low ? parts.length / 2 : parts.length;
  const missing = 2 ** column.bits - 1;
  const tokens = count / column.width;
  const before = column.after ? await codes(rollouts, column.after) : null;
  const found = new Uint16Array(count);
  for (let i = 0; i < count; i++) {
    const code = low ? (parts[i] << low) | parts[count + i] : parts[i];
    const base = i < tokens ? (before?.[i] ?? 0) : found[i - tokens];
    found[i] = code === missing ? missing : (code + (base === missing ? 0 : base)) % missing;
  }
  return found;
}

// Local token ids of a column, slot after slot, -1 where missing. The first codes mean "the same id as
// there" in a slot of the columns that it refers to.
async function ids(rollouts, column) {
  const parts = new Uint8Array(await unpacked(column.data, "arrayBuffer"));
  const others = await Promise.all((column.refers ?? []).map((other) => tokenIds(rollouts, other)));
  const { tokens } = rollouts;
  const count = tokens * column.width;
  const slots = others.flatMap((other) =>
    Array.from({ length: other.length / tokens }, (_, slot) =>
      other.subarray(slot * tokens, (slot + 1) * tokens),
    ),
  );
  const longer = (parts.length - count) / column.tail;
  let next = count;
  return Int32Array.from({ length: count }, (_, i) => {
    let code = parts[i];
    if (code >= column.escape) {
      code -= column.escape;
      for (let part = 0; part < column.tail; part++) code = code * 256 + parts[next + part * longer];
      code += column.escape;
      next++;
    }
    if (code === 0) return -1;
    return code <= slots.length ? slots[code - 1][i % tokens] : code - 1 - slots.length;
  });
}

// As `ids`, decoded once.
function tokenIds(rollouts, name = "token") {
  const column = rollouts.columns?.[name];
  if (!column) return Promise.resolve(null);
  if (!decoded.has(column)) decoded.set(column, ids(rollouts, column));
  return decoded.get(column);
}

// A column's codes, decoded once, or null for one that the rows do not have.
function codes(rollouts, name) {
  const column = rollouts.columns[name];
  if (!column) return Promise.resolve(null);
  if (!decoded.has(column)) decoded.set(column, numbers(rollouts, column));
  return decoded.get(column);
}

const LAWS = {
  linear: (code, scale) => scale * code,
  square: (code, scale) => scale * code * code,
  log: (code, scale) => Math.exp(scale * code),
};

// Values of tokens [start, stop) of a column, NaN where missing; of slot 0 to 4 of a top five.
async function values(rollouts, name, start, stop, slot = 0) {
  if (name === "gap") {
    const [teacher, behaviour] = await Promise.all(
      ["teacher_logprob", "behaviour_logprob"].map((one) => values(rollouts, one, start, stop)),
    );
    return teacher && behaviour ? teacher.map((value, i) => value - behaviour[i]) : null;
  }
  const found = await codes(rollouts, name);
  if (!found) return null;
  const { law, scale, bits } = rollouts.columns[name];
  const from = slot * rollouts.tokens;
  const missing = 2 ** bits - 1;
  return Float64Array.from(found.subarray(from + start, from + stop), (code) =>
    code === missing ? NaN : LAWS[law](code, scale),
  );
}

// Decimals of a value that its column stores: the last one is as large as half the distance to the next code.
function decimals(rollouts, name, value) {
  if (name === "gap")
    return Math.min(...["teacher_logprob", "behaviour_logprob"].map((one) => decimals(rollouts, one, value)));
  const { law, scale } = rollouts.columns[name];
  const size = Math.abs(scale);
  const step = law === "square" ? 2 * Math.sqrt(Math.abs(value) * size) + size : size;
  return Math.max(0, Math.min(3, Math.floor(-Math.log10(step) + 1e-9)));
}

// A value of a token as it is written: nats with up to 3 decimals, as `dualkl cache show` has them; shares in
// percent.
function stored(rollouts, name, value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (name.endsWith("tail")) return rollouts.columns[name].bits > 8 ? share(value) : "≈ " + roughShare(value);
  return value.toFixed(decimals(rollouts, name, value)).replace("-", MINUS);
}

function piece(rollouts, local) {
  return rollouts.vocabulary[local] ?? { s: "?" };
}

function pieceText(one) {
  return (
    one.t ??
    (one.s !== undefined
      ? one.s
      : one.b
          .split(" ")
          .map((byte) => "\\x" + byte)
          .join(""))
  );
}

function has(rollouts, name) {
  if (name === "gap") return has(rollouts, "teacher_logprob") && has(rollouts, "behaviour_logprob");
  return Boolean(rollouts.columns?.[name]);
}

// The chat turns of a prompt; one that is known as text alone is one turn.
function turns({ messages, text }) {
  if (messages?.length) return messages;
  return text ? [{ role: "prompt", content: text }] : [];
}

function promptText(prompt) {
  return turns(prompt)
    .map(({ content }) => content)
    .join("\n");
}

// The completion as text.
async function completionText(rollouts, row) {
  const found = await tokenIds(rollouts);
  let text = "";
  for (let i = row.offset; i < row.offset + row.tokens; i++) text += pieceText(piece(rollouts, found[i]));
  return text;
}

// What the server of `dualkl view --serve` answers; its address holds a token, so paths are relative.
async function asked(path, parameters) {
  const query = new URLSearchParams(
    Object.entries(parameters).filter(([, value]) => value !== "" && value !== null),
  );
  const answer = await fetch(`${path}?${query}`);
  const found = await answer.json();
  if (!answer.ok)
    throw new Error(found.error ?? `${path}: the server answers ${answer.status}, expected 200.`);
  return found;
}
