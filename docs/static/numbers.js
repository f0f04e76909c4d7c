// A number and its interval stay on one line: 89.7 (86.4 to 92.3). In tables of six columns and more, the interval is below it.
addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils")) {
    table.classList.toggle("many", table.rows[0].cells.length > 5);
  }
  for (const cell of document.querySelectorAll("table.docutils:not(.many) td")) {
    for (const text of textsIn(cell)) {
      text.data = text.data.replace(/[+−-]?[\d.]+ \([^)]*\)/g, (found) => found.replaceAll(" ", "\u00a0"));
    }
  }
  for (const code of document.querySelectorAll("table.many span.pre")) {
    code.innerHTML = code.innerHTML.replace(/[(,]/g, "$&<wbr>");
  }
  for (const cell of document.querySelectorAll("table.many td")) {
    for (const text of textsIn(cell)) {
      text.data = text.data.replace(/\([^)]*\)/g, (interval) => interval.replaceAll(" ", "\u00a0"));
    }
  }
});

function textsIn(node) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  return texts;
}
