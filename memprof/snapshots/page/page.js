"use strict";
// The page of `memprof snapshot FILE --html`. It draws what the JSON above it holds, asks for nothing, and puts every
// text of a file into the page as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const report = data.report, main = document.getElementById("main");
  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((child) => child !== null && child !== undefined));
    return node;
  };
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const digits = data.per_unit < 1e8 ? 1 : 3;
  const number = (n) => (n / data.per_unit).toFixed(digits);
  const size = (n) => `${number(n)} ${data.unit}`;
  const count = (n) => n.toLocaleString("en");
  const dot = (colour) => { const mark = el("span", { class: "dot" }); mark.style.backgroundColor = colour; return mark; };
  const ticks = (high, wanted) => {
    const raw = high / Math.max(1, wanted) || 1, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= raw * 0.999);
    const out = [];
    for (let t = 0; t <= high + step * 1e-6; t += step) out.push(+t.toPrecision(10));
    return { at: out, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (step / power === 2.5 ? 1 : 0)) };
  };

  // ---- the curve -------------------------------------------------------------------------------------------------
  let way = data.ways[0]?.key, shownAt = null;
  const draw = (host, key) => {
    const curve = data.curve, groups = data.ways.find((each) => each.key === way);
    const width = Math.max(240, host.clientWidth), height = width < 560 ? 300 : 380;
    const box = { left: 52, top: 24, width: width - 62, height: height - 60 };
    const last = curve.events[curve.events.length - 1] || 1;
    const room = report.room && report.room.exact ? report.room.n_bytes : 0;
    const highest = Math.max(room, ...curve.reserved, ...curve.allocated, 1) * 1.02;
    const x = (event) => box.left + (event / last) * box.width;
    const y = (n) => box.top + box.height - (n / highest) * box.height;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", tabindex: 0,
      "aria-label": `Memory over ${count(last + 1)} events, by ${groups.label}` });
    const levels = ticks(highest / data.per_unit, height / 60);
    for (const t of levels.at) {
      const at = y(t * data.per_unit);
      root.append(svg("line", { class: "axis", x1: box.left, x2: box.left + box.width, y1: at, y2: at }),
        svg("text", { x: box.left - 7, y: at + 4, "text-anchor": "end" }, t.toFixed(levels.digits)));
    }
    root.append(svg("text", { x: 4, y: 12 }, data.unit),
      svg("text", { x: box.left + box.width, y: height - 6, "text-anchor": "end" }, "events"));
    for (const t of ticks(last, width / 130).at.filter((t) => x(t) < box.left + box.width - 52))
      root.append(svg("text", { x: x(t), y: height - 6, "text-anchor": t ? "middle" : "start" }, count(t)));
    const floor = curve.events.map(() => 0);
    groups.levels.forEach((level, g) => {
      const top = level.map((n, i) => floor[i] + n);
      // A block keeps its size between two events: steps, not slopes.
      const edge = (line) => curve.events.map((event, i) =>
        `${i ? `H${x(event).toFixed(1)}` : `M${x(event).toFixed(1)} ${y(line[0]).toFixed(1)}`}V${y(line[i]).toFixed(1)}`).join("");
      const back = [...curve.events.keys()].reverse().map((i) =>
        `V${y(floor[i]).toFixed(1)}${i ? `H${x(curve.events[i]).toFixed(1)}` : ""}`).join("");
      root.append(svg("path", { d: `${edge(top)}${back}Z`, fill: data.colours[g % data.colours.length] }));
      top.forEach((n, i) => { floor[i] = n; });
    });
    const path = curve.events.map((event, i) =>
      `${i ? `H${x(event).toFixed(1)}V` : `M${x(event).toFixed(1)} `}${y(curve.reserved[i]).toFixed(1)}`).join("");
    root.append(svg("path", { d: path, class: "reserved" }));
    if (room) root.append(svg("line", { class: "room", x1: box.left, x2: box.left + box.width, y1: y(room), y2: y(room) }));
    for (const event of curve.ooms) root.append(svg("line", { class: "oom", x1: x(event), x2: x(event), y1: box.top, y2: box.top + box.height }));
    if (curve.ooms.length) {
      const at = x(curve.ooms[curve.ooms.length - 1]), right = at > box.left + box.width / 2;
      root.append(svg("text", { class: "alarm", x: at + (right ? -5 : 5), y: box.top - 6, "text-anchor": right ? "end" : "start" }, "out of memory"));
    }
    const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.top + box.height, visibility: "hidden" });
    root.append(cursor);
    const bubble = el("div", { class: "tip", role: "status" });
    const line = (name, n, colour) => el("div", {}, el("span", {}, colour ? dot(colour) : null, name), el("span", {}, size(n)));
    const show = (i) => {
      shownAt = i;
      cursor.setAttribute("x1", x(curve.events[i])); cursor.setAttribute("x2", x(curve.events[i]));
      cursor.setAttribute("visibility", "visible");
      const own = groups.levels.map((level, g) => [groups.groups[g], level[i], data.colours[g % data.colours.length]])
        .filter((each) => each[1] > 0).sort((a, b) => b[1] - a[1]);
      bubble.replaceChildren(
        el("b", {}, `event ${count(curve.events[i])}${curve.ooms.includes(curve.events[i]) ? ", out of memory" : ""}`),
        line("allocated", curve.allocated[i]), line("reserved", curve.reserved[i]),
        el("hr"), ...own.slice(0, 5).map((each) => line(...each)),
        el("hr"), el("span", { class: "muted" }, "largest blocks"),
        ...curve.largest[i].slice(0, width < 560 ? 3 : 6).map(([n, site]) => line(data.sites[site], n)));
      bubble.style.display = "block";
      const at = x(curve.events[i]), wide = bubble.offsetWidth;
      const left = at + 14 + wide < width ? at + 14 : Math.max(0, at - 14 - wide);
      bubble.style.left = `${Math.min(left, Math.max(0, width - wide))}px`;
      bubble.style.top = width < 560 ? `${height + 4}px` : "30px";
    };
    const hide = () => { bubble.style.display = "none"; cursor.setAttribute("visibility", "hidden"); };
    const nearest = (pointer) => {
      const event = ((pointer.clientX - root.getBoundingClientRect().left) * (width / root.clientWidth) - box.left) / box.width * last;
      let best = 0;
      curve.events.forEach((each, i) => { if (Math.abs(each - event) < Math.abs(curve.events[best] - event)) best = i; });
      return best;
    };
    root.addEventListener("pointermove", (pointer) => show(nearest(pointer)));
    root.addEventListener("pointerdown", (pointer) => show(nearest(pointer)));
    root.addEventListener("pointerleave", hide);
    root.addEventListener("keydown", (key) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[key.key];
      if (!step) return;
      key.preventDefault();
      show(Math.min(curve.events.length - 1, Math.max(0, (shownAt ?? -1) + step)));
    });
    host.classList.add("chart");
    host.replaceChildren(root, bubble);
    const highestOf = (level) => level.reduce((a, b) => Math.max(a, b), 0);
    key.replaceChildren(...groups.groups.map((name, g) => el("li", { title: name }, dot(data.colours[g % data.colours.length]),
      el("span", { class: "name" }, name), el("span", { class: "muted" }, size(highestOf(groups.levels[g]))))));
  };

  // ---- words and tables ------------------------------------------------------------------------------------------
  const table = (head, rows) => el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ...head.map((each) => el("th", {}, each)))),
    el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row)))));
  const cell = (text) => el("td", {}, text);
  const site = (text, kind = "site") => el("td", { class: kind }, text);
  const barred = (share) => { const bar = el("i"); bar.style.width = `${(100 * share).toFixed(1)}%`; return el("td", { class: "bar-cell" }, bar); };
  const holders = (list) => table([data.by, data.unit, "share", "blocks", ""], list.map((each) =>
    [site(each.site), cell(number(each.bytes)), cell(`${(100 * each.share).toFixed(1)}%`), cell(count(each.blocks)), barred(each.share)]));
  const death = (each) => el("section", { class: "death" }, el("h3", {}, "Out of memory"),
    ...data.death.map((line) => el("p", {}, line)),
    el("h4", {}, "What would have let it through (each replayed; predicted)"),
    el("ul", { class: "remedies" }, ...each.remedies.map((remedy) => el("li", {},
      el("span", { class: remedy.helps ? "yes" : "no" }, remedy.helps ? "yes" : "no"),
      el("span", {}, remedy.name, remedy.detail ? el("span", { class: "muted" }, ` ${remedy.detail}`) : null)))));
  const whatIf = (list) => el("section", {}, el("h3", {}, "What if (predicted)"),
    table(["settings", `smallest card, ${data.unit}`, `reserved, ${data.unit}`, "fits"], [
      [site(`${report.settings} (as recorded)`), cell(number(list[0].baseline_smallest_card_bytes)), cell(number(list[0].baseline_reserved_bytes)), cell("")],
      ...list.map((each) => [site(each.settings), cell(number(each.smallest_card_bytes)), cell(number(each.peak_reserved_bytes)),
        cell(each.fits === null ? "?" : each.fits ? "yes" : "no")])]));

  main.append(
    el("h2", {}, `GPU ${report.device} `, el("span", { class: `badge ${report.status}` }, report.status)),
    el("p", { class: "muted" }, data.about),
    ...data.others.map((text) => el("p", { class: "muted" }, text)),
    ...report.notes.map((text) => el("p", { class: "muted" }, text)));
  if (report.out_of_memory) main.append(death(report.out_of_memory));
  if (data.curve) {
    const host = el("div", { class: "figure" }), key = el("ul", { class: "key" });
    const buttons = data.ways.map((each) => el("button", { type: "button", "aria-pressed": String(each.key === way), onclick: () => {
      way = each.key;
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(data.ways[i].key === way)));
      draw(host, key);
    } }, `by ${each.label}`));
    document.getElementById("ways").append(...buttons);
    main.append(...[el("h3", {}, "Allocated over events, stacked; reserved dashed"),
      data.thinned ? el("p", { class: "muted" }, data.thinned) : null, host, key].filter(Boolean));
    draw(host, key);
    let wide = host.clientWidth;
    new ResizeObserver(() => { if (host.clientWidth !== wide) { wide = host.clientWidth; draw(host, key); } }).observe(host);
  }
  main.append(el("h3", {}, data.holders_title), holders(data.holders));
  main.append(el("h3", {}, "Memory"), table(["what", data.unit, "of reserved"], data.memory.map(([name, n, share]) =>
    [site(name.trim()), cell(number(n)), cell(share)])));
  if (report.what_if.length) main.append(whatIf(report.what_if));
  main.append(el("footer", { class: "muted" }, data.verdict));
  document.getElementById("theme").addEventListener("click", () => {
    const dark = document.documentElement.dataset.theme === "dark" ||
      (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
    document.documentElement.dataset.theme = dark ? "light" : "dark";
  });
  document.documentElement.dataset.ready = "yes";
})();
