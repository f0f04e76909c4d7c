// A number and its interval stay on one line: 89.7 (86.4 to 92.3).
addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll("table.docutils td")) {
    for (const text of textsIn(cell)) {
      text.data = text.data.replace(/[+−-]?[\d.]+ \([^)]*\)/g, (found) => found.replaceAll(" ", "\u00a0"));
    }
  }
});

function textsIn(node) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT), texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  return texts;
}
