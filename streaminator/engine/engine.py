# SPDX-License-Identifier: Apache-2.0
"""The stream: prompts in, completions out, one model forward per step.

Each step: schedule -> draft -> pack -> forward -> sample -> verify -> commit -> retire -> learn.

    word      file
    schedule  engine/scheduler.py (and block_manager.py)
    draft     engine/speculation.py -> speculative/memory_store.py -> memory.py; store.py -> ngram.py
    pack      engine/batch.py -> layout.py
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
  tokens' counts. Without drafts it is launched before these tokens are known.
- A completion is a function of weights, prompt, sampling parameters, seed, prompt id and sample
  index; everything else changes speed only.

Used by: `streaminator.session`, `jobs.benchmark`.
"""

import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from streaminator.config import EngineConfig, SamplingParams, SpeculatorConfig
from streaminator.engine.admission import Admission
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
    not_drawn,
)
from streaminator.speculative.draft_budget import DraftBudget, StepCosts
from streaminator.speculative.speculator import Store
from streaminator.speculative.verify import Verdict, verify

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = 0  # for a token that only the device knows


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
        longest = runner.total_length(max_prompt_length, sampling.max_length)
        cache = runner.make_cache(engine, longest)
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
        me = weakref.proxy(self)  # or the cache would stay until garbage is collected
        self.scheduler = Scheduler(
            BlockManager(cache.num_blocks, cache.block_size),
            stream_width=self.stream_width,
            max_batched_tokens=engine.max_batched_tokens,
            kv_cache=engine.kv_cache,
            continuous_batching=engine.continuous_batching,
            in_flight_per_prompt=engine.in_flight_per_prompt or self.stream_width,
            start=lambda prompt, index: me._start(prompt, index),
        )
        self._cache = cache
        self._admission = Admission(
            runner,
            engine,
            cache,
            self.scheduler.block_manager,
            max_length=sampling.max_length,
            max_prompt_length=max_prompt_length,
        )
        self._failed: list[Completion] = []
        self._overlaps = engine.overlap and runner.is_asynchronous
        self._launched: Launched | None = None
        self._collected: Collected | None = None
        self._waited_at: float | None = None
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
        error = self._admission.why_impossible(prompt)
        if error is None:
            self.scheduler.add(prompt)
            return
        for index in prompt.sample_indices:
            self._failed.append(not_drawn(prompt, index, FinishReason.FAILED, error))

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
        they leave to do, here and at the caller's, is done while the GPU computes. So is all else
        where neither of the two has drafts.

        Out of device memory, no token is taken in: it can be called again, after `scheduler.narrow`, and
        then returns what ended before.
        """
        before = self._launched
        if not self._overlaps:
            self._collect(self._launch())
        elif before and not before.drafting and self._speculation.rests_next:
            # Each sequence gains one token, wherever it ends: the GPU need not wait for the host.
            self._assume(before)
            after = self._launch(before)
            self._collect(before, after)
            # After the very last token its rows are void, all of them.
            self._launched = after if self.scheduler.num_open_prompts else None
        else:
            # Should memory run out: what nobody has gone on to yet can be computed again.
            self._launched = before if before and before.is_assumed else None
            self._collect(before)
            self._launched = None
            self._launched = self._launch()
        return self._finish()

    def _launch(self, before: Launched | None = None) -> Launched | None:
        """Begin a forward, if there is one: schedule, draft, pack, and what a GPU is given to do.

        `before`: the step whose tokens only the device knows.
        """
        clock = StepClock(self.runner.device)
        sequences = self.scheduler.schedule()
        clock.lap("schedule")
        if not sequences:
            return None
        sampled = [sequence for sequence in sequences if sequence.is_sampled]
        drafting, survival = self._speculation.draft(sequences, self.scheduler.reserve_draft)
        clock.lap("draft")
        self.runner.clear(self._cache, self.scheduler.block_manager.take_handed_out())
        batch = self.runner.pack(sequences, self._cache.block_size, before and before.newest)
        clock.lap("pack")
        drafting_seconds = self._drafting_seconds(clock, before)
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
        for sequence in sequences:
            if not sequence.is_sampled:
                self._advance(sequence, 0)
        return Launched(
            clock=clock,
            sampled=sampled,
            drafting=drafting,
            survival=survival,
            transfer=Transfer(drawn),
            tokens=drawn.tokens,
            num_tokens=batch.num_tokens,
            num_sampled=batch.num_sampled,
            num_running=len(self.scheduler.running),
            stream_width=self.scheduler.stream_width,
            teaches_costs=self.runner.was_usual,
            drafting_seconds=drafting_seconds,
        )

    def _drafting_seconds(self, clock: StepClock, before: Launched | None) -> float:
        if not self._overlaps or self._waited_at is None:
            return clock.seconds["seconds_draft"]
        return 0.0 if before else time.perf_counter() - self._waited_at

    def _assume(self, launched: Launched) -> None:
        """Let each sequence go on, for the next launch, to the token that the device draws."""
        if launched.is_assumed:
            return
        launched.is_assumed = True
        for sequence in launched.sampled:
            if sequence not in launched.void:
                sequence.token_ids.append(_PLACEHOLDER)
                self._advance(sequence, 0)

    def _collect(self, launched: Launched | None, after: Launched | None = None) -> None:
        """Wait for the tokens of a forward on its way, and go on to them: verify and commit.

        `after`: the step that was launched before they were known.
        """
        if launched is None:
            self._waited_at = None
            return
        tokens, logprobs, top_ids, top_probs = launched.transfer.wait()
        self._waited_at = time.perf_counter()
        launched.clock.lap("sample")
        verdicts = verify(launched.sampled, tokens, logprobs)
        if launched.void:
            verdicts = [v for v in verdicts if v.sequence not in launched.void]
        launched.clock.lap("verify")
        gains, ended = [], []
        for verdict in verdicts:
            sequence = verdict.sequence
            if launched.is_assumed:
                sequence.token_ids.pop()
            before = len(sequence.token_ids)
            reason, error = self._commit(verdict, is_assumed=launched.is_assumed)
            new = sequence.token_ids[before:]
            if new:
                gains.append(self._speculation.gain(verdict, new, has_ended=bool(reason)))
            if reason is not None:
                # A token behind the end may have been computed, whose keys paged attention never reads.
                is_spoilt = reason is FinishReason.FAILED or (
                    launched.is_assumed and not self.runner.is_paged
                )
                ends_prompt = self.scheduler.retire(sequence, is_spoilt=is_spoilt)
                ended.append(Ended(sequence, reason, error, time.time(), ends_prompt))
                if after is not None:
                    after.void.add(sequence)
        if after is not None:
            settled = (launched.sampled[row] for row in launched.transfer.settled)
            after.void.update(s for s in settled if s not in launched.void)
        self._speculation.advance(gains, top_ids, top_probs, overlaps=self._overlaps)
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
        if after is not None:
            after.clock.restart()

    def _finish(self) -> list[Completion]:
        """What the newest tokens leave to do: learn from them, and write down what has ended."""
        finished, self._failed = self._failed, []
        collected, self._collected = self._collected, None
        if collected is None:
            return finished
        self._speculation.learn()
        for end in collected.ended:
            text = self._stopping.text(end.sequence)
            finished.append(end.completion(text, self._speculation.distributions(end.sequence)))
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
            collected.num_new, collected.num_accepted, clock.total, launched.drafting_seconds,
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
        self._admission.make_room(max_prompt_length)

    def forget_keys(self) -> None:
        """Between prompts: the weights have changed, so that no key or value may be used again."""
        assert not self.has_work
        self.scheduler.block_manager.forget()

    def _start(self, prompt: Prompt, sample_index: int) -> Sequence:
        sequence = Sequence(
            prompt,
            sample_index,
            list(prompt.token_ids),
            noise_key(self._sampling.seed, prompt.prompt_id, sample_index),
            self.runner.total_length(len(prompt.token_ids), self._sampling.max_length),
            time.time(),
        )
        self._speculation.start(sequence)
        return sequence

    def _advance(self, sequence: Sequence, num_accepted: int) -> None:
        """What was scheduled of it is in the cache, and so many drafts are; the rest is not."""
        cached = sequence.num_cached_tokens + sequence.num_scheduled_tokens
        self.scheduler.commit(sequence, cached + num_accepted)

    def _commit(
        self, verdict: Verdict, *, is_assumed: bool
    ) -> tuple[FinishReason | None, str | None]:
        """Add the drawn tokens, up to the one that ends the completion: why, and what went wrong."""
        sequence, drawn = verdict.sequence, verdict.drawn
        if INVALID_TOKEN in drawn and sequence.draft:
            # A draft's keys that are not finite reach the rows before it, through the mask: see
            # what the model says without them.
            sequence.may_draft = False
            self.scheduler.restart(sequence)
            drawn.clear()
            return None, None
        sequence.drafted.append(len(sequence.draft) + len(sequence.alternatives))
        sequence.accepted.append(len(drawn) - 1)
        reason, error = self._stopping.add(verdict)
        if reason is None and not is_assumed:
            # The keys and values of the chain's accepted part stay; a second choice's are not in the
            # cache, the newest token's are not computed yet.
            self._advance(sequence, verdict.num_accepted)
        return reason, error
