"use strict";
const table = document.getElementById("layers");
const body = table.tBodies[0];
const pairs = () => Array.from(body.querySelectorAll("tr.layer"), (row) => [row, row.nextElementSibling]);
const number = (cell) => (cell.dataset.v === undefined ? cell.textContent : Number(cell.dataset.v));
table.tHead.addEventListener("click", (event) => {
  const head = event.target.closest("th");
  if (!head) return;
  const down = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b));
  const rows = pairs().sort(([a], [b]) => order(number(a.cells[head.cellIndex]), number(b.cells[head.cellIndex])));
  if (down) rows.reverse();
  for (const pair of rows) body.append(...pair);
});
const toggle = (row) => {
  const detail = row.nextElementSibling;
  detail.hidden = !detail.hidden;
  row.setAttribute("aria-expanded", String(!detail.hidden));
};
body.addEventListener("click", (event) => {
  const row = event.target.closest("tr.layer");
  if (row) toggle(row);
});
body.addEventListener("keydown", (event) => {
  const row = event.target.closest("tr.layer");
  if (row && (event.key === "Enter" || event.key === " ")) { event.preventDefault(); toggle(row); }
});
document.getElementById("filter").addEventListener("input", (event) => {
  const wanted = event.target.value.toLowerCase();
  for (const [row, detail] of pairs()) {
    row.hidden = !row.dataset.name.includes(wanted);
    if (row.hidden) detail.hidden = true;
  }
});
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([document.getElementById("plan").textContent], { type: "application/json" }));
  link.download = "plan.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
