"use strict";
// The page's data: runs, columns that are decoded when first asked for, and rows of a served cache.

const DATA = JSON.parse(document.getElementById("dualkl-data").textContent);
const RUNS = DATA.runs;
const decoded = new Map();

// base64 of a raw deflate stream, as a response that can be read once.
function unpacked(text) {
  const raw = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const read = (how) => () =>
    new Response(stream)[how]().catch(() => {
      throw new Error("This page's data are damaged: a column cannot be unpacked.");
    });
  return { arrayBuffer: read("arrayBuffer"), json: read("json") };
}

// A column lies slot after slot, and its codes in planes: all low bytes, then all next ones.
async function inflate(column) {
  const planes = new Uint8Array(await unpacked(column.data).arrayBuffer());
  const size = { u8: 1, u16: 2, u32: 4 }[column.dtype];
  const count = planes.length / size;
  const found = new { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array }[size](count);
  for (let plane = 0; plane < size; plane++) {
    for (let i = 0; i < count; i++) found[i] += planes[plane * count + i] * 256 ** plane;
  }
  return found;
}

// Local token ids of a column, slot after slot, -1 where missing. The first codes of a column that refers to
// others mean "the same id as there".
async function ids(rollouts, name) {
  const found = await codes(rollouts, name);
  if (!found) return null;
  const column = rollouts.columns[name];
  const others = await Promise.all((column.refers ?? []).map((other) => ids(rollouts, other)));
  const count = found.length / (column.width ?? 1);
  const slots = others.flatMap((other) =>
    Array.from({ length: other.length / count }, (_, slot) =>
      other.subarray(slot * count, (slot + 1) * count),
    ),
  );
  return Int32Array.from(found, (code, i) => {
    if (code === column.missing) return -1;
    return code < slots.length ? slots[code][i % count] : code - slots.length;
  });
}

const idColumns = new Map();

// As `ids`, decoded once.
function tokenIds(rollouts, name = "token") {
  const column = rollouts.columns?.[name];
  if (!column) return Promise.resolve(null);
  if (!idColumns.has(column)) idColumns.set(column, ids(rollouts, name));
  return idColumns.get(column);
}

// The vocabulary comes packed; put the array of its entries in its place.
async function openVocabulary(rollouts) {
  const { vocabulary } = rollouts;
  if (!vocabulary?.data) return;
  rollouts.vocabulary = await unpacked(vocabulary.data).json();
}

// A column's codes, or null for one that the rows do not have.
function codes(rollouts, name) {
  const column = rollouts.columns[name];
  if (!column) return Promise.resolve(null);
  if (!decoded.has(column)) decoded.set(column, inflate(column));
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
  const { law, scale = 1, missing, width = 1 } = rollouts.columns[name];
  const from = (slot * found.length) / width;
  const spread = law ? LAWS[law] : (code) => code;
  return Float64Array.from(found.subarray(from + start, from + stop), (code) =>
    code === missing ? NaN : spread(code, scale),
  );
}

async function countOf(rollouts) {
  return (await codes(rollouts, "token")).length;
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

// The chat turns of a row's prompt; a prompt that is known as text alone is one turn.
function turns(rollouts, row) {
  const prompt = rollouts.prompts?.[row.prompt] ?? row;
  if (prompt.messages?.length) return prompt.messages;
  const text = prompt.text ?? prompt.prompt_text;
  return text ? [{ role: "prompt", content: text }] : [];
}

function promptText(rollouts, row) {
  return turns(rollouts, row)
    .map((message) => messageText(message))
    .join("\n");
}

function messageText(message) {
  return typeof message.content === "string" ? message.content : JSON.stringify(message.content);
}

// The completion as text; rows of a served cache bring the beginning alone.
async function completionText(rollouts, row, most = Infinity) {
  if (row.offset === undefined || row.offset === null) return row.snippet ?? "";
  const found = await tokenIds(rollouts);
  const stop = row.offset + Math.min(row.tokens, most);
  let text = "";
  for (let i = row.offset; i < stop; i++) text += pieceText(piece(rollouts, found[i]));
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
