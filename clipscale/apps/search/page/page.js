"use strict";

// What is searched for: a text, a file, or the number of an image of the index. One of them, or none.
let query = null;
let results = [];
let opened = -1;
let running = null;
let about = { images: 0, folders: [], upload_bytes: 0 };

const by = (id) => document.getElementById(id);
const BROWSED = 12;

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const answer = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(sentence(answer.error || `The server says ${response.status}.`));
  return answer;
}

function sentence(text) {
  const whole = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function filters() {
  const score = Number(by("score").value);
  const found = { k: Number(by("count").value) };
  if (score > 0) found.min_score = score / 100;
  if (by("words").value.trim()) found.words = by("words").value.trim();
  if (by("folder").value) found.folder = by("folder").value;
  return found;
}

async function search() {
  if (running) running.abort();
  if (!query) return browse();
  const own = (running = new AbortController());
  const began = performance.now();
  wait(true);
  try {
    const answer = await ask(...request(query, filters()));
    if (own !== running) return;
    results = answer.results;
    show(results);
    by("status").textContent = results.length ? `${count(results.length)} for ${named(query)} · ${Math.round(performance.now() - began)} ms` : "";
    by("nothing").hidden = results.length > 0;
    by("nothing-text").textContent = `No image meets the filters for ${named(query)}.`;
  } catch (error) {
    if (own === running && error.name !== "AbortError") fail(error.message);
  } finally {
    if (own === running) wait(false);
  }
}

function request(what, options) {
  if (what.file) {
    return [`search?${new URLSearchParams(options)}`,
      { method: "POST", body: what.file, headers: { "Content-Type": "application/octet-stream" }, signal: running.signal }];
  }
  const asked = what.text !== undefined ? { text: what.text } : { like: what.like };
  return ["search", { method: "POST", body: JSON.stringify({ ...asked, ...options }),
    headers: { "Content-Type": "application/json" }, signal: running.signal }];
}

const count = (n) => (n === 1 ? "1 image" : `${n} images`);
const named = (what) => (what.text !== undefined ? `“${what.text}”` : what.file ? "your image" : "images like this one");

function wait(on) {
  by("results").classList.toggle("waiting", on);
  by("results").setAttribute("aria-busy", String(on));
  if (!on) return;
  by("nothing").hidden = by("problem").hidden = true;
  by("status").textContent = "Searching …";
  if (!by("results").children.length) {
    by("results").replaceChildren(...Array.from({ length: 12 }, () => make("li", { className: "ghost" })));
  }
}

function fail(message) {
  results = [];
  show(results);
  by("status").textContent = "";
  by("nothing").hidden = true;
  by("problem-text").textContent = message;
  by("problem").hidden = false;
}

// Before a search: some of the images, evenly spread.
function browse() {
  by("nothing").hidden = by("problem").hidden = true;
  const step = Math.max(1, Math.floor(about.images / BROWSED));
  const some = Array.from({ length: Math.min(BROWSED, about.images) }, (_, i) => ({ number: i * step }));
  by("status").textContent = about.images ? "Type what you look for, or drop an image here. Some of the images:" : "";
  results = some;
  show(some);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function show(found) {
  const top = Math.max(0.01, ...found.map((one) => one.score || 0));
  by("results").replaceChildren(...found.map((one, place) => make("li", {}, card(one, place, top))));
}

function card(one, place, top) {
  const image = make("img", { src: `images/${one.number}`, alt: one.caption || one.key || `image ${one.number}`, loading: "lazy", decoding: "async" });
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 120 && image.naturalHeight < 120));
  image.addEventListener("error", () => image.replaceWith(make("span", { className: "lost", textContent: "cannot be shown: its file changed or is gone" })));
  const told = make("span", { className: "text" });
  if (one.score !== undefined) {
    const bar = make("b");
    bar.style.width = `${Math.max(0, (100 * one.score) / top)}%`;
    told.append(make("span", { className: "caption", textContent: one.caption || one.key }),
      make("span", { className: "score" }, make("i", {}, bar), one.score.toFixed(3)));
  }
  const button = make("button", { type: "button", className: "card" }, make("span", { className: "picture" }, image));
  if (one.score !== undefined) button.append(told);
  button.addEventListener("click", () => (one.score === undefined ? similar(one.number) : open(place)));
  return button;
}

function open(place) {
  const one = results[place];
  if (!one || one.score === undefined) return;
  opened = place;
  by("detail-image").src = `images/${one.number}?size=large`;
  by("detail-image").alt = by("detail-caption").textContent = one.caption || one.key;
  by("detail-score").textContent = one.score.toFixed(4);
  by("detail-key").textContent = one.key;
  by("previous").disabled = place === 0;
  by("next").disabled = place === results.length - 1;
  if (!by("detail").open) by("detail").showModal();
}

function similar(number) {
  by("detail").close();
  by("text").value = "";
  start({ like: number }, `images/${number}`, "similar images");
}

function searchFile(file) {
  if (!file) return;
  if (!file.type.startsWith("image/")) return refuse(`“${file.name}” is no image: choose a JPEG, PNG, WebP or GIF.`);
  if (file.size > about.upload_bytes) return refuse(`“${file.name}” is larger than ${about.upload_bytes >> 20} MB.`);
  by("text").value = "";
  start({ file }, URL.createObjectURL(file), file.name);
}

function refuse(message) {
  if (running) running.abort();
  running = null;
  wait(false);
  fail(message);
}

function start(what, image = "", label = "") {
  query = what;
  if (by("chip-image").src.startsWith("blob:")) URL.revokeObjectURL(by("chip-image").src);
  by("chip").hidden = !image;
  by("chip-image").hidden = false;
  by("chip-text").textContent = label;
  if (image) by("chip-image").src = image;
  else by("chip-image").removeAttribute("src");
  const kept = what && what.text !== undefined ? `?q=${encodeURIComponent(what.text)}` : what && what.like !== undefined ? `?like=${what.like}` : location.pathname;
  history.replaceState(null, "", kept);
  search();
}

function searchText() {
  const text = by("text").value.trim();
  if (text) start({ text });
  else if (query && query.text !== undefined) start(null);
}

function changed() {
  by("score-told").textContent = Number(by("score").value) ? (by("score").value / 100).toFixed(2) : "any";
  const set = Object.keys(filters()).length - 1;
  by("active").hidden = !set;
  by("active").textContent = set;
  clearTimeout(changed.timer);
  changed.timer = setTimeout(() => query && search(), 250);
}

function reset() {
  by("score").value = 0;
  by("words").value = by("folder").value = "";
  by("count").value = "24";
  changed();
}

// The arrows move between cards as they lie on the page.
function move(key) {
  const cards = [...document.querySelectorAll(".card")];
  const at = cards.indexOf(document.activeElement);
  if (!cards.length) return false;
  if (at < 0) {
    if (key !== "ArrowDown") return false;
    cards[0].focus();
    return true;
  }
  const columns = cards.filter((one) => one.offsetTop === cards[0].offsetTop).length;
  const to = at + { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[key];
  if (to < 0 && key === "ArrowUp") by("text").focus();
  else if (cards[to]) cards[to].focus();
  return true;
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (by("detail").open) {
    if (event.key === "ArrowLeft") open(opened - 1);
    if (event.key === "ArrowRight") open(opened + 1);
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    by("text").focus();
    by("text").select();
  } else if (event.key === "Escape" && event.target === by("text")) {
    by("text").value = "";
    if (query) start(null);
  } else if (event.key.startsWith("Arrow") && (!typing || (event.target === by("text") && event.key === "ArrowDown"))) {
    if (move(event.key)) event.preventDefault();
  }
});

by("form").addEventListener("submit", (event) => { event.preventDefault(); searchText(); });
by("pick").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", () => { searchFile(by("file").files[0]); by("file").value = ""; });
by("chip-image").addEventListener("error", () => { by("chip-image").hidden = true; });
by("chip-clear").addEventListener("click", () => { start(null); by("text").focus(); });
by("again").addEventListener("click", () => (query ? search() : browse()));
by("similar").addEventListener("click", () => similar(results[opened].number));
by("previous").addEventListener("click", () => open(opened - 1));
by("next").addEventListener("click", () => open(opened + 1));
by("close").addEventListener("click", () => by("detail").close());
by("detail").addEventListener("click", (event) => event.target === by("detail") && by("detail").close());
by("detail").addEventListener("close", () => document.querySelectorAll(".card")[opened]?.focus());
for (const id of ["score", "words", "folder", "count"]) by(id).addEventListener("input", changed);
for (const id of ["reset", "nothing-reset"]) by(id).addEventListener("click", reset);

let inside = 0;
document.addEventListener("dragenter", (event) => { if (event.dataTransfer.types.includes("Files")) { inside++; by("drop").hidden = false; } });
document.addEventListener("dragleave", () => { inside = Math.max(0, inside - 1); by("drop").hidden = inside === 0; });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => { event.preventDefault(); inside = 0; by("drop").hidden = true; searchFile(event.dataTransfer.files[0]); });
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) searchFile(event.clipboardData.files[0]); });

ask("about").then((told) => {
  about = told;
  const way = told.exact ? "every one is compared" : "approximate neighbours";
  by("about").textContent = `${told.images.toLocaleString("en")} images of ${told.source} · model ${told.model} · ${told.dim} dimensions, ${way}`;
  by("folder").append(...told.folders.map((folder) => make("option", { value: `${folder}/`, textContent: folder })));
  by("folder-field").hidden = told.folders.length < 2;
  const asked = new URLSearchParams(location.search);
  if (asked.get("q")) { by("text").value = asked.get("q"); searchText(); }
  else if (/^\d+$/.test(asked.get("like") || "")) similar(Number(asked.get("like")));
  else browse();
}, (error) => fail(error.message));
