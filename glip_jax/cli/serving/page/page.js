import { color, drawn, showBoxes } from "./picture.js";
import { LEAST, detect, examples, health, useToken } from "./server.js";

const element = (id) => document.getElementById(id);
const [stage, view, picture, boxes, chips, phrase, threshold, least, status, fault, access] = [
  "stage", "view", "picture", "boxes", "chips", "phrase", "threshold", "least", "status", "error", "access",
].map(element);
const PAUSE = 250; // milliseconds after the last change until the server is asked

const state = { file: null, names: [], answer: null, asked: null, timer: 0 };

const shown = () => (state.answer?.detections ?? []).filter((found) => found.score >= Number(threshold.value));

// ---- What is looked for

function add(text) {
  const known = new Set(state.names.map((name) => name.toLowerCase()));
  for (const name of text.split(",").map((part) => part.trim()).filter(Boolean)) {
    if (!known.has(name.toLowerCase())) state.names.push(name);
    known.add(name.toLowerCase());
  }
  phrase.value = "";
  changed();
}

function remove(index) {
  state.names.splice(index, 1);
  changed();
  (chips.querySelectorAll(".remove")[Math.min(index, state.names.length - 1)] ?? phrase).focus();
}

function showChips() {
  const found = shown();
  chips.replaceChildren(
    ...state.names.map((name, index) => {
      const item = document.createElement("li");
      const own = found.filter((each) => each.phrase === index);
      const all = (state.answer?.detections ?? []).filter((each) => each.phrase === index);
      item.dataset.phrase = index;
      item.style.setProperty("--own", color(index));
      const text = document.createElement("button");
      text.type = "button";
      text.className = "name";
      const best = all.length ? ` (best ${Math.max(...all.map((each) => each.score)).toFixed(2)})` : "";
      item.classList.toggle("missing", Boolean(state.answer) && !own.length);
      text.textContent = !state.answer ? name : own.length ? `${name}: ${own.length}` : `${name}: not found${best}`;
      for (const event of ["mouseenter", "focus"]) text.addEventListener(event, () => light(index));
      for (const event of ["mouseleave", "blur"]) text.addEventListener(event, () => light());
      const cross = document.createElement("button");
      cross.type = "button";
      cross.className = "remove";
      cross.textContent = "×";
      cross.setAttribute("aria-label", `Remove ${name}`);
      cross.addEventListener("click", () => remove(index));
      item.append(text, cross);
      return item;
    }),
  );
}

// Highlights a phrase and its boxes, or one of them; without arguments nothing.
function light(index, only) {
  for (const box of boxes.children) {
    const own = only ? box === only : Number(box.dataset.phrase) === index;
    box.classList.toggle("lit", index !== undefined && own);
    box.classList.toggle("dim", index !== undefined && !own);
  }
  for (const chip of chips.children) {
    chip.classList.toggle("lit", index !== undefined && Number(chip.dataset.phrase) === index);
    chip.classList.toggle("dim", index !== undefined && Number(chip.dataset.phrase) !== index);
  }
}

// ---- What was found

function show() {
  const found = shown();
  least.value = Number(threshold.value).toFixed(2);
  if (state.answer) showBoxes(boxes, state.answer, found, light);
  else boxes.replaceChildren();
  showChips();
  element("save_json").disabled = element("save_picture").disabled = !state.answer;
  if (!state.answer) return;
  const missing = state.names.filter((_, index) => !found.some((each) => each.phrase === index));
  const count = `${found.length} ${found.length === 1 ? "box" : "boxes"}, ${state.answer.seconds.toFixed(2)} s.`;
  const notes = state.answer.notes.map((note) => ` Note: ${note}.`).join("");
  status.textContent = `${count}${missing.length ? ` Not found: ${missing.join(", ")}.` : ""}${notes}`;
}

function fail(error) {
  state.answer = null;
  show();
  status.textContent = "";
  fault.textContent = error.message;
  fault.hidden = false;
  access.hidden = error.status !== 401;
  if (!access.hidden) element("token").focus();
}

function changed() {
  state.asked?.abort();
  clearTimeout(state.timer);
  state.answer = null;
  fault.hidden = true;
  stage.setAttribute("aria-busy", "false");
  show();
  if (!state.file || !state.names.length) {
    status.textContent = !state.file ? "Choose an image." : "Type what to look for.";
    return;
  }
  status.textContent = "Looking …";
  state.timer = setTimeout(ask, PAUSE);
}

async function ask() {
  const own = (state.asked = new AbortController());
  stage.setAttribute("aria-busy", "true");
  try {
    const answer = await detect(state.file, state.names, own.signal);
    if (own.signal.aborted) return;
    state.answer = answer;
    access.hidden = true;
    show();
  } catch (error) {
    if (error.name !== "AbortError" && !own.signal.aborted) fail(error);
  } finally {
    if (state.asked === own) stage.setAttribute("aria-busy", "false");
  }
}

// ---- The image

function take(file) {
  if (!file) return;
  state.file = file;
  URL.revokeObjectURL(picture.src);
  picture.src = URL.createObjectURL(file);
  picture.alt = file.name;
  view.hidden = false;
  element("drop").hidden = true;
  changed();
}

picture.addEventListener("error", () => {
  // The server reads formats that browsers do not show.
  if (state.file) fail(new Error(`${state.file.name || "This file"} cannot be shown: it is no image, or of a format that this browser does not know.`));
  state.asked?.abort();
  clearTimeout(state.timer);
  state.file = null;
  view.hidden = true;
  element("drop").hidden = false;
});

element("choose").addEventListener("click", () => element("file").click());
element("file").addEventListener("change", (event) => {
  take(event.target.files[0]);
  event.target.value = "";
});
document.addEventListener("paste", (event) => take([...event.clipboardData.files][0]));
for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => (event.preventDefault(), stage.classList.add("over")));
document.addEventListener("dragleave", () => stage.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  stage.classList.remove("over");
  take(event.dataTransfer.files[0]);
});

// ---- Controls

element("query").addEventListener("submit", (event) => {
  event.preventDefault();
  add(phrase.value);
});
phrase.addEventListener("input", () => phrase.value.includes(",") && add(phrase.value));
phrase.addEventListener("keydown", (event) => {
  if (event.key === "Backspace" && !phrase.value && state.names.length) {
    state.names.pop();
    changed();
  }
});
threshold.addEventListener("input", show);
access.addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(element("token").value);
  changed();
});

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const stem = () => (state.file.name || "image").replace(/\.[^.]*$/, "");
element("save_json").addEventListener("click", () => {
  const content = { ...state.answer, threshold: Number(threshold.value), detections: shown() };
  save(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }), `${stem()}.json`);
});
element("save_picture").addEventListener("click", async () => save(await drawn(picture, state.answer, shown()), `${stem()}_boxes.png`));

async function begin() {
  const about = await health();
  threshold.value = Math.max(LEAST, about.threshold);
  element("model").textContent = `${about.checkpoint.name.split("/").pop()}, on ${about.versions.device}`;
  for (const { file, alt, names } of await examples()) {
    const button = document.createElement("button");
    const image = document.createElement("img");
    button.type = "button";
    [image.src, image.alt] = [`/page/examples/${file}`, `Example: ${alt}`];
    button.append(image);
    button.addEventListener("click", async () => {
      const blob = await (await fetch(image.src)).blob();
      state.names = [...names];
      take(new File([blob], file, { type: blob.type }));
    });
    element("examples").append(button);
  }
  changed();
}

begin().catch(fail);
