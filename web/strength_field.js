// @ts-check
/** A number field for a LoRA strength: drag sideways, click to type, arrows to step. */
import { el } from "./dom.js";
import { STEP, tidyStrength } from "./rows_model.js";

/** Pixels of drag per step, and how far the pointer may move before a click becomes a drag. */
const DRAG_PX_PER_STEP = 6;
const CLICK_PX = 3;

/**
 * @param {object} options
 * @param {"high" | "low"} options.side
 * @param {number} options.value
 * @param {string} options.title
 * @param {(value: number, isFinal: boolean) => void} options.onChange `isFinal` is false while dragging
 * @returns {HTMLElement}
 */
export function strengthField({ side, value, title, onChange }) {
  const input = el("input", { class: "rl-strength-input", type: "text", inputmode: "decimal", value: format(value), "aria-label": title, spellcheck: "false" });
  const down = el("button", { class: "rl-strength-step", type: "button", tabindex: "-1", "aria-label": `Lower ${title}`, text: "‹" });
  const up = el("button", { class: "rl-strength-step", type: "button", tabindex: "-1", "aria-label": `Raise ${title}`, text: "›" });
  const field = el("div", { class: "rl-strength", title: `${title}\nDrag sideways, click to type, arrow keys step by ${STEP}.`, data: { side } }, [
    down,
    input,
    up,
  ]);
  let current = value;

  const set = (/** @type {number} */ next, isFinal = true) => {
    current = tidyStrength(next);
    input.value = format(current);
    field.classList.toggle("rl-zero", current === 0);
    onChange(current, isFinal);
  };
  field.classList.toggle("rl-zero", value === 0);
  down.addEventListener("click", () => set(current - STEP));
  up.addEventListener("click", () => set(current + STEP));
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowUp" || event.key === "ArrowDown") {
      event.preventDefault();
      set(current + (event.key === "ArrowUp" ? STEP : -STEP) * (event.shiftKey ? 0.2 : 1));
    } else if (event.key === "Enter") input.blur();
    else if (event.key === "Escape") {
      input.value = format(current);
      input.blur();
    } else if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
  input.addEventListener("change", () => {
    const typed = Number.parseFloat(input.value.replace(",", "."));
    if (Number.isFinite(typed)) set(typed);
    else input.value = format(current);
  });
  addDrag(input, () => current, set);
  return field;
}

/**
 * @param {HTMLInputElement} input
 * @param {() => number} get
 * @param {(value: number, isFinal?: boolean) => void} set
 */
function addDrag(input, get, set) {
  input.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || document.activeElement === input) return;
    event.preventDefault(); // no focus yet: it may become a drag
    const [startX, startValue] = [event.clientX, get()];
    let isDragging = false;
    input.setPointerCapture(event.pointerId);
    const move = (/** @type {PointerEvent} */ moved) => {
      const distance = moved.clientX - startX;
      if (!isDragging && Math.abs(distance) < CLICK_PX) return;
      isDragging = true;
      set(startValue + Math.round(distance / DRAG_PX_PER_STEP) * STEP, false);
    };
    const end = () => {
      input.removeEventListener("pointermove", move);
      input.removeEventListener("pointerup", end);
      input.removeEventListener("pointercancel", end);
      if (isDragging) set(get(), true);
      else {
        input.focus();
        input.select();
      }
    };
    input.addEventListener("pointermove", move);
    input.addEventListener("pointerup", end);
    input.addEventListener("pointercancel", end);
  });
}

/** @param {number} value */
function format(value) {
  return value.toFixed(Math.abs(value * 100 - Math.round(value * 100)) > 1e-6 ? 3 : 2);
}
