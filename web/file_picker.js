// @ts-check
/** A searchable list of files that opens under an element. Lives in the page's body, so that neither the canvas' zoom nor a node's edge clips it. */
import { el, icon } from "./dom.js";
import { searchFiles } from "./rows_model.js";

/** @type {(() => void) | null} closes the list that is open: there is never more than one */
let closeOpenList = null;

/**
 * Open the list; a click outside or Escape closes it.
 *
 * @param {HTMLElement} anchor
 * @param {object} options
 * @param {string[]} options.files
 * @param {string} options.current
 * @param {string} options.emptyText what to say when there are no files at all
 * @param {string} [options.prompt] what the search field says while it is empty
 * @param {(file: string) => string} [options.note] a second line for an entry
 * @param {(file: string) => void} options.onPick
 */
export function openFilePicker(anchor, { files, current, emptyText, prompt, note, onPick }) {
  closeOpenList?.();
  let active = Math.max(0, files.indexOf(current));
  let shown = files;
  const search = el("input", {
    class: "rl-picker-search",
    type: "text",
    placeholder: prompt ?? `Search ${files.length} files`,
    "aria-label": "Search files",
    spellcheck: "false",
  });
  const list = el("div", { class: "rl-picker-list", role: "listbox" });
  const box = el("div", { class: "rl-picker", data: { rewardLab: "picker" } }, [el("label", { class: "rl-picker-head" }, [icon("search"), search]), list]);

  const close = () => {
    closeOpenList = null;
    document.removeEventListener("pointerdown", onOutside, true);
    window.removeEventListener("wheel", onWheel, true);
    box.remove();
  };
  const onOutside = (/** @type {Event} */ event) => {
    if (!box.contains(/** @type {Node} */ (event.target))) close();
  };
  const onWheel = (/** @type {Event} */ event) => {
    if (!box.contains(/** @type {Node} */ (event.target))) close();
  };
  const pick = (/** @type {string} */ file) => {
    close();
    onPick(file);
  };
  const render = () => {
    list.replaceChildren(
      ...(shown.length
        ? shown.map((file, i) => option(file, note?.(file) ?? "", i === active, file === current, () => pick(file)))
        : [el("div", { class: "rl-picker-none", text: files.length ? "No file matches." : emptyText })]),
    );
    list.querySelector("[aria-selected='true']")?.scrollIntoView({ block: "nearest" });
  };
  search.addEventListener("input", () => {
    shown = searchFiles(files, search.value);
    active = 0;
    render();
  });
  search.addEventListener("keydown", (event) => {
    event.stopPropagation();
    if (event.key === "Escape") close();
    else if (event.key === "Enter" && shown[active]) pick(shown[active]);
    else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      active = Math.max(0, Math.min(shown.length - 1, active + (event.key === "ArrowDown" ? 1 : -1)));
      render();
      event.preventDefault();
    }
  });

  document.body.append(box);
  render();
  place(box, anchor);
  search.focus();
  closeOpenList = close;
  document.addEventListener("pointerdown", onOutside, true);
  window.addEventListener("wheel", onWheel, true);
}

/**
 * @param {string} file
 * @param {string} note
 * @param {boolean} isActive
 * @param {boolean} isCurrent
 * @param {() => void} pick
 */
function option(file, note, isActive, isCurrent, pick) {
  const cut = Math.max(file.lastIndexOf("/"), file.lastIndexOf("\\")) + 1;
  const parts = [cut ? el("span", { class: "rl-picker-folder", text: file.slice(0, cut) }) : null, el("span", { text: file.slice(cut) }), note ? el("div", { class: "rl-picker-note", text: note }) : null];
  const row = el("div", { class: `rl-picker-option${isCurrent ? " rl-current" : ""}`, role: "option", "aria-selected": String(isActive), title: file }, [
    el("span", { class: "rl-picker-name" }, parts),
    isCurrent ? icon("check") : null,
  ]);
  row.addEventListener("click", pick);
  return row;
}

/**
 * @param {HTMLElement} box
 * @param {HTMLElement} anchor
 */
function place(box, anchor) {
  const at = anchor.getBoundingClientRect();
  const width = Math.max(340, Math.min(560, at.width));
  const below = window.innerHeight - at.bottom - 12;
  const above = at.top - 12;
  box.style.width = `${width}px`;
  const isBelow = below >= box.offsetHeight || below >= above;
  box.style.maxHeight = `${Math.min(360, isBelow ? below : above)}px`;
  box.style.left = `${Math.max(8, Math.min(at.left, window.innerWidth - width - 8))}px`;
  if (isBelow) box.style.top = `${at.bottom + 4}px`;
  else box.style.bottom = `${window.innerHeight - at.top + 4}px`;
}
