// A number and its interval stay on one line: 89.7 (86.4–92.3).
addEventListener("DOMContentLoaded", () => {
  for (const cell of document.querySelectorAll("table.docutils td")) {
    if (/^[+−-]?[\d.]+ \([^)]*\)$/.test(cell.textContent.trim())) cell.style.whiteSpace = "nowrap";
  }
});
