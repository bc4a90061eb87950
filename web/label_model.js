// @ts-check
/** What the labelling page knows, without any drawing: where it stands, what was answered, what undoing means. */

/** @typedef {{ id: string, url: string, caption: string, label: string | null }} Item */

/** Keys of the labelling page by what they do. */
export const LABEL_KEYS = Object.freeze({ g: "good", b: "bad", s: "skip", arrowright: "next", arrowleft: "previous", u: "undo", backspace: "undo", " ": "play" });

/** Keys of the voting page. */
export const VOTE_KEYS = Object.freeze({ arrowleft: "left", arrowright: "right", arrowdown: "tie", t: "tie", s: "skip", u: "undo", backspace: "undo", " ": "play" });

/**
 * The action of a key press; null for keys with a modifier, so that the browser's own shortcuts stay, except Ctrl+Z, which undoes.
 *
 * @param {Record<string, string>} keys
 * @param {{ key: string, ctrlKey?: boolean, metaKey?: boolean, altKey?: boolean }} event
 * @returns {string | null}
 */
export function actionOf(keys, event) {
  const key = event.key.toLowerCase();
  if ((event.ctrlKey || event.metaKey) && key === "z") return "undo";
  if (event.ctrlKey || event.metaKey || event.altKey) return null;
  return keys[key] ?? null;
}

/** The walk through a source's videos. It begins at the first one without a label, so that a closed page goes on where it was. */
export class LabelSession {
  /** @param {Item[]} items */
  constructor(items) {
    this.items = items.map((item) => ({ ...item }));
    /** @type {Array<{ index: number, before: string | null }>} */
    this.history = [];
    this.index = this.#nextOpen(-1);
  }

  /** @returns {Item | null} the video that is shown; null when all are labelled and none was chosen */
  get current() {
    return this.items[this.index] ?? null;
  }

  get done() {
    return this.items.filter((item) => item.label !== null).length;
  }

  /** @param {string} label `good`, `bad` or `skip` */
  count(label) {
    return this.items.filter((item) => item.label === label).length;
  }

  /**
   * Label the shown video and go to the next open one.
   *
   * @param {string} label
   * @returns {{ id: string, label: string } | null} what to write down
   */
  label(label) {
    const item = this.current;
    if (!item) return null;
    this.history.push({ index: this.index, before: item.label });
    item.label = label;
    this.index = this.#nextOpen(this.index);
    return { id: item.id, label };
  }

  /**
   * Take the last answer of this session back and show its video again.
   *
   * @returns {{ id: string, label: string | null } | null} what to write down
   */
  undo() {
    const last = this.history.pop();
    if (!last) return null;
    const item = this.items[last.index];
    item.label = last.before;
    this.index = last.index;
    return { id: item.id, label: last.before };
  }

  /** @param {number} by 1 or -1: show the neighbour, labelled or not */
  move(by) {
    const from = this.current ? this.index : by > 0 ? -1 : this.items.length;
    this.index = Math.min(Math.max(from + by, 0), this.items.length - 1);
  }

  /** @param {number} from @returns {number} the next video without a label, from the start again after the end; the number of videos when there is none */
  #nextOpen(from) {
    const count = this.items.length;
    for (let step = 1; step <= count; step += 1) {
      const index = (from + step + count) % count;
      if (this.items[index].label === null) return index;
    }
    return count;
  }
}
