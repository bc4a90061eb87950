// @ts-check
/** The page on which videos are labelled and cells of a sweep are compared blind. It covers the front-end until it is closed. */
import { el, icon, setText } from "./dom.js";
import { LABEL_KEYS, LabelSession, VOTE_KEYS, actionOf } from "./label_model.js";
import { syncVideos } from "./synced_videos.js";

/**
 * @typedef {object} Host
 * @property {(path: string) => Promise<any>} getJson
 * @property {(path: string, body?: unknown) => Promise<any>} postJson
 * @property {(path: string) => string} fileUrl
 * @property {(severity: "success" | "info" | "warn" | "error", summary: string, detail?: string) => void} toast
 */
/** @typedef {{ kind: string, name: string, videos: number, axes: string[], error?: string }} Source */

const WORDS = { physics_quality: "Physics", human_quality: "Human bodies", text_alignment: "Text match", blur_quality: "Sharpness", motion_quality: "Motion" };

/** @type {(() => void) | null} the open page */
let closeOpen = null;

/**
 * Open the page; a second call brings up a fresh one.
 *
 * @param {Host} host
 */
export async function openLabelPage(host) {
  closeOpen?.();
  const close = el("button", { class: "rl-icon-button", type: "button", title: "Close (Esc)", "aria-label": "Close" }, [icon("times")]);
  const sourceSelect = el("select", { "aria-label": "Dataset or sweep" });
  const taskSelect = el("select", { "aria-label": "What to judge" });
  const progress = el("span", { class: "rl-label-progress", role: "status" });
  const bar = el("div", { class: "rl-bar-fill" });
  const body = el("div", { class: "rl-label-body" });
  const page = el("div", { class: "rl-root rl-label-page", role: "dialog", "aria-modal": "true", "aria-label": "Label and vote", tabindex: "-1" }, [
    el("header", {}, [el("span", { class: "rl-panel-title", text: "Label and vote" }), sourceSelect, taskSelect, progress, close]),
    el("div", { class: "rl-bar" }, [bar]),
    body,
  ]);
  /** @type {{ act(action: string): void, keys: Record<string, string>, destroy(): void } | null} */
  let view = null;
  const show = (/** @type {string} */ text, /** @type {number} */ share) => {
    setText(progress, text);
    bar.style.width = `${Math.round(100 * share)}%`;
  };
  const closePage = () => {
    view?.destroy();
    window.removeEventListener("keydown", onKey, true);
    page.remove();
    closeOpen = null;
  };
  // Before the front-end's own shortcuts see the key.
  const onKey = (/** @type {KeyboardEvent} */ event) => {
    event.stopPropagation();
    if (event.key === "Escape") return closePage();
    if (event.target instanceof HTMLSelectElement) return;
    const action = view && actionOf(view.keys, event);
    if (!action || !view) return;
    event.preventDefault();
    if (!event.repeat) view.act(action);
  };
  /** @type {Source[]} */
  let sources = [];
  /** @type {string[]} */
  let qualities = [];
  const fillTasks = () => {
    const source = sources[sourceSelect.selectedIndex];
    const votes = (source?.axes ?? []).map((axis, index) => el("option", { value: `vote:${index}`, text: `Vote blind: ${axis}` }));
    const labels = qualities.map((quality) => el("option", { value: `label:${quality}`, text: `Label: ${WORDS[/** @type {keyof WORDS} */ (quality)] ?? quality}` }));
    taskSelect.replaceChildren(...votes, ...labels);
    taskSelect.value = votes.length ? "vote:0" : "label:motion_quality";
    start();
  };
  const start = () => {
    view?.destroy();
    view = null;
    body.replaceChildren();
    const source = sources[sourceSelect.selectedIndex];
    const [task, what] = taskSelect.value.split(":");
    if (!source || !task) return;
    view = task === "vote" ? createVoteView(host, source, Number(what), body, show) : createLabelView(host, source, what, body, show);
    page.focus();
  };
  closeOpen = closePage;
  close.addEventListener("click", closePage);
  sourceSelect.addEventListener("change", fillTasks);
  taskSelect.addEventListener("change", start);
  window.addEventListener("keydown", onKey, true);
  document.body.append(page);
  page.focus();
  try {
    const answer = await host.getJson("/reward_lab/label");
    qualities = answer.qualities;
    sources = answer.sources.filter((/** @type {Source} */ source) => !source.error && source.videos > 0);
  } catch (error) {
    body.replaceChildren(el("p", { class: "rl-notice", text: /** @type {Error} */ (error).message }));
    return;
  }
  if (!sources.length) {
    body.replaceChildren(el("p", { class: "rl-label-empty", text: "There is nothing to label yet. Make a dataset with Video Dataset, or a sweep with TestLab Grid." }));
    return;
  }
  sourceSelect.replaceChildren(...sources.map((source) => el("option", { text: `${source.kind} ${source.name} (${source.videos})` })));
  fillTasks();
}

/**
 * @param {string} text
 * @param {string} key
 * @param {string} kind
 * @param {() => void} onClick
 */
function answerButton(text, key, kind, onClick) {
  const button = el("button", { class: `rl-button rl-answer rl-answer-${kind}`, type: "button" }, [el("span", { text }), el("kbd", { text: key })]);
  button.addEventListener("click", () => {
    button.blur(); // else the space bar, which pauses, would press it again
    onClick();
  });
  return button;
}

/** @param {string} src */
function createVideo(src) {
  const video = el("video", { src, playsinline: true, preload: "auto" });
  video.muted = true;
  return video;
}

/**
 * @param {Host} host
 * @param {Source} source
 * @param {string} quality
 * @param {HTMLElement} body
 * @param {(text: string, share: number) => void} show
 */
function createLabelView(host, source, quality, body, show) {
  const route = `/reward_lab/label/${source.kind}/${encodeURIComponent(source.name)}`;
  const stage = el("div", { class: "rl-label-stage" });
  const caption = el("p", { class: "rl-label-caption" });
  const now = el("p", { class: "rl-label-now" });
  const act = (/** @type {string} */ action) => answer(action);
  const answers = el("div", { class: "rl-answers" }, [
    answerButton("Bad", "B", "bad", () => act("bad")),
    answerButton("Skip", "S", "skip", () => act("skip")),
    answerButton("Good", "G", "good", () => act("good")),
    answerButton("Undo", "U", "undo", () => act("undo")),
  ]);
  body.replaceChildren(stage, caption, now, answers);
  /** @type {LabelSession | null} */
  let session = null;
  /** @type {ReturnType<typeof syncVideos> | null} */
  let player = null;
  let isGone = false;
  /** One answer is written after the other: a label and its undoing must not overtake each other. */
  let saved = Promise.resolve();

  const render = () => {
    player?.destroy();
    player = null;
    if (!session) return;
    const item = session.current;
    show(`${session.done} of ${session.items.length} · ${session.count("good")} good, ${session.count("bad")} bad, ${session.count("skip")} skipped`, session.items.length ? session.done / session.items.length : 0);
    setText(caption, item?.caption ?? "");
    setText(now, item ? (item.label ? `Labelled: ${item.label}` : `Video ${session.index + 1} of ${session.items.length}`) : "All videos are labelled. Use the arrow keys to look at them again.");
    stage.replaceChildren();
    if (!item) return;
    const video = createVideo(host.fileUrl(item.url));
    stage.append(video);
    player = syncVideos([video]);
  };
  const answer = (/** @type {string} */ action) => {
    if (!session) return;
    if (action === "play") return void player?.toggle();
    if (action === "next" || action === "previous") {
      session.move(action === "next" ? 1 : -1);
      return render();
    }
    const change = action === "undo" ? session.undo() : session.label(action);
    if (!change) return;
    render();
    saved = saved.then(async () => {
      try {
        await host.postJson(route, { ...change, quality });
      } catch (error) {
        // What the page shows must be what is on the disk.
        host.toast("error", "The label could not be saved", /** @type {Error} */ (error).message);
        await load();
      }
    });
  };
  const load = async () => {
    try {
      const found = await host.getJson(`${route}?quality=${encodeURIComponent(quality)}`);
      if (isGone) return;
      session = new LabelSession(found.items);
      render();
    } catch (error) {
      if (!isGone) body.replaceChildren(el("p", { class: "rl-notice", text: /** @type {Error} */ (error).message }));
    }
  };
  void load();
  return {
    act,
    keys: LABEL_KEYS,
    destroy() {
      isGone = true;
      player?.destroy();
    },
  };
}

/**
 * @param {Host} host
 * @param {Source} source
 * @param {number} axis
 * @param {HTMLElement} body
 * @param {(text: string, share: number) => void} show
 */
function createVoteView(host, source, axis, body, show) {
  const route = `/reward_lab/vote/${encodeURIComponent(source.name)}`;
  const stage = el("div", { class: "rl-label-stage rl-vote-stage" });
  const caption = el("p", { class: "rl-label-caption" });
  const ranking = el("div", { class: "rl-ranking" });
  const act = (/** @type {string} */ action) => void answer(action);
  const rank = answerButton("Ranking", "", "rank", () => void showRanking());
  const answers = el("div", { class: "rl-answers" }, [
    answerButton("Left", "←", "good", () => act("left")),
    answerButton("Tie", "↓", "skip", () => act("tie")),
    answerButton("Right", "→", "good", () => act("right")),
    answerButton("Skip", "S", "skip", () => act("skip")),
    answerButton("Undo", "U", "undo", () => act("undo")),
    rank,
  ]);
  body.replaceChildren(stage, caption, answers, ranking);
  /** @type {{ left: { key: string, url: string }, right: { key: string, url: string }, prompt: string } | null} */
  let question = null;
  /** @type {ReturnType<typeof syncVideos> | null} */
  let player = null;
  let isBusy = false;
  let isGone = false;

  const ask = async () => {
    const state = await host.getJson(`${route}?axis=${axis}`);
    if (isGone) return;
    question = state.question;
    player?.destroy();
    player = null;
    ranking.replaceChildren(); // a ranking beside the next pair would not be blind
    show(`${state.votes} votes · ${state.pairs} pairs, each asked twice`, Math.min(1, state.votes / (2 * state.pairs)));
    setText(caption, question ? question.prompt : "Every pair has been asked twice.");
    stage.replaceChildren();
    if (!question) return void (await showRanking());
    const videos = [question.left, question.right].map((side) => createVideo(host.fileUrl(side.url)));
    stage.append(...videos);
    player = syncVideos(videos);
  };
  const answer = async (/** @type {string} */ action) => {
    if (action === "play") return void player?.toggle();
    if (isBusy || (action !== "undo" && !question)) return;
    isBusy = true;
    try {
      if (action === "undo") await host.postJson(`${route}/undo`);
      else if (question) await host.postJson(route, { left: question.left.key, right: question.right.key, result: action });
      await ask();
    } catch (error) {
      host.toast("error", "The vote could not be saved", /** @type {Error} */ (error).message);
    } finally {
      isBusy = false;
    }
  };
  const showRanking = async () => {
    try {
      const found = await host.getJson(`${route}/ranking?axis=${axis}`);
      if (!isGone) ranking.replaceChildren(rankingTable(found));
    } catch (error) {
      host.toast("error", "There is no ranking", /** @type {Error} */ (error).message);
    }
  };
  ask().catch((error) => body.replaceChildren(el("p", { class: "rl-notice", text: error.message })));
  return {
    act,
    keys: VOTE_KEYS,
    destroy() {
      isGone = true;
      player?.destroy();
    },
  };
}

/**
 * Strengths with their intervals as bars on one scale.
 *
 * @param {{ axis: string, standings: Array<{ name: string, strength: number, low: number, high: number, wins: number, votes: number, chance: number }> }} found
 */
function rankingTable(found) {
  const reach = Math.max(0.5, ...found.standings.flatMap((row) => [Math.abs(row.low), Math.abs(row.high)]));
  const at = (/** @type {number} */ value) => `${(50 + (50 * value) / reach).toFixed(2)}%`;
  const rows = found.standings.map((row) =>
    el("tr", {}, [
      el("td", { text: row.name }),
      el("td", { text: `${(100 * row.chance).toFixed(0)} %` }),
      el("td", { text: `${row.strength.toFixed(2)} (${row.low.toFixed(2)} to ${row.high.toFixed(2)})` }),
      el("td", { text: `${row.wins} of ${row.votes}` }),
      el("td", { class: "rl-interval-cell" }, [
        el("div", { class: "rl-interval" }, [
          el("span", { class: "rl-interval-line", style: { left: at(row.low), width: `${((50 * (row.high - row.low)) / reach).toFixed(2)}%` } }),
          el("span", { class: "rl-interval-dot", style: { left: at(row.strength) } }),
        ]),
      ]),
    ]),
  );
  const head = [found.axis, "wins against the average", "log-odds, 95 %", "wins", ""].map((text) => el("th", { text }));
  return el("table", {}, [el("thead", {}, [el("tr", {}, head)]), el("tbody", {}, rows)]);
}
