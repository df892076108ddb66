"use strict";
// The page of `memprof report --format html`. It draws what the JSON above it holds, asks for nothing, and puts every
// text of a data set into the page as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const PARTS = data.parts;
  const state = { group: 0, sample: null, hidden: new Set(), total: false, view: null, stacked: 0, decode: false };
  const main = document.getElementById("main");
  const $ = (id) => document.getElementById(id);

  // ---- building blocks -------------------------------------------------------------------------------------------
  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children.filter((c) => c !== null && c !== undefined));
    return node;
  };
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const bytes = (n) => {
    const digits = data.per_unit < 1e8 ? 1 : 3, text = (n / data.per_unit).toFixed(digits);
    return n > 0 && +text === 0 ? `<${(10 ** -digits).toFixed(digits)}` : text;
  };
  const unit = (n) => `${bytes(n)} ${data.unit}`;
  const dot = (part) => {
    const mark = el("span", { class: part.key === "unexplained" ? "dot hatch" : "dot" });
    if (part.key !== "unexplained") mark.style.backgroundColor = part.colour;
    return mark;
  };
  const ink = (part) => (part.key === "unexplained" ? "url(#hatch)" : part.colour);
  const hatch = () =>
    svg("defs", {}, svg("pattern", { id: "hatch", width: 4, height: 4, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("rect", { width: 4, height: 4, fill: "#fff" }), svg("line", { x1: 0, x2: 0, y1: 0, y2: 4, stroke: "#1a1a1a", "stroke-width": 1.4 })));
  const ticks = (low, high, count) => {
    const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw || 1));
    const step = [1, 2, 2.5, 5, 10].map((s) => s * power).find((s) => s >= raw * 0.999) || raw;
    const out = [];
    for (let t = Math.ceil(low / step - 1e-9) * step; t <= high + step * 1e-6; t += step) out.push(+t.toPrecision(10));
    return { at: out, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9) + (/^[^1-9]*25/.test(step.toPrecision(2)) ? 1 : 0)) };
  };

  // A chart: a frame with axes, redrawn at its own width, with a tip that follows the pointer.
  const chart = (host, { height, label, left = 52, right = 10, bottom = 34, xlabel, ylabel, domain, draw, tip, pick, zoom, whole }) => {
    host.classList.add("chart");
    const bubble = el("div", { class: "tip", role: "status" });
    const redraw = () => {
      const width = Math.max(220, host.clientWidth), top = 10;
      const [x0, x1, y1] = domain();
      const box = { left, top, width: width - left - right, height: height - top - bottom };
      const x = (v) => box.left + ((v - x0) / (x1 - x0 || 1)) * box.width;
      const y = (v) => box.top + box.height - (v / (y1 || 1)) * box.height;
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": label }, hatch());
      const levels = ticks(0, y1 / data.per_unit, height / 55);
      for (const t of levels.at) {
        const at = y(t * data.per_unit);
        root.append(svg("line", { class: "axis", x1: box.left, x2: box.left + box.width, y1: at, y2: at }),
          svg("text", { x: box.left - 7, y: at + 4, "text-anchor": "end" }, t.toFixed(levels.digits)));
      }
      const places = ticks(x0, x1, box.width / 90);
      for (const t of places.at) if (Number.isInteger(t))
        root.append(svg("text", { x: x(t + (draw.centred ? 0.5 : 0)), y: height - bottom + 17, "text-anchor": "middle" }, t));
      root.append(svg("text", { x: box.left + box.width / 2, y: height - 3, "text-anchor": "middle" }, xlabel),
        svg("text", { transform: `translate(12 ${box.top + box.height / 2}) rotate(-90)`, "text-anchor": "middle" }, typeof ylabel === "function" ? ylabel() : ylabel));
      const clip = svg("svg", { x: box.left, y: 0, width: box.width, height: height - bottom + 1, viewBox: `${box.left} 0 ${box.width} ${height - bottom + 1}` });
      draw(clip, x, y, x0, x1, box);
      const cursor = svg("line", { class: "cursor", y1: box.top, y2: box.top + box.height, visibility: "hidden" });
      const band = svg("rect", { class: "select", y: box.top, height: box.height, visibility: "hidden" });
      root.append(clip, band, cursor);
      let from = null;
      const where = (event) => {
        const frame = root.getBoundingClientRect();
        const px = Math.min(Math.max(((event.clientX - frame.left) / frame.width) * width, box.left), box.left + box.width - 0.01);
        return { px, value: x0 + ((px - box.left) / box.width) * (x1 - x0) };
      };
      const hide = () => { bubble.style.display = "none"; cursor.setAttribute("visibility", "hidden"); };
      const show = (event) => {
        const { px, value } = where(event), rows = tip(Math.floor(value));
        if (!rows) return hide();
        cursor.setAttribute("x1", px); cursor.setAttribute("x2", px); cursor.setAttribute("visibility", "visible");
        bubble.replaceChildren(...rows);
        bubble.style.display = "block";
        const scale = host.clientWidth / width, gap = 14;
        const at = px * scale + gap + bubble.offsetWidth > host.clientWidth ? px * scale - gap - bubble.offsetWidth : px * scale + gap;
        bubble.style.left = `${Math.max(0, Math.min(at, host.clientWidth - bubble.offsetWidth))}px`;
        bubble.style.top = `${top + 4}px`;
        if (from !== null && zoom) {
          band.setAttribute("x", Math.min(from.px, px)); band.setAttribute("width", Math.abs(px - from.px));
          band.setAttribute("visibility", "visible");
        }
      };
      root.addEventListener("pointermove", show);
      root.addEventListener("pointerdown", (event) => { show(event); if (event.pointerType === "mouse") from = where(event); });
      root.addEventListener("pointerleave", () => { hide(); from = null; band.setAttribute("visibility", "hidden"); });
      root.addEventListener("pointerup", (event) => {
        const there = where(event);
        band.setAttribute("visibility", "hidden");
        if (from && zoom && Math.abs(there.px - from.px) > 6) zoom(Math.min(from.value, there.value), Math.max(from.value, there.value));
        else if (pick && (from || event.pointerType !== "mouse")) pick(Math.floor(there.value));
        from = null;
      });
      if (whole) root.addEventListener("dblclick", whole);
      host.replaceChildren(root, bubble);
    };
    host.redraw = redraw;
    host.lastWidth = 0;
    new ResizeObserver(() => { if (host.clientWidth !== host.lastWidth) { host.lastWidth = host.clientWidth; redraw(); } }).observe(host);
    return host;
  };

  // ---- what can be taken along -------------------------------------------------------------------------------------
  const touch = matchMedia("(pointer: coarse)").matches || navigator.maxTouchPoints > 0;
  const take = (name, url) => { const link = el("a", { href: url, download: name }); document.body.append(link); link.click(); link.remove(); };
  const save = (name, type, text) => take(name, `data:${type};charset=utf-8,${encodeURIComponent(text)}`);
  const cell = (v) => {
    const text = v === null || v === undefined ? "" : String(v), safe = /^[=+\-@\t\r]/.test(text) && typeof v !== "number" ? `'${text}` : text;
    return /[",\n]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const csv = (g) => [["sample", "token", ...g.runs.map((run) => `${run.label}, bytes above static`)],
    ...g.samples.flatMap((s) => Array.from({ length: s.tokens }, (_, t) => [s.id, t, ...g.runs.map((run) => run.peak[s.start + t])]))]
    .map((row) => row.map(cell).join(",")).join("\n") + "\n";
  const drawn = (host) => { // a picture that stands alone: colours and type come from the page's style
    const from = host.querySelector("svg"), copy = from.cloneNode(true), box = from.getBoundingClientRect();
    const marks = [...from.querySelectorAll("*")];
    [...copy.querySelectorAll("*")].forEach((node, i) => {
      const style = getComputedStyle(marks[i]);
      for (const key of ["fill", "stroke", "stroke-width", "opacity", "visibility", "font-size", "font-family"])
        node.setAttribute(key, style.getPropertyValue(key));
    });
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    copy.setAttribute("width", box.width); copy.setAttribute("height", box.height);
    copy.prepend(svg("rect", { width: "100%", height: "100%", fill: getComputedStyle(document.body).backgroundColor }));
    return new XMLSerializer().serializeToString(copy);
  };
  const picture = (host) => {
    const image = new Image();
    image.onload = () => {
      const canvas = el("canvas", { width: image.width * 2, height: image.height * 2 }), pen = canvas.getContext("2d");
      pen.scale(2, 2); pen.drawImage(image, 0, 0);
      take("memprof.png", canvas.toDataURL("image/png"));
    };
    image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(drawn(host))}`;
  };

  // ---- what is shown -----------------------------------------------------------------------------------------------
  const group = () => data.groups[state.group];
  const shown = () => group().runs.filter((run) => !state.hidden.has(run.label));
  const entryAt = (token) => {
    const list = group().samples;
    let low = 0, high = list.length - 1;
    while (low < high) { const mid = (low + high + 1) >> 1; if (list[mid].start <= token) low = mid; else high = mid - 1; }
    return low;
  };
  const line = (left, right) => el("div", {}, el("span", {}, ...left), el("span", {}, right));
  const coincide = (a, b) => {
    const both = a.peak.map((v, t) => [v, b.peak[t]]).filter(([v, w]) => v !== null && w !== null);
    return 2 * both.filter(([v, w]) => Math.abs(v - w) <= 0.01 * Math.max(v, w)).length > both.length;
  };
  const methodDot = (run) => dot({ key: "", colour: run.colour });

  const showGroup = (index) => {
    Object.assign(state, { group: index, hidden: new Set(), view: null, stacked: 0, decode: false });
    const g = group();
    const top = g.runs.reduce((a, b) => (b.dynamic > a.dynamic ? b : a));
    state.sample = g.samples.findIndex((s) => s.id === top.top);
    [...$("groups").children].forEach((b, i) => b.setAttribute("aria-pressed", i === index));
    main.replaceChildren(...build(g));
    showSample(state.sample);
  };

  const build = (g) => {
    const head = el("h2", {}, g.title, el("span", { class: `badge ${g.status}`, id: "status" }, g.status));
    const table = (kind, names, rows) => el("table", { class: kind }, el("thead", {}, el("tr", {}, ...names.map((h) => el("th", data.words[h] ? { title: data.words[h], class: "word" } : {}, h)))),
      el("tbody", {}, ...rows.map((row, i) => el("tr", {}, ...row.map((cell, j) =>
        j ? el("td", { "data-name": names[j] }, cell) : el("td", {}, methodDot(g.runs[i]), cell))))));
    const methods = g.runs.map((run) => el("button", {
      class: "method", type: "button", "aria-pressed": "true", onclick: (event) => {
        state.hidden.has(run.label) ? state.hidden.delete(run.label) : state.hidden.add(run.label);
        event.currentTarget.setAttribute("aria-pressed", !state.hidden.has(run.label));
        $("curve").redraw();
      } }, methodDot(run), run.label));
    const scale = el("button", { type: "button", id: "total", "aria-pressed": "false", onclick: (event) => {
      state.total = !state.total; event.currentTarget.setAttribute("aria-pressed", state.total); $("curve").redraw(); } }, "with static");
    state.total = false;
    const zoomBy = (factor) => () => {
      const [a, b] = state.view || [0, g.tokens], middle = (a + b) / 2, half = ((b - a) / 2) * factor;
      setView(middle - half, middle + half);
    };
    return [
      head,
      el("p", { class: "muted" }, `${g.origin} · sizes in ${data.unit}`),
      el("div", { class: "scroll" }, table("words", g.head, g.rows)),
      ...(g.quality.length ? [
        el("h3", {}, "What it costs"),
        el("p", { class: "muted" }, "Answers beside the right ones and beside the unpruned model's: mean [95 % bootstrap interval over samples]."),
        el("div", { class: "scroll" }, table("costs", g.quality_head, g.quality)),
      ] : []),
      ...g.said.map((text) => el("p", { class: "said" }, text)),
      ...g.remarks.map((text) => el("p", { class: "muted" }, text)),
      el("details", { class: "muted" }, el("summary", {}, "What the words mean"),
        el("dl", {}, ...[...g.head, ...(g.quality.length ? g.quality_head : [])].filter((h) => data.words[h]).flatMap((h) => [el("dt", {}, h), el("dd", {}, data.words[h])]))),
      el("div", { class: "bar", id: "downloads" },
        el("button", { type: "button", id: "csv", onclick: () => save("memprof.csv", "text/csv", csv(g)) }, "data (CSV)"),
        el("button", { type: "button", id: "svg", onclick: () => save("memprof.svg", "image/svg+xml", drawn($("curve"))) }, "curve (SVG)"),
        el("button", { type: "button", id: "png", onclick: () => picture($("curve")) }, "curve (PNG)")),
      el("h3", {}, "Memory over the run"),
      el("p", { class: "muted" }, `The peak of each generated token, above static${touch ? ". Tap for values and to look into a sample." : ". Hover for values, drag to zoom, click to look into a sample."}`),
      el("div", { class: "bar" }, ...methods, el("span", { class: "gap" }), scale,
        el("button", { type: "button", title: "Zoom in", "aria-label": "Zoom in", onclick: zoomBy(0.5) }, "+"),
        el("button", { type: "button", title: "Zoom out", "aria-label": "Zoom out", onclick: zoomBy(2) }, "−"),
        el("button", { type: "button", id: "whole", onclick: () => setView(0, g.tokens) }, "whole run")),
      curve(g),
      el("h3", {}, "What makes up each sample's peak"),
      el("p", { class: "muted" }, "The parts at the highest instant of each sample; they sum to its dynamic peak. " + (touch ? "Tap" : "Click") + " to look into a sample."),
      el("div", { class: "bar", id: "stackers" }, ...g.runs.map((run, i) => el("button", {
        type: "button", "aria-pressed": i === 0, onclick: () => {
          state.stacked = i;
          [...$("stackers").children].forEach((b, j) => b.setAttribute("aria-pressed", i === j));
          $("stack").redraw();
        } }, run.label))),
      stack(g),
      el("ul", { class: "parts" }, ...PARTS.filter((p) => g.runs.some((run) => run.samples.some((s) => s && s.parts && s.parts[p.key])))
        .map((p) => el("li", {}, dot(p), p.label))),
      el("h3", {}, "One sample, token by token"),
      el("div", { class: "bar picker" },
        el("button", { type: "button", "aria-label": "Previous sample", onclick: () => showSample(state.sample - 1) }, "‹"),
        el("select", { id: "sample", "aria-label": "Sample", onchange: (event) => showSample(+event.currentTarget.value) },
          ...g.samples.map((s, i) => el("option", { value: i }, s.failed ? `${s.id} (failed)` : s.id))),
        el("button", { type: "button", "aria-label": "Next sample", onclick: () => showSample(state.sample + 1) }, "›"),
        el("button", { type: "button", onclick: () => {
          const most = (s, i) => Math.max(0, ...g.runs.map((run) => (run.samples[i] && run.samples[i].dynamic) || 0));
          const peaks = g.samples.map(most);
          showSample(peaks.indexOf(Math.max(...peaks)));
        } }, "highest")),
      el("div", { id: "about" }),
      el("div", { class: "bar" }, el("span", { class: "muted", id: "reading" }, g.runs.some((run) => run.samples.some((s) => s && s.every))
        ? "Each token's parts at its own highest instant; below them, the numbers of the highest. " + (touch ? "Tap" : "Hover") + " for the others."
        : "The parts of the highest token; of the others, what is allocated after them."),
        el("span", { class: "gap" }), g.samples.some((s) => s.tokens > 1) ? el("button", {
          type: "button", id: "decode", "aria-pressed": "false", onclick: () => {
            state.decode = !state.decode; $("decode").setAttribute("aria-pressed", state.decode); showSample(state.sample);
          } }, "decode steps only") : null),
      el("div", { class: "cards", id: "cards" }),
      el("footer", { class: "muted" }, `${g.title} · ${g.origin} · page by memprof ${data.version}, ${data.date}`),
    ];
  };

  const setView = (a, b) => {
    const most = group().tokens, least = Math.min(4, most), span = Math.min(Math.max(b - a, least), most);
    const from = Math.min(Math.max((a + b) / 2 - span / 2, 0), most - span);
    state.view = span >= most ? null : [from, from + span];
    $("curve").redraw();
  };

  const curve = (g) => {
    const offset = () => (state.total ? g.static : 0);
    const draw = (root, x, y, x0, x1, box) => {
      g.samples.forEach((s, i) => {
        const next = s.start + s.tokens;
        if (i % 2 && next > x0 && s.start < x1 && box.width * s.tokens / (x1 - x0) > 3)
          root.append(svg("rect", { x: x(s.start), width: x(next) - x(s.start), y: box.top, height: box.height, fill: "var(--faint)" }));
      });
      const picked = g.samples[state.sample];
      if (picked && picked.tokens) root.append(svg("rect", { class: "select", x: x(picked.start), width: Math.max(2, x(picked.start + picked.tokens) - x(picked.start)), y: box.top, height: box.height }));
      if (state.total) root.append(svg("rect", { x: box.left, width: box.width, y: y(g.static), height: y(0) - y(g.static), fill: "var(--static)" }),
        svg("text", { class: "strong", x: box.left + 8, y: (y(g.static) + y(0)) / 2 + 4 }, `static ${unit(g.static)}`));
      const order = [...shown()].sort((a, b) => b.dynamic - a.dynamic);
      order.forEach((run, number) => {
        // A line that another covers is drawn wider, so that both are seen.
        const under = order.slice(number + 1).filter((later) => coincide(run, later)).length;
        const per = (x1 - x0) / box.width, first = Math.floor(x0), last = Math.min(Math.ceil(x1), g.tokens);
        let path = "", pen = false;
        if (per <= 0.7) {
          for (let t = first; t < last; t++) {
            const v = run.peak[t];
            if (v === null) { pen = false; continue; }
            path += `${pen ? "L" : "M"}${x(t).toFixed(1)} ${y(v + offset()).toFixed(1)}H${x(t + 1).toFixed(1)}`;
            pen = true;
          }
        } else {
          for (let px = 0; px < box.width; px++) { // a column of pixels: from its lowest token to its highest
            let low = Infinity, high = -Infinity;
            for (let t = Math.floor(x0 + px * per); t < Math.min(Math.max(x0 + (px + 1) * per, Math.floor(x0 + px * per) + 1), last); t++) {
              const v = run.peak[t];
              if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); }
            }
            if (high < 0) { pen = false; continue; }
            path += `${pen ? "L" : "M"}${box.left + px} ${y(high + offset()).toFixed(1)}V${y(low + offset()).toFixed(1)}`;
            pen = true;
          }
        }
        root.append(svg("path", { d: path, fill: "none", stroke: run.colour, "stroke-width": 1.5 + 1.5 * Math.min(under, 3), "data-method": run.label }));
        const at = run.peak.indexOf(run.dynamic);
        if (at >= x0 && at <= x1) root.append(svg("circle", { cx: x(at + 0.5), cy: y(run.dynamic + offset()), r: 4, fill: run.colour, stroke: "var(--paper)", "stroke-width": 1.5 }));
      });
    };
    return chart(el("div", { id: "curve" }), {
      height: 320, label: "Peak memory of each generated token, one line a method", draw,
      xlabel: "generated token over the run", ylabel: () => `${state.total ? "total allocated" : "dynamic memory"} (${data.unit})`,
      domain: () => [...(state.view || [0, g.tokens]), (Math.max(...shown().map((run) => run.dynamic), 1) + offset()) * 1.06],
      zoom: setView, whole: () => setView(0, g.tokens),
      pick: (t) => showSample(entryAt(t)),
      tip: (t) => {
        if (t < 0 || t >= g.tokens) return null;
        const s = g.samples[entryAt(t)], token = t - s.start;
        const rows = shown().filter((run) => run.peak[t] !== null).sort((a, b) => b.peak[t] - a.peak[t]);
        return [el("b", {}, s.id), line([token ? `decode step ${token}` : "prefill"], `token ${token}`),
          ...rows.map((run) => line([methodDot(run), run.label], unit(run.peak[t] + offset())))];
      },
    });
  };

  const stack = (g) => {
    const samples = () => g.runs[state.stacked].samples;
    const draw = (root, x, y) => {
      samples().forEach((s, i) => {
        if (!s || !s.parts) return;
        let sum = 0;
        const pad = Math.min(1, (x(1) - x(0)) * 0.08);
        for (const p of PARTS) {
          const v = s.parts[p.key] || 0;
          if (v) root.append(svg("rect", { x: x(i) + pad, width: Math.max(0.5, x(i + 1) - x(i) - 2 * pad), y: y(sum + v), height: Math.max(0, y(sum) - y(sum + v)), fill: ink(p) }));
          sum += v;
        }
      });
      if (state.sample !== null) root.append(svg("rect", { class: "picked", x: x(state.sample), width: x(state.sample + 1) - x(state.sample), y: 0, height: y(0) }));
    };
    draw.centred = true;
    return chart(el("div", { id: "stack" }), {
      height: 250, label: "Parts of each sample's dynamic peak, stacked", draw,
      xlabel: "sample", ylabel: `dynamic memory (${data.unit})`,
      domain: () => [0, g.samples.length, Math.max(...g.runs.map((run) => run.dynamic), 1) * 1.04],
      pick: (i) => showSample(i),
      tip: (i) => {
        const s = samples()[i];
        if (!g.samples[i]) return null;
        if (!s || !s.parts) return [el("b", {}, g.samples[i].id), el("span", {}, s ? s.status : "not in this run")];
        return [el("b", {}, g.samples[i].id), line([s.phase], unit(s.dynamic)),
          ...PARTS.filter((p) => s.parts[p.key]).reverse().map((p) => line([dot(p), p.label], unit(s.parts[p.key])))];
      },
    });
  };

  const showSample = (index) => {
    const g = group(), i = Math.min(Math.max(index, 0), g.samples.length - 1);
    state.sample = i;
    $("sample").value = i;
    const entry = g.samples[i], some = g.runs.map((run) => run.samples[i]).find((s) => s && s.parts);
    const about = some ? `${some.width} × ${some.height} pixels · ${some.tiles} tiles · ${some.visual} visual and ${some.text} text tokens` : "";
    $("about").replaceChildren(el("p", { class: "muted", id: "sample-about" }, [about, entry.category].filter(Boolean).join(" · ")));
    $("cards").replaceChildren(...g.runs.map((run) => card(run, run.samples[i], i)));
    for (const id of ["curve", "stack"]) if ($(id).redraw && $(id).lastWidth) $(id).redraw();
  };

  const card = (run, s, index) => {
    const box = el("section", { class: "card" });
    box.style.borderTopColor = run.colour;
    box.append(el("h4", {}, el("span", {}, run.label), el("span", {}, s && s.parts ? unit(s.dynamic) : "")));
    if (!s) return fill(box, {}, [el("p", { class: "muted" }, "This sample is not in this run.")]);
    if (!s.parts) return fill(box, {}, [el("p", { class: "error" }, `${s.status}: ${s.error}`)]);
    const words = [`highest in ${s.phase || "token " + s.at}`, s.kept === null ? null : `${s.kept} of ${s.visual} visual tokens kept`,
      s.score === null ? null : `score ${s.score}`].filter(Boolean).join(" · ");
    box.append(el("p", { class: "muted" }, words));
    if (s.answer !== null) box.append(el("p", {}, "“", s.answer, "”"));
    const from = state.decode && s.peak.length > 1 ? 1 : 0, at = (p, t) => (s.every[p.key] ? s.every[p.key][t] : 0);
    const areas = (root, x, y, x0) => { // one path a part, a step a token: apart where there is room, never below a pixel
      const wide = x(x0 + 1) - x(x0), pad = wide < 4 ? 0 : Math.min(0.75, wide * 0.08), below = s.peak.map(() => 0);
      for (const p of PARTS) {
        if (!s.every[p.key]) continue;
        let path = "";
        for (let t = from; t < s.peak.length; t++) {
          const v = at(p, t), left = x(t) + pad, right = Math.max(left + 1, x(t + 1) - pad);
          const [low, high] = [below[t], below[t] + v].map((sum) => y(sum).toFixed(2));
          if (v) path += `M${left.toFixed(2)} ${low}V${high}H${right.toFixed(2)}V${low}Z`;
          below[t] += v;
        }
        if (path) root.append(svg("path", { d: path, fill: ink(p), "data-part": p.key }));
      }
    };
    const bars = (root, x, y) => { // the parts of the highest token; of the others what is held for the next one
      s.peak.forEach((peak, t) => {
        const rest = Math.max(0, s.held[t] - s.kv[t]), over = Math.max(0, peak - s.kv[t] - rest);
        const layers = t === s.at ? PARTS.map((p) => [s.parts[p.key] || 0, ink(p)])
          : [[s.kv[t], PARTS[0].colour], [rest, "var(--static)"], [over, "var(--rule)"]];
        let sum = 0;
        for (const [v, colour] of t < from ? [] : layers) {
          if (v) root.append(svg("rect", { x: x(t) + 0.75, width: Math.max(0.5, x(t + 1) - x(t) - 1.5), y: y(sum + v), height: y(sum) - y(sum + v), fill: colour }));
          sum += v;
        }
      });
    };
    const draw = (root, x, y, x0) => (s.every ? areas : bars)(root, x, y, x0);
    draw.centred = true;
    // One scale for all methods, so that they can be compared.
    const peaks = group().runs.flatMap((r) => (r.samples[index] && r.samples[index].peak ? r.samples[index].peak.slice(from) : []));
    const rowsAt = (t) => {
      const valued = (size) => PARTS.filter((p) => size(p)).reverse().map((p) => line([dot(p), p.label], unit(size(p))));
      if (s.every) return valued((p) => at(p, t));
      return t === s.at ? valued((p) => s.parts[p.key]) : [line(["allocated after it"], unit(s.held[t])), line([dot(PARTS[0]), "KV cache"], unit(s.kv[t]))];
    };
    box.append(chart(el("div", { class: "tokens" }), {
      height: 210, label: `Memory of ${run.label} token by token`, draw, xlabel: "token (0 is prefill)", ylabel: `dynamic (${data.unit})`,
      domain: () => [from, s.peak.length, Math.max(...peaks, 1) * 1.05],
      tip: (t) => {
        if (t < from || t >= s.peak.length) return null;
        return [el("b", {}, t ? `token ${t}, decode` : "token 0, prefill"), line([el("b", {}, "peak")], unit(s.peak[t])), ...rowsAt(t)];
      },
    }));
    // Every part that is drawn is named; the numbers are those of the highest token drawn.
    const top = from ? s.peak.indexOf(Math.max(...s.peak.slice(from))) : s.at;
    const then = (p) => (s.every ? at(p, top) : top === s.at ? s.parts[p.key] || 0 : 0);
    const drawn = PARTS.filter((p) => then(p) || (s.every && s.every[p.key] && s.every[p.key].slice(from).some((v) => v)));
    box.append(el("ul", { class: "parts" }, ...drawn.map((p) => el("li", {}, dot(p), then(p) ? `${p.label} ${bytes(then(p))}` : p.label))));
    return box;
  };

  // ---- start -------------------------------------------------------------------------------------------------------
  $("groups").append(...data.groups.map((g, i) => el("button", { type: "button", onclick: () => showGroup(i) }, g.tab)));
  if (data.groups.length < 2) $("groups").replaceChildren();
  const dark = () => {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const nameTheme = () => { $("theme").textContent = dark() ? "light" : "dark"; };
  $("theme").addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; nameTheme(); });
  nameTheme();
  if (data.groups.length) showGroup(0); else main.replaceChildren(el("p", {}, "No run has a finished sample."));
  document.documentElement.dataset.ready = "yes";
})();
