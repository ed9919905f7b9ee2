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

// The mean over windows weighted by their length, and its prediction sets.
export function summary(windows, config) {
  const whole = windows.reduce((sum, w) => sum + w.end - w.start, 0);
  const mean = (key) => config.classes.map((_, i) =>
    windows.reduce((sum, w) => sum + w[key][i] * (w.end - w.start), 0) / whole);
  return decide(mean("calibrated"), mean("plain"), config);
}
