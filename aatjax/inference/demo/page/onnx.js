// Answers of the ONNX model beside this page, by onnxruntime-web, without a server.
import * as ort from "./runtime/ort.wasm.min.mjs";
import { decide, probabilities, summary } from "./decide.js";
import { decode } from "./sound.js";

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
    return {
      calibrated: probabilities(logits.data, temperature, config.multi_label),
      plain: probabilities(logits.data, 1, config.multi_label),
    };
  }

  return {
    async window(samples) {
      const { calibrated, plain } = await run(samples);
      return decide(calibrated, plain, config);
    },
    async file(file) {
      const samples = await decode(await file.arrayBuffer(), config.rate, config.channels);
      const windows = [];
      for (let start = 0; start < samples.length; start += config.samples) {
        const end = Math.min(start + config.samples, samples.length);
        const found = await run(samples.subarray(start, end));
        windows.push({ start: start / config.rate, end: end / config.rate, ...found });
      }
      return { ...summary(windows, config), windows };
    },
  };
}
