// The page: microphone or files in, predicted classes out. Names are only ever set as text, and as
// names.js shows them.
import { shown } from "./names.js";
import { Reader, decode, logMel, microphone } from "./sound.js";

const HOP = 0.5; // seconds between answers
const KEPT = 120; // answers in the chart
const COLOURS = matchMedia("(prefers-color-scheme: dark)").matches
  ? ["#56b4e9", "#f0a35e", "#3cc79b", "#dd9cc6", "#cfc04a"]
  : ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c8c00"];
const DASHES = [[], [6, 3], [2, 2], [8, 2, 2, 2], [1, 3]];
const $ = (id) => document.getElementById(id);

let config, names, backend, recording = null, last = null;
const history = [];

function text(parent, tag, content, className = "") {
  const made = document.createElement(tag);
  made.textContent = content;
  made.className = className;
  parent.append(made);
  return made;
}

function problem(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

const percent = (p) => `${Math.round(100 * p)} %`;
const named = (mask) => names.filter((_, i) => mask[i]);

// The text for an answer, at the threshold of the slider.
function verdict({ calibrated, given, possible, reason }) {
  if (reason) return { sure: false, text: `don’t know (${reason})`, note: "" };
  const limit = Number($("threshold").value);
  const sure = named(given.map((yes, i) => yes && calibrated[i] >= limit));
  const open = possible && possible.some((may, i) => may && !given[i]);
  const among = possible ? named(possible) : [];
  return {
    sure: sure.length > 0, text: sure.length ? sure.join(", ") : "don’t know",
    note: open ? `possible (${percent(config.calibration.coverage)} coverage): ${among.join(", ")}` : "",
  };
}

function show(answer) {
  last = answer;
  const result = verdict(answer);
  if ($("answer").textContent !== result.text) $("answer").textContent = result.text;
  $("answer").className = result.sure ? "answer" : "answer unsure";
  $("possible").textContent = result.note;
  const order = answer.calibrated.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
  $("classes").replaceChildren();
  for (const [p, i] of order) {
    const item = text($("classes"), "li", "");
    text(item, "span", names[i], "name");
    text(item, "span", percent(p), "share");
    const bar = document.createElement("meter");
    bar.value = p;
    bar.setAttribute("aria-hidden", "true");
    item.append(bar);
  }
}

function picture(samples) {
  const frames = logMel(samples, config.rate, config.mels);
  const canvas = $("picture");
  canvas.width = Math.max(1, frames.length);
  canvas.height = config.mels;
  const context = canvas.getContext("2d");
  const image = context.createImageData(canvas.width, canvas.height);
  let low = Infinity, high = -Infinity;
  for (const row of frames) for (const x of row) { low = Math.min(low, x); high = Math.max(high, x); }
  high = Math.max(high, low + 8); // near silence stays dark
  frames.forEach((row, t) => row.forEach((x, f) => {
    const place = 4 * ((config.mels - 1 - f) * canvas.width + t);
    const level = (x - low) / (high - low || 1);
    image.data.set([255 * level ** 1.5, 220 * level ** 2, 60 + 120 * level * (1 - level) * 2, 255], place);
  }));
  context.putImageData(image, 0, 0);
}

function chart() {
  const canvas = $("chart"), context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.clearRect(0, 0, width, height);
  const best = config.classes.map((_, i) => Math.max(0, ...history.map((a) => a.calibrated[i])));
  const order = best.map((p, i) => [p, i]).sort((a, b) => b[0] - a[0]).slice(0, COLOURS.length);
  const y = (p) => height - 4 - p * (height - 8);
  context.strokeStyle = "#888888";
  context.setLineDash([3, 3]);
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(0, y(Number($("threshold").value)));
  context.lineTo(width, y(Number($("threshold").value)));
  context.stroke();
  $("legend").replaceChildren("Top classes over time:");
  order.forEach(([, i], k) => {
    context.strokeStyle = COLOURS[k];
    context.setLineDash(DASHES[k]);
    context.lineWidth = 2;
    context.beginPath();
    history.forEach((a, t) => {
      const x = history.length > 1 ? (t * width) / (history.length - 1) : width / 2;
      if (t) context.lineTo(x, y(a.calibrated[i])); else context.moveTo(x, y(a.calibrated[i]));
    });
    context.stroke();
    const swatch = text($("legend"), "span", "", "swatch");
    swatch.style.background = COLOURS[k];
    text($("legend"), "span", names[i]);
  });
}

function add(answer) {
  history.push(answer);
  if (history.length > KEPT) history.shift();
  show(answer);
  chart();
}

async function record() {
  if (recording) {
    recording.stop();
    recording = null;
  } else {
    try {
      recording = await microphone(config.rate, config.samples);
      history.length = 0;
      listen(recording);
    } catch (error) {
      problem(error);
    }
  }
  $("record").setAttribute("aria-pressed", String(Boolean(recording)));
  $("record").textContent = recording ? "Stop the microphone" : "Start the microphone";
}

// One request at a time: a slow machine answers less often, nothing queues.
async function listen(source) {
  while (recording === source) {
    const until = performance.now() + 1000 * HOP;
    try {
      const samples = await source.latest();
      if (source.seconds >= HOP && recording === source) {
        picture(samples);
        add(await backend.window(samples));
      }
    } catch (error) {
      problem(error);
    }
    await new Promise((done) => setTimeout(done, Math.max(0, until - performance.now())));
  }
}

async function open(file) {
  $("files").hidden = false;
  const box = document.createElement("article");
  box.className = "file";
  $("list").prepend(box);
  text(box, "h3", shown(file.name));
  const status = text(box, "p", "analysing");
  try {
    const answer = await backend.file(file);
    const result = verdict(answer);
    const top = Math.max(...answer.calibrated);
    const best = answer.calibrated.indexOf(top);
    status.textContent = answer.reason ? result.text : `${result.text} (${names[best]} ${percent(top)})`;
    box.dataset.top = answer.reason ? "" : config.classes[best];
    if (result.note) text(box, "p", result.note, "quiet");
    if (answer.note) text(box, "p", answer.note, "quiet");
    if (answer.windows.length > 1) strip(box, answer);
    history.splice(0, history.length, ...answer.windows.slice(-KEPT).map((w) => ({ calibrated: w.calibrated })));
    show(answer);
    chart();
  } catch (error) {
    status.textContent = `not analysed: ${error.message}`;
    status.className = "warn";
    return;
  }
  try {
    const sound = new Reader(await decode(await file.arrayBuffer()), config.rate, config.channels);
    picture(sound.read(0, config.samples));
  } catch { // aatjax decodes more formats than browsers do
    text(box, "p", "No picture: this browser cannot decode the file.", "quiet");
  }
}

// One mark per window, with the probability of the file's top class as its opacity.
function strip(box, answer) {
  const best = answer.calibrated.indexOf(Math.max(...answer.calibrated));
  const bar = text(box, "div", "", "strip");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `${names[best]} over ${answer.windows.length} windows`);
  for (const w of answer.windows) {
    const mark = text(bar, "span", "");
    mark.style.flexGrow = w.end - w.start;
    mark.style.opacity = 0.08 + 0.92 * w.calibrated[best];
    mark.title = `${w.start.toFixed(1)} to ${w.end.toFixed(1)} s: ${percent(w.calibrated[best])}`;
  }
}

async function files(list) {
  for (const file of list) await open(file);
}

async function start() {
  if (location.protocol === "file:") {
    throw new Error("Browsers do not let a page opened as a file read its model. Run " +
      "`python -m http.server` in this folder and open http://localhost:8000");
  }
  config = await (await fetch("config.json")).json();
  names = config.classes.map(shown);
  $("title").textContent = document.title = shown(config.title);
  const seconds = config.samples / config.rate;
  const about = `${config.method}, ${names.length} classes, windows of ${seconds.toFixed(2)} s`;
  $("threshold").value = config.threshold;
  $("shown").textContent = Number(config.threshold).toFixed(2);
  const { open } = await import(config.backend === "onnx" ? "./onnx.js" : "./server.js");
  backend = await open(config, (progress) => { $("about").textContent = `${about}; ${progress}`; });
  $("about").textContent = about;
  $("record").disabled = $("file").disabled = false;
  $("record").addEventListener("click", record);
  $("file").addEventListener("change", () => { files([...$("file").files]); $("file").value = ""; });
  $("threshold").addEventListener("input", () => {
    $("shown").textContent = Number($("threshold").value).toFixed(2);
    if (last) show(last);
    chart();
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") files([...event.dataTransfer.files]);
    });
  }
  document.body.dataset.ready = "yes";
}

start().catch((error) => {
  $("title").textContent = "The model could not be loaded";
  problem(error);
});
