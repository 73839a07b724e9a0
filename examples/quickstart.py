"""The README's example: prefill and greedy decode on two ranks, with one copy of the weights.

torchrun --nproc-per-node 2 examples/quickstart.py
"""

import os

import torch

from rolemesh.compiler.models.cases import load_case

case = load_case("hf:llama")  # an unmodified transformers model, small, with a StaticCache
options = {"role": "pd_mixed", "mesh": {"tp": 2}}
model = torch.compile(case.model, backend="rolemesh", options=options)

(prompt,), state = case.phases["prefill"]
tokens = prompt
with torch.no_grad():
    for _ in range(6):
        tokens = model(tokens, **state).logits[:, -1:].argmax(-1)  # the first call is a prefill
        if os.environ["RANK"] == "0":
            print(tokens.flatten().tolist(), flush=True)
