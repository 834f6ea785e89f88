"""Log-probs and entropies from a transformers model without logits: padded rows, then the same rows packed.

python examples/transformers_fused.py
python examples/transformers_fused.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse

import torch
from toy import tiny_model
from transformers import AutoModelForCausalLM

import qempo_fast as qf
from qempo_fast.integrations.hf import fused_forward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model of the hub or a folder; a tiny one is made here without it")
    name = parser.parse_args().model
    model = AutoModelForCausalLM.from_pretrained(name) if name else tiny_model()
    rows = [torch.randint(model.config.vocab_size, (n,)) for n in (5, 9, 7)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(9) < torch.tensor([[5], [9], [7]])
    labels = ids.masked_fill(~mask, -100)

    logits = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1].float(), -1)
    plain = (logits.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)

    with fused_forward(model, entropy=True):
        padded = model(input_ids=ids, attention_mask=mask, labels=labels)
        cu_seqlens = torch.tensor([0, 5, 14, 21])
        packed = torch.cat(rows)[None]
        out = model(input_ids=packed, labels=packed, cu_seqlens=cu_seqlens)
        packed_logps = qf.segment_sum(out.logps[0], cu_seqlens)
        padded.loss.backward()

    torch.testing.assert_close(padded.logps.sum(1), plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(packed_logps, plain, rtol=1e-3, atol=1e-3)
    entropy = float(padded.entropy.detach().sum() / (labels[:, 1:] != -100).sum())
    print(f"log-probs of three sequences: {[round(x, 2) for x in plain.tolist()]}; mean entropy {entropy:.2f} nats")
    print("the same from logits, from padded rows and from one packed row")


if __name__ == "__main__":
    main()
