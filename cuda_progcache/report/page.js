// SPDX-License-Identifier: Apache-2.0
// The views of a report. Data from the cache is inserted into the page as text, never as markup.
"use strict";
(async () => {
const PAGE = 50, LONGEST_DIFF = 2500;
const $ = (id) => document.getElementById(id);

// Create an element with attributes and children; strings become text nodes.
function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const bdi = (text) => el("bdi", {}, text);

async function unpack(id) {
  const holder = $(id);
  if (!holder) return null;
  const raw = Uint8Array.from(atob(holder.textContent), (one) => one.charCodeAt(0));
  const stream = new Blob([raw]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const data = await unpack("data-table");
const text = data.strings;
const programs = data.rows.map((row, at) => ({
  at, digest: row[0], name: text[row[1]], parameters: text[row[2]], target: text[row[3]], arch: text[row[4]],
  size: row[5], created: row[6], used: row[7], seconds: row[8], why: text[row[9]], kernels: [],
}));
for (const row of data.kernels) {
  programs[row[0]].kernels.push({
    name: text[row[1]], registers: row[2], stores: row[3], loads: row[4], stack: row[5], shared: row[6], code: row[7],
    block: row[8], occupancy: row[9], limiters: text[row[10]],
  });
}
const listed = new Set(data.listed);
const byDigest = new Map(programs.map((one) => [one.digest, one]));
const most = (numbers) => numbers.length ? Math.max(...numbers) : null;
const least = (numbers) => numbers.length ? Math.min(...numbers) : null;
for (const one of programs) {
  const kernels = one.kernels;
  one.registers = most(kernels.map((k) => k.registers));
  const spills = kernels.filter((k) => k.stores !== null && k.loads !== null).map((k) => k.stores + k.loads);
  one.spills = most(spills);
  one.occupancy = least(kernels.filter((k) => k.occupancy !== null).map((k) => k.occupancy));
  one.sought = [one.name, one.parameters, one.target, one.arch, one.digest, one.why, ...kernels.map((k) => k.name)]
    .join(" ").toLowerCase();
}

// Format values with the same units as the command line.
const count = (number) => number.toLocaleString("en");
function size(bytes) {
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (bytes < 999.5) return `${unit === "B" || bytes >= 99.95 ? bytes.toFixed(0) : bytes.toFixed(1)} ${unit}`;
    bytes /= 1000;
  }
  return `${bytes.toFixed(1)} TB`;
}
const duration = (s) => s === null ? "–" : s < 0.9995 ? `${(s * 1e3).toFixed(0)} ms` : `${s.toFixed(1)} s`;
const moment = (s) => new Date(s * 1000).toISOString().slice(0, 16).replace("T", " ");
function age(then) {
  const s = Math.max(data.made - then, 0);
  for (const [limit, unit, length] of [[120, "s", 1], [7200, "min", 60], [172800, "h", 3600]]) {
    if (s < limit) return `${(s / length).toFixed(0)} ${unit}`;
  }
  return `${count(Math.round(s / 86400))} d`;
}
const percent = (ratio) => ratio === null ? "–" : `${Math.round(ratio * 100)}%`;
const figure = (number) => number === null ? "–" : count(number);
const spilled = (k) => k.stores === null || k.loads === null ? "–" : k.stores + k.loads ? `${k.stores}+${k.loads}` : "0";
const say = (message) => { $("status").textContent = message; };

// A table that can be searched and sorted, shown one page at a time.
function paged({ rows, matches, draw, body, pager, counter, noun, search }) {
  let shown = rows, page = 0;
  function render() {
    const pages = Math.max(1, Math.ceil(shown.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    body.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map(draw));
    counter.textContent = shown.length === rows.length ? `${count(rows.length)} ${noun}`
      : `${count(shown.length)} of ${count(rows.length)} ${noun}`;
    const turn = (label, to) => el("button", { type: "button", disabled: to < 0 || to >= pages,
      onclick: () => { page = to; render(); body.closest(".scroll").focus(); } }, label);
    pager.replaceChildren(...(pages > 1 ? [turn("First", page ? 0 : -1), turn("Previous", page - 1),
      el("span", { "aria-live": "polite" }, `page ${page + 1} of ${pages}`), turn("Next", page + 1),
      turn("Last", page < pages - 1 ? pages - 1 : -1)] : []));
  }
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = words.length ? rows.filter((row) => words.every((word) => matches(row).includes(word))) : rows;
    page = 0;
    render();
  }
  search.addEventListener("input", filter);
  return filter;
}

// The programs
const columns = [
  ["digest", (p) => p.digest, null], ["name", (p) => p.name, null], ["parameters", (p) => p.parameters, null],
  ["target", (p) => p.target, null], ["arch", (p) => p.arch, null], ["size", (p) => p.size, (p) => size(p.size)],
  ["compile", (p) => p.seconds, (p) => duration(p.seconds)], ["registers", (p) => p.registers, (p) => figure(p.registers)],
  ["spills", (p) => p.spills, (p) => figure(p.spills)], ["occupancy", (p) => p.occupancy, (p) => percent(p.occupancy)],
  ["age", (p) => data.made - p.created, (p) => age(p.created)], ["last used", (p) => data.made - p.used, (p) => age(p.used)],
  ["changed", (p) => p.why, null],
];
const order = new Intl.Collator("en", { numeric: true });
let sorted = { column: 10, down: false };
const chosen = new Set();
function choose(program, on) {
  if (on) chosen.add(program.digest); else chosen.delete(program.digest);
  $("compare").disabled = chosen.size !== 2;
  $("compare").textContent = chosen.size ? `Compare two (${chosen.size} chosen)` : "Compare two";
}
const inTable = [...programs];
const refresh = paged({
  rows: inTable, matches: (p) => p.sought, body: $("rows"), pager: $("pager"), counter: $("count"), noun: "programs",
  search: $("search"),
  draw: (p) => el("tr", {},
    el("td", {}, el("input", { type: "checkbox", "aria-label": `compare ${p.name} ${p.digest.slice(0, 12)}`,
      onchange: (event) => choose(p, event.target.checked), ...(chosen.has(p.digest) ? { checked: true } : {}) })),
    ...columns.map(([label, value, shown], at) => {
      if (at === 0) return el("td", {}, link(p));
      return el("td", { class: shown ? "n" : ["parameters", "name", "changed"].includes(label) ? `wide ${label}` : null },
        shown ? shown(p) : bdi(value(p)));
    })),
});
function link(p, label = p.digest.slice(0, 12)) {
  return el("a", { href: `#entry=${p.digest}`, class: "digest" }, label);
}
function sortBy(column, down) {
  const value = columns[column][1];
  inTable.sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === null || y === null) return (x === null) - (y === null);  // unknown values come last in either order
    const found = typeof x === "number" ? x - y : order.compare(x, y);
    return (down ? -found : found) || a.at - b.at;
  });
  sorted = { column, down };
  $("heads").querySelectorAll("th[aria-sort]").forEach((head, at) =>
    head.setAttribute("aria-sort", at === column ? (down ? "descending" : "ascending") : "none"));
  refresh();
}
$("heads").append(el("th", { scope: "col" }, el("span", { class: "visually-hidden" }, "compare")),
  ...columns.map(([label, , shown], at) => el("th", { scope: "col", "aria-sort": "none", class: shown ? "n" : null },
    el("button", { type: "button", onclick: () =>
      sortBy(at, sorted.column === at ? !sorted.down : Boolean(shown) && at < 10) }, label))));
$("compare").addEventListener("click", () => { location.hash = `diff=${[...chosen].join(",")}`; });
sortBy(10, false);

// Variants by architecture
const archs = [...new Set(programs.filter((p) => p.kernels.length).map((p) => p.arch))].sort(order.compare);
const variants = new Map();
for (const p of [...programs].reverse()) {  // the newest wins
  for (const k of p.kernels) {
    const key = `${p.name}\n${p.parameters}\n${k.name}`;
    if (!variants.has(key)) variants.set(key, { p, k, cells: new Map(), sought: key.toLowerCase() });
    variants.get(key).cells.set(p.arch, [p, k]);
  }
}
$("variants").querySelector("thead tr").append(el("th", { scope: "col" }, "kernel"), el("th", { scope: "col" }, "parameters"),
  ...archs.map((arch) => el("th", { scope: "col" }, arch)));
paged({
  rows: [...variants.values()].sort((a, b) => order.compare(a.sought, b.sought)), matches: (v) => v.sought,
  body: $("variants").querySelector("tbody"), pager: $("pager-variants"), counter: $("count-variants"), noun: "variants",
  search: $("search-variants"),
  draw: (v) => el("tr", {},
    el("th", { scope: "row" }, bdi(v.k.name === v.p.name || `${v.k.name}.cu` === v.p.name ? v.p.name : `${v.p.name}: ${v.k.name}`)),
    el("td", { class: "wide" }, bdi(v.p.parameters || "–")),
    ...archs.map((arch) => {
      const cell = v.cells.get(arch);
      if (!cell) return el("td", { class: "faint" }, "–");
      const [p, k] = cell;
      const told = `${k.registers} registers, spills ${spilled(k)}, occupancy ${percent(k.occupancy)}, limited by ${k.limiters || "nothing"}`;
      return el("td", {}, el("a", { href: `#entry=${p.digest}`, "aria-label": told, title: told },
        `${k.registers} · ${spilled(k)} · ${percent(k.occupancy)}`));
    })),
})();

// An entry's page
const facts = (pairs) => el("dl", { class: "facts" }, ...pairs.flatMap(([key, value]) =>
  [el("dt", {}, key), el("dd", {}, typeof value === "string" ? bdi(value) : value)]));
function folded(title, pairs) {
  if (!pairs.length) return null;
  return el("details", {}, el("summary", {}, `${title} (${count(pairs.length)})`),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, el("table", {}, el("tbody", {},
      ...pairs.map((row) => el("tr", {}, ...row.map((part, at) => el(at ? "td" : "th",
        { class: "code wide", scope: at ? null : "row" }, bdi(part)))))))));
}
const kernelFigures = [
  ["registers", "registers"], ["spill stores", "stores"], ["spill loads", "loads"], ["stack", "stack"], ["shared", "shared"],
  ["code", "code"], ["block", "block"], ["occupancy", "occupancy"],
];
const written = (field, value) => field === "occupancy" ? percent(value) : figure(value);
function kernelTable(kernels) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Kernels" }, el("table", {},
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "kernel"),
      ...kernelFigures.map(([label]) => el("th", { scope: "col", class: "n" }, label)), el("th", { scope: "col" }, "limited by"))),
    el("tbody", {}, ...kernels.map((k) => el("tr", {}, el("th", { scope: "row" }, bdi(k.name)),
      ...kernelFigures.map(([, field]) => el("td", { class: "n" }, written(field, k[field]))),
      el("td", {}, k.limiters || "nothing"))))));
}
async function record(p) {
  const { pairs, records } = await unpack(`data-chunk-${Math.floor(p.at / data.chunk)}`);
  const found = records[p.at % data.chunk];
  for (const part of ["components", "headers", "toolchain", "symbols"]) found[part] = found[part].map((one) => pairs[one]);
  return found;
}

// A pane of lines. Arrow keys move the selection, which also marks the lines of the other panes with the same place.
let panes = [];
function pane(title, lines) {
  const id = `pane-${panes.length}`;
  const made = { lines: [], box: null };
  const other = panes;
  made.box = el("div", { class: "lines code", tabindex: "0", role: "listbox", "aria-label": title, "aria-activedescendant": null });
  lines.forEach(({ at, live, shown, place }, number) => {
    const line = el("div", { id: `${id}-${number}`, role: "option", "aria-selected": "false", class: place ? "linked" : null },
      el("span", { class: "at" }, at), live === undefined ? null : el("span", { class: "at live" }, live), el("span", {}, shown || " "));
    made.lines.push({ line, place });
    made.box.append(line);
  });
  function select(number) {
    made.box.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    const { line, place } = made.lines[number];
    line.setAttribute("aria-selected", "true");
    made.box.setAttribute("aria-activedescendant", line.id);
    made.current = number;
    scroll(made.box, line);
    for (const one of other) {
      let first = null;
      for (const each of one.lines) {
        const on = place && each.place === place;
        each.line.classList.toggle("on", Boolean(on));
        if (on && !first) first = each.line;
      }
      if (first && one !== made) scroll(one.box, first);
    }
  }
  made.box.addEventListener("click", (event) => {
    const number = made.lines.findIndex(({ line }) => line.contains(event.target));
    if (number >= 0) select(number);
  });
  made.box.addEventListener("keydown", (event) => {
    const now = made.current ?? -1, last = made.lines.length - 1;
    const to = { ArrowDown: now + 1, ArrowUp: now - 1, PageDown: now + 20, PageUp: now - 20, Home: 0, End: last }[event.key];
    if (to === undefined || last < 0) return;
    event.preventDefault();
    select(Math.min(Math.max(to, 0), last));
  });
  panes.push(made);
  return el("div", { class: "pane" }, el("h4", {}, bdi(title)), made.box);
}
function scroll(box, line) {
  const top = line.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + line.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 3;
}
const base = (file) => file.split("/").pop();
function listing(found) {
  panes = [];
  const sources = Object.entries(found.sources), kernels = Object.entries(found.kernels);
  const left = sources.map(([file, lines]) => pane(`source: ${base(file)}`,
    lines.map((shown, at) => ({ at: String(at + 1), shown, place: `${file}:${at + 1}` }))));
  const middle = found.ptx ? [pane("PTX", found.ptx.map((shown, at) => ({ at: String(at + 1), shown, place: null })))] : [];
  const right = kernels.map(([name, { code }]) =>
    pane(`SASS: ${name}`, code.flatMap(([offset, labels, shown, live, file, line]) => [
      ...labels.map((label) => ({ at: "", live: "", shown: `${label}:`, place: null })),
      { at: offset.toString(16).padStart(5, "0"), live: live === null ? "" : String(live), shown,
        place: file === null ? null : `${file}:${line}` },
    ])));
  const hint = kernels.length && sources.length ? "Select a line, by a click or with the arrow keys, to mark the lines that belong to it." : null;
  return [el("h3", {}, "Source, PTX and SASS"), hint && el("p", { class: "faint" }, hint),
    ...found.notes.map((note) => el("p", { class: "note" }, bdi(note))), el("div", { class: "panes" }, ...[left, middle, right].filter((one) => one.length).map((one) =>
      el("div", { class: one.length > 1 ? "several" : null }, ...one)))];
}
function provenance(found) {
  if (!found) return [];
  const picture = el("img", { alt: "Provenance graph; the list below has the same content.",
    src: `data:image/svg+xml;base64,${btoa(String.fromCharCode(...new TextEncoder().encode(found.svg)))}` });
  return [el("h3", {}, "Provenance"), el("div", { class: "picture", tabindex: "0", role: "region", "aria-label": "Provenance graph" }, picture),
    folded("What it came from", found.steps)];
}
async function showEntry(digest) {
  const p = byDigest.get(digest);
  if (!p) return ["There is no such program", [el("p", {}, "It isn't in this report.")]];
  const kept = await record(p), found = listed.has(digest) ? await unpack(`data-listing-${digest}`) : null;
  return [p.name, [
    facts([["digest", el("span", { class: "digest" }, p.digest)], ...(p.parameters ? [["parameters", p.parameters]] : []),
      ["compiled", `to ${p.target} for ${p.arch} in ${duration(p.seconds)}, ${moment(p.created)} UTC`],
      ["last used", `${age(p.used)} before this report`], ["size", `${size(p.size)} (${count(p.size)} bytes)`],
      ["compiled since", kept.reasons.length ? el("span", {}, ...kept.reasons.map((one) => el("div", {}, bdi(one)))) : "its record doesn't say"]]),
    el("div", { class: "bar" }, el("button", { type: "button", onclick: (event) => {
      choose(p, !chosen.has(p.digest));
      refresh();
      event.target.textContent = chosen.has(p.digest) ? "Chosen to compare" : "Choose to compare";
    } }, chosen.has(p.digest) ? "Chosen to compare" : "Choose to compare"),
    ...[...chosen].filter((one) => one !== digest && byDigest.has(one)).slice(0, 1).map((one) =>
      el("a", { href: `#diff=${one},${digest}` }, `Compare with ${one.slice(0, 12)}`))),
    ...(p.kernels.length ? [el("h3", {}, "Kernels"), kernelTable(p.kernels)] : []),
    ...(kept.log.trim() ? [el("h3", {}, "Compiler log"), el("pre", {}, bdi(kept.log))] : []),
    folded("Key", kept.components), folded("Headers", kept.headers), folded("Toolchain", kept.toolchain), folded("Symbols", kept.symbols),
    ...(found ? [...listing(found), ...provenance(found.provenance)] : [el("h3", {}, "Source, PTX and SASS"),
      el("p", { class: "note" }, "The listings of this program aren't in the report, which has those of ", count(listed.size), " programs (see --listings). ",
        "Print them with ", el("code", {}, `cuda-progcache sass --source ${p.digest.slice(0, 12)}`), ", and what it came from with ",
        el("code", {}, `cuda-progcache provenance ${p.digest.slice(0, 12)}`), ".")]),
  ]];
}

// Compute the differences between two lists of lines: Myers' greedy algorithm (1986), which gives up if there are too many.
function differences(a, b) {
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) start++;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) { endA--; endB--; }
  const x = a.slice(start, endA), y = b.slice(start, endB), n = x.length, m = y.length;
  const trace = [];
  let furthest = new Map([[1, 0]]), found = -1;
  for (let d = 0; d <= Math.min(n + m, LONGEST_DIFF) && found < 0; d++) {
    trace.push(new Map(furthest));
    for (let k = -d; k <= d; k += 2) {
      const down = k === -d || (k !== d && (furthest.get(k - 1) ?? -1) < (furthest.get(k + 1) ?? -1));
      let at = down ? furthest.get(k + 1) ?? 0 : (furthest.get(k - 1) ?? 0) + 1;
      while (at < n && at - k < m && x[at] === y[at - k]) at++;
      furthest.set(k, at);
      if (at >= n && at - k >= m) { found = d; break; }
    }
  }
  const edits = [];
  if (found < 0) {
    edits.push(...x.map((line) => ["-", line]), ...y.map((line) => ["+", line]));
  } else {
    let i = n, j = m;
    for (let d = found; d >= 0; d--) {
      const before = trace[d], k = i - j;
      const down = k === -d || (k !== d && (before.get(k - 1) ?? -1) < (before.get(k + 1) ?? -1));
      const from = down ? k + 1 : k - 1, fromI = d ? before.get(from) ?? 0 : 0, fromJ = d ? fromI - from : 0;
      while (i > fromI && j > fromJ) { edits.push([" ", x[--i]]); j--; }
      if (d) edits.push(down ? ["+", y[--j]] : ["-", x[--i]]);
    }
    edits.reverse();
  }
  return [...a.slice(0, start).map((line) => [" ", line]), ...edits, ...a.slice(endA).map((line) => [" ", line])];
}
function hunks(edits, around = 3) {
  const near = new Set();
  edits.forEach(([sign], at) => {
    if (sign !== " ") for (let one = at - around; one <= at + around; one++) near.add(one);
  });
  const lines = [];
  edits.forEach(([sign, line], at) => {
    if (!near.has(at)) { if (near.has(at - 1)) lines.push(el("div", {}, el("span", { class: "at" }, "⋯"))); return; }
    lines.push(el("div", { class: { "+": "add", "-": "cut" }[sign] ?? null }, el("span", { class: "at" }, sign), el("span", {}, line)));
  });
  return el("div", { class: "lines code", tabindex: "0", role: "region", "aria-label": "Lines that differ; + is the second program" }, ...lines);
}
function grouped(pairs) {
  const found = new Map();
  for (const [label, value] of pairs) found.set(label, [...(found.get(label) ?? []), value]);
  return found;
}
function table(heads, rows) {
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heads[0] }, el("table", {},
    el("thead", {}, el("tr", {}, ...heads.map((one) => el("th", { scope: "col" }, one)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((part, at) => el(at ? "td" : "th",
      { scope: at ? null : "row", class: "wide" }, typeof part === "string" ? bdi(part) : part)))))));
}
async function showDiff(digests) {
  const pair = digests.map((one) => byDigest.get(one));
  if (pair.length !== 2 || pair.some((one) => !one)) return ["Comparison", [el("p", {}, "Choose two programs of this report.")]];
  const [one, two] = pair, [old, now] = await Promise.all(pair.map(record));
  const left = grouped([...old.components, ...old.headers.map(([name, digest]) => [`header ${name}`, digest])]);
  const right = grouped([...now.components, ...now.headers.map(([name, digest]) => [`header ${name}`, digest])]);
  const apart = [["parameters", one.parameters, two.parameters]].filter((row) => row[1] !== row[2]);
  for (const label of new Set([...left.keys(), ...right.keys()])) {
    const a = left.get(label) ?? [], b = right.get(label) ?? [];
    if (a.join("\n") === b.join("\n")) continue;
    apart.push([label, a.filter((v) => !b.includes(v)).join(" ") || "–", b.filter((v) => !a.includes(v)).join(" ") || "–"]);
  }
  const heads = [link(one, `${one.name} ${one.arch} ${one.digest.slice(0, 12)}`), link(two, `${two.name} ${two.arch} ${two.digest.slice(0, 12)}`)];
  const shown = [el("p", {}, heads[0], " → ", heads[1]), el("h3", {}, "What they were compiled from"),
    apart.length ? table(["field", "first", "second"], apart) : el("p", {}, "Nothing differs.")];
  const theirs = new Map(two.kernels.map((k) => [k.name, k])), rows = [["(file)", "bytes", count(one.size), count(two.size), `${two.size - one.size >= 0 ? "+" : ""}${count(two.size - one.size)}`]];
  for (const k of one.kernels) {
    const other = theirs.get(k.name);
    if (!other) { rows.push([k.name, "–", "is there", "is gone", ""]); continue; }
    for (const [label, field] of kernelFigures) {
      if (k[field] === other[field]) continue;
      const delta = k[field] === null || other[field] === null ? "" : other[field] - k[field];
      rows.push([k.name, label, written(field, k[field]), written(field, other[field]),
        delta === "" ? "" : `${delta > 0 ? "+" : ""}${field === "occupancy" ? `${Math.round(delta * 100)}%` : count(delta)}`]);
    }
  }
  for (const k of two.kernels) if (!one.kernels.some((each) => each.name === k.name)) rows.push([k.name, "–", "isn't there", "is new", ""]);
  shown.push(el("h3", {}, "What they use"), table(["kernel", "figure", "first", "second", "change"], rows), el("h3", {}, "Machine code"));
  if (!digests.every((digest) => listed.has(digest))) {
    shown.push(el("p", { class: "note" }, "The listings of both aren't in this report. Compare them with ",
      el("code", {}, `cuda-progcache diff ${digests.map((digest) => digest.slice(0, 12)).join(" ")}`), "."));
  } else {
    const [a, b] = await Promise.all(digests.map((digest) => unpack(`data-listing-${digest}`)));
    const common = Object.keys(a.kernels).filter((name) => b.kernels[name]);
    for (const name of common) {
      const edits = differences(a.kernels[name].lines, b.kernels[name].lines), changed = edits.filter(([sign]) => sign !== " ").length;
      shown.push(el("h4", {}, bdi(name)), changed ? hunks(edits) : el("p", {}, "The instructions are equal."));
    }
    if (a.ptx && b.ptx) shown.push(el("h4", {}, "PTX"), hunks(differences(a.ptx, b.ptx)));
    else if (!common.length) shown.push(el("p", {}, "They have no kernel in common."));
  }
  return ["Comparison", shown];
}

// Views, selected by the fragment of the address
const views = ["overview", "programs", "variants", "entry", "diff"];
let first = true;
async function route() {
  const [view, argument = ""] = location.hash.slice(1).split("=");
  const name = views.includes(view) ? view : "overview";
  if (name === "entry" || name === "diff") {
    const [title, content] = name === "entry" ? await showEntry(argument) : await showDiff(argument.split(","));
    $(`title-${name}`).replaceChildren(bdi(title));
    $(name).replaceChildren(...content.filter(Boolean));
  }
  for (const one of views) $(`view-${one}`).hidden = one !== name;
  for (const one of document.querySelectorAll("nav a")) {
    if (one.hash === `#${name}`) one.setAttribute("aria-current", "page"); else one.removeAttribute("aria-current");
  }
  if (!first) { scrollTo(0, 0); $(`title-${name}`).focus({ preventScroll: true }); say($(`title-${name}`).textContent); }
  first = false;
  document.documentElement.dataset.ready = name + (argument ? `=${argument}` : "");
}
addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", () => $("title-programs").focus());
await route();
})();
