// Sound in the browser: files, microphone, log-mel spectrogram.
import { Resampler, rateOf } from "./resample.js";

export function toInt16(samples) {
  return Int16Array.from(samples, (x) => Math.max(-32768, Math.min(32767, Math.round(x * 32768))));
}

// One channel of several: the mean, the left one, or the one of an index.
function downmix(channels, rule) {
  if (rule !== "mean") {
    const index = rule === "left" ? 0 : rule;
    if (!channels[index]) throw new Error(`the file has no channel ${index}`);
    return channels[index];
  }
  const mono = new Float32Array(channels[0].length);
  for (const channel of channels) channel.forEach((x, i) => { mono[i] += x / channels.length; });
  return mono;
}

// The channels of a sound file and their rate; the browser decodes it in a thread of its own.
export async function decode(bytes) {
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, rateOf(bytes)).decodeAudioData(bytes);
  } catch {
    throw new Error("this browser cannot decode the file as sound");
  }
  if (!buffer.length) throw new Error("the file has no samples");
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
  return { channels, rate: buffer.sampleRate };
}

const BLOCK = 32768; // samples that are resampled at a time

// Reads a decoded sound from its start on, as mono int16 at `rate`; `which` channel is "mean",
// "left" or an index. Only what is read is resampled: a whole long file would freeze the page.
export class Reader {
  constructor(sound, rate, which) {
    this.channels = sound.channels;
    this.which = which;
    this.filter = new Resampler(sound.rate, rate);
    this.samples = this.filter.count(sound.channels[0].length);
    this.taken = 0; // of the channels
    this.first = 0; // place of the first sample in `held`
    this.held = new Int16Array(0);
  }

  // Up to `size` samples from `start` on, which never lies before that of the last call.
  read(start, size) {
    const parts = [this.held];
    let end = this.first + this.held.length;
    while (end < Math.min(start + size, this.samples)) {
      parts.push(this.next());
      end += parts.at(-1).length;
    }
    const skipped = start - this.first, joined = new Int16Array(end - this.first);
    let at = 0;
    for (const part of parts) { joined.set(part, at); at += part.length; }
    this.held = joined.slice(skipped);
    this.first = start;
    return this.held.slice(0, Math.max(0, Math.min(size, this.samples - start)));
  }

  next() {
    const from = this.taken, to = from + BLOCK;
    this.taken = to;
    if (from >= this.channels[0].length) return toInt16(this.filter.push(new Float32Array(BLOCK)));
    return toInt16(this.filter.push(downmix(this.channels.map((c) => c.subarray(from, to)), this.which)));
  }
}

// The microphone's last `size` samples at `rate`, until stopped.
export async function microphone(rate, size) {
  if (!navigator.mediaDevices) throw new Error("the microphone needs https or localhost");
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
  });
  const context = new AudioContext(); // at the device's own rate: see resample.js
  await context.audioWorklet.addModule("recorder.js");
  const source = context.createMediaStreamSource(stream);
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 });
  const filter = new Resampler(context.sampleRate, rate);
  const ring = new Float32Array(size);
  let received = 0;
  node.port.onmessage = ({ data }) => {
    const found = filter.push(data);
    const block = found.subarray(Math.max(0, found.length - size));
    ring.copyWithin(0, block.length);
    ring.set(block, size - block.length);
    received += found.length;
  };
  source.connect(node);
  return {
    get seconds() { return received / rate; },
    latest() { return toInt16(ring.subarray(Math.max(0, size - received))); },
    stop() {
      stream.getTracks().forEach((track) => track.stop());
      context.close();
    },
  };
}

const FRAME = 400, HOP = 160, FFT = 512;
const mel = (hertz) => 1127 * Math.log(1 + hertz / 700);

function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i++) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) [re[i], re[j], im[i], im[j]] = [re[j], re[i], im[j], im[i]];
  }
  for (let size = 2; size <= n; size <<= 1) {
    for (let k = 0; k < size / 2; k++) {
      const c = Math.cos((-2 * Math.PI * k) / size), s = Math.sin((-2 * Math.PI * k) / size);
      for (let a = k; a < n; a += size) {
        const b = a + size / 2;
        const x = re[b] * c - im[b] * s, y = re[b] * s + im[b] * c;
        re[b] = re[a] - x; im[b] = im[a] - y;
        re[a] += x; im[a] += y;
      }
    }
  }
}

// Log-mel frames of int16 samples for the spectrogram: Kaldi's filterbank, as in the front end.
export function logMel(samples, rate, mels) {
  const low = mel(20), step = (mel(rate / 2) - low) / (mels + 1);
  const window = Array.from({ length: FRAME }, (_, i) => 0.5 - 0.5 * Math.cos((2 * Math.PI * i) / (FRAME - 1)));
  const frames = [];
  for (let start = 0; start + FRAME <= samples.length; start += HOP) {
    const re = new Float64Array(FFT), im = new Float64Array(FFT);
    let mean = 0;
    for (let i = 0; i < FRAME; i++) mean += samples[start + i] / 32768 / FRAME;
    for (let i = FRAME - 1; i >= 0; i--) {
      const before = samples[start + Math.max(0, i - 1)] / 32768 - mean;
      re[i] = (samples[start + i] / 32768 - mean - 0.97 * before) * window[i];
    }
    fft(re, im);
    const row = new Float64Array(mels);
    for (let k = 0; k < FFT / 2; k++) {
      const power = re[k] * re[k] + im[k] * im[k];
      const place = (mel((k * rate) / FFT) - low) / step;
      const below = Math.floor(place);
      if (below >= 1 && below <= mels) row[below - 1] += power * (below + 1 - place);
      if (below >= 0 && below < mels) row[below] += power * (place - below);
    }
    frames.push(row.map((x) => Math.log(Math.max(x, 1.1920929e-7))));
  }
  return frames;
}
