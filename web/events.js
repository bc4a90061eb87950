// @ts-check
/**
 * What the trainer reports: a mirror of `lora_train/events.py` (`tests/browser/test_js.py` compares the two). An event is one
 * JSON line with its kind under `EVENT_KEY`.
 */

/** Websocket event that the server sends: RunInfo plus `event`. */
export const RUN_EVENT = "reward_lab.run";

export const EVENT_KEY = "event";

/** Field names of each event kind. */
export const EVENT_FIELDS = Object.freeze({
  started: [
    "time",
    "steps",
    "first_step",
    "experts",
    "reward",
    "parameters",
    "device",
    "boundary_step",
    "sampling_steps",
    "measure",
    "clips",
    "clips_offered",
    "data_changed",
  ],
  preparing: ["time", "what", "done", "total"],
  step: [
    "time",
    "step",
    "steps",
    "reward",
    "loss",
    "grad_norm",
    "sigma",
    "seconds",
    "expert",
    "kl",
    "learning_rate",
    "forwards",
    "held_out",
    "held_out_error",
    "held_out_base",
    "held_out_motion",
    "held_out_judge",
  ],
  sample: ["time", "step", "files", "prompts"],
  checkpoint: ["time", "step", "files"],
  memory: ["time", "when", "predicted_bytes", "measured_bytes", "limit_bytes", "error", "seconds"],
  replanned: ["time", "step", "detail"],
  finished: ["time", "step", "files", "reason", "detail"],
  failed: ["time", "error", "step", "log_tail"],
});

/** States of a run that can still change on its own. */
export const LIVE_STATES = Object.freeze(["created", "running", "stopping"]);

/** States that come with an `error` to show: the training failed, or the run's files cannot be read. */
export const FAILED_STATES = Object.freeze(["failed", "broken"]);

/**
 * @param {{ state: string }} run
 * @returns {boolean}
 */
export function isLive(run) {
  return LIVE_STATES.includes(run.state);
}

/**
 * @param {{ state: string }} run
 * @returns {boolean}
 */
export function hasFailed(run) {
  return FAILED_STATES.includes(run.state);
}
