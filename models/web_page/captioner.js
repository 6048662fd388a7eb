"use strict";
// The captioner itself, in a worker, so that the page stays quick: a picture's file comes in, its captions go out.
// It does what data/transforms.py, models/search.py, models/consensus.py and models/confidence.py do, number for number.

const PAD = 0, SOS = 1, EOS = 2, UNK = 3;
const MOST_PIXELS = 89_478_485;  // Pillow's limit
const STRIP = 1 << 22;  // pixels of a picture that are read at once
const SHOWN_SIDE = 800;  // pixels of the longer side of the copy that is shown

// ---- pictures: as data/transforms.py resizes them, which a canvas does not

// For each place of the result: the first pixel that counts, and the pixels' weights, integers of `precision` bits.
function weightsOf(length, size, bicubic) {
  const scale = length / size, stretch = Math.max(scale, 1), support = (bicubic ? 2 : 1) * stretch;
  const rows = [];
  let largest = 0;
  for (let place = 0; place < size; place++) {
    const centre = scale * (place + 0.5);
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const count = Math.min(length, Math.trunc(centre + support + 0.5)) - first;
    const weights = Array.from({length: count}, (_, i) => kernel((i + first - centre + 0.5) / stretch, bicubic));
    const sum = weights.reduce((a, b) => a + b, 0);
    rows.push({first, weights: weights.map(weight => weight / sum)});
    for (const weight of rows[place].weights) largest = Math.max(largest, weight);
  }
  let precision = 0;
  while (precision < 22 && Math.trunc(0.5 + largest * 2 ** (precision + 1)) < 2 ** 15) precision++;
  for (const row of rows) {
    row.weights = Int32Array.from(row.weights, weight => Math.trunc(weight * 2 ** precision + (weight < 0 ? -0.5 : 0.5)));
  }
  return {rows, precision};
}

function kernel(x, bicubic) {
  x = Math.abs(x);
  if (!bicubic) return Math.max(0, 1 - x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? ((2.5 - 0.5 * x) * x - 4) * x + 2 : 0;
}

// Shrink or stretch rows of RGBA pixels to `size` RGB pixels each.
function squeezeWidth(rgba, width, height, {rows, precision}) {
  const size = rows.length, out = new Uint8ClampedArray(height * size * 3), half = 1 << precision >> 1;
  for (let y = 0, to = 0; y < height; y++) {
    for (let place = 0; place < size; place++, to += 3) {
      const {first, weights} = rows[place];
      let red = half, green = half, blue = half;
      for (let i = 0, from = 4 * (y * width + first); i < weights.length; i++, from += 4) {
        red += weights[i] * rgba[from];
        green += weights[i] * rgba[from + 1];
        blue += weights[i] * rgba[from + 2];
      }
      out[to] = red >> precision;
      out[to + 1] = green >> precision;
      out[to + 2] = blue >> precision;
    }
  }
  return out;
}

// The same from top to bottom, of RGB rows; the result is three planes, as the encoder reads them.
function squeezeHeight(rgb, size, {rows, precision}) {
  const out = new Uint8ClampedArray(3 * size * size), half = 1 << precision >> 1;
  rows.forEach(({first, weights}, y) => {
    for (let x = 0; x < 3 * size; x++) {
      let sum = half;
      for (let i = 0, from = first * 3 * size + x; i < weights.length; i++, from += 3 * size) sum += weights[i] * rgb[from];
      out[x % 3 * size * size + y * size + (x / 3 | 0)] = sum >> precision;
    }
  });
  return out;
}

// A picture's pixels (3, size, size). It is read in strips, since phones allow no canvas of a whole photograph.
function squeeze(bitmap, size, bicubic) {
  const {width, height} = bitmap, across = weightsOf(width, size, bicubic);
  const rgb = new Uint8ClampedArray(height * size * 3), rows = Math.max(1, Math.min(height, Math.floor(STRIP / width)));
  const context = new OffscreenCanvas(width, rows).getContext("2d", {alpha: false, willReadFrequently: true});
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    rgb.set(squeezeWidth(context.getImageData(0, 0, width, count).data, width, count, across), top * size * 3);
  }
  return squeezeHeight(rgb, size, weightsOf(height, size, bicubic));
}

// Decode a file upright, with its colours as they are stored, as Pillow does.
async function openPicture(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {imageOrientation: "from-image", colorSpaceConversion: "none"});
  } catch {
    throw new Refusal("this browser cannot read it as a picture; take a JPEG, PNG or WebP");
  }
  if (bitmap.width * bitmap.height <= MOST_PIXELS) return bitmap;
  bitmap.close();
  throw new Refusal("it has more than 89 million pixels; shrink it first");
}

async function shownCopy(bitmap) {
  const factor = Math.min(1, SHOWN_SIDE / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map(side => Math.max(1, Math.round(side * factor)));
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", {alpha: false});
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return {blob: await canvas.convertToBlob({type: "image/jpeg", quality: 0.88}), width, height};
}

// ---- search: models/search.py for one picture

// The best captions, the best first. `step` gives {logits, state, attention} of K hypotheses, given the last word of each.
async function search(step, state, options, wanted, forbidden, words, bonus, random) {
  const width = options.temperature ? wanted : Math.max(options.beam, wanted);
  const found = [];
  let beam = [{ids: [], logProb: 0, attention: []}];
  for (let length = 1; beam.length; length++) {
    const next = await step(beam.map(({ids}) => ids.at(-1) ?? SOS), state);
    const rows = beam.map(({ids}, row) => {
      const logProbs = logSoftmax(next.logits.subarray(row * words, (row + 1) * words));
      exclude(logProbs, ids, options, forbidden);
      if (bonus && !options.temperature) for (const [id, more] of bonus) if (!ids.includes(id)) logProbs[id] += more;
      return logProbs;
    });
    const slots = width - found.length;
    const chosen = options.temperature ? draw(beam, rows, slots, options, random) : bestOfBeam(beam, rows, slots);
    const last = length === options.max_length, kept = [];
    beam = [];
    for (const {row, parent, id, logProb} of chosen) {
      const ids = [...parent.ids, id];
      const attention = next.attention && id !== EOS ? [...parent.attention, next.attention[row]] : parent.attention;
      if (id === EOS || last) {
        const plus = !bonus || options.temperature ? 0 : sum(bonus.filter(([id]) => ids.includes(id)).map(([, more]) => more));
        const score = logProb / length ** options.length_penalty;
        found.push({ids: id === EOS ? ids.slice(0, -1) : ids, logProb: logProb - plus, score, attention});
      } else {
        beam.push({ids, logProb, attention});
        kept.push(row);
      }
    }
    // done when no hypothesis could overtake the last one wanted, even if the rest of its words were certain
    const most = bonus && !options.temperature ? sum(bonus.map(([, more]) => more)) : 0;
    const reachable = (Math.max(...beam.map(({logProb}) => logProb)) + most) / options.max_length ** options.length_penalty;
    const scores = found.map(({score}) => score).sort((a, b) => b - a);
    if (!beam.length || reachable <= (scores[wanted - 1] ?? -Infinity)) break;
    state = next.state.map(part => takeRows(part, kept));
  }
  return found.sort((a, b) => b.score - a.score).slice(0, wanted);
}

const sum = numbers => numbers.reduce((a, b) => a + b, 0);

function logSoftmax(logits) {
  let peak = -Infinity, total = 0;
  for (const logit of logits) peak = Math.max(peak, logit);
  for (const logit of logits) total += Math.exp(logit - peak);
  return Float64Array.from(logits, logit => logit - peak - Math.log(total));
}

// Set the log-probabilities of words that may not follow to minus infinity; <eos> stays possible where nothing else is.
function exclude(logProbs, ids, options, forbidden) {
  let end = Math.max(logProbs[EOS], -1e9);
  for (const id of [PAD, SOS, UNK, ...forbidden]) logProbs[id] = -Infinity;
  const n = options.no_repeat_ngram;
  for (let start = 0; n > 0 && start + n <= ids.length; start++) {
    const before = ids.slice(ids.length - n + 1);
    if (before.every((id, i) => ids[start + i] === id)) logProbs[ids[start + n - 1]] = -Infinity;
  }
  if (ids.length < options.min_length) {
    logProbs[EOS] = -Infinity;
    if (logProbs.some(each => each > -Infinity)) end = -Infinity;
  }
  logProbs[EOS] = end;
}

// The most probable hypotheses of one more word, at most `slots`.
function bestOfBeam(beam, rows, slots) {
  const candidates = [];
  rows.forEach((logProbs, row) => {
    for (const id of largest(logProbs, slots)) {
      candidates.push({row, parent: beam[row], id, logProb: beam[row].logProb + logProbs[id]});
    }
  });
  return candidates.sort((a, b) => b.logProb - a.logProb).slice(0, slots);
}

// The places of the `count` largest numbers, without those that are minus infinity or NaN, the largest first.
function largest(numbers, count) {
  const best = [];
  for (let i = 0; i < numbers.length; i++) {
    if (!(numbers[i] > -Infinity) || (best.length === count && numbers[i] <= numbers[best.at(-1)])) continue;
    let place = best.length;
    while (place && numbers[best[place - 1]] < numbers[i]) place--;
    best.splice(place, 0, i);
    if (best.length > count) best.pop();
  }
  return best;
}

// Each hypothesis with a word drawn from the tempered distribution; all captions start from one <sos>.
function draw(beam, rows, slots, options, random) {
  return rows.flatMap((logProbs, row) => {
    const order = [...logProbs.keys()].filter(id => logProbs[id] > -Infinity).sort((a, b) => logProbs[b] - logProbs[a]);
    const probs = order.map(id => Math.exp((logProbs[id] - logProbs[order[0]]) / options.temperature));
    const enough = options.top_p * sum(probs);
    let before = 0, count = 0;
    while (count < Math.min(options.top_k || Infinity, probs.length) && before < enough) before += probs[count++];
    const total = before;
    return Array.from({length: beam[0].ids.length ? 1 : slots}, () => {
      let left = random() * total, place = 0;
      while (place < count - 1 && (left -= probs[place]) >= 0) place++;
      return {row, parent: beam[row], id: order[place], logProb: beam[row].logProb + logProbs[order[place]]};
    });
  });
}

// Numbers from 0 to 1, the same ones for the same seed (mulberry32).
function randomNumbers(seed) {
  return () => {
    seed = seed + 0x6d2b79f5 | 0;
    let t = Math.imul(seed ^ seed >>> 15, 1 | seed);
    t = t + Math.imul(t ^ t >>> 7, 61 | t) ^ t;
    return ((t ^ t >>> 14) >>> 0) / 2 ** 32;
  };
}

// ---- what is known of a picture besides: models/model.py, models/consensus.py and models/confidence.py

// The probability of each kind of thing, given those of ImageNet's classes.
function kindsOf(probs, {kind_of_class, kind_words}) {
  const kinds = new Float64Array(kind_words.length);
  if (kind_words.some(id => id !== UNK)) kind_of_class.forEach((kind, number) => kinds[kind] += probs[number]);
  return kinds;
}

// What search adds to the log-probability of words: pairs of id and number.
function classBonus(kinds, {kind_words}, weight, seen) {
  const of = new Map();
  kinds.forEach((prob, kind) => of.set(kind_words[kind], (of.get(kind_words[kind]) ?? 0) + prob));
  return [...of].filter(([id, prob]) => id > UNK && prob >= seen).map(([id, prob]) => [id, weight * prob]);
}

// About the CIDEr-D, from 0 to 10, that a caption can expect.
function expectedCider(ids, expected, length, {number_of, idf, base, max_ngram, sigma}) {
  let product = 0;
  for (let n = 0; n < max_ngram; n++) {
    const times = new Map();
    let squares = 0;
    for (let start = 0; start + n < ids.length; start++) {
      let number = 0;  // of what precedes each word: at first the root
      for (let i = start; i <= start + n && number >= 0; i++) {
        number = number_of.get(number * base + Math.min(ids[i], base - 1)) ?? -1;
      }
      if (number < 0) squares += idf.at(-1) ** 2;
      else times.set(number, (times.get(number) ?? 0) + 1);
    }
    for (const [number, count] of times) squares += (count * idf[number]) ** 2;
    const norm = Math.max(Math.sqrt(squares), 1e-12);
    for (const [number, count] of times) product += count * idf[number] / norm * expected[number];
  }
  return 10 / max_ngram * product * Math.exp(-((ids.length - length) ** 2) / (2 * sigma ** 2));
}

function chanceOf({weights, bias}, inputs) {
  const logit = bias + sum(weights.map((weight, i) => weight === 0 ? 0 : weight * inputs[i]));
  return Number.isNaN(logit) ? null : 1 / (1 + Math.exp(-logit));
}

// What a picture shows of a kind: `school bus` rather than `bus` where nearly all of its probability is that class's.
function nameOfKind(kind, probs, {kind_of_class, class_names, kind_names}) {
  const own = [...probs.keys()].filter(number => kind_of_class[number] === kind);
  const best = own.reduce((a, b) => probs[b] > probs[a] ? b : a);
  const name = class_names[best], word = kind_names[kind];
  return probs[best] > 0.8 * sum(own.map(number => probs[number])) && name.toLowerCase().endsWith(word) ? name : word;
}

// ---- words: data/vocab.py and render/attention.py

const HAN = "\\u2e80-\\u2fff\\u3005-\\u3007\\u3040-\\u9fff\\uf900-\\ufaff\\u{20000}-\\u{3ffff}";
const LETTER = "[\\p{L}\\p{N}_]", OTHER = `(?:(?![${HAN}])${LETTER})`;
const UNSPACED = `[${["Thai", "Lao", "Khmer", "Myanmar", "Hiragana", "Katakana", "Han"].map(each => `\\p{Script=${each}}`).join("")}ー々]`;
const NEEDLESS = {  // blanks between words
  en: ` (?=(?:n't|'${LETTER}+)(?!${LETTER}))`,
  zh: `(?<!${OTHER}) | (?!${OTHER})`,
  unicode: `(?<=${UNSPACED}\\p{M}*) (?=${UNSPACED})`,
};

function join(words, language) {
  return words.join(" ").replace(new RegExp(NEEDLESS[language.split("-")[0]], "gu"), "");
}

// Split a caption before each of its words: ["a", " dog", "'s", " toy"].
function splitBefore(text, words) {
  const characters = [...text];
  let place = 0;
  return words.map(word => {
    let piece = "", left = [...word].filter(character => character !== " ").length;
    while (left > 0 && place < characters.length) {
      if (characters[place] !== " ") left--;
      piece += characters[place++];
    }
    return piece;
  });
}

// ---- the model

class Refusal extends Error {}  // a sentence for whoever dropped the picture

let given = null;  // the page's files by name, where a browser does not let it fetch them
let config, encoder, decoder, names, device;

async function read(name, progress = () => {}) {
  if (given) {
    if (!given.has(name)) throw new Refusal(`this folder lacks ${name}; choose the whole folder that was exported`);
    progress(given.get(name).size);
    return given.get(name);
  }
  const answer = await fetch(name);
  if (!answer.ok) throw new Refusal(`the host has no ${name} (${answer.status}); export the page again and upload all of it`);
  const parts = [], reader = answer.body.getReader();
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return new Blob(parts, {type: name.endsWith("js") ? "text/javascript" : ""});
    parts.push(value);
    progress(value.length);
  }
}

const script = blob => URL.createObjectURL(new Blob([blob], {type: "text/javascript"}));

async function load(files) {
  given = files;
  config = JSON.parse(await (await read("captioner.json")).text());
  if (config.consensus) {
    config.consensus.number_of = new Map(config.consensus.codes.map((code, number) => [code, number]));
  }
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const gpu = adapter && !(adapter.info?.isFallbackAdapter ?? adapter.isFallbackAdapter);  // which a processor would play
  const runtime = config.runtime[gpu ? "webgpu" : "wasm"];
  const wanted = [runtime.script, runtime.module, runtime.binary, "encoder.onnx", "decoder_step.onnx"];
  const total = sum(wanted.map(name => config.sizes[name]));
  let loaded = 0;
  const progress = count => postMessage({kind: "progress", loaded: loaded += count, total});
  const [ortScript, module, binary, ...graphs] = await Promise.all(wanted.map(name => read(name, progress)));
  const runtimeScript = script(ortScript);
  importScripts(runtimeScript);
  URL.revokeObjectURL(runtimeScript);
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.wasm.wasmPaths = {mjs: script(module)};
  ort.env.wasm.wasmBinary = await binary.arrayBuffer();
  const [first, step] = await Promise.all(graphs.map(async graph => new Uint8Array(await graph.arrayBuffer())));
  device = ort.env.wasm.numThreads > 1 ? `${ort.env.wasm.numThreads} threads` : "one thread";
  decoder = await ort.InferenceSession.create(step, {executionProviders: ["wasm"], logSeverityLevel: 3});
  encoder = gpu && await encoderOn("webgpu", first);
  if (encoder) device = "WebGPU";
  else encoder = await encoderOn("wasm", first);
  if (!encoder) throw new Refusal("this browser computes other numbers than the model; try another browser");
  names = encoder.outputNames;
  postMessage({kind: "ready", device});
}

// An encoder that computes what it should of a made-up picture, which warms it up as well; null of one that does not.
async function encoderOn(provider, graph) {
  try {
    const session = await ort.InferenceSession.create(graph, {executionProviders: [provider], logSeverityLevel: 3});
    const size = config.size, pixels = Uint8Array.from({length: 3 * size * size}, (_, i) => Math.imul(i, 7) >> 4 & 255);
    const {memory_0: memory} = await session.run({pixels: new ort.Tensor("uint8", pixels, [1, 3, size, size])});
    const {expected, tolerance} = config.check, stride = memory.data.length / expected.length;
    const off = Math.max(...expected.map((number, i) => Math.abs(number - memory.data[Math.floor(i * stride)])));
    if (off <= tolerance) return session;
    await session.release();
  } catch (error) {
    if (provider === "wasm") throw error;
  }
  return null;
}

const startingWith = kind => names.filter(name => name.startsWith(kind));

function takeRows(tensor, rows) {
  const size = tensor.data.length / tensor.dims[0], data = new Float32Array(rows.length * size);
  rows.forEach((row, to) => data.set(tensor.data.subarray(row * size, (row + 1) * size), to * size));
  return new ort.Tensor("float32", data, [rows.length, ...tensor.dims.slice(1)]);
}

async function caption(id, file, options, count) {
  const bitmap = await openPicture(file);
  let pixels;
  try {
    postMessage({kind: "shown", id, ...await shownCopy(bitmap)});
    pixels = squeeze(bitmap, config.size, config.bicubic);
  } finally {
    bitmap.close();
  }
  const size = config.size, known = await encoder.run({pixels: new ort.Tensor("uint8", new Uint8Array(pixels.buffer), [1, 3, size, size])});
  const memory = Object.fromEntries(startingWith("memory").map(name => [name, known[name]]));
  const stateNames = startingWith("state");

  async function step(tokens, state) {
    const token = new ort.Tensor("int64", BigInt64Array.from(tokens, BigInt), [tokens.length]);
    const states = Object.fromEntries(stateNames.map((name, i) => [name, state[i]]));
    const found = await decoder.run({token, ...states, ...memory});
    return {
      logits: found.logits.data,
      state: stateNames.map(name => found[`next_${name}`]),
      attention: found.attention && tokens.map((_, row) => meanOverHeads(found.attention, row)),
    };
  }

  const probs = known.probs?.data, {classes, consensus, confidence} = config;
  const kinds = probs ? kindsOf(probs, classes) : null;
  const bonus = kinds && options.classes ? classBonus(kinds, classes, options.classes, config.seen) : null;
  const rank = consensus && options.consensus > 0 && !options.temperature && Math.max(options.beam, count) > 1;
  const wanted = rank ? Math.max(count, options.beam) : count;
  const random = randomNumbers(config.seed);
  let found = await search(step, stateNames.map(name => known[name]), options, wanted, config.forbidden, config.words.length, bonus, random);
  if (!found.length) throw new Refusal("the model's scores are NaN or infinite, so that it writes nothing");
  if (consensus) {
    for (const each of found) {
      each.cider = expectedCider(each.ids, known.expected.data, known.length.data[0], consensus);
      each.score += (rank ? options.consensus : 0) * each.cider;
    }
    found = found.sort((a, b) => b.score - a.score);
  }
  for (const tensor of Object.values(known)) tensor.dispose();
  return found.slice(0, count).map(each => describe(each, kinds, probs, options));
}

function meanOverHeads({data, dims: [, heads, regions]}, row) {
  return Float32Array.from({length: regions}, (_, region) => {
    let total = 0;
    for (let head = 0; head < heads; head++) total += data[(row * heads + head) * regions + region];
    return total / heads;
  });
}

// A caption as the page shows it: its text in pieces, one for each word, how sure the model is, and where it looked.
function describe({ids, logProb, cider, attention}, kinds, probs, options) {
  const words = ids.map(id => config.words[id]), text = join(words, config.language);
  const levels = attention.map(alphas => {
    const most = Math.max(...alphas);
    return Uint8Array.from(alphas, alpha => Math.round(255 * alpha / most));
  });
  const described = {text, pieces: splitBefore(text, words), logProb, levels, confidence: null, perhaps: []};
  if (!config.confidence) return described;
  const {confidence, classes} = config;
  const named = (classes?.kind_words ?? []).map(id => id !== UNK && ids.includes(id));
  const [inside, outside] = [true, false].map(side => kinds ? [...kinds].filter((_, kind) => named[kind] === side) : []);
  const perWord = logProb / Math.min(ids.length + 1, options.max_length);
  described.confidence = chanceOf(confidence, [perWord, sum(inside), Math.max(0, ...outside), cider ?? NaN]);
  if (kinds && described.confidence !== null && described.confidence < confidence.unsure) {
    const likely = largest(kinds.map((prob, kind) => named[kind] ? 0 : prob), confidence.most_named);
    described.perhaps = likely.filter(kind => kinds[kind] >= confidence.likely).map(kind => nameOfKind(kind, probs, classes));
  }
  return described;
}

onmessage = async ({data}) => {
  try {
    if (data.kind === "load") await load(data.files);
    else postMessage({kind: "captions", id: data.id, captions: await caption(data.id, data.file, data.options, data.count)});
  } catch (error) {
    const message = error instanceof Refusal ? error.message : `something went wrong (${error.message})`;
    postMessage({kind: "error", id: data.id, message});
  }
};
