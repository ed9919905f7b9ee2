"""One module a verb of the command line; each is run by its `main(arguments)`."""

VERBS = {
    "adapt": "one command from a folder of sounds to an adapter, a report and what to mend",
    "train": "adapt a pretrained AST to sounds and evaluate it",
    "eval": "metrics of an adapter on labelled sounds",
    "predict": "what an adapter hears in sound files",
    "convert": "read any published weights, write aatjax, Hugging Face or Orbax files",
    "export": "an adapter as Hugging Face, PEFT, ONNX, StableHLO or plain weights, checked first",
    "verify": "whether an adapter or an export still computes what it did when it was written",
    "demo": "a page to try an adapter on microphone and files, on this machine",
    "serve": "many adapters on one backbone behind HTTP, their requests batched together",
    "prepare": "make a benchmark of the papers ready, from its official archive or folder",
    "doctor": "what is wrong with a set of sounds: files, labels, leaks, copies; before training",
    "report": "everything about a trained adapter in one HTML file",
    "recipes": "the papers' benchmarks with the papers' methods: settings, figures, commands",
    "plan": "whether a config's step fits a chip or a pod, and what it moves; without the chip",
    "bench": "FLOPs and time of the methods, and of Soft-MoA against Dense-MoA as they grow",
    "compare": "methods side by side on one data set: tables, pictures, significance",
    "chaos": "kill a small run again and again on your own disk, resume, compare bit for bit",
    "summary": "what a config trains and what it leaves frozen",
    "methods": "what each adaptation method trains and costs, as a table",
}
