// Sends the microphone's samples to the page in blocks.
class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.held = [];
  }

  process([input]) {
    if (input.length) {
      this.held.push(...input[0]);
      if (this.held.length >= 1024) this.port.postMessage(Float32Array.from(this.held.splice(0)));
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
