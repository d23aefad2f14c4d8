"""What several test files share: the scripts on the path, and a model small enough to be trained in seconds."""

import os
import random
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sum_demonstrations(count: int, seed: int = 0) -> list[dict]:
    """Rows {id, problem, solution, answer} of one-digit sums that the tiny model has a notion of."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        a, b = rng.randrange(5), rng.randrange(5)
        solution = f"We start from {a} and add {b}. So {a}+{b}={a + b}. Hence \\boxed{{{a + b}}}"
        rows.append(dict(id=f"s{i}", problem=f"Add {a} and {b}.", solution=solution, answer=str(a + b)))
    return rows


@pytest.fixture(autouse=True)
def no_process_group():
    """Scripts that ran in this process leave neither a process group nor the variables that they set behind."""
    yield
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a Qwen3 (2 layers, hidden 64) with its own byte-level BPE, trained for a few seconds to answer
    one-digit sums in the right form ("2+3=5. \\boxed{5}", then the stop token), with results that are often wrong."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    import reward
    import sft

    folder = tmp_path_factory.mktemp("models") / "tiny"
    rows = sum_demonstrations(200)
    texts = [reward.map_prompt(row["problem"], row["solution"]) for row in rows] + [reward.solve_prompt("Add")]
    bpe = ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    bpe.train_from_iterator(texts, vocab_size=400, min_frequency=2, special_tokens=special, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 5,  # rows behind the tokenizer's last id, as Qwen's have
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM has a CPU kernel for
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=reward.stop_id(tokenizer),
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(120):
        batch = []
        for row in rng.sample(rows, 32):
            a, b = row["problem"][4], row["problem"][10]
            c = int(row["answer"]) + rng.choice((0, 0, 0, 1))
            ask = rng.choice((reward.solve_prompt(row["problem"]), reward.map_prompt(row["problem"], row["solution"])))
            answer = f"{a}+{b}={c}. \\boxed{{{c}}}"
            batch.append((reward.prompt_ids(tokenizer, ask), reward.response_ids(tokenizer, answer)))
        ids, mask = sft.collate(batch, "cpu")
        labels = ids.masked_fill(~mask, -100)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.generation_config.eos_token_id = reward.stop_id(tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
