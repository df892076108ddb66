"""What the words of tables and pages mean, in one sentence each; ``docs/glossary.md`` has all of them."""

from __future__ import annotations

WORDS: dict[str, str] = {
    "keep/pruned": "share of visual tokens kept, and its complement",
    "static": "bytes allocated once the model is loaded and warmed up: weights, buffers, workspaces",
    "dynamic peak": "the highest allocated bytes of any instant, less static",
    "saved": "change of the dynamic peak against Baseline, over the samples that both finished",
    "KV cache": "the most that the cache held when a token was done; at the peak it may be less, or more",
    "reserved": "what the caching allocator took from the driver: static, dynamic and cached",
    "total": "static, dynamic, cached and the CUDA context: what nvidia-smi shows of the process",
    "FLOPs cut": "share of the language model's work on visual tokens that the method removes",
    "score %": "the task's own score, mean over samples",
    "same tokens %": "tokens of the answer that are the unpruned model's",
    "same answers %": "answers that are the unpruned model's, word for word",
    "KL, nats": "how far the next token's distribution lies from the unpruned model's",
}
