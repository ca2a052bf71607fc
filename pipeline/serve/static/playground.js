// The playground's page: playground/look says which tokens of a picture remain, and v1/chat/completions
// answers, as it does for everybody.

import { drawTile, makeTile } from "./partitions.js";
import { events, KeyRefusal, Refusal, request } from "./requests.js";

const $ = (id) => document.getElementById(id);
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

// What is told

function complain(message) {
  const text = Object.assign(document.createElement("p"), { textContent: message });
  const close = Object.assign(document.createElement("button"), { type: "button", className: "button", textContent: "Close" });
  close.addEventListener("click", calm);
  $("error").replaceChildren(text, close);
}

const calm = () => $("error").replaceChildren();
const say = (message) => { $("status").textContent = message; };
const key = () => $("key").value.trim();
const number = (value) => value.toLocaleString("en");

function failed(error) {
  if (error.name === "AbortError") return;
  if (error instanceof KeyRefusal) {
    $("key-field").hidden = false;
    $("key").focus();
  }
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
  const options = await (await request("playground/options", { key: key() })).json();
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
  state.looking = state.sight = null; // what it still brings is of another picture
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
  const isCurrent = () => state.looking === controller;
  state.stale = false;
  $("seen").setAttribute("aria-busy", "true");
  const layer = Number($("layer").value);
  const layers = showsAttention() && !state.attention.has(layer) ? [layer] : [];
  try {
    await ready();
    const body = { image_url: { url: state.picture.uri }, hired: hired(), layers, pictures: !state.sight };
    const response = await request("playground/look", { key: key(), body, signal: controller.signal });
    const sight = await response.json();
    const tiles = body.pictures ? await makeTiles(sight) : state.tiles;
    if (isCurrent()) take(sight, tiles);
  } catch (error) {
    if (isCurrent()) giveUp(error);
  } finally {
    if (isCurrent()) {
      state.looking = null;
      $("seen").setAttribute("aria-busy", "false");
      if (state.stale) look();
    }
  }
}

function take(sight, tiles) {
  if (!state.sight && state.options.most_tokens !== null) state.stale = true; // now its tokens are known
  if (tiles !== state.tiles) layOut(tiles, sight.grid);
  for (const { layer, maps } of sight.attention) state.attention.set(layer, maps);
  state.sight = sight;
  showSettings();
  showTotals();
  draw();
  calm();
}

function giveUp(error) {
  if (!state.sight) forgetTiles();
  state.stale = false; // the same would fail the same way
  if (error.waitS) timer = setTimeout(look, 1000 * error.waitS);
  failed(error.param === "image_url" ? new Refusal(`${state.picture.name}: ${error.message}`) : error);
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

const makeTiles = ({ partitions, side }) => Promise.all(partitions.map(({ picture }, index) => makeTile(picture, index, side)));

/** The tiles where the partitions lie on the canvas. */
function layOut(tiles, { rows, cols }) {
  state.tiles = tiles;
  $("stage").style.setProperty("--cols", cols);
  $("stage").dataset.rows = rows;
  const [fullImage, ...subImages] = tiles.map(({ figure }) => figure);
  $("full-image").replaceChildren(fullImage);
  $("sub-images").replaceChildren(...subImages);
}

function draw() {
  const layer = Number($("layer").value);
  const maps = showsAttention() ? state.attention.get(layer) : null;
  $("layer-field").hidden = !showsAttention();
  $("legend-kept").hidden = showsAttention();
  $("legend-attention").hidden = !showsAttention();
  if (!state.sight || (showsAttention() && !maps)) return;
  state.tiles.forEach((tile, index) => drawTile(tile, index, state.sight, maps?.[index]));
  $("seen").dataset.shows = maps ? `attention ${layer}` : "kept";
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
  // What changes while the first run is answered is for the next question.
  const content = [{ type: "image_url", image_url: { url: state.picture.uri } }, { type: "text", text: $("prompt").value }];
  const question = { messages: [{ role: "user", content }], max_tokens: Number($("max-tokens").value) };
  for (const run of runs) run.card = card(run.title);
  $("answers").replaceChildren(...runs.map(({ card }) => card));
  $("answers").scrollIntoView({ block: "nearest" });
  $("ask").disabled = true;
  $("stop").hidden = false;
  say("Answering");
  try {
    // One after the other, so that neither takes the other's time.
    for (const run of runs) await answer(run, question, controller.signal);
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

async function answer({ card, hired }, question, signal) {
  const body = { hired, model: state.options.model, ...question, temperature: 0, stream: true, stream_options: { include_usage: true } };
  const times = { sent: performance.now() };
  let usage = null, finish = null;
  try {
    for await (const event of events(await request("v1/chat/completions", { key: key(), body, signal }))) {
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
  sessionStorage.setItem("hired-key", key());
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
