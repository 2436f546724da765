"""A LoRA adapter, merged into the weights that are read in part.

python examples/lora.py MODEL CLUSTERS ADAPTER

The clusters may be those of the model without the adapter: `check_fingerprint=False` lets them through,
and `sparse-runtime eval` tells what that costs. Clusters built for the merged model need no such leave.
"""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_runtime import cost_report, sparsify


def main(name: str, clusters: str, adapter: str) -> None:
    """Continue a text by the merged model, and print what it took."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    model = PeftModel.from_pretrained(
        model, adapter
    ).merge_and_unload()  # first merge, then sparsify
    sparsify(model, clusters, check_fingerprint=False)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))
    print(cost_report(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
