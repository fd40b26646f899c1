// The console's behaviour: asks /console/state once a second, and uses the API's own routes for everything else.
import { Curve, bytes, difference, drawArena, element } from "/console/charts.js";

const $ = (id) => document.getElementById(id);
const PERIOD = 1000;
const ROWS = 200; // of the table of adapters; the filter finds the others
const COLUMNS = 8; // of answers

let state = null, before = null, running = null, lastLine = 0;
const chosen = new Set([null]); // null is the base model
const answers = []; // {name, text, tokens, done, …} of the last run, in the order of the columns

// ---------------------------------------------------------------- requests

const key = () => sessionStorage.getItem("key") ?? "";
const headers = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

async function call(path, body, signal) {
  const options = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const answer = await fetch(path, {
    ...options, signal, headers: { ...headers(), ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
  });
  if (answer.ok) return answer;
  const text = await answer.text();
  let message = text || answer.statusText;
  try {
    const found = JSON.parse(text);
    message = found.error?.message ?? found.error_message ?? found.message ?? message;
  } catch { /* the body is no JSON: shown as it is */ }
  throw Object.assign(new Error(message), { status: answer.status });
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text ?? "";
}

// ---------------------------------------------------------------- once a second

async function refresh() {
  try {
    state = await (await call("/console/state")).json();
    notice(null);
    show();
  } catch (error) {
    const asked = error.status === 401 || error.status === 403;
    badge(asked ? "key needed" : error.status ? `error ${error.status}` : "unreachable", asked ? "paused" : "unreachable");
    notice(asked ? "This server asks for a key." : `The server doesn't answer: ${error.message}`);
    if (asked && !$("key-dialog").open && !sessionStorage.getItem("asked")) {
      sessionStorage.setItem("asked", "1");
      openKeyDialog();
    }
  }
  setTimeout(refresh, document.hidden ? 5 * PERIOD : PERIOD);
}

function badge(text, kind) {
  const box = $("engine");
  if (box.textContent !== text) box.textContent = text; // a status is read out when it changes
  box.className = `badge ${kind}`;
}

function show() {
  const { model, caller } = state;
  badge(state.engine === "dead" ? "engine dead" : state.engine, state.engine);
  if (state.engine === "dead") notice("The engine process ended, and is not started again. Restart the server.");
  if (state.engine === "restarting") notice("The engine process ended and is being started again. Requests are refused until it is up.");
  $("model").textContent = `${model.name} · ${model.dtype} on ${model.device}${model.tp_size > 1 ? ` × ${model.tp_size}` : ""} · context ${model.context_length} · v${state.version}`;
  $("who").textContent = caller.tenant ? `${caller.key_id} (${caller.tenant})` : caller.admin ? "admin" : caller.key_id || "";
  for (const button of document.querySelectorAll(".may-load")) button.hidden = !caller.loads || !model.enable_lora;
  showCharts();
  showQueues();
  $("arena-section").hidden = !state.arena;
  if (state.arena) showArena();
  showAdapters();
  showTargets();
  $("log-section").hidden = !caller.admin;
  if (caller.admin) showLog();
  before = state;
}

// ---------------------------------------------------------------- load

const number = (unit, digits = 0) => (v) => `${v.toFixed(digits)} ${unit}`;
const curves = {
  output: new Curve($("charts"), "Output", number("tokens/s")),
  prompt: new Curve($("charts"), "Prompts computed", number("tokens/s")),
  first: new Curve($("charts"), "First token, mean", number("ms")),
  gap: new Curve($("charts"), "Between tokens, mean", number("ms", 1)),
  running: new Curve($("charts"), "Running", number("requests")),
  waiting: new Curve($("charts"), "Waiting", number("requests")),
};

function showCharts() {
  const now = state.counters;
  $("charts").hidden = !now;
  if (!now || !before?.counters) return;
  const then = before.counters, seconds = state.time - before.time || 1;
  const rate = (name) => Math.max(0, now[name] - then[name]) / seconds;
  const mean = (name) => {
    const [sum, count] = now[name].map((value, i) => value - then[name][i]);
    return count > 0 ? (1000 * sum) / count : null;
  };
  curves.output.add(rate("generated_tokens"));
  curves.prompt.add(rate("prompt_tokens") - Math.min(rate("cached_tokens"), rate("prompt_tokens")));
  curves.first.add(mean("first_token"));
  curves.gap.add(mean("inter_token"));
  curves.running.add(now.running);
  curves.waiting.add(now.waiting);
}

function showQueues() {
  const rows = state.queues.length ? state.queues : [{ tenant: state.caller.tenant, waiting: 0, running: 0 }];
  $("queues").tBodies[0].replaceChildren(
    ...rows.map((q) => element("tr", {}, element("td", {}, q.tenant || "–"), element("td", {}, q.waiting), element("td", {}, q.running))),
  );
}

function showArena() {
  const a = state.arena;
  $("arena-text").textContent = `${bytes(a.total_pages * a.page_bytes)} in ${a.total_pages} pages of ${bytes(a.page_bytes)}; `
    + `${bytes(a.free_pages * a.page_bytes)} free; ${a.slots_used} adapters on the device${a.slots_total ? ` of at most ${a.slots_total}` : ""}`;
  drawArena($("arena"), $("arena-legend"), a, state.adapters);
}

// ---------------------------------------------------------------- adapters

const rows = new Map(); // name → {row, cells, shown}

function showAdapters() {
  const words = $("filter").value.toLowerCase(), order = $("order").value;
  const value = (a) => a[order] ?? (order === "name" || order === "level" ? "" : 0);
  const found = state.adapters
    .filter((a) => `${a.name} ${a.path}`.toLowerCase().includes(words))
    .sort((a, b) => (typeof value(a) === "string" ? value(a).localeCompare(value(b)) : value(b) - value(a)) || a.name.localeCompare(b.name));
  const kept = found.slice(0, ROWS), names = new Set(kept.map((a) => a.name)), body = $("adapters").tBodies[0];
  for (const [name, { row }] of rows) if (!names.has(name)) { row.remove(); rows.delete(name); }
  kept.forEach((adapter, i) => {
    const row = fill(adapter);
    if (body.rows[i] !== row) body.insertBefore(row, body.rows[i] ?? null);
  });
  $("adapter-count").textContent = `${state.adapters.length} loaded`
    + (found.length < state.adapters.length ? `, ${found.length} found` : "") + (found.length > ROWS ? `, ${ROWS} shown` : "");
}

function fill(adapter) {
  let entry = rows.get(adapter.name);
  if (!entry) {
    const cells = Array.from({ length: 10 }, (_, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }));
    entry = { cells, shown: [], row: element("tr", {}, ...cells) };
    entry.row.dataset.name = adapter.name;
    rows.set(adapter.name, entry);
  }
  const texts = [
    adapter.name + (adapter.pinned ? " 📌" : ""), adapter.level, adapter.rank ?? "–",
    adapter.device_bytes ? bytes(adapter.device_bytes) : "–", adapter.host_bytes ? bytes(adapter.host_bytes) : "–",
    adapter.weight_version ? `${adapter.version} (${adapter.weight_version})` : `${adapter.version}`, adapter.requests ?? "–",
    adapter.hits === undefined ? "–" : `${adapter.hits} / ${adapter.misses}`, adapter.path,
  ];
  texts.forEach((text, i) => {
    if (entry.shown[i] === text) return;
    entry.shown[i] = text;
    if (i === 1) entry.cells[i].replaceChildren(element("span", { className: `level ${text}` }, text));
    else entry.cells[i].textContent = text;
  });
  entry.cells[8].className = "path";
  entry.cells[8].title = adapter.path;
  if (adapter.target_modules) entry.cells[2].title = [].concat(adapter.target_modules).join(", ");
  const actions = `${adapter.path} ${adapter.pinned} ${state.caller.loads && adapter.own} ${state.caller.pins}`;
  if (entry.shown[9] !== actions) { // buttons are made anew only when they change, so that they keep the focus
    entry.shown[9] = actions;
    entry.cells[9].replaceChildren(...buttons(adapter));
  }
  return entry.row;
}

function buttons(adapter) {
  if (!state.caller.loads || !adapter.own) return [];
  const made = [button("Unload", `Unload ${adapter.name}`, () => change("/unload_lora_adapter", { lora_name: adapter.name }))];
  if (adapter.level === "composition") return made;
  made.push(button("Swap…", `Replace ${adapter.name}`, () => openLoadDialog("swap", adapter)));
  if (state.caller.pins && !adapter.path.startsWith("__")) {
    const body = { lora_name: adapter.name, lora_path: adapter.path, pinned: !adapter.pinned, upsert: true };
    const label = adapter.pinned ? "Unpin" : "Pin";
    made.push(button(label, `${label} ${adapter.name}`, () => change("/load_lora_adapter", body)));
  }
  return made;
}

function button(text, label, action) {
  const made = element("button", { type: "button", "aria-label": label, title: label }, text);
  made.addEventListener("click", async () => {
    made.disabled = true;
    try { await action(); } finally { made.disabled = false; }
  });
  return made;
}

async function change(path, body) {
  try { await call(path, body); } catch (error) { window.alert(error.message); }
}

// "0.7*a + 0.3*b" → [{name: "a", weight: 0.7}, …]; a name alone counts once, "-" subtracts
function parseComposition(text) {
  return text.replace(/-/g, (sign, at) => (/(^|[+*\s])\s*$/.test(text.slice(0, at)) && /^-\s*[\d.]/.test(text.slice(at)) ? "+-" : sign))
    .split("+").map((part) => part.trim()).filter(Boolean).map((part) => {
      const [, weight, name] = /^(?:(-?\s*[\d.]+(?:e-?\d+)?)\s*\*\s*)?(.+)$/i.exec(part);
      return { name: name.trim(), weight: weight === undefined ? 1 : Number(weight.replace(/\s/g, "")) };
    });
}

const DIALOGS = {
  load: { title: "Load an adapter", path: "Directory, hub id or URL", send: "Load" },
  swap: { title: "Replace an adapter while it is used", path: "Directory, hub id or URL of the new version", send: "Replace" },
  compose: { title: "Name a weighted sum of adapters", path: "Parts, as 0.7*a + 0.3*b", send: "Compose" },
};

function openLoadDialog(kind, adapter) {
  const dialog = $("load-dialog"), words = DIALOGS[kind];
  dialog.dataset.kind = kind;
  $("load-dialog-title").textContent = words.title;
  $("load-path-label").textContent = words.path;
  dialog.querySelector(".primary").textContent = words.send;
  dialog.querySelector(".error").textContent = "";
  $("load-name").value = adapter?.name ?? "";
  $("load-name").readOnly = kind === "swap";
  $("load-path").value = adapter?.path ?? "";
  $("load-pinned").checked = adapter?.pinned ?? false;
  $("load-pinned-label").hidden = kind === "compose" || !state.caller.pins;
  dialog.showModal();
}

$("load-dialog").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const dialog = $("load-dialog"), kind = dialog.dataset.kind, send = dialog.querySelector(".primary");
  const body = { lora_name: $("load-name").value.trim(), lora_path: $("load-path").value.trim() };
  if (kind === "compose") body.lora_path = parseComposition(body.lora_path);
  else if (state.caller.pins) body.pinned = $("load-pinned").checked;
  if (kind === "swap") body.upsert = true;
  send.disabled = true;
  dialog.querySelector(".error").textContent = "";
  try {
    await call("/load_lora_adapter", body);
    dialog.close();
  } catch (error) {
    dialog.querySelector(".error").textContent = error.message;
  } finally { send.disabled = false; }
});
$("load-dialog").querySelector(".close").addEventListener("click", () => $("load-dialog").close());
$("load-button").addEventListener("click", () => openLoadDialog("load"));
$("compose-button").addEventListener("click", () => openLoadDialog("compose"));
for (const id of ["filter", "order"]) $(id).addEventListener("input", () => state && showAdapters());

// ---------------------------------------------------------------- playground

let targetsShown = "";

function showTargets() {
  const words = $("target-filter").value.toLowerCase();
  const names = state.adapters.map((a) => a.name);
  for (const name of chosen) if (name !== null && !names.includes(name)) chosen.delete(name);
  if (!before) for (const name of names.slice(0, 4)) chosen.add(name); // on the first look: base and the first few
  const kept = [null, ...names.filter((n) => chosen.has(n) || n.toLowerCase().includes(words)).slice(0, 100)];
  const now = JSON.stringify([kept, [...chosen]]);
  if (now === targetsShown) return;
  targetsShown = now;
  $("targets").replaceChildren(...kept.map((name) => {
    const box = element("input", { type: "checkbox", checked: chosen.has(name), value: name ?? "" });
    box.addEventListener("change", () => { box.checked ? chosen.add(name) : chosen.delete(name); countTargets(); });
    return element("label", {}, box, ` ${name ?? "base model"}`);
  }));
  countTargets();
}

function countTargets() {
  $("target-count").textContent = `(${chosen.size} chosen${chosen.size > COLUMNS ? `; at most ${COLUMNS}` : ""})`;
  $("run").disabled = running !== null || chosen.size === 0 || chosen.size > COLUMNS;
}

const selected = (name) => document.querySelector(`input[name=${name}]:checked`).value;

async function* events(response) {
  let rest = "";
  for await (const part of readable(response.body.pipeThrough(new TextDecoderStream()))) {
    rest += part;
    for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
      const data = rest.slice(0, end).replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function* readable(stream) { // not every browser iterates over streams itself
  const reader = stream.getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    yield value;
  }
}

async function prompts(names, signal) {
  const text = $("prompt").value;
  if (selected("form") === "text") return { text: names.map(() => text) };
  const ids = names.map(async (name) => {
    const body = { model: name ?? state.model.name, messages: [{ role: "user", content: text }], add_generation_prompt: true };
    return (await (await call("/tokenize", body, signal)).json()).tokens;
  });
  return { input_ids: await Promise.all(ids) };
}

async function run() {
  if (running || !state) return;
  const names = [...chosen].slice(0, COLUMNS);
  running = new AbortController();
  $("stop").disabled = false;
  countTargets();
  $("total").textContent = "";
  answers.length = 0;
  answers.push(...names.map((name) => ({ name, text: "", logprobs: [], note: "waiting", count: 0 })));
  $("answers").replaceChildren(...answers.map(column));
  const begin = performance.now();
  try {
    const body = {
      ...(await prompts(names, running.signal)), lora_path: names, stream: true, return_logprob: true, return_text_in_logprobs: true,
      sampling_params: { max_new_tokens: Number($("tokens").value), temperature: Number($("temperature").value) },
    };
    for await (const frame of events(await call("/generate", body, running.signal))) {
      if (frame.error) throw new Error(frame.error.message);
      take(answers[frame.index ?? 0], frame, performance.now() - begin);
    }
  } catch (error) {
    const why = error.name === "AbortError" ? "stopped" : error.message;
    for (const answer of answers.filter((a) => !a.reason)) { answer.note = why; draw(answer); }
  }
  const tokens = answers.reduce((sum, a) => sum + a.count, 0), seconds = (performance.now() - begin) / 1000;
  $("total").textContent = tokens ? `${tokens} tokens in ${seconds.toFixed(2)} s: ${(tokens / seconds).toFixed(0)} tokens/s` : "";
  running = null;
  $("stop").disabled = true;
  countTargets();
  if (selected("show") === "difference") answers.forEach(draw);
}

function take(answer, frame, passed) {
  const meta = frame.meta_info;
  answer.text = frame.text;
  answer.logprobs = meta.output_token_logprobs ?? [];
  answer.count = meta.completion_tokens;
  answer.first ??= passed;
  answer.reason = meta.finish_reason?.type;
  const speed = answer.count > 1 ? `${((1000 * (answer.count - 1)) / (passed - answer.first || 1)).toFixed(0)} tokens/s` : "";
  answer.note = [`${answer.count} tokens`, `first after ${answer.first.toFixed(0)} ms`, speed, answer.reason].filter(Boolean).join(" · ");
  draw(answer);
}

function column(answer) {
  answer.noteBox = element("p", {}, answer.note);
  answer.textBox = element("div", { className: "text" });
  const title = element("h3", {}, answer.name ?? "base model");
  const box = element("article", { className: "answer", tabIndex: 0, "aria-label": `Answer of ${answer.name ?? "the base model"}` }, title, answer.noteBox, answer.textBox);
  box.dataset.adapter = answer.name ?? "";
  return box;
}

function draw(answer) {
  answer.noteBox.textContent = answer.note;
  const how = selected("show");
  if (how === "probability") {
    answer.textBox.replaceChildren(...answer.logprobs.map(([logprob, , text]) => {
      const p = Math.exp(logprob), token = element("span", { className: "tok", title: `${(100 * p).toFixed(1)} %` }, text ?? "");
      token.style.background = `hsl(${Math.round(120 * p)} 70% 75%)`; // red: unlikely, green: certain
      return token;
    }));
  } else if (how === "difference" && answer !== answers[0]) answer.textBox.replaceChildren(...difference(answer.text, answers[0].text));
  else answer.textBox.textContent = answer.text;
}

$("ask").addEventListener("submit", (event) => { event.preventDefault(); run(); });
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) run(); });
$("stop").addEventListener("click", () => running?.abort());
$("target-filter").addEventListener("input", () => state && showTargets());
for (const box of document.querySelectorAll("input[name=show]")) box.addEventListener("change", () => answers.forEach(draw));

// ---------------------------------------------------------------- log, key, theme

async function showLog() {
  let lines;
  try { ({ lines } = await (await call(`/console/log?after=${lastLine}`)).json()); } catch { return; } // the state says why
  const box = $("log"), atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 8;
  for (const line of lines.filter((l) => l.number > lastLine)) {
    lastLine = line.number;
    const time = new Date(1000 * line.time).toLocaleTimeString();
    box.append(element("span", { className: line.level }, `${time} ${line.level.padEnd(7)} ${line.message}\n`));
  }
  while (box.childElementCount > 500) box.firstElementChild.remove();
  if (lines.length && atEnd) box.scrollTop = box.scrollHeight;
}

function openKeyDialog() {
  $("key").value = key();
  $("key-dialog").returnValue = "cancel";
  $("key-dialog").showModal();
}

$("key-button").addEventListener("click", openKeyDialog);
$("key-dialog").addEventListener("close", () => {
  const how = $("key-dialog").returnValue;
  if (how === "save") sessionStorage.setItem("key", $("key").value);
  if (how === "forget") sessionStorage.removeItem("key");
  if (how !== "cancel") [before, lastLine] = [null, 0];
});

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  $("theme-button").setAttribute("aria-pressed", dark);
}

theme((localStorage.getItem("theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark");
$("theme-button").addEventListener("click", () => {
  const dark = !document.documentElement.classList.contains("dark");
  localStorage.setItem("theme", dark ? "dark" : "light");
  theme(dark);
});

refresh();
