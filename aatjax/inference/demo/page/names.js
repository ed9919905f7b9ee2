// Names of classes and files as the page shows them, whatever their characters.

const HIDDEN = /[\p{C}\p{Z}]/gu; // controls, bidi marks, zero width, separators, unassigned
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufefe\u{10800}-\u{10fff}\u{1e800}-\u{1efff}]/u;
const SHORT = { " ": " ", "\t": "\\t", "\n": "\\n", "\r": "\\r" };

function escape(character) {
  const hex = character.codePointAt(0).toString(16);
  if (hex.length <= 2) return SHORT[character] ?? `\\x${hex.padStart(2, "0")}`;
  return hex.length <= 4 ? `\\u${hex.padStart(4, "0")}` : `\\U${hex.padStart(8, "0")}`;
}

// A name with what does not print escaped, as in aatjax.reports.html.page.clean. One that is written
// from right to left stands between Unicode's isolates: the text around it keeps its order.
export function shown(name) {
  const printable = name.replace(HIDDEN, escape);
  return RIGHT_TO_LEFT.test(printable) ? `\u2068${printable}\u2069` : printable;
}
