// From logits to calibrated probabilities and decisions, as aatjax.inference.calibration has them.

export function probabilities(logits, temperature, multiLabel) {
  const scaled = Array.from(logits, (x) => x / temperature);
  if (multiLabel) return scaled.map((x) => 1 / (1 + Math.exp(-x)));
  const top = Math.max(...scaled);
  const parts = scaled.map((x) => Math.exp(x - top));
  const sum = parts.reduce((a, b) => a + b, 0);
  return parts.map((x) => x / sum);
}

// Which classes are given, and which are possible (null where nothing was tuned).
export function decide(calibrated, plain, config) {
  const tuned = config.calibration;
  const best = calibrated.indexOf(Math.max(...calibrated));
  const thresholds = tuned && tuned.thresholds;
  const given = calibrated.map((p, i) => (thresholds ? p >= thresholds[i] : i === best));
  const possible = tuned && plain.map((p, i) => given[i] || 1 - p <= tuned.quantile);
  return { calibrated, given, possible };
}

// The mean over windows by their length, and what is decided on it.
export function summary(windows, config) {
  const whole = windows.reduce((sum, w) => sum + w.end - w.start, 0);
  const mean = (key) => config.classes.map((_, i) =>
    windows.reduce((sum, w) => sum + w[key][i] * (w.end - w.start), 0) / whole);
  return decide(mean("calibrated"), mean("plain"), config);
}
