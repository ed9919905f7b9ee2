// Resampling with a filter as steep as that of aatjax's decoder. Browsers' own resamplers roll off
// earlier, which changes the predictions for noise-like sounds.

const HALF = 93; // half the filter's length, in samples of the lower rate
const EDGE = 0.956; // middle of the slope, relative to half the lower rate
const BETA = 12.8; // of the Kaiser window: 125 dB

function bessel(x) {
  let sum = 1, term = 1;
  for (let k = 1; term > 1e-12 * sum; k++) sum += (term *= (x / (2 * k)) ** 2);
  return sum;
}

const gcd = (a, b) => (b ? gcd(b, a % b) : a);

// The filter's weights per phase: position of an output between two inputs.
function weights(from, to, up, reach) {
  const share = (EDGE * Math.min(from, to)) / from;
  const scale = bessel(BETA);
  return Array.from({ length: up }, (_, p) => Float64Array.from({ length: 2 * reach }, (_, k) => {
    const t = k + 1 - reach - p / up;
    const inside = 1 - (t / reach) ** 2;
    if (inside <= 0) return 0;
    const sinc = t ? Math.sin(Math.PI * share * t) / (Math.PI * t) : share;
    return (sinc * bessel(BETA * Math.sqrt(inside))) / scale;
  }));
}

// Resamples a stream: push a block at `from` Hz, get the samples at `to` Hz known so far.
export class Resampler {
  constructor(from, to) {
    const common = gcd(from, to);
    this.up = to / common;
    this.down = from / common;
    this.reach = Math.ceil((HALF * from) / Math.min(from, to));
    this.same = from === to;
    this.weights = this.same ? [] : weights(from, to, this.up, this.reach);
    this.held = new Float32Array(this.reach); // silence before the first sample
    this.first = -this.reach;
    this.given = 0;
  }

  // The samples at `to` Hz of a whole sound of `samples` at `from` Hz.
  count(samples) {
    return this.same ? samples : Math.max(1, Math.round((samples * this.up) / this.down));
  }

  push(block) {
    if (this.same) return block;
    const input = new Float32Array(this.held.length + block.length);
    input.set(this.held);
    input.set(block, this.held.length);
    const found = [];
    let start;
    for (;;) {
      const place = this.given * this.down;
      start = Math.floor(place / this.up) + 1 - this.reach - this.first;
      if (start + 2 * this.reach > input.length) break;
      const filter = this.weights[place % this.up];
      let sum = 0;
      for (let k = 0; k < filter.length; k++) sum += filter[k] * input[start + k];
      found.push(sum);
      this.given++;
    }
    const past = Math.min(start, input.length);
    this.held = input.slice(past);
    this.first += past;
    return Float32Array.from(found);
  }
}

const ANY = 48000;
const text = (bytes, at, size) => String.fromCharCode(...bytes.subarray(at, at + size));

// The sampling rate in a file's header, at which it is decoded unchanged; else 48000.
export function rateOf(buffer) {
  const bytes = new Uint8Array(buffer), view = new DataView(buffer);
  const found = headerRate(bytes, view);
  return found >= 8000 && found <= 96000 ? found : ANY;
}

function headerRate(bytes, view) {
  if (bytes.length < 64) return ANY;
  if (text(bytes, 0, 4) === "RIFF") {
    for (let at = 12; at + 16 < bytes.length; at += 8 + view.getUint32(at + 4, true)) {
      if (text(bytes, at, 4) === "fmt ") return view.getUint32(at + 12, true);
    }
  }
  if (text(bytes, 0, 4) === "fLaC") return view.getUint32(18) >>> 12;
  if (text(bytes, 29, 6) === "vorbis") return view.getUint32(40, true);
  let at = 0;
  if (text(bytes, 0, 3) === "ID3") {
    at = 10 + [6, 7, 8, 9].reduce((size, i) => (size << 7) | bytes[i], 0);
  }
  if (at + 4 < bytes.length && bytes[at] === 255 && bytes[at + 1] >= 0xe0) { // MPEG audio
    const version = (bytes[at + 1] >> 3) & 3;
    return [44100, 48000, 32000][(bytes[at + 2] >> 2) & 3] / { 3: 1, 2: 2, 0: 4 }[version];
  }
  return ANY;
}
