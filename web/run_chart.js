// @ts-check
/** A canvas with the curves of one run: turns a RunDetail into a chart view, follows size, theme and pointer. */
import { draw } from "./chart.js";
import { el, onceAFrame } from "./dom.js";
import { smooth } from "./series.js";

/** @typedef {import("./run_store.js").RunDetail} RunDetail */

/** Line colours that hold on dark and on light backgrounds and stay apart for colour-blind readers. */
const COLORS = { dark: { reward: "#4aa8ff", heldOut: "#ffb347", loss: "#b58cff" }, light: { reward: "#0b6bcb", heldOut: "#b85c00", loss: "#6b3fc4" } };

/**
 * @param {RunDetail} detail
 * @param {{ reward: string, heldOut: string, loss: string }} colors
 * @param {boolean} compact
 * @returns {{ panes: import("./chart.js").Pane[], xRange: [number, number] }}
 */
export function chartPanes(detail, colors, compact) {
  const measure = detail.started?.measure ?? "reward";
  const reward = detail.reward.points();
  const heldOut = detail.heldOut.points();
  const loss = detail.loss.points();
  const rewardLines = [
    { label: "raw", color: colors.reward, points: reward, faint: true },
    { label: measure, color: colors.reward, points: smooth(reward) },
    ...(heldOut.length ? [{ label: `held-out ${measure}`, color: colors.heldOut, points: heldOut, markers: true }] : []),
  ];
  const lossLines = [
    { label: "raw", color: colors.loss, points: loss, faint: true },
    { label: "loss", color: colors.loss, points: smooth(loss) },
  ];
  const xs = [...reward, ...heldOut].map((point) => point.x);
  const last = xs.length ? Math.max(...xs) : 1;
  const first = xs.length ? Math.min(...xs) : 0;
  const panes = [{ title: measure, lines: rewardLines, weight: 3 }];
  if (!compact) panes.push({ title: "loss", lines: lossLines, weight: 2 });
  return { panes, xRange: [first, Math.max(last, first + 1)] };
}

/**
 * @param {object} [options]
 * @param {number} [options.height_px]
 * @param {boolean} [options.compact]
 * @returns {{ element: HTMLCanvasElement, show(detail: RunDetail): void, destroy(): void }}
 */
export function createRunChart({ height_px = 260, compact = false } = {}) {
  const canvas = el("canvas", { class: "rl-chart", role: "img", "aria-label": "Reward and loss over the steps", style: { height: `${height_px}px` } });
  /** @type {RunDetail | null} */
  let detail = null;
  /** @type {number | null} */
  let hover_px = null;
  const frame = onceAFrame(() => detail && paint(canvas, detail, hover_px, compact));
  const resize = new ResizeObserver(() => frame.request());
  resize.observe(canvas);
  if (!compact) {
    canvas.addEventListener("pointermove", (event) => {
      hover_px = event.offsetX;
      frame.request();
    });
    canvas.addEventListener("pointerleave", () => {
      hover_px = null;
      frame.request();
    });
  }
  return {
    element: canvas,
    show(next) {
      detail = next;
      frame.request();
    },
    destroy() {
      resize.disconnect();
      frame.cancel();
    },
  };
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {RunDetail} detail
 * @param {number | null} hover_px
 * @param {boolean} compact
 */
function paint(canvas, detail, hover_px, compact) {
  const [width_px, height_px] = [canvas.clientWidth, canvas.clientHeight];
  if (!width_px || !height_px) return;
  const ratio = (globalThis.devicePixelRatio || 1) * (compact ? 2 : 1); // a node may be zoomed in
  canvas.width = Math.round(width_px * ratio);
  canvas.height = Math.round(height_px * ratio);
  const ctx = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  const { theme, isDark } = readTheme(canvas);
  draw(ctx, { width_px, height_px, theme, xLabel: "step", hover_px, compact, ...chartPanes(detail, isDark ? COLORS.dark : COLORS.light, compact) });
}

/**
 * Colours of the user's palette.
 *
 * @param {HTMLElement} element
 */
function readTheme(element) {
  const style = getComputedStyle(element);
  const read = (/** @type {string} */ name, /** @type {string} */ fallback) => style.getPropertyValue(name).trim() || fallback;
  const text = style.color;
  const [red, green, blue] = (text.match(/[\d.]+/g) ?? ["255", "255", "255"]).map(Number);
  const isDark = 0.3 * red + 0.6 * green + 0.1 * blue > 128; // light text means a dark theme
  const theme = {
    text,
    muted: read("--rl-muted", "#8a8a8a"),
    grid: isDark ? "rgba(255, 255, 255, 0.10)" : "rgba(0, 0, 0, 0.12)",
    surface: read("--comfy-menu-bg", isDark ? "#202020" : "#ffffff"),
    font: style.fontFamily || "sans-serif",
  };
  return { theme, isDark };
}
