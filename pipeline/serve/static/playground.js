// The playground's page. It knows two routes: playground/look says which tokens of a picture remain, and
// v1/chat/completions answers, as it does for everybody. Addresses are relative, so a proxy may add a path.

const $ = (id) => document.getElementById(id);
const STOPS = [[22, 11, 57], [106, 23, 110], [188, 55, 84], [243, 120, 25], [252, 255, 164]];
const HEAT = Array.from({ length: 256 }, (_, value) => heat(value / 255));
const DIMMED = 0.36, TINT = [40, 44, 58]; // dropped patches: little light, no colour
const DRAWN_SIDE = 576; // pixels of a partition's canvas at least, so that edges of patches stay sharp
const DEBOUNCE_MS = 60;
const EXAMPLE_PROMPT = "What does the purple sign say?";

const state = {
  options: null, // what the server offers
  picture: null, // {uri, name}: the chosen file as a data URI
  tiles: [], // the partitions as they are drawn: {figure, canvas, lit, dim}
  sight: null, // the last answer of playground/look
  attention: new Map(), // layer -> maps of the picture
  looking: null, // AbortController of the request in flight
  stale: false, // whether settings changed since it was sent
  answering: null, // AbortController of the answer in flight
};

/** What the server or this page has to say against a request; the server may ask to wait. */
class Refusal extends Error {
  constructor(message, waitS = 0) {
    super(waitS ? `${message.replace(/[^.]$/, "$&.")} Try again in ${waitS} s.` : message);
    this.waitS = waitS;
  }
}

// Requests

/** JSON as the server reads it: JavaScript writes 1.0 as 1, which would be one token and not all. */
const wire = (body) => JSON.stringify(body).replace('"token_budget":1,', '"token_budget":1.0,');

async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = $("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && wire(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The server cannot be reached. Check that it runs, then try again.");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    askForKey();
    throw new Refusal(key ? "This server does not know that API key." : "This server asks for an API key: write it into the field.");
  }
  const { error } = await response.json().catch(() => ({})); // its own words name what is wrong and the mend
  const message = error?.message ?? `The server answered with status ${response.status}.`;
  throw new Refusal(message, Number(response.headers.get("Retry-After") ?? 0));
}

/** The JSON of each event of a stream, until it ends as it should. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "", ended = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done && ended) return;
    if (done) throw new Refusal("The connection broke off before the answer ended. Try again.");
    const lines = (text + value).split(/\r?\n/);
    text = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") ended = true;
      else if (data) yield JSON.parse(data);
    }
  }
}

function askForKey() {
  $("key-field").hidden = false;
  $("key").focus();
}

// What is told

function complain(message) {
  const text = Object.assign(document.createElement("p"), { textContent: message });
  const close = Object.assign(document.createElement("button"), { type: "button", className: "button", textContent: "Close" });
  close.addEventListener("click", calm);
  $("error").replaceChildren(text, close);
}

const calm = () => $("error").replaceChildren();
const say = (message) => { $("status").textContent = message; };
const number = (value) => value.toLocaleString("en");

function failed(error) {
  if (error.name === "AbortError") return;
  complain(error instanceof Refusal ? error.message : `This page failed: ${error.message}. Reload it.`);
  if (!(error instanceof Refusal)) throw error;
}

// The settings

const rate = () => Number($("budget").value) / 100;
const hired = () => ({ token_budget: budget(), policy: $("policy").value, alpha: Number($("alpha").value) });

/** The rate, or where the server bounds the number of tokens, theirs; of a picture not seen yet the most. */
function budget() {
  const most = state.options.most_tokens;
  if (most === null) return rate();
  return state.sight ? Math.max(2, tokens()) : most;
}

/** How many patches of the picture may remain. */
function tokens() {
  const { full } = state.sight.patches;
  return Math.max(1, Math.min(state.options.most_tokens ?? full, Math.floor(rate() * full + 1e-9)));
}

function showSettings() {
  const percent = `${$("budget").value} %`;
  const text = state.sight ? `${percent}, ${number(tokens())} tokens` : percent;
  $("budget-value").textContent = text;
  $("budget").setAttribute("aria-valuetext", text);
  $("alpha-value").textContent = Number($("alpha").value).toFixed(2);
  const policy = state.options?.policies.find(({ name }) => name === $("policy").value);
  $("policy-hint").textContent = policy?.description ?? "";
}

async function readOptions() {
  const options = await (await request("playground/options")).json();
  state.options = options;
  $("model").textContent = `Model: ${options.model}`;
  $("model-hint").textContent = options.note;
  $("policy").replaceChildren(...options.policies.map(({ name }) => new Option(name, name)));
  $("policy").value = options.policy;
  $("budget").max = Math.floor(options.highest_rate * 100);
  $("budget").value = Math.round(options.rate * 100);
  $("alpha").value = options.alpha;
  $("max-tokens").max = options.max_tokens;
  $("max-tokens").value = Math.min($("max-tokens").value, options.max_tokens);
  const keepsAll = options.most_tokens === null && options.highest_rate === 1;
  $("compare-field").hidden = !(keepsAll && options.policies.some(({ name }) => name === "keep-all"));
  const roles = { [options.feature_layer]: "hired selects by it", 0: "hired shares the budget by it" };
  $("layer").replaceChildren(
    ...Array.from({ length: options.num_layers }, (_, layer) => new Option(roles[layer] ? `${layer} (${roles[layer]})` : `${layer}`, layer)),
  );
  $("layer").value = options.feature_layer;
  showSettings();
}

/** Reads the server's options if that has not succeeded yet, for want of a key or of a server. */
async function ready() {
  if (!state.options) await readOptions();
}

// The picture

const asDataUri = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  // A type that the browser does not know says nothing about the file: the server looks into it.
  reader.onload = () => resolve(file.type.startsWith("image/") ? reader.result : reader.result.replace(/^data:[^,]*/, "data:;base64"));
  reader.onerror = () => reject(new Refusal(`${file.name} cannot be read. Choose it again.`));
  reader.readAsDataURL(file);
});

async function choose(file) {
  calm();
  try {
    await ready();
    if (file.size > state.options.max_image_bytes) {
      throw new Refusal(`${file.name} has ${megabytes(file.size)}; this server takes pictures of up to ${megabytes(state.options.max_image_bytes)}.`);
    }
    state.picture = { uri: await asDataUri(file), name: file.name || "the pasted picture" };
  } catch (error) {
    failed(error);
    return;
  }
  state.looking?.abort();
  state.looking = state.sight = null;
  state.attention.clear();
  showSettings();
  $("picture-name").textContent = state.picture.name;
  $("thumbnail").hidden = false;
  $("thumbnail").alt = `The chosen picture, ${state.picture.name}`;
  $("thumbnail").src = state.picture.uri;
  look();
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

// Looking: one request at a time; what changes meanwhile is asked for when it is back.

let timer = 0;
function lookSoon() {
  showSettings();
  clearTimeout(timer);
  timer = setTimeout(look, DEBOUNCE_MS);
}

async function look() {
  if (!state.picture) return;
  if (state.looking) {
    state.stale = true;
    return;
  }
  const controller = (state.looking = new AbortController());
  state.stale = false;
  $("seen").setAttribute("aria-busy", "true");
  const layer = Number($("layer").value);
  const layers = showsAttention() && !state.attention.has(layer) ? [layer] : [];
  try {
    await ready();
    const body = { image_url: { url: state.picture.uri }, hired: hired(), layers, pictures: !state.sight };
    const response = await request("playground/look", { body, signal: controller.signal });
    const sight = await response.json();
    for (const { layer, maps } of sight.attention) state.attention.set(layer, maps);
    if (!state.sight) await layOut(sight);
    if (state.looking !== controller) return;
    if (!state.sight && state.options.most_tokens !== null) state.stale = true; // now its tokens are known
    state.sight = sight;
    showSettings();
    showTotals();
    draw();
    calm();
  } catch (error) {
    if (state.looking === controller && !state.sight) forgetTiles();
    failed(error);
    state.stale = false; // the same would fail the same way
    if (error.waitS) timer = setTimeout(look, 1000 * error.waitS);
  } finally {
    if (state.looking === controller) {
      state.looking = null;
      $("seen").setAttribute("aria-busy", "false");
      if (state.stale) look();
    }
  }
}

const showsAttention = () => document.querySelector('input[name="view"]:checked').value === "attention";

function showTotals() {
  const { tokens, patches } = state.sight;
  const kept = Object.assign(document.createElement("strong"), { textContent: number(tokens.kept) });
  $("total").replaceChildren(kept, ` of ${number(tokens.full)} visual tokens reach the language model`);
  $("kept-meter").style.width = `${(100 * tokens.kept) / tokens.full}%`;
  const newlines = tokens.kept - patches.kept;
  $("kept-detail").textContent = `${number(patches.kept)} patches of ${number(patches.full)}` +
    (newlines ? `, and ${number(newlines)} newlines that end the canvas's rows` : "");
  say(`${number(tokens.kept)} of ${number(tokens.full)} visual tokens remain.`);
}

// Drawing

/** A tile for each partition, its pixels in colour and dimmed. */
async function layOut(sight) {
  const tiles = await Promise.all(sight.partitions.map(({ picture }, index) => tile(picture, index, sight)));
  state.tiles = tiles;
  $("stage").style.setProperty("--cols", sight.grid.cols);
  $("stage").dataset.rows = sight.grid.rows;
  const [fullImage, ...subImages] = tiles.map(({ figure }) => figure);
  $("full-image").replaceChildren(fullImage);
  $("sub-images").replaceChildren(...subImages);
}

async function tile(picture, index, { side }) {
  const image = new Image();
  image.src = picture;
  await image.decode();
  const scale = Math.ceil(DRAWN_SIDE / side);
  const lit = sheet(side * scale);
  const pen = lit.getContext("2d", { willReadFrequently: true });
  pen.drawImage(image, 0, 0, lit.width, lit.height);
  const dim = sheet(lit.width);
  dim.getContext("2d").putImageData(dimmed(pen.getImageData(0, 0, lit.width, lit.height)), 0, 0);
  const figure = $("tile").content.firstElementChild.cloneNode(true);
  const canvas = figure.querySelector("canvas");
  canvas.width = canvas.height = lit.width;
  figure.querySelector(".name").append(...(index ? [prefix(), `${index}`] : ["Full-image"]));
  return { figure, canvas, lit, dim };
}

/** What a narrow tile leaves out. */
const prefix = () => Object.assign(document.createElement("span"), { textContent: "Sub-image " });
const nameOf = (index) => (index ? `Sub-image ${index}` : "Full-image");
const sheet = (side) => Object.assign(document.createElement("canvas"), { width: side, height: side });

function dimmed(pixels) {
  const { data } = pixels;
  for (let at = 0; at < data.length; at += 4) {
    const light = (0.3 * data[at] + 0.59 * data[at + 1] + 0.11 * data[at + 2]) * DIMMED;
    for (let channel = 0; channel < 3; channel++) data[at + channel] = light + (1 - DIMMED) * TINT[channel] * 0.6;
  }
  return pixels;
}

function heat(share) {
  const place = share * (STOPS.length - 1);
  const first = Math.min(Math.floor(place), STOPS.length - 2);
  return `rgb(${STOPS[first].map((from, channel) => Math.round(from + (place - first) * (STOPS[first + 1][channel] - from))).join(" ")})`;
}

function draw() {
  const layer = Number($("layer").value);
  const maps = showsAttention() ? state.attention.get(layer) : null;
  $("layer-field").hidden = !showsAttention();
  $("legend-kept").hidden = showsAttention();
  $("legend-attention").hidden = !showsAttention();
  if (!state.sight || (showsAttention() && !maps)) return;
  state.tiles.forEach((tile, index) => drawTile(tile, index, maps?.[index]));
  $("seen").dataset.shows = maps ? `attention ${layer}` : "kept";
}

function drawTile({ figure, canvas, lit, dim }, index, attention) {
  const { patches_per_side: patches, side, patch_size: patchSize } = state.sight;
  const { kept, padding, num_real: real } = state.sight.partitions[index];
  const size = (canvas.width / side) * patchSize;
  const place = (patch) => [(patch % patches) * size, Math.floor(patch / patches) * size];
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(dim, 0, 0);
  if (attention) {
    pen.globalAlpha = 0.66;
    attention.forEach((value, patch) => {
      pen.fillStyle = HEAT[value];
      pen.fillRect(...place(patch), size, size);
    });
    pen.globalAlpha = 1;
    outline(pen, new Set(kept), patches, size);
  } else {
    for (const patch of kept) pen.drawImage(lit, ...place(patch), size, size, ...place(patch), size, size);
  }
  hatch(pen, padding.map(place), size);
  figure.dataset.kept = kept.length;
  figure.querySelector(".count b").textContent = number(kept.length);
  figure.querySelector(".count span").textContent = ` / ${number(real)}`;
  figure.querySelector(".meter i").style.width = `${real ? (100 * kept.length) / real : 0}%`;
  canvas.setAttribute("aria-label", `${nameOf(index)}: ${kept.length} of ${real} tokens kept`);
}

/** Lines around kept patches, where their neighbour is none. */
function outline(pen, kept, patches, size) {
  const lines = new Path2D();
  for (const patch of kept) {
    const col = patch % patches, row = Math.floor(patch / patches), x = col * size, y = row * size;
    const edges = [
      [row > 0 && kept.has(patch - patches), x, y, x + size, y],
      [row < patches - 1 && kept.has(patch + patches), x, y + size, x + size, y + size],
      [col > 0 && kept.has(patch - 1), x, y, x, y + size],
      [col < patches - 1 && kept.has(patch + 1), x + size, y, x + size, y + size],
    ];
    for (const [joined, ...line] of edges) {
      if (joined) continue;
      lines.moveTo(line[0], line[1]);
      lines.lineTo(line[2], line[3]);
    }
  }
  pen.lineCap = "square";
  for (const [width, colour] of [[6, "rgb(0 0 0 / .6)"], [3, "#fff"]]) {
    pen.lineWidth = width;
    pen.strokeStyle = colour;
    pen.stroke(lines);
  }
}

function hatch(pen, places, size) {
  if (!places.length) return;
  const colours = getComputedStyle(document.documentElement);
  pen.save();
  const area = new Path2D();
  for (const [x, y] of places) area.rect(x, y, size, size);
  pen.clip(area);
  pen.fillStyle = colours.getPropertyValue("--sunken");
  pen.fillRect(0, 0, pen.canvas.width, pen.canvas.height);
  pen.strokeStyle = colours.getPropertyValue("--hatch");
  pen.lineWidth = 3;
  pen.beginPath();
  for (let x = -pen.canvas.height; x < pen.canvas.width; x += 18) {
    pen.moveTo(x, pen.canvas.height);
    pen.lineTo(x + pen.canvas.height, 0);
  }
  pen.stroke();
  pen.restore();
}

function forgetTiles() {
  state.tiles = [];
  const ghost = () => Object.assign(document.createElement("div"), { className: "ghost" });
  $("stage").style.setProperty("--cols", 2);
  $("full-image").replaceChildren(ghost());
  $("sub-images").replaceChildren(ghost(), ghost(), ghost(), ghost());
  $("total").textContent = "Choose a picture to see which of its visual tokens remain.";
  $("kept-detail").textContent = "";
  $("kept-meter").style.width = "0";
  $("thumbnail").hidden = true;
}

// Answering

async function ask(event) {
  event?.preventDefault();
  if (state.answering) return;
  calm();
  if (!state.picture) {
    complain("Choose a picture first, drop one on the page, or use the example.");
    return;
  }
  if (!$("prompt").value.trim()) {
    complain("Write a prompt first.");
    $("prompt").focus();
    return;
  }
  const controller = (state.answering = new AbortController());
  const runs = [{ title: `${$("budget").value} % of the tokens, ${$("policy").value}`, hired: hired() }];
  if ($("compare").checked) {
    runs.push({ title: "All tokens", hired: { token_budget: 1, policy: "keep-all", alpha: hired().alpha } });
  }
  for (const run of runs) run.card = card(run.title);
  $("answers").replaceChildren(...runs.map(({ card }) => card));
  $("answers").scrollIntoView({ block: "nearest" });
  $("ask").disabled = true;
  $("stop").hidden = false;
  say("Answering");
  try {
    // One after the other, so that neither takes the other's time.
    for (const run of runs) await answer(run, controller.signal);
    say(runs.map(({ title, card }) => `${title}: ${said(card)}`).join(". "));
  } catch (error) {
    failed(error);
  } finally {
    state.answering = null;
    $("ask").disabled = false;
    if ($("stop") === document.activeElement) $("ask").focus();
    $("stop").hidden = true;
    for (const { card } of runs) settle(card);
  }
}

function card(title) {
  const element = $("answer").content.firstElementChild.cloneNode(true);
  element.querySelector("h3").textContent = title;
  element.setAttribute("aria-busy", "true");
  return element;
}

const said = (card) => card.querySelector(".said").textContent;
const show = (card, name, text) => { card.querySelector(`.${name}`).textContent = text; };

async function answer({ card, hired }, signal) {
  const content = [{ type: "image_url", image_url: { url: state.picture.uri } }, { type: "text", text: $("prompt").value }];
  const body = {
    hired,
    model: state.options.model,
    messages: [{ role: "user", content }],
    max_tokens: Number($("max-tokens").value),
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  };
  const times = { sent: performance.now() };
  let usage = null, finish = null;
  try {
    for await (const event of events(await request("v1/chat/completions", { body, signal }))) {
      if (event.error) throw new Refusal(event.error.message);
      usage = event.usage ?? usage;
      finish = event.choices?.[0]?.finish_reason ?? finish;
      const delta = event.choices?.[0]?.delta?.content;
      if (!delta) continue;
      times.last = performance.now();
      times.first ??= times.last;
      card.querySelector(".said").append(delta);
      show(card, "first", duration(times.first - times.sent));
    }
    showUsage(card, usage, times);
    if (!said(card)) show(card, "note", "The model ended its answer without a word.");
    if (finish === "length") show(card, "note", "Cut off at the longest answer allowed, see More settings.");
  } catch (error) {
    if (error.name === "AbortError") show(card, "note", "Stopped.");
    else if (said(card)) show(card, "note", `Broken off: ${error.message}`);
    else fail(card, error.message);
    throw error;
  } finally {
    settle(card);
  }
}

function showUsage(card, usage, { first, last }) {
  if (!usage) return;
  show(card, "visual", `${number(usage.visual_tokens_kept)} of ${number(usage.visual_tokens_full)}`);
  show(card, "prompt", number(usage.prompt_tokens));
  const seconds = (last - first) / 1000;
  if (usage.completion_tokens > 1 && seconds > 0) show(card, "speed", number(Math.round((usage.completion_tokens - 1) / seconds)));
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`);

function fail(card, message) {
  card.classList.add("failed");
  card.querySelector(".said").textContent = `No answer. ${message}`;
}

/** A card that was never begun says so. */
function settle(card) {
  if (card.getAttribute("aria-busy") === "false") return;
  card.setAttribute("aria-busy", "false");
  if (!said(card) && !card.querySelector(".note").textContent) show(card, "note", "Not asked.");
}

// What the visitor does

for (const id of ["budget", "alpha"]) $(id).addEventListener("input", lookSoon);
$("policy").addEventListener("change", lookSoon);
$("layer").addEventListener("change", () => { draw(); look(); });
$("view").addEventListener("change", () => { draw(); look(); });
$("form").addEventListener("submit", ask);
$("stop").addEventListener("click", () => state.answering?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) ask(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (state.answering) state.answering.abort();
  else calm();
});
$("key").addEventListener("change", () => {
  sessionStorage.setItem("hired-key", $("key").value.trim());
  calm();
  ready().then(look).catch(failed);
});
$("file").addEventListener("change", () => {
  const [file] = $("file").files;
  if (file) choose(file);
  $("file").value = ""; // choosing the same file again is a choice too
});
$("example").addEventListener("click", async () => {
  try {
    const bytes = await (await request("playground/example.webp")).blob();
    if ($("prompt").value === $("prompt").defaultValue) $("prompt").value = EXAMPLE_PROMPT;
    choose(new File([bytes], "example.webp", { type: "image/webp" }));
  } catch (error) {
    failed(error);
  }
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) choose(file);
});
// A picture may be dropped anywhere: beside the field, the browser would leave the page for it.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) choose(file);
  else complain("That was no file. Drop a picture from a folder, or save it first.");
});
$("thumbnail").addEventListener("error", () => { $("thumbnail").hidden = true; });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

const remembered = sessionStorage.getItem("hired-key");
if (remembered) {
  $("key").value = remembered;
  $("key-field").hidden = false;
}
showSettings();
readOptions().catch(failed);
