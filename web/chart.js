// @ts-check
/**
 * Line charts on a 2D canvas. `draw` is a pure function of its view: no DOM, no clock, no state. Panes share the x axis and lie
 * on top of each other, so that reward and loss each keep a scale of their own.
 */
import { nearest } from "./series.js";

/** @typedef {import("./series.js").Point} Point */

/**
 * @typedef {object} Line
 * @property {string} label
 * @property {string} color
 * @property {Point[]} points ascending in x
 * @property {boolean} [faint] drawn thin and pale (raw values behind a smoothed line); left out of legend and read-out
 * @property {boolean} [markers] each point gets a dot
 */

/**
 * @typedef {object} Pane
 * @property {string} title
 * @property {Line[]} lines
 * @property {number} weight share of the height
 */

/**
 * @typedef {object} Theme
 * @property {string} text
 * @property {string} muted
 * @property {string} grid
 * @property {string} surface background of the read-out
 * @property {string} font font family
 */

/**
 * @typedef {object} View
 * @property {number} width_px
 * @property {number} height_px
 * @property {Theme} theme
 * @property {Pane[]} panes
 * @property {[number, number]} xRange
 * @property {string} xLabel
 * @property {number | null} hover_px pointer position from the left edge, null when it is elsewhere
 * @property {boolean} [compact] no axis labels: for charts on a node
 */

/** @typedef {{ left: number, top: number, width: number, height: number }} Box */

const FONT_PX = 11;

/**
 * Round tick positions that cover a range.
 *
 * @param {number} min
 * @param {number} max not smaller than min
 * @param {number} count how many ticks are wanted; the result holds about as many
 * @returns {number[]} inside [min, max], ascending
 */
export function niceTicks(min, max, count) {
  const span = max - min;
  if (!(span > 0) || count < 1) return [min];
  const raw = span / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw) ?? 10 * power;
  const ticks = [];
  for (let i = Math.ceil(min / step - 1e-9); i * step <= max + span * 1e-9; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/**
 * A number as short as its neighbourhood allows: enough digits to tell apart values that differ by `step`.
 *
 * @param {number} value
 * @param {number} step
 * @returns {string}
 */
export function formatTick(value, step) {
  if (value === 0) return "0";
  const magnitude = Math.abs(value);
  if (magnitude >= 1e6 || magnitude < 1e-4) return value.toExponential(1).replace("e+", "e");
  const digits = step > 0 ? Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))) : 2;
  return value.toFixed(digits);
}

/**
 * Smallest and largest value of a pane with a little air; a flat line gets a range around it.
 *
 * @param {Line[]} lines
 * @returns {[number, number] | null} null without points
 */
export function valueRange(lines) {
  let min = Infinity;
  let max = -Infinity;
  for (const line of lines) {
    for (const point of line.points) {
      min = Math.min(min, line.faint ? point.lo : point.y);
      max = Math.max(max, line.faint ? point.hi : point.y);
    }
  }
  if (min > max) return null;
  const air = max > min ? (max - min) * 0.08 : Math.max(Math.abs(max) * 0.05, 1e-6);
  return [min - air, max + air];
}

/**
 * Draw the panes and, under the pointer, the read-out.
 *
 * @param {CanvasRenderingContext2D} ctx scaled so that one unit is one CSS pixel
 * @param {View} view
 * @returns {{ x: number, rows: Array<{ label: string, value: number }> } | null} what the read-out shows
 */
export function draw(ctx, view) {
  const { width_px, height_px, theme, panes, compact } = view;
  ctx.clearRect(0, 0, width_px, height_px);
  ctx.font = `${FONT_PX}px ${theme.font}`;
  ctx.lineJoin = "round";
  const boxes = layout(view);
  const x = scale(view.xRange, [boxes[0].left, boxes[0].left + boxes[0].width]);
  panes.forEach((pane, i) => drawPane(ctx, view, pane, boxes[i], x));
  if (!compact) drawXAxis(ctx, view, boxes[boxes.length - 1], x);
  return view.hover_px === null ? null : drawReadOut(ctx, view, boxes, x);
}

/**
 * @param {View} view
 * @returns {Box[]} plot area of each pane
 */
function layout(view) {
  const { width_px, height_px, panes, compact } = view;
  const left = compact ? 4 : 48;
  const right = compact ? 4 : 10;
  const title = compact ? 4 : 20;
  const bottom = compact ? 4 : 32;
  const total = panes.reduce((sum, pane) => sum + pane.weight, 0);
  const free = height_px - bottom - title * panes.length;
  let top = 0;
  return panes.map((pane) => {
    const box = { left, top: top + title, width: Math.max(1, width_px - left - right), height: Math.max(1, (free * pane.weight) / total) };
    top = box.top + box.height;
    return box;
  });
}

/**
 * @param {[number, number]} from
 * @param {[number, number]} to
 * @returns {(value: number) => number}
 */
function scale([a, b], [c, d]) {
  const factor = b > a ? (d - c) / (b - a) : 0;
  return (value) => c + (value - a) * factor;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {View} view
 * @param {Pane} pane
 * @param {Box} box
 * @param {(value: number) => number} x
 */
function drawPane(ctx, view, pane, box, x) {
  const { theme, compact } = view;
  const range = valueRange(pane.lines);
  if (!compact) drawLegend(ctx, theme, pane, box);
  ctx.strokeStyle = theme.grid;
  ctx.lineWidth = 1;
  if (!range) {
    line(ctx, box.left, box.top + box.height, box.left + box.width, box.top + box.height);
    if (!compact) {
      ctx.fillStyle = theme.muted;
      ctx.textAlign = "center";
      ctx.textBaseline = "middle";
      ctx.fillText("no values yet", box.left + box.width / 2, box.top + box.height / 2);
    }
    return;
  }
  const y = scale(range, [box.top + box.height, box.top]);
  if (!compact) {
    const wanted = Math.max(2, Math.round(box.height / 34));
    let ticks = niceTicks(range[0], range[1], wanted);
    for (let more = wanted + 1; ticks.length < 2 && more < wanted + 4; more += 1) ticks = niceTicks(range[0], range[1], more);
    const step = ticks.length > 1 ? ticks[1] - ticks[0] : range[1] - range[0];
    ctx.fillStyle = theme.muted;
    ctx.textAlign = "right";
    ctx.textBaseline = "middle";
    for (const tick of ticks) {
      const at = Math.round(y(tick)) + 0.5;
      line(ctx, box.left, at, box.left + box.width, at);
      ctx.fillText(formatTick(tick, step), box.left - 6, at);
    }
  }
  ctx.save();
  ctx.beginPath();
  ctx.rect(box.left, box.top - 1, box.width + 2, box.height + 2);
  ctx.clip();
  for (const item of pane.lines) drawLine(ctx, item, x, y);
  ctx.restore();
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Theme} theme
 * @param {Pane} pane
 * @param {Box} box
 */
function drawLegend(ctx, theme, pane, box) {
  ctx.textBaseline = "middle";
  ctx.textAlign = "left";
  let at = box.left;
  const middle = box.top - 10;
  for (const item of pane.lines.filter((candidate) => !candidate.faint)) {
    ctx.strokeStyle = item.color;
    ctx.lineWidth = 2;
    if (item.markers) dot(ctx, at + 6, middle, 3, item.color);
    else line(ctx, at, middle, at + 12, middle);
    ctx.fillStyle = theme.text;
    ctx.fillText(item.label, at + 17, middle);
    at += 17 + ctx.measureText(item.label).width + 14;
  }
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {Line} item
 * @param {(value: number) => number} x
 * @param {(value: number) => number} y
 */
function drawLine(ctx, item, x, y) {
  if (!item.points.length) return;
  ctx.strokeStyle = item.color;
  ctx.globalAlpha = item.faint ? 0.35 : 1;
  ctx.lineWidth = item.faint ? 1 : 2;
  ctx.beginPath();
  item.points.forEach((point, i) => (i ? ctx.lineTo(x(point.x), y(point.y)) : ctx.moveTo(x(point.x), y(point.y))));
  ctx.stroke();
  const isSingle = item.points.length === 1 && !item.faint;
  if (item.markers || isSingle) for (const point of item.points) dot(ctx, x(point.x), y(point.y), 2.5, item.color);
  ctx.globalAlpha = 1;
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {View} view
 * @param {Box} box the lowest pane
 * @param {(value: number) => number} x
 */
function drawXAxis(ctx, view, box, x) {
  const { theme, xRange, xLabel } = view;
  const bottom = box.top + box.height;
  // Steps are whole numbers: a tick between two of them would be a lie.
  const ticks = niceTicks(xRange[0], xRange[1], Math.max(2, Math.round(box.width / 70))).filter(Number.isInteger);
  const step = ticks.length > 1 ? ticks[1] - ticks[0] : 1;
  ctx.fillStyle = theme.muted;
  ctx.strokeStyle = theme.grid;
  ctx.lineWidth = 1;
  ctx.textAlign = "center";
  ctx.textBaseline = "top";
  for (const tick of ticks) {
    line(ctx, x(tick), bottom, x(tick), bottom + 4);
    ctx.fillText(formatTick(tick, step), x(tick), bottom + 6);
  }
  ctx.fillText(xLabel, box.left + box.width / 2, bottom + 19);
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {View} view
 * @param {Box[]} boxes
 * @param {(value: number) => number} x
 * @returns {{ x: number, rows: Array<{ label: string, value: number }> } | null}
 */
function drawReadOut(ctx, view, boxes, x) {
  const { theme, panes, xRange } = view;
  const [first] = boxes;
  const share = Math.min(1, Math.max(0, ((view.hover_px ?? 0) - first.left) / first.width));
  const wanted = xRange[0] + share * (xRange[1] - xRange[0]);
  const longest = panes
    .flatMap((pane) => pane.lines)
    .reduce((/** @type {Point[]} */ best, item) => (item.points.length > best.length ? item.points : best), []);
  const anchor = nearest(longest, wanted);
  if (!anchor) return null;
  const last = boxes[boxes.length - 1];
  ctx.strokeStyle = theme.muted;
  ctx.lineWidth = 1;
  line(ctx, x(anchor.x), first.top, x(anchor.x), last.top + last.height);
  /** @type {Array<{ label: string, value: number, color: string }>} */
  const rows = [];
  panes.forEach((pane, i) => {
    const range = valueRange(pane.lines);
    if (!range) return;
    const y = scale(range, [boxes[i].top + boxes[i].height, boxes[i].top]);
    for (const item of pane.lines.filter((candidate) => !candidate.faint)) {
      const point = nearest(item.points, anchor.x);
      if (!point) continue;
      dot(ctx, x(point.x), y(point.y), 3.5, item.color);
      rows.push({ label: item.label, value: point.y, color: item.color });
    }
  });
  drawReadOutBox(ctx, view, first, x(anchor.x), `${view.xLabel} ${Math.round(anchor.x)}`, rows);
  return { x: anchor.x, rows: rows.map(({ label, value }) => ({ label, value })) };
}

/**
 * @param {CanvasRenderingContext2D} ctx
 * @param {View} view
 * @param {Box} box
 * @param {number} at pointer line
 * @param {string} title
 * @param {Array<{ label: string, value: number, color: string }>} rows
 */
function drawReadOutBox(ctx, view, box, at, title, rows) {
  const { theme } = view;
  const texts = rows.map((row) => `${row.label}  ${Number(row.value.toPrecision(4))}`);
  const width = Math.max(ctx.measureText(title).width, ...texts.map((text) => ctx.measureText(text).width + 14)) + 16;
  const height = 12 + (rows.length + 1) * 15;
  const left = at + 10 + width > view.width_px ? at - 10 - width : at + 10;
  ctx.fillStyle = theme.surface;
  ctx.strokeStyle = theme.grid;
  ctx.beginPath();
  ctx.roundRect(Math.max(0, left), box.top + 4, width, height, 5);
  ctx.fill();
  ctx.stroke();
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  ctx.fillStyle = theme.muted;
  ctx.fillText(title, Math.max(0, left) + 8, box.top + 4 + 13);
  rows.forEach((row, i) => {
    const middle = box.top + 4 + 13 + (i + 1) * 15;
    dot(ctx, Math.max(0, left) + 12, middle, 3, row.color);
    ctx.fillStyle = theme.text;
    ctx.fillText(texts[i], Math.max(0, left) + 21, middle);
  });
}

/** @param {CanvasRenderingContext2D} ctx @param {number} x0 @param {number} y0 @param {number} x1 @param {number} y1 */
function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

/** @param {CanvasRenderingContext2D} ctx @param {number} x @param {number} y @param {number} radius @param {string} color */
function dot(ctx, x, y, radius, color) {
  ctx.fillStyle = color;
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, Math.PI * 2);
  ctx.fill();
}
