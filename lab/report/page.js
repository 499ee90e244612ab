"use strict";
// Everything works on what the page has already: rows to sort and to filter, details as JSON. Whatever a session says
// becomes text (textContent), never markup.
const data = JSON.parse(document.getElementById("data").textContent);

function made(tag, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  return element;
}

// --- Light and dark ---

const root = document.documentElement, theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark";
const name = () => { theme.textContent = isDark() ? "Light" : "Dark"; };
theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
dark.addEventListener("change", name);
theme.hidden = false;
name();

// --- The experiments ---

const tables = {};

class Experiments {
  constructor(element) {
    this.session = element.dataset.session;
    this.body = element.querySelector("tbody");
    this.rows = [...this.body.rows];
    this.texts = this.rows.map((row) => row.textContent.toLowerCase());
    this.form = element.querySelector("form");
    [this.find, this.verdict, this.said] = this.form.elements.length ? [
      this.form.querySelector("input"), this.form.querySelector("select"), this.form.querySelector("output")] : [];
    this.form.hidden = false;
    this.form.addEventListener("input", () => this.filter());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    for (const head of element.querySelectorAll("thead th")) {
      const button = made("button", head.textContent);
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => this.sort(head));
    }
    for (const row of this.rows) {
      const button = made("button", row.cells[0].textContent);
      button.type = "button";
      button.setAttribute("aria-expanded", "false");
      button.setAttribute("aria-label", `Experiment ${button.textContent}: details and diff`);
      row.cells[0].replaceChildren(button);
    }
    this.body.addEventListener("click", (event) => {
      const button = event.target.closest("th button");
      if (button) this.toggle(button.closest("tr"));
    });
    this.filter();
  }

  sort(head) {
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keyed = this.rows.map((row) => {
      const text = row.cells[column].textContent, value = parseFloat(text.replace("−", "-"));
      return [row, text, value, text === "–"];
    });
    const numbers = keyed.every(([, , value, none]) => none || !Number.isNaN(value));
    keyed.sort((a, b) => a[3] - b[3]  // what is unknown comes last, whichever way
      || (down ? -1 : 1) * (numbers ? a[2] - b[2] : a[1] < b[1] ? -1 : a[1] > b[1] ? 1 : 0));
    const sorted = document.createDocumentFragment();
    for (const [row] of keyed) {
      const details = this.details(row);
      sorted.append(row);
      if (details) sorted.append(details);
    }
    this.body.append(sorted);
  }

  filter() {
    const text = this.find.value.trim().toLowerCase(), verdict = this.verdict.value;
    let shown = 0;
    this.rows.forEach((row, i) => {
      const there = this.texts[i].includes(text) && (verdict === "all" || row.cells[1].textContent === verdict);
      shown += there;
      row.hidden = !there;
      const details = this.details(row);
      if (details) details.hidden = !there;
    });
    this.said.textContent = `${shown} of ${this.rows.length} shown`;
  }

  details(row) {
    const next = row.nextElementSibling;
    return next && next.classList.contains("open") ? next : null;
  }

  toggle(row, open) {
    const there = this.details(row), button = row.cells[0].firstChild;
    if (open && there) return;
    button.setAttribute("aria-expanded", String(!there));
    if (there) there.remove();
    else row.after(this.opened(row));
  }

  opened(row) {
    const details = data.sessions[this.session][row.id.split("-e")[1]], cell = made("td");
    cell.colSpan = row.cells.length;
    const facts = made("dl", undefined, "facts");
    for (const [name, text] of details.facts) facts.append(made("dt", name), made("dd", text));
    cell.append(facts);
    if (details.runs.length) cell.append(this.runs(details.runs));
    if (details.diff === null) cell.append(made("p", "The diff is not known: the session's record does not have it.", "note"));
    else if (details.diff) cell.append(diff(details.diff));
    const opened = made("tr", undefined, "open");
    opened.setAttribute("role", "row");
    cell.setAttribute("role", "cell");
    opened.append(cell);
    return opened;
  }

  runs(runs) {
    const table = made("table"), head = table.createTHead().insertRow(), body = table.createTBody();
    for (const text of ["run", "seed", "val_bpb", ""]) {
      const cell = made("th", text);
      cell.scope = "col";
      head.append(cell);
    }
    for (const run of runs) {
      const row = body.insertRow();
      for (const text of run) row.insertCell().textContent = text === null ? "–" : text;
    }
    return table;
  }
}

function diff(text) {
  const pre = made("pre"), code = made("code");
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "Diff of train.py");
  for (const line of text.replace(/\n$/, "").split("\n")) {
    const kind = /^(\+\+\+|---|diff |index )/.test(line) || line.startsWith("@@") ? "hunk"
      : line.startsWith("+") ? "added" : line.startsWith("-") ? "gone" : "";
    code.append(made("span", line, kind));
  }
  pre.append(code);
  return pre;
}

for (const element of document.querySelectorAll(".experiments")) {
  tables[element.dataset.session] = new Experiments(element);
}

// --- Charts: what is pointed at, tapped, or walked to with the arrow keys ---

const tip = document.getElementById("tip"), near = 26;  // pixels

class Chart {
  constructor(svg, [session, ...flat]) {
    this.svg = svg;
    this.session = session;
    this.spots = [];
    for (let i = 0; i < flat.length; i += 3) this.spots.push(flat.slice(i, i + 3));
    this.at = -1;
    this.ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
    this.ring.setAttribute("class", "spot");
    this.ring.setAttribute("r", "7");
    svg.setAttribute("tabindex", "0");
    svg.setAttribute("aria-label", `${svg.getAttribute("aria-label")}. Arrow keys go from one experiment to the next`);
    svg.addEventListener("pointermove", (event) => this.point(event));
    svg.addEventListener("pointerdown", (event) => this.point(event));
    svg.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") this.leave(); });
    svg.addEventListener("blur", () => this.leave());
    svg.addEventListener("click", (event) => this.click(event));
    svg.addEventListener("keydown", (event) => this.key(event));
  }

  scale() { return this.svg.viewBox.baseVal.width / this.svg.getBoundingClientRect().width; }

  point(event) {
    const box = this.svg.getBoundingClientRect(), scale = this.scale();
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = -1, least = (near * scale) ** 2;
    this.spots.forEach(([a, b], i) => {
      const distance = (a - x) ** 2 + (b - y) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    if (best < 0) this.leave(); else this.show(best);
  }

  click(event) {
    const link = event.target.closest("a");
    if (!link && this.at < 0) return;
    event.preventDefault();
    if (!matchMedia("(hover: hover)").matches) return;
    this.open(link ? document.getElementById(link.getAttribute("href").slice(1)) : this.row());
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) {
      event.preventDefault();
      this.show((this.at + step + this.spots.length) % this.spots.length);
    } else if (event.key === "Enter") {
      event.preventDefault();  // it would close again what gets the focus now
      this.open(this.row());
    } else if (event.key === "Escape") this.leave();
  }

  row() {
    return this.at < 0 ? null : document.getElementById(`${this.session}-e${this.spots[this.at][2]}`);
  }

  show(i) {
    if (i === this.at) return;
    this.at = i;
    const [x, y, number] = this.spots[i], row = this.row(), box = this.svg.getBoundingClientRect(), scale = this.scale();
    this.ring.setAttribute("cx", x);
    this.ring.setAttribute("cy", y);
    this.svg.append(this.ring);
    const cells = row ? [...row.cells].map((cell) => cell.textContent) : [];
    tip.replaceChildren(made("b", `${number} · ${cells[1] || "confirmation"}${cells[2] && cells[2] !== "–" ? ` · ${cells[2]}` : ""}`),
      made("span", row ? cells[cells.length - 1] : ""));
    tip.hidden = false;
    const left = box.left + x / scale + scrollX, top = box.top + y / scale + scrollY, wide = root.clientWidth;
    tip.style.left = `${Math.max(8, Math.min(left + 12, wide - tip.offsetWidth - 8))}px`;
    tip.style.top = `${top - tip.offsetHeight - 12 > scrollY ? top - tip.offsetHeight - 12 : top + 14}px`;
  }

  leave() {
    this.at = -1;
    this.ring.remove();
    tip.hidden = true;
  }

  open(row) {
    if (!row) return;
    this.leave();
    const table = tables[this.session];
    if (row.hidden) {
      table.form.reset();
      table.filter();
    }
    table.toggle(row, true);
    row.scrollIntoView({ block: "center" });
    row.cells[0].firstChild.focus({ preventScroll: true });
  }
}

for (const [id, spots] of Object.entries(data.charts)) {
  if (spots.length > 1) new Chart(document.getElementById(id), spots);
}
