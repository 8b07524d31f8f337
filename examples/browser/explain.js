// Explains a photograph in the browser: one artefact, made by `shapleycam export explained.onnx --resize --targets given`.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

ort.env.wasm.wasmPaths = new URL("./node_modules/onnxruntime-web/dist/", import.meta.url).href;
ort.env.wasm.numThreads = 1; // threads need a server that isolates the page

const LONGEST = 640; // pixels of the longer side that go into the network, which makes 224 of the shorter one
const SHOWN = 5;

const $ = (id) => document.getElementById(id);
const options = new URLSearchParams(location.search);
let session, about, photograph, result;

// The metadata entry "shapleycam" is the last but one in the file, before the checksum. ONNX Runtime does not show it here.
function metadata(bytes) {
  const tail = bytes.subarray(Math.max(0, bytes.length - 2 ** 24));
  const key = new TextEncoder().encode("\n\nshapleycam\x12");
  let at = tail.length - key.length;
  while (at >= 0 && !key.every((byte, i) => tail[at + i] === byte)) at--;
  if (at < 0) throw new Error("The file is not an artefact of shapleycam.");
  let start = at + key.length, size = 0;
  for (let shift = 0; ; shift += 7) {
    const byte = tail[start++];
    size += (byte & 127) * 2 ** shift;
    if (byte < 128) break;
  }
  return JSON.parse(new TextDecoder().decode(tail.subarray(start, start + size)));
}

async function load() {
  const answer = await fetch(options.get("model") ?? "explained.onnx");
  if (!answer.ok) throw new Error(`There is no ${answer.url}: make it as README.md says.`);
  const bytes = new Uint8Array(await answer.arrayBuffer());
  about = metadata(bytes);
  if (about.inputs[0].shape[3] !== 3 || about.inputs[0].shape[1] !== "height" || about.targets !== "given") {
    throw new Error("This page takes an artefact made with --resize --targets given.");
  }
  session = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  $("about").textContent = `${about.model}, ${about.method} of ${about.utility} at ${about.layer.join(", ")}.`;
}

// The pixels of a picture, at most LONGEST on a side, as [1, height, width, 3].
function pixelsOf(picture) {
  const scale = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
  const width = Math.round(picture.width * scale), height = Math.round(picture.height * scale);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // behind transparency
  context.fillRect(0, 0, width, height);
  context.drawImage(picture, 0, 0, width, height);
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    pixels[to++] = data[from];
    pixels[to++] = data[from + 1];
    pixels[to++] = data[from + 2];
  }
  return { canvas, tensor: new ort.Tensor("uint8", pixels, [1, height, width, 3]) };
}

// `target` is a class, or -1 for the predicted one.
async function explain(target) {
  const started = performance.now();
  const feed = { image: photograph.tensor, target: new ort.Tensor("int64", BigInt64Array.of(BigInt(target)), [1]) };
  const found = await session.run(feed);
  const logits = found.prediction.data;
  const most = logits.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = Array.from(logits, (z) => Math.exp(z - most));
  const sum = weights.reduce((a, b) => a + b, 0);
  const probabilities = weights.map((w) => w / sum);
  const order = probabilities.map((_, i) => i).sort((a, b) => probabilities[b] - probabilities[a]);
  const [, height, width] = found.saliency_map.dims;
  const milliseconds = performance.now() - started;
  const chosen = target < 0 ? order[0] : target;
  result = { chosen, probabilities, order, map: found.saliency_map.data, height, width, milliseconds };
  show();
}

const name = (index) => about.classes[index] ?? `class ${index}`;

// The "turbo" colours of Google's polynomial, for a value in [0, 1].
function turbo(x) {
  const at = (a, b, c, d, e, f) => 255 * Math.min(1, Math.max(0, a + x * (b + x * (c + x * (d + x * (e + x * f))))));
  return [
    at(0.13572138, 4.6153926, -42.66032258, 132.13108234, -152.94239396, 59.28637943),
    at(0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604),
    at(0.1066733, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973),
  ];
}

function show() {
  const { canvas: source } = photograph;
  const canvas = $("picture"), context = canvas.getContext("2d");
  canvas.width = source.width;
  canvas.height = source.height;
  context.drawImage(source, 0, 0);
  const { map, height, width, chosen, probabilities, order } = result;
  if (Number.isNaN(map[0])) throw new Error("The map is not a number: the picture or the class cannot be explained.");
  const heat = new ImageData(width, height);
  for (let i = 0; i < map.length; i++) {
    const [red, green, blue] = turbo(map[i]);
    heat.data.set([red, green, blue, 255 * map[i]], 4 * i); // where there is nothing, the photograph is seen as it is
  }
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(heat, 0, 0);
  // The network sees the middle of the picture: `crop` of the `resize` pixels that the shorter side becomes.
  const { crop, resize } = about.preprocess;
  const side = Array.isArray(resize) ? null : Math.min(source.width, source.height) / resize;
  const w = side === null ? (source.width * crop[1]) / resize[1] : crop[1] * side;
  const h = side === null ? (source.height * crop[0]) / resize[0] : crop[0] * side;
  const x = (source.width - w) / 2, y = (source.height - h) / 2;
  context.globalAlpha = Number($("strength").value);
  context.drawImage(layer, x, y, w, h);
  context.globalAlpha = 1;
  context.strokeStyle = "white";
  context.strokeRect(x, y, w, h);
  const shown = order.slice(0, SHOWN);
  if (!shown.includes(chosen)) shown.push(chosen);
  $("classes").replaceChildren(...shown.map((index) => {
    const item = document.createElement("li"), button = document.createElement("button");
    button.textContent = name(index);
    const share = document.createElement("span");
    share.textContent = `${(100 * probabilities[index]).toFixed(1)} %`;
    button.append(share);
    button.style.setProperty("--share", `${100 * probabilities[index]}%`);
    button.setAttribute("aria-pressed", index === chosen);
    button.addEventListener("click", () => guarded(() => explain(index)));
    item.append(button);
    return item;
  }));
  $("status").textContent = `Explained: ${name(chosen)}, in ${Math.round(result.milliseconds)} ms.`;
}

async function take(blob) {
  $("status").textContent = "Explaining …";
  photograph = pixelsOf(await createImageBitmap(blob));
  await explain(-1);
}

async function guarded(work) {
  $("status").classList.remove("error");
  try {
    await work();
  } catch (error) {
    $("status").classList.add("error");
    $("status").textContent = String(error.message ?? error);
  }
  window.explained = { status: $("status").textContent, result, about }; // for check.mjs
}

$("file").addEventListener("change", (event) => event.target.files[0] && guarded(() => take(event.target.files[0])));
$("strength").addEventListener("input", () => result && show());

await guarded(async () => {
  await load();
  $("file").disabled = false;
  $("status").textContent = "Choose a photograph.";
  const given = options.get("photo");
  if (given) await take(await (await fetch(given)).blob());
});
window.loaded = true;
