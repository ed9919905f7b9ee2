// From logits to calibrated probabilities and prediction sets, as in aatjax.inference.calibration.

export function probabilities(logits, temperature, multiLabel) {
  const scaled = Array.from(logits, (x) => x / temperature);
  if (multiLabel) return scaled.map((x) => 1 / (1 + Math.exp(-x)));
  const top = Math.max(...scaled);
  const parts = scaled.map((x) => Math.exp(x - top));
  const sum = parts.reduce((a, b) => a + b, 0);
  return parts.map((x) => x / sum);
}

// The given classes and the possible ones (null without calibration).
export function decide(calibrated, plain, config) {
  const { calibration } = config;
  const best = calibrated.indexOf(Math.max(...calibrated));
  const thresholds = calibration && calibration.thresholds;
  const given = calibrated.map((p, i) => (thresholds ? p >= thresholds[i] : i === best));
  const possible = calibration && plain.map((p, i) => given[i] || 1 - p <= calibration.quantile);
  return { calibrated, given, possible };
}

const FRAME = 400; // samples: a file of one frame or less has no class
const SILENCE = 2; // range of int16 samples up to which they hold no sound

export function isSilent(samples) {
  let low = Infinity, high = -Infinity;
  for (const x of samples) { low = Math.min(low, x); high = Math.max(high, x); }
  return !(high - low > SILENCE);
}

// The starts of the windows of a file, as in aatjax.audio.windows.
export function starts(samples, size, step) {
  const found = [0];
  for (let s = step; s - step + size < samples && s + FRAME <= samples; s += step) found.push(s);
  return found;
}

// The logits of a file from those of its windows with sound, as in aatjax.audio.scoring.
export function pool(windows, { scoring, multi_label: several }) {
  if (scoring.pooling === "first" || windows.length === 1) return windows[0].logits;
  const lengths = windows.map((w) => w.end - w.start), longest = Math.max(...lengths);
  const p = windows.map((w) => probabilities(w.logits, 1, several));
  return windows[0].logits.map((_, i) => {
    let yes = 0, no = 0;
    if (scoring.pooling === "max") {
      yes = Math.max(...p.filter((_, w) => lengths[w] >= 0.5 * longest).map((row) => row[i]));
      no = 1 - yes;
    } else {
      const sharpness = scoring.pooling === "attention" ? scoring.sharpness : 0;
      p.forEach((row, w) => {
        const weight = lengths[w] * Math.exp(sharpness * (row[i] - 1));
        yes += weight * row[i];
        no += weight * (1 - row[i]);
      });
      const total = yes + no;
      [yes, no] = [yes / total, no / total];
    }
    return several ? Math.log(yes) - Math.log(no) : Math.log(yes);
  });
}

// What is said of logits: of a window, or pooled of a file.
export function answer(logits, config) {
  const temperature = config.calibration ? config.calibration.temperature : 1;
  const several = config.multi_label;
  return decide(probabilities(logits, temperature, several), probabilities(logits, 1, several), config);
}

// A sound that has no class, and why.
export function unscored(reason, config) {
  const none = (value) => config.classes.map(() => value);
  return { calibrated: none(0), given: none(false), possible: null, reason };
}

// The answer for a file of `samples` samples from its windows.
export function summary(windows, samples, config) {
  const sounding = windows.filter((w) => !w.silent);
  if (!sounding.length) return unscored("silent", config);
  if (samples <= FRAME) return unscored("too short: 25 ms or less", config);
  return answer(pool(sounding, config), config);
}
