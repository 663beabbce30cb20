// Sorts the tables of a report, filters long ones, and unfolds what is printed. Without it every table reads as it is.
"use strict";
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const original = [...body.rows];
  if (original.length < 2) continue;

  const number = (row, column) => {
    const said = row.cells[column].dataset.value;
    return said === undefined ? NaN : Number(said);
  };
  const compare = (column) => {
    const numeric = original.some((row) => !Number.isNaN(number(row, column)));
    return (a, b, sign) => {
      if (!numeric) {
        const [x, y] = [a, b].map((row) => row.cells[column].textContent);
        return sign * x.localeCompare(y, "en", { numeric: true });
      }
      const [x, y] = [a, b].map((row) => number(row, column));
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    };
  };

  heads.forEach((head, column) => {
    const name = [...head.childNodes].map((node) => node.textContent.trim()).join(" ").trim();
    if (!name) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.setAttribute("aria-label", "sort by " + name);
    button.addEventListener("click", () => {
      const next = { none: "ascending", ascending: "descending", descending: "none" };
      const order = next[head.getAttribute("aria-sort") || "none"];
      for (const other of heads) other.removeAttribute("aria-sort");
      const rows = [...original];
      if (order !== "none") {
        head.setAttribute("aria-sort", order);
        const by = compare(column);
        rows.sort((a, b) => by(a, b, order === "ascending" ? 1 : -1));
      }
      body.append(...rows);
    });
    head.insertBefore(button, head.querySelector("small"));
  });

  if (original.length <= 12) continue;
  const filter = document.createElement("input");
  filter.type = "search";
  filter.className = "filter";
  filter.placeholder = "show rows with …";
  filter.setAttribute("aria-label", "show only rows that contain these words");
  filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(" ");
    for (const row of original) {
      const said = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => said.includes(word));
    }
  });
  table.parentElement.before(filter);
}

// On paper nothing can be unfolded.
const folded = new Set();
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    folded.add(details);
    details.open = true;
  }
});
addEventListener("afterprint", () => {
  for (const details of folded) details.open = false;
  folded.clear();
});
