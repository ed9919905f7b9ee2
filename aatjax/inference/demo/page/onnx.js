// Answers of the ONNX model beside this page, by onnxruntime-web, without a server.
import * as ort from "./runtime/ort.wasm.min.mjs";
import { answer, isSilent, starts, summary, unscored } from "./decide.js";
import { Reader, decode } from "./sound.js";

export async function open(config) {
  ort.env.wasm.wasmPaths = new URL("runtime/", location.href).href;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
  const session = await ort.InferenceSession.create("waveform.onnx", {
    executionProviders: ["wasm"],
    externalData: [{ path: "weights.data", data: "weights.data" }],
  });
  const temperature = config.calibration ? config.calibration.temperature : 1;

  // Samples are int16; a short window is padded as the front end pads it.
  async function run(samples) {
    const waveform = new Float32Array(config.samples);
    let length = Math.max(samples.length, 400);
    if (config.pad === "repeat") {
      length = config.samples;
      for (let i = 0; i < length; i++) waveform[i] = samples[i % samples.length] / 32768;
    } else {
      samples.forEach((x, i) => { waveform[i] = x / 32768; });
    }
    const inputs = {
      waveform: new ort.Tensor("float32", waveform, [1, config.samples]),
      length: new ort.Tensor("int64", [BigInt(length)], [1]),
    };
    const { logits } = await session.run(inputs);
    return Array.from(logits.data, (x) => x * temperature); // it is in the head's weights
  }

  return {
    async window(samples) {
      return isSilent(samples) ? unscored("silent", config) : answer(await run(samples), config);
    },
    async file(file) {
      const sound = new Reader(await decode(await file.arrayBuffer()), config.rate, config.channels);
      const windows = [];
      const step = config.scoring.hop ? Math.round(config.scoring.hop * config.rate) : config.samples;
      for (const start of starts(sound.samples, config.samples, step)) {
        const part = sound.read(start, config.samples);
        const logits = await run(part);
        const end = (start + part.length) / config.rate;
        const { calibrated } = answer(logits, config);
        windows.push({ start: start / config.rate, end, logits, calibrated, silent: isSilent(part) });
        await new Promise((done) => setTimeout(done)); // the page stays usable between windows
      }
      return { ...summary(windows, sound.samples, config), windows };
    },
  };
}
