for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const buttons = [...table.querySelectorAll("th button")];
  buttons.forEach((button, column) => button.addEventListener("click", () => {
    const head = button.closest("th");
    const current = head.getAttribute("aria-sort");
    const next = current ? (current === "ascending" ? "descending" : "ascending") : button.dataset.first;
    buttons.forEach(other => other.closest("th").removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", next);
    const sign = next === "ascending" ? 1 : -1;
    const key = row => (column ? row.cells[column].dataset.sort : row.cells[0].querySelector(".name").textContent);
    const rows = [...body.rows].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      return sign * (column ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
  }));
}
const printed = document.querySelectorAll("details[data-print]:not([open])");
addEventListener("beforeprint", () => printed.forEach(fold => { fold.open = true; }));
addEventListener("afterprint", () => printed.forEach(fold => { fold.open = false; }));
