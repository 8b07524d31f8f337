// The page's behaviour; words.js has what it says. No library and no build step.
import { about, gapInWords, percent, placeInWords, UTILITIES } from "./words.js";

const $ = (id) => document.getElementById(id);
const state = { info: null, picture: null, name: "", answer: null, token: "", running: null };

function say(text, kind = "") {
  $("status").textContent = text;
  $("status").className = kind;
}

async function ask(path, options = {}) {
  const headers = state.token ? { authorization: `Bearer ${state.token}` } : {};
  const response = await fetch(path, { ...options, headers: { ...headers, ...options.headers } });
  if (response.ok) return response;
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // what it said is no JSON: its status must do
  }
  if (response.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
  if (response.status === 503) message += " Try again in a moment.";
  throw new Error(message);
}

// ------------------------------------------------------------------------------------------------ what is served

function fill(select, values) {
  const before = select.value;
  select.replaceChildren(...values.map((value) => new Option(value, value)));
  if (values.includes(before)) select.value = before;
}

function modelChosen() {
  const model = state.info.models[$("model").value];
  fill($("method"), model.methods);
  fill($("utility"), model.utilities);
  $("network").textContent = about(model);
  utilityChosen();
}

function utilityChosen() {
  $("utility-help").textContent = UTILITIES[$("utility").value] ?? "";
}

async function begin() {
  try {
    state.info = await (await ask("/v1/info")).json();
  } catch (error) {
    say(error.message, "bad");
    return;
  }
  $("token-form").hidden = true;
  const names = Object.keys(state.info.models);
  fill($("model"), names);
  $("model-label").hidden = names.length < 2;
  modelChosen();
  await examples();
}

async function examples() {
  const found = await (await ask("/page/examples")).json();
  $("examples").hidden = found.length === 0;
  $("example-list").replaceChildren(
    ...found.map(({ name, address, credit }) => {
      const button = document.createElement("button");
      button.type = "button";
      button.title = credit;
      button.setAttribute("aria-pressed", "false");
      const image = document.createElement("img");
      image.src = address;
      image.alt = `Example: ${name}`;
      button.append(image);
      button.addEventListener("click", async () => {
        try {
          const blob = await (await ask(address)).blob();
          take(blob, name, button);
        } catch (error) {
          say(error.message, "bad");
        }
      });
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
}

// ------------------------------------------------------------------------------------------------ the photograph

function take(picture, name, button = null) {
  for (const other of $("example-list").querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
  state.picture = picture;
  state.name = name;
  explain();
}

// A picture that the server would refuse is drawn smaller, if this browser can read it.
async function fitting(picture) {
  const limits = state.info.limits;
  const kinds = limits.formats.map((format) => `image/${format.toLowerCase()}`);
  if (picture.size <= limits.body * 0.95 && (kinds.includes(picture.type) || !picture.type.startsWith("image/"))) return picture;
  let bitmap;
  try {
    bitmap = await createImageBitmap(picture);
  } catch {
    return picture; // the server will say what is wrong
  }
  const scale = Math.min(1, 1600 / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob((blob) => resolve(blob ?? picture), kinds.includes("image/jpeg") ? "image/jpeg" : "image/png", 0.95));
}

async function explain() {
  if (!state.picture || !state.info) return;
  state.running?.abort();
  const running = new AbortController();
  state.running = running;
  const model = state.info.models[$("model").value];
  const query = new URLSearchParams([
    ["return", "json"],
    ["model", $("model").value],
    ["method", $("method").value],
    ["utility", $("utility").value],
    ["topk", String(Math.min(5, model.classes ?? 5, state.info.limits.classes))],
    ["gap", String(model.gap)],
    ["embed", "view"],
    ["embed", "overlay"],
    ["alpha", "1"],
    ["colormap", "turbo"],
  ]);
  say("The network is looking …", "busy");
  $("answer").classList.add("stale");
  try {
    const body = await fitting(state.picture);
    const response = await ask(`/v1/explain?${query}`, { method: "POST", body, signal: running.signal });
    const answer = await response.json();
    if (state.running !== running) return; // another photograph was chosen meanwhile
    state.answer = answer;
    show();
  } catch (error) {
    if (error.name === "AbortError") return;
    $("answer").hidden = true;
    say(error instanceof TypeError ? "The server cannot be reached." : error.message, "bad");
  }
}

// ------------------------------------------------------------------------------------------------ the answer

function show() {
  const { answer } = state;
  $("view").src = `data:image/png;base64,${answer.view}`;
  const rows = answer.explanations.map((one, n) => {
    const row = document.createElement("label");
    row.className = "class";
    const choice = document.createElement("input");
    choice.type = "radio";
    choice.name = "class";
    choice.value = String(n);
    choice.checked = n === 0;
    const name = document.createElement("span");
    name.className = "name";
    name.textContent = one.label;
    const chance = document.createElement("span");
    chance.className = "chance";
    chance.textContent = percent(one.probability);
    const meter = document.createElement("meter");
    meter.value = one.probability;
    meter.setAttribute("aria-hidden", "true"); // the number beside it says the same
    row.append(choice, name, chance, meter);
    return row;
  });
  $("classes").replaceChildren($("classes").querySelector("legend"), ...rows);
  $("answer").hidden = false;
  $("answer").classList.remove("stale");
  select(0);
  const first = answer.explanations[0];
  say(`Most probably: ${first.label}, ${percent(first.probability)}.`);
  $("stack").scrollIntoView({ block: "nearest" }); // on a phone it is below the photographs
}

function select(n) {
  const { answer } = state;
  const one = answer.explanations[n];
  $("heat").src = `data:image/png;base64,${one.overlay}`;
  const place = one.map ? placeInWords(one.map) : "";
  $("stack").setAttribute("aria-label", `${state.name || "The photograph"} with the map of “${one.label}”. ${place}`);
  $("caption").textContent = `Map of “${one.label}” (${answer.method}, ${answer.utility}). ${place}`;
  const [verdict, words] = gapInWords(one, answer);
  const strong = document.createElement("strong");
  strong.textContent = verdict;
  $("gap").replaceChildren(strong, words);
}

function opacityChosen() {
  const value = $("opacity").value;
  $("heat").style.opacity = String(value / 100);
  $("opacity-value").textContent = `${value} %`;
}

// ------------------------------------------------------------------------------------------------ what people do

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) take(target.files[0], target.files[0].name);
  target.value = ""; // the same file may be chosen again
});
$("classes").addEventListener("change", ({ target }) => select(Number(target.value)));
$("opacity").addEventListener("input", opacityChosen);
$("model").addEventListener("change", () => {
  modelChosen();
  explain();
});
$("method").addEventListener("change", explain);
$("utility").addEventListener("change", () => {
  utilityChosen();
  explain();
});
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("token-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = $("token").value.trim();
  say("", "");
  begin().then(explain);
});
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.add("over");
  });
}
for (const kind of ["dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.remove("over");
  });
}
document.addEventListener("drop", (event) => {
  const [file] = event.dataTransfer?.files ?? [];
  if (file) take(file, file.name);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData?.files ?? [];
  if (file) take(file, file.name || "pasted");
});

opacityChosen();
begin();
