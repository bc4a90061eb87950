// @ts-check
/**
 * The rows of `Load Reward LoRAs`. The node's own `rows` text widget stays the only truth: it is hidden, this view reads and
 * writes its JSON. So workflows, the API and the TestLab see plain text, and the node also works without this page.
 */
import { curveIcon } from "./curve_editor.js";
import { el, icon, onceAFrame, shieldFromCanvas } from "./dom.js";
import { openFilePicker } from "./file_picker.js";
import { changeRow, expertOf, matchReports, moveRow, newRow, parseRows, rowStatus, tailStart, totals, writeRows } from "./rows_model.js";
import { detailsHeight, rowDetails } from "./row_details.js";
import { isConstant, parseCurve } from "./sigma_curve.js";
import { strengthField } from "./strength_field.js";

/** @typedef {import("./rows_model.js").Row} Row */
/** @typedef {import("./rows_model.js").RowReport} RowReport */

const NO_FILES = "No LoRA found. Put .safetensors files into ComfyUI/models/loras and press R.";
const SUM_WARNING = 1.0;

/**
 * @param {object} options
 * @param {() => string} options.read text of the `rows` widget
 * @param {(text: string) => void} options.write
 * @param {() => Promise<string[]>} options.listFiles
 * @param {(message: string) => void} options.onError
 * @param {(anchor: HTMLElement, file: string, onDone: (file: string) => void) => void} options.convert asks for a layout and converts a file
 * @param {(anchor: HTMLElement, onDone: (file: string) => void) => void} options.download asks for an official file and downloads it
 * @param {(height_px: number) => void} options.onResize the height that the rows need changed
 * @returns {{ element: HTMLElement, refresh(): void, setReports(reports: RowReport[]): void, height_px(): number, destroy(): void }}
 */
export function createRowsView({ read, write, listFiles, onError, convert, download, onResize }) {
  const list = el("div", { class: "rl-rows" });
  const foot = el("div", { class: "rl-rows-foot" });
  const element = el("div", { class: "rl-root rl-rows-root" }, [header(), list, foot]);
  /** @type {Row[]} */
  let rows = [];
  /** @type {Array<RowReport | null>} report of each row, null where there is none or the row changed since */
  let reports = [];
  /** @type {boolean[]} rows whose details are folded out */
  let isOpen = [];
  let lastText = "";
  shieldFromCanvas(element);

  const save = (/** @type {Row[]} */ next, /** @type {Array<RowReport | null>} */ nextReports, redraw = true) => {
    rows = next;
    reports = nextReports;
    lastText = writeRows(rows);
    write(lastText);
    if (redraw) render();
    else renderFoot();
  };
  const without = (/** @type {number} */ index) => reports.map((report, i) => (i === index ? null : report));
  const edit = (/** @type {number} */ index, /** @type {Partial<Row>} */ change, redraw = true) => save(changeRow(rows, index, change), without(index), redraw);
  const pick = async (/** @type {HTMLElement} */ anchor, /** @type {string} */ current, /** @type {(file: string) => void} */ onPick) => {
    try {
      openFilePicker(anchor, { files: await listFiles(), current, emptyText: NO_FILES, onPick });
    } catch (error) {
      onError(/** @type {Error} */ (error).message);
    }
  };
  const drag = startDrag(list, (from, to) => {
    isOpen = moveRow(rows.map((_, i) => isOpen[i] ?? false), from, to);
    save(moveRow(rows, from, to), moveRow(reports, from, to));
  });

  const renderFoot = () => {
    const add = el("button", { class: "rl-button rl-add", type: "button" }, [icon("plus"), el("span", { text: "Add LoRA" })]);
    add.addEventListener("click", () => void pick(add, "", (file) => save([...rows, newRow(file)], [...reports, null])));
    const official = el("button", { class: "rl-button rl-official", type: "button", title: "Download a reward LoRA of the authors from the Hugging Face hub" }, [
      icon("download"),
      el("span", { text: "Official files…" }),
    ]);
    official.addEventListener("click", () => download(official, (file) => save([...rows, newRow(file)], [...reports, null])));
    const sum = totals(rows);
    const isMuch = sum.high > SUM_WARNING || sum.low > SUM_WARNING;
    const text = sum.active ? `sum  high ${sum.high.toFixed(2)}  ·  low ${sum.low.toFixed(2)}` : "";
    const title = isMuch
      ? "Sums above about 1 tend to burn the picture and freeze motion. Compare strengths with TestLab."
      : "Sum of the active strengths on each expert.";
    foot.replaceChildren(el("div", { class: "rl-foot-buttons" }, [add, official]), el("span", { class: `rl-sum${isMuch ? " rl-warn" : ""}`, text, title }));
  };
  const render = () => {
    const { error } = parseRows(read());
    if (error) list.replaceChildren(broken(error, () => save([], [])));
    else if (!rows.length)
      list.replaceChildren(el("div", { class: "rl-rows-empty", text: "No LoRA yet. 0.5 is the strength of the authors' examples; it is not tuned." }));
    else
      list.replaceChildren(
        ...rows.map((row, i) =>
          rowElement(row, reports[i] ?? null, i, isOpen[i] ?? false, {
            edit,
            pick,
            drag,
            unfold: () => {
              isOpen[i] = !isOpen[i];
              render();
            },
            convert: (/** @type {HTMLElement} */ anchor) => convert(anchor, row.file, (file) => edit(i, { file })),
            remove: () => {
              isOpen.splice(i, 1);
              save(
                rows.filter((_, at) => at !== i),
                reports.filter((_, at) => at !== i),
              );
            },
          }),
        ),
      );
    renderFoot();
    sizeWatch.request();
  };
  const sizeWatch = onceAFrame(() => onResize(height_px()));
  const height_px = () =>
    30 + 34 + (rows.length ? rows.reduce((sum, row, i) => sum + rowHeight(row, reports[i] ?? null, isOpen[i] ?? false), 0) : 48);
  const refresh = () => {
    const text = read();
    if (text === lastText && list.childElementCount) return;
    lastText = text;
    rows = parseRows(text).rows;
    reports = rows.map(() => null);
    isOpen = [];
    render();
  };
  refresh();
  return {
    element,
    refresh,
    setReports(next) {
      refresh();
      reports = matchReports(rows, next);
      render();
    },
    height_px,
    destroy: () => sizeWatch.cancel(),
  };
}

/**
 * @param {Row} row
 * @param {RowReport | null} report
 * @param {boolean} isOpen
 */
function rowHeight(row, report, isOpen) {
  return 32 + (statusOf(row, report) ? 18 : 0) + warningCount(report) * 16 + (isOpen ? detailsHeight(row, report) : 0);
}

/** @param {RowReport | null | undefined} report */
function warningCount(report) {
  return Math.min(3, report?.warnings?.length ?? 0);
}

function header() {
  return el("div", { class: "rl-rows-head" }, [
    el("span", { class: "rl-head-file", text: "LoRA" }),
    el("span", { class: "rl-head-strength", text: "high noise", title: "Strength on the high-noise expert: composition and motion." }),
    el("span", { class: "rl-head-strength", text: "low noise", title: "Strength on the low-noise expert: detail and finish." }),
  ]);
}

/**
 * @param {string} message
 * @param {() => void} reset
 */
function broken(message, reset) {
  const button = el("button", { class: "rl-button", type: "button", text: "Start with no rows" });
  button.addEventListener("click", reset);
  return el("div", { class: "rl-rows-broken" }, [el("span", { text: message }), button]);
}

/**
 * @param {Row} row
 * @param {RowReport | null} report
 */
function statusOf(row, report) {
  return report && row.on ? rowStatus(row, report) : null;
}

/**
 * @param {Row} row
 * @param {RowReport | null} report
 * @param {number} index
 * @param {boolean} isOpen
 * @param {{ edit: Function, pick: Function, drag: Function, unfold: () => void, convert: (anchor: HTMLElement) => void, remove: () => void }} actions
 */
function rowElement(row, report, index, isOpen, actions) {
  const handle = el("span", { class: "rl-handle", title: "Drag to reorder" }, [icon("bars")]);
  handle.addEventListener("pointerdown", (event) => actions.drag(event, index));
  const toggle = el("button", {
    class: "rl-toggle",
    type: "button",
    role: "switch",
    "aria-checked": String(row.on),
    title: row.on ? "Switch this LoRA off" : "Switch this LoRA on",
  });
  toggle.addEventListener("click", () => actions.edit(index, { on: !row.on }));
  const expert = expertOf(row.file);
  const cut = Math.max(row.file.lastIndexOf("/"), row.file.lastIndexOf("\\")) + 1;
  const file = el("button", { class: "rl-file", type: "button", title: row.file || "Choose a file" }, [
    expert ? el("span", { class: "rl-expert", data: { expert }, text: expert === "high" ? "H" : "L", title: `The name says: ${expert}-noise expert` }) : null,
    ...fileNameParts(row.file.slice(cut).replace(/\.safetensors$/, "") || "choose a file"),
    icon("chevron-down"),
  ]);
  file.addEventListener("click", () => actions.pick(file, row.file, (/** @type {string} */ chosen) => actions.edit(index, { file: chosen })));
  const strength = (/** @type {"high" | "low"} */ side) => {
    const onChange = (/** @type {number} */ value, /** @type {boolean} */ isFinal) => actions.edit(index, { [side]: value }, isFinal && report !== null);
    return strengthField({ side, value: row[side], title: `Strength on the ${side}-noise expert`, onChange });
  };
  const remove = el("button", { class: "rl-icon-button", type: "button", title: "Remove", "aria-label": "Remove" }, [icon("times")]);
  remove.addEventListener("click", actions.remove);
  const line = el("div", { class: "rl-row-line" }, [handle, toggle, file, strength("high"), strength("low"), moreButton(row, isOpen, actions.unfold), remove]);
  const status = statusOf(row, report);
  const notes = status
    ? [el("div", { class: "rl-status", data: { tone: status.tone } }, [el("i", { class: "rl-dot" }), el("span", { text: status.text })])]
    : [];
  for (const warning of (status?.warnings ?? []).slice(0, 3)) notes.push(el("div", { class: "rl-row-warning", text: warning, title: warning }));
  const edit = (/** @type {Partial<Row>} */ change, redraw = true) => actions.edit(index, change, redraw);
  const details = isOpen ? rowDetails(row, report, { edit, convert: actions.convert }) : null;
  return el("div", { class: `rl-row${row.on ? "" : " rl-off"}`, data: { index: String(index) } }, [line, ...notes, details]);
}

/**
 * The button that folds the details out. It shows the curve where there is one, and is marked where the row has more than strengths.
 *
 * @param {Row} row
 * @param {boolean} isOpen
 * @param {() => void} unfold
 */
function moreButton(row, isOpen, unfold) {
  const { points, error } = parseCurve(row.curve ?? "");
  const told = [row.curve ? `strength over sigma: ${row.curve}` : "", row.blocks ? `blocks: ${row.blocks}` : ""].filter(Boolean).join("\n");
  const more = el("button", {
    class: `rl-icon-button rl-more${row.curve || row.blocks ? " rl-marked" : ""}${error ? " rl-warn" : ""}`,
    type: "button",
    "aria-expanded": String(isOpen),
    "aria-label": "Details",
    title: told || "Strength over sigma, strengths per block, report",
  });
  more.append(points.length && !isConstant(points) ? curveIcon(points) : icon("sliders-h"));
  more.addEventListener("click", unfold);
  return more;
}

/**
 * When space is short, the middle gives way.
 *
 * @param {string} name
 */
function fileNameParts(name) {
  const cut = tailStart(name);
  return [
    el("span", { class: "rl-file-name", text: name.slice(0, cut) }),
    el("span", { class: "rl-file-tail", text: name.slice(cut) }),
    el("span", { class: "rl-file-fill" }),
  ];
}

/**
 * Reorder by dragging a handle: the row follows the pointer, the others make room, and the new order is told on release.
 *
 * @param {HTMLElement} list
 * @param {(from: number, to: number) => void} onMove
 */
function startDrag(list, onMove) {
  return (/** @type {PointerEvent} */ event, /** @type {number} */ from) => {
    event.preventDefault();
    event.stopPropagation();
    const rows = /** @type {HTMLElement[]} */ ([...list.children]);
    const boxes = rows.map((row) => row.getBoundingClientRect());
    const zoom = boxes[from].height / (rows[from].offsetHeight || 1) || 1;
    let to = from;
    rows[from].classList.add("rl-dragged");
    const move = (/** @type {PointerEvent} */ moved) => {
      const shift = moved.clientY - event.clientY;
      const middle = boxes[from].top + boxes[from].height / 2 + shift;
      to = boxes.filter((box, i) => i !== from && box.top + box.height / 2 < middle).length;
      rows.forEach((row, i) => {
        const step = i === from ? shift : i > from && i <= to ? -boxes[from].height : i < from && i >= to ? boxes[from].height : 0;
        row.style.transform = step ? `translateY(${step / zoom}px)` : "";
      });
    };
    const end = () => {
      document.removeEventListener("pointermove", move);
      document.removeEventListener("pointerup", end);
      document.removeEventListener("pointercancel", end);
      for (const row of rows) row.style.transform = "";
      rows[from].classList.remove("rl-dragged");
      if (to !== from) onMove(from, to);
    };
    document.addEventListener("pointermove", move);
    document.addEventListener("pointerup", end);
    document.addEventListener("pointercancel", end);
  };
}
