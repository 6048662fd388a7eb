"use strict";
// The page: takes pictures, shows their captions, and hands them on. What captions them is captioner.js, in a worker.

const find = selector => document.querySelector(selector);
const [grid, template, status, bar, folder, dialog] = ["main", "template", "output", "progress", "#folder", "dialog"].map(find);
const CONTROL = /[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]/g;
const SHADE = [38, 44, 56, 0.75];  // red, green, blue and opacity over regions without attention, as in the gallery
const PATIENCE = 10_000;  // milliseconds for the service worker to start
const HOVERS = matchMedia("(hover: hover)").matches;
const pictures = [];  // {id, file, name, card, captions, error}, in the order in which they are shown
const taken = new Set();
let config, worker, ready = false, current = null, lastId = 0, usual, options, count = 3;

// ---- from the start to a model that is ready

async function start() {
  if (location.protocol === "file:") {
    say("Opened from a disk, a page may not read its own files by itself: choose its folder here, or serve it (python -m http.server -d FOLDER).");
    folder.hidden = false;
    return;
  }
  if (await serviceWorkerReloads()) return;
  load(null);
}

// Whether the page reloads once, controlled by its service worker, to be allowed several threads.
async function serviceWorkerReloads() {
  if (!navigator.serviceWorker) return false;  // as in some private windows, and without https
  try {
    const registration = await navigator.serviceWorker.register("service-worker.js");
    const waiting = registration.waiting;  // that of a new export
    const taken = new Promise(resolve => navigator.serviceWorker.addEventListener("controllerchange", resolve, {once: true}));
    waiting?.postMessage("take over");
    if (waiting || !registration.active) await Promise.race([taken, new Promise(resolve => setTimeout(resolve, PATIENCE))]);
    if (!waiting && (crossOriginIsolated || sessionStorage.reloaded)) return false;
    sessionStorage.reloaded = "yes";
    location.reload();
    return true;
  } catch {
    return false;  // it then works as long as there is a network, on one thread
  }
}

async function load(files) {
  folder.hidden = true;
  say("Loading the model …");
  try {
    const answer = files ? files.get("captioner.json") : await fetch("captioner.json");
    if (!answer || answer.ok === false) throw new Error("there is no captioner.json");
    config = JSON.parse(await answer.text());
    worker = new Worker(files ? URL.createObjectURL(files.get("captioner.js")) : "captioner.js");
  } catch (error) {
    folder.hidden = location.protocol !== "file:";
    alarm(`The model cannot be loaded (${error.message}); reload the page, or export it again and upload the whole folder.`);
    return;
  }
  worker.onmessage = ({data}) => hear[data.kind](data);
  worker.onerror = event => alarm(`The captioner stopped (${event.message ?? "unknown"}); reload the page.`);
  worker.postMessage({kind: "load", files});
  usual = config.search;
  find("#settings").disabled = false;
  grid.lang = {e: "en", z: "zh"}[config.language[0]] ?? "";  // by which browsers choose fonts
  find("#about").textContent = shownText(config.about);
  showExamples(files);
  forget();
}

const hear = {
  progress({loaded, total}) {
    bar.hidden = false;
    Object.assign(bar, {max: total, value: loaded});
    say(loaded < total ? `Loading the model: ${megabytes(loaded)} of ${megabytes(total)} MB` : "Starting the model …");
  },
  ready({device}) {
    ready = true;
    bar.hidden = true;
    document.body.dataset.device = device;
    next();
  },
  shown({id, blob, width, height}) {
    const picture = pictures.find(each => each.id === id);
    if (!picture) return;
    picture.card.style.setProperty("--ratio", Math.min(3, Math.max(0.5, width / height)).toFixed(4));
    Object.assign(picture, {width, height});
    const image = picture.card.querySelector("img");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(blob);
  },
  captions({id, captions}) {
    finish(id, {captions, error: null});
  },
  error({id, message}) {
    if (id === undefined) alarm(`The model cannot be loaded: ${message}.`);
    else finish(id, {captions: null, error: message});
  },
};

const megabytes = bytes => Math.round(bytes / 1e6);

function say(text) {
  find("#status").className = "";
  status.textContent = text;
}

function alarm(text) {
  say(text);
  bar.hidden = true;
  find("#status").className = "alarm";
}

// ---- pictures

const shownText = text => text.replace(CONTROL, " ");

// A name that no other picture has; file systems may not tell cases apart.
function uniqueName(whole) {
  const [, stem, ending] = /^(.*?)(\.[^.]*)?$/s.exec(whole);
  let name = whole;
  for (let number = 2; taken.has(name.toLowerCase()); number++) name = `${stem}-${number}${ending ?? ""}`;
  taken.add(name.toLowerCase());
  return name;
}

function add(files) {
  const images = [...files];
  const added = images.map(file => {
    const card = template.content.firstElementChild.cloneNode(true);
    const picture = {id: ++lastId, file, name: uniqueName(file.name || "pasted.png"), card, captions: null, error: null};
    const name = card.querySelector(".name");
    name.textContent = name.title = card.querySelector("img").alt = shownText(picture.name);
    card.style.setProperty("--ratio", 1.4);
    card.querySelector(".remove").setAttribute("aria-label", `Remove ${shownText(picture.name)}`);
    card.querySelector(".remove").addEventListener("click", () => remove(picture));
    return picture;
  });
  pictures.unshift(...added);
  grid.prepend(...added.map(({card}) => card));
  next();
}

function remove(picture) {
  URL.revokeObjectURL(picture.card.querySelector("img").src);
  picture.card.remove();
  taken.delete(picture.name.toLowerCase());
  pictures.splice(pictures.indexOf(picture), 1);
  next();
}

// Give the worker the next picture that waits, if it has none.
function next() {
  const waiting = pictures.filter(({captions, error}) => !captions && !error);
  document.body.classList.toggle("some", pictures.length > 0);
  find("#copy").disabled = find("#download").disabled = waiting.length === pictures.length;
  if (!ready) return;
  const done = pictures.length - waiting.length;
  if (waiting.length && pictures.length > 1) say(`Captioned ${done} of ${pictures.length} pictures`);
  else say(pictures.some(({captions}) => captions?.[0].levels.length) ? `${HOVERS ? "Point at" : "Tap"} a word to see where the model looked.` : "");
  bar.hidden = !waiting.length || pictures.length === 1;
  Object.assign(bar, {max: pictures.length, value: done});
  if (current || !waiting.length) return;
  current = waiting[0];
  const caption = current.card.querySelector(".caption");
  caption.textContent = "captioning …";
  caption.className = "caption waiting busy";
  worker.postMessage({kind: "caption", id: current.id, file: current.file, options, count});
}

function finish(id, result) {
  const picture = current;
  current = null;
  if (picture.again) picture.again = false;  // the settings have changed meanwhile
  else if (pictures.includes(picture)) {
    Object.assign(picture, result);
    show(picture);
  }
  next();
}

function show({card, captions, error, name}) {
  const caption = card.querySelector(".caption"), doubt = card.querySelector(".doubt"), others = card.querySelector("ol");
  caption.className = error ? "caption alarm" : "caption";
  doubt.hidden = true;
  others.replaceChildren();
  if (error) {
    caption.textContent = `${shownText(name)} has no caption: ${error}.`;
    if (!card.querySelector("img").src) card.querySelector("figure").hidden = true;
    return;
  }
  const [best, ...rest] = captions;
  if (best.levels.length) caption.replaceChildren(...best.pieces.flatMap((piece, index) => wordOf(piece, index, best)));
  else caption.textContent = shownText(best.text);
  if (!best.text) caption.textContent = "(no words)";
  doubt.textContent = doubtOf(best);
  doubt.hidden = !doubt.textContent;
  others.replaceChildren(...rest.map(({text}) => Object.assign(document.createElement("li"), {className: "other", dir: "auto", textContent: shownText(text)})));
}

function doubtOf({confidence, perhaps}) {
  if (confidence === null || confidence >= config.confidence.unsure) return "";
  return perhaps.length ? `unsure; perhaps: ${perhaps.join(", ")}` : "unsure";
}

// ---- attention, as in the gallery: the word pointed at or focused last is active; a tap does both

const overlay = document.createElement("canvas");
const wordInfo = new WeakMap();  // from a word's element to its caption and its index there
let activeWord = null, pointed = null, focused = null;

function wordOf(piece, index, caption) {
  const text = shownText(piece), word = Object.assign(document.createElement("span"), {className: "word", tabIndex: 0, textContent: text.trimStart()});
  wordInfo.set(word, {caption, index});
  return [text.slice(0, text.length - word.textContent.length), word];
}

function showAttention(word) {
  if (word === activeWord) return;
  activeWord?.classList.remove("active");
  activeWord = word;
  overlay.remove();
  if (!word) return;
  word.classList.add("active");
  const {caption, index} = wordInfo.get(word), {card, width, height} = pictures.find(each => each.captions?.[0] === caption) ?? {};
  if (!card) return;
  const level = caption.levels[index], side = Math.sqrt(level.length), pixels = new ImageData(side, side);
  const [red, green, blue, opacity] = SHADE;
  level.forEach((each, i) => pixels.data.set([red, green, blue, opacity * (255 - each)], 4 * i));
  const small = Object.assign(document.createElement("canvas"), {width: side, height: side});
  small.getContext("2d").putImageData(pixels, 0, 0);
  Object.assign(overlay, {width, height});
  const context = overlay.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, width, height);
  card.querySelector("figure").append(overlay);
}

const wordAt = event => event.target.closest?.(".word") ?? null;
addEventListener("pointerover", event => showAttention((pointed = wordAt(event)) ?? focused));
addEventListener("focusin", event => showAttention((focused = wordAt(event)) ?? pointed));
addEventListener("focusout", () => showAttention((focused = null) ?? pointed));

// ---- where pictures come from

for (const input of [find("#choose"), find("#camera input")]) {
  input.addEventListener("change", () => {
    add(input.files);
    input.value = "";
  });
}
folder.querySelector("input").addEventListener("change", event => {
  load(new Map([...event.target.files].map(file => [file.webkitRelativePath.replace(/^[^/]*\//, ""), file])));
});
addEventListener("paste", event => add(event.clipboardData.files));
addEventListener("dragover", event => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", event => event.relatedTarget || document.body.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  document.body.classList.remove("over");
  add(event.dataTransfer.files);
});

function showExamples(files) {
  find("#examples").hidden = !config.examples.length;
  find("#examples .choices").replaceChildren(...config.examples.map(path => {
    const button = document.createElement("button"), name = path.split("/").at(-1);
    const image = Object.assign(document.createElement("img"), {src: files ? URL.createObjectURL(files.get(path)) : path, alt: name});
    button.type = "button";
    button.append(image);
    button.addEventListener("click", async () => add([new File([await (await fetch(image.src)).blob()], name)]));
    return button;
  }));
}

// ---- settings: those of the demo

const inputs = [...dialog.querySelectorAll("input")];

function showSettings() {
  for (const input of inputs) {
    input.value = input.name === "count" ? count : options[input.name];
    input.parentElement.querySelector("b").textContent = input.value;
  }
}

function forget() {
  for (const input of inputs) if (usual[input.name] > input.max) input.max = usual[input.name];
  options = {...usual};
  count = 3;
  showSettings();
}

function change() {
  for (const input of inputs) {
    if (input.name === "count") count = Number(input.value);
    else options[input.name] = Number(input.value);
  }
  captionAgain();
}

function captionAgain() {
  if (current) current.again = true;
  for (const picture of pictures) {
    Object.assign(picture, {captions: null, error: null});
    picture.card.querySelector(".caption").classList.add("waiting");
  }
  next();
}

dialog.addEventListener("input", event => event.target.parentElement.querySelector("b").textContent = event.target.value);
dialog.addEventListener("change", change);
find("#settings").addEventListener("click", () => dialog.showModal());
find("#usual").addEventListener("click", () => {
  forget();
  captionAgain();
});

// ---- what becomes of captions

const captioned = () => pictures.filter(({captions}) => captions);

const WRITERS = {
  txt: () => captioned().map(({name, captions}) => `${shownText(name)}\t${shownText(captions[0].text)}\n`).join(""),
  csv: () => ["image,caption,log_prob", ...captioned().flatMap(({name, captions}) =>
    captions.map(({text, logProb}) => [name, text, rounded(logProb, 4)].map(quoted).join(",")))].join("\n") + "\n",
  json: () => JSON.stringify(captioned().map(({name, captions}) => {
    const [{text, confidence, perhaps}] = captions, row = {image_id: name, caption: text};
    if (confidence !== null) Object.assign(row, {confidence: rounded(confidence, 3), perhaps});
    if (captions.length > 1) row.captions = captions.map(({text, logProb}) => ({caption: text, log_prob: rounded(logProb, 4)}));
    return row;
  }), null, 1) + "\n",
};
const NAMES = {txt: "captions.txt", csv: "captions.csv", json: "predictions.json"};

const rounded = (number, digits) => Number(number.toFixed(digits));
const quoted = value => /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value);

// Whether a text could be copied; without https, as from another machine, browsers have only the old way.
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = Object.assign(document.createElement("textarea"), {value: text});
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  return done;
}

find("#copy").addEventListener("click", async () => {
  const copy = find("#copy");
  const texts = captioned().length === 1 ? captioned()[0].captions[0].text : WRITERS.txt();
  copy.textContent = await copied(texts) ? "Copied" : "Not allowed";
  setTimeout(() => copy.textContent = "Copy", 1500);
});
find("#download").addEventListener("change", event => {
  const kind = event.target.value;
  event.target.value = "";
  const link = Object.assign(document.createElement("a"), {download: NAMES[kind], href: URL.createObjectURL(new Blob([WRITERS[kind]()]))});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
find("#clear").addEventListener("click", () => [...pictures].forEach(remove));

start();
