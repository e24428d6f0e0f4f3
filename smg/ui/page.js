
"use strict";
// Draws what /ui/events tells. Whatever comes from there is put into the page as text and as lengths, never as markup.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const SILENT_MS = 5000;          // snapshots come each second: a stream that is silent for longer is dead
  const RETRY_MS = [1000, 2000, 4000, 8000];
  const CURVE_S = 120, CURVE_LEAST_S = 30;
  const DECISIONS_SHOWN = 12;
  const find = (id) => document.getElementById(id);

  // ---- numbers in words

  const NONE = "–";
  const digits = (value, places) => value.toLocaleString("en", { minimumFractionDigits: places, maximumFractionDigits: places });
  const three = (value) => digits(value, value === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2);
  function scaled(value, step, units) {
    let place = 0;
    while (value >= step && place < units.length - 1) { value /= step; place += 1; }
    return [place === 0 && Number.isInteger(value) ? digits(value, 0) : three(value), units[place]];
  }
  const amount = (value) => scaled(value, 1000, ["", "k", "M", "G"]).join("");
  function duration(seconds) {
    if (seconds === null) return [NONE, ""];
    if (seconds < 0.0000005) return ["0", "s"];
    if (seconds < 0.0995) return [three(seconds * 1000), "ms"];
    if (seconds < 0.9995) return [digits(seconds * 1000, 0), "ms"];
    return [three(seconds), "s"];
  }
  const inWords = (seconds) => duration(seconds).join(" ").trim();
  const percent = (share) => (share === null ? NONE : digits(share * 100, share > 0 && share < 0.0995 ? 1 : 0) + " %");
  function uptime(seconds) {
    const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60), days = Math.floor(hours / 24);
    if (days) return `${days} d ${hours % 24} h`;
    if (hours) return `${hours} h ${minutes % 60} min`;
    if (minutes) return `${minutes} min`;
    return `${Math.floor(seconds)} s`;
  }

  // ---- the page's parts: changed only where something changed

  function make(tag, className) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    return node;
  }
  function say(node, text) { if (node.textContent !== text) node.textContent = text; }
  function mark(node, name, value) {
    if (value === null) node.removeAttribute(name);
    else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  function show(node, isShown) { if (node.hidden === isShown) node.hidden = !isShown; }
  function stretch(node, share) {
    const width = `${(Math.min(1, Math.max(0, share)) * 100).toFixed(1)}%`;
    if (node.style.width !== width) node.style.width = width;
  }

  function cell(row, label, className) {
    const node = make("td", className);
    node.setAttribute("role", "cell");
    if (label) node.dataset.label = label;
    row.append(node);
    return node;
  }
  function textCell(row, label, className) {
    const node = cell(row, label, className);
    return (text, isNone) => { say(node, text); node.classList.toggle("none", Boolean(isNone)); };
  }
  function nameCell(row) {
    const node = cell(row, "", "named first");
    const name = make("span", "name"), tag = make("span", "tag"), sub = make("span", "sub");
    node.append(name, " ", tag, sub);
    return (text, more, tagText) => { say(name, text); say(sub, more); show(sub, more !== ""); say(tag, tagText || ""); show(tag, Boolean(tagText)); };
  }
  function stateCell(row) {
    const node = cell(row, "State", "corner");
    const state = make("span", "state"), sub = make("span", "sub");
    node.append(state, sub);
    return (text, tone, more) => { say(state, text); mark(state, "data-tone", tone); say(sub, more); show(sub, more !== ""); };
  }
  function countCell(row, label) {
    const node = cell(row, label, "number"), number = make("span"), sub = make("span", "sub");
    node.append(number, sub);
    return (count, more) => {
      say(number, count === null ? NONE : digits(count, 0));
      number.classList.toggle("none", count === null);
      say(sub, more);
      show(sub, more !== "");
    };
  }
  function meterCell(row, label) {
    const meter = make("div", "meter"), track = make("div", "track"), fill = make("div", "fill"), value = make("output");
    track.setAttribute("aria-hidden", "true");
    track.append(fill);
    meter.append(track, value);
    cell(row, label, "").append(meter);
    return (share, tone) => {
      stretch(fill, share === null ? 0 : share);
      say(value, percent(share));
      value.classList.toggle("none", share === null);
      mark(meter, "data-tone", tone || null);
    };
  }

  // Rows by key, so that a row stays the same node while its worker stays.
  function Rows(table, build) {
    const body = table.tBodies[0], known = new Map();
    return (items, keyOf, fill) => {
      const gone = new Set(known.keys());
      let place = body.firstElementChild;
      for (const item of items) {
        const key = keyOf(item);
        gone.delete(key);
        let row = known.get(key);
        if (!row) {
          const node = make("tr");
          node.setAttribute("role", "row");
          row = { node, parts: build(node) };
          known.set(key, row);
        }
        if (row.node === place) place = place.nextElementSibling;
        else body.insertBefore(row.node, place);
        fill(row.parts, item);
      }
      for (const key of gone) { known.get(key).node.remove(); known.delete(key); }
      show(table, items.length > 0);
    };
  }

  // ---- curves

  function Curve(svg, kinds) {
    const paths = kinds.map((kind) => {
      const path = document.createElementNS(SVG, "path");
      path.setAttribute("class", kind);
      svg.append(path);
      return path;
    });
    svg.setAttribute("viewBox", "0 0 120 40");
    // `series`: one list of [seconds ago, value or null] for each kind; an `area` is drawn under the same list as its line.
    return (series, highest, label) => {
      // A curve that has just begun fills the width too, so that there is something to see.
      const oldest = Math.max(0, ...series.flat().map((point) => point[0]));
      const span = Math.min(CURVE_S, Math.max(CURVE_LEAST_S, oldest));
      const top = highest || Math.max(1e-9, ...series.flat().map((point) => point[1] || 0)) * 1.08;
      kinds.forEach((kind, index) => mark(paths[index], "d", drawn(series[index], span, top, kind === "area")));
      mark(svg, "aria-label", label);
    };
  }
  function drawn(points, span, top, isArea) {
    let text = "", run = [];
    const close = () => {
      if (run.length > 1) {
        const line = run.map(([x, y], index) => `${index ? "L" : "M"}${x.toFixed(2)} ${y.toFixed(2)}`).join("");
        text += isArea ? `${line}L${run[run.length - 1][0].toFixed(2)} 40L${run[0][0].toFixed(2)} 40Z` : line;
      }
      run = [];
    };
    let before = null;
    for (const [ago, value] of points) {
      if (value === null || (before !== null && before - ago > 3)) close();
      if (value !== null) run.push([(1 - ago / span) * 120, 39 - 38 * Math.min(1, value / top)]);
      before = ago;
    }
    close();
    return text;
  }

  function Tile(id, kinds) {
    const node = find(id), part = (name) => node.querySelector(`[data-is=${name}]`);
    const value = part("value"), unit = part("unit"), aside = part("aside");
    const plain = make("span"), bad = make("span", "bad");
    aside.replaceChildren(plain, bad);
    const curve = Curve(part("curve"), kinds);
    return ([number, unitText], more, fault, series, highest, label) => {
      say(value, number);
      say(unit, unitText);
      say(plain, more || "\u00a0");
      say(bad, fault ? ` · ${fault}` : "");
      curve(series, highest, label);
    };
  }

  const tiles = {
    requests: Tile("tile-requests", ["area", "line", "fault"]),
    ttft: Tile("tile-ttft", ["area", "line", "second"]),
    hits: Tile("tile-hits", ["area", "line"]),
    flight: Tile("tile-flight", ["area", "line"]),
    mesh: Tile("tile-mesh", ["area", "line"]),
  };
  // A point is a list: when, requests, failures, in flight, hits, TTFT p50, TTFT p90, mesh bytes (smg/ui/snapshot.py).
  const AT = 0, REQUESTS = 1, FAILURES = 2, FLIGHT = 3, HITS = 4, P50 = 5, P90 = 6, BYTES = 7;

  function drawTiles(told) {
    const list = (index) => told.points.map((point) => [told.at - point[AT], point[index]]);
    const peak = (index) => Math.max(0, ...told.points.map((point) => point[index] || 0));
    const { traffic, hits, ttft, mesh } = told;
    const requests = list(REQUESTS), p50 = list(P50), ratio = list(HITS), flight = list(FLIGHT), bytes = list(BYTES);
    const failing = traffic.failures_per_s > 0 ? `${three(traffic.failures_per_s)}/s failing` : "";
    tiles.requests([three(traffic.requests_per_s), "/s"],
      `${amount(traffic.tokens_in_per_s)} tokens/s in, ${amount(traffic.tokens_out_per_s)} out`, failing,
      [requests, requests, peak(FAILURES) > 0 ? list(FAILURES) : []], 0,
      `Requests per second in the last two minutes, at most ${three(peak(REQUESTS))}`);
    const since = ttft.is_ever && ttft.count ? "since the start · " : "";
    tiles.ttft(duration(ttft.p50_s),
      ttft.count ? `${since}p90 ${inWords(ttft.p90_s)} · p99 ${inWords(ttft.p99_s)}` : "No streams yet", "",
      [p50, p50, list(P90)], 0, `Median and p90 of the time to first token; p90 at most ${inWords(peak(P90))}`);
    const shown = hits.ratio === null ? hits.ratio_ever : hits.ratio;
    tiles.hits(shown === null ? [NONE, ""] : [digits(shown * 100, 0), "%"],
      shown === null ? "No prompts matched yet" : hits.cached_ratio === null || hits.cached_tokens === 0
        ? `of prompts · ${percent(hits.ratio_ever)} since the start`
        : `of prompts · engines report ${percent(hits.cached_ratio)}`, "",
      [ratio, ratio], 1, "Share of prompt characters found cached, in the last two minutes");
    tiles.flight([digits(traffic.in_flight, 0), traffic.in_flight === 1 ? "request" : "requests"],
      traffic.waiting ? `${digits(traffic.waiting, 0)} waiting to be admitted` : `${amount(traffic.requests)} finished since the start`, "",
      [flight, flight], 0, `Requests in flight in the last two minutes, at most ${digits(peak(FLIGHT), 0)}`);
    if (mesh) {
      const [number, unit] = scaled(mesh.bytes_in_per_s + mesh.bytes_out_per_s, 1000, ["B/s", "kB/s", "MB/s"]);
      tiles.mesh([number, unit], mesh.alive < 2 ? "No peers" : `lag ${inWords(mesh.lag_p50_ms / 1000)}${mesh.lag_max_ms > mesh.lag_p50_ms ? ` · worst ${inWords(mesh.lag_max_ms / 1000)}` : ""}`, "",
        [bytes, bytes], 0, `Bytes of the mesh per second, at most ${scaled(peak(BYTES), 1000, ["B", "kB", "MB"]).join(" ")}`);
    } else {
      tiles.mesh([NONE, ""], "Not in a mesh", "", [[], []], 0, "No mesh");
    }
  }

  // ---- workers

  const WORKER_TONES = { ready: "good", pending: "idle", not_ready: "bad", failed: "bad", draining: "warn" };
  const words = (name) => { const text = name.replaceAll("_", " "); return text.charAt(0).toUpperCase() + text.slice(1); };
  const workers = Rows(find("workers"), (row) => ({
    name: nameCell(row), state: stateCell(row), load: countCell(row, "In flight"), queue: countCell(row, "Engine's queue"), kv: meterCell(row, "KV cache"), share: meterCell(row, "Share of requests"),
  }));
  function fillWorker(parts, worker) {
    const models = worker.models.join(", ") + (worker.models_more ? ` and ${worker.models_more} more` : "");
    const kind = worker.kind === "regular" ? "" : worker.kind;
    parts.name(worker.name, [models, worker.engine].filter(Boolean).join(" · "), kind);
    const isCut = worker.status === "ready" && worker.breaker !== "closed";
    const tone = isCut ? (worker.breaker === "open" ? "bad" : "warn") : worker.is_overloaded ? "warn" : WORKER_TONES[worker.status] || "idle";
    parts.state(isCut ? `Breaker ${worker.breaker.replaceAll("_", " ")}` : worker.is_overloaded ? "Overloaded" : words(worker.status), tone,
      !isCut && worker.breaker !== "closed" ? `breaker ${worker.breaker.replaceAll("_", " ")}` : "");
    parts.load(worker.in_flight + worker.peers_in_flight, worker.peers_in_flight ? `${digits(worker.peers_in_flight, 0)} by peers` : "");
    parts.queue(worker.waiting, worker.running === null ? "" : `${digits(worker.running, 0)} running`);
    parts.kv(worker.kv_usage, worker.kv_usage !== null && worker.kv_usage >= 0.9 ? "warn" : "");
    parts.share(worker.share);
  }
  function drawWorkers(told) {
    workers(told.rows, (worker) => worker.id, fillWorker);
    say(find("workers-count"), told.total ? `${digits(told.ready, 0)} of ${digits(told.total, 0)} ready` : "");
    show(find("workers-more"), told.hidden > 0);
    say(find("workers-more"), `${digits(told.hidden, 0)} more that are ready and less busy`);
    show(find("workers-empty"), told.total === 0);
  }

  // ---- the mesh

  const MEMBER_TONES = { alive: "good", suspect: "warn", dead: "bad", left: "idle" };
  const members = Rows(find("members"), (row) => ({
    name: nameCell(row), state: stateCell(row), rtt: textCell(row, "Round trip", "number"), lag: textCell(row, "News lag", "number"),
  }));
  function fillMember(parts, member) {
    parts.name(member.name, member.version, member.is_self ? "this node" : "");
    const silent = !member.is_self && member.state !== "alive" ? `heard ${uptime(member.last_seen_s)} ago` : "";
    parts.state(words(member.state), MEMBER_TONES[member.state] || "idle", silent);
    parts.rtt(member.rtt_ms === null ? NONE : inWords(member.rtt_ms / 1000), member.rtt_ms === null);
    parts.lag(member.lag_ms === null ? NONE : inWords(member.lag_ms / 1000), member.lag_ms === null);
  }
  function drawMesh(mesh) {
    show(find("mesh-empty"), mesh === null);
    const more = find("members-more");
    if (mesh === null) {
      members([], () => "", fillMember);
      say(find("mesh-count"), "");
      show(more, false);
      return;
    }
    members(mesh.rows, (member) => member.name, fillMember);
    const state = mesh.is_partitioned ? "partitioned" : mesh.alive < 2 ? "no peers yet" : mesh.is_converged ? "in agreement" : "exchanging news";
    say(find("mesh-count"), `${digits(mesh.alive, 0)} of ${digits(mesh.members, 0)} alive · ${state}`);
    show(more, mesh.hidden > 0);
    say(more, `${digits(mesh.hidden, 0)} more members`);
  }

  // ---- decisions

  const BY = { policy: "policy", owner: "session's owner", routing_key: "routing key", target: "client's choice", only_candidate: "only candidate" };
  const decisions = Rows(find("decisions"), (row) => {
    const parts = { time: timeCell(row), model: nameOnly(row, "Model", "word"), worker: nameOnly(row, "Worker", "named first"), by: nameOnly(row, "Decided by", "word"),
      matched: meterCell(row, "Prompt cached"), cost: textCell(row, "Cost", "number") };
    parts.terms = termsCell(row);
    return parts;
  });
  function timeCell(row) {
    const node = make("time");
    cell(row, "Time", "corner").append(node);
    return (date) => { say(node, date.toLocaleTimeString("en-GB")); mark(node, "datetime", date.toISOString()); };
  }
  function nameOnly(row, label, className) {
    const node = cell(row, label, className), name = make("span", "name"), sub = make("span", label === "Model" ? "sub place" : "sub");
    node.append(name, sub);
    return (text, more) => { say(name, text); say(sub, more); show(sub, more !== ""); };
  }
  const TERMS = ["wait", "prefill", "penalty"];
  function termsCell(row) {
    const node = cell(row, "Made of", "wide"), bar = make("div", "parts"), text = make("span", "sub");
    bar.setAttribute("aria-hidden", "true");
    const spans = TERMS.map((name) => { const span = make("span", name); bar.append(span); return span; });
    node.append(bar, text);
    return (item, dearest) => {
      const told = TERMS.filter((name) => item[name]);
      show(bar, told.length > 0);
      TERMS.forEach((name, index) => stretch(spans[index], dearest > 0 ? (item[name] || 0) / dearest : 0));
      say(text, told.map((name) => `${name} ${inWords(item[name])}`).join(" · ") || (item.cost === null ? NONE : "nothing to wait for"));
    };
  }
  const noted = new Map();         // number → when, so that a row's time does not move by the age's rounding
  function drawDecisions(told) {
    const all = told.decisions, more = find("decisions-more");
    const items = showsAll ? all : all.slice(0, DECISIONS_SHOWN);
    const dearest = Math.max(0, ...items.map((item) => item.cost || 0));  // bars of all rows are to one scale
    show(more, all.length > DECISIONS_SHOWN);
    say(more, showsAll ? "Show fewer" : `Show all ${all.length}`);
    for (const number of noted.keys()) if (!all.some((item) => item.number === number)) noted.delete(number);
    decisions(items, (item) => item.number, (parts, item) => {
      if (!noted.has(item.number)) noted.set(item.number, new Date((told.at - item.age_s) * 1000));
      parts.time(noted.get(item.number));
      parts.model(item.model, item.leg ? `${item.endpoint} · ${item.leg}` : item.endpoint);
      parts.worker(item.worker || "gone", item.worker_id.slice(0, 8));
      parts.by(item.decided_by === "policy" ? item.policy : BY[item.decided_by] || item.decided_by,
        item.owner ? item.owner : item.decided_by === "policy" ? "" : item.policy);
      parts.matched(item.matched);
      parts.cost(item.cost === null ? NONE : inWords(item.cost), item.cost === null);
      parts.terms(item, dearest);
    });
    show(find("decisions-empty"), all.length === 0);
    show(find("legend"), items.some((item) => item.cost !== null));
    show(find("decisions-foot"), all.length > 0);
  }
  let showsAll = false;
  find("decisions-more").addEventListener("click", () => { showsAll = !showsAll; if (latest) drawDecisions(latest); });

  let latest = null;
  function draw(told) {
    latest = told;
    const name = told.node || location.host;
    say(find("node"), name);
    const title = `${name} · smg`;
    if (document.title !== title) document.title = title;
    const late = told.delay_p99_s !== null && told.delay_p99_s > 0.05 ? ` · event loop late by ${inWords(told.delay_p99_s)}` : "";
    say(find("about"), `smg ${told.version} · up ${uptime(told.uptime_s)}${late}`);
    drawTiles(told);
    drawWorkers(told.workers);
    drawMesh(told.mesh);
    drawDecisions(told);
    find("main").removeAttribute("aria-busy");
  }

  // ---- the stream: opened again whenever it ends, closed while nobody can see the page

  const link = find("link"), banner = find("banner"), pause = find("pause"), main = find("main");
  let source = null, failures = 0, retryTimer = 0, silenceTimer = 0, isPaused = false;

  function state(name, text, alarm) {
    mark(link, "data-state", name);
    say(find("link-text"), text);
    say(banner, alarm || "");
    show(banner, Boolean(alarm));
    mark(main, "data-stale", name === "lost" ? "" : null);
  }
  function close() {
    clearTimeout(retryTimer);
    clearTimeout(silenceTimer);
    if (source) source.close();
    source = null;
  }
  function lost(why) {
    close();
    const wait = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
    failures += 1;
    state("lost", "Connection lost", `${why} What you see is old; trying again every ${wait / 1000} s.`);
    retryTimer = setTimeout(open, wait);
  }
  function watchSilence() {
    clearTimeout(silenceTimer);
    silenceTimer = setTimeout(() => lost("The node is silent."), SILENT_MS);
  }
  function open() {
    close();
    if (isPaused || document.hidden) return;
    source = new EventSource(location.pathname.replace(/\/*$/, "") + "/events");
    watchSilence();
    source.addEventListener("snapshot", (event) => {
      failures = 0;
      watchSilence();
      state("live", "Live");
      draw(JSON.parse(event.data));
    });
    source.addEventListener("end", () => lost("The node is shutting down."));
    source.addEventListener("error", () => lost("No connection to the node."));
  }
  pause.addEventListener("click", () => {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    say(pause, isPaused ? "Resume" : "Pause");
    if (isPaused) { close(); state("paused", "Paused"); } else { state("connecting", "Connecting"); open(); }
  });
  document.addEventListener("visibilitychange", () => { if (document.hidden) close(); else open(); });
  open();
})();
