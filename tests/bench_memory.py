"""Peak memory of one update (forward and backward) against its tokens: the chunked head beside whole logits.

Each figure is taken in a fresh process: the peak during the second update less what stood before it (weights, gradients
and optimizer state, which the first one made). On a CPU it is the resident set, whose highest mark (VmHWM) the kernel
keeps and resets on demand; on a GPU it is the allocator's peak. The slope is the least-squares line through the token
counts, so that what does not grow with them (an fp32 copy of the head, its gradient, a chunk of logits) drops out.
Takes a few minutes on two cores and 6 GiB for the whole logits.

    python tests/bench_memory.py        # exits 1 unless the slope at ~150k columns is at most 1.5 times that at ~8k
"""

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

VOCABULARIES = (8_192, 151_936)
TOKENS = (512, 1024, 2048)
ROW = 256  # tokens in a row


def measure(head: str, vocabulary: int, tokens: int) -> int:
    """Bytes that an update of `tokens` tokens takes beyond what the first, tiny one has left behind."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import sft

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    def update(rows: int) -> None:
        input_ids = torch.randint(0, vocabulary, (rows, ROW), device=device)
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        mask[:, 0] = False
        if head == "chunked":
            logprobs, _ = sft.token_logprobs(model, input_ids, mask)
        else:
            logits = model(input_ids).logits[:, :-1].float()
            logprobs = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
        (-logprobs.mean()).backward()

    update(1)
    optimizer.step()  # gradients stay allocated: the next update adds to them
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        update(tokens // ROW)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew at the present size
    before = resident("VmRSS")
    update(tokens // ROW)
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its highest."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def slope(ys: list[int]) -> float:
    """Bytes a token: least squares through (TOKENS, ys)."""
    mean_x, mean_y = sum(TOKENS) / len(TOKENS), sum(ys) / len(ys)
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(TOKENS, ys)) / sum((x - mean_x) ** 2 for x in TOKENS)


def main() -> None:
    # without this glibc keeps freed blocks, and what was freed would count as used
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("MiB beyond weights, gradients and optimizer state")
    print("head     vocabulary" + "".join(f"{n:>9} tok" for n in TOKENS) + "   KiB/token")
    slopes = {}
    for head in ("chunked", "whole"):
        for vocabulary in VOCABULARIES:
            peaks = []
            for tokens in TOKENS:
                command = [sys.executable, __file__, head, str(vocabulary), str(tokens)]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:  # the kernel kills what does not fit
                    print(f"{head} {vocabulary} {tokens}: exit {done.returncode} {done.stderr[-300:]}")
                    peaks = []
                    break
                peaks.append(json.loads(done.stdout))
            if peaks:
                slopes[head, vocabulary] = slope(peaks)
                line = f"{head:<8}{vocabulary:>11}" + "".join(f"{peak / 2**20:>13.1f}" for peak in peaks)
                print(line + f"{slopes[head, vocabulary] / 1024:>12.1f}", flush=True)
    small, large = (slopes["chunked", vocabulary] for vocabulary in VOCABULARIES)
    print(
        f"chunked: slope at {VOCABULARIES[1]} columns / slope at {VOCABULARIES[0]} = {large / small:.2f} (at most 1.5)"
    )
    if large > 1.5 * small:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        main()
