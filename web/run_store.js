// @ts-check
/**
 * What the page knows about training runs. The server is the truth: a websocket message only says that a run has news, the
 * events themselves are read from the event route by position. So nothing is lost or doubled by a reload, a closed tab or a
 * broken connection, and the store survives any view that mounts and unmounts.
 */
import { EVENT_KEY, RUN_EVENT, isLive } from "./events.js";
import { Series } from "./series.js";

/**
 * @typedef {object} RunInfo
 * @property {string} id
 * @property {string} name
 * @property {string} state created | running | stopping | finished | stopped | failed | broken (its files cannot be read)
 * @property {number} step
 * @property {number} steps
 * @property {number | null} [reward] last reward
 * @property {string[]} [files] LoRA files saved
 * @property {string} [error]
 * @property {string[]} [log_tail]
 * @property {number | null} [seconds_per_step]
 * @property {string} [preparing] what it does before its first update, and how far it is
 * @property {string} [ended] why a guard ended the run, in a sentence
 */

/**
 * @typedef {object} RunDetail
 * @property {string} file identity of the file that the events were read from; empty before the first
 * @property {number} next position of the first event not read yet
 * @property {Series} reward
 * @property {Series} heldOut
 * @property {Series} loss
 * @property {Array<{ step: number, files: string[], prompts: string[] }>} samples
 * @property {number[]} checkpoints steps at which one was written
 * @property {any} started the `started` event
 * @property {{ first: number, last: number, base: number | null } | null} heldOutSpan held-out reward at its first and last evaluation
 * @property {number | null} secondsAStep mean over the last steps
 * @property {string[]} log last lines, filled for failed runs
 * @property {any} failure the `failed` event
 */

/**
 * @typedef {object} Server
 * @property {(path: string) => Promise<any>} getJson
 * @property {(path: string) => Promise<any>} postJson
 * @property {(name: string, listener: (detail: any) => void) => () => void} onServerEvent
 */

/** Least time between two reads of one run's events. */
export const READ_GAP_MS = 400;

export class RunStore extends EventTarget {
  /**
   * @param {Server} server
   * @param {{ setTimeout: (task: () => void, ms: number) => any }} [clock]
   */
  constructor(server, clock = { setTimeout: (task, ms) => setTimeout(task, ms) }) {
    super();
    this.server = server;
    this.clock = clock;
    /** @type {Map<string, RunInfo>} newest first */
    this.runs = new Map();
    /** @type {Map<string, RunDetail>} runs somebody looks at */
    this.details = new Map();
    /** @type {string | null} */
    this.error = null;
    this.isLoaded = false;
    /** @type {Map<string, Promise<void>>} */
    this.reading = new Map();
    /** @type {Set<string>} runs with news that arrived while their events were being read */
    this.stale = new Set();
    /** @type {Array<() => void>} */
    this.unsubscribe = [];
  }

  /** Subscribe once and load the list. Calling it again only reloads. */
  async start() {
    if (!this.unsubscribe.length) {
      this.unsubscribe.push(this.server.onServerEvent(RUN_EVENT, (detail) => this.#onNews(detail)));
      this.unsubscribe.push(this.server.onServerEvent("reconnected", () => void this.reload()));
    }
    await this.reload();
  }

  stop() {
    for (const end of this.unsubscribe) end();
    this.unsubscribe = [];
  }

  /** Read the list of runs again, and the events of every run that is being looked at. */
  async reload() {
    try {
      const answer = await this.server.getJson("/reward_lab/runs");
      this.runs = new Map(answer.map((/** @type {RunInfo} */ run) => [run.id, run]));
      this.error = null;
    } catch (error) {
      this.error = /** @type {Error} */ (error).message;
    }
    this.isLoaded = true;
    this.#changed();
    await Promise.all([...this.details.keys()].filter((id) => this.runs.has(id)).map((id) => this.refresh(id)));
  }

  /**
   * The run's curves and files; starts to read them when nobody has yet.
   *
   * @param {string} id
   * @returns {RunDetail}
   */
  watch(id) {
    let detail = this.details.get(id);
    if (!detail) {
      detail = newDetail();
      this.details.set(id, detail);
      void this.refresh(id);
    }
    return detail;
  }

  /**
   * Read the events that came since the last read.
   *
   * @param {string} id
   * @returns {Promise<void>}
   */
  refresh(id) {
    const running = this.reading.get(id);
    if (running) {
      this.stale.add(id);
      return running;
    }
    const work = this.#read(id).finally(() => {
      this.clock.setTimeout(() => {
        this.reading.delete(id);
        if (this.stale.delete(id)) void this.refresh(id);
      }, READ_GAP_MS);
    });
    this.reading.set(id, work);
    return work;
  }

  /**
   * Ask the server to end a run: it writes a checkpoint and the LoRA first.
   *
   * @param {string} id
   */
  async requestStop(id) {
    const answer = await this.server.postJson(`/reward_lab/runs/${encodeURIComponent(id)}/stop`);
    if (answer?.id === id) this.#put(answer);
    this.#changed();
  }

  /** @param {string} id */
  async #read(id) {
    const detail = this.details.get(id) ?? newDetail();
    this.details.set(id, detail);
    if (this.runs.get(id)?.state === "broken") return;
    try {
      const path = `/reward_lab/runs/${encodeURIComponent(id)}`;
      const { file, start, events } = await this.server.getJson(`${path}/events?start=${detail.next}&file=${encodeURIComponent(detail.file)}`);
      // A run that goes on from a checkpoint begins its file anew: what it had done after that is gone from the curves too.
      if (start < detail.next) Object.assign(detail, newDetail());
      for (const event of events) apply(detail, event);
      Object.assign(detail, { file, next: start + events.length });
      const run = this.runs.get(id);
      if (run?.state === "failed" && !detail.log.length) detail.log = logLines(run.log_tail?.length ? run.log_tail : await this.server.getJson(`${path}/log`));
      this.error = null;
    } catch (error) {
      this.error = /** @type {Error} */ (error).message;
    }
    this.#changed();
  }

  /** @param {any} news RunInfo plus `event` */
  #onNews(news) {
    if (!news?.id) return;
    this.#put(news);
    if (this.details.has(news.id)) void this.refresh(news.id);
    this.#changed();
  }

  /** @param {RunInfo & { event?: unknown }} news */
  #put(news) {
    const { event: _event, ...info } = news;
    const known = this.runs.get(info.id);
    if (known) this.runs.set(info.id, { ...known, ...info });
    else this.runs = new Map([[info.id, info], ...this.runs]);
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

/** @returns {RunDetail} */
function newDetail() {
  return {
    file: "",
    next: 0,
    reward: new Series(),
    heldOut: new Series(),
    loss: new Series(),
    samples: [],
    checkpoints: [],
    started: null,
    heldOutSpan: null,
    secondsAStep: null,
    log: [],
    failure: null,
  };
}

/**
 * Fold one event into a run's curves.
 *
 * @param {RunDetail} detail
 * @param {any} event
 */
export function apply(detail, event) {
  const kind = event[EVENT_KEY];
  if (kind === "started") {
    detail.started = event;
  } else if (kind === "step") {
    pushNumber(detail.reward, event.step, event.reward);
    pushNumber(detail.loss, event.step, event.loss);
    if (typeof event.held_out === "number") {
      detail.heldOut.push(event.step, event.held_out);
      const base = event.held_out_base ?? detail.heldOutSpan?.base ?? null;
      detail.heldOutSpan = { first: detail.heldOutSpan?.first ?? event.held_out, last: event.held_out, base };
    }
    if (event.seconds > 0) detail.secondsAStep = detail.secondsAStep === null ? event.seconds : 0.8 * detail.secondsAStep + 0.2 * event.seconds;
  } else if (kind === "sample") {
    detail.samples.push({ step: event.step, files: event.files, prompts: event.prompts ?? [] });
  } else if (kind === "checkpoint") {
    detail.checkpoints.push(event.step);
  } else if (kind === "failed") {
    detail.failure = event;
    if (event.log_tail?.length) detail.log = logLines(event.log_tail);
  }
}

/**
 * The trainer writes null for numbers that JSON cannot hold.
 *
 * @param {Series} series
 * @param {number} x
 * @param {number | null} y
 */
function pushNumber(series, x, y) {
  if (typeof y === "number") series.push(x, y);
}

/**
 * @param {any} answer lines, or text
 * @returns {string[]}
 */
export function logLines(answer) {
  const lines = Array.isArray(answer) ? answer : String(answer ?? "").split("\n");
  return lines.map((line) => String(line).trimEnd()).filter((line, i, all) => line || i < all.length - 1);
}

/**
 * Seconds that the rest of a run will take.
 *
 * @param {RunInfo} run
 * @param {RunDetail | undefined} detail
 * @returns {number | null} null when unknown or over
 */
export function remaining_s(run, detail) {
  const seconds = detail?.secondsAStep ?? run.seconds_per_step;
  if (!isLive(run) || !seconds || !(run.steps > run.step)) return null;
  return (run.steps - run.step) * seconds;
}

/**
 * @param {number} seconds
 * @returns {string} such as `45 s`, `12 min`, `3 h 20 min`
 */
export function formatDuration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
