// @ts-check
/** The rows of `Load Reward LoRAs` as data: reading and writing the JSON text of its `rows` widget. No DOM. */

/**
 * @typedef {object} Row
 * @property {boolean} on
 * @property {string} file
 * @property {number} high strength on the high-noise expert
 * @property {number} low strength on the low-noise expert
 * @property {string} [curve] factor on both strengths over sigma
 * @property {string} [blocks] factors per block
 * @property {string} [application] `merged` or `bypass` for this row alone
 */

/**
 * @typedef {object} RowReport what the node reports per row
 * @property {string} file
 * @property {boolean} on
 * @property {number} high the strengths that the row had
 * @property {number} low
 * @property {number | null} applied_high null where the row does not act on that expert
 * @property {number | null} applied_low
 * @property {number} total
 * @property {string[]} warnings
 * @property {string} [detail] expert, layers, rank and alpha in words
 * @property {string[]} [unmerged] experts beside whose weights the row runs
 * @property {Record<string, number>} [kinds] kind of adapter -> weights
 * @property {Record<string, number>} [left_out] kind of key -> keys
 * @property {number} [memory_bytes]
 * @property {string} [layout] name of the file's key layout
 * @property {Record<string, { value: number, text: string }>} [shares] expert -> how much the row changes the weights it acts on
 */

/** @typedef {{ tone: "good" | "warn" | "bad", text: string, warnings: string[] }} RowStatus */

/** Letters of a name's end that stay readable, and the most where the name speaks of the expert there. */
const TAIL_LENGTH = 18, TAIL_LONGEST = 22;
/** The strength in the examples of the reward LoRAs' authors. It is not tuned. */
export const EXAMPLE_STRENGTH = 0.5;
export const STEP = 0.05;
export const LIMIT = 10;

/**
 * @param {string} text the widget's value
 * @returns {{ rows: Row[], error: string | null }} `error` says why the text cannot be shown as rows; then nothing may be written back
 */
export function parseRows(text) {
  if (!text || !text.trim()) return { rows: [], error: null };
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    return { rows: [], error: `The rows are not JSON: ${/** @type {Error} */ (error).message}` };
  }
  if (!Array.isArray(value)) return { rows: [], error: "The rows must be a JSON list of objects." };
  const wrong = value.findIndex((row) => row === null || typeof row !== "object" || Array.isArray(row));
  if (wrong >= 0) return { rows: [], error: `Row ${wrong + 1} is not an object with "file", "high" and "low".` };
  return { rows: value.map(readRow), error: null };
}

/**
 * @param {any} row other members stay, for forms of the row that this page does not know
 * @returns {Row}
 */
function readRow(row) {
  return { ...row, on: row.on !== false, file: String(row.file ?? ""), high: readStrength(row.high), low: readStrength(row.low) };
}

/** @param {unknown} value what is left out is 0, as the server reads it */
function readStrength(value) {
  const number = typeof value === "number" ? value : Number.parseFloat(String(value));
  return Number.isFinite(number) ? number : 0;
}

/**
 * @param {Row[]} rows
 * @returns {string} JSON, one row a line
 */
export function writeRows(rows) {
  return rows.length ? `[\n${rows.map((row) => `  ${JSON.stringify(row)}`).join(",\n")}\n]` : "[]";
}

/**
 * Which expert a file name speaks of. The official names carry `high-noise` or `low-noise`.
 *
 * @param {string} file
 * @returns {"high" | "low" | null}
 */
export function expertOf(file) {
  const name = file.toLowerCase();
  const isHigh = /(^|[^a-z])high([^a-z]|$)/.test(name);
  const isLow = /(^|[^a-z])low([^a-z]|$)/.test(name);
  return isHigh === isLow ? null : isHigh ? "high" : "low";
}

/**
 * Where the part of a name begins that must stay readable when space is short: LoRA names differ at their end. It begins where the name speaks of
 * the expert, if that is near the end, else at a separator.
 *
 * @param {string} name
 */
export function tailStart(name) {
  const expert = /[-_ .](?:high|low)(?=[^a-z]|$)/i.exec(name.slice(-TAIL_LONGEST));
  if (expert) return Math.max(0, name.length - TAIL_LONGEST) + expert.index;
  const cut = Math.max(0, name.length - TAIL_LENGTH);
  const separator = name.slice(cut, cut + 6).search(/[-_ .]/);
  return cut === 0 || separator < 0 ? cut : cut + separator;
}

/**
 * A row for a newly chosen file: the example strength on the expert that the name speaks of, 0 on the other.
 *
 * @param {string} file
 * @returns {Row}
 */
export function newRow(file) {
  const expert = expertOf(file);
  return { on: true, file, high: expert === "low" ? 0 : EXAMPLE_STRENGTH, low: expert === "high" ? 0 : EXAMPLE_STRENGTH };
}

/**
 * The rows with one changed.
 *
 * @param {Row[]} rows
 * @param {number} index
 * @param {Partial<Row>} change a new file also brings its strengths when the row has none yet
 * @returns {Row[]}
 */
export function changeRow(rows, index, change) {
  return rows.map((row, i) => {
    if (i !== index) return row;
    if (change.file !== undefined && !row.file) return { ...row, ...newRow(change.file), on: row.on };
    return withoutEmpty({ ...row, ...change });
  });
}

/**
 * A row without the texts that say nothing, so that plain rows stay short.
 *
 * @param {Row} row
 * @returns {Row}
 */
function withoutEmpty(row) {
  const plain = { ...row };
  for (const name of /** @type {const} */ (["curve", "blocks", "application"])) if (plain[name] === "") delete plain[name];
  return plain;
}

/**
 * A list with one entry moved to another place.
 *
 * @template T
 * @param {T[]} rows
 * @param {number} from
 * @param {number} to its place in the result
 * @returns {T[]}
 */
export function moveRow(rows, from, to) {
  const rest = rows.filter((_, i) => i !== from);
  rest.splice(Math.max(0, Math.min(rest.length, to)), 0, rows[from]);
  return rest;
}

/**
 * A strength inside the limits, without binary dust such as 0.15000000000000002.
 *
 * @param {number} value
 * @returns {number}
 */
export function tidyStrength(value) {
  if (!Number.isFinite(value)) return EXAMPLE_STRENGTH;
  const limited = Math.max(-LIMIT, Math.min(LIMIT, value));
  return Math.round(limited * 1000) / 1000 || 0;
}

/**
 * Sum of the active strengths per expert. Above about 1 in all, reward LoRAs tend to burn the picture.
 *
 * @param {Row[]} rows
 * @returns {{ high: number, low: number, active: number }}
 */
export function totals(rows) {
  const active = rows.filter((row) => row.on && row.file);
  const sum = (/** @type {"high" | "low"} */ side) => tidyStrength(active.reduce((total, row) => total + Math.abs(row[side]), 0));
  return { high: sum("high"), low: sum("low"), active: active.length };
}

/**
 * Files that contain every word of the query, best first.
 *
 * @param {string[]} files
 * @param {string} query
 * @returns {string[]}
 */
export function searchFiles(files, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  return files.filter((file) => words.every((word) => file.toLowerCase().includes(word)));
}

/**
 * Find each row's report of the last execution. Rows may have been moved, changed or removed since, and a file may stand in several.
 *
 * @param {Row[]} rows
 * @param {RowReport[]} reports in the order that the rows had, those that were off too
 * @returns {Array<RowReport | null>} one per row; null where it is off or did not run as it is now
 */
export function matchReports(rows, reports) {
  const left = reports.filter((report) => report.on);
  return rows.map((row) => {
    const at = row.on ? left.findIndex(({ file, high, low }) => file === row.file && high === row.high && low === row.low) : -1;
    return at < 0 ? null : left.splice(at, 1)[0];
  });
}

/**
 * What to show for a row that was applied.
 *
 * @param {Row} row as it was when it ran
 * @param {RowReport} report
 * @returns {RowStatus}
 */
export function rowStatus(row, report) {
  const counts = { high: report.applied_high, low: report.applied_low };
  const sides = /** @type {const} */ (["high", "low"]).flatMap((side) => (row[side] !== 0 && counts[side] !== null ? [{ side, applied: counts[side] }] : []));
  const warnings = report.warnings ?? [];
  if (!sides.length) return { tone: "warn", text: "both strengths were 0", warnings };
  const text = sides.map(({ side, applied }) => `${side} ${applied} of ${report.total}`).join(" · ");
  const isBad = sides.some(({ applied }) => applied === 0);
  const isPart = sides.some(({ applied }) => applied < report.total) || warnings.length > 0;
  return { tone: isBad ? "bad" : isPart ? "warn" : "good", text: `applied ${text}`, warnings };
}

/** Words for the kinds of keys that a report may say were left out, and whether that loses nothing. */
const LEFT_OUT = Object.freeze({
  image_branch: "of Wan2.1's image branch (nothing is lost)",
  text_encoder: "for a text encoder",
  duplicate: "naming a layer twice",
  unknown: "unknown",
  misfit: "of layers with another size",
});

/**
 * The facts of a report, one line each.
 *
 * @param {RowReport} report
 * @returns {string[]}
 */
export function reportFacts(report) {
  const facts = [];
  if (report.detail) facts.push(report.detail);
  const kinds = Object.entries(report.kinds ?? {}).map(([kind, count]) => `${count} ${kind}`);
  const bytes = report.memory_bytes ?? 0;
  const size = bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(1)} MB` : `${Math.ceil(bytes / 1e3)} kB`;
  const how = report.unmerged?.length ? `unmerged on ${report.unmerged.join(" and ")} noise` : "merged into the weights";
  if (kinds.length) facts.push([kinds.join(", "), bytes ? size : "", report.layout ? `layout ${report.layout}` : "", how].filter(Boolean).join(" · "));
  const shares = Object.entries(report.shares ?? {}).map(([expert, share]) => `${expert} noise ${share.text}`);
  if (shares.length) facts.push(`changes: ${shares.join(" · ")}`);
  const left = Object.entries(report.left_out ?? {}).map(([kind, count]) => `${count} keys ${LEFT_OUT[/** @type {keyof typeof LEFT_OUT} */ (kind)] ?? kind}`);
  if (left.length) facts.push(`left out: ${left.join("; ")}`);
  return facts;
}
