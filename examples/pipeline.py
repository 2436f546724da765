"""A transformers pipeline with a sparse model.

python examples/pipeline.py MODEL CLUSTERS
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from sparse_runtime import cost_report, sparsify


def main(name: str, clusters: str) -> None:
    """Answer a question, and print what it took."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(name)
    sparsify(model, clusters)
    answer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (result,) = answer(question, max_new_tokens=24, do_sample=False)
    print(result["generated_text"][-1]["content"])
    print(cost_report(model))


if __name__ == "__main__":
    main(*sys.argv[1:])
