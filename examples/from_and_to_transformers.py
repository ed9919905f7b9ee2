"""From a transformers model in memory to an adapter, and back to a folder for transformers."""

import torch
from transformers import ASTConfig, ASTForAudioClassification

import aatjax
from aatjax import data, petl
from aatjax.export import export

torch.manual_seed(0)
config = ASTConfig(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    intermediate_size=128,
    max_length=98,
)
source = ASTForAudioClassification(config)  # or .from_pretrained("MIT/ast-finetuned-audioset-...")
base = aatjax.load(source, num_classes=3)

sounds = data.Synthetic(("frog", "rain", "siren"), clips=4, seconds=1.0)
run = aatjax.fit(aatjax.adapt(base, petl.LoRA(rank=2)), sounds, epochs=2, lr=3e-3, show=False)
run.save("lora.safetensors")

export(aatjax.load_adapter("lora.safetensors", base=base), "hf", "lora-hf")
model = ASTForAudioClassification.from_pretrained("lora-hf")
print(type(model).__name__, model.config.id2label)
