// @ts-check
/** Mix Rewards: which of its widgets are read, and what base videos fill in. Knows no node and no page. */

export const ROWS = 4;
const PARTS = ["weight", "centre", "scale"];
const BASELINE = ["baseline_folder", "baseline_prompts"];

/**
 * Widgets that play no part: numbers of rewards that are not connected, and the baseline's while it is not measured.
 *
 * @param {(name: string) => boolean} isConnected whether something is linked to an input
 * @param {boolean} isMeasured
 * @returns {Map<string, boolean>} every widget that is hidden or shown, true where it is hidden
 */
export function hiddenWidgets(isConnected, isMeasured) {
  const hidden = new Map();
  for (let row = 1; row <= ROWS; row++) {
    // The first reward is always asked for.
    for (const part of PARTS) hidden.set(`${part}_${row}`, row > 1 && !isConnected(`reward_${row}`) && !isConnected(`${part}_${row}`));
  }
  for (const name of BASELINE) hidden.set(name, !isMeasured && !isConnected(name));
  return hidden;
}

/**
 * Values that a run measured, by widget.
 *
 * @param {Array<{ row: number, centre: number, scale: number }>} measured
 * @returns {Map<string, number>}
 */
export function filledValues(measured) {
  return new Map(measured.flatMap(({ row, centre, scale }) => /** @type {Array<[string, number]>} */ ([[`centre_${row}`, centre], [`scale_${row}`, scale]])));
}
