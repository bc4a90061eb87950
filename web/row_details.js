// @ts-check
/** What folds out below a LoRA row: strength over sigma, strengths per block, the report in full, and what can be done with the file. */
import { curveEditor } from "./curve_editor.js";
import { el, icon } from "./dom.js";
import { reportFacts } from "./rows_model.js";
import { isConstant, parseCurve, PRESETS, writeCurve } from "./sigma_curve.js";

/** @typedef {import("./rows_model.js").Row} Row */
/** @typedef {import("./rows_model.js").RowReport} RowReport */

/** Height of the folded-out part without the lines of the report. */
export const DETAILS_PX = 172;
export const FACT_PX = 16;
/** Mirrors `PRESETS` of host/block_strengths.py. */
const BLOCK_PRESETS = ["first half", "last half", "attention only", "self-attention only", "cross-attention only", "feed-forward only", "blocks only"];
const BLOCKS_HELP = "For example 0-9:0.5, ffn:0.8, rest:1. Blocks, ranges, self_attn, cross_attn, attention, ffn, norm, outside, rest; the last rule that matches counts.";

/**
 * @param {Row} row
 * @param {RowReport | null} report
 * @param {object} actions
 * @param {(change: Partial<Row>, redraw?: boolean) => void} actions.edit
 * @param {(anchor: HTMLElement) => void} actions.convert
 * @returns {HTMLElement}
 */
export function rowDetails(row, report, { edit, convert }) {
  const facts = report && row.on ? reportFacts(report) : [];
  const button = el("button", { class: "rl-button rl-small rl-convert", type: "button", title: "Write this file in another key layout, beside the original" }, [
    icon("file-export"),
    el("span", { text: "Convert layout…" }),
  ]);
  button.disabled = !row.file;
  button.addEventListener("click", () => convert(button));
  return el("div", { class: "rl-details" }, [
    ...curveField(row, edit),
    blocksField(row, edit),
    el("div", { class: "rl-facts" }, [...facts.map((fact) => el("div", { class: "rl-fact", text: fact, title: fact })), button]),
  ]);
}

/** @param {Row} row @param {RowReport | null} report */
export function detailsHeight(row, report) {
  return DETAILS_PX + (report && row.on ? reportFacts(report).length * FACT_PX : 0);
}

/**
 * @param {Row} row
 * @param {(change: Partial<Row>, redraw?: boolean) => void} edit
 */
function curveField(row, edit) {
  const text = row.curve ?? "";
  const { points, error } = parseCurve(text);
  const input = el("input", { class: "rl-line-input", type: "text", value: text, spellcheck: "false", "aria-label": "Strength over sigma", placeholder: "constant" });
  input.title = "Factor on both strengths: sigma:factor pairs such as 1.0:0, 0.9:0.6, 0:0.3, or a preset. Sigma is 1 at the first step and 0 at the end.";
  typed(input, (value) => edit({ curve: value }));
  const presets = el("select", { class: "rl-preset", "aria-label": "Preset of the strength over sigma", title: "Presets" }, [
    el("option", { value: "?", text: "presets" }),
    ...PRESETS.map(({ text: value, label, title }) => el("option", { value, text: label, title })),
  ]);
  presets.addEventListener("change", () => presets.value !== "?" && edit({ curve: presets.value }));
  const head = line("σ curve", input, presets);
  if (error) return [head, el("div", { class: "rl-curve-error", text: error, title: error })];
  const picture = curveEditor({
    points,
    strengths: { high: row.high, low: row.low },
    onChange: (next, isFinal) => {
      const written = next.length && !(isConstant(next) && next[0][1] === 1) ? writeCurve(next) : "";
      input.value = written;
      edit({ curve: written }, isFinal);
    },
  });
  return [head, el("div", { class: "rl-curve-box", title: "Click to add a point, drag to move it, right-click to remove it." }, [picture])];
}

/**
 * @param {Row} row
 * @param {(change: Partial<Row>, redraw?: boolean) => void} edit
 */
function blocksField(row, edit) {
  const input = el("input", {
    class: "rl-line-input",
    type: "text",
    value: row.blocks ?? "",
    spellcheck: "false",
    "aria-label": "Strengths per block",
    placeholder: "all blocks alike",
    title: BLOCKS_HELP,
  });
  typed(input, (value) => edit({ blocks: value }));
  const presets = el("select", { class: "rl-preset", "aria-label": "Preset of the strengths per block", title: "Presets" }, [
    el("option", { value: "?", text: "presets" }),
    el("option", { value: "", text: "all blocks alike" }),
    ...BLOCK_PRESETS.map((name) => el("option", { value: name, text: name })),
  ]);
  presets.addEventListener("change", () => presets.value !== "?" && edit({ blocks: presets.value }));
  return line("blocks", input, presets);
}

/**
 * @param {string} label
 * @param {HTMLElement} input
 * @param {HTMLElement} presets
 */
function line(label, input, presets) {
  return el("div", { class: "rl-detail-line" }, [el("span", { class: "rl-detail-label", text: label }), input, presets]);
}

/**
 * @param {HTMLInputElement} input
 * @param {(value: string) => void} onTyped
 */
function typed(input, onTyped) {
  input.addEventListener("change", () => onTyped(input.value.trim()));
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter") input.blur();
    else if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
}
