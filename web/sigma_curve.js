// @ts-check
/**
 * The factor on a LoRA's strength over sigma, as text such as `1:0, 0.9:0.6, 0:0.3` or a preset. No DOM. Mirrors `host/sigma_curve.py`;
 * `tests/web/curve_cases.json` holds both to the same numbers.
 */

/** @typedef {[number, number]} Point sigma and factor */

export const MAX_POINTS = 64;
export const MAX_FACTOR = 10;
/** Wan2.2 text to video; image to video switches experts at 0.9. */
export const DEFAULT_BOUNDARY = 0.875;
export const SIGMA_TOLERANCE = 1e-6;

/** What the list of presets offers: text of the row, and what it does. */
export const PRESETS = Object.freeze([
  { text: "", label: "constant", title: "The same strength at every sigma." },
  { text: "ramp", label: "ramp", title: "Nothing at the start, the whole strength at the end." },
  { text: "above 0.875", label: "only above the boundary", title: "Only while the high-noise expert of Wan2.2 T2V works; write 0.9 for I2V." },
  { text: "below 0.875", label: "only below the boundary", title: "Only while the low-noise expert of Wan2.2 T2V works; write 0.9 for I2V." },
  { text: "late 0.5", label: "late", title: "Nothing down to sigma 0.5, the whole strength from 0.25 on." },
]);

/**
 * Read a curve.
 *
 * @param {string} text
 * @returns {{ points: Point[], error: string | null }} points with falling sigma; none is the factor 1 everywhere
 */
export function parseCurve(text) {
  const plain = text.trim().toLowerCase();
  const preset = /^(constant|ramp|above|below|late)(?:\s+(\S+))?$/.exec(plain);
  try {
    if (!plain || preset) return { points: presetPoints(preset?.[1] ?? "constant", preset?.[2]), error: null };
    const points = plain
      .split(/[,;\n]/)
      .filter((part) => part.trim())
      .map(readPoint);
    return { points: inOrder(points), error: null };
  } catch (error) {
    return { points: [], error: /** @type {Error} */ (error).message };
  }
}

/**
 * @param {string} name
 * @param {string | undefined} number
 * @returns {Point[]}
 */
function presetPoints(name, number) {
  if (name === "constant" || name === "ramp") {
    if (number !== undefined) throw new Error(`${name} takes no number`);
    return name === "constant" ? [] : [[1, 0], [0, 1]]; // prettier-ignore
  }
  const sigma = number === undefined ? (name === "late" ? 0.5 : DEFAULT_BOUNDARY) : readNumber(number, 0, 1, "sigma");
  if (name === "late") return [[1, 0], [sigma, 0], [sigma / 2, 1], [0, 1]]; // prettier-ignore
  const [above, below] = name === "above" ? [1, 0] : [0, 1];
  return [[1, above], [sigma, above], [sigma, below], [0, below]]; // prettier-ignore
}

/**
 * @param {string} part
 * @returns {Point}
 */
function readPoint(part) {
  const colon = part.indexOf(":");
  if (colon < 0) throw new Error(`${part.trim()} is no sigma:factor, such as 0.9:0.6`);
  return [readNumber(part.slice(0, colon), 0, 1, "sigma"), readNumber(part.slice(colon + 1), -MAX_FACTOR, MAX_FACTOR, "factor")];
}

/**
 * @param {string} text
 * @param {number} low
 * @param {number} high
 * @param {string} what
 */
function readNumber(text, low, high, what) {
  const number = /^\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?\s*$/.test(text) ? Number(text) : NaN;
  if (!(number >= low && number <= high)) throw new Error(`${what} ${text.trim()} must be a number from ${low} to ${high}`);
  return number;
}

/**
 * @param {Point[]} points
 * @returns {Point[]} with falling sigma
 */
function inOrder(points) {
  if (points.length > MAX_POINTS) throw new Error(`${points.length} points; ${MAX_POINTS} are allowed`);
  const rises = points.every(([sigma], i) => i === 0 || sigma >= points[i - 1][0]);
  const falls = points.every(([sigma], i) => i === 0 || sigma <= points[i - 1][0]);
  if (!rises && !falls) throw new Error("the sigmas are out of order; write them from 1 down to 0");
  if (points.some(([sigma]) => points.filter((other) => other[0] === sigma).length > 2)) throw new Error("more than two points at one sigma");
  return falls ? points : [...points].reverse();
}

/**
 * The factor at a sigma. At a step the value of the larger sigmas counts.
 *
 * @param {Point[]} points
 * @param {number} sigma
 * @returns {number}
 */
export function factorAt(points, sigma) {
  for (let i = 0; i < points.length; i++) {
    const [at, factor] = points[i];
    if (sigma < at - SIGMA_TOLERANCE) continue;
    if (i === 0) return factor;
    const [above, aboveFactor] = points[i - 1];
    const share = above > at ? Math.min(1, Math.max(0, (sigma - at) / (above - at))) : 1;
    return factor + share * (aboveFactor - factor);
  }
  return points.length ? points[points.length - 1][1] : 1;
}

/** @param {Point[]} points */
export function isConstant(points) {
  return points.every(([, factor]) => factor === points[0][1]);
}

/**
 * @param {Point[]} points
 * @returns {string} text that `parseCurve` reads
 */
export function writeCurve(points) {
  return points.map(([sigma, factor]) => `${tidy(sigma)}:${tidy(factor)}`).join(", ");
}

/** @param {number} value */
function tidy(value) {
  return Math.round(value * 1000) / 1000 || 0;
}

/**
 * The curve with one point moved; it stays between its neighbours.
 *
 * @param {Point[]} points
 * @param {number} index
 * @param {Point} to
 * @returns {Point[]}
 */
export function movePoint(points, index, [sigma, factor]) {
  const above = index > 0 ? points[index - 1][0] : 1;
  const below = index < points.length - 1 ? points[index + 1][0] : 0;
  const moved = /** @type {Point} */ ([Math.min(above, Math.max(below, sigma)), Math.min(MAX_FACTOR, Math.max(-MAX_FACTOR, factor))]);
  return points.map((point, i) => (i === index ? moved : point));
}

/**
 * The curve with one more point. A constant curve gets its ends first.
 *
 * @param {Point[]} points
 * @param {Point} point
 * @returns {Point[]}
 */
export function addPoint(points, point) {
  const whole = points.length ? points : /** @type {Point[]} */ ([[1, 1], [0, 1]]); // prettier-ignore
  const at = whole.findIndex(([sigma]) => sigma < point[0]);
  return at < 0 ? [...whole, point] : [...whole.slice(0, at), point, ...whole.slice(at)];
}
