"""Make the embedded base model: generate text, train a tokenizer and a small GPT-2 on it, save a Hugging Face folder.

    python -m trainer.model.demo.pretrain --out trainer/model/demo

The folder that the project ships was made by this script; its README.md says with which options. A GPU takes minutes;
on a CPU a shorter run (--steps 3200 --batch 8 --tokens 6000000 --lr 3e-3) takes about an hour of one core. The text
depends on --seed and --tokens only, the tokenizer on --seed; the weights also, in the last digits, on the hardware.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from trainer.data.demo_base_text import documents

EOS_TOKEN = "<|endoftext|>"
BLOCK_SIZE = 256  # tokens of one training row, and positions of the model
VOCAB_SIZE = 2048
SHARD_TOKENS = 500_000  # tokens made from one seed; fixed, so that the text does not depend on the number of cores
VAL_BLOCKS = 128
MAX_FOLDER_BYTES = 4_000_000  # of the saved folder, as it is part of the repository


def parse_args() -> argparse.Namespace:
    """The options of this script."""
    title = "Make the embedded base model: text, tokenizer, weights."
    parser = argparse.ArgumentParser(description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; files of the same names are replaced")
    parser.add_argument("--steps", type=int, default=8000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help=f"rows of {BLOCK_SIZE} tokens per step")
    parser.add_argument("--tokens", type=int, default=60_000_000, help="tokens of text; rows start anywhere in it")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak; warm-up over 1/20 of the steps, then a cosine")
    parser.add_argument("--seed", type=int, default=1, help="of text, weights and order")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    return parser.parse_args()


def train_tokenizer(seed: int, num_documents: int = 60_000) -> Tokenizer:
    """A byte-level BPE as GPT-2's, learnt from `num_documents` documents; its first entry is the end of text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # all 256 bytes, so that any text can be encoded
    bpe_trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS_TOKEN], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed), num_documents), bpe_trainer)
    return tokenizer


def make_shard(job: tuple[str, int, int]) -> np.ndarray:
    """(tokenizer as JSON, seed, tokens) -> uint16 [tokens]: documents, each followed by the end of text."""
    tokenizer_json, seed, num_tokens = job
    tokenizer, stream = Tokenizer.from_str(tokenizer_json), documents(seed)
    ids: list[int] = []
    while len(ids) < num_tokens:
        for encoding in tokenizer.encode_batch(list(itertools.islice(stream, 500))):
            ids += [*encoding.ids, 0]
    return np.array(ids[:num_tokens], dtype=np.uint16)


def make_tokens(tokenizer: Tokenizer, seed: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation tokens, uint16 [tokens] and [VAL_BLOCKS * BLOCK_SIZE], made on all cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes below are the parallelism
    tokenizer_json, first_seed = tokenizer.to_str(), 1_000_000 * (seed + 1)
    jobs = [(tokenizer_json, first_seed, VAL_BLOCKS * BLOCK_SIZE)]
    jobs += [
        (tokenizer_json, first_seed + 1 + i, min(SHARD_TOKENS, num_tokens - i * SHARD_TOKENS))
        for i in range(math.ceil(num_tokens / SHARD_TOKENS))
    ]
    with multiprocessing.get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        val, *train = pool.map(make_shard, jobs, chunksize=1)
    return np.concatenate(train), val


def build_model(seed: int) -> transformers.GPT2LMHeadModel:
    """About 1.9 million weights in fp32; trained without dropout, as no row comes often, but saved with GPT-2's 0.1."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=BLOCK_SIZE,
        n_embd=160,
        n_layer=5,
        n_head=5,
        bos_token_id=0,
        eos_token_id=0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        activation_function="gelu_pytorch_tanh",  # the same function as GPT-2's gelu_new, in one kernel
    )
    return transformers.GPT2LMHeadModel(config)


def compute_loss(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of input_ids [batch, BLOCK_SIZE], in nats per token; bf16 arithmetic on a GPU."""
    with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=input_ids.device.type == "cuda"):
        logits = model(input_ids).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())


def mean_loss(model: torch.nn.Module, rows: torch.Tensor, batch_size: int = 32) -> float:
    """The loss over all rows."""
    model.eval()
    with torch.no_grad():
        losses = [compute_loss(model, chunk).item() * len(chunk) for chunk in rows.split(batch_size)]
    model.train()
    return sum(losses) / len(rows)


def learning_rate(step: int, num_steps: int, peak_lr: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to zero."""
    warmup = max(1, num_steps // 20)
    if step < warmup:
        return peak_lr * (step + 1) / warmup
    return peak_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def fit(
    model: torch.nn.Module, train: np.ndarray, val: np.ndarray, options: argparse.Namespace, device: str
) -> dict[str, float]:
    """Train in place on `device`; returns the loss of the last twentieth of the steps, validation loss and seconds."""
    model.to(device).train()
    stream = torch.from_numpy(train.astype(np.int32)).to(device)
    val_rows = torch.from_numpy(val.astype(np.int64)).view(-1, BLOCK_SIZE).to(device)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    param_groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(param_groups, lr=options.lr, betas=(0.9, 0.95), fused=device == "cuda")
    generator = torch.Generator(device).manual_seed(options.seed)
    offsets = torch.arange(BLOCK_SIZE, device=device)
    losses = torch.zeros(options.steps, device=device)  # read late, so that a GPU never waits; one tensor, because a
    start_seconds = time.time()  # small one kept from each step would fragment the heap between the large ones that go
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.lr)
        starts = torch.randint(len(stream) - BLOCK_SIZE, (options.batch, 1), generator=generator, device=device)
        loss = compute_loss(model, stream[starts + offsets].long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses[step] = loss.detach()
        if (step + 1) % max(1, options.steps // 10) == 0:
            losses_text = f"train {losses[step].item():.4f}  val {mean_loss(model, val_rows):.4f}"
            print(f"step {step + 1}/{options.steps}  {losses_text}  {time.time() - start_seconds:.0f} s", flush=True)
    final_train_loss = losses[-max(1, options.steps // 20) :].mean().item()
    return {"train": final_train_loss, "val": mean_loss(model, val_rows), "seconds": time.time() - start_seconds}


def save(model: transformers.GPT2LMHeadModel, tokenizer: Tokenizer, output_dir: Path) -> None:
    """Write model (float16, to stay small) and tokenizer, as `from_pretrained` reads them."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        setattr(model.config, name, 0.1)
    model.config.use_cache, model.config.activation_function = True, "gelu_new"
    model.cpu().half().save_pretrained(output_dir)
    special_tokens = {"bos_token": EOS_TOKEN, "eos_token": EOS_TOKEN, "unk_token": EOS_TOKEN}
    hf_tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=BLOCK_SIZE, **special_tokens
    )
    hf_tokenizer.save_pretrained(output_dir)
    # not indented, which takes half
    (output_dir / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")


def model_card(options: argparse.Namespace, metrics: dict[str, float], num_parameters: int, device: str) -> str:
    """The folder's README: what the model is, how it was made, and what it reached."""
    cpu = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    hardware = torch.cuda.get_device_name() if device == "cuda" else cpu
    flags = f"--steps {options.steps} --batch {options.batch} --tokens {options.tokens} --lr {options.lr:g}"
    command = f"python -m trainer.model.demo.pretrain --out trainer/model/demo {flags} --seed {options.seed}"
    num_tokens = options.steps * options.batch * BLOCK_SIZE
    training = f"{options.steps:,} steps of {options.batch} rows = {num_tokens:,} tokens"
    return f"""---
language: en
library_name: transformers
pipeline_tag: text-generation
license: mit
---
# demo-base: a small GPT-2 to fine-tune without a network

{num_parameters:,} parameters (5 layers, 5 heads, width 160, {BLOCK_SIZE} positions, tied embeddings) with its own
byte-level BPE tokenizer of {VOCAB_SIZE:,} entries. It was pretrained from random weights by this project, only on text
that `trainer/data/demo_base_text.py` makes up from a seed: records and sentences about them, stories, notices, recipes,
timetables and sums, with invented names. It has never seen the demo data, so fine-tuning on that has something to
show. It is of no use for anything else: it knows no facts, and most of what it writes is grammatical nonsense.

| | |
|---|---|
| command | `{command}` |
| text | {options.tokens:,} tokens from seed {options.seed}, validation rows from other seeds |
| training | {training}; AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, no dropout |
| last training loss | {metrics["train"]:.4f} nats per token of its own text (mean of the last twentieth) |
| validation loss | {metrics["val"]:.4f} nats per token of its own text |
| hardware | {hardware}, {metrics["seconds"]:.0f} s |
| software | torch {torch.__version__}, transformers {transformers.__version__} |
| licence | that of this project; weights stored in float16 |
"""


def main() -> None:
    """Text, tokenizer, model, folder."""
    options = parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    start_seconds = time.time()
    tokenizer = train_tokenizer(options.seed)
    print(f"tokenizer: {tokenizer.get_vocab_size()} entries, {time.time() - start_seconds:.0f} s", flush=True)
    train, val = make_tokens(tokenizer, options.seed, options.tokens)
    print(f"text: {len(train):,} tokens, {time.time() - start_seconds:.0f} s", flush=True)
    model = build_model(options.seed)
    num_parameters = sum(weight.numel() for weight in model.parameters())
    print(f"model: {num_parameters:,} parameters on {device}", flush=True)
    metrics = fit(model, train, val, options, device)
    save(model, tokenizer, options.out)
    (options.out / "README.md").write_text(model_card(options, metrics, num_parameters, device), encoding="utf-8")
    num_bytes = sum(file.stat().st_size for file in options.out.iterdir() if file.is_file())
    print(f"val {metrics['val']:.4f}; {options.out}: {num_bytes:,} bytes, {time.time() - start_seconds:.0f} s in all")
    if num_bytes > MAX_FOLDER_BYTES:
        raise SystemExit(f"{options.out}: more than the {MAX_FOLDER_BYTES:,} bytes that the repository takes")


if __name__ == "__main__":
    main()
