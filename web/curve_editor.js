// @ts-check
/** A drawing of a strength over sigma, from sigma 1 on the left to 0 on the right, whose points can be dragged. */
import { DEFAULT_BOUNDARY, addPoint, factorAt, movePoint } from "./sigma_curve.js";

/** @typedef {import("./sigma_curve.js").Point} Point */

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 520;
const HEIGHT = 90;
const PAD = { left: 26, right: 8, top: 8, bottom: 15 };
const SAMPLES = 120;
const CLICK_PX = 4;

/**
 * @param {string} tag
 * @param {Record<string, unknown>} [attributes]
 * @param {string} [text]
 * @returns {SVGElement}
 */
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  if (text !== undefined) node.textContent = text;
  return node;
}

/**
 * A small picture of a curve, for a button.
 *
 * @param {Point[]} points
 * @returns {SVGElement}
 */
export function curveIcon(points) {
  const top = Math.max(1, ...points.map(([, factor]) => Math.abs(factor)));
  const path = samples(points, (sigma, factor) => `${(1 + (1 - sigma) * 16).toFixed(1)},${(11 - (factor / top) * 9).toFixed(1)}`);
  const picture = svg("svg", { class: "rl-curve-icon", viewBox: "0 0 18 12", "aria-hidden": "true" });
  picture.append(svg("polyline", { points: path }));
  return picture;
}

/**
 * @param {Point[]} points
 * @param {(sigma: number, factor: number) => string} place
 */
function samples(points, place) {
  // Both sides of a step, so that it is drawn upright.
  const sigmas = [...Array(SAMPLES + 1).keys()].map((i) => 1 - i / SAMPLES).concat(points.flatMap(([sigma]) => [sigma, Math.max(0, sigma - 1e-5)]));
  return sigmas
    .sort((a, b) => b - a)
    .map((sigma) => place(sigma, factorAt(points, sigma)))
    .join(" ");
}

/**
 * @param {object} options
 * @param {Point[]} options.points
 * @param {{ high: number, low: number }} options.strengths
 * @param {(points: Point[], isFinal: boolean) => void} options.onChange `isFinal` is false while dragging
 * @returns {SVGElement}
 */
export function curveEditor({ points, strengths, onChange }) {
  const picture = /** @type {SVGSVGElement} */ (
    svg("svg", { class: "rl-curve", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": "Drawing of the strength over sigma" })
  );
  let current = points;
  const factors = () => current.map(([, factor]) => factor);
  const top = Math.max(1, ...factors());
  const bottom = Math.min(0, ...factors());
  const x = (/** @type {number} */ sigma) => PAD.left + (1 - sigma) * (WIDTH - PAD.left - PAD.right);
  const y = (/** @type {number} */ factor) => PAD.top + ((top - factor) / (top - bottom)) * (HEIGHT - PAD.top - PAD.bottom);
  const pointAt = (/** @type {PointerEvent | MouseEvent} */ event) => {
    const box = picture.getBoundingClientRect();
    const sigma = 1 - (((event.clientX - box.left) / box.width) * WIDTH - PAD.left) / (WIDTH - PAD.left - PAD.right);
    const factor = top - ((((event.clientY - box.top) / box.height) * HEIGHT - PAD.top) / (HEIGHT - PAD.top - PAD.bottom)) * (top - bottom);
    const round = (/** @type {number} */ value, /** @type {number} */ steps) => Math.round(value * steps) / steps;
    return /** @type {Point} */ ([Math.min(1, Math.max(0, round(sigma, 200))), Math.min(top, Math.max(bottom, round(factor, 20)))]);
  };
  const draw = () => picture.replaceChildren(...scene(current, strengths, { x, y, top, bottom }));
  const drag = (/** @type {PointerEvent} */ down) => {
    if (down.button !== 0) return;
    const target = /** @type {Element} */ (down.target);
    let index = Number(target.getAttribute("data-point") ?? -1);
    if (index < 0) {
      const point = pointAt(down);
      current = addPoint(current, point);
      index = current.indexOf(point);
    }
    let isMoved = index >= 0 && current !== points;
    picture.setPointerCapture(down.pointerId);
    const move = (/** @type {PointerEvent} */ event) => {
      if (!isMoved && Math.hypot(event.clientX - down.clientX, event.clientY - down.clientY) < CLICK_PX) return;
      isMoved = true;
      current = movePoint(current, index, pointAt(event));
      draw();
      onChange(current, false);
    };
    const end = () => {
      picture.removeEventListener("pointermove", move);
      picture.removeEventListener("pointerup", end);
      picture.removeEventListener("pointercancel", end);
      if (isMoved) onChange(current, true);
    };
    picture.addEventListener("pointermove", move);
    picture.addEventListener("pointerup", end);
    picture.addEventListener("pointercancel", end);
  };
  picture.addEventListener("pointerdown", drag);
  picture.addEventListener("contextmenu", (event) => {
    event.preventDefault();
    const index = Number(/** @type {Element} */ (event.target).getAttribute("data-point") ?? -1);
    if (index < 0) return;
    current = current.filter((_, i) => i !== index);
    onChange(current, true);
  });
  draw();
  return picture;
}

/**
 * @param {Point[]} points
 * @param {{ high: number, low: number }} strengths
 * @param {{ x: (sigma: number) => number, y: (factor: number) => number, top: number, bottom: number }} scale
 * @returns {SVGElement[]}
 */
function scene(points, strengths, { x, y, top, bottom }) {
  const path = (/** @type {(sigma: number) => boolean} */ shown) =>
    samples(points, (sigma, factor) => (shown(sigma) ? `${x(sigma).toFixed(1)},${y(factor).toFixed(1)}` : "")).trim();
  const label = (/** @type {number} */ at, /** @type {string} */ text, /** @type {string} */ anchor) =>
    svg("text", { x: at, y: HEIGHT - 4, "text-anchor": anchor }, text);
  const frame = [
    svg("line", { class: "rl-curve-axis", x1: x(1), x2: x(0), y1: y(0), y2: y(0) }),
    svg("line", { class: "rl-curve-boundary", x1: x(DEFAULT_BOUNDARY), x2: x(DEFAULT_BOUNDARY), y1: PAD.top, y2: y(bottom) }),
    svg("text", { x: PAD.left - 4, y: y(top) + 4, "text-anchor": "end" }, `×${top}`),
    svg("text", { x: PAD.left - 4, y: y(0) + 3, "text-anchor": "end" }, "0"),
    label(x(1), "σ 1", "start"),
    label(x(DEFAULT_BOUNDARY), String(DEFAULT_BOUNDARY), "middle"),
    label(x(0), "0", "end"),
  ];
  const curves = [
    svg("polyline", { class: "rl-curve-line", "data-expert": "high", "data-zero": strengths.high === 0, points: path((sigma) => sigma >= DEFAULT_BOUNDARY) }),
    svg("polyline", { class: "rl-curve-line", "data-expert": "low", "data-zero": strengths.low === 0, points: path((sigma) => sigma <= DEFAULT_BOUNDARY) }),
  ];
  const dots = points.map(([sigma, factor], i) => {
    const dot = svg("circle", { class: "rl-curve-point", cx: x(sigma), cy: y(factor), r: 4, "data-point": i });
    const values = `strength ${strength(strengths.high * factor)} high, ${strength(strengths.low * factor)} low`;
    dot.append(svg("title", {}, `sigma ${sigma}: factor ${factor}, ${values}\nDrag to move, right-click to remove.`));
    return dot;
  });
  return [...frame, ...curves, ...dots];
}

/** @param {number} value */
function strength(value) {
  return String(Math.round(value * 1000) / 1000);
}
