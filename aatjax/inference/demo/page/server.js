// Answers of `aatjax demo` on this machine, by the server's route for predictions.

const ROUTE = "v1/adapters/demo/predict?partial=true&detail=true";

// Mono int16 samples as a WAV file. Where the model reads channel n, all channels up to it are equal.
export function wav(samples, rate, channels) {
  const count = Number.isInteger(channels) ? channels + 1 : 1;
  const size = 2 * count * samples.length;
  const view = new DataView(new ArrayBuffer(44 + size));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + size, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, count, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * count * rate, true);
  view.setUint16(32, 2 * count, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, size, true);
  samples.forEach((x, i) => {
    for (let k = 0; k < count; k++) view.setInt16(44 + 2 * (i * count + k), x, true);
  });
  return view.buffer;
}

// An answer of the server in the form that the page draws: lists in the order of the classes.
export function readAnswer(answer, classes) {
  const given = answer.given ?? [answer.label];
  const list = (probabilities) => classes.map((name) => (probabilities ? probabilities[name] : 0));
  return {
    calibrated: list(answer.probabilities),
    given: classes.map((name) => given.includes(name)),
    possible: answer.possible && !answer.reason ? classes.map((name) => answer.possible.includes(name)) : null,
    windows: answer.windows.map((w) => ({ ...w, calibrated: list(w.probabilities) })),
    note: answer.note ?? (answer.notes ?? []).filter((note) => note !== answer.reason).join(", "),
    reason: answer.reason,
  };
}

// Waits until the server has compiled the model; `report` gets its progress in words.
async function ready(report) {
  for (;;) {
    const response = await fetch("readyz");
    const answer = await response.json();
    if (response.ok) return;
    if (response.status !== 503) throw new Error(answer.error);
    report(answer.error);
    await new Promise((done) => setTimeout(done, 500));
  }
}

export async function open(config, report) {
  await ready(report);
  async function ask(body) {
    const response = await fetch(ROUTE, {
      method: "POST", body, headers: { "Content-Type": "application/octet-stream" },
    });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return readAnswer(answer, config.classes);
  }
  return { window: (samples) => ask(wav(samples, config.rate, config.channels)), file: ask };
}
