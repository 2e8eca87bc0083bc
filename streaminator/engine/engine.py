# SPDX-License-Identifier: Apache-2.0
"""The stream: prompts in, completions out, one model forward per step.

Each step: schedule -> draft -> pack -> forward -> sample -> verify -> commit -> retire -> learn.

    word      file
    schedule  engine/scheduler.py (and block_manager.py)
    draft     engine/speculation.py -> speculative/memory_store.py -> memory.py; store.py -> ngram.py
    pack      engine/batch.py
    forward   engine/model_runner.py -> the Hugging Face model -> engine/attention.py, kv_cache.py;
              Llamas on a CPU: fused_model.py -> fused_layers.py -> kernels.py;
              on a GPU: step_graphs.py -> paged_attention.py;
              Llamas there: gpu_model.py -> gpu_layers.py -> gpu_products.py
    sample    engine/sampler.py -> kernels.py (CPU), gpu_sampling.py
    verify    speculative/verify.py
    commit    `Engine._commit` here, engine/stopping.py
    retire    scheduler.retire; `Engine._finish` here

Invariants
- Every (prompt, sample_index) added comes out exactly once, finished or failed.
- On a GPU the next step is launched before a step's tokens are learned and its completions handed
  out: the host works while the GPU does. Only drafts know of that, which come without the newest
  tokens' counts.
- A completion is a function of weights, prompt, sampling parameters, seed, prompt id and sample
  index; everything else changes speed only.

Used by: `streaminator.session`, `jobs.benchmark`.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.block_manager import BlockManager
from streaminator.engine.model_runner import ModelRunner
from streaminator.engine.sampler import INVALID_TOKEN, Transfer, noise_key, sample
from streaminator.engine.scheduler import Scheduler
from streaminator.engine.speculation import Speculation
from streaminator.engine.step import Collected, Ended, Launched
from streaminator.engine.step_clock import StepClock
from streaminator.engine.step_costs import measure_step_costs
from streaminator.engine.stopping import StopChecker
from streaminator.engine.stream_width import find_stream_width
from streaminator.sequence import (
    Completion,
    FinishReason,
    Prompt,
    Sequence,
    StepStats,
)
from streaminator.speculative.draft_budget import DraftBudget, StepCosts
from streaminator.speculative.speculator import Store
from streaminator.speculative.verify import Verdict, verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Engine:
    """A stream of `stream_width` slots over one model."""

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: "PreTrainedTokenizerBase | None",
        *,
        sampling: SamplingParams,
        engine: EngineConfig,
        speculator: SpeculatorConfig,
        max_prompt_length: int = 512,
        max_in_flight: int | None = None,
        step_costs: StepCosts | None = None,
        num_kept_prompts: int = 0,
    ) -> None:
        """Wire the parts, measure what steps cost and allocate the KV cache.

        Args:
            runner: the loaded model.
            tokenizer: for text and stop strings; None: token ids only.
            sampling: how every completion is drawn.
            engine: stream width, cache, batching.
            speculator: what drafts are made of.
            max_prompt_length: prompt tokens to size the cache for; longer ones still run.
            max_in_flight: completions that can be in flight at once at most, if that is known.
            step_costs: what the draft budget counts with; None: measured.
            num_kept_prompts: finished prompts whose speculators stay, for when they come again.
        """
        self.runner = runner
        runner.pack_weights(engine.block_size)
        self._sampling = sampling
        self._stopping = StopChecker(sampling, runner.eos_token_ids, tokenizer)
        self._max_length = self._total_length(max_prompt_length)
        self._speculation = Speculation(
            speculator,
            is_greedy=sampling.temperature == 0,
            num_kept_prompts=num_kept_prompts,
            tokenizer=tokenizer,
        )
        num_top = self._speculation.num_top
        plain = None
        self.stream_width = engine.stream_width or 0
        """Slots, as given or chosen."""
        if engine.stream_width is None:
            self.stream_width, plain = find_stream_width(
                runner,
                engine,
                sampling,
                max_prompt_length=max_prompt_length,
                max_in_flight=max_in_flight,
                num_top=num_top,
            )
            engine = replace(engine, stream_width=self.stream_width)
        self._config = engine
        cache = runner.make_cache(engine, self._max_length)
        if self._speculation.has_budget:
            self._speculation.budget = DraftBudget(
                step_costs
                or measure_step_costs(
                    runner,
                    engine,
                    sampling,
                    stream_width=self.stream_width,
                    max_draft=speculator.max_draft,
                    num_top=num_top,
                    plain=plain,
                )
            )
        self.scheduler = Scheduler(
            BlockManager(cache.num_blocks, cache.block_size),
            stream_width=self.stream_width,
            max_batched_tokens=engine.max_batched_tokens,
            kv_cache=engine.kv_cache,
            continuous_batching=engine.continuous_batching,
            in_flight_per_prompt=engine.in_flight_per_prompt or self.stream_width,
            start=self._start,
        )
        self._cache = cache
        self._failed: list[Completion] = []
        self._overlaps = engine.overlap and runner.is_asynchronous
        self._launched: Launched | None = None
        self._collected: Collected | None = None
        self.last_step: StepStats | None = None
        """Counts and times of the newest step."""

    @property
    def memory(self) -> str:
        """What weights and KV cache take, in words."""
        return self.runner.describe_memory(self._cache)

    @property
    def store(self) -> Store:
        """The speculators of the open prompts."""
        return self._speculation.store

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        is_open = self._failed or self._launched or self._collected
        return bool(is_open or self.scheduler.num_open_prompts)

    def add(self, prompt: Prompt) -> None:
        """Queue a prompt; one that cannot run comes out as failed completions."""
        if not prompt.sample_indices:
            return
        error = self._why_impossible(prompt)
        if error is None:
            self.scheduler.add(prompt)
            return
        now = time.time()
        for sample_index in prompt.sample_indices:
            sequence = Sequence(prompt, sample_index, list(prompt.token_ids), 0, 0, now)
            self._failed.append(self._completion(sequence, FinishReason.FAILED, error, now))

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Completion]:
        """Draw all completions of `prompts`, in the order they finish."""
        for prompt in prompts:
            self.add(prompt)
        while self.has_work:
            yield from self.step()

    # Entered here, once per step: that takes tens of microseconds.
    @torch.inference_mode()
    def step(self) -> list[Completion]:
        """Run one forward; returns the completions that ended with it.

        Where steps overlap it is only begun, and those come back that ended with the one before: what
        they leave to do, here and at the caller's, is done while the GPU computes.

        Out of device memory, no forward has begun: it can be called again, after `scheduler.narrow`,
        and then returns what ended before.
        """
        if self._overlaps:
            self._collect()
            self._launch()
        else:
            self._launch()
            self._collect()
        return self._finish()

    def _launch(self) -> None:
        """Begin a forward: schedule, draft, pack, and what a GPU is given to do."""
        clock = StepClock(self.runner.device)
        sequences = self.scheduler.schedule()
        clock.lap("schedule")
        if not sequences:
            return
        drafting, survival = self._speculation.draft(sequences, self.scheduler.reserve_draft)
        clock.lap("draft")
        self.runner.clear(self._cache, self.scheduler.block_manager.take_handed_out())
        batch = self.runner.pack(sequences, self._cache.block_size)
        clock.lap("pack")
        logits = self.runner.forward(batch, self._cache)
        clock.lap("forward")
        drawn = sample(
            logits,
            batch.noise_keys,
            batch.noise_positions,
            self._sampling,
            self._speculation.num_top,
            self.runner.sampling_kernels,
        )
        self._launched = Launched(
            clock=clock,
            sequences=sequences,
            drafting=drafting,
            survival=survival,
            transfer=Transfer(drawn),
            num_tokens=batch.num_tokens,
            num_sampled=batch.num_sampled,
            num_running=len(self.scheduler.running),
            stream_width=self.scheduler.stream_width,
            teaches_costs=self.runner.was_usual,
        )

    def _collect(self) -> None:
        """Wait for the tokens of the forward on its way, and go on to them: verify and commit."""
        launched, self._launched = self._launched, None
        if launched is None:
            return
        tokens, logprobs, top_ids, top_probs = launched.transfer.wait()
        launched.clock.lap("sample")
        verdicts = verify(launched.sequences, tokens, logprobs)
        launched.clock.lap("verify")
        gains, ended = [], []
        for verdict in verdicts:
            before = len(verdict.sequence.token_ids)
            reason, error = self._commit(verdict)
            new = verdict.sequence.token_ids[before:]
            if new:
                gains.append(self._speculation.gain(verdict, new, has_ended=bool(reason)))
            if reason is not None:
                sequence, has_failed = verdict.sequence, reason is FinishReason.FAILED
                ends_prompt = self.scheduler.retire(sequence, has_failed=has_failed)
                ended.append(Ended(sequence, reason, error, time.time(), ends_prompt))
        self._speculation.advance(gains, top_ids, top_probs)
        self._collected = Collected(
            launched,
            verdicts,
            gains,
            ended,
            at=time.time(),
            num_blocks_used=self.scheduler.block_manager.num_used,
            device_memory=self.runner.memory_in_use(),
        )
        launched.clock.lap("commit")
        if self._overlaps:
            self._observe(self._collected)

    def _finish(self) -> list[Completion]:
        """What the newest tokens leave to do: learn from them, and write down what has ended."""
        finished, self._failed = self._failed, []
        collected, self._collected = self._collected, None
        if collected is None:
            return finished
        self._speculation.learn()
        for end in collected.ended:
            completion = self._completion(end.sequence, end.reason, end.error, end.at)
            finished.append(completion)
            self._speculation.finish(end.sequence, has_failed=end.reason is FinishReason.FAILED)
            if end.ends_prompt:
                self.store.drop(end.sequence.prompt)
        at = collected.at
        if not self._overlaps:
            collected.launched.clock.lap("commit")
            self._observe(collected)
            at = time.time()
        self.last_step = collected.stats(at)
        return finished

    def _observe(self, collected: Collected) -> None:
        """Tell the draft budget, before it is asked again, what a step cost and brought."""
        launched, clock = collected.launched, collected.launched.clock
        self._speculation.observe_step(
            launched.num_tokens, launched.num_tokens - launched.num_sampled, collected.num_drafts,
            collected.num_new, collected.num_accepted, clock.total, clock.seconds["seconds_draft"],
            teaches_costs=launched.teaches_costs,
        )  # fmt: skip

    def take_released(self) -> list[Prompt]:
        """Prompts given up after `scheduler.release`, all of whose completions have come out."""
        if self._collected:
            return []
        released = self.scheduler.take_released()
        for prompt in released:
            self.store.drop(prompt)
        return released

    def drop_rest(self, prompt: Prompt) -> None:
        """Draw no more of a prompt, one of whose completions the newest step has returned.

        Not where steps overlap: its next completion is in flight by then.
        """
        assert not self._overlaps
        self.scheduler.drop(prompt)
        self.store.drop(prompt)

    def restart(self, *, seed: int, max_prompt_length: int) -> None:
        """Between prompts: draw with another seed, and have room for longer prompts from now on."""
        assert not self.has_work
        self._sampling = replace(self._sampling, seed=seed)
        length = self._total_length(max_prompt_length)
        if length > self._max_length:
            self._max_length = length
            num_blocks = self.runner.num_blocks(self._config, length)
            if num_blocks > self._cache.num_blocks:
                self._grow(num_blocks)

    def forget_keys(self) -> None:
        """Between prompts: the weights have changed, so that no key or value may be used again."""
        assert not self.has_work
        self.scheduler.block_manager.forget()

    def _start(self, prompt: Prompt, sample_index: int) -> Sequence:
        limit = len(prompt.token_ids) + self._sampling.max_length
        sequence = Sequence(
            prompt,
            sample_index,
            list(prompt.token_ids),
            noise_key(self._sampling.seed, prompt.prompt_id, sample_index),
            min(limit, self.runner.max_model_len or limit),
            time.time(),
        )
        self._speculation.start(sequence)
        return sequence

    def _commit(self, verdict: Verdict) -> tuple[FinishReason | None, str | None]:
        """Add the drawn tokens, up to the one that ends the completion: why, and what went wrong."""
        sequence, drawn = verdict.sequence, verdict.drawn
        cached = sequence.num_cached_tokens + sequence.num_scheduled_tokens
        if INVALID_TOKEN in drawn and sequence.draft:
            # A draft's keys that are not finite reach the rows before it, through the mask: see
            # what the model says without them.
            sequence.may_draft = False
            self.scheduler.restart(sequence)
            drawn.clear()
            return None, None
        if drawn:
            sequence.drafted.append(len(sequence.draft) + len(sequence.alternatives))
            sequence.accepted.append(len(drawn) - 1)
        reason, error = self._stopping.add(verdict)
        if reason is None:
            # The keys and values of the chain's accepted part stay; a second choice's are not in the
            # cache, the newest token's are not computed yet.
            self.scheduler.commit(sequence, cached + verdict.num_accepted)
        return reason, error

    def _completion(
        self, sequence: Sequence, reason: FinishReason, error: str | None, finished_at: float
    ) -> Completion:
        return Completion(
            prompt=sequence.prompt,
            sample_index=sequence.sample_index,
            token_ids=sequence.completion_token_ids,
            text=self._stopping.text(sequence),
            finish_reason=reason,
            logprobs=sequence.logprobs,
            from_draft=sequence.from_draft,
            drafted=sequence.drafted,
            accepted=sequence.accepted,
            started_at=sequence.started_at,
            finished_at=finished_at,
            error=error,
            distributions=self._speculation.distributions(sequence),
        )

    def _why_impossible(self, prompt: Prompt) -> str | None:
        num = len(prompt.token_ids)
        limit = self.runner.max_model_len
        if num == 0:
            return "the prompt has no tokens"
        if limit is not None and num >= limit:
            return f"the prompt has {num} tokens and the model's context is {limit}"
        if min(prompt.token_ids) < 0 or max(prompt.token_ids) >= self.runner.vocab_size:
            return (
                f"the prompt's tokens go from {min(prompt.token_ids)} to {max(prompt.token_ids)} "
                f"and the model's vocabulary is {self.runner.vocab_size}: tokenizer and model do "
                "not belong together"
            )
        manager = self.scheduler.block_manager
        needed = manager.num_blocks_for(self._total_length(num)) + 1
        if needed > manager.num_blocks:
            if self._config.num_blocks is not None:
                return (
                    f"it may need {needed} KV blocks: raise --num_blocks {self._config.num_blocks}"
                )
            if self._config.kv_memory is not None:
                return (
                    f"it may need {needed} KV blocks: raise --kv_memory {self._config.kv_memory:g}"
                )
            self._grow(needed)
        return None

    def _total_length(self, num_prompt_tokens: int) -> int:
        length = num_prompt_tokens + self._sampling.max_length
        return min(length, self.runner.max_model_len or length)

    def _grow(self, num_blocks: int) -> None:
        self._cache.grow(num_blocks)
        self.scheduler.block_manager.grow(num_blocks)
