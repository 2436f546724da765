"""The OpenAI-compatible server of ``sparse-runtime serve``; its libraries come with the extra [serve].

requests → a prompt (served_model) → one answer at a time (generation, answer) → responses.
"""
