"use strict";
const root = document.documentElement;
window.addEventListener("error", (event) => { root.dataset.error = event.message; });

// Sorting: numbers by value, text by name, blanks last; ties keep the network's order.
const table = document.querySelector("table.sites");
if (table) {
  const body = table.tBodies[0];
  const original = Array.from(body.rows);
  const compare = (a, b, numeric) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, "en", { numeric: true }));
  const asNumber = (text) => text.replace(/inf$/, "Infinity");
  for (const button of table.tHead.querySelectorAll("button")) {
    const head = button.closest("th");
    const numeric = head.classList.contains("num");
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const first = numeric && head.cellIndex > 0 ? "descending" : "ascending";
      const second = first === "ascending" ? "descending" : "ascending";
      const next = now === first ? second : first;
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const rows = original.map((row) => [asNumber(row.cells[head.cellIndex].dataset.key ?? ""), row]);
      rows.sort(([a], [b]) => {
        if (a === "" || b === "") return (a === "") - (b === "");
        return sign * compare(a, b, numeric);
      });
      body.append(...rows.map(([, row]) => row));
    });
  }
  const filter = document.querySelector("#filter");
  const only = document.querySelector("#only");
  const count = document.querySelector("#count");
  const show = () => {
    const wanted = filter.value.trim().toLowerCase();
    let shown = 0;
    for (const row of original) {
      row.hidden = !row.textContent.toLowerCase().includes(wanted) || (only.checked && !row.classList.contains("differs"));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${original.length} sites`;
  };
  filter.addEventListener("input", show);
  only.addEventListener("change", show);
  show();
  document.querySelector(".tools").hidden = false;
}

const raw = document.querySelector("#raw");
const written = JSON.stringify(JSON.parse(document.querySelector("#report-json").textContent), null, 1);
raw.addEventListener("toggle", () => { raw.querySelector("pre").textContent = written; });
document.querySelector("#download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([written + "\n"], { type: "application/json" }));
  link.download = "report.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
root.dataset.ready = "yes";
