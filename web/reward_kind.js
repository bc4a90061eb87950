// @ts-check
/** Load Reward Model before it runs: which widgets the chosen kind reads, what is on disk, and what can be fetched. Knows no node and no page. */

/**
 * What `GET /reward_lab/reward_models` answers.
 *
 * @typedef {object} Catalogue
 * @property {Record<string, Kind>} kinds
 * @property {Record<string, string>} files size of every file on disk, in words
 * @property {string} no_file choice that stands for no file
 */

/**
 * @typedef {object} Kind
 * @property {Record<string, string>} widgets widgets that the kind reads, with their names for it
 * @property {Array<{ name: string, text: string, is_here: boolean }>} published files that can be fetched
 * @property {boolean} needs_file
 */

/**
 * Every widget that some kind reads, with its name for this kind; null where this kind does not read it.
 *
 * @param {Catalogue} catalogue
 * @param {string | null} kind null where it is not known (it comes from another node): then every widget may be read
 * @returns {Map<string, string | null>}
 */
export function widgetLabels(catalogue, kind) {
  const chosen = kind === null ? null : catalogue.kinds[kind];
  const labels = new Map();
  for (const { widgets } of Object.values(catalogue.kinds)) {
    for (const name of Object.keys(widgets)) labels.set(name, chosen ? (chosen.widgets[name] ?? null) : name);
  }
  return labels;
}

/**
 * What the node says about its choice.
 *
 * @param {Catalogue} catalogue
 * @param {{ kind: string, file: string, download: boolean }} choice
 * @returns {string}
 */
export function describeChoice(catalogue, { kind, file, download }) {
  const entry = catalogue.kinds[kind];
  if (!entry) return "";
  if (!entry.needs_file) return `${kind} needs no weights.`;
  const isChosen = file && file !== catalogue.no_file;
  const lines = [];
  if (isChosen) lines.push(catalogue.files[file] ? `On disk: ${file}, ${catalogue.files[file]}.` : `${file} is not in models/reward_models.`);
  const absent = entry.published.filter((offer) => !offer.is_here);
  if (!isChosen && !download) lines.push(absent.length ? "No file is chosen. Choose one, or switch download on." : "No file is chosen.");
  const verb = download && !isChosen ? "Will be fetched when the workflow runs" : "Can be downloaded";
  lines.push(...absent.map((offer) => `${verb}: ${offer.text}`));
  return lines.join("\n");
}
