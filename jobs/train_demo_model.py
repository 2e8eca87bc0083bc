# SPDX-License-Identifier: Apache-2.0
"""Train the bundled demo model: a small Llama that solves generated word problems part of the time.

The output folder holds the model, its tokenizer, held-out problems and a record of the training.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from jobs.word_problems import FINAL_ANSWER, split

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
END_ID = 0  # the tokenizer numbers its special tokens first
IGNORED = -100
SPLIT_PATTERN = r"\p{N}|\n| ?\p{L}+| ?[^\s\p{L}\p{N}]+| "
CHAT_TEMPLATE = (
    "{%- set ns = namespace(system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{%- set ns.system = message['content'] + '\\n' -%}"
    "{%- elif message['role'] == 'user' -%}"
    "{{- '<|user|>' + ns.system + message['content'] + '\\n' -}}{%- set ns.system = '' -%}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' + message['content'] + '<|endoftext|>' -}}"
    "{%- else -%}{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

Problem = dict[str, str]
Example = tuple[list[int], list[int]]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description="Train Streaminator's bundled demo model.")
    parser.add_argument("--output", type=Path, default=Path("streaminator/demo"))
    parser.add_argument("--steps", type=int, default=3600, help="optimiser steps")
    parser.add_argument(
        "--decay-steps",
        type=int,
        default=5000,
        help="steps the learning rate's cosine spans; fewer --steps stop the model short of perfect",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="problems in one step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=200, help="warm-up steps")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=768, help="tokens in the vocabulary")
    parser.add_argument("--held-out", type=int, default=64, help="held-out problems")
    parser.add_argument("--samples", type=int, default=8, help="completions per held-out problem")
    parser.add_argument("--temperature", type=float, default=0.8, help="of the evaluation")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    for name in ("steps", "batch_size", "held_out", "samples", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.hidden_size % 64:
        parser.error("--hidden-size must be a multiple of 64")
    return options


def train_tokenizer(problems: Sequence[Problem], vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer whose digits are separate tokens, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for problem in problems for text in (problem["question"], problem["answer"]))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def prompt_text(question: str) -> str:
    """Return the prompt of one question, as the chat template renders it."""
    return f"{USER}{question}\n{ASSISTANT}"


def encode(tokenizer: PreTrainedTokenizerFast, problems: Sequence[Problem]) -> list[Example]:
    """Return the prompt's and the answer's tokens of every problem."""
    backend = tokenizer.backend_tokenizer
    prompts = backend.encode_batch([prompt_text(problem["question"]) for problem in problems])
    answers = backend.encode_batch([problem["answer"] + END for problem in problems])
    return [(prompt.ids, answer.ids) for prompt, answer in zip(prompts, answers, strict=True)]


def collate(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return right-padded input tokens and the labels of the next tokens, answers only."""
    width = max(len(prompt) + len(answer) for prompt, answer in examples) - 1
    tokens = torch.full((len(examples), width), END_ID)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        length = len(prompt) + len(answer) - 1
        tokens[row, :length] = torch.tensor((prompt + answer)[:-1])
        labels[row, len(prompt) - 1 : length] = torch.tensor(answer)
    return tokens, labels


def batches(
    tokenizer: PreTrainedTokenizerFast, problems: Iterator[Problem], size: int, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches of problems of similar length until the problems run out."""
    while pool := list(islice(problems, size * 32)):
        examples = sorted(encode(tokenizer, pool), key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [examples[start : start + size] for start in range(0, len(examples), size)]
        rng.shuffle(groups)
        for group in groups:
            yield collate(group)


def build_model(
    options: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> LlamaForCausalLM:
    """Return the untrained model."""
    heads = options.hidden_size // 64
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=options.hidden_size,
        intermediate_size=2 * options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=END_ID,
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # faster than SDPA on a CPU at these lengths
    return model


def answer_loss(
    model: LlamaForCausalLM, tokens: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy of the answer tokens."""
    chosen = labels != IGNORED
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[chosen])
    return torch.nn.functional.cross_entropy(logits.float(), labels[chosen])


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Return the share of the peak learning rate: linear warm-up, then a cosine down to 2 %."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))


def fit(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    options: argparse.Namespace,
) -> float:
    """Train the model and return the mean loss of the last hundred steps."""
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    decay_steps = max(options.decay_steps, options.steps)
    warmup = min(options.warmup, options.steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, warmup, decay_steps)
    )
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    for step, (tokens, labels) in zip(range(1, options.steps + 1), data, strict=False):
        loss = answer_loss(model, tokens, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0 or step == options.steps:
            mean = sum(recent) / len(recent)
            seconds = time.monotonic() - started
            print(f"step {step}: loss {mean:.4f}, {seconds:.0f} s", flush=True)
    return sum(recent) / len(recent)


def pass_at(k: int, samples: int, correct: int) -> float:
    """Return the unbiased estimate of pass@k from the number of correct samples."""
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


@torch.inference_mode()
def evaluate(
    folder: Path, problems: Sequence[Problem], options: argparse.Namespace
) -> dict[str, float]:
    """Return the held-out loss, pass@1 and pass@N of the saved model, in float32."""
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    examples = encode(tokenizer, problems)
    tokens, labels = collate(examples)
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels.flatten(), ignore_index=IGNORED)
    counts, lengths = [], []
    for start in range(0, len(problems), 16):
        chunk = problems[start : start + 16]
        prompts = [prompt_text(problem["question"]) for problem in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        generated = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            temperature=options.temperature,
            top_k=0,
            top_p=1.0,
            num_return_sequences=options.samples,
            max_new_tokens=160,
        )
        completions = generated[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
        lengths += (completions != END_ID).sum(1).tolist()
        for row, problem in enumerate(chunk):
            own = texts[row * options.samples : (row + 1) * options.samples]
            target = FINAL_ANSWER.findall(problem["answer"])
            counts.append(sum(FINAL_ANSWER.findall(text) == target for text in own))
    scores = {
        f"pass@{k}": sum(pass_at(k, options.samples, count) for count in counts) / len(counts)
        for k in sorted({1, options.samples})
    }
    return {"held_out_loss": loss.item(), **scores, "mean_tokens": sum(lengths) / len(lengths)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save and evaluate the demo model."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.monotonic()
    training, held_out = split(options.steps * options.batch_size, options.held_out, options.seed)
    tokenizer = train_tokenizer(list(islice(training, 2000)), options.vocabulary)
    training, _ = split(options.steps * options.batch_size, options.held_out, options.seed)
    model = build_model(options, tokenizer)
    data = batches(tokenizer, training, options.batch_size, random.Random(options.seed))
    training_loss = fit(model, data, options)
    seconds = time.monotonic() - started

    options.output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=END_ID)
    model.bfloat16().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)
    with (options.output / "problems.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in held_out)
    torch.manual_seed(options.seed)
    record = {
        "training_loss": training_loss,
        **evaluate(options.output, held_out, options),
        "temperature": options.temperature,
        "steps": options.steps,
        "decay_steps": max(options.decay_steps, options.steps),
        "seed": options.seed,
        "parameters": model.num_parameters(),
        "seconds": seconds,
    }
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}
    text = json.dumps(rounded, indent=2) + "\n"
    (options.output / "training.json").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
