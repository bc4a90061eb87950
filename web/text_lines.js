// @ts-check
/** How many lines a text takes when it is wrapped, for elements whose height must be known before they are laid out. */

/**
 * @param {string} text
 * @param {number} columns characters in a line
 * @returns {number}
 */
export function wrappedLines(text, columns) {
  const most = Math.max(1, Math.floor(columns));
  let count = 0;
  for (const line of text.split("\n")) {
    let used = 0;
    count += 1;
    for (const { length } of line.split(" ")) {
      if (used && used + 1 + length > most) {
        count += 1;
        used = 0;
      }
      // A word longer than a line, such as a hash, is broken wherever the line ends.
      count += Math.max(0, Math.ceil(length / most) - 1);
      used = length > most ? ((length - 1) % most) + 1 : used + (used ? 1 : 0) + length;
    }
  }
  return count;
}
